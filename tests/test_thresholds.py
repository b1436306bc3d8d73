from __future__ import annotations

import numpy as np
import pytest

from scripts.thresholds import at_false_positives


def test_above_the_threshold_lies_the_stated_volume_in_the_mean_of_the_cases_and_below_it_more():
    rng = np.random.default_rng(0)
    maps, sizes = [rng.random((20, 20, 5)) for _ in range(3)], [0.02, 0.02, 0.05]

    def found(threshold: float) -> float:
        return float(np.mean([(x > threshold).sum() * size for x, size in zip(maps, sizes, strict=True)]))

    for most in (0.5, 3.0):
        threshold = at_false_positives(maps, sizes, most)
        assert most - 0.05 < found(threshold) <= most < found(np.nextafter(threshold, 0))


def test_maps_without_so_much_in_them_need_no_threshold():
    assert at_false_positives([np.zeros((4, 4, 2)), np.full((2, 2, 2), 0.3)], [1.0, 1.0], 5.0) == 0


def test_no_volume_is_refused():
    with pytest.raises(ValueError, match="lesion-free slices of one patient"):
        at_false_positives([], [], 3.0)
