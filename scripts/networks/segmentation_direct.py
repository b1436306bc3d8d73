"""What the diffusion ensemble is compared with, on the same rails: the same U-Net without noise, and ensembles of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from ignite.engine import Engine
from monai.losses import DiceCELoss
from torch import Tensor, nn

from scripts.networks.segmentation_network import MaskUNet, SegmentationNetwork

__all__ = ["DeepEnsembleNet", "DirectSegmentationNet", "MembersLoader"]


class DirectSegmentationNet(SegmentationNetwork):
    """The U-Net of the diffusion ensemble that goes from the slice to the mask at once.

    With one sample, its own output; with several, those of as many random dropouts (Gal & Ghahramani 2016,
    arXiv 1506.02142).

    Args:
        in_channels: number of sequences, C.
        spatial_size: height and width of a slice.
        fold: see :class:`scripts.networks.segmentation_network.MaskUNet`.
        channels: see there.
        num_res_blocks: see there.
        dropout: see there; in training always, in inference if there are several samples.
        kwargs: arguments of :class:`scripts.networks.segmentation_network.SegmentationNetwork`.
    """

    def __init__(
        self,
        in_channels: int = 3,
        spatial_size: Sequence[int] = (128, 128),
        fold: int = 4,
        channels: Sequence[int] = (64, 96, 128),
        num_res_blocks: int = 1,
        dropout: float = 0.1,
        **kwargs: object,
    ) -> None:
        super().__init__(in_channels, spatial_size, **kwargs)
        self.unet = MaskUNet(in_channels, fold, channels, num_res_blocks, dropout, amp=self.amp)
        self.loss = DiceCELoss(sigmoid=True, batch=True)

    def sample(self, image: Tensor, numbers: Sequence[int]) -> Tensor:
        """See :meth:`scripts.networks.segmentation_network.SegmentationNetwork.sample`."""
        samples = []
        for number in numbers:
            self.unet.drop(self._stream(number) if self.num_samples > 1 else None, shared=True)
            samples.append(self.unet(2 * image - 1).sigmoid())
        self.unet.drop(None)
        return torch.stack(samples)

    def losses(self, image: Tensor, label: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Dice and cross-entropy, half of the sum of both a batch's.

        Args:
            image: slices (B, C, H, W) in [0, 1].
            label: masks (B, 1, H, W), lesion where above 0.
            generator: source of the dropout.
        """
        self.unet.drop(generator if self.training else None)
        logits = self.unet(2 * image - 1)
        self.unet.drop(None)
        return {"dice_ce": self.loss(logits, (label > 0).to(logits.dtype))}


class DeepEnsembleNet(SegmentationNetwork):
    """Several direct networks, trained from other beginnings (Lakshminarayanan et al. 2017, arXiv 1612.01474).

    Args:
        in_channels: number of sequences, C.
        spatial_size: height and width of a slice.
        num_samples: number of networks; each gives one sample.
        member: arguments of each, of :class:`DirectSegmentationNet`.
        kwargs: arguments of :class:`scripts.networks.segmentation_network.SegmentationNetwork`.
    """

    def __init__(
        self,
        in_channels: int = 3,
        spatial_size: Sequence[int] = (128, 128),
        num_samples: int = 3,
        member: Mapping[str, object] | None = None,
        **kwargs: object,
    ) -> None:
        super().__init__(in_channels, spatial_size, num_samples, **kwargs)
        made = {"num_samples": 1, "amp": self.amp, **(member or {})}
        self.members = nn.ModuleList(DirectSegmentationNet(in_channels, spatial_size, **made) for _ in range(num_samples))

    def sample(self, image: Tensor, numbers: Sequence[int]) -> Tensor:
        """See :meth:`scripts.networks.segmentation_network.SegmentationNetwork.sample`."""
        return torch.cat([self.members[number].sample(image, [0]) for number in numbers])


class MembersLoader:
    """Load the weights of each member of an ensemble from a file of its own.

    Args:
        network: a :class:`DeepEnsembleNet`.
        paths: a ``model.pt`` for each member.
    """

    def __init__(self, network: DeepEnsembleNet, paths: Sequence[str]) -> None:
        self.network, self.paths = network, list(paths)
        self.load_path = self.paths[0]

    def __call__(self, engine: Engine) -> None:
        for member, path in zip(self.network.members, self.paths, strict=True):
            member.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
