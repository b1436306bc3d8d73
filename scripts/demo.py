"""A scan drawn by a bundle's own diffusion model, so that a demonstration needs no patient's image."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from torch import Tensor

from scripts.benchmark import build_network
from scripts.networks.ddim_anomaly import DISEASED

__all__ = ["draw_scan"]


def _phantom(num_slices: int, size: int = 128) -> Tensor:
    """Grey ellipses (num_slices, size, size) where scalp, skull, brain and ventricles lie, smaller towards the top."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, size), torch.linspace(-1, 1, size), indexing="ij")
    slices = []
    for i in range(num_slices):
        scale = 1 - 0.25 * (i / max(num_slices - 1, 1)) ** 2
        radius = ((y / (0.66 * scale)) ** 2 + ((x + 0.05) / (0.82 * scale)) ** 2).sqrt()
        image = torch.zeros(size, size)
        for edge, grey in ((1.0, 0.8), (0.9, 0.1), (0.82, 0.4)):
            image[radius < edge] = grey
        image[((y.abs() - 0.1) / 0.05) ** 2 + ((x + 0.05) / 0.22) ** 2 < scale] = 0.2
        slices.append(image)
    return torch.stack(slices)


@torch.no_grad()
def draw_scan(
    bundle: Path, path: Path, num_slices: int = 8, seed: int = 0, noise_level: int = 550, num_steps: int = 110
) -> None:
    """Draw a head with a lesion in its middle slices, and write it as 4-D NIfTI (uint8, 2 x 2 x 5 mm).

    A phantom of a few ellipses is noised until little more than the outline of a head is left in it, and decoded by
    stochastic sampling (with one noise for all slices, so that they fit together). The middle half of the slices then goes
    through the bundle's translation in the wrong direction: encoded, and decoded with guidance towards disease.

    Args:
        bundle: folder of a bundle whose network is a :class:`scripts.networks.ddim_anomaly.DDIMAnomalyNet`.
        path: file to write, ``.nii.gz``.
        num_slices: number of slices.
        seed: seed of the noise.
        noise_level: level that the phantom is noised to.
        num_steps: steps of the sampling.
    """
    painter = build_network(
        bundle, mode="ddpm", noise_level=noise_level, num_steps=num_steps, gradient_scale=0.0, seed=seed, amp=False
    )
    translator = build_network(bundle, gradient_scale=100.0)
    device = next(painter.parameters()).device
    phantom = _phantom(num_slices, painter.spatial_size[0]).unsqueeze(1).expand(-1, painter.in_channels, -1, -1)
    slices = painter.decode(painter.encode(phantom.to(device))).clamp(0, 1)
    middle = slice(num_slices // 4, num_slices - num_slices // 4)
    slices[middle] = translator.decode(translator.encode(slices[middle]), DISEASED).clamp(0, 1)
    scan = (255 * slices).round().byte().permute(2, 3, 0, 1).cpu().numpy()  # (H, W, D, C)
    nib.save(nib.Nifti1Image(scan, np.diag([2.0, 2.0, 5.0, 1.0])), path)
