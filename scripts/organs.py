"""What is looked for in one organ alone: transforms for the mask that comes with the scan, and a guess if there is none."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, ResizeWithPadOrCropd
from scipy import ndimage

from scripts.transforms import with_meta

__all__ = [
    "FitFramed",
    "LeaveOutLowContrastd",
    "PickLabelsd",
    "RightPartd",
    "WithinMaskd",
    "likely_organ",
]

logger = logging.getLogger(__name__)

LOST = 0.01  # share of an organ beyond the frame that is told of
SOFT_TISSUE = (0.45, 0.8)  # grey levels, smoothed, of a CT window about as wide as 400 HU


class PickLabelsd(MapTransform):
    """Make masks of label maps: 1 where the value is one of ``data[<key>_values]``, or above 0 if that is empty, else 0.

    Args:
        keys: keys of the label maps (1, H, W, D).
        required: keys, of these, whose mask must not be empty.
        allow_missing_keys: don't raise an error if a key is missing.

    Raises:
        ValueError: with the file's name and the values that it has, if a required mask is empty.
    """

    def __init__(self, keys: KeysCollection, required: KeysCollection = (), allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.required = required

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            labels, values = d[key].as_tensor(), d.get(f"{key}_values") or []
            mask = torch.isin(labels, torch.tensor(values).to(labels)) if values else labels > 0
            if key in self.required and not mask.any():
                wanted = " or ".join(map(str, values)) or "above 0"
                has = ", ".join(f"{value:g}" for value in labels.unique().tolist()[:20])
                name = d[key].meta.get("filename_or_obj", key)
                raise ValueError(
                    f"{name}: no voxel is {wanted}, it has the values {has}; give the mask of the {key}, or leave it out"
                )
            d[key] = with_meta(mask.to(labels), d[key])
        return d


class RightPartd(MapTransform):
    """Keep what a mask has towards the patient's right, such as the head of a pancreas: a share of its width.

    Args:
        keys: keys of the masks (1, H, W, D), whose affine says which way is right.
        share: of the width from the rightmost voxel to the leftmost one, in (0, 1]; 1 keeps the whole.
        allow_missing_keys: don't raise an error if a key is missing.

    Raises:
        ValueError: if the share does not lie in (0, 1].
    """

    def __init__(self, keys: KeysCollection, share: float = 1.0, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        if not 0 < share <= 1:
            raise ValueError(f"share must lie in (0, 1], got {share}")
        self.share = share

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            mask = d[key].as_tensor() > 0
            towards_right = d[key].affine[0, :3].to(mask.device)  # of the world's axes the first goes to the right
            places = sum(
                torch.arange(size, device=mask.device, dtype=torch.float64).reshape(-1, *[1] * (2 - axis)) * step
                for axis, (size, step) in enumerate(zip(mask.shape[1:], towards_right, strict=True))
            ).expand(mask.shape[1:])[None]
            if mask.any():
                left, right = places[mask].min(), places[mask].max()
                mask = mask & (places >= right - self.share * (right - left))
            d[key] = with_meta(mask.to(d[key].dtype), d[key])
        return d


class WithinMaskd(MapTransform):
    """Keep images within a mask; beyond it they become another image, or 0.

    Args:
        keys: keys of the images (C, H, W, D), on the grid of the mask.
        mask_key: key of the mask (1, H, W, D).
        beyond_key: key of the image (C, H, W, D) that takes the place beyond the mask; None for 0.
        allow_missing_keys: don't raise an error if a key is missing.
    """

    def __init__(
        self, keys: KeysCollection, mask_key: str, beyond_key: str | None = None, allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.mask_key, self.beyond_key = mask_key, beyond_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            image, mask = d[key].as_tensor(), d[self.mask_key].as_tensor().to(d[key].device) > 0
            beyond = torch.zeros_like(image) if self.beyond_key is None else d[self.beyond_key].as_tensor().to(image)
            d[key] = with_meta(torch.where(mask, image, beyond), d[key])
        return d


class FitFramed(ResizeWithPadOrCropd):
    """Pad or cut about the middle to the network's frame; a warning says how much of the organ lies beyond it, unseen.

    Args:
        keys: keys of the images (C, H, W, D), that of the organ's mask among them.
        spatial_size: voxels along the three axes; -1 keeps an axis as it is.
        organ_key: key of the organ's mask (1, H, W, D).
        kwargs: other arguments of MONAI's ``ResizeWithPadOrCropd``.
    """

    def __init__(self, keys: KeysCollection, spatial_size: Sequence[int], organ_key: str = "organ", **kwargs: Any) -> None:
        super().__init__(keys, spatial_size, **kwargs)
        self.organ_key = organ_key

    def __call__(self, data: Mapping[Hashable, Any], lazy: bool | None = None) -> dict[Hashable, Any]:
        before = data[self.organ_key]
        d = super().__call__(data, lazy)
        lost = 1 - float((d[self.organ_key] > 0).sum() / (before > 0).sum().clamp(min=1))
        if lost > LOST:
            name = before.meta.get("filename_or_obj", self.organ_key)
            logger.warning(
                f"{name}: {lost:.0%} of the organ lies beyond the network's frame, where nothing is looked for; a larger "
                "--spatial_size (multiples of 32) or a coarser --pixdim takes it in"
            )
        return d


class LeaveOutLowContrastd(MapTransform):
    """Make ambiguous, by a mask of a single voxel, the slices in which what is looked for hardly differs from the organ.

    :class:`scripts.data.slices.ExtractSlicesd` leaves such slices out of a training, as Babaei et al. 2024 do.

    Args:
        keys: keys of the masks (1, H, W, D).
        image_key: key of the image (1, H, W, D).
        organ_key: key of the mask of the organ.
        min_contrast: least difference of the mean grey level, in the image's unit, from that of the rest of the organ in
            the slice; 0 leaves everything as it is.
        allow_missing_keys: don't raise an error if a key is missing.
    """

    def __init__(
        self,
        keys: KeysCollection,
        image_key: str = "image",
        organ_key: str = "organ",
        min_contrast: float = 0.0,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.image_key, self.organ_key, self.min_contrast = image_key, organ_key, min_contrast

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d) if self.min_contrast else ():
            mask, organ, image = (d[name].as_tensor() for name in (key, self.organ_key, self.image_key))
            mask = mask.clone()
            for k in range(mask.shape[-1]):
                sought = mask[..., k] > 0
                rest = (organ[..., k] > 0) & ~sought
                means = [image[..., k][part].mean() for part in (sought, rest) if part.any()]
                if sought.any() and (len(means) < 2 or (means[0] - means[1]).abs() < self.min_contrast):
                    first = tuple(sought.nonzero()[0].tolist())
                    mask[..., k] = 0
                    mask[..., k][first] = 1
            d[key] = with_meta(mask, d[key])
        return d


def likely_organ(image: np.ndarray, spread: float = 0.09) -> np.ndarray:
    """Where the organ in the middle of a box lies, if there is no mask: connected tissue of the commonest grey level.

    That is looked for among the levels of soft tissue, and counts more in the middle. Of what is as grey, the largest part
    is taken, whose area counts more in the middle, too; its clefts and holes are filled. In boxes cut round the pancreas it
    mostly is the pancreas, else the bowel, the stomach or the spleen beside it.

    Args:
        image: slice (H, W) in [0, 1], a CT window about as wide as 400 HU; 0 round the box.
        spread: how far the organ's grey levels, smoothed, lie from the commonest.

    Returns:
        bool (H, W); empty if there is no soft tissue.
    """
    box = ndimage.binary_closing(image > 0, iterations=2)
    smooth = ndimage.gaussian_filter(image, 1.5)
    inner = ndimage.binary_erosion(box, iterations=2)
    tissue = inner & (smooth > SOFT_TISSUE[0]) & (smooth < SOFT_TISSUE[1])
    if not tissue.any():
        return tissue
    shown = np.argwhere(box)
    low, high = shown.min(axis=0)[:, None, None], shown.max(axis=0)[:, None, None]
    away = (np.indices(image.shape) - (low + high) / 2) / (0.35 * (high - low + 1))
    central = np.exp(-(away**2).sum(axis=0))
    counts, ends = np.histogram(smooth[tissue], bins=35, range=SOFT_TISSUE, weights=central[tissue])
    commonest = ends[ndimage.gaussian_filter1d(counts, 2).argmax()] + (ends[1] - ends[0]) / 2
    parts, number = ndimage.label(ndimage.binary_opening(inner & (np.abs(smooth - commonest) < spread), iterations=2))
    if not number:
        return np.zeros_like(tissue)
    organ = parts == 1 + np.argmax(ndimage.sum(central, parts, range(1, number + 1)))
    organ = ndimage.binary_closing(np.pad(organ, 3), iterations=3)[3:-3, 3:-3]
    return ndimage.binary_fill_holes(ndimage.binary_dilation(organ)) & box
