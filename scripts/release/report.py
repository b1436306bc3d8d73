"""One HTML page over the results of a cohort: a table of the cases with their pictures, histograms, metrics, failures.

The page holds everything it shows and loads nothing from a network, and the same results give the same bytes.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import math
import os
import statistics
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

import numpy as np
from matplotlib.ticker import MaxNLocator
from PIL import Image
from tqdm import tqdm

from scripts.files import own_file
from scripts.release.page import DIALOG, SCRIPT, STYLE

__all__ = ["report"]

SLICE_SCORES = ("probability", "abnormality")  # in [0, 1], of a case the largest over its slices
LIKELY_ILL = 0.5
PIXELS = 150_000_000  # of all pictures together, so that the page of a large cohort has some 15 to 20 MB
MIN_PIXELS = 40_000  # of one picture
VERSIONS = ("bundle", "version", "weights")
HEADINGS = {
    "finding_ml": "finding (ml)",
    "dice": "Dice",
    "best_dice": "largest Dice",
    "slice_dice": "Dice of slices",
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "lesion_mean": "map in lesion",
    "healthy_slice_mean": "map of healthy slices",
    "true_ml": "label (ml)",
    "probability": "probability of disease",
    "num_slices": "slices",
    "num_cases": "cases",
    "dice_mean": "Dice, mean",
    "dice_std": "Dice, standard deviation",
    "best_threshold": "threshold of the largest Dice",
    "best_dice_lesion_slices": "largest Dice of lesion slices",
    "auroc_lesion_slices": "AUROC of lesion slices",
    "auprc_lesion_slices": "AUPRC of lesion slices",
    "slice_auroc": "AUROC of slices",
    "slice_auprc": "AUPRC of slices",
    "healthy_ratio": "map of healthy slices / in lesions",
    "unlike_training": "unlike the training (1 = hardly any training case)",
    "unlike_in": "unlike in",
    "source_frame": "source (frame)",
    "target_frame": "target (frame)",
    "frames_by": "frames known by",
    "moving_ml": "moving (ml)",
    "lv_first_ml": "left ventricle, first frame (ml)",
    "lv_last_ml": "left ventricle, last frame (ml)",
    "lv_true_last_ml": "left ventricle, label of the target (ml)",
    "ejection_fraction_percent": "ejection fraction (%)",
    "wall_thickening_percent": "thickening of the wall (%)",
    "lv_falls": "left ventricle never grows",
    "max_displacement_mm": "largest displacement (mm)",
    "folding_percent": "share that folds (%)",
    "roughness_mm": "roughness over time (mm)",
    "psnr": "PSNR (dB)",
    "still_psnr": "PSNR of the source repeated (dB)",
    "psnr_gain": "gain in PSNR (dB)",
    "nmse": "NMSE",
    "still_nmse": "NMSE of the source repeated",
    "dice_before": "Dice before",
    "dice_after": "Dice after",
    "gap_closed": "share of the Dice gap closed",
}
HISTOGRAMS = {  # column: heading, unit
    "finding_ml": ("Volume of the finding", " ml"),
    "max_displacement_mm": ("Largest displacement", " mm"),
    "folding_percent": ("Share that folds", " %"),
}


def report(results_dir: Path, path: Path | None = None) -> Path:
    """Write one HTML page over the results of a cohort.

    It shows ``results.csv``, the overview picture of each case, ``metrics.csv`` and ``metrics_summary.json`` of an
    evaluation, and the cases that failed (``failures.csv``), as far as they are there. Findings are
    marked as doubtful in cases that look healthy as a whole: whose probability of disease, or abnormality, is below 0.5.
    The more cases, the smaller the pictures that the page holds; in place of them it shows the files beside it,
    where they are found. The program ends with one line if a table can't be read or the page can't be written.

    Args:
        results_dir: folder that a bundle's inference wrote.
        path: file to write; ``report.html`` in that folder if not given.

    Returns:
        the file.
    """
    results_dir = Path(results_dir).resolve()
    path = Path(path).resolve() if path else results_dir / "report.html"
    if path.is_dir():
        sys.exit(f"{path}: is a folder; give the name of a file to write")
    failures = _read_table(results_dir / "failures.csv")
    if not failures and not (results_dir / "results.csv").is_file():
        sys.exit(f"{results_dir}: no results.csv there; give the --output_dir of a bundle's inference")
    rows = _read_table(results_dir / "results.csv")
    metrics = _read_table(results_dir / "metrics.csv")
    if [row["case"] for row in metrics[-2:]] == ["mean", "std"]:
        del metrics[-2:]
    metrics_of = {row.pop("case"): row for row in metrics}
    for row in metrics_of.values():
        row.pop("predicted_ml", None)  # it is the finding's volume
    metric_names = list(next(iter(metrics_of.values()), {}))
    rows = [{**row, **{n: _rounded(metrics_of.get(row["case"], {}).get(n, "")) for n in metric_names}} for row in rows]

    page = "".join(
        [
            _header(rows, failures),
            _summary(results_dir / "metrics_summary.json"),
            _cases(rows, results_dir, path.parent),
            _failures(failures),
        ]
    )
    try:
        with own_file(path) as aside:
            aside.write_text(_document(_title(rows), page), encoding="utf-8")
    except ValueError as error:  # somebody else's file
        sys.exit(str(error))
    except OSError as error:
        sys.exit(f"{path}: can't be written ({error.strerror or error}); give another place by --path")
    return path


def _read_table(path: Path) -> list[dict[str, str]]:
    """Rows of a table with a column ``case``; none if there is no such file."""
    try:
        if not path.exists():
            return []
        with open(path, newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file, strict=True)
            if "case" not in (table.fieldnames or ()):
                sys.exit(f"{path}: has no column 'case'; run the bundle again to write it anew")
            rows = list(table)
            if any(None in row or None in row.values() for row in rows):
                sys.exit(f"{path}: a row has too few or too many columns; run the bundle again to write it anew")
            return rows
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        sys.exit(f"{path}: can't be read ({getattr(error, 'strerror', None) or error})")


def _number(text: str) -> float:
    """Number that a text stands for, NaN if it is none or not finite."""
    try:
        number = float(text)
    except ValueError:
        return math.nan
    return number if math.isfinite(number) else math.nan


def _rounded(text: str) -> str:
    number = _number(text)
    return text if math.isnan(number) or text.isdecimal() else f"{number:.3f}"


def _heading(name: str) -> str:
    return escape(HEADINGS.get(name, name.replace("_", " ")))


def _is_doubtful(row: Mapping[str, str]) -> bool:
    """Whether something is found in a case that looks healthy as a whole."""
    return _number(row.get("finding_ml", "")) > 0 and any(_number(row.get(name, "")) < LIKELY_ILL for name in SLICE_SCORES)


def _is_unlike(row: Mapping[str, str]) -> bool:
    """Whether a scan is more unlike the training's than nearly all of these are."""
    return _number(row.get("unlike_training", "")) > 1


