"""Thresholds that a map of anomalies sets itself."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from skimage.filters import apply_hysteresis_threshold, threshold_otsu

__all__ = ["otsu", "peak"]


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
