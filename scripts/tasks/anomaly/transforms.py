"""Transforms of the anomaly bundles alone: backgrounds, lesions, sprites, sequences that stand in, stripped heads."""

from __future__ import annotations

import math
import os
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.data import MetaTensor
from monai.data.utils import affine_to_spacing
from monai.transforms import GaussianSmooth, LoadImage, MapTransform, RandomizableTransform, Transform
from monai.utils import convert_to_dst_type, convert_to_numpy, convert_to_tensor
from scipy import ndimage
from skimage.filters import threshold_otsu
from torch import Tensor

from scripts.brains import brain_mask, brain_masks
from scripts.transforms import ScaleIntensityByForeground, with_meta

__all__ = [
    "KeepBraind",
    "RandSkullStripd",
    "RandSprited",
    "RandStandInd",
    "RemoveSmallLesions",
    "RemoveSmallLesionsd",
    "ShiftBackground",
    "ShiftBackgroundd",
    "SmoothAcrossSlicesd",
    "cohort_otsu",
]

# Inside or not, for coordinates in units of the radius; ``aspect`` is the short axis of the ellipse. The factor 1.2
# keeps the heart within about the radius.
SPRITES = {
    "square": lambda x, y, aspect: np.maximum(abs(x), abs(y)) <= 1,
    "ellipse": lambda x, y, aspect: x**2 + (y / aspect) ** 2 <= 1,
    "heart": lambda x, y, aspect: ((1.2 * x) ** 2 + (1.2 * y) ** 2 - 1) ** 3 <= (1.2 * x) ** 2 * (1.2 * y) ** 3,
}


def cohort_otsu(directory: str | os.PathLike, pattern: str = "*/*_map.nii.gz") -> float:
    """Otsu's threshold of the positive values of all saved maps together, for :class:`MapToMask`.

    The maps are read one after the other, twice (range, then one pooled histogram), so that memory does not grow with
    their number.

    Args:
        directory: folder with the results.
        pattern: which files below it are maps.

    Returns:
        the threshold, in the unit of the maps.

    Raises:
        ValueError: if there is no map, or no map has a positive value.
    """
    paths = sorted(Path(directory).glob(pattern))
    if not paths:
        raise ValueError(f"{directory}: no map like {pattern}; give the folder that inference has written.")
    load = LoadImage(image_only=True)
    top = max(float(load(path).max()) for path in paths)
    if top <= 0:
        raise ValueError(f"{directory}: no map has a positive value, so no threshold parts them.")
    edges = np.linspace(0, top, 4097)
    counts = np.zeros(len(edges) - 1)
    for path in paths:
        values = convert_to_numpy(load(path))
        counts += np.histogram(values[values > 0], edges)[0]
    return float(threshold_otsu(hist=(counts, (edges[:-1] + edges[1:]) / 2)))


class RemoveSmallLesions(Transform):
    """Remove the connected components of a mask (joined by faces) that are smaller than a volume.

    Unlike MONAI's ``RemoveSmallObjects``, which multiplies the voxel's edges, this takes the determinant of the affine,
    so that volumes are right on a sheared grid too, such as head CT with a tilted gantry.

    Args:
        min_volume: least volume in millilitres; 0 changes nothing.
    """

    def __init__(self, min_volume: float) -> None:
        self.min_volume = min_volume

    def __call__(self, img: NdarrayOrTensor) -> MetaTensor:
        """
        Args:
            img: mask (1, H, W, D), 0 is background; its affine is in millimetres.

        Returns:
            same shape, type and meta data.
        """
        mask = convert_to_tensor(img, track_meta=True)
        voxel_volume = abs(float(torch.linalg.det(mask.affine[:3, :3]))) / 1000
        components, _ = ndimage.label(convert_to_numpy(mask))
        volumes = np.bincount(components.ravel()) * voxel_volume
        # background is component 0, where the mask is zero anyway; the tolerance is for rounding
        keep = volumes >= self.min_volume * (1 - 1e-6)
        return mask * convert_to_dst_type(keep[components], mask)[0]


