"""Pictures of masks that know where they may be wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import BinaryIO

import numpy as np
from matplotlib.figure import Figure
from monai.config import NdarrayOrTensor, PathLike

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

__all__ = ["overview", "reliability_figure"]

SAMPLE_COLOR = "#ff5a5a"


def overview(
    path_or_buffer: PathLike | BinaryIO,
    image: NdarrayOrTensor,
    mask: NdarrayOrTensor,
    samples: NdarrayOrTensor,
    uncertainty: NdarrayOrTensor,
    label: NdarrayOrTensor | None = None,
    title: str = "",
    channel: int = 0,
    num_rows: int = 5,
    threshold: float = 0.5,
) -> None:
    """Overview picture of one case as PNG, a row a slice, those with the most mask first chosen.

    Args:
        path_or_buffer: file to write, or a binary buffer.
        image: (C, H, W, D) input; the patient's front is up where it is RAS.
        mask: (1, H, W, D), outlined where above 0.
        samples: (n, H, W, D), each outlined where above ``threshold``.
        uncertainty: (1, H, W, D), entropy in bits.
        label: (1, H, W, D), outlined in another colour where above 0.
        title: heading, such as the name of the case.
        channel: channel of ``image`` that is shown.
        num_rows: largest number of rows.
        threshold: probability above which a voxel of a sample is lesion.
    """
    picture = slices_last(image, channel, 2)
    found, entropy = (slices_last(volume, 0, 2) for volume in (mask, uncertainty))
    outlines = {"mask": (found > 0, {"colors": MASK_COLOR, "linewidths": 1.5})}
    if label is not None:  # below the mask and wider, so that both are seen where they agree
        outlines = {"label": (slices_last(label, 0, 2) > 0, {"colors": LABEL_COLOR, "linewidths": 4}), **outlines}
    thin = {"colors": SAMPLE_COLOR, "linewidths": 0.8}
    drawn = [(slices_last(samples, number, 2) > threshold, thin) for number in range(len(samples))]
    grey = grey_scale(picture)
    panels = [
        Panel("input", picture, grey),
        Panel("mask", picture, grey, list(outlines.values())),
        Panel("samples", picture, grey, drawn),
        Panel("uncertainty", entropy, {"cmap": "inferno", "vmin": 0, "vmax": 1}, bar="entropy (bits)"),
    ]
    legend = {name: line for name, (_, line) in outlines.items()} | {"samples": thin}
    draw_panels(path_or_buffer, panels, choose_slices(picture, found > 0, num_rows), title, legend)


def reliability_figure(path_or_buffer: PathLike | BinaryIO, methods: Mapping[str, Sequence[Sequence[float]]]) -> None:
    """How often a voxel with a certain probability is lesion, as PNG, a line a method; the diagonal is calibrated.

    Args:
        path_or_buffer: file to write, or a binary buffer.
        methods: by name, for each bin of probabilities, number of voxels, sum of their probabilities, number of lesion
            voxels.
    """
    figure = Figure(figsize=(6.5, 6), dpi=100, layout="constrained")
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], color="grey", linestyle="--")
    for name, bins in methods.items():
        count, probability, lesion = np.asarray(bins, dtype=float).T
        shown = count > 0
        axis.plot(probability[shown] / count[shown], lesion[shown] / count[shown], marker="o", markersize=4, label=name)
    name_axes(axis, "probability that is said", "share that is lesion")
    axis.legend(fontsize=12)
    save_figure(figure, path_or_buffer)
