"""Pictures of anomalies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import BinaryIO

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from monai.config import NdarrayOrTensor, PathLike
from monai.utils import convert_to_numpy

from scripts.figures import (
    LABEL_COLOR,
    MASK_COLOR,
    Panel,
    choose_slices,
    draw_panels,
    grey_scale,
    name_axes,
    save_figure,
    slices_last,
)

__all__ = ["contrast_figure", "guidance_table_figure", "methods_figure", "overview"]


def overview(
    path_or_buffer: PathLike | BinaryIO,
    image: NdarrayOrTensor,
    healthy: NdarrayOrTensor,
    anomaly_map: NdarrayOrTensor,
    mask: NdarrayOrTensor,
    label: NdarrayOrTensor | None = None,
    title: str = "",
    columns: Sequence[str] = ("input", "pseudo-healthy", "anomaly map", "mask"),
    channel: int = 0,
    num_rows: int = 5,
    slice_dim: int = 2,
    vmax: float | None = None,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    slices: Sequence[int] | None = None,
    region: NdarrayOrTensor | None = None,
    grey_range: Sequence[float] | None = None,
) -> None:
    """Overview picture of one case as PNG, a row a slice.

    The rows are the slices with the most mask pixels; where there are too few of them, slices spread over the rest of
    the object are added. The two axes that span a slice run to the right and upwards: with an axial slice of a RAS
    volume the patient's front is up and the patient's right is on the right.

    Args:
        path_or_buffer: file to write, or a binary buffer.
        image: (C, H, W, D) input, in the units of ``healthy``.
        healthy: (C, H, W, D) pseudo-healthy image, shown in the same grey scale.
        anomaly_map: (1, H, W, D), 0 or more, in one colour scale for all rows.
        mask: (1, H, W, D), outlined where above 0.
        label: (1, H, W, D), outlined in another colour where above 0.
        title: heading, e.g. the name of the case.
        columns: headings of the four columns; the last two also name the colour bar and the mask's outline.
        channel: channel of ``image`` and ``healthy`` that is shown.
        num_rows: largest number of rows.
        slice_dim: spatial axis that slices are counted along: 0, 1 or 2.
        vmax: upper end of the map's colour scale; the 99.8th percentile of the shown slices if not given.
        spacing: size of a voxel along the three axes, in mm.
        slices: the slices to show, from the top, in place of a choice of ``num_rows``.
        region: (1, H, W, D), what was looked at where above 0, such as an organ: the picture is cut to its surroundings.
        grey_range: grey levels, in the units of ``image``, shown black and white; its least and nearly its largest if not
            given.
    """
    if region is not None and (region > 0).any():
        around = _surroundings(convert_to_numpy(region)[0] > 0, slice_dim)
        image, healthy, anomaly_map, mask = (volume[around] for volume in (image, healthy, anomaly_map, mask))
        label = label if label is None else label[around]
    picture, restored = (slices_last(volume, channel, slice_dim) for volume in (image, healthy))
    anomaly, found = (slices_last(volume, 0, slice_dim) for volume in (anomaly_map, mask))
    outlines = {columns[3]: (found > 0, {"colors": MASK_COLOR, "linewidths": 1.5})}
    if label is not None:  # below the mask and wider, so that both are seen where they agree
        wide = {"colors": LABEL_COLOR, "linewidths": 4}
        outlines = {"label": (slices_last(label, 0, slice_dim) > 0, wide), **outlines}

    chosen = choose_slices(picture, found > 0, num_rows) if slices is None else np.asarray(slices)
    grey = grey_scale(picture) if grey_range is None else {"cmap": "gray", "vmin": grey_range[0], "vmax": grey_range[1]}
    vmax = vmax or np.percentile(anomaly[..., chosen], 99.8) or anomaly[..., chosen].max() or 1.0
    heat = {"cmap": "inferno", "vmin": 0, "vmax": vmax}
    extend = "max" if anomaly[..., chosen].max() > vmax else "neither"
    panels = [
        Panel(columns[0], picture, grey),
        Panel(columns[1], restored, grey),
        Panel(columns[2], anomaly, heat, bar=columns[2], extend=extend),
        Panel(columns[3], picture, grey, list(outlines.values())),
    ]
    right, up = (size for axis, size in enumerate(spacing) if axis != slice_dim)
    legend = {name: line for name, (_, line) in outlines.items()}
    draw_panels(path_or_buffer, panels, chosen, title, legend, (right, up))


def _surroundings(region: np.ndarray, slice_dim: int, margin: float = 0.3) -> tuple[slice, ...]:
    """Slices (C, H, W, D) round a region, bool (H, W, D), with a margin of its size in the plane."""
    around = [slice(None)]
    for axis in range(3):
        places = np.flatnonzero(region.any(axis=tuple(other for other in range(3) if other != axis)))
        low, high = places[0], places[-1] + 1
        more = 0 if axis == slice_dim else round(margin * (high - low))
        around.append(slice(max(low - more, 0), high + more))
    return tuple(around)


def guidance_table_figure(path: PathLike | BinaryIO, rows: Sequence[Mapping[str, float]]) -> None:
    """Dice and AUROC over the gradient scale as PNG, a line for each noise level.

    Args:
        path: file to write, or a binary buffer.
        rows: dicts with ``noise_level``, ``gradient_scale`` (above 0, its axis is logarithmic), ``dice``, ``auroc``.

    Raises:
        ValueError: when a gradient scale is not above 0.
    """
    scales = sorted({row["gradient_scale"] for row in rows})
    if any(scale <= 0 for scale in scales):
        raise ValueError(f"Gradient scales above 0 are needed for a logarithmic axis, got {scales}.")
    figure = Figure(figsize=(12, 5), dpi=100, layout="constrained")
    for axis, key, name in zip(figure.subplots(1, 2), ("dice", "auroc"), ("Dice", "AUROC"), strict=True):
        for level in sorted({row["noise_level"] for row in rows}):
            line = sorted((row["gradient_scale"], row[key]) for row in rows if row["noise_level"] == level)
            axis.plot(*zip(*line, strict=True), marker="o", label=f"{level:g}")
        axis.set_xscale("log")
        axis.set_xticks(scales, [f"{scale:g}" for scale in scales])
        axis.set_xticks([], minor=True)
        name_axes(axis, "gradient scale", name)
    axis.legend(title="noise level", fontsize=12, title_fontsize=12)
    save_figure(figure, path)


def contrast_figure(path: PathLike | BinaryIO, rows: Sequence[Mapping[str, float | str]]) -> None:
    """Largest Dice over the contrast of painted sprites as PNG, a line for each method.

    Args:
        path: file to write, or a binary buffer.
        rows: dicts with ``method``, ``contrast`` and ``best_dice``.
    """
    figure = Figure(figsize=(7, 5), dpi=100, layout="constrained")
    axis = figure.subplots()
    for method in dict.fromkeys(row["method"] for row in rows):  # in their order
        line = sorted((row["contrast"], row["best_dice"]) for row in rows if row["method"] == method)
        axis.plot(*zip(*line, strict=True), marker="o", label=method)
    axis.set_ylim(0, 1)
    name_axes(axis, "difference in grey level between the sprite and what it covers", "largest Dice")
    axis.legend(fontsize=12)
    save_figure(figure, path)


def methods_figure(
    path: PathLike | BinaryIO,
    slices: Sequence[tuple[str, np.ndarray, np.ndarray]],
    methods: Mapping[str, Sequence[tuple[np.ndarray, np.ndarray]]],
) -> None:
    """What several methods make of the same slices as PNG: a row a method below the slices themselves.

    The maps of a method share one colour scale, whose end is their 99.5th percentile. Axes run to the right and upwards.

    Args:
        path: file to write, or a binary buffer.
        slices: heading, grey levels (H, W) and label (H, W) of each slice.
        methods: by their names, anomaly map (H, W) and mask (H, W) of each slice.
    """
    cell = 2.2  # inches
    figure = Figure(
        figsize=(cell * len(slices) + 0.6, cell * (len(methods) + 1) + 0.8), dpi=100, layout="compressed", facecolor="black"
    )
    axes = figure.subplots(len(methods) + 1, len(slices), squeeze=False)
    for axis, (heading, picture, _) in zip(axes[0], slices, strict=True):
        axis.imshow(picture.T, origin="lower", cmap="gray", vmin=0, vmax=np.percentile(picture, 99.8) or 1)
        axis.set_title(heading, color="white", fontsize=9)
    for row, (name, results) in zip(axes[1:], methods.items(), strict=True):
        vmax = np.percentile(np.stack([anomaly for anomaly, _ in results]), 99.5) or 1
        for axis, (anomaly, mask) in zip(row, results, strict=True):
            axis.imshow(anomaly.T, origin="lower", cmap="inferno", vmin=0, vmax=vmax)
            if mask.any() and not mask.all():
                axis.contour(mask.T > 0, levels=[0.5], colors=MASK_COLOR, linewidths=1)
        row[0].set_ylabel(name, color="white", fontsize=9)
    for row in axes:
        for axis, (_, _, label) in zip(row, slices, strict=True):
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_visible(False)
            if label.any() and not label.all():
                axis.contour(label.T > 0, levels=[0.5], colors=LABEL_COLOR, linewidths=1)
    named = (("mask", MASK_COLOR), ("label", LABEL_COLOR))
    figure.legend(
        handles=[Line2D([], [], color=color, label=name) for name, color in named],
        loc="outside lower right",
        ncols=2,
        labelcolor="white",
        facecolor="black",
    )
    save_figure(figure, path)
