"""What the segmentation networks have in common: several masks of each slice, what they say together, and one U-Net."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from monai.networks.nets.diffusion_model_unet import DiffusionModelUNet, DiffusionUNetResnetBlock
from torch import Tensor, nn

from scripts.losses import binary_entropy
from scripts.networks.slice_network import SliceNetwork
from scripts.precision import Amp, arithmetic, autocast
from scripts.samplers import for_batch

__all__ = ["ChannelDropout", "MaskUNet", "SegmentationNetwork"]

STATISTICS = 3  # channels before the samples: mean, standard deviation, entropy
LARGEST_SEED = 2**16  # of a sample's number: each setting of ``seed`` has so many streams


class ChannelDropout(nn.Module):
    """Drop whole channels (Tompson et al. 2015, arXiv 1411.4280), by a generator that is handed in.

    Args:
        rate: share of the channels that are dropped, in [0, 1).
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.generator: torch.Generator | None = None
        self.shared = False

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) as it is without a generator; else channels are dropped, the same of all slices if ``shared``."""
        if self.generator is None or not self.rate:
            return x
        shape = (len(x), x.shape[1], 1, 1)
        if self.shared:
            kept = torch.rand(shape[1:], generator=self.generator).to(x.device).expand(shape)
        else:
            kept = for_batch(torch.rand, shape, self.generator, x.device)
        return x * (kept >= self.rate).to(x.dtype) / (1 - self.rate)


class MaskUNet(nn.Module):
    """MONAI's diffusion U-Net from slices to one logit a pixel, with pixels folded into channels, which is exact and cheap.

    Args:
        in_channels: number of channels that go in.
        fold: edge of the pixel block that is folded into channels.
        channels: channels of the levels, multiples of 16; the lowest has attention and is a multiple of 32.
        num_res_blocks: residual blocks a level.
        dropout: rate of :class:`ChannelDropout` before the last convolution of every residual block, the place of Ho et al.
            2020 (arXiv 2006.11239, appendix B); 0 for none.
        amp: see :func:`scripts.precision.autocast`.
    """

    def __init__(
        self,
        in_channels: int,
        fold: int,
        channels: Sequence[int],
        num_res_blocks: int = 1,
        dropout: float = 0.0,
        amp: Amp = False,
    ) -> None:
        super().__init__()
        self.amp = amp
        # fused attention and channels_last help in float32 alone, see scripts.networks.ddim_anomaly
        in_float32 = arithmetic(self, torch.device("cpu")) == "float32"
        self.fold, self.unfold = nn.PixelUnshuffle(fold), nn.PixelShuffle(fold)
        self.unet = DiffusionModelUNet(
            spatial_dims=2,
            in_channels=in_channels * fold**2,
            out_channels=fold**2,
            channels=channels,
            attention_levels=[level == len(channels) - 1 for level in range(len(channels))],
            num_res_blocks=num_res_blocks,
            num_head_channels=32,
            norm_num_groups=16,
            use_flash_attention=in_float32,
        )
        if dropout:
            for block in [m for m in self.unet.modules() if isinstance(m, DiffusionUNetResnetBlock)]:
                block.conv2 = nn.Sequential(ChannelDropout(dropout), block.conv2)
        if in_float32:
            self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor, step: Tensor | int = 0) -> Tensor:
        """Slices (B, in_channels, H, W) at a step of the noise, counted from 0, one or one for each, to (B, 1, H, W)."""
        step = torch.as_tensor(step, device=x.device).expand(len(x))
        with autocast(x, self.amp):
            return self.unfold(self.unet(self.fold(x), step)).float()

    def drop(self, generator: torch.Generator | None, shared: bool = False) -> None:
        """Let dropout draw from a generator from now on, see :class:`ChannelDropout`; None for no dropout."""
        for module in self.modules():
            if isinstance(module, ChannelDropout):
                module.generator, module.shared = generator, shared


class SegmentationNetwork(SliceNetwork):
    """A network that draws several masks of each slice that shows enough, so that they say where the mask may be wrong.

    A subclass has ``sample(image, numbers)``. The n-th sample of all slices is drawn with the same random numbers: a
    slice's masks do not depend on the batch that it comes in, and the n-th masks of all slices together are one volume.

    Args:
        in_channels: number of sequences, C.
        spatial_size: height and width of a slice.
        num_samples: number of samples, n.
        max_batch: largest number of slices times samples that go through the network at once.
        min_foreground: see :class:`scripts.networks.slice_network.SliceNetwork`.
        foreground_level: see there.
        seed: of all samples together.
        amp: bfloat16 in the networks, see :func:`scripts.precision.autocast`.

    Raises:
        ValueError: if there is no sample, or more than 65,536.
    """

    def __init__(
        self,
        in_channels: int = 3,
        spatial_size: Sequence[int] = (128, 128),
        num_samples: int = 8,
        max_batch: int = 64,
        min_foreground: float = 0.05,
        foreground_level: float = 0.1,
        seed: int = 0,
        amp: Amp = False,
    ) -> None:
        super().__init__(in_channels, spatial_size, min_foreground, foreground_level, seed, amp)
        if not 1 <= num_samples <= LARGEST_SEED:
            raise ValueError(f"num_samples must lie in 1 ... {LARGEST_SEED}, got {num_samples}")
        if max_batch < 1:
            raise ValueError(f"max_batch must be 1 or more, got {max_batch}")
        self.num_samples, self.max_batch = num_samples, max_batch

    @property
    def out_channels(self) -> int:
        return STATISTICS + self.num_samples

    def sample(self, image: Tensor, numbers: Sequence[int]) -> Tensor:
        """Some of the samples.

        Args:
            image: slices (B, C, H, W), grey levels in [0, 1].
            numbers: which samples, each from 0 on.

        Returns:
            probability of lesion (len(numbers), B, 1, H, W), in [0, 1].
        """
        raise NotImplementedError

    def output(self, image: Tensor) -> Tensor:
        """Mean of the samples, their standard deviation, the entropy of the mean in bits, and the samples themselves.

        Args:
            image: slices (B, C, H, W), grey levels in [0, 1].

        Returns:
            (B, 3 + n, H, W), all in [0, 1].
        """
        numbers = range(self.num_samples)
        parts = [numbers[i : i + self.max_batch] for i in range(0, len(numbers), self.max_batch)]
        size = max(self.max_batch // len(parts[0]), 1)
        samples = torch.cat(
            [torch.cat([self.sample(slices, part) for part in parts]).clamp(0, 1) for slices in image.split(size)], dim=1
        )
        mean = samples.mean(dim=0)
        entropy = binary_entropy(mean) / math.log(2)
        return torch.cat([mean, samples.std(dim=0, correction=0), entropy, *samples], dim=1)

    def _stream(self, number: int) -> torch.Generator:
        """Source of the random numbers of a sample, on the CPU (:func:`scripts.samplers.for_batch`)."""
        return torch.Generator().manual_seed(self.seed * LARGEST_SEED + number)
