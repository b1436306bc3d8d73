"""Finds the head in pictures of a CT, and brings it to the frame that a network was trained on.

A CT in Hounsfield units has millimetres and a scale of grey levels to trust. A picture has neither: its head may have any
size, place and window. What is the same in all of them is the head itself.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import GaussianSmooth, InvertibleTransform, MapTransform, SpatialResample
from monai.utils import convert_to_numpy, convert_to_tensor
from scipy import ndimage
from skimage.measure import label, regionprops

from scripts.transforms import with_meta

__all__ = ["FrameHeadd", "find_head", "head_mask"]

logger = logging.getLogger(__name__)

MOST_TURNED = np.pi / 6  # a head that seems turned by more is round, or no head
IN_PLANE = ndimage.generate_binary_structure(2, 1)[None]  # neighbours within a slice
OVAL = 1.08  # least ratio of length to width at which the long axis is the head's


def head_mask(slice_: np.ndarray) -> np.ndarray:
    """Where the head is in a picture: the largest bright component, filled.

    Args:
        slice_: (H, W), grey levels in [0, 1], bone being bright.

    Returns:
        bool (H, W); empty where nothing stands out of the background, which is what the picture's edge mostly shows.
    """
    edge = np.concatenate([slice_[0], slice_[-1], slice_[:, 0], slice_[:, -1]])
    mask = _largest(slice_ > max(0.12, float(np.median(edge)) + 0.08))
    reach = max(1, min(slice_.shape) // 64)
    mask = ndimage.binary_fill_holes(ndimage.binary_closing(np.pad(mask, 4 * reach), iterations=4 * reach))
    mask = mask[4 * reach : -4 * reach, 4 * reach : -4 * reach]
    return _largest(ndimage.binary_opening(mask, iterations=reach))


def _largest(mask: np.ndarray) -> np.ndarray:
    parts = label(mask, connectivity=1)
    return parts == np.bincount(parts.flat)[1:].argmax() + 1 if parts.any() else mask


@dataclass(frozen=True)
class Head:
    """Where a head is in a picture.

    Args:
        centre: of its box, in pixels.
        angle: from the picture's first axis to its long axis, in radians.
        height: along its long axis, in pixels.
    """

    centre: tuple[float, float]
    angle: float
    height: float


def find_head(mask: np.ndarray) -> Head:
    """The box of a head along its long axis, which is that of the second moments.

    Args:
        mask: (H, W), not empty.
    """
    region = regionprops(mask.astype(np.uint8))[0]
    oval = region.axis_major_length > OVAL * region.axis_minor_length
    angle = region.orientation if oval and abs(region.orientation) < MOST_TURNED else 0.0
    middle = np.array(region.centroid)
    turn = _turn(angle)
    along = (region.coords - middle) @ turn
    low, high = along.min(axis=0), along.max(axis=0)
    return Head(tuple(middle + turn @ ((low + high) / 2)), angle, float(high[0] - low[0] + 1))


def _turn(angle: float) -> np.ndarray:
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


class FrameHeadd(MapTransform, InvertibleTransform):
    """Bring the head in pictures (``meta["units"]`` is ``grey``) to the place, size and grey levels of the training's.

    All slices of a stack are moved alike, by the head of the slice that shows most of it: turned upright, its height made
    ``height``, its box put into the middle. Around the head, where tables and burnt-in text are, is air. Grey levels are
    scaled linearly so that the background becomes ``air`` and the median of the soft tissue ``tissue``; ``meta`` of the
    result says how they come back (``intensity_scale``, ``intensity_offset``, and ``intensity_lowest``, which is air, beyond
    the frame too). Pictures that have the network's size already are left as they are, and so are those in which no head is
    found, with a warning that names the file.

    The inverse brings back the grid, not the grey levels, see :class:`scripts.transforms.ScaleIntensityByForeground`.

    Args:
        keys: keys of the pictures (C, H, W, D), scaled to [0, 1], upright.
        spatial_size: height and width of the network's slices.
        height: of the head along its long axis, in pixels of the network; 0 leaves everything as it is.
        air: grey level of the background.
        tissue: grey level of the soft tissue.
        allow_missing_keys: don't raise an error if a key is missing.
    """

    def __init__(
        self,
        keys: KeysCollection,
        spatial_size: Sequence[int],
        height: float = 45.0,
        air: float = 0.098,
        tissue: float = 0.49,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.spatial_size, self.height, self.air, self.tissue = tuple(spatial_size), height, air, tissue
        self.resample = SpatialResample(padding_mode="zeros")

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            image = convert_to_tensor(d[key], track_meta=True).clone()  # its trace will be written to
            size, framed = image.shape[1:], False
            if self.height and image.meta.get("units") == "grey" and tuple(size[:2]) != self.spatial_size:
                slices = image[0].numpy().transpose(2, 0, 1)
                masks = np.stack([head_mask(slice_) for slice_ in slices])
                largest = masks.sum(axis=(1, 2)).argmax()
                framed = bool(masks[largest].any())
                if framed:
                    head = find_head(masks[largest])
                    image = self._moved(self._scaled(image, slices[largest], masks[largest], masks, head), head)
                else:
                    name = image.meta.get("filename_or_obj", "image")
                    logger.warning(f"{name}: no head is found, the whole picture is taken for one")
            d[key] = image
            self.push_transform(d[key], orig_size=size, extra_info={"framed": framed})
        return d

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            if self.pop_transform(d[key])["extra_info"]["framed"]:
                d[key] = self.resample.inverse(d[key])
        return d

    def _scaled(self, image: MetaTensor, largest: np.ndarray, mask: np.ndarray, masks: np.ndarray, head: Head) -> MetaTensor:
        """The image with air around its heads and the training's grey levels, smoothed for the coarser grid."""
        background = float(np.median(largest[~mask])) if not mask.all() else 0.0
        inside = largest[ndimage.binary_erosion(mask, iterations=max(1, round(0.08 * head.height)))]
        soft = inside[(inside > background + 0.08) & (inside < 0.9)]
        factor = (self.tissue - self.air) / (float(np.median(soft)) - background) if len(soft) else 1.0
        scaled = (self.air + factor * (image.as_tensor() - background)).clamp(self.air, 1)
        around = torch.from_numpy(ndimage.binary_dilation(masks, IN_PLANE, iterations=2)).permute(1, 2, 0)
        scaled = torch.where(around, scaled, self.air)
        sigma = max((head.height / self.height - 1) / 2, 0.0)
        scales, offsets = image.meta["intensity_scale"], image.meta["intensity_offset"]
        back = background - self.air / factor  # what a scaled value of 0 was
        smooth = GaussianSmooth([sigma, sigma, 0.0])(scaled - self.air)  # beyond its edge the filter takes zero
        return with_meta(
            convert_to_tensor(smooth, track_meta=False) + self.air,
            like=image,
            intensity_lowest=self.air,
            intensity_scale=[scale / factor for scale in scales],
            intensity_offset=[offset + scale * back for scale, offset in zip(scales, offsets, strict=True)],
        )

    def _moved(self, image: MetaTensor, head: Head) -> MetaTensor:
        """The image on the network's grid."""
        matrix = np.eye(4)  # from pixels of the network's grid to those of the picture
        matrix[:2, :2] = _turn(head.angle) * head.height / self.height
        matrix[:2, 3] = np.array(head.centre) - matrix[:2, :2] @ (np.array(self.spatial_size) - 1) / 2
        target = convert_to_numpy(image.affine) @ matrix
        # what lies beyond the picture is zero to the resampling, so that the air has to be
        moved = self.resample(image - self.air, dst_affine=target, spatial_size=(*self.spatial_size, image.shape[-1]))
        return moved + self.air
