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


def test_the_bootstrap_interval_is_that_of_the_mean_over_patients():
    values = np.random.default_rng(0).normal(0.6, 0.1, 400)
    low, high = bootstrap_interval(values)
    assert (low + high) / 2 == pytest.approx(values.mean(), abs=0.002)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.05)
    assert bootstrap_interval([*values, math.nan]) == (low, high) == bootstrap_interval(values)
    assert bootstrap_interval([0.5]) == (0.5, 0.5)
    assert all(map(math.isnan, bootstrap_interval([math.nan])))