class RemoveSmallLesionsd(MapTransform):
    """Dictionary form of :class:`RemoveSmallLesions`.

    Args:
        keys: keys of the masks.
        min_volume: least volume in millilitres.
        allow_missing_keys: don't raise an error if a key is missing.
    """

    def __init__(self, keys: KeysCollection, min_volume: float, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.remover = RemoveSmallLesions(min_volume)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = self.remover(d[key])
        return d


class ShiftBackground(Transform):
    """Shift MRI with negative grey levels, such as z-scored scans, so that its background is 0.

    The background is the value that many voxels share. If it is the least one, as where a whole scan was z-scored, it
    becomes 0. If it lies between the others, as where only the brain was z-scored, the least of the others becomes 0 too.
    Where no value is shared, the corners must be among the lowest. What remains below 0 is set to 0.
    ``meta["intensity_offset"]`` is a list with one number a channel, which
    :class:`scripts.transforms.RestoreIntensityd` adds.

    A channel whose negative values are few or small, as resampling makes them, stays as it is.

    Raises:
        ValueError: with the file's name, where the background can't be told.
    """

    least_share = 0.05  # of the voxels that share a value, to be a background
    percentiles = 0.1, 99.9  # what counts as the least and the largest value

    def __call__(self, img: NdarrayOrTensor) -> MetaTensor:
        """
        Args:
            img: volume (C, H, W, D), any unit.

        Returns:
            same shape; float32, 0 or more in the channels that were shifted.
        """
        image = convert_to_tensor(img, dtype=torch.float32, track_meta=True)
        channels, offsets = [], []
        for number, channel in enumerate(image.as_tensor()):
            low, high = np.percentile(convert_to_numpy(channel), self.percentiles)
            if low >= -0.02 * max(high, 0):
                channels.append(channel)
                offsets.append(0.0)
                continue
            shown, offset = self._foreground(channel, low, high)
            if offset is None:
                raise ValueError(
                    f"{image.meta.get('filename_or_obj', 'image')}: negative grey levels in sequence {number + 1}, and no "
                    "background among the lowest; give the scan as the scanner made it, or with a constant background."
                )
            channels.append(torch.where(shown, (channel - offset).clamp(min=0), 0.0))
            offsets.append(offset)
        return with_meta(torch.stack(channels), like=image, intensity_offset=offsets) if any(offsets) else image

    def _foreground(self, channel: Tensor, low: float, high: float) -> tuple[Tensor, float | None]:
        """What is no background, bool, and the value that becomes 0."""
        values, counts = channel.unique(return_counts=True)
        if counts.max() >= self.least_share * channel.numel():
            background = float(values[counts.argmax()])
            shown = channel != background
            return shown, min(background, float(np.percentile(convert_to_numpy(channel[shown]), self.percentiles[0])))
        corners = torch.stack([channel[h, w] for h in (0, -1) for w in (0, -1)])
        lowest = float(corners.median()) <= low + (high - low) / 5
        return torch.ones_like(channel, dtype=torch.bool), float(low) if lowest else None


class ShiftBackgroundd(MapTransform):
    """Dictionary form of :class:`ShiftBackground`.

    Args:
        keys: keys of the volumes.
        allow_missing_keys: don't raise an error if a key is missing.
    """

    def __init__(self, keys: KeysCollection, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.shifter = ShiftBackground()

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = self.shifter(d[key])
        return d


class SmoothAcrossSlicesd(MapTransform):
    """Gaussian filter along the last axis of a volume, as wide in millimetres however thick the slices are.

    Args:
        keys: keys of the volumes (C, H, W, D).
        sigma: standard deviation in millimetres; 0 for none.
        ref_key: key of the volume that knows the distance of the slices.
        allow_missing_keys: don't raise an error if a key is missing.
    """

    def __init__(self, keys: KeysCollection, sigma: float, ref_key: str = "image", allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.sigma, self.ref_key = sigma, ref_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        distance = float(affine_to_spacing(d[self.ref_key].affine, 3)[2])
        for key in self.key_iterator(d):
            d[key] = GaussianSmooth([0.0, 0.0, self.sigma / distance])(d[key])
        return d


class KeepBraind(MapTransform):
    """Set volumes to 0 outside of the brain, see :func:`scripts.brains.brain_masks`.

    Args:
        keys: keys of the volumes (C, H, W, D).
        keep: whether to do it.
        ref_key: key of the scan, on the network's grid.
        allow_missing_keys: don't raise an error if a key is missing.
    """

    def __init__(
        self, keys: KeysCollection, keep: bool = True, ref_key: str = "image", allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.keep, self.ref_key = keep, ref_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        if self.keep:
            brain = torch.from_numpy(brain_masks(convert_to_numpy(d[self.ref_key])))
            for key in self.key_iterator(d):
                d[key] = d[key] * brain.to(d[key].device)
        return d


class RandSprited(RandomizableTransform, MapTransform):
    """Paint one synthetic anomaly into a slice, of constant grey unless it keeps the texture, and write its mask.

    Shape, place inside the head, size, rotation and grey level are random, as in Pinaya et al. 2022, arXiv 2206.03461.
    The sprite ends at the border of the head, whose holes count as head. A slice without foreground gets no sprite and
    an empty mask, and so does one that ``prob`` leaves out.

    Args:
        keys: keys of the slices (C, H, W), in [0, 1]; the first one says where the head is.
        mask_key: key of the mask, uint8 (1, H, W).
        radius: least and largest radius in pixels (half the side of a square, half the long axis of an ellipse).
        contrast: least difference, in each channel, between the grey level and the mean of what it covers, in [0, 0.5].
        texture: share, in [0, 1], of what lies there that shows through the sprite, without its mean: 0 gives one grey
            level, 1 what was there, darker or brighter.
        shapes: which shapes to draw from.
        level: grey level above which a pixel, in any channel, is foreground.
        prob: probability of a sprite.
        allow_missing_keys: don't raise an error if a key is missing.

    Raises:
        ValueError: for an unknown shape, a contrast that no grey level in [0, 1] may reach, or a texture that is no share.
    """

    def __init__(
        self,
        keys: KeysCollection = "image",
        mask_key: str = "label",
        radius: tuple[float, float] = (3, 9),
        contrast: float = 0.2,
        texture: float = 0.0,
        shapes: Sequence[str] = ("square", "ellipse", "heart"),
        level: float = 0.1,
        prob: float = 1.0,
        allow_missing_keys: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        RandomizableTransform.__init__(self, prob)
        if not set(shapes) <= set(SPRITES):
            raise ValueError(f"shapes must be among {', '.join(SPRITES)}, got {', '.join(shapes)}.")
        if not 0 <= contrast <= 0.5:
            raise ValueError(f"contrast must be in [0, 0.5], got {contrast}.")
        if not 0 <= texture <= 1:
            raise ValueError(f"texture must be in [0, 1], got {texture}.")
        self.mask_key = mask_key
        self.radius = radius
        self.contrast = contrast
        self.texture = texture
        self.shapes = shapes
        self.level = level

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        reference = d[self.first_key(d)]
        self.randomize((convert_to_numpy(reference) > self.level).any(axis=0))
        d[self.mask_key] = convert_to_dst_type(self.sprite[None], reference, dtype=torch.uint8)[0]
        if self.sprite.any():
            for key in self.key_iterator(d):
                d[key] = convert_to_dst_type(self._paint(convert_to_numpy(d[key])), d[key])[0]
        return d

    def randomize(self, foreground: np.ndarray) -> None:
        """Draw the sprite's pixels, bool (H, W), for a slice with this foreground."""
        super().randomize(None)
        self.sprite = np.zeros_like(foreground)
        if not self._do_transform or not foreground.any():
            return
        inside = SPRITES[self.shapes[self.R.randint(len(self.shapes))]]
        candidates = np.argwhere(foreground)
        row, column = candidates[self.R.randint(len(candidates))]
        radius = self.R.uniform(*self.radius)
        angle = self.R.uniform(0, 2 * math.pi)
        aspect = self.R.uniform(0.5, 1)
        rows, columns = np.indices(foreground.shape)
        y, x = (rows - row) / radius, (columns - column) / radius
        x, y = math.cos(angle) * x + math.sin(angle) * y, math.cos(angle) * y - math.sin(angle) * x
        self.sprite = inside(x, y, aspect) & ndimage.binary_fill_holes(foreground)

    def _paint(self, image: np.ndarray) -> np.ndarray:
        painted = image.copy()
        for channel in painted:
            mean = float(channel[self.sprite].mean())
            # uniform over [0, mean - contrast] and [mean + contrast, 1], laid end to end
            darker, brighter = max(mean - self.contrast, 0), max(1 - mean - self.contrast, 0)
            grey = self.R.uniform(0, darker + brighter)
            grey = grey if grey < darker else mean + self.contrast + (grey - darker)
            channel[self.sprite] = np.clip(grey + self.texture * (channel[self.sprite] - mean), 0, 1)
        return painted


class RandStandInd(RandomizableTransform, MapTransform):
    """Put one sequence in the place of others, as :class:`LoadSequencesd` does for a patient who lacks them.

    Args:
        keys: keys of the images (C, H, W[, D]).
        channel: number of the sequence that stands in.
        prob: how often.
        replaced: numbers of the sequences that it takes the place of; None for all.
        allow_missing_keys: don't raise an error if a key is missing.
    """

    def __init__(
        self,
        keys: KeysCollection,
        channel: int,
        prob: float = 0.1,
        replaced: Sequence[int] | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        RandomizableTransform.__init__(self, prob)
        self.channel, self.replaced = channel, replaced

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        self.randomize(None)
        if self._do_transform:
            for key in self.key_iterator(d):
                replaced = range(len(d[key])) if self.replaced is None else self.replaced
                d[key] = d[key][[self.channel if i in replaced else i for i in range(len(d[key]))]]
        return d


class RandSkullStripd(RandomizableTransform, MapTransform):
    """Leave only the brain of an axial MRI slice, as in data sets whose skulls were stripped.

    The grey levels are scaled anew, since the median of such a scan's foreground is the brain's. Slices with less than
    ``min_brain`` brain stay whole.

    Args:
        keys: keys of the slices, see :func:`scripts.brains.brain_mask`.
        prob: how often.
        min_brain: least share of brain pixels in a slice, in [0, 1].
        allow_missing_keys: don't raise an error if a key is missing.
    """

    def __init__(
        self, keys: KeysCollection, prob: float = 0.1, min_brain: float = 0.05, allow_missing_keys: bool = False
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        RandomizableTransform.__init__(self, prob)
        self.min_brain = min_brain
        self.scaler = ScaleIntensityByForeground()

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        self.randomize(None)
        if self._do_transform:
            for key in self.key_iterator(d):
                brain = brain_mask(convert_to_numpy(d[key]))
                if brain.mean() >= self.min_brain:
                    stripped = d[key] * convert_to_dst_type(brain, d[key])[0]
                    d[key] = convert_to_dst_type(self.scaler(stripped), d[key])[0]
        return d
