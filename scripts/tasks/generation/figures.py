"""Pictures of generated images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import BinaryIO

import numpy as np
from matplotlib.figure import Figure
from monai.config import NdarrayOrTensor, PathLike
from monai.utils import convert_to_numpy

from scripts.figures import name_axes, save_figure

__all__ = ["contact_sheet", "schedule_figure"]


def contact_sheet(
    path_or_buffer: PathLike | BinaryIO,
    images: NdarrayOrTensor,
    titles: Sequence[str] | None = None,
    columns: int = 10,
    heading: str = "",
    text: Mapping[str, str] | None = None,
) -> None:
    """Images beside each other as PNG, row by row, in one grey scale.

    Args:
        path_or_buffer: file to write, or a binary buffer.
        images: (N, 1, H, W) in [0, 1]; as in :class:`scripts.data.reading.LoadSequencesd` the first axis runs to the right,
            the second one down.
        titles: a line above each image.
        columns: images in a row.
        heading: heading of the sheet.
        text: text chunks of the PNG.
    """
    pictures = convert_to_numpy(images, dtype=np.float32)[:, 0].swapaxes(1, 2)
    height, width = pictures.shape[1:]
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    gap = height // 4 if titles else 2  # room for a line
    sheet = np.zeros((rows * (height + gap), columns * (width + 2)))
    for i, picture in enumerate(pictures):
        top, left = (i // columns) * (height + gap) + gap, (i % columns) * (width + 2) + 1
        sheet[top : top + height, left : left + width] = picture

    scale = 1.2 / width  # inches a pixel
    figure = Figure(
        figsize=(max(sheet.shape[1] * scale, 5), sheet.shape[0] * scale + 0.4), dpi=100, layout="constrained", facecolor="k"
    )
    axis = figure.subplots()
    axis.imshow(sheet, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axis.set_axis_off()
    for i, title in enumerate(titles or ()):
        x, y = (i % columns + 0.5) * (width + 2), (i // columns) * (height + gap) + gap / 2
        axis.text(x, y, title, color="white", fontsize=8, ha="center", va="center")
    figure.suptitle(heading, color="white", fontsize=11)
    save_figure(figure, path_or_buffer, text)


def schedule_figure(path: PathLike | BinaryIO, times: NdarrayOrTensor, gammas: NdarrayOrTensor) -> None:
    """Noise schedule in continuous time as PNG, with the straight line between its ends.

    Args:
        path: file to write, or a binary buffer.
        times: (N,), rising from 0 to 1.
        gammas: (N,), the negative log of the signal-to-noise ratio at those times.
    """
    times, gammas = (convert_to_numpy(values, dtype=np.float64) for values in (times, gammas))
    figure = Figure(figsize=(7, 5), dpi=100, layout="constrained")
    axis = figure.subplots()
    axis.plot(times[[0, -1]], gammas[[0, -1]], color="gray", linestyle="--", label="straight line")
    axis.plot(times, gammas, label="schedule")
    name_axes(axis, "time t", "gamma(t) = -log SNR")
    axis.legend(fontsize=12)
    save_figure(figure, path)
