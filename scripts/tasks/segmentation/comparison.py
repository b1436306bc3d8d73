"""One table of several methods on the same patients, with intervals over the patients."""

from __future__ import annotations

import csv
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from scripts.files import own_file
from scripts.metrics import bootstrap_interval
from scripts.tables import write_rows
from scripts.tasks.segmentation.figures import reliability_figure

__all__ = ["compare_segmentations"]

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


def compare_segmentations(folders: Mapping[str, Path], output_dir: Path) -> list[dict]:
    """Write and print a table of evaluated methods with intervals over patients, and of the differences from the first.

    Written are ``comparison.csv`` and ``comparison.png``, the reliability diagram of all.

    Args:
        folders: by method, the folder of its evaluation, with the ``metrics.csv`` and ``reliability.csv`` of
            :class:`scripts.tasks.segmentation.metrics.SegmentationMetrics`.
        output_dir: folder to write to.

    Returns:
        a row a method, then the first method minus each other one, patient by patient: of each figure the mean,
        ``…_low`` and ``…_high``, the ends of its 95 % interval.

    Raises:
        ValueError: naming a method that has been evaluated on other patients than the first one.
    """
    tables = {method: _patients(folder) for method, folder in folders.items()}
    first, *others = tables
    for method in others:
        if tables[method].keys() != tables[first].keys():
            raise ValueError(f"{folders[method]}: other patients than in {folders[first]}; evaluate both on the same ones")
    rows = [_figures(method, list(table.values())) for method, table in tables.items()]
    for method in others:
        pairs = [(tables[first][case], row) for case, row in tables[method].items()]
        rows.append(
            _figures(f"{first} minus {method}", [{key: one[key] - two[key] for key in COLUMNS} for one, two in pairs])
        )
    write_rows(output_dir / "comparison.csv", rows)
    bins = {}
    for method, folder in folders.items():
        columns = ("voxels", "probability", "lesion")
        bins[method] = [[float(row[key]) for key in columns] for row in _rows(folder / "reliability.csv")]
    with own_file(output_dir / "comparison.png") as aside:
        reliability_figure(aside, bins)
    logger.info(f"{len(tables[first])} patients\n\n{_markdown(rows, len(tables))}\n")
    return rows


def _rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _patients(folder: Path) -> dict[str, dict[str, float]]:
    """Figures of an evaluation's patients by their name."""
    rows = [row for row in _rows(folder / "metrics.csv") if row["case"] not in ("mean", "std")]
    return {row["case"]: {key: float(value) for key, value in row.items() if key != "case"} for row in rows}


def _figures(method: str, patients: Sequence[Mapping[str, float]]) -> dict[str, object]:
    figures: dict[str, object] = {"method": method}
    for key in COLUMNS:
        values = [patient[key] for patient in patients]
        low, high = bootstrap_interval(values)
        figures |= {key: float(np.nanmean(values)), f"{key}_low": low, f"{key}_high": high}
    return figures


def _markdown(rows: Sequence[Mapping], number: int) -> str:
    """The table, differences, which begin after so many rows, with their signs."""
    formats = {key: (about, ".3f") if isinstance(about, str) else about for key, about in COLUMNS.items()}
    lines = [
        "| method | " + " | ".join(heading for heading, _ in formats.values()) + " |",
        "|---" * (len(formats) + 1) + "|",
    ]
    for i, row in enumerate(rows):
        forms = {key: ("+" if i >= number else "") + form for key, (_, form) in formats.items()}
        cells = [f"{row[k]:{form}} ({row[f'{k}_low']:{form}} to {row[f'{k}_high']:{form}})" for k, form in forms.items()]
        lines.append(f"| {row['method']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
