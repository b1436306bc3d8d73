"""Diffusion deformable model: the frames of a cine between two of its phases, made by deforming the first one.

B. Kim and J. C. Ye, *Diffusion Deformable Model for 4D Temporal Medical Image Generation*, MICCAI 2022, arXiv 2206.13295.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from monai.networks.nets import DiffusionModelUNet
from monai.networks.utils import pixelshuffle, pixelunshuffle
from torch import Tensor

from scripts.networks.cine_network import CineNet, as_factors
from scripts.networks.pair_unet import unet_of_pairs
from scripts.networks.quick_norms import with_quick_norms
from scripts.precision import autocast
from scripts.samplers import alphas_cumprod_table, draw_noised, for_batch

__all__ = ["DeformableDiffusionNet"]

CODES = ("both", "network", "difference")


class DeformableDiffusionNet(CineNet):
    """Diffusion deformable model (DDM).

    A diffusion module G estimates the noise in the noised target from source, target and noised target; its estimate is
    the latent code c = G(S, T, T, 0). A deformation module M makes the field from the source and the scaled code,
    M(S, γ·c), which is a geodesic path from source to target.

    Two additions to the paper: G is the difference of noised target and source, plus what a U-Net adds to it, so that M
    sees from the first step of the training on where both differ (``code``); and what M says without a code fades out along
    the way, φ_γ = M(S, γ·c) - (1 - γ)·M(S, 0), so that it begins at the source and ends with the target's field M(S, c).

    Args:
        channels: of the diffusion module, level by level.
        deformation_channels: of the deformation module, down and up in pairs, level by level.
        deformation_out: channels of the deformation module before its last convolutions.
        final_channels: of the last convolutions but one.
        num_levels: noise levels.
        lean: make the networks' work less, see :class:`LeanVoxelMorphUNet`.
        clean_share: share of the training's batches whose code comes from the target without noise, as at inference; 0 in
            the paper.
        code: what the latent code is: ``network``, what the U-Net says, as in the paper; ``difference`` of noised target and
            source, without any network; or ``both`` of them added.
        kwargs: arguments of :class:`CineNet`.
    """

    def __init__(
        self,
        channels: Sequence[int] = (8, 16, 32, 32),
        deformation_channels: Sequence[int] = (16, 32, 32, 32, 32, 32),
        deformation_out: int = 16,
        final_channels: Sequence[int] = (8,),
        num_levels: int = 2000,
        lean: bool = True,
        clean_share: float = 0.0,
        code: str = "both",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if code not in CODES:
            raise ValueError(f"code must be one of {', '.join(CODES)}, got {code}")
        self.clean_share, self.code = clean_share, code
        self.diffusion = DiffusionModelUNet(
            spatial_dims=3,
            in_channels=3 * self.reduction**3,
            out_channels=self.reduction**3,
            num_res_blocks=1,
            channels=channels,
            attention_levels=[False] * len(channels),
            norm_num_groups=min(8, channels[0]),
        )
        if lean:
            with_quick_norms(self.diffusion).to(memory_format=torch.channels_last_3d)
        self.deformation = unet_of_pairs(deformation_channels, deformation_out, final_channels, self.reduction, lean)
        table = alphas_cumprod_table("linear", num_levels, 1e-6, 1e-2)
        self.register_buffer("alphas_cumprod", table, persistent=False)

    @property
    def published(self) -> dict[str, object]:
        """Settings of the paper's inference: each frame by itself, through the deformation module as it is."""
        return {"lean": False, "max_batch": 1, "refinement_steps": 0, "coarse_steps": 0}

    def noise(self, source: Tensor, target: Tensor, noised: Tensor, t: Tensor) -> Tensor:
        """Estimated noise G(S, T, x_t, t), which is the latent code; all (B, 1, H, W, D), levels (B,)."""
        signal = self.alphas_cumprod[t.long()].to(noised).sqrt().view(-1, 1, 1, 1, 1)
        difference = noised - signal * source
        if self.code == "difference":
            return difference
        with autocast(target, self.amp):
            images = pixelunshuffle(torch.cat([source, target, noised], dim=1), 3, self.reduction)
            said = pixelshuffle(self.diffusion(images, t).float(), 3, self.reduction)
        return said if self.code == "network" else difference + said

    def motion(self, source: Tensor, target: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Source and latent code, prepared for the deformation module, and the fields (B, 1, 3, ...) without a code."""
        prepared = self._prepare(source, self.code_of(source, target))
        return prepared, self._deform(prepared, [0.0])

    def code_of(self, source: Tensor, target: Tensor) -> Tensor:
        """Latent code of pairs (B, 1, H, W, D): what is estimated of the target without any noise."""
        return self.noise(source, target, target, torch.zeros(len(source), device=source.device))

    def _prepare(self, source: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
        with autocast(source, self.amp):
            return self.deformation.prepare(source, code)

    def _deform(self, prepared: tuple[Tensor, Tensor], gammas: Sequence[float]) -> Tensor:
        with autocast(self.alphas_cumprod, self.amp):
            return self.deformation.along(prepared, gammas).float()

    def velocities(self, motion: tuple[tuple[Tensor, Tensor], Tensor | float], gammas: Sequence[float]) -> Tensor:
        prepared, without = motion
        fields = self._deform(prepared, gammas)
        return fields - (1 - as_factors(gammas, fields)) * without

    def trained_motion(self, source: Tensor, code: Tensor) -> Any:
        """What :meth:`velocities` takes, in the training: nothing is taken off the fields."""
        return self._prepare(source, code), 0.0

    def losses(self, image: Tensor, class_label: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Losses of both modules (eq. 5 to 7 of the paper).

        Args:
            image: cines (B, F, H, W, D) in [-1, 1], first frame source, last one target, sizes being multiples of 8.
            class_label: not used.
            generator: source of levels, noise and frame.

        Returns:
            ``noise``: mean squared error of the estimated noise; ``similarity``, ``smoothness`` and ``folding``, with
            their weights.
        """
        source, target = image[:, :1], image[:, -1:]
        clean = for_batch(torch.rand, (len(image),), generator, image.device) < self.clean_share
        noised, t, noise = draw_noised(target, self.alphas_cumprod, generator)
        noised = torch.where(clean.view(-1, 1, 1, 1, 1), target, noised)
        code = self.noise(source, target, noised, t.masked_fill(clean, 0))
        error = (code - noise).square().flatten(1).mean(dim=1).masked_fill(clean, 0).mean()
        return {"noise": error, **self.motion_losses(image, self.trained_motion(source, code), generator)}
