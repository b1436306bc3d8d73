from __future__ import annotations

import torch
from conftest import CARDIAC
from monai.losses import LocalNormalizedCrossCorrelationLoss

from scripts.bundle import build_network
from scripts.tasks.motion.benchmark import DenseCorrelation, control


def test_a_dense_window_gives_the_correlation_that_monai_gives():
    generator = torch.Generator().manual_seed(0)
    pred, target = (torch.rand(1, 1, 12, 10, 11, generator=generator) for _ in range(2))
    expected = LocalNormalizedCrossCorrelationLoss(kernel_size=5)(pred, target)
    torch.testing.assert_close(DenseCorrelation(5)(pred, target), expected, rtol=1e-4, atol=1e-5)


def test_the_control_refines_as_the_default_does_and_has_no_weights():
    without, default = control(CARDIAC), build_network(CARDIAC, amp=False)
    for setting in ("refinement_steps", "coarse_steps", "time_curve", "squarings", "reduction", "amp", "gammas"):
        assert getattr(without, setting) == getattr(default, setting)
    for weight in ("smoothness", "squared_error", "folding"):
        assert getattr(without.mismatch, weight) == getattr(default.mismatch, weight)
    assert not list(without.parameters())