def _title(rows: Sequence[Mapping[str, str]]) -> str:
    return escape(", ".join(dict.fromkeys(row.get("bundle", "") for row in rows)) or "Results")


def _versions(rows: Sequence[Mapping[str, str]]) -> Counter[tuple[str, ...]]:
    """Number of cases of each bundle, version and weights."""
    return Counter(tuple(row.get(name, "") for name in VERSIONS) for row in rows)


def _document(title: str, page: str) -> str:
    # nothing but this style and this script is obeyed, and nothing is loaded from elsewhere, whatever the page holds
    style, script = (base64.b64encode(hashlib.sha256(t.encode()).digest()).decode() for t in (STYLE, SCRIPT))
    policy = f"default-src 'none'; img-src data: file: 'self'; style-src 'sha256-{style}'; script-src 'sha256-{script}'"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}: results</title>
<style>{STYLE}</style>
</head>
<body>
{page}<p class="note">For research only, not for diagnosis.</p>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _header(rows: Sequence[Mapping[str, str]], failures: Sequence[Mapping[str, str]]) -> str:
    facts = []
    for versions, number in _versions(rows).items():
        several = f" ({number} of {len(rows)} cases)" if number < len(rows) else ""
        version, weights = versions[1:]
        facts += [("version", f"{version}{several}"), ("weights", weights)]
        if several:
            facts[-2:-2] = [("bundle", versions[0])]
    facts += [("cases", str(len(rows)))]
    if rows and not rows[0].keys().isdisjoint(SLICE_SCORES):
        facts += [("doubtful findings", str(sum(map(_is_doubtful, rows))))]
    if rows and "unlike_training" in rows[0]:
        facts += [("unlike the training", str(sum(map(_is_unlike, rows))))]
    items = "".join(f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>\n" for name, value in facts)
    failed = f'<a href="#failures">{len(failures)}</a>' if failures else "none on record"
    return f"<h1>{_title(rows)}</h1>\n<dl>\n{items}<div><dt>failed</dt><dd>{failed}</dd></div>\n</dl>\n"


def _summary(path: Path) -> str:
    """The figures pooled over the cohort."""
    try:
        summary = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        pairs = [(name, "" if value is None else str(value)) for name, value in summary.items()]
    except (OSError, ValueError, AttributeError) as error:
        sys.exit(f"{path}: can't be read ({getattr(error, 'strerror', None) or error}); evaluate again")
    if not pairs:
        return ""
    items = "".join(f"<div><dt>{_heading(n)}</dt><dd>{escape(_rounded(value) or '–')}</dd></div>\n" for n, value in pairs)
    return f"<h2>Evaluation</h2>\n<dl>\n{items}</dl>\n"


def _failures(failures: Sequence[Mapping[str, str]]) -> str:
    if not failures:
        return ""
    lines = "".join(
        f'<tr><th scope="row">{escape(row["case"])}</th><td class="reason">{escape(row.get("reason", ""))}</td></tr>\n'
        for row in failures
    )
    return f"""<h2 id="failures">Cases that failed in the last run</h2>
<div class="scroll">
<table>
<thead><tr><th scope="col">case</th><th scope="col">reason</th></tr></thead>
<tbody>
{lines}</tbody>
</table>
</div>
"""


def _cases(rows: Sequence[Mapping[str, str]], results_dir: Path, page_dir: Path) -> str:
    """Histograms and table of the cases."""
    if not rows:
        return ""
    left_out = VERSIONS if len(_versions(rows)) == 1 else ()  # they are in the header
    columns = [name for name in rows[0] if name != "case" and name not in left_out]
    numbers = [n for n in columns if all(r[n] in ("", "nan") or not math.isnan(_number(r[n])) for r in rows)]
    headings = "".join(
        f'<th scope="col"{" data-number" if name in numbers else ""}><button type="button">{_heading(name)}</button></th>'
        for name in ("case", *columns)
    )
    pixels = max(MIN_PIXELS, PIXELS // len(rows))
    lines = []
    for row in tqdm(rows, desc="pictures", disable=None, leave=False):
        cells = [_picture(row["case"], results_dir, page_dir, pixels), f'<th scope="row">{escape(row["case"])}</th>']
        for name in columns:
            text = escape(row[name]) if row[name] not in ("", "nan") else "–"
            mark = ""
            if name in SLICE_SCORES and _is_doubtful(row):
                mark = '<span class="doubt">doubtful finding</span>'
            elif name == "unlike_training" and _is_unlike(row):
                mark = '<span class="doubt">unlike the training</span>'
            cells.append(f"<td{' class=number' if name in numbers else ''}>{text}{mark}</td>")
        lines.append(f"<tr{' class=doubtful' if _is_doubtful(row) else ''}>{''.join(cells)}</tr>\n")

    figures, note = "", ""
    for column, (heading, unit) in HISTOGRAMS.items():
        if values := _values(rows, column):
            figures += _histogram(heading, unit, values, MaxNLocator(20).tick_values(0, max(values) or 1))
    for name in SLICE_SCORES:
        if values := _values(rows, name):
            heading = _heading(name)
            figures += _histogram(heading.capitalize(), "", values, np.linspace(0, 1, 21))
            note = f'<p class="note">A finding is doubtful where the {heading} is below {LIKELY_ILL}.</p>\n'
    return f"""<div class="figures">
{figures}</div>
<h2 id="table">Cases</h2>
{note}<div class="controls"><label for="filter">Show cases with</label>
<input id="filter" type="search" placeholder="part of a name"> <span id="count" role="status"></span></div>
<div class="scroll" role="region" aria-labelledby="table" tabindex="0">
<table id="cases">
<thead><tr><th scope="col">picture</th>{headings}</tr></thead>
<tbody>
{"".join(lines)}</tbody>
</table>
</div>
{DIALOG}"""


def _picture(case: str, results_dir: Path, page_dir: Path, pixels: int) -> str:
    """Cell with the overview picture of a case, of no more than a number of pixels."""
    path = results_dir / case / f"{case}_overview.png"
    try:
        with Image.open(path) as image:
            image = image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # none there, or a broken one
        return '<td class="picture">–</td>'
    scale = min(1.0, math.sqrt(pixels / (image.width * image.height)))
    small = image.resize([max(1, round(scale * side)) for side in image.size], reducing_gap=2.0)
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=60)
    data = base64.b64encode(buffer.getvalue()).decode()
    original = quote(os.path.relpath(path, page_dir).replace(os.sep, "/"))
    return (
        f'<td class="picture"><button type="button" aria-label="Open the picture of {escape(case)}">'
        f'<img alt="" width="{small.width}" height="{small.height}" loading="lazy" decoding="async" '
        f'data-original="{original}" src="data:image/webp;base64,{data}"></button></td>'
    )


def _values(rows: Sequence[Mapping[str, str]], column: str) -> list[float]:
    """The numbers of a column, without the cells that have none."""
    return [value for row in rows if not math.isnan(value := _number(row.get(column, "")))]


def _histogram(heading: str, unit: str, values: Sequence[float], edges: Sequence[float]) -> str:
    counts, _ = np.histogram(values, edges)
    left, top, width, height = 34, 8, 340, 110
    step = width / len(counts)
    bars = ""
    for i, count in enumerate(counts):
        tall = height * count / max(counts.max(), 1)
        bars += (
            f'<rect x="{left + i * step:.1f}" y="{top + height - tall:.1f}" width="{step - 1:.1f}" '
            f'height="{tall:.1f}"><title>{edges[i]:.4g} to {edges[i + 1]:.4g}{unit}: {count}</title></rect>\n'
        )
    middle = len(counts) // 2
    ticks = "".join(
        f'<text x="{left + i * step:.1f}" y="{top + height + 16}" text-anchor="{anchor}">{edges[i]:.4g}{unit}</text>\n'
        for i, anchor in ((0, "start"), (middle, "middle"), (len(counts), "end"))
    )
    words = f"median {statistics.median(values):.4g}{unit}, from {min(values):.4g} to {max(values):.4g}{unit}"
    return f"""<figure>
<svg viewBox="0 0 380 136" role="img" aria-label="Histogram: {heading.lower()}, {words}">
<line x1="{left}" y1="{top}" x2="{left + width}" y2="{top}"/><text x="{left - 5}" y="{top + 4}" \
text-anchor="end">{counts.max()}</text>
{bars}<line x1="{left}" y1="{top + height}" x2="{left + width}" y2="{top + height}"/>
{ticks}</svg>
<figcaption><b>{heading}</b>: {words}</figcaption>
</figure>
"""
