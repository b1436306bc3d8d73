"""Thresholds that a map of anomalies sets itself, and those that a number of patients set."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
from skimage.filters import apply_hysteresis_threshold, threshold_otsu

__all__ = ["at_false_positives", "otsu", "peak", "rarely_exceeded", "risk_controlled"]


def otsu(anomaly_map: np.ndarray, minimum: float = 0.0) -> float:
    """Otsu's threshold of the positive values of a map (Otsu 1979, IEEE Trans. Syst. Man Cybern. 9:62).

    Args:
        anomaly_map: any shape.
        minimum: floor of the threshold, which it has without a positive value as well.
    """
    positive = anomaly_map[anomaly_map > 0]
    return max(float(threshold_otsu(positive)), minimum) if positive.size else minimum


def peak(anomaly_map: np.ndarray, shares: Sequence[float], minimum: float = 0.0) -> tuple[np.ndarray, float]:
    """What is above a share of a map's largest value, and connected (by faces) to what is above another share of it.

    A faint lesion has a low threshold by this, and weak parts beside a strong one go.

    Args:
        anomaly_map: any shape.
        shares: the lower share and the higher one, in (0, 1].
        minimum: floor of the thresholds.

    Returns:
        mask, bool, and the lower threshold.
    """
    low, high = (max(share * float(anomaly_map.max()), minimum) for share in shares)
    return apply_hysteresis_threshold(anomaly_map, low, high), low


def _controlled(losses: np.ndarray, bound: float) -> np.ndarray:
    """Bound of the next patient's expected loss, by those of n patients, (n, ...)."""
    return (losses.sum(axis=0) + bound) / (len(losses) + 1)


def risk_controlled(losses: np.ndarray, thresholds: Sequence[float], risk: float, bound: float = 1.0) -> float:
    """The smallest threshold with a bounded expected loss, by conformal risk control (Angelopoulos et al. 2022,
    arXiv 2208.02814, eq. 4).

    It is the smallest at which (sum of the losses + ``bound``) / (n + 1) does not exceed ``risk``. If the n patients and the
    next one are exchangeable, and their losses fall with the threshold and lie in [0, ``bound``], the expected loss of the
    next patient at this threshold is at most ``risk`` (theorem 1). The expectation is over the n patients as well: it is no
    statement on these alone, and none on each patient.

    Args:
        losses: (n, k), of each patient at each threshold.
        thresholds: (k,), rising.
        risk: the largest expected loss wanted; with n patients no less than ``bound`` / (n + 1) can be had.
        bound: largest loss that there can be.

    Raises:
        ValueError: for thresholds that don't rise, losses outside of [0, bound] or that rise with the threshold, and for a
            risk that no threshold has.
    """
    losses, thresholds = np.asarray(losses, dtype=float), np.asarray(thresholds, dtype=float)
    if losses.ndim != 2 or losses.shape[1] != len(thresholds) or not len(losses) or (np.diff(thresholds) <= 0).any():
        raise ValueError(
            f"a loss for each patient and rising threshold is needed, got {losses.shape} for {thresholds.shape}"
        )
    if not (0 <= losses.min() and losses.max() <= bound) or (np.diff(losses, axis=1) > 0).any():
        raise ValueError(f"losses must lie in 0 ... {bound:g} and fall with the threshold")
    controlled = _controlled(losses, bound)
    if not (controlled <= risk).any():
        raise ValueError(
            f"no threshold has an expected loss of {risk:g}; {len(losses)} patients allow {controlled.min():.3g} at least: "
            "take more patients, or a larger risk"
        )
    return float(thresholds[(controlled <= risk).argmax()])


def at_false_positives(healthy: Sequence[np.ndarray], voxel_ml: Sequence[float], most_ml: float, cap_ml: float) -> float:
    """Lowest threshold above which no more than so much is expected to be found where nothing is.

    By conformal risk control, see :func:`risk_controlled`: the loss of a volume is what is found in it, ``cap_ml`` at most.

    Args:
        healthy: maps of the places without anomaly, 0 or more, an array of any shape for each volume.
        voxel_ml: size of a voxel of each volume, in millilitres.
        most_ml: largest expected loss, in millilitres a volume.
        cap_ml: largest loss of a volume, in millilitres; with n volumes ``most_ml`` can't be less than cap_ml / (n + 1).

    Returns:
        the threshold, of which "map > threshold" is meant; 0 if less than that is above 0.

    Raises:
        ValueError: if there is no volume, or by :func:`risk_controlled` if there are too few.
    """
    if not healthy:
        raise ValueError("lesion-free slices of one patient or more are needed to choose a threshold by")
    ranked = [np.sort(part[part > 0], axis=None) for part in healthy]
    values = np.unique([0.0, *np.concatenate(ranked)])

    def losses(threshold: float) -> np.ndarray:
        above = [len(part) - np.searchsorted(part, threshold, side="right") for part in ranked]
        return np.minimum(np.multiply(above, voxel_ml), cap_ml)

    place = bisect_left(values, True, key=lambda value: _controlled(losses(value), cap_ml) <= most_ml)
    last = float(values[min(place, len(values) - 1)])
    return risk_controlled(losses(last)[:, None], [last], most_ml, cap_ml)


def rarely_exceeded(values: Sequence[float], rate: float) -> float:
    """The value that another one, drawn as the given ones were, exceeds with a probability of ``rate`` at most.

    It is the k-th largest of n, k being the whole part of rate·(n + 1): if all n + 1 are exchangeable, the new one is among
    the k largest with a probability of k / (n + 1) at most (Vovk et al. 2005, split conformal prediction).

    Args:
        values: n of them.
        rate: in (0, 1); with n values no less than 1 / (n + 1) can be had.

    Raises:
        ValueError: for a rate that n values can't tell.
    """
    rank = int(rate * (len(values) + 1) + 1e-9)
    if not 1 <= rank <= len(values):
        raise ValueError(
            f"a rate of {rate:g} can't be told by {len(values)} values; the least that can is {1 / (len(values) + 1):.2g}, "
            f"the largest {len(values) / (len(values) + 1):.3g}"
        )
    return float(np.sort(np.asarray(values, dtype=float))[-rank])
