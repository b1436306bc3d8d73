"""Transforms that the configurations of all kinds of bundles share: grey levels, grids, masks."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.data import MetaTensor
from monai.transforms import (
    MapTransform,
    Orientation,
    Transform,
)
from monai.transforms.utils_pytorch_numpy_unification import percentile
from monai.utils import convert_to_dst_type, convert_to_numpy, convert_to_tensor, ensure_tuple_rep
from torch import Tensor

from scripts.thresholds import otsu, peak
from scripts.units import told_units

__all__ = [
    "MapToMask",
    "MapToMaskd",
    "RestoreIntensityd",
    "ScaleIntensityByExtremesd",
    "ScaleIntensityByForeground",
    "ScaleIntensityByForegroundd",
    "ScaleIntensityByWindow",
    "ScaleIntensityByWindowd",
    "SplitPredictiond",
    "has_foreground",
    "upright",
]


def has_foreground(image: Tensor, level: float = 0.1, share: float = 0.05) -> Tensor:
    """Which slices show enough of the body to be worth a look.

    Args:
        image: slices (B, C, H, W), or any further spatial axes.
        level: a pixel is foreground if any of its channels is above this grey level.
        share: least share of foreground pixels, in [0, 1].

    Returns:
        bool tensor (B,).
    """
    return (image > level).any(dim=1).flatten(1).float().mean(dim=1) >= share


def with_meta(result: Tensor, like: MetaTensor, **meta: Any) -> MetaTensor:
    """``result`` with a copy of the meta data of ``like``, and ``meta`` added to it."""
    image = convert_to_dst_type(result, like, dtype=result.dtype)[0]
    image.meta.update(meta)
    return image


def upright(image: MetaTensor) -> MetaTensor:
    """An image (C, H, W, D) with its axes to the right, front and head (RAS): slices along the last one are axial."""
    return Orientation(axcodes="RAS", labels=None)(image)


class ScaleIntensityByForeground(Transform):
    """Scale each channel of a volume so that 0 stays 0 and the foreground's median becomes ``foreground_median``.

    Foreground are the voxels above ``foreground_fraction`` times the ``percentile`` of the positive voxels. Values are
    clipped to [0, 1], negative ones (CT, or after resampling) to 0; a channel without a positive voxel gives zeros.

    Why the median and not a high percentile: bright fat decides the latter. Over the patients of TCGA-LGG (FLAIR) the
    brain's grey level has a coefficient of variation of 0.08 after this scaling, and of 0.21 after a division by the
    99.5th percentile.

    ``meta["intensity_scale"]`` of the result is a list with one factor a channel, by which a scaled value has to be
    multiplied to be in the scan's own unit again (1 for a channel of zeros); :class:`RestoreIntensityd` does that. Not
    an ``InvertibleTransform`` on purpose: ``Invertd`` of a prediction would rescale the anomaly map too.

    Args:
        foreground_median: where the foreground's median goes, in (0, 1).
        foreground_fraction: share of the percentile above which a voxel is foreground, in [0, 1).
        percentile: percentile of the positive voxels, in [0, 100].
    """

    def __init__(self, foreground_median: float = 0.4, foreground_fraction: float = 0.1, percentile: float = 99.5) -> None:
        self.foreground_median = foreground_median
        self.foreground_fraction = foreground_fraction
        self.percentile = percentile

    def __call__(self, img: NdarrayOrTensor) -> MetaTensor:
        """
        Args:
            img: volume or slice (C, H, W[, D]), any unit.

        Returns:
            float32, same shape, in [0, 1].
        """
        image = convert_to_tensor(img, dtype=torch.float32, track_meta=True)
        channels = image.as_tensor()
        scales = [self._scale(channel) for channel in channels]
        scaled = [(channel / scale).clamp(0, 1) for channel, scale in zip(channels, scales, strict=True)]
        return with_meta(torch.stack(scaled), like=image, intensity_scale=scales)

    def _scale(self, channel: Tensor) -> float:
        positive = channel[channel > 0]
        if len(positive) == 0:
            return 1.0
        foreground = positive[positive > self.foreground_fraction * percentile(positive, self.percentile)]
        return float(percentile(foreground, 50)) / self.foreground_median


class ScaleIntensityByForegroundd(MapTransform):
    """Dictionary form of :class:`ScaleIntensityByForeground`.

    Args:
        keys: keys of the images.
        foreground_median: see there.
        foreground_fraction: see there.
        percentile: see there.
        allow_missing_keys: don't raise an error if a key is missing.
    """

    def __init__(
        self,
        keys: KeysCollection,
        foreground_median: float = 0.4,
        foreground_fraction: float = 0.1,
        percentile: float = 99.5,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.scaler = ScaleIntensityByForeground(foreground_median, foreground_fraction, percentile)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = self.scaler(d[key])
        return d


class ScaleIntensityByExtremesd(MapTransform):
    """Scale each image (C, H, W[, D]) so that its least value becomes 0 and its largest 1; a constant one gives zeros.

    ``meta`` gets ``intensity_scale`` and ``intensity_offset``, by which :class:`RestoreIntensityd` undoes it. Not an
    ``InvertibleTransform`` for the same reason as :class:`ScaleIntensityByForeground`.

    Args:
        keys: keys of the images.
        allow_missing_keys: don't raise an error if a key is missing.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            image = convert_to_tensor(d[key], dtype=torch.float32, track_meta=True)
            voxels = image.as_tensor()
            low, high = float(voxels.min()), float(voxels.max())
            scale = high - low or 1.0
            told = {"intensity_scale": [scale] * len(voxels), "intensity_offset": [low] * len(voxels)}
            d[key] = with_meta((voxels - low) / scale, like=image, **told)
        return d


