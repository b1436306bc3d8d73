"""Asks whether a diffusion model looks at its noised mask at all."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
from monai.config import PathLike
from torch import Tensor

from scripts.bundle import with_weights
from scripts.data.slices import SliceDataset
from scripts.metrics import dice
from scripts.networks.segmentation_ensemble import SegmentationEnsembleNet
from scripts.samplers import level_grid, noise_image
from scripts.tables import markdown_table, mean_and_std, write_rows

__all__ = ["noisy_state"]

logger = logging.getLogger(__name__)

STATES = ("noised truth", "pure noise", "noised mirror", "truth")


@torch.no_grad()
def noisy_state(
    network: SegmentationEnsembleNet,
    weights: PathLike,
    dataset: SliceDataset,
    output_dir: PathLike,
    num_slices: int = 64,
    num_levels: int = 10,
    batch_size: int = 16,
) -> list[dict[str, float]]:
    """How much the estimate of the clean mask depends on the noised mask that the network sees, level by level.

    A network that ignores it is a plain U-Net in disguise (Öttl et al. 2024, arXiv 2403.14440). It is given, at each level:
    the noised truth, as in training; pure noise; the noised truth of the mirrored slice, which is wrong; and the truth
    without noise. The estimates are compared with the label, and with that of the noised truth.

    Args:
        network: the network, on its device.
        weights: its ``model.pt``.
        dataset: slices with masks, of which evenly spaced ones with a lesion are taken.
        output_dir: folder for ``noisy_state.csv``.
        num_slices: number of slices at most.
        num_levels: number of levels, evenly spaced up to the last.
        batch_size: slices at a time.

    Returns:
        a row a level and state: ``level``, ``state``, ``dice`` with the label over all pixels, ``agreement``: Dice with the
        estimate from the noised truth, and ``change``: mean absolute difference of the probability from that, over the
        pixels within the label or that estimate.
    """
    network = with_weights(network, weights)
    device = network.alphas_cumprod.device
    lesions = np.flatnonzero(dataset.class_labels)
    chosen = lesions[np.unique(np.linspace(0, len(lesions) - 1, min(num_slices, len(lesions))).round().astype(int))]
    items = [dataset[int(index)] for index in chosen]
    image, label = (torch.stack([item[key] for item in items]).to(device) for key in ("image", "label"))
    truth = 2 * label - 1
    noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(0)).to(device)
    rows = []
    for level in level_grid(network.num_levels, num_levels)[:0:-1]:
        a = network.alphas_cumprod[level].float()
        states = (noise_image(truth, noise, a), noise, noise_image(truth.flip(2), noise, a), truth)
        estimates: dict[str, Tensor] = {}
        for name, state in zip(STATES, states, strict=True):
            parts = zip(state.split(batch_size), image.split(batch_size), strict=True)
            estimates[name] = torch.cat([(network.clean(x, slices, level) + 1) / 2 for x, slices in parts])
        usual = estimates[STATES[0]]
        where = (label > 0) | (usual > 0.5)
        rows += [
            {
                "method": f"{level}, {name}",
                "level": level,
                "state": name,
                "dice": dice(p > 0.5, label),
                "agreement": dice(p > 0.5, usual > 0.5),
                "change": (p - usual).abs()[where].mean().item(),
            }
            for name, p in estimates.items()
        ]
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "noisy_state.csv", rows)
    columns = {"dice": "Dice with the label", "agreement": "Dice with the usual estimate", "change": "mean change"}
    shown = [{key: row[key] for key in ("method", *columns)} for row in rows]
    logger.info(markdown_table(mean_and_std(shown), columns))
    return rows
