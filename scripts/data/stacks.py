"""Where the slices of a DICOM series lie, and the grid that they make.

Positions are in the patient's coordinates, mm: LPS in DICOM, RAS in MONAI's affines.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage

if TYPE_CHECKING:
    from pydicom import Dataset

__all__ = ["Stack", "normal_of", "numbers_of"]

MOST_DRIFT = 0.5  # pixels that slices may lie beside each other before the gantry is taken for tilted


def numbers_of(header: Dataset, name: str, count: int) -> np.ndarray:
    """Values of an attribute, which pydicom hands on as text where they are no numbers."""
    try:
        values = np.array(header[name].value, dtype=float)
    except (TypeError, ValueError):
        values = np.empty(0)
    if values.shape != (count,) or not np.isfinite(values).all():
        raise ValueError(f"{header.filename}: {name} is not {count} numbers; copy it or export it again")
    return values


def normal_of(header: Dataset) -> np.ndarray:
    """Direction in which the slices follow each other, LPS, of length 1."""
    orientation = numbers_of(header, "ImageOrientationPatient", 6)
    return np.cross(orientation[:3], orientation[3:])


class Stack:
    """The grid of a series: evenly spaced slices along their normal, from the first to the last.

    The spacing is the mean distance of neighbouring slices, as ITK has it, so of a series with a missing slice, or with
    several spacings, slices in between lie elsewhere.

    The slices of a tilted gantry lie beside each other, in steps. Their grid has orthogonal axes all the same, and is as
    large as all of them together; they have to be moved onto it.

    Args:
        slices: headers with ``ImagePositionPatient``, ``ImageOrientationPatient``, ``PixelSpacing``, ``Columns`` and
            ``Rows``, in the order of their places.

    Attributes:
        affine: float64, (4, 4), from array indices (column, row, slice) to RAS, mm; of one slice, the thickness is 1 mm.
        shape: columns, rows and slices of the grid.
        beside: largest distance in their plane by which slices lie beside each other, mm; 0 if they need not be moved.
        unevenness: largest distance of a slice from its place on the grid, mm.

    Raises:
        ValueError: if an attribute has not the numbers that it should have, or slices lie farther beside each other than
            they are wide.
    """

    def __init__(self, slices: Sequence[Dataset]) -> None:
        first, count = slices[0], len(slices)
        axes = numbers_of(first, "ImageOrientationPatient", 6).reshape(2, 3)
        edges = numbers_of(first, "PixelSpacing", 2)[::-1]  # between columns, between rows
        if edges.min() <= 0:
            raise ValueError(f"{first.filename}: PixelSpacing is not above 0; copy it or export it again")
        normal = normal_of(first)
        places = np.array([numbers_of(header, "ImagePositionPatient", 3) for header in slices])
        way = places - places[0]
        self._drift = way @ axes.T / edges  # pixels (column, row) by which each slice lies beside the first one
        size, extent = np.array([first.Columns, first.Rows]), np.ptp(self._drift, axis=0)
        is_tilted = extent.max() > MOST_DRIFT
        self.beside = float(np.linalg.norm(extent * edges)) if is_tilted else 0.0
        if (extent > size).any():
            raise ValueError(
                f"{Path(first.filename).parent}: slices lie {self.beside:.0f} mm beside each other, more than their width; "
                "export the series again, or give each stack a folder of its own"
            )
        self._low, self._high = np.zeros((2, 2), int)
        step = np.linalg.norm(way[-1]) / (count - 1) if count > 1 else 1.0
        if is_tilted:
            step = way[-1] @ normal / (count - 1)
            self._low = np.floor(self._drift.min(axis=0) + 1e-3).astype(int)
            self._high = np.ceil(self._drift.max(axis=0) - 1e-3).astype(int)
        lps = np.eye(4)
        lps[:3, :2], lps[:3, 2] = axes.T * edges, normal * step
        lps[:3, 3] = places[0] + lps[:3, :2] @ self._low
        self.affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ lps
        self.shape = (*(size + self._high - self._low).tolist(), count)
        off = way - np.outer(np.arange(count) * step, normal)
        self.unevenness = float((abs(off @ normal) if is_tilted else np.linalg.norm(off, axis=1)).max())

    def joined(self, voxels: np.ndarray) -> np.ndarray:
        """Voxels (column, row, slice) of the slices on the grid: linear interpolation, around them their lowest level."""
        if not self.beside:
            return voxels
        level = voxels.min()
        room = np.pad(voxels, [*zip(-self._low, self._high, strict=True), (0, 0)], constant_values=level)
        moved = (ndimage.shift(room[..., k], move, order=1, cval=level) for k, move in enumerate(self._drift))
        return np.stack(list(moved), axis=-1)

    def parted(self, mask: np.ndarray) -> np.ndarray:
        """A mask on the grid, (column, row, slice), on the pixels of the slices: nearest neighbours."""
        if not self.beside:
            return mask
        moved = np.stack([ndimage.shift(mask[..., k], -move, order=0) for k, move in enumerate(self._drift)], axis=-1)
        (left, top), (right, bottom) = -self._low, np.array(mask.shape[:2]) - self._high
        return moved[left:right, top:bottom]
