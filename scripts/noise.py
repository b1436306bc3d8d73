"""Noise with a spectrum: smooth fields, each image with zero mean and unit variance, for any batch, by a seed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from scripts.samplers import for_batch

__all__ = ["NOISES", "as_drawn", "coarse_noise", "in_octaves", "standardised", "stream_of"]


def standardised(field: Tensor) -> Tensor:
    """A field (B, C, H, W) with zero mean and unit variance in each channel of each image."""
    variance, mean = torch.var_mean(field, dim=(2, 3), keepdim=True, correction=0)
    return (field - mean) / variance.clamp(min=1e-12).sqrt()


def coarse_noise(
    shape: Sequence[int], factor: int, generator: torch.Generator, device: torch.device | str = "cpu"
) -> Tensor:
    """Gaussian noise drawn at a fraction of the resolution, and enlarged bilinearly (Kascenas et al. 2022).

    *Denoising Autoencoders for Unsupervised Anomaly Detection in Brain MRI*, MIDL 2022. There, the noise has a standard
    deviation of 0.2 before it is enlarged eightfold, which leaves 0.14; here, it is 1 afterwards. The coarse pixels of a
    batch begin at a random place, so that none is a border in each batch.

    Args:
        shape: (B, C, H, W).
        factor: pixels along the edge of a coarse one.
        generator: source of the noise, see :func:`scripts.samplers.for_batch`.
        device: where it is wanted.

    Returns:
        noise of that shape, each channel of each image with zero mean and unit variance.
    """
    number, channels, height, width = shape
    coarse = for_batch(torch.randn, (number, channels, height // factor + 3, width // factor + 3), generator, device)
    top, left = torch.randint(factor, (2,), generator=generator).tolist()
    field = nn.functional.interpolate(coarse, scale_factor=float(factor), mode="bilinear", align_corners=False)
    # beyond the middle of the first coarse pixel, before which there is nothing to interpolate with
    top, left = top + factor // 2, left + factor // 2
    return standardised(field[..., top : top + height, left : left + width])


def in_octaves(white: Tensor, wavelength: float = 64.0, octaves: int = 6, persistence: float = 0.8) -> Tensor:
    """Gaussian noise with the spectrum of summed octaves, as AnoDDPM's simplex noise has (Wyatt et al., CVPRW 2022).

    Octave k lies between the frequencies 2^(k-1) / wavelength and 2^k / wavelength and has persistence^(2k) of the first
    one's power. The noise is made by its spectrum. The published noise has a standard deviation of about 0.5 and a mean
    that wanders, so that its levels are not those of Gaussian noise; here they are.

    Args:
        white: white noise (B, C, H, W).
        wavelength: of the first octave, in pixels.
        octaves: how many; those beyond half a cycle a pixel are not there.
        persistence: amplitude of an octave against that of the one before.

    Returns:
        noise of that shape, each channel of each image with zero mean and unit variance.

    Raises:
        ValueError: if no frequency of such an image lies in any octave.
    """
    height, width = white.shape[-2:]
    down, across = torch.fft.fftfreq(height, device=white.device)[:, None], torch.fft.rfftfreq(width, device=white.device)
    octave = (wavelength * (down**2 + across**2).sqrt()).log2().ceil()  # -inf at the mean
    gain = torch.zeros_like(octave)
    for number in range(octaves):
        ring = octave == number
        # of the real transform, the columns between the first and the last stand for two
        pixels = (ring * torch.where((across == 0) | (across == 0.5), 1, 2)).sum().clamp(min=1)
        gain[ring] = persistence**number / pixels.sqrt()
    if not gain.any():
        raise ValueError(f"an image of {height} x {width} pixels has no frequency in {octaves} octaves from {wavelength:g}")
    return standardised(torch.fft.irfft2(gain * torch.fft.rfft2(white), s=(height, width)))


def as_drawn(white: Tensor) -> Tensor:
    """White noise (B, C, H, W), each pixel N(0, 1) by itself, as it is."""
    return white


NOISES = {"gaussian": as_drawn, "octaves": in_octaves}


def stream_of(noise: Tensor, name: object) -> torch.Generator:
    """A source of further noise for an image, on the CPU, that depends on a name and on the noise it begins with alone."""
    digest = hashlib.sha256(f"{name}:".encode() + noise.detach().float().cpu().numpy().tobytes()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
