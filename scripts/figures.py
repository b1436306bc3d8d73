"""Pictures: the overview of a case and of a cine, a moving picture, a sheet of images, the curves of the evaluations.

Every figure is a ``matplotlib.figure.Figure`` of its own (no pyplot, whose state is shared between threads), and the
same input gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import BinaryIO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from monai.config import NdarrayOrTensor, PathLike
from monai.utils import convert_to_numpy
from PIL import Image

__all__ = [
    "cine_animation",
    "cine_overview",
    "contact_sheet",
    "contrast_figure",
    "guidance_table_figure",
    "overview",
    "schedule_figure",
    "volume_curves",
]

MASK_COLOR, LABEL_COLOR = "#ffd400", "#00b4ff"
STRUCTURE_COLORS = {1: "#00b4ff", 2: "#57d14b", 3: "#ff5050"}  # right ventricle, myocardium, left ventricle


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
    """
    picture, restored = (_slices_last(volume, channel, slice_dim) for volume in (image, healthy))
    anomaly, found = (_slices_last(volume, 0, slice_dim) for volume in (anomaly_map, mask))
    outlines = [(found > 0, columns[3], {"colors": MASK_COLOR, "linewidths": 1.5})]
    if label is not None:  # below the mask and wider, so that both are seen where they agree
        outlines.insert(0, (_slices_last(label, 0, slice_dim) > 0, "label", {"colors": LABEL_COLOR, "linewidths": 4}))

    chosen = _choose_slices(picture, found > 0, num_rows) if slices is None else np.asarray(slices)
    # a few bright voxels (vessels, noise) would darken all the rest
    grey = {"cmap": "gray", "vmin": picture.min(), "vmax": np.percentile(picture, 99.8)}
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
    _save(figure, path_or_buffer)


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
        images: (N, 1, H, W) in [0, 1]; as in :class:`scripts.transforms.LoadSequencesd` the first axis runs to the right and
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
    _save(figure, path_or_buffer, text)


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
        _label(axis, "gradient scale", name)
    axis.legend(title="noise level", fontsize=12, title_fontsize=12)
    _save(figure, path)


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
    _label(axis, "difference in grey level between the sprite and what it covers", "largest Dice")
    axis.legend(fontsize=12)
    _save(figure, path)


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
    _label(axis, "time t", "gamma(t) = -log SNR")
    axis.legend(fontsize=12)
    _save(figure, path)


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
    slice_dim = _slice_axis(frames.shape[1:])
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
    _save(figure, path_or_buffer)


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
    slice_dim = _slice_axis(frames.shape[1:])
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
    _save(figure, path)


def _slice_axis(shape: Sequence[int]) -> int:
    """The axis with the fewest voxels, of several the last."""
    return 2 - int(np.argmin(tuple(shape)[::-1]))


def _frame_slices(cine: NdarrayOrTensor, slice_dim: int) -> np.ndarray:
    """(F, H, W, D) as float32, its slice axis last."""
    return np.moveaxis(convert_to_numpy(cine, dtype=np.float32), slice_dim + 1, -1)


def _matching(real: np.ndarray, count: int) -> dict[int, np.ndarray]:
    """Real frames by the number of the generated frame that they are the truth of."""
    return dict(enumerate(real)) if len(real) == count else {0: real[0], count - 1: real[-1]}


def _outline(axis: Axes, label: np.ndarray) -> None:
    for value, color in STRUCTURE_COLORS.items():
        area = label.T == value
        if area.any() and not area.all():  # matplotlib warns of a level that is never crossed
            axis.contour(area, levels=[0.5], colors=color, linewidths=1)


def _arrows(axis: Axes, right: np.ndarray, up: np.ndarray, number: int = 16) -> None:
    """Arrows of a field of vectors (H, W), in voxels and to scale, about ``number`` of them along an axis."""
    step = max(1, max(right.shape) // number)
    x, y = np.mgrid[step // 2 : right.shape[0] : step, step // 2 : right.shape[1] : step]
    axis.quiver(x, y, right[x, y], up[x, y], color="white", angles="xy", scale_units="xy", scale=1, width=0.008)


def _slices_last(volume: NdarrayOrTensor, channel: int, slice_dim: int) -> np.ndarray:
    """(C, H, W, D) to one channel as float32, its slice axis last."""
    return np.moveaxis(convert_to_numpy(volume, dtype=np.float32)[channel], slice_dim, -1)


def _choose_slices(picture: np.ndarray, found: np.ndarray, number: int) -> np.ndarray:
    """Rising indices of at most ``number`` slices of (H, W, D): most mask pixels first, then spread over the object."""
    area = found.sum(axis=(0, 1))
    chosen = np.argsort(-area, kind="stable")[:number]
    chosen = chosen[area[chosen] > 0]
    filled = np.flatnonzero(picture.max(axis=(0, 1)) > picture.min(axis=(0, 1)))
    others = np.setdiff1d(filled if filled.size else np.arange(area.size), chosen)
    missing = min(number - len(chosen), len(others))
    spread = others[((np.arange(missing) + 0.5) / max(missing, 1) * len(others)).astype(int)]
    return np.sort(np.concatenate([chosen, spread]))


def _label(axis: Axes, x: str, y: str) -> None:
    """Name the axes of a plot, and draw its grid."""
    axis.set_xlabel(x, fontsize=13)
    axis.set_ylabel(y, fontsize=13)
    axis.tick_params(labelsize=12)
    axis.grid(alpha=0.3)


def _save(figure: Figure, path_or_buffer: PathLike | BinaryIO, text: Mapping[str, str] | None = None) -> None:
    # without the version of matplotlib, which would make the bytes depend on it
    text = {"Software": None, **(text or {})}
    figure.savefig(path_or_buffer, format="png", facecolor=figure.get_facecolor(), metadata=text)
