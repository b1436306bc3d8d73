"""Finds the head in pictures and volumes of CT, and brings it to the frame that a network was trained on.

A picture has no millimetres, and its head may have any size, place and window; in a volume it may lie turned and out of the
middle. What is the same in all of them is the head itself.
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
from skimage.measure import label

from scripts.transforms import with_meta

__all__ = ["FrameHeadd", "find_head", "head_mask", "median_head", "mirrored"]

logger = logging.getLogger(__name__)

MOST_TURNED = np.pi / 6  # further no head is turned
ANGLES = 30  # on either side that are tried
UPRIGHT = 0.02  # of the mean difference of the sides, which a head must be more alike by to be turned by that much
NEARLY = 0.8  # of the largest area of a head in a stack
MOST_SLICES = 15  # of a stack that its head is measured on
IN_PLANE = ndimage.generate_binary_structure(2, 1)[None]  # neighbours within a slice


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
        centre: of its box, row and column.
        angle: from the picture's vertical to its long axis, in radians.
        height: along its long axis, in pixels.
    """

    centre: tuple[float, float]
    angle: float
    height: float


def find_head(mask: np.ndarray, slice_: np.ndarray) -> Head:
    """The box of a head along its axis of symmetry.

    Args:
        mask: (rows, columns), not empty, nose or back of the head up.
        slice_: the same slice, grey levels in [0, 1].
    """
    middle = np.array(ndimage.center_of_mass(mask))
    angle = symmetry_angle(mask, slice_)
    turn = _turn(angle)
    along = (np.argwhere(mask) - middle) @ turn
    low, high = along.min(axis=0), along.max(axis=0)
    return Head(tuple(middle + turn @ ((low + high) / 2)), angle, float(high[0] - low[0] + 1))


def symmetry_angle(mask: np.ndarray, slice_: np.ndarray) -> float:
    """How far the axis on both sides of which a head is most alike is turned from the vertical, in radians.

    The sides of a coarse copy are compared about the centre of mass, at angles up to ``MOST_TURNED``; a head that hardly
    has sides, as a round one of one grey level, counts as upright.

    Args:
        mask: (rows, columns), not empty.
        slice_: grey levels in [0, 1].
    """
    middle, radius = np.array(ndimage.center_of_mass(mask)), np.sqrt(mask.sum() / np.pi)
    step, half = radius / 20, 32
    image = ndimage.gaussian_filter(np.where(mask, slice_, 0.0).astype(np.float32), step / 2)
    grid = np.mgrid[-half : half + 1, -half : half + 1].reshape(2, -1) * step
    angles = np.arange(-ANGLES, ANGLES + 1) * (MOST_TURNED / ANGLES)
    unlike = []
    for angle in angles:
        turned = ndimage.map_coordinates(image, _turn(angle) @ grid + middle[:, None], order=1, prefilter=False)
        turned = turned.reshape(2 * half + 1, -1)
        unlike.append(np.abs(turned - turned[:, ::-1]).mean())
    unlike = np.array(unlike) + UPRIGHT * np.mean(unlike) * np.abs(angles) / MOST_TURNED
    return float(angles[np.argmin(unlike)])


def mirrored(slice_: np.ndarray, head: Head) -> np.ndarray:
    """A slice (rows, columns) with the sides of its head exchanged."""
    flip = _turn(head.angle) @ np.diag([1.0, -1.0]) @ _turn(-head.angle)
    middle = np.array(head.centre)
    return ndimage.affine_transform(slice_, flip, middle - flip @ middle, order=1, mode="nearest")


