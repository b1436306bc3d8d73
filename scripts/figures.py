"""What all pictures share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import BinaryIO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from monai.config import NdarrayOrTensor, PathLike
from monai.utils import convert_to_numpy

__all__ = ["LABEL_COLOR", "MASK_COLOR", "choose_slices", "name_axes", "save_figure", "slices_last"]

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
