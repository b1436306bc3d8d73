from __future__ import annotations

import torch
from monai.losses import LocalNormalizedCrossCorrelationLoss

from scripts.tasks.motion.benchmark import DenseCorrelation


def test_a_dense_window_gives_the_correlation_that_monai_gives():
    generator = torch.Generator().manual_seed(0)
    pred, target = (torch.rand(1, 1, 12, 10, 11, generator=generator) for _ in range(2))
    expected = LocalNormalizedCrossCorrelationLoss(kernel_size=5)(pred, target)
    torch.testing.assert_close(DenseCorrelation(5)(pred, target), expected, rtol=1e-4, atol=1e-5)
