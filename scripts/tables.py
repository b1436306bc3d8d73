"""Tables of measured figures: rows as CSV, mean and spread of several runs, and Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from scripts.files import own_file

__all__ = ["markdown_table", "mean_and_std", "write_rows"]

Summary = dict[str, dict[str, dict[str, float]]]


def write_rows(path: str | Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write rows as CSV; a row without one of the columns has an empty field there."""
    table = io.StringIO()
    writer = csv.DictWriter(table, fieldnames=list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with own_file(path) as aside:
        aside.write_text(table.getvalue(), encoding="utf-8")


def mean_and_std(rows: Sequence[Mapping[str, object]]) -> Summary:
    """Mean and standard deviation over the seeds.

    Args:
        rows: each with ``method``, ``seed`` and figures; the rows of a method have the same figures.

    Returns:
        by method, in their order, and figure: ``mean`` and, of several rows, ``std`` (of the values, not of their mean).
    """
    summary: Summary = {}
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        summary[method] = {}
        for key in (key for key in own[0] if key not in ("method", "seed")):
            values = [row[key] for row in own]
            spread = {"std": float(np.std(values))} if len(own) > 1 else {}
            summary[method][key] = {"mean": float(np.mean(values)), **spread}
    return summary


def markdown_table(summary: Summary, columns: Mapping[str, str | tuple[str, str]]) -> str:
    """The means of :func:`mean_and_std`, a line a method, with ± where there are several runs.

    Args:
        summary: figures by method; one that a method lacks is shown as a dash.
        columns: heading of each figure, or heading and format (``.3f`` if not given).
    """
    columns = {key: (about, ".3f") if isinstance(about, str) else about for key, about in columns.items()}

    def cell(figure: Mapping[str, float] | None, form: str) -> str:
        if figure is None:
            return "–"
        return " ± ".join(f"{figure[key]:{form}}" for key in ("mean", "std") if key in figure)

    headings = " | ".join(heading for heading, _ in columns.values())
    lines = [f"| method | {headings} |", "|---" * (len(columns) + 1) + "|"]
    for name, figures in summary.items():
        cells = [cell(figures.get(key), form) for key, (_, form) in columns.items()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
