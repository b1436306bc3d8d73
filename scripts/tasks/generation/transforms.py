"""Transforms of the generative bundles alone: the noise that an image begins with."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform
from torch import Tensor

__all__ = ["SeededNoised", "seeded_noise"]


def seeded_noise(seed: int, shape: Sequence[int]) -> Tensor:
    """Standard normal noise of any shape, float32, which depends on the seed alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class SeededNoised(MapTransform):
    """Draw the noise that a generative network starts from, see :func:`seeded_noise`.

    Args:
        keys: keys of the noise.
        shape: its shape (C, H, W[, D]).
        seed_key: key of the seed, a whole number of 0 or more.
    """

    def __init__(self, keys: KeysCollection, shape: Sequence[int], seed_key: str = "seed") -> None:
        super().__init__(keys)
        self.shape, self.seed_key = tuple(shape), seed_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        return {**data, **{key: seeded_noise(data[self.seed_key], self.shape) for key in self.keys}}