class ScaleIntensityByWindow(Transform):
    """Bring CT to [0, 1]: Hounsfield units by a window, the grey levels of pictures by a division by 255.

    ``meta`` of the result gets ``units`` (``hounsfield`` or ``grey``) and, as lists with one number a channel,
    ``intensity_scale`` and ``intensity_offset``: a scaled value times the one plus the other is in the scan's own unit
    again, up to clipping; :class:`RestoreIntensityd` does that. Not an ``InvertibleTransform`` for the same reason as
    :class:`ScaleIntensityByForeground`.

    Args:
        window: the values lo and hi, in Hounsfield units, that become ``darkest`` and 1; what lies outside is clipped.
        units: ``hounsfield``; ``grey``, 0 to 255, clipped; or ``auto``, as the file tells it
            (:func:`scripts.units.told_units`).
        darkest: grey level of what lies at or below the window, in [0, 1).

    Raises:
        ValueError: for unknown units, or a window that is no two numbers lo < hi.
    """

    def __init__(self, window: Sequence[float], units: str = "auto", darkest: float = 0.0) -> None:
        if units not in ("auto", "hounsfield", "grey"):
            raise ValueError(f"units must be auto, hounsfield or grey, got {units}.")
        if len(window) != 2 or not window[0] < window[1]:
            raise ValueError(f"window must be two numbers, the lower one first, got {window}.")
        self.low, self.high = map(float, window)
        self.units, self.darkest = units, darkest

    def __call__(self, img: NdarrayOrTensor) -> MetaTensor:
        """
        Args:
            img: volume or slice (C, H, W[, D]), Hounsfield units or grey levels from 0 to 255.

        Returns:
            float32, same shape, in [0, 1].

        Raises:
            ValueError: with the file's name, if grey levels exceed 255, or the units can't be told.
        """
        image = convert_to_tensor(img, dtype=torch.float32, track_meta=True)
        voxels = image.as_tensor()
        units = told_units(image) if self.units == "auto" else self.units
        if units == "grey" and voxels.max() > 255:
            raise ValueError(
                f"{image.meta.get('filename_or_obj', 'image')}: grey levels up to {voxels.max():g}, pictures have 0 to 255; "
                "give --units hounsfield if this is a CT, else save it with 8 bits."
            )
        offset, scale, darkest = 0.0, 255.0, 0.0
        if units == "hounsfield":
            scale, darkest = (self.high - self.low) / (1 - self.darkest), self.darkest
            offset = self.high - scale
        return with_meta(
            ((voxels - offset) / scale).clamp(darkest, 1),
            like=image,
            units=units,
            intensity_scale=[scale] * len(voxels),
            intensity_offset=[offset] * len(voxels),
        )