def median_head(masks: np.ndarray, slices: np.ndarray) -> Head:
    """The head of a stack, by the median over the slices that show nearly as much of it as the fullest one.

    Args:
        masks: (D, rows, columns), not all empty.
        slices: the same, grey levels in [0, 1].
    """
    areas = masks.sum(axis=(1, 2))
    full = np.flatnonzero(areas >= NEARLY * areas.max())
    heads = [find_head(masks[i], slices[i]) for i in full[:: -(-len(full) // MOST_SLICES)]]
    centre = np.median([head.centre for head in heads], axis=0)
    angle, height = (float(np.median([getattr(head, name) for head in heads])) for name in ("angle", "height"))
    return Head((float(centre[0]), float(centre[1])), angle, height)


def _turn(angle: float) -> np.ndarray:
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


class FrameHeadd(MapTransform, InvertibleTransform):
    """Bring the head in pictures and CT volumes to the place, size and grey levels of the training's.

    All slices of a stack are moved alike, by the median head of the slices that show nearly as much of it as the fullest
    one: turned upright by its axis of symmetry, its height made ``height``, its box put into the middle. Around the heads,
    where tables and burnt-in text are, is air. Grey levels are scaled linearly so that the background becomes ``air`` and
    the median of the soft tissue ``tissue``. ``meta`` of the result says how they come back (``intensity_scale``,
    ``intensity_offset``, and ``intensity_lowest``, which is air, beyond the frame too), and that the frame is the network's
    (``framed``). Grey pictures that have the network's size already are left as they are, and so is what shows no head,
    with a warning that names the file.

    The inverse brings back the grid, not the grey levels, see :class:`scripts.transforms.ScaleIntensityByForeground`.

    Args:
        keys: keys of the slices (C, W, H, D), scaled to [0, 1]: columns first, as pictures and volumes in LPS are, with
            the nose or the back of the head up.
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
            as_trained = image.meta.get("units") == "grey" and tuple(size[:2]) == self.spatial_size
            if self.height and not as_trained:
                slices = image[0].numpy().transpose(2, 1, 0)
                masks = np.stack([head_mask(slice_) for slice_ in slices])
                framed = bool(masks.any())
                if framed:
                    head, largest = median_head(masks, slices), masks.sum(axis=(1, 2)).argmax()
                    image = self._moved(self._scaled(image, slices[largest], masks[largest], masks, head), head)
                else:
                    name = image.meta.get("filename_or_obj", "image")
                    logger.warning(f"{name}: no head is found, {self._unframed(image)}")
            d[key] = image
            self.push_transform(d[key], orig_size=size, extra_info={"framed": framed})
        return d

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            if self.pop_transform(d[key])["extra_info"]["framed"]:
                d[key] = self.resample.inverse(d[key])
        return d

    @staticmethod
    def _unframed(image: MetaTensor) -> str:
        if image.meta.get("units") == "hounsfield":
            return "the middle of its slices is taken as it is: is this a head, and are its values Hounsfield units?"
        return "the whole picture is taken for one"

    def _scaled(self, image: MetaTensor, largest: np.ndarray, mask: np.ndarray, masks: np.ndarray, head: Head) -> MetaTensor:
        """The image with air around its heads and the training's grey levels, smoothed for the coarser grid."""
        background = float(np.median(largest[~mask])) if not mask.all() else 0.0
        inside = largest[ndimage.binary_erosion(mask, iterations=max(1, round(0.08 * head.height)))]
        soft = inside[(inside > background + 0.08) & (inside < 0.9)]
        factor = (self.tissue - self.air) / (float(np.median(soft)) - background) if len(soft) else 1.0
        scaled = (self.air + factor * (image.as_tensor() - background)).clamp(self.air, 1)
        around = torch.from_numpy(ndimage.binary_dilation(masks, IN_PLANE, iterations=2)).permute(2, 1, 0)
        scaled = torch.where(around, scaled, self.air)
        sigma = max((head.height / self.height - 1) / 2, 0.0)
        scales, offsets = image.meta["intensity_scale"], image.meta["intensity_offset"]
        back = background - self.air / factor  # what a scaled value of 0 was
        smooth = GaussianSmooth([sigma, sigma, 0.0])(scaled - self.air)  # beyond its edge the filter takes zero
        return with_meta(
            convert_to_tensor(smooth, track_meta=False) + self.air,
            like=image,
            framed=True,
            intensity_lowest=self.air,
            intensity_scale=[scale / factor for scale in scales],
            intensity_offset=[offset + scale * back for scale, offset in zip(scales, offsets, strict=True)],
        )

    def _moved(self, image: MetaTensor, head: Head) -> MetaTensor:
        """The image on the network's grid."""
        turned = _turn(head.angle) * head.height / self.height  # from rows and columns of the network to the picture's
        middle = (np.array(self.spatial_size[::-1]) - 1) / 2
        matrix = np.eye(4)
        matrix[:2, :2] = turned[::-1, ::-1]  # columns are the first axis
        matrix[:2, 3] = (np.array(head.centre) - turned @ middle)[::-1]
        target = convert_to_numpy(image.affine) @ matrix
        # what lies beyond the picture is zero to the resampling, so that the air has to be
        moved = self.resample(image - self.air, dst_affine=target, spatial_size=(*self.spatial_size, image.shape[-1]))
        return moved + self.air
