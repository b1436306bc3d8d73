"""Reads label maps, and brings them to the grid of their image."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from monai.utils import ensure_tuple
from torch import Tensor

from scripts.data.affines import on_grid_of
from scripts.data.reading import LoadSequencesd
from scripts.transforms import with_meta

__all__ = ["LoadLabelsd"]

ROUNDING = 1e-3  # what a whole number may have lost on its way through a scaled or a floating-point file


class LoadLabelsd(MapTransform):
    """Read label maps, such as masks, onto the grid of an image that was read already and not changed since.

    Whole numbers, of 0 or more, to within 0.001 are rounded. By the affines of both files a label map that is stored with
    other axes, mirrored, or on another grid is brought to that of the image, each voxel taking the nearest label, see
    :func:`scripts.data.affines.on_grid_of`.

    Args:
        keys: keys of the paths, of which all may be missing.
        ref_key: key of the image.
        min_ndim: see :class:`scripts.data.reading.LoadSequencesd`.
        as_volume: see there.

    Raises:
        ValueError: in one line with the file's name and the mend, for what that class refuses, values that are not whole,
            several files for one label map, or a field of view that does not meet that of the image.
    """

    def __init__(
        self, keys: KeysCollection = "label", ref_key: str = "image", min_ndim: int = 3, as_volume: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys=True)
        self.ref_key = ref_key
        self.read = LoadSequencesd(
            keys, ["label"], min_ndim=min_ndim, as_volume=as_volume, allow_empty=True, allow_missing_keys=True
        )

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            paths = ensure_tuple(d[key])
            if len(paths) > 1:
                raise ValueError(f"{' and '.join(map(str, paths))}: two label maps of one case; remove or rename one")
            label = self.read({key: paths[0]})[key]
            d[key] = on_grid_of(with_meta(_whole(label, paths[0]), label), d[self.ref_key], labels=True)
        return d


def _whole(label: MetaTensor, path: object) -> Tensor:
    """The values rounded to whole numbers; refused if they are none."""
    values = label.as_tensor()
    rounded = values.round()
    away = (values - rounded).abs()
    if away.max() > ROUNDING:
        raise ValueError(
            f"{path}: has the value {values.flatten()[away.argmax()]:.6g}, a label map has whole numbers; cut a map of "
            "probabilities at a threshold (such as > 0.5), and save it as uint8"
        )
    if rounded.min() < 0:
        raise ValueError(f"{path}: has the value {rounded.min():g}, labels are 0 or more; save it as uint8")
    return torch.abs(rounded)  # rounding leaves a minus at a zero
