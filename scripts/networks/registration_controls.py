"""What networks of motion are compared with, on the same rails: no network at all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from scripts.networks.cine_network import CineNet, as_factors

__all__ = ["RefinementNet"]


class RefinementNet(CineNet):
    """The refinement alone: it begins with a field of zeros, and a frame lies at γ of the way of what it finds.

    Nothing is trained; how far a method's networks are ahead of this control is what they have learnt.

    Args:
        kwargs: arguments of :class:`CineNet`; ``refinement_steps`` 0 repeats the source.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.register_buffer("still", torch.zeros(()), persistent=False)  # tells the device, as nothing else is kept

    def motion(self, source: Tensor, target: Tensor) -> Tensor:
        """A field of zeros (B, 3, ...) on the grid of the refinement."""
        return source.new_zeros(len(source), 3, *(size // self.reduction for size in source.shape[2:]))

    def velocities(self, motion: Tensor, gammas: Sequence[float]) -> Tensor:
        return motion[:, None].expand(-1, len(gammas), *motion.shape[1:])

    def refined_velocities(self, motion: Tensor, gammas: Sequence[float], whole: Tensor, refined: Tensor) -> Tensor:
        return as_factors(gammas, refined) * refined
