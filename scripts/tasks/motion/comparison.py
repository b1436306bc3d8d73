"""One table of several methods on the same patients, by group, with intervals over the patients."""

from __future__ import annotations

import csv
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from scripts.metrics import bootstrap_interval
from scripts.tables import write_rows
from scripts.tasks.motion.metrics import FIGURES

__all__ = ["compare_cines"]

logger = logging.getLogger(__name__)

COLUMNS = {
    **FIGURES,
    **{f"dice_after_{name}": ((f"dice_after_{name}",), np.mean) for name in ("rv", "myo", "lv")},
    **{name: ((name,), np.mean) for name in ("middle_psnr_gain", "folding_percent", "inverse_consistency_mm")},
    "ejection_fraction_abs_error": (("ejection_fraction_error",), lambda errors, axis=None: np.mean(np.abs(errors), axis)),
    "seconds": (("seconds",), np.mean),
}
HEADINGS = {
    "psnr_gain": ("gain in dB", "+.2f"),
    "dice_after": ("Dice", ".3f"),
    "gap_closed": ("gap closed", ".3f"),
    "less_psnr_gain": ("dB more than the first", "+.2f"),
    "less_gap_closed": ("gap closed more than by the first", "+.3f"),
    "middle_psnr_gain": ("gain in the middle in dB", "+.2f"),
    "folding_percent": ("folding %", ".3f"),
    "inverse_consistency_mm": ("inverse consistency in mm", ".2f"),
    "ejection_fraction_abs_error": ("error of the ejection fraction", ".1f"),
    "seconds": ("seconds", ".1f"),
}


def compare_cines(folders: Mapping[str, Path], output_dir: Path) -> list[dict]:
    """Write and print a table of evaluated methods: all patients, each group, and the differences to the first method.

    Args:
        folders: by method, the folder of its evaluation, with the ``metrics.csv`` of
            :class:`scripts.tasks.motion.metrics.CineMetrics` and ``results.csv``.
        output_dir: folder for ``comparison.csv``.

    Returns:
        rows with ``method``, ``group`` (``all`` among them), ``patients``, and of each figure (``psnr_gain`` in dB,
        ``dice_after`` and by structure, ``gap_closed``, ``folding_percent``, ``ejection_fraction_abs_error`` in percentage
        points, ``seconds``) the figure of the cohort, ``…_low`` and ``…_high``, the ends of its 95 % interval; ``less_…``
        are those of the difference to the first method, patient by patient.

    Raises:
        ValueError: naming the folder of a method that has been evaluated on other patients than the first one.
    """
    tables = {method: _patients(folder) for method, folder in folders.items()}
    first, *others = tables
    for method in others:
        if list(tables[method]) != list(tables[first]):
            raise ValueError(f"{folders[method]}: other patients than in {folders[first]}; evaluate both on the same ones")
    groups = {"all": list(tables[first])}
    for case, row in tables[first].items():
        if row["group"]:
            groups.setdefault(row["group"], []).append(case)
    rows = []
    for group, cases in sorted(groups.items(), key=lambda item: (item[0] != "all", item[0])):
        for method in tables:
            chosen = [[tables[name][case] for case in cases] for name in (method, first)]
            rows.append({"method": method, "group": group, "patients": len(cases), **_figures(*chosen, method != first)})
    write_rows(output_dir / "comparison.csv", rows)
    for group in dict.fromkeys(row["group"] for row in rows):
        own = [row for row in rows if row["group"] == group]
        logger.info(f"{group}, {own[0]['patients']} patients\n\n{_markdown(own)}\n")
    return rows


def _patients(folder: Path) -> dict[str, dict[str, str]]:
    """Rows of an evaluation's patients by their name, with their seconds."""
    tables = []
    for name in ("metrics.csv", "results.csv"):
        with open(folder / name, newline="", encoding="utf-8") as file:
            tables.append({row["case"]: row for row in csv.DictReader(file)})
    return {case: {**row, "seconds": tables[1][case]["seconds"]} for case, row in tables[0].items() if case in tables[1]}


def _figures(own: Sequence[Mapping], first: Sequence[Mapping], is_other: bool) -> dict[str, float]:
    figures = {}
    for name, (columns, statistic) in COLUMNS.items():
        values = np.array([[float(row[column]) for row in rows] for rows in (own, first) for column in columns])
        known = values[:, ~np.isnan(values).any(axis=0)]
        number = len(columns)
        figures |= _with_ends(name, known[:number], statistic)
        if is_other:
            figures |= _with_ends(f"less_{name}", known, _difference(statistic, number))
    return figures


def _difference(statistic: Callable[..., np.ndarray], number: int) -> Callable[..., np.ndarray]:
    """The statistic of the first ``number`` values less that of the rest."""
    return lambda *values, axis=None: statistic(*values[:number], axis=axis) - statistic(*values[number:], axis=axis)


def _with_ends(name: str, values: np.ndarray, statistic: Callable[..., np.ndarray]) -> dict[str, float]:
    """A cohort's figure, of values (N, patients), and the ends of its interval."""
    lower, upper = bootstrap_interval(*values, statistic=statistic)
    return {name: float(statistic(*values)) if values.size else math.nan, f"{name}_low": lower, f"{name}_high": upper}


def _markdown(rows: Sequence[Mapping]) -> str:
    """The main figures, those of :data:`FIGURES` with their intervals."""
    lines = [
        "| method | " + " | ".join(heading for heading, _ in HEADINGS.values()) + " |",
        "|---" * (len(HEADINGS) + 1) + "|",
    ]
    for row in rows:
        cells = [_cell(row, name, form) for name, (_, form) in HEADINGS.items()]
        lines.append(f"| {row['method']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(row: Mapping, name: str, form: str) -> str:
    if name not in row:
        return "–"
    ends = ""
    if name.removeprefix("less_") in FIGURES:
        ends = f" ({row[f'{name}_low']:{form}} to {row[f'{name}_high']:{form}})"
    return f"{row[name]:{form}}{ends}"
