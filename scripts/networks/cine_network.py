"""What the methods that make a cine between two of its phases have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from monai.losses import LocalNormalizedCrossCorrelationLoss
from torch import Tensor, nn
from torch.nn import functional

from scripts.networks.registration import Mismatch, along, refine, to_displacement, warp
from scripts.precision import Amp, check_amp

__all__ = ["CineNet", "as_factors"]

MULTIPLE = 8  # of every spatial size: three halvings in each network, where the blocks of voxels count as one


class CineNet(nn.Module):
    """Frames between a source and a target volume, each the source deformed a part of the way.

    A method gives :meth:`motion`, what is found once for a pair, and :meth:`velocities`, the fields of its networks at
    fractions γ of the way; γ = 0 is the source itself, exactly.

    Args:
        num_frames: number of frames from source (γ = 0) to target (γ = 1), both counted, evenly spaced.
        gammas: the fractions themselves, in place of ``num_frames``.
        reduction: edge of the blocks of voxels that the networks take for one voxel with so many more channels, and of the
            grid on which they find the motion: none of the images is lost, with less work and two halvings of the grid in
            place of three; 1 in the paper.
        diffeomorphic: take what the network gives for a velocity, to be integrated, or for the displacement itself.
        integration_steps: number of squarings, see :func:`scripts.networks.registration.to_displacement`.
        similarity_weight: weight of all of the mismatch in the training (λ of the paper).
        squared_error: see :class:`scripts.networks.registration.Mismatch`.
        smoothness: see there.
        folding: see there.
        frames_weight: weight, beside the target's, of a frame between, where a cine has them; 0 is the paper's training,
            which sees source and target alone.
        refinement_steps: gradient steps by which ``forward`` improves the networks' field of a pair, lowering what they
            are trained by; no frame between is looked at. 0 in the paper.
        coarse_steps: steps before these at half the resolution, see :func:`scripts.networks.registration.refine`.
        time_curve: how much of the refined way is gone at evenly spaced γ from 0 to 1, in between linearly, the same for all
            hearts, see :func:`scripts.networks.registration_controls.fit_time_curve`; None, or an empty one, for what the
            networks say.
        window: edge in voxels of the window of the normalised cross-correlation.
        max_batch: number of frames that go through a network at once; a few, which the processor's memory keeps up with.
        amp: bfloat16 in the networks, see :func:`scripts.precision.autocast`.

    ``forward`` takes pairs (B, 2, H, W, D), source and target, in [-1, 1], of any size, and returns the frames
    (B, F, H, W, D).

    Raises:
        ValueError: by ``forward`` for another number of channels or axes; for fractions that are none.
    """

    def __init__(
        self,
        num_frames: int = 10,
        gammas: Sequence[float] | None = None,
        reduction: int = 1,
        diffeomorphic: bool = False,
        integration_steps: int = 5,
        similarity_weight: float = 20.0,
        squared_error: float = 0.0,
        smoothness: float = 1.0,
        folding: float = 0.0,
        frames_weight: float = 0.0,
        refinement_steps: int = 0,
        coarse_steps: int = 0,
        time_curve: Sequence[float] | None = None,
        window: int = 9,
        max_batch: int = 2,
        amp: Amp = False,
    ) -> None:
        super().__init__()
        if gammas is None and num_frames < 2:
            raise ValueError(f"num_frames ({num_frames}) must be at least 2, source and target")
        self.gammas = _fractions([i / (num_frames - 1) for i in range(num_frames)] if gammas is None else gammas)
        self.reduction, self.squarings = reduction, integration_steps if diffeomorphic else 0
        self.mismatch = Mismatch(smoothness, squared_error, folding, LocalNormalizedCrossCorrelationLoss(kernel_size=window))
        self.similarity_weight, self.frames_weight = similarity_weight, frames_weight
        self.refinement_steps, self.coarse_steps, self.time_curve = refinement_steps, coarse_steps, time_curve
        self.max_batch, self.amp = max_batch, check_amp(amp)

    def motion(self, source: Tensor, target: Tensor) -> Any:
        """What is found once for pairs (B, 1, H, W, D), sizes being multiples of 8."""
        raise NotImplementedError

    def velocities(self, motion: Any, gammas: Sequence[float]) -> Tensor:
        """Fields (B, F, 3, ...) at the fractions γ of the way, on the networks' grid, in its voxels.

        They are velocities if ``diffeomorphic``, or displacements.
        """
        raise NotImplementedError

    def refined_velocities(self, motion: Any, gammas: Sequence[float], whole: Tensor, refined: Tensor) -> Tensor:
        """The same on the way of a refined velocity, (B, 1, 3, ...), that was ``whole`` before."""
        if not self.time_curve:
            return along(self.velocities(motion, gammas), whole, refined)
        shares = np.interp(gammas, np.linspace(0, 1, len(self.time_curve)), self.time_curve)
        return as_factors(shares.tolist(), refined) * refined

    def whole_velocities(self, motion: Any, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Velocity of the whole way, (B, 1, 3, ...), as the networks say it and refined."""
        whole = self.velocities(motion, [1.0])
        steps = (self.refinement_steps, self.coarse_steps)
        return whole, refine(whole, source, target, self.mismatch, self.displacements, *steps)

    def displacements(self, velocities: Tensor) -> Tensor:
        """Displacements (B, F, 3, H, W, D) in voxels of the images, of what :meth:`velocities` gives."""
        flat = to_displacement(velocities.flatten(0, 1), self.reduction, self.squarings)
        return flat.unflatten(0, velocities.shape[:2])

    @torch.no_grad()
    def displace(self, image: Tensor, gammas: Sequence[float] | None = None) -> Tensor:
        """Displacements of pairs (B, 2, H, W, D) at the fractions γ of the way, by default those of the settings.

        Returns:
            (B, F, 3, H, W, D), in voxels along the three axes: frame(p) = source(p + displacement(p)).
        """
        if image.ndim != 5 or image.shape[1] != 2:
            raise ValueError(f"image must be (B, 2, H, W, D), source and target; got {tuple(image.shape)}")
        gammas = self.gammas if gammas is None else _fractions(gammas)
        size = image.shape[2:]
        padding = [p for n in reversed(size) for p in (0, -n % MULTIPLE)]
        source, target = functional.pad(image.float(), padding, mode="replicate").split(1, dim=1)
        motion = self.motion(source, target)
        is_refined = bool(self.refinement_steps or self.coarse_steps)
        if is_refined:
            whole, refined = self.whole_velocities(motion, source, target)
        moved, fields = [gamma for gamma in gammas if gamma], []
        for i in range(0, len(moved), self.max_batch):
            chunk = moved[i : i + self.max_batch]
            if is_refined:
                velocities = self.refined_velocities(motion, chunk, whole, refined)
            else:
                velocities = self.velocities(motion, chunk)
            fields += self.displacements(velocities)[..., : size[0], : size[1], : size[2]].unbind(1)
        still, rest = image.new_zeros(len(image), 3, *size, dtype=torch.float32), iter(fields)
        return torch.stack([next(rest) if gamma else still for gamma in gammas], dim=1)

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        source = image[:, :1].float()
        fields = self.displace(image).unbind(1)
        # interpolation rounds, and the source is to come back as it is
        frames = [warp(source, field) if gamma else source for gamma, field in zip(self.gammas, fields, strict=True)]
        return torch.cat(frames, dim=1)

    def motion_losses(self, cine: Tensor, motion: Any, generator: torch.Generator) -> dict[str, Tensor]:
        """Mismatch at the target and, with ``frames_weight``, at one of the frames before it.

        Args:
            cine: (B, F, H, W, D) in [-1, 1], first frame source, last one target, sizes being multiples of 8.
            motion: of source and target.
            generator: source of the frame.

        Returns:
            ``similarity``, ``smoothness``, ``squared_error`` and ``folding``, with their weights, where that is not 0.
        """
        last = cine.shape[1] - 1

        def mismatch(k: int) -> dict[str, Tensor]:
            displacement = self.displacements(self.velocities(motion, [k / last]))[:, 0]
            return self.mismatch(cine[:, :1], displacement, cine[:, k : k + 1])

        losses = mismatch(last)
        if self.frames_weight and last > 1:
            k = int(torch.rand((), generator=generator, device=generator.device) * last)  # the same in all processes
            losses = {name: losses[name] + self.frames_weight * loss for name, loss in mismatch(k).items()}
        return {name: self.similarity_weight * loss for name, loss in losses.items()}


def as_factors(gammas: Sequence[float], fields: Tensor) -> Tensor:
    """Fractions of the way as factors of fields (B, F, 3, H, W, D)."""
    return torch.tensor(gammas).to(fields).view(-1, 1, 1, 1, 1)


def _fractions(gammas: Sequence[float]) -> list[float]:
    if not len(gammas) or min(gammas) < 0 or max(gammas) > 1:
        raise ValueError(f"gammas must lie in 0 ... 1, 0 being the source and 1 the target; got {list(gammas)}")
    return list(gammas)
