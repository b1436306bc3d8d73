"""Steps of deformable registration: velocity, displacement, warped volume, what they cost, and less of it.

A displacement (B, 3, H, W, D) is in voxels along the three axes: warped(p) = volume(p + displacement(p)).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from monai.losses import DiffusionLoss, LocalNormalizedCrossCorrelationLoss
from monai.networks.blocks import DVF2DDF, Warp
from torch import Tensor
from torch.nn import functional

from scripts.losses import jacobian_determinant

__all__ = ["Mismatch", "along", "refine", "to_displacement", "warp"]


def warp(volume: Tensor, displacement: Tensor) -> Tensor:
    """Volume (B, C, H, W, D) deformed by a displacement, linearly interpolated; beyond its border it goes on as there."""
    # made anew each time: MONAI's keeps the grid of its last call, on the device and in the mode of that call
    return Warp(padding_mode="border")(volume, displacement)


def to_displacement(velocity: Tensor, reduction: int = 1, squarings: int = 5) -> Tensor:
    """Displacement after unit time of a velocity that does not change, by scaling and squaring.

    Dalca et al. 2019, arXiv 1903.03545: space hardly ever folds over. It is done at half the resolution of the images at
    most, with an eighth of the work.

    Args:
        velocity: (B, 3, H, W, D) on a grid that is coarser than the images' by ``reduction``, in its voxels.
        reduction: edge of its voxels, in voxels of the images.
        squarings: how often the time is halved; with 0, ``velocity`` is the displacement itself.

    Returns:
        (B, 3, ...) on the grid of the images, in their voxels.
    """
    if squarings:
        half = 0.5 if reduction == 1 else 1
        integrated = DVF2DDF(squarings, padding_mode="border")(_resized(velocity, half))
        velocity = _resized(integrated, 1 / half)
    return _resized(velocity, reduction)


def _resized(displacement: Tensor, factor: float) -> Tensor:
    """The same displacement on a grid so many times finer, in its voxels."""
    if factor == 1:
        return displacement
    return factor * functional.interpolate(displacement, scale_factor=factor, mode="trilinear")


@dataclass(frozen=True)
class Mismatch:
    """What a displacement costs that is to deform a source into a frame.

    Args:
        smoothness: weight of the mean squared slope, beside the similarity.
        squared_error: weight of the mean squared error of the grey levels as a share of what it is without any motion, so
            that hearts that move little count as much as others; 0 in the papers.
        folding: weight of the mean by which the Jacobian determinant lies below 0 (Mok and Chung 2020, arXiv 2003.09514);
            0 in the papers.
        similarity: of two volumes (B, 1, H, W, D), -1 where they are alike and 0 where they have nothing in common: the
            mean squared local correlation, negated.
    """

    smoothness: float = 1.0
    squared_error: float = 0.0
    folding: float = 0.0
    similarity: Callable[[Tensor, Tensor], Tensor] = field(default_factory=LocalNormalizedCrossCorrelationLoss)

    def __call__(self, source: Tensor, displacement: Tensor, frame: Tensor) -> dict[str, Tensor]:
        """Weighted losses of source and frame, (B, 1, H, W, D) in [-1, 1]; those of weight 0 are left out."""
        pred = warp(source, displacement)
        losses = {
            "similarity": 1 + self.similarity(pred, frame),
            "smoothness": self.smoothness * DiffusionLoss()(displacement),
        }
        if self.squared_error:
            left, before = ((image - frame).square().flatten(1).mean(dim=1) for image in (pred, source))
            losses["squared_error"] = self.squared_error * (left / before.clamp(min=1e-4)).mean()
        if self.folding:
            losses["folding"] = self.folding * functional.relu(-jacobian_determinant(displacement)).mean()
        return losses


def refine(
    velocity: Tensor,
    source: Tensor,
    target: Tensor,
    mismatch: Mismatch,
    displacements: Callable[[Tensor], Tensor],
    steps: int,
    coarse_steps: int = 0,
    rate: float = 0.2,
) -> Tensor:
    """Fit a velocity to one pair, beginning with what a network says of it, by gradient steps of Adam.

    Balakrishnan et al. 2019, arXiv 1809.05231, instance-specific optimization.

    Args:
        velocity: (B, 1, 3, ...), on whatever grid.
        source: volumes (B, 1, H, W, D).
        target: likewise.
        mismatch: what is lowered.
        displacements: makes of velocities (B, 1, 3, ...) displacements (B, 1, 3, H, W, D).
        steps: number of steps.
        coarse_steps: number of steps before them at half the resolution, each an eighth of the work.
        rate: length of a step, in the velocity's voxels.

    Returns:
        the velocity that fits better, as ``velocity``.
    """
    if coarse_steps:
        whole = velocity[:, 0]
        coarse, *images = _resized(whole, 0.5), *(functional.avg_pool3d(image, 2) for image in (source, target))
        refined = refine(coarse[:, None], *images, mismatch, displacements, coarse_steps, rate=rate)
        velocity = (whole + _resized(refined[:, 0] - coarse, 2))[:, None]
    with torch.inference_mode(False), torch.enable_grad():
        # no gradient passes a tensor that was made in inference mode, but its copy
        source, target, velocity = source.clone(), target.clone(), velocity.clone().requires_grad_()
        optimizer = torch.optim.Adam([velocity], lr=rate)
        for _ in range(steps):
            loss = sum(mismatch(source, displacements(velocity)[:, 0], target).values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return velocity.detach()


def along(velocities: Tensor, whole: Tensor, refined: Tensor) -> Tensor:
    """Velocities on the way of a refined one, each as far along it as it was along the one before.

    Args:
        velocities: (B, F, 3, ...).
        whole: velocity of the whole way, (B, 1, 3, ...).
        refined: likewise.

    Returns:
        multiples of ``refined``, (B, F, 3, ...).
    """
    products, square = ((v * whole).flatten(2).sum(dim=2) for v in (velocities, whole))
    share = products / square.clamp(min=1e-12)
    return share[..., None, None, None, None] * refined
