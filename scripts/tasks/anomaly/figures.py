"""Pictures of anomalies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import BinaryIO

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from monai.config import NdarrayOrTensor, PathLike
from monai.utils import convert_to_numpy

from scripts.figures import LABEL_COLOR, MASK_COLOR, choose_slices, name_axes, save_figure, slices_last

__all__ = ["contrast_figure", "guidance_table_figure", "overview"]


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
    outlines = [(found > 0, columns[3], {"colors": MASK_COLOR, "linewidths": 1.5})]
    if label is not None:  # below the mask and wider, so that both are seen where they agree
        outlines.insert(0, (slices_last(label, 0, slice_dim) > 0, "label", {"colors": LABEL_COLOR, "linewidths": 4}))

    chosen = choose_slices(picture, found > 0, num_rows) if slices is None else np.asarray(slices)
    # a few bright voxels (vessels, noise) would darken all the rest
    darkest, brightest = grey_range or (picture.min(), np.percentile(picture, 99.8))
    grey = {"cmap": "gray", "vmin": darkest, "vmax": brightest}
    vmax = vmax or np.percentile(anomaly[..., chosen], 99.8) or anomaly[..., chosen].max() or 1.0
    heat = {"cmap": "inferno", "vmin": 0, "vmax": vmax}
    panels = [(picture, grey), (restored, grey), (anomaly, heat), (picture, grey)]

    right, up = (size for axis, size in enumerate(spacing) if axis != slice_dim)
    cell_height = 13 / np.clip(len(chosen), 3, 5)  # inches, at 100 dots each; more rows make the picture longer
    cell_width = cell_height * (picture.shape[0] * right) / (picture.shape[1] * up)
    figure = Figure(
        figsize=(4 * cell_width + 1.6, len(chosen) * cell_height + 1.2), dpi=100, layout="compressed", facecolor="black"
    )
    axes = figure.subplots(len(chosen), 4, squeeze=False)
    for row, index in zip(axes, chosen, strict=True):
        for axis, (volume, scale) in zip(row, panels, strict=True):
            pixels = volume[..., index].T
            shown = axis.imshow(pixels, origin="lower", aspect=up / right, interpolation="nearest", **scale)
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_visible(False)
            if volume is anomaly:
                heated = shown
        row[0].set_ylabel(f"slice {index}", color="white", fontsize=14)
        for volume, _, line in outlines:
            area = volume[..., index].T
            if area.any() and not area.all():  # matplotlib warns of a level that is never crossed
                row[3].contour(area, levels=[0.5], **line)
    for axis, heading in zip(axes[0], columns, strict=True):
        axis.set_title(heading, color="white", fontsize=16)

    bar = figure.colorbar(heated, ax=axes[:, 3], extend="max" if anomaly[..., chosen].max() > vmax else "neither")
    bar.set_label(columns[2], color="white", fontsize=14)
    bar.ax.tick_params(colors="white", labelsize=13)
    bar.outline.set_edgecolor("white")
    figure.legend(
        handles=[
            Line2D([], [], color=line["colors"], linewidth=line["linewidths"], label=name) for _, name, line in outlines
        ],
        loc="outside lower right",
        ncols=2,
        fontsize=14,
        labelcolor="white",
        facecolor="black",
    )
    figure.suptitle(title, color="white", fontsize=18)
    save_figure(figure, path_or_buffer)


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
