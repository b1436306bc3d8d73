"""What all pictures share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from monai.config import NdarrayOrTensor, PathLike
from monai.utils import convert_to_numpy

__all__ = [
    "LABEL_COLOR",
    "MASK_COLOR",
    "Panel",
    "choose_slices",
    "draw_panels",
    "grey_scale",
    "name_axes",
    "save_figure",
    "slices_last",
]

MASK_COLOR, LABEL_COLOR = "#ffd400", "#00b4ff"


def slices_last(volume: NdarrayOrTensor, channel: int, slice_dim: int) -> np.ndarray:
    """(C, H, W, D) to one channel as float32, its slice axis last."""
    return np.moveaxis(convert_to_numpy(volume, dtype=np.float32)[channel], slice_dim, -1)


def choose_slices(picture: np.ndarray, found: np.ndarray, number: int) -> np.ndarray:
    """Rising indices of at most ``number`` slices of (H, W, D): most mask pixels first, then spread over the object."""
    area = found.sum(axis=(0, 1))
    chosen = np.argsort(-area, kind="stable")[:number]
    chosen = chosen[area[chosen] > 0]
    filled = np.flatnonzero(picture.max(axis=(0, 1)) > picture.min(axis=(0, 1)))
    others = np.setdiff1d(filled if filled.size else np.arange(area.size), chosen)
    missing = min(number - len(chosen), len(others))
    spread = others[((np.arange(missing) + 0.5) / max(missing, 1) * len(others)).astype(int)]
    return np.sort(np.concatenate([chosen, spread]))


def grey_scale(picture: np.ndarray) -> dict[str, object]:
    """Arguments of ``imshow`` for a picture in grey, in which a few bright voxels (vessels, noise) don't darken the rest."""
    return {"cmap": "gray", "vmin": picture.min(), "vmax": np.percentile(picture, 99.8)}


@dataclass(frozen=True)
class Panel:
    """A column of a picture of slices.

    Args:
        heading: what stands above it.
        volume: (H, W, D), a slice a row.
        scale: arguments of ``imshow``.
        outlines: areas (H, W, D), bool, and how each is outlined, arguments of ``contour``.
        bar: label of the colour bar at the right of the picture, which one panel may have.
        extend: see ``colorbar``.
    """

    heading: str
    volume: np.ndarray
    scale: Mapping[str, object]
    outlines: Sequence[tuple[np.ndarray, Mapping[str, object]]] = ()
    bar: str = ""
    extend: str = "neither"


def draw_panels(
    path_or_buffer: PathLike | BinaryIO,
    panels: Sequence[Panel],
    chosen: Sequence[int],
    title: str,
    legend: Mapping[str, Mapping[str, object]],
    size: tuple[float, float] = (1.0, 1.0),
) -> None:
    """Picture of some slices as PNG, a row a slice; axes of a slice run to the right and upwards.

    Args:
        path_or_buffer: file to write, or a binary buffer.
        panels: the columns.
        chosen: the slices.
        title: heading.
        legend: names of the outlines, and how they are drawn.
        size: size of a pixel to the right and upwards.
    """
    width, height = (pixels * edge for pixels, edge in zip(panels[0].volume.shape, size, strict=False))
    cell_height = 13 / np.clip(len(chosen), 3, 5)  # inches, at 100 dots each; more rows make the picture longer
    figure = Figure(
        figsize=(len(panels) * cell_height * width / height + 1.6, len(chosen) * cell_height + 1.2),
        dpi=100,
        layout="compressed",
        facecolor="black",
    )
    axes = figure.subplots(len(chosen), len(panels), squeeze=False)
    for row, index in zip(axes, chosen, strict=True):
        for axis, panel in zip(row, panels, strict=True):
            pixels = panel.volume[..., index].T
            shown = axis.imshow(pixels, origin="lower", aspect=size[1] / size[0], interpolation="nearest", **panel.scale)
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_visible(False)
            if panel.bar:
                scaled = panel, shown
            for volume, line in panel.outlines:
                area = volume[..., index].T
                if area.any() and not area.all():  # matplotlib warns of a level that is never crossed
                    axis.contour(area, levels=[0.5], **line)
        row[0].set_ylabel(f"slice {index}", color="white", fontsize=14)
    for axis, panel in zip(axes[0], panels, strict=True):
        axis.set_title(panel.heading, color="white", fontsize=16)

    panel, shown = scaled
    bar = figure.colorbar(shown, ax=axes[:, -1], extend=panel.extend)
    bar.set_label(panel.bar, color="white", fontsize=14)
    bar.ax.tick_params(colors="white", labelsize=13)
    bar.outline.set_edgecolor("white")
    if legend:
        figure.legend(
            handles=[
                Line2D([], [], color=line["colors"], linewidth=line["linewidths"], label=name)
                for name, line in legend.items()
            ],
            loc="outside lower right",
            ncols=len(legend),
            fontsize=14,
            labelcolor="white",
            facecolor="black",
        )
    figure.suptitle(title, color="white", fontsize=18)
    save_figure(figure, path_or_buffer)


def name_axes(axis: Axes, x: str, y: str) -> None:
    """Name the axes of a plot, and draw its grid."""
    axis.set_xlabel(x, fontsize=13)
    axis.set_ylabel(y, fontsize=13)
    axis.tick_params(labelsize=12)
    axis.grid(alpha=0.3)


def save_figure(figure: Figure, path_or_buffer: PathLike | BinaryIO, text: Mapping[str, str] | None = None) -> None:
    """Write a PNG, with text chunks if given, whose bytes depend on what it shows alone."""
    # without the version of matplotlib, which would make the bytes depend on it
    text = {"Software": None, **(text or {})}
    figure.savefig(path_or_buffer, format="png", facecolor=figure.get_facecolor(), metadata=text)
