"""Codec and score network of the model ``image`` of :mod:`scripts.networks.variational_diffusion`: grey levels, a U-Net."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from monai.networks.nets.diffusion_model_unet import DiffusionModelUNet
from torch import Tensor, nn
from torch.nn import functional

from scripts.losses import discretised_gaussian
from scripts.precision import Amp, autocast, check_amp

__all__ = ["ConvolutionalScore", "GreyLevels", "lattice_noise"]

NUM_VALUES = 256  # of a pixel


class GreyLevels(nn.Module):
    """The codec of ``image``: f(x) are the 256 grey levels, evenly spaced within (-1, 1); nothing is learned.

    Args:
        spatial_size: height and width of an image.
    """

    grey_scale = None

    def __init__(self, spatial_size: Sequence[int]) -> None:
        super().__init__()
        self.latent_shape = (1, *spatial_size)

    def encode(self, image: Tensor, gamma_0: Tensor, label: Tensor | None) -> Tensor:
        """Images (B, 1, H, W) in [0, 1] to f(x), same shape; both further arguments are those of the other codec."""
        return (2 * (image * (NUM_VALUES - 1)).round() + 1) / NUM_VALUES - 1

    def decode(self, z: Tensor, gamma_0: Tensor, label: Tensor | None) -> Tensor:
        """z_0 / sqrt(1 - var_0), (B, 1, H, W), to the likeliest of the 8-bit values, divided by 255."""
        return (self._unit(z) * (NUM_VALUES - 1)).round().clamp(0, NUM_VALUES - 1) / (NUM_VALUES - 1)

    def negative_log_likelihood(
        self, image: Tensor, z: Tensor, gamma_0: Tensor, label: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Of 8-bit images (B, 1, H, W), divided by 255, given z_0 / sqrt(1 - var_0): (B,), in nats, and no other."""
        std = (gamma_0 / 2).exp() * NUM_VALUES / 2 / (NUM_VALUES - 1)
        image = (image * (NUM_VALUES - 1)).round() / (NUM_VALUES - 1)  # half precision has moved it a little
        return -discretised_gaussian(image, self._unit(z), std).flatten(1).sum(dim=1), {}

    def _unit(self, z: Tensor) -> Tensor:
        """From the scale of f(x) to that of images."""
        return ((z + 1) * NUM_VALUES - 1) / 2 / (NUM_VALUES - 1)


class ConvolutionalScore(nn.Module):
    """Estimate of the noise in an image: MONAI's U-Net on its 2 x 2 blocks, as four channels of half the size.

    The U-Net's output counts as the velocity v, so that the noise is sqrt(var)·z + sqrt(1 - var)·v, the input being part
    of it where there is much noise. Cutting into blocks loses nothing and takes a quarter of the time.

    The U-Net's normalisation takes the mean of each channel away, by which it can't tell that an image has no pattern of
    two pixels all over it: it would leave the share of the noise that is one. So the input's part in the noise of the three
    patterns of :meth:`patterns_of` is the best estimate for Gaussian amounts of them, whose mean and standard deviation
    are buffers.

    Args:
        spatial_size: see :class:`scripts.networks.variational_diffusion.VariationalDiffusionNet`.
        channels: see there.
        num_res_blocks: see there.
        gamma_range: gamma that the U-Net is told as step 0 and as step 1000.
        detail: see there.
        num_classes: see there.
        amp: see there.
    """

    def __init__(
        self,
        spatial_size: Sequence[int],
        channels: Sequence[int],
        num_res_blocks: int,
        gamma_range: Sequence[float],
        detail: str,
        num_classes: int | None,
        amp: Amp,
    ) -> None:
        super().__init__()
        self.gamma_range, self.detail, self.amp = tuple(gamma_range), detail, check_amp(amp)
        self.num_blocks = math.prod(spatial_size) // 4
        signs = torch.tensor([[1.0, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])
        self.register_buffer("patterns", signs.T / 2, persistent=False)  # orthonormal
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("std", torch.ones(3))
        self.unet = DiffusionModelUNet(
            spatial_dims=2,
            in_channels=20 if detail == "fourier" else 4,
            out_channels=4,
            channels=tuple(channels),
            attention_levels=[level == len(channels) - 1 for level in range(len(channels))],
            num_res_blocks=num_res_blocks,
            num_head_channels=32,
            norm_num_groups=32,
            num_class_embeds=num_classes + 1 if num_classes else None,
        ).to(memory_format=torch.channels_last)

    def patterns_of(self, image: Tensor) -> Tensor:
        """Amount (B, 3) of columns, rows and checkerboard of two pixels all over an image (B, 1, H, W)."""
        return functional.pixel_unshuffle(image, 2).mean(dim=(2, 3)) @ self.patterns

    def _noise_of_patterns(self, z: Tensor, gamma: Tensor) -> Tensor:
        """What the patterns in z tell of the noise beyond sqrt(var)·z, the same in all blocks: (B, 4, 1, 1)."""
        amount, gamma = self.patterns_of(z), gamma[:, None]
        signal, noise = torch.sigmoid(-gamma), torch.sigmoid(gamma)
        gap = (amount - signal.sqrt() * self.mean) / (self.num_blocks * signal * self.std**2 + noise)
        return (noise.sqrt() * (gap - amount) @ self.patterns.T)[:, :, None, None]

    def forward(self, z: Tensor, gamma: Tensor, label: Tensor | None = None) -> Tensor:
        """Noised images (B, 1, H, W) at gamma (B,) to the estimated noise, in the shape of z."""
        low, high = self.gamma_range
        features = [z]
        if self.detail == "fourier":
            features += [wave(2**n * torch.pi * z) for n in (7, 8) for wave in (torch.sin, torch.cos)]
        blocks = functional.pixel_unshuffle(torch.cat(features, dim=1), 2)
        with autocast(z, self.amp):
            v = self.unet(blocks, 1000 * (gamma - low) / (high - low), class_labels=label)
        signal, noise = (torch.sigmoid(g).sqrt().view(-1, 1, 1, 1) for g in (-gamma, gamma))
        estimate = noise * z + functional.pixel_shuffle(signal * v.float() + self._noise_of_patterns(z, gamma), 2)
        return estimate + lattice_noise(z, gamma.view(-1, 1, 1, 1)) if self.detail == "lattice" else estimate


def lattice_noise(z: Tensor, gamma: Tensor, num_terms: int = 5) -> Tensor:
    """Expected noise in z if nothing is known but that f(x) is an odd multiple of 1/256.

    It is -std · d/dy log p(y) of y = z / sqrt(1 - var), with std that of the noise in y. p(y) is a comb of Gaussians, in
    its Fourier series 1 + 2·sum_k q^(k²)·cos(k·angle). Where noise is wider than a grey level, q and with it all vanish,
    and nothing is left for a network to learn where it is much finer.

    Args:
        z: noised grey levels (B, 1, H, W).
        gamma: broadcast to z, -14 or more for five terms.
        num_terms: terms of the series.
    """
    spacing, std = 2 / NUM_VALUES, (gamma / 2).exp()
    angle = 2 * torch.pi * (z / torch.sigmoid(-gamma).sqrt() + 1 - spacing / 2) / spacing
    log_q = -2 * (torch.pi * std / spacing) ** 2
    density, slope = torch.ones_like(z), torch.zeros_like(z)
    for k in range(1, num_terms + 1):
        strength = 2 * (k**2 * log_q).exp()
        density = density + strength * torch.cos(k * angle)
        slope = slope + k * strength * torch.sin(k * angle)
    return std * 2 * torch.pi / spacing * slope / density
