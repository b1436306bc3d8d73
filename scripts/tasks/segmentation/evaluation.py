"""Compares evaluated methods, and asks whether a diffusion model looks at its noised mask at all."""

from __future__ import annotations

import csv
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from monai.config import PathLike
from torch import Tensor

from scripts.bundle import with_weights
from scripts.data.slices import SliceDataset
from scripts.files import own_file
from scripts.metrics import bootstrap_interval, dice
from scripts.networks.segmentation_ensemble import SegmentationEnsembleNet
from scripts.samplers import level_grid, noise_image
from scripts.tables import markdown_table, mean_and_std, write_rows
from scripts.tasks.segmentation.figures import reliability_figure

__all__ = ["compare_runs", "noisy_state"]

logger = logging.getLogger(__name__)

COLUMNS = {
    "dice": "Dice",
    "hd95_mm": ("HD95, mm", ".1f"),
    "ece": ("ECE", ".4f"),
    "near_ece": ("ECE near", ".3f"),
    "nll": ("NLL", ".4f"),
    "near_nll": "NLL near",
    "error_auroc": "AUROC of errors",
    "energy": "energy distance",
    "raw_covered": ("coverage, raw", ".2f"),
    "covered": ("coverage", ".2f"),
    "width_ml": ("width, ml", ".1f"),
}
STATES = ("noised truth", "pure noise", "noised mirror", "truth")


def compare_runs(runs: Mapping[str, PathLike], path: PathLike | None = None) -> str:
    """Markdown table of evaluated methods with bootstrap intervals over patients, and of their differences from the first.

    Args:
        runs: folder with ``metrics.csv``, and ``reliability.csv``, by method; all of the same cases.
        path: PNG for the reliability diagram of all, or None.

    Raises:
        ValueError: if the cases are not the same.
    """
    tables = {name: _cases(Path(folder) / "metrics.csv") for name, folder in runs.items()}
    first = next(iter(tables.values()))
    for name, table in tables.items():
        if table.keys() != first.keys():
            raise ValueError(f"{name} has other cases than {next(iter(tables))}: evaluate both on the same section")
    formats = {key: (about, ".3f") if isinstance(about, str) else about for key, about in COLUMNS.items()}

    def line(name: str, values: Mapping[str, Sequence[float]], sign: str = "") -> str:
        cells = []
        for key, (_, form) in formats.items():
            low, high = bootstrap_interval(values[key])
            cells.append(f"{np.nanmean(values[key]):{sign}{form}} ({low:{sign}{form}} to {high:{sign}{form}})")
        return f"| {name} | " + " | ".join(cells) + " |"

    lines = [
        "| method | " + " | ".join(heading for heading, _ in formats.values()) + " |",
        "|---" * (len(formats) + 1) + "|",
    ]
    for name, table in tables.items():
        lines.append(line(name, {key: [row[key] for row in table.values()] for key in formats}))
    for name, table in list(tables.items())[1:]:
        pairs = {key: [first[case][key] - row[key] for case, row in table.items()] for key in formats}
        lines.append(line(f"{next(iter(tables))} minus {name}", pairs, "+"))
    if path:
        bins = {}
        for name, folder in runs.items():
            rows = _rows(Path(folder) / "reliability.csv")
            bins[name] = [[float(row[key]) for key in ("voxels", "probability", "lesion")] for row in rows]
        with own_file(path) as aside:
            reliability_figure(aside, bins)
    return "\n".join(lines)


def _rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _cases(path: Path) -> dict[str, dict[str, float]]:
    """Figures of each case of a table of :class:`scripts.tasks.segmentation.metrics.SegmentationMetrics`."""
    rows = [row for row in _rows(path) if row["case"] not in ("mean", "std")]
    return {row["case"]: {key: float(value) for key, value in row.items() if key != "case"} for row in rows}


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
