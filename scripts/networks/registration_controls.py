"""What networks of motion are compared with, on the same rails: no network at all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scripts.networks.cine_network import CineNet
from scripts.networks.registration import warp

__all__ = ["RefinementNet", "fit_time_curve"]


class RefinementNet(CineNet):
    """The refinement alone: it begins with a field of zeros, and a frame lies at γ of the way of what it finds.

    Nothing is trained; how far a method's networks are ahead of this control is what they have learnt.

    Args:
        time_curve: see :class:`CineNet`; None, or an empty one, for γ itself.
        kwargs: arguments of :class:`CineNet`; ``refinement_steps`` 0 repeats the source.
    """

    def __init__(self, time_curve: Sequence[float] | None = None, **kwargs: Any) -> None:
        super().__init__(time_curve=time_curve or (0.0, 1.0), **kwargs)
        self.register_buffer("still", torch.zeros(()), persistent=False)  # tells the device, as nothing else is kept

    def motion(self, source: Tensor, target: Tensor) -> Tensor:
        """A field of zeros (B, 3, ...) on the grid of the refinement."""
        return source.new_zeros(len(source), 3, *(size // self.reduction for size in source.shape[2:]))

    def velocities(self, motion: Tensor, gammas: Sequence[float]) -> Tensor:
        return motion[:, None].expand(-1, len(gammas), *motion.shape[1:])


@torch.no_grad()
def fit_time_curve(network: CineNet, cines: Iterable[Tensor], knots: int = 6, candidates: int = 21) -> list[float]:
    """One time curve for all hearts: how much of the way from source to target is gone, on average, at each moment.

    Of each frame of each cine, the share of the whole velocity is found by which the source comes nearest to it (least
    squared error); a broken line through them is fitted by least squares.

    Args:
        network: finds the velocity of the whole way.
        cines: (1, F, H, W, D) each, sizes being multiples of 8.
        knots: number of points of the line, evenly spaced in time; its ends are 0 and 1.
        candidates: number of shares that are tried, evenly spaced from 0 to 1.

    Returns:
        shares at the points.
    """
    shares = torch.linspace(0, 1, candidates).tolist()
    times, found = [], []
    for cine in cines:
        source, target, frames = cine[:, :1], cine[:, -1:], cine[0, 1:-1]
        _, whole = network.whole_velocities(network.motion(source, target), source, target)
        warped = [warp(source, network.displacements(share * whole)[:, 0])[0, 0] for share in shares]
        errors = torch.stack([(frames - made).square().flatten(1).mean(dim=1) for made in warped])
        times += (np.arange(1, len(frames) + 1) / (len(frames) + 1)).tolist()
        found += [shares[k] for k in errors.argmin(dim=0).tolist()]
    points = np.linspace(0, 1, knots)
    hats = np.stack([np.interp(times, points, row) for row in np.eye(knots)], axis=1)
    inner = np.linalg.lstsq(hats[:, 1:-1], np.array(found) - hats[:, -1], rcond=None)[0]
    return [0.0, *inner.round(4).tolist(), 1.0]
