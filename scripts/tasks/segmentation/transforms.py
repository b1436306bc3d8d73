"""Transforms of the segmentation bundles alone: what several masks of a case say of its volume."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from monai.utils import ensure_tuple_rep
from torch import Tensor

from scripts.losses import binary_entropy
from scripts.metrics import dice
from scripts.results import millilitres

__all__ = ["MapUncertaintyd", "MarkUncertaind", "MeasureVolumed", "conformal_factor", "spread_of_volumes", "volume_interval"]

LEAST_SPREAD, LEAST_SHARE = 0.1, 0.02  # ml, and share of the volume, that are added to a spread


def spread_of_volumes(volume: float, samples: Tensor, level: float = 0.8) -> tuple[float, float]:
    """How far the volumes of the samples reach below and above that of the mask.

    Args:
        volume: of the mask, in ml.
        samples: those of the samples, in ml, (n,).
        level: share of the samples between the two quantiles that are looked at, in (0, 1).

    Returns:
        distances in ml, above 0: to the lower and to the upper quantile, 0 where that lies on the other side, plus 0.1 ml
        and 2 % of the volume, without which an ensemble that agrees would be sure.
    """
    quantiles = samples.double().quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    least = LEAST_SPREAD + LEAST_SHARE * volume
    return max(volume - quantiles[0], 0.0) + least, max(quantiles[1] - volume, 0.0) + least


def volume_interval(volume: float, spread: tuple[float, float], factor: float) -> tuple[float, float]:
    """Lower and upper end in ml, the volume minus and plus ``factor`` times its spread; the lower one is 0 at least."""
    return max(volume - factor * spread[0], 0.0), volume + factor * spread[1]


def conformal_factor(volumes: np.ndarray, spreads: np.ndarray, true: np.ndarray, level: float = 0.8) -> float:
    """The factor with which the intervals of held-out cases hold the true volume as often as they should.

    Split conformal prediction (Papadopoulos et al. 2002; Angelopoulos & Bates 2021, arXiv 2107.07511, section 1.1), with the
    error in units of the spread as the score: of a new case like them, the interval holds the volume with a probability of
    ``level`` at least.

    Args:
        volumes: of the masks, in ml, (N,).
        spreads: of them, see :func:`spread_of_volumes`, (N, 2).
        true: the true volumes, in ml, (N,).
        level: share of intervals that shall hold the true volume, in (0, 1).

    Raises:
        ValueError: if there are too few cases for this level.
    """
    error = true - volumes
    scores = np.sort(np.where(error < 0, -error / spreads[:, 0], error / spreads[:, 1]))
    rank = int(np.ceil((len(scores) + 1) * level - 1e-9))
    if rank > len(scores):
        raise ValueError(f"{len(scores)} cases are too few for intervals of {level:.0%}; give more, or take a lower level")
    return float(scores[rank - 1])


class MapUncertaintyd(MapTransform):
    """Entropy of a probability of lesion, in bits: 0 where the samples agree, 1 where they are divided.

    Args:
        keys: keys of the probabilities, in [0, 1].
        output_keys: keys of the entropies.
        allow_missing_keys: don't raise an error if a key is missing.
    """

    def __init__(
        self, keys: KeysCollection = "mean", output_keys: KeysCollection = "entropy", allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.output_keys = ensure_tuple_rep(output_keys, len(self.keys))

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key, output_key in self.key_iterator(d, self.output_keys):
            d[output_key] = binary_entropy(d[key].clamp(0, 1)) / math.log(2)
        return d


class MarkUncertaind(MapTransform):
    """Mark in a mask where it is uncertain, in it and around it: 1 is lesion, 2 what may be one, 0 the rest.

    Args:
        keys: keys of the masks (1, H, W, D).
        entropy_keys: keys of the entropies in bits, same shape.
        above: entropy in bits from which on a voxel is uncertain; 0.5 is that of a probability of 0.11 or 0.89.
        allow_missing_keys: don't raise an error if a key is missing.
    """

    def __init__(
        self,
        keys: KeysCollection = "pred",
        entropy_keys: KeysCollection = "entropy",
        above: float = 0.5,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.entropy_keys, self.above = ensure_tuple_rep(entropy_keys, len(self.keys)), above

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key, entropy_key in self.key_iterator(d, self.entropy_keys):
            d[key] = d[key].masked_fill(d[entropy_key] >= self.above, 2)
        return d


class MeasureVolumed(MapTransform):
    """Volume of a mask with its interval, and how well the samples agree with it.

    The result has ``output_key``, a dictionary of numbers: ``ml``; ``low_ml`` and ``high_ml``, the interval; ``below`` and
    ``above``, its spread before the factor (:func:`spread_of_volumes`); ``agreement``, the mean Dice of the samples with the
    mask, in [0, 1], which says how good the mask is without a label (Roy et al. 2019, arXiv 1811.09800); ``look``, 1 for a
    case that wants a look, as the samples disagree or the scan is unlike the training's
    (:class:`scripts.fingerprint.CompareWithTrainingd`), else 0. MONAI Label sends what is called ``result`` with the mask.

    Args:
        keys: key of the samples, probabilities (n, H, W, D).
        mask_key: key of the mask (1, H, W, D).
        output_key: key of the result.
        level: share of the samples in the interval, see :func:`spread_of_volumes`.
        factor: see :func:`volume_interval`, of :func:`conformal_factor` on validation patients.
        look_below: agreement below which a case wants a look.
        threshold: probability above which a voxel of a sample is lesion.
        image_key: key of the image, which knows whether the scan is unlike the training's.
        allow_missing_keys: don't raise an error if a key is missing.
    """

    def __init__(
        self,
        keys: KeysCollection = "samples",
        mask_key: str = "pred",
        output_key: str = "result",
        level: float = 0.8,
        factor: float = 1.0,
        look_below: float = 0.0,
        threshold: float = 0.5,
        image_key: str = "image",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.mask_key, self.output_key, self.image_key = mask_key, output_key, image_key
        self.level, self.factor, self.look_below, self.threshold = level, factor, look_below, threshold

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            d[self.output_key] = self._measured(d[key], d[self.mask_key], d.get(self.image_key))
        return d

    def _measured(self, samples: MetaTensor, mask: MetaTensor, image: MetaTensor | None) -> dict[str, float]:
        masks = samples > self.threshold
        volume = millilitres(mask)
        spread = spread_of_volumes(volume, torch.tensor([millilitres(m) for m in masks]), self.level)
        low, high = volume_interval(volume, spread, self.factor)
        agreement = float(np.mean([dice(m[None], mask) for m in masks]))
        unlike = float(getattr(image, "meta", {}).get("unlike_training") or 0)
        return {
            "ml": volume,
            "low_ml": low,
            "high_ml": high,
            "below": spread[0],
            "above": spread[1],
            "agreement": agreement,
            "look": int(agreement < self.look_below or unlike > 1),
        }
