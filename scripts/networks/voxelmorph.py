"""VoxelMorph, which the diffusion deformable model is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from scripts.networks.cine_network import CineNet, as_factors
from scripts.networks.pair_unet import unet_of_pairs
from scripts.precision import autocast

__all__ = ["VoxelMorphNet"]


class VoxelMorphNet(CineNet):
    """VoxelMorph (Balakrishnan et al. 2019, arXiv 1809.05231), its field scaled by γ or, diffeomorphic, integrated up to γ.

    Args:
        channels: down and up in pairs, level by level.
        out_channels: channels before the last convolutions.
        final_channels: of the last convolutions but one.
        kwargs: arguments of :class:`CineNet`.
    """

    def __init__(
        self,
        channels: Sequence[int] = (16, 32, 32, 32, 32, 32),
        out_channels: int = 16,
        final_channels: Sequence[int] = (8,),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.registration = unet_of_pairs(channels, out_channels, final_channels, self.reduction)

    def motion(self, source: Tensor, target: Tensor) -> Tensor:
        """Displacement or velocity (B, 3, ...) on the network's own grid, in its voxels."""
        with autocast(source, self.amp):
            return self.registration(torch.cat([source, target], dim=1)).float()

    def velocities(self, motion: Tensor, gammas: Sequence[float]) -> Tensor:
        return as_factors(gammas, motion) * motion[:, None]

    def losses(self, image: Tensor, class_label: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """See :meth:`scripts.networks.cine_network.CineNet.motion_losses`; ``class_label`` is not used."""
        return self.motion_losses(image, self.motion(image[:, :1], image[:, -1:]), generator)
