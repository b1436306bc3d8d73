from __future__ import annotations

import numpy as np
import pytest

from scripts.thresholds import at_false_positives, rarely_exceeded, risk_controlled

THRESHOLDS = np.linspace(0, 5, 501)


def losses_of(patients, rng):
    """Losses of simulated patients, exchangeable but with a level of the hospital in common: falling steps in [0, 1]."""
    hospital = rng.uniform(0.5, 1.5)
    largest = hospital * rng.gamma(1.0, 0.15, size=(patients, 5))  # the map's peak in each of five healthy slices
    return (largest[:, :, None] > THRESHOLDS).mean(axis=1)


@pytest.mark.parametrize("risk", [0.1, 0.3])
@pytest.mark.parametrize("patients", [15, 30])
def test_the_risk_of_the_next_patient_is_controlled(patients, risk):
    rng = np.random.default_rng(0)
    trials = [losses_of(patients + 1, rng) for _ in range(4000)]
    met = [x[-1, np.searchsorted(THRESHOLDS, risk_controlled(x[:-1], THRESHOLDS, risk))] for x in trials]
    error = np.std(met) / len(met) ** 0.5
    assert np.mean(met) < risk + 3 * error
    assert np.mean(met) > risk - 1 / (patients + 1) - 0.05  # and is not needlessly small


def test_the_threshold_is_the_smallest_that_leaves_room_for_one_patient_of_the_largest_loss():
    losses = np.array([[3.0, 2.0, 1.0, 0.0]] * 4)
    assert risk_controlled(losses, [0.1, 0.2, 0.3, 0.4], risk=1.4, bound=3.0) == 0.3  # (4 + 3) / 5
    assert risk_controlled(losses, [0.1, 0.2, 0.3, 0.4], risk=1.39, bound=3.0) == 0.4


@pytest.mark.parametrize(
    ("losses", "thresholds", "risk", "told"),
    [
        ([[1.0, 0.0]] * 8, [0.1, 0.2], 0.1, "8 patients allow 0.111 at least"),
        ([[0.0, 1.0]], [0.1, 0.2], 0.9, "fall with the threshold"),
        ([[2.0, 0.0]], [0.1, 0.2], 0.9, "in 0 ... 1"),
        ([[np.nan, 0.0]], [0.1, 0.2], 0.9, "in 0 ... 1"),
        ([[1.0, 0.0]], [0.2, 0.1], 0.9, "rising threshold"),
        ([[1.0, 0.0]], [0.2], 0.9, "rising threshold"),
        (np.zeros((0, 1)), [0.2], 0.9, "for each patient"),
    ],
)
def test_what_can_not_be_controlled_is_refused(losses, thresholds, risk, told):
    with pytest.raises(ValueError, match=told):
        risk_controlled(np.array(losses), thresholds, risk)


@pytest.mark.parametrize("most", [6.0, 9.0])
def test_above_the_threshold_lies_what_leaves_room_for_one_volume_of_the_largest_loss(most):
    rng = np.random.default_rng(0)
    maps, sizes, cap = [rng.random((20, 20, 5)) for _ in range(3)], [0.02, 0.02, 0.05], 20.0

    def expected(threshold: float) -> float:
        found = [(x > threshold).sum() * size for x, size in zip(maps, sizes, strict=True)]
        return float(np.minimum(found, cap).sum() + cap) / 4

    threshold = at_false_positives(maps, sizes, most, cap)
    assert most - 0.05 < expected(threshold) <= most < expected(np.nextafter(threshold, 0))


def test_maps_without_so_much_in_them_need_no_threshold():
    assert at_false_positives([np.zeros((4, 4, 2)), np.full((2, 2, 2), 0.3)], [1.0, 0.1], 5.0, 10.0) == 0


def test_a_volume_that_too_few_volumes_can_tell_is_refused():
    with pytest.raises(ValueError, match="lesion-free slices of one patient"):
        at_false_positives([], [], 3.0, 10.0)
    with pytest.raises(ValueError, match="1 patients allow 5 at least"):
        at_false_positives([np.ones((2, 2, 2))], [1.0], 3.0, 10.0)


def test_a_new_value_exceeds_the_limit_no_more_often_than_the_rate():
    rng = np.random.default_rng(0)
    above = [rng.normal() > rarely_exceeded(rng.normal(size=49), 0.1) for _ in range(4000)]
    assert 0.08 < np.mean(above) < 0.115
    values = np.arange(99.0)
    assert rarely_exceeded(values, 0.01) == 98 and rarely_exceeded(values, 0.05) == 94


@pytest.mark.parametrize("rate", [0, 0.009, 1])
def test_a_rate_that_the_values_cannot_tell_is_refused(rate):
    with pytest.raises(ValueError, match="can't be told by 99 values; the least that can is 0.01, the largest 0.99"):
        rarely_exceeded(np.arange(99.0), rate)
