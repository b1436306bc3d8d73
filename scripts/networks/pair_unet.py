"""The network of registration: from two volumes to a field that deforms one into the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from monai.networks.blocks import Convolution
from monai.networks.nets import VoxelMorphUNet
from monai.networks.utils import pixelunshuffle
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["LeanVoxelMorphUNet", "unet_of_pairs"]


class LeanVoxelMorphUNet(VoxelMorphUNet):
    """MONAI's VoxelMorphUNet, the same weights and result with less than half of the work.

    Where MONAI convolves a skipped map and an upsampled one side by side, each is convolved by itself with its share of
    the kernel. Nearest upsampling followed by a convolution of 3 x 3 x 3 is one transposed convolution of 4 x 4 x 4 with
    stride 2, which has 8 factors a voxel in place of 27 and never makes the upsampled map.

    Args:
        lean: False for MONAI's own way.
        reduction: edge of the blocks of voxels that become one voxel with so many more channels, before everything else.
        kwargs: arguments of :class:`monai.networks.nets.VoxelMorphUNet`.
    """

    def __init__(self, lean: bool = True, reduction: int = 1, **kwargs: Any) -> None:
        super().__init__(in_channels=2 * reduction**3, **kwargs)
        self.lean, self.reduction = lean, reduction

    def forward(self, concatenated_pairs: Tensor) -> Tensor:
        """Pairs (B, 2, H, W, D), sizes being multiples of 8, to a field (B, 3, H, W, D), or smaller by the reduction."""
        pairs = pixelunshuffle(concatenated_pairs, 3, self.reduction)
        if not self.lean:
            return super().forward(pairs)
        return self._beyond_first(self.net[0][0](pairs.contiguous(memory_format=torch.channels_last_3d)))

    def prepare(self, still: Tensor, scaled: Tensor) -> tuple[Tensor, Tensor]:
        """What all pairs of one image and multiples of another have in common, for :meth:`along`; both (B, 1, H, W, D).

        It is the share of each in the first convolution, which is linear.
        """
        if not self.lean:
            return still, scaled
        conv = self.net[0][0].conv
        weight = torch.cat(conv.weight.chunk(2, dim=1)).contiguous()
        both = pixelunshuffle(torch.cat([still, scaled], dim=1), 3, self.reduction)
        both = both.contiguous(memory_format=torch.channels_last_3d)
        return functional.conv3d(both, weight, torch.cat([conv.bias, 0 * conv.bias]), padding=1, groups=2).chunk(2, dim=1)

    def along(self, prepared: tuple[Tensor, Tensor], factors: Sequence[float]) -> Tensor:
        """Fields (B, F, 3, ...) of the pairs (still, factor·scaled) that were prepared."""
        still, scaled = prepared
        if not self.lean:
            pairs = torch.stack([torch.cat([still, factor * scaled], dim=1) for factor in factors], dim=1)
            return self(pairs.flatten(0, 1)).unflatten(0, pairs.shape[:2])
        still, scaled = still.movedim(1, -1), scaled.movedim(1, -1)  # as they are stored, so that nothing is rearranged
        first = torch.stack([torch.add(still, scaled, alpha=factor) for factor in factors], dim=1)
        high = self.net[0][0].adn(first.flatten(0, 1).movedim(-1, 1))
        return self._beyond_first(high).unflatten(0, first.shape[:2])

    def _beyond_first(self, high: Tensor) -> Tensor:
        """Field from what the first convolution and its activation give."""
        return self.net[1](self._beyond(self.net[0], high))

    def _beyond(self, block: nn.Sequential, high: Tensor) -> Tensor:
        """Result of a level, before it is upsampled, from that of its way down."""
        _, skip, up = block
        lower = skip.submodule
        low = lower[0](high)
        if len(lower) == 3:  # the lowest level has no further one
            low = self._beyond(lower, low)
        up = up if isinstance(up, Convolution) else up[0]
        return up.adn(self._convolve(up.conv, high, low))

    @staticmethod
    def _convolve(conv: nn.Conv3d, high: Tensor, low: Tensor) -> Tensor:
        of_high, of_low = conv.weight.split([high.shape[1], low.shape[1]], dim=1)
        kernel = of_low.flip(2, 3, 4).transpose(0, 1)
        for axis in (2, 3, 4):  # every low voxel stands for 2 x 2 x 2
            none = torch.zeros_like(kernel.narrow(axis, 0, 1))
            kernel = torch.cat([kernel, none], dim=axis) + torch.cat([none, kernel], dim=axis)
        upsampled = functional.conv_transpose3d(low, kernel, stride=2, padding=1)
        return functional.conv3d(high, of_high, conv.bias, padding=1).add_(upsampled)


def unet_of_pairs(
    channels: Sequence[int],
    out_channels: int,
    final_channels: Sequence[int],
    reduction: int,
    lean: bool = True,
) -> LeanVoxelMorphUNet:
    """From two volumes, as two channels, to a field."""
    network = LeanVoxelMorphUNet(
        lean,
        reduction,
        spatial_dims=3,
        unet_out_channels=out_channels,
        channels=channels,
        final_conv_channels=final_channels,
    )
    return network.to(memory_format=torch.channels_last_3d) if lean else network