class ScaleIntensityByWindowd(MapTransform):
    """Dictionary form of :class:`ScaleIntensityByWindow`.

    Args:
        keys: keys of the images.
        window: see there.
        units: see there.
        darkest: see there.
        allow_missing_keys: don't raise an error if a key is missing.
    """

    def __init__(
        self,
        keys: KeysCollection,
        window: Sequence[float],
        units: str = "auto",
        darkest: float = 0.0,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.scaler = ScaleIntensityByWindow(window, units, darkest)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = self.scaler(d[key])
        return d


class RestoreIntensityd(MapTransform):
    """Bring a scaled image, such as the pseudo-healthy one, back to the scan's own unit.

    Channel ``i`` is multiplied by ``meta["intensity_scale"][i]`` of ``data[ref_key]``, and ``meta["intensity_offset"][i]``,
    if there is one, is added; see :class:`ScaleIntensityByForeground` and :class:`ScaleIntensityByWindow`. Before that
    ``meta["intensity_lowest"]``, if there is one, takes the place of what lies below it, such as the zeros that an inverse
    puts beyond the network's grid, and the curve ``meta["intensity_curve"]``, if there is one, is gone back, see
    :class:`scripts.histograms.MatchHistogramd`.

    Args:
        keys: keys of the images (C, H, W[, D]) to restore.
        ref_key: key of the scaled scan.
        allow_missing_keys: don't raise an error if a key is missing.

    Raises:
        ValueError: if an image has more channels than the scan.
    """

    def __init__(self, keys: KeysCollection, ref_key: str = "image", allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.ref_key = ref_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        scales = d[self.ref_key].meta["intensity_scale"]
        offsets = d[self.ref_key].meta.get("intensity_offset", [0.0] * len(scales))
        for key in self.key_iterator(d):
            image = d[key]
            if len(image) > len(scales):
                raise ValueError(f"{key} has {len(image)} channels, but {self.ref_key} only {len(scales)} scales.")
            scale, offset = (
                torch.tensor(numbers[: len(image)], dtype=image.dtype, device=image.device).reshape(
                    -1, *[1] * (image.ndim - 1)
                )
                for numbers in (scales, offsets)
            )
            lowest, curve = (d[self.ref_key].meta.get(name) for name in ("intensity_lowest", "intensity_curve"))
            image = image if lowest is None else image.clamp(min=lowest)
            if curve is not None:
                before, after = curve
                levels = np.interp(convert_to_numpy(image), after, before)
                image = convert_to_dst_type(levels, image, dtype=image.dtype)[0]
            d[key] = image * scale + offset
        return d


class SplitPredictiond(MapTransform):
    """Cut the channels of a prediction, in order, into new entries of the dictionary; the meta data are kept.

    Args:
        keys: key of the prediction (C, H, W[, D]).
        channels: name and number of channels of each part, such as ``{"map": 1, "healthy": 3}``.
        allow_missing_keys: don't raise an error if a key is missing.

    Raises:
        ValueError: if the numbers do not add up to the prediction's channels.
    """

    def __init__(self, keys: KeysCollection, channels: dict[str, int], allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.channels = channels

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            sizes = list(self.channels.values())
            if len(d[key]) != sum(sizes):
                raise ValueError(f"{key} has {len(d[key])} channels, but {self.channels} need {sum(sizes)}.")
            d.update(zip(self.channels, torch.split(d[key], sizes), strict=True))
        return d


class MapToMask(Transform):
    """Cut an anomaly map into a mask: 1 where the map is above a threshold, which goes to ``meta["threshold"]``.

    Args:
        threshold: a number, or ``otsu`` or ``peak`` for that of this map, see :mod:`scripts.thresholds`.
        minimum: floor of the map's own threshold; without it that of a case without any lesion would be cut in two as well.
        peak_shares: shares of the largest value, for ``peak``.

    Raises:
        ValueError: if the threshold is neither a number nor one of these words, or the shares are no two numbers in (0, 1],
            the lower one first.
    """

    def __init__(
        self, threshold: float | str = "otsu", minimum: float = 0.0, peak_shares: Sequence[float] = (0.25, 0.5)
    ) -> None:
        self.threshold = threshold if threshold in ("otsu", "peak") else float(threshold)
        self.minimum, self.peak_shares = minimum, peak_shares
        if len(peak_shares) != 2 or not 0 < peak_shares[0] <= peak_shares[1] <= 1:
            raise ValueError(f"peak_shares must be two numbers in (0, 1], the lower one first, got {peak_shares}")

    def __call__(self, img: NdarrayOrTensor) -> MetaTensor:
        """
        Args:
            img: anomaly map (1, H, W[, D]), zero or positive.

        Returns:
            uint8, same shape and meta data; empty for a map that is all zero.
        """
        image = convert_to_tensor(img, track_meta=True)
        if self.threshold == "peak":
            mask, threshold = peak(convert_to_numpy(image), self.peak_shares, self.minimum)
            return with_meta(torch.from_numpy(mask).to(image.device, torch.uint8), like=image, threshold=threshold)
        threshold = otsu(convert_to_numpy(image), self.minimum) if self.threshold == "otsu" else self.threshold
        return with_meta((image.as_tensor() > threshold).to(torch.uint8), like=image, threshold=threshold)


class MapToMaskd(MapTransform):
    """Dictionary form of :class:`MapToMask`.

    Args:
        keys: keys of the maps.
        output_keys: keys of the masks.
        threshold: see there.
        minimum: see there.
        peak_shares: see there.
        allow_missing_keys: don't raise an error if a key is missing.
    """

    def __init__(
        self,
        keys: KeysCollection = "map",
        output_keys: KeysCollection = "pred",
        threshold: float | str = "otsu",
        minimum: float = 0.0,
        peak_shares: Sequence[float] = (0.25, 0.5),
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.output_keys = ensure_tuple_rep(output_keys, len(self.keys))
        self.cutter = MapToMask(threshold, minimum, peak_shares)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key, output_key in self.key_iterator(d, self.output_keys):
            d[output_key] = self.cutter(d[key])
        return d
