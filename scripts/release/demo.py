"""Scans that show no patient, for demonstrations: drawn by a bundle's own diffusion model, or a beating phantom."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from scripts.bundle import build_network
from scripts.networks.ddim_anomaly import DISEASED
from scripts.tasks.anomaly.evaluation import paint_sprites

__all__ = ["draw_cine", "draw_scan"]


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


def _translated_phantom(bundle: Path, num_slices: int, seed: int, noise_level: int = 550, num_steps: int = 110) -> Tensor:
    """Slices (num_slices, C, H, W) of a head with a lesion in the middle half, by guided translation.

    A phantom of a few ellipses is noised until little more than the outline of a head is left in it, and decoded by
    stochastic sampling (with one noise for all slices, so that they fit together). The middle half of the slices then goes
    through the bundle's translation in the wrong direction: encoded, and decoded with guidance towards disease.
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
    return slices


def draw_cine(path: Path, num_slices: int = 8, seed: int = 0, num_frames: int = 8, size: int = 96) -> None:
    """Draw a phantom of a left ventricle that ejects nearly half of its blood, as 4-D NIfTI (uint8), frames last.

    What is at the radius R at first is at about sqrt(R² - moved) later, so that the wall thickens as it contracts.

    Args:
        path: file to write, ``.nii.gz``.
        num_slices: number of slices, 10 mm apart, narrower towards the last one, the apex.
        seed: seed of the texture.
        num_frames: frames from end-diastole to end-systole.
        size: pixels of 1.5 mm along both axes of a slice.
    """
    texture = ndimage.gaussian_filter(np.random.default_rng(seed).normal(0, 60, (size, size, num_slices)), (2, 2, 0.5))
    x, y, k = np.mgrid[:size, :size, :num_slices].astype(float)
    right, front = (1.5 * (axis - size / 2) for axis in (x, y))
    narrowing = 1 - 0.5 * (k / num_slices) ** 2  # towards the apex
    radius = np.hypot(right, front).clip(1e-3)
    frames = []
    for phase in np.linspace(0, 1, num_frames):
        moved = 0.5 * phase * (24 * narrowing) ** 2
        first = np.sqrt(radius**2 + moved * np.exp(-((radius / 50) ** 2)))
        u, v = right * first / radius, front * first / radius  # where it was at first
        image = np.where(np.hypot(u / 62, v / 55) < 1, 70.0, 25.0)
        image[np.hypot((u + 32) / (24 * narrowing), v / (32 * narrowing)) < 1] = 190
        image[first < 34 * narrowing] = 90
        image[first < 24 * narrowing] = 200
        places = [u / 1.5 + size / 2, v / 1.5 + size / 2, k]
        frames.append(image + ndimage.map_coordinates(texture, places, order=1, mode="nearest"))
    cine = np.stack(frames, axis=-1).clip(0, 255).astype(np.uint8)
    nib.save(nib.Nifti1Image(cine, np.diag([1.5, 1.5, 10.0, 1.0])), path)


@torch.no_grad()
def draw_scan(bundle: Path, path: Path, num_slices: int = 8, seed: int = 0) -> None:
    """Draw a head with something to find in its middle, and write it as NIfTI (uint8).

    A network that can ``draw`` healthy slices draws them, each by itself, and the middle one gets a sprite (head CT, 3-D,
    4.5 x 4.5 x 5 mm, axes to the left and the back). Otherwise the network translates a phantom (brain MRI, 4-D with the
    sequences last, 2 x 2 x 5 mm, axes to the right and the back).

    Args:
        bundle: folder of an anomaly bundle.
        path: file to write, ``.nii.gz``.
        num_slices: number of slices.
        seed: seed of the noise, and of the sprite.
    """
    network = build_network(bundle, seed=seed, amp=False)
    if hasattr(network, "draw"):
        slices, spacing = network.draw(num_slices).cpu(), [-4.5, -4.5, 5.0]
        middle = slice(num_slices // 2, num_slices // 2 + 1)
        slices[middle], _ = paint_sprites(slices[middle], seed, radius=(6, 9), contrast=0.3)
    else:
        slices, spacing = _translated_phantom(bundle, num_slices, seed), [2.0, -2.0, 5.0]
    scan = (255 * slices).round().byte().permute(2, 3, 0, 1).cpu().numpy()  # (H, W, D, C)
    nib.save(nib.Nifti1Image(scan[..., 0] if scan.shape[3] == 1 else scan, np.diag([*spacing, 1.0])), path)
