"""Pictures of cines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import BinaryIO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from monai.config import NdarrayOrTensor, PathLike
from monai.utils import convert_to_numpy
from PIL import Image

from scripts.data.cines import slice_axis
from scripts.figures import LABEL_COLOR, MASK_COLOR, Panel, draw_panels, save_figure

__all__ = ["cine_animation", "cine_overview", "registration_overview", "volume_curves"]

STRUCTURE_COLORS = {1: "#00b4ff", 2: "#57d14b", 3: "#ff5050"}  # right ventricle, myocardium, left ventricle


def cine_overview(
    path_or_buffer: PathLike | BinaryIO,
    frames: NdarrayOrTensor,
    displacement: NdarrayOrTensor,
    real: NdarrayOrTensor | None = None,
    labels: NdarrayOrTensor | None = None,
    title: str = "",
    fractions: Sequence[float] | None = None,
    num_columns: int = 6,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
) -> None:
    """Overview picture of a generated cine as PNG: generated frames, real ones if there are, and how far tissue has moved.

    It shows the slice that moves most; the axis with the fewest voxels (of several, the last) counts the slices. Axes run
    to the right and upwards, as in :func:`overview`.

    Args:
        path_or_buffer: file to write, or a binary buffer.
        frames: (F, H, W, D).
        displacement: (3 F, H, W, D), in mm along the three axes; the arrows show where tissue has come to, its negative.
        real: (F, H, W, D) in the unit of ``frames``; of another number of frames, the first and the last alone are shown.
        labels: (F, H, W, D), outlined in the generated frames.
        title: heading, e.g. the name of the case.
        fractions: how far each frame is on the way from source to target; evenly spaced if not given.
        num_columns: largest number of frames to show.
        spacing: size of a voxel along the three axes, in mm.
    """
    slice_dim = slice_axis(frames.shape[1:])
    cine = _frame_slices(frames, slice_dim)
    vectors = _frame_slices(displacement, slice_dim).reshape(len(cine), 3, *cine.shape[1:])
    lengths = np.linalg.norm(vectors, axis=1)
    index = int(lengths.sum(axis=(0, 1, 2)).argmax())
    right_axis, up_axis = (axis for axis in range(3) if axis != slice_dim)
    right, up = spacing[right_axis], spacing[up_axis]

    shown = np.unique(np.linspace(0, len(cine) - 1, min(num_columns, len(cine))).round().astype(int))
    truth = {} if real is None else _matching(_frame_slices(real, slice_dim), len(cine))
    names = ["generated", *(["real"] if truth else []), "displacement"]
    cell = 2.2  # inches
    figure = Figure(
        figsize=(
            len(shown) * cell * max((cine.shape[1] * right) / (cine.shape[2] * up), 0.5) + 1.6,
            len(names) * cell + 0.8,
        ),
        dpi=100,
        layout="compressed",
        facecolor="black",
    )
    axes = figure.subplots(len(names), len(shown), squeeze=False)
    grey = {"cmap": "gray", "vmin": cine.min(), "vmax": np.percentile(cine[0], 99.8)}
    heat = {"cmap": "inferno", "vmin": 0, "vmax": lengths[..., index].max() or 1.0}
    look = {"origin": "lower", "aspect": up / right, "interpolation": "nearest"}
    for row, name in zip(axes, names, strict=True):
        row[0].set_ylabel(name, color="white", fontsize=13)
        for axis, k in zip(row, shown, strict=True):
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_visible(False)
            axis.set_facecolor("black")
            if name == "generated":
                axis.imshow(cine[k, ..., index].T, **grey, **look)
                fraction = k / max(len(cine) - 1, 1) if fractions is None else fractions[k]
                axis.set_title(f"{fraction:.2f}", color="white", fontsize=13)
                if labels is not None:
                    _outline(axis, _frame_slices(labels, slice_dim)[k, ..., index])
            elif name == "real" and k in truth:
                axis.imshow(truth[k][..., index].T, **grey, **look)
            elif name == "displacement":
                heated = axis.imshow(lengths[k, ..., index].T, **heat, **look)
                _arrows(axis, -vectors[k, right_axis, ..., index] / right, -vectors[k, up_axis, ..., index] / up)
    bar = figure.colorbar(heated, ax=axes[-1])
    bar.set_label("mm", color="white", fontsize=13)
    bar.ax.tick_params(colors="white", labelsize=12)
    bar.outline.set_edgecolor("white")
    figure.suptitle(f"{title}, slice {index}" if title else f"slice {index}", color="white", fontsize=16)
    save_figure(figure, path_or_buffer)


def cine_animation(
    path_or_buffer: PathLike | BinaryIO,
    frames: NdarrayOrTensor,
    real: NdarrayOrTensor | None = None,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    height: int = 240,
    milliseconds: int = 80,
) -> None:
    """Moving picture of a cine as GIF, there and back: the slice that changes most, and beside it a cut across the slices.

    Args:
        path_or_buffer: file to write, or a binary buffer.
        frames: (F, H, W, D).
        real: as many real frames, shown below; of another number, they are left out.
        spacing: size of a voxel along the three axes, in mm.
        height: of a slice, in pixels.
        milliseconds: time that a frame stays.
    """
    slice_dim = slice_axis(frames.shape[1:])
    sizes = [size for axis, size in enumerate(spacing) if axis != slice_dim] + [spacing[slice_dim]]
    rows = [_frame_slices(frames, slice_dim)]
    if real is not None and len(real) == len(frames):
        rows.append(_frame_slices(real, slice_dim))
    change = np.abs(rows[0][-1] - rows[0][0])
    cut, index = int(change.sum(axis=(0, 2)).argmax()), int(change.sum(axis=(0, 1)).argmax())
    low, high = rows[0].min(), np.percentile(rows[0][0], 99.8)
    scale = height / (rows[0].shape[2] * sizes[1])  # pixels a mm

    def panel(pixels: np.ndarray, right: float, up: float) -> np.ndarray:
        grey = ((pixels - low) / max(high - low, 1e-9)).clip(0, 1) * 255
        size = [max(1, round(scale * n * mm)) for n, mm in zip(pixels.shape, (right, up), strict=True)]
        picture = np.asarray(Image.fromarray(grey.round().astype(np.uint8).T[::-1]).resize(size, Image.Resampling.BILINEAR))
        margin = max(height - len(picture), 0)
        return np.pad(picture, ((margin // 2, margin - margin // 2), (0, 8)))[:height]

    def picture(k: int) -> Image.Image:
        lines = [
            np.hstack([panel(cine[k, ..., index], sizes[0], sizes[1]), panel(cine[k, :, cut], sizes[0], sizes[2])])
            for cine in rows
        ]
        return Image.fromarray(np.vstack(lines))

    first, *others = [picture(k) for k in [*range(len(frames)), *range(len(frames) - 2, 0, -1)]]
    first.save(path_or_buffer, format="GIF", save_all=True, append_images=others, duration=milliseconds, loop=0)


def registration_overview(
    path_or_buffer: PathLike | BinaryIO,
    pair: NdarrayOrTensor,
    warped: NdarrayOrTensor,
    displacement: NdarrayOrTensor,
    labels: Mapping[str, NdarrayOrTensor],
    title: str = "",
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    num_rows: int = 3,
) -> None:
    """Overview picture of a registration as PNG, a row a slice, spread over those that move.

    Volumes of different scans have no grey levels in common: each is shown, and subtracted, by its own percentiles, the
    warped one by the moving one's.

    Args:
        path_or_buffer: file to write, or a binary buffer.
        pair: moving and fixed volume (2, H, W, D); the axis with the fewest voxels counts the slices.
        warped: (1, H, W, D), in the unit of ``pair``.
        displacement: (3, H, W, D), in mm along the three axes.
        labels: by name, label maps (1, H, W, D), whose structures are outlined in the warped volume and the fixed one.
        title: heading, such as the name of the case.
        spacing: size of a voxel along the three axes, in mm.
        num_rows: number of slices.
    """
    slice_dim = slice_axis(pair.shape[1:])
    moving, fixed = _frame_slices(pair, slice_dim)
    (made,), vectors = _frame_slices(warped, slice_dim), _frame_slices(displacement, slice_dim)
    length = np.linalg.norm(vectors, axis=0)
    share = np.cumsum(length.sum(axis=(0, 1)))
    chosen = np.unique(np.searchsorted(share, share[-1] * (np.arange(num_rows) + 0.5) / num_rows).clip(0, len(share) - 1))
    lines = dict(zip(labels, ({"colors": color, "linewidths": 1.2} for color in (LABEL_COLOR, MASK_COLOR)), strict=False))
    outlines = [
        (_frame_slices(label, slice_dim)[0] == value, lines[name])
        for name, label in labels.items()
        for value in np.unique(convert_to_numpy(label))
        if value
    ]
    made, moving, fixed = _in_percentiles(made, moving), _in_percentiles(moving, moving), _in_percentiles(fixed, fixed)
    grey, errors = ({"cmap": "gray", "vmin": low, "vmax": 1.1} for low in (0, -1.1))
    panels = [
        Panel("moving", moving, grey),
        Panel("fixed", fixed, grey, outlines),
        Panel("warped", made, grey, outlines),
        Panel("moving - fixed", moving - fixed, errors),
        Panel("warped - fixed", made - fixed, errors),
        Panel("displacement", length, {"cmap": "inferno", "vmin": 0, "vmax": length.max() or 1.0}, bar="mm"),
    ]
    right, up = (size for axis, size in enumerate(spacing) if axis != slice_dim)
    draw_panels(path_or_buffer, panels, chosen, title, lines, (right, up))


def volume_curves(path: PathLike | BinaryIO, curves: Mapping[str, Sequence[float]]) -> None:
    """Volume of the left ventricle along the generated frames as PNG, a line a case.

    Args:
        path: file to write, or a binary buffer.
        curves: volumes in ml, evenly spaced on the way from source to target, by the name of the case.
    """
    figure = Figure(figsize=(8, 5), dpi=100, layout="constrained")
    axis = figure.subplots()
    for name, volumes in curves.items():
        axis.plot(np.linspace(0, 1, len(volumes)), volumes, marker="o", markersize=4, label=name)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("fraction of the way from end-diastole to end-systole", fontsize=13)
    axis.set_ylabel("volume of the left ventricle (ml)", fontsize=13)
    axis.tick_params(labelsize=12)
    axis.grid(alpha=0.3)
    if len(curves) <= 12:
        axis.legend(fontsize=11)
    save_figure(figure, path)


def _frame_slices(cine: NdarrayOrTensor, slice_dim: int) -> np.ndarray:
    """(F, H, W, D) as float32, its slice axis last."""
    return np.moveaxis(convert_to_numpy(cine, dtype=np.float32), slice_dim + 1, -1)


def _matching(real: np.ndarray, count: int) -> dict[int, np.ndarray]:
    """Real frames by the number of the generated frame that they are the truth of."""
    return dict(enumerate(real)) if len(real) == count else {0: real[0], count - 1: real[-1]}


def _in_percentiles(volume: np.ndarray, of: np.ndarray) -> np.ndarray:
    """The volume, the 0.5th and the 99.5th percentile of another brought to 0 and 1."""
    low, high = np.percentile(of, [0.5, 99.5])
    return (volume - low) / max(high - low, 1e-9)


def _arrows(axis: Axes, right: np.ndarray, up: np.ndarray, number: int = 16) -> None:
    """Arrows of a field of vectors (H, W), in voxels and to scale, about ``number`` of them along an axis."""
    step = max(1, max(right.shape) // number)
    x, y = np.mgrid[step // 2 : right.shape[0] : step, step // 2 : right.shape[1] : step]
    axis.quiver(x, y, right[x, y], up[x, y], color="white", angles="xy", scale_units="xy", scale=1, width=0.008)


def _outline(axis: Axes, label: np.ndarray) -> None:
    for value, color in STRUCTURE_COLORS.items():
        area = label.T == value
        if area.any() and not area.all():  # matplotlib warns of a level that is never crossed
            axis.contour(area, levels=[0.5], colors=color, linewidths=1)
