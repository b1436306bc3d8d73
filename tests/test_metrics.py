from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from scripts.metrics import bootstrap_interval, dice


def test_dice_is_twice_the_overlap_over_both_sizes():
    pred, label = np.array([1, 1, 1, 0, 0]), torch.tensor([0, 1, 2, 2, 0])
    assert dice(pred, label) == pytest.approx(2 * 2 / (3 + 3))
    assert dice(label, pred) == pytest.approx(dice(pred, label))


def test_dice_of_two_empty_masks_is_one_and_of_one_empty_mask_zero():
    empty, full = np.zeros((3, 4, 5), bool), np.ones((3, 4, 5), bool)
    assert dice(empty, empty) == 1
    assert dice(empty, full) == dice(full, empty) == 0
    assert dice(full, full) == 1


def test_dice_refuses_masks_of_two_shapes():
    with pytest.raises(ValueError, match=r"\(4,\) and \(1,\)"):
        dice(np.ones(4), np.ones(1))


def test_the_interval_of_a_mean_is_that_of_its_standard_error():
    values = np.random.default_rng(0).normal(3, 2, 400)
    lower, upper = bootstrap_interval(values)
    error = values.std() / math.sqrt(len(values))
    assert [lower, upper] == pytest.approx([values.mean() - 1.96 * error, values.mean() + 1.96 * error], abs=0.02)
    assert bootstrap_interval(values) == (lower, upper), "the same draws"


def test_a_patients_values_stay_together_as_patients_are_drawn():
    before = np.random.default_rng(1).normal(size=50)
    ends = bootstrap_interval(before, before + 1, statistic=lambda a, b, axis: np.mean(b - a, axis=axis))
    assert ends == pytest.approx((1, 1))


def test_patients_without_a_figure_are_left_out_and_one_patient_has_no_interval():
    assert bootstrap_interval([1, math.nan, 1, 1]) == (1, 1)
    assert all(
        math.isnan(end)
        for end in (*bootstrap_interval([1.0]), *bootstrap_interval([math.nan, 2.0]), *bootstrap_interval([]))
    )
