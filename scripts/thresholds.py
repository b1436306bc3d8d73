"""Thresholds that a map of anomalies sets itself."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from skimage.filters import apply_hysteresis_threshold, threshold_otsu

__all__ = ["at_false_positives", "otsu", "peak"]


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


def at_false_positives(healthy: Sequence[np.ndarray], voxel_ml: Sequence[float], most_ml: float) -> float:
    """Lowest threshold above which no more than so much is found where nothing is, in the mean of the volumes.

    Args:
        healthy: maps of the places without anomaly, 0 or more, an array of any shape for each volume.
        voxel_ml: size of a voxel of each volume, in millilitres.
        most_ml: millilitres a volume that may be found falsely.

    Returns:
        the threshold, of which "map > threshold" is meant; 0 if less than that is above 0.

    Raises:
        ValueError: if there is no volume.
    """
    if not healthy:
        raise ValueError("lesion-free slices of one patient or more are needed to choose a threshold by")
    values = np.concatenate([part[part > 0].ravel() for part in healthy])
    sizes = np.concatenate([np.full((part > 0).sum(), size) for part, size in zip(healthy, voxel_ml, strict=True)])
    order = np.argsort(-values, kind="stable")
    too_many = np.flatnonzero(sizes[order].cumsum() > most_ml * len(healthy) * (1 + 1e-9))
    return float(values[order[too_many[0]]]) if len(too_many) else 0.0
