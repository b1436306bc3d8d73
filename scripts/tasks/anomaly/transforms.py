"""Transforms of the anomaly bundles alone: lesions of masks, painted sprites, sequences that stand in."""

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
from monai.transforms import LoadImage, MapTransform, RandomizableTransform, Transform
from monai.utils import convert_to_dst_type, convert_to_numpy, convert_to_tensor
from scipy import ndimage
from skimage.filters import threshold_otsu

__all__ = ["RandSprited", "RandStandInd", "RemoveSmallLesions", "RemoveSmallLesionsd", "cohort_otsu"]

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
    """Put one sequence in the place of all others, as :class:`LoadSequencesd` does for a patient who has only this one.

    Args:
        keys: keys of the images (C, H, W[, D]).
        channel: number of the sequence that stands in.
        prob: how often.
        allow_missing_keys: don't raise an error if a key is missing.
    """

    def __init__(self, keys: KeysCollection, channel: int, prob: float = 0.1, allow_missing_keys: bool = False) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        RandomizableTransform.__init__(self, prob)
        self.channel = channel

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        self.randomize(None)
        if self._do_transform:
            for key in self.key_iterator(d):
                d[key] = d[key][self.channel : self.channel + 1].expand_as(d[key]).clone()
        return d
