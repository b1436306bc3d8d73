"""Transforms that bring scans to a network's grid, and results back, for the configurations of all kinds of bundles."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from monai import transforms as monai_transforms
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.data.utils import affine_to_spacing
from monai.transforms import (
    Compose,
    GaussianSmooth,
    InvertibleTransform,
    MapTransform,
    Resize,
    ResizeWithPadOrCrop,
    Spacing,
)
from monai.utils import convert_to_tensor

__all__ = ["FitSlicesd", "Spacingd", "without_finer"]


class Spacingd(monai_transforms.Spacingd):
    """MONAI's Spacingd, which sees the images alone, and smooths before it samples more coarsely if told so.

    MONAI's copies what it knows of ``image`` into every item whose key begins with ``image_``, and fails where that is no
    dictionary, as MONAI Label's ``image_path``.

    Args:
        anti_aliasing: smooth the images that are interpolated (not those whose mode is ``nearest``), see
            :func:`without_finer`.
        args: arguments of MONAI's, and ``kwargs``.
    """

    def __init__(self, *args: Any, anti_aliasing: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.anti_aliasing = anti_aliasing

    def __call__(self, data: Mapping[Hashable, Any], lazy: bool | None = None) -> dict[Hashable, Any]:
        images = {key: data[key] for key in self.keys if key in data}
        if self.anti_aliasing:
            for key, mode in self.key_iterator(images, self.mode):
                if mode != "nearest":
                    images[key] = without_finer(images[key], self.spacing_transform.pixdim)
        return {**data, **super().__call__(images, lazy)}


def without_finer(image: MetaTensor, pixdim: Sequence[float]) -> MetaTensor:
    """A volume (C, H, W, D) without what a coarser grid can't show; the width is that of MONAI's and scikit-image's resize.

    Args:
        image: the volume.
        pixdim: spacing of the coarser grid in millimetres along each axis; 0 or less where it stays.
    """
    factors = np.asarray(pixdim) / np.asarray(affine_to_spacing(image.affine, 3))[: len(pixdim)]
    sigma = [max((float(factor) - 1) / 2, 0.0) for factor in factors]
    return GaussianSmooth(sigma)(image) if any(sigma) else image


class FitSlicesd(MapTransform, InvertibleTransform):
    """Bring the slices of a volume (C, H, W, D) to the network's size; the number of slices stays.

    What lies in the network's frame already (``meta["framed"]`` of :class:`scripts.heads.FrameHeadd`) is left as it is. A CT
    in Hounsfield units (``meta["units"]`` of :class:`ScaleIntensityByWindow`) is resampled in the plane to
    ``pixdim`` and then cut or padded. Everything else, pictures and stacks of them, has no
    millimetres to trust: each slice is stretched to the size, and left bit for bit if it has it already. Both smooth
    before they sample more coarsely, or else the noise of a fine grid would stay in full.

    The inverse is on the grid of the input. It reads the way that was taken from the image's trace, which ``Invertd``
    hands to the prediction.

    Args:
        keys: keys of the volumes, scaled to [0, 1], with slices along the last axis.
        spatial_size: height and width of a slice in pixels.
        pixdim: edge of a pixel in millimetres, for CT.
        darkest: grey level that a CT is padded with.
        allow_missing_keys: don't raise an error if a key is missing.
    """

    def __init__(
        self,
        keys: KeysCollection,
        spatial_size: Sequence[int],
        pixdim: float,
        darkest: float = 0.0,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.spatial_size = tuple(spatial_size)
        self.pixdim = pixdim
        size = [*spatial_size, -1]
        self.ways = {
            "millimetres": Compose([Spacing(pixdim=[pixdim, pixdim, -1]), ResizeWithPadOrCrop(size, value=darkest)]),
            "stretched": Compose([Resize(size, mode="trilinear", anti_aliasing=True)]),
        }

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            image = convert_to_tensor(d[key], track_meta=True).clone()  # its trace will be written to
            size = image.shape[1:]
            if image.meta.get("framed"):
                way = "as it is"
            elif image.meta.get("units") == "hounsfield":
                way, image = "millimetres", without_finer(image, [self.pixdim, self.pixdim, -1])
            else:
                way = "as it is" if tuple(size[:2]) == self.spatial_size else "stretched"
            d[key] = self.ways[way](image) if way in self.ways else image
            self.push_transform(d[key], orig_size=size, extra_info={"way": way})
        return d

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            way = self.pop_transform(d[key])["extra_info"]["way"]
            if way in self.ways:
                d[key] = self.ways[way].inverse(d[key])
        return d
