from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from scripts.tasks.segmentation.transforms import (
    MapUncertaintyd,
    MarkUncertaind,
    MeasureVolumed,
    conformal_factor,
    spread_of_volumes,
    volume_interval,
)


def test_the_uncertainty_is_a_bit_where_samples_are_divided_and_nought_where_they_agree():
    data = MapUncertaintyd()({"mean": MetaTensor(torch.tensor([0.0, 0.5, 1.0, 0.25]), affine=np.eye(4))})
    assert data["entropy"].tolist() == pytest.approx([0, 1, 0, 0.811278], abs=1e-6)
    assert isinstance(data["entropy"], MetaTensor)


def test_the_spread_reaches_from_the_volume_to_the_quantiles_of_the_samples_and_a_little_on():
    samples = torch.linspace(90, 120, 101)
    below, above = spread_of_volumes(100.0, samples, level=0.8)
    assert (below, above) == (pytest.approx(100 - 93 + 2.1), pytest.approx(117 - 100 + 2.1))
    assert spread_of_volumes(100.0, torch.full((8,), 130.0))[0] == pytest.approx(2.1)  # all on the other side
    assert spread_of_volumes(0.0, torch.zeros(8)) == pytest.approx((0.1, 0.1))
    assert volume_interval(100.0, (10.0, 20.0), 2.0) == (80.0, 140.0)
    assert volume_interval(1.0, (10.0, 20.0), 2.0)[0] == 0


def test_the_conformal_factor_makes_intervals_hold_as_many_new_volumes_as_they_should():
    rng = np.random.default_rng(0)
    held = []
    for _ in range(300):
        spreads = rng.uniform(1, 5, (18, 2))
        errors = rng.normal(0, 1, 18) * 3 * spreads[:, 0]
        volumes, true = np.full(18, 100.0), 100 + errors
        factor = conformal_factor(volumes[:17], spreads[:17], true[:17], level=0.8)
        low, high = volume_interval(100.0, tuple(spreads[17]), factor)
        held.append(low <= true[17] <= high)
    assert np.mean(held) == pytest.approx(0.85, abs=0.07)  # 15 of 18 ranks, or a little more


def test_too_few_cases_for_a_level_are_refused():
    with pytest.raises(ValueError, match="3 cases are too few for intervals of 80%"):
        conformal_factor(np.ones(3), np.ones((3, 2)), np.ones(3))


@pytest.mark.parametrize(("unlike", "look_below", "look"), [("0.5", 0.5, 0), ("1.2", 0.5, 1), ("", 0.95, 1), (None, 0.5, 0)])
def test_a_case_wants_a_look_if_its_samples_disagree_or_the_scan_is_unlike_the_training(unlike, look_below, look):
    affine = np.diag([2.0, 2.0, 5.0, 1.0])
    mask = torch.zeros(1, 10, 10, 4)
    mask[:, :5] = 1
    smaller = mask.clone()
    smaller[:, 4] = 0
    image = MetaTensor(torch.zeros(3, 10, 10, 4), affine=affine, meta={} if unlike is None else {"unlike_training": unlike})
    data = {
        "image": image,
        "pred": MetaTensor(mask.byte(), affine=affine),
        "samples": MetaTensor(torch.cat([mask, smaller]), affine=affine),
    }
    volume = MeasureVolumed(factor=2.0, look_below=look_below)(data)["result"]
    assert volume["ml"] == pytest.approx(4.0) and volume["high_ml"] == pytest.approx(4.0 + 2 * 0.18)
    assert volume["low_ml"] == pytest.approx(4.0 - 2 * (0.8 * 0.9 + 0.18), abs=1e-5)  # the lower tenth of 3.2 and 4.0
    assert volume["agreement"] == pytest.approx((1 + 8 / 9) / 2)
    assert volume["look"] == look


def test_what_is_uncertain_in_a_mask_and_around_it_is_marked():
    mask = torch.tensor([1, 1, 0, 0], dtype=torch.uint8).view(1, 4, 1, 1)
    entropy = MapUncertaintyd()({"mean": torch.tensor([0.99, 0.8, 0.2, 0.01]).view(1, 4, 1, 1)})["entropy"]
    marked = MarkUncertaind()({"pred": mask, "entropy": entropy})["pred"]
    assert marked.flatten().tolist() == [1, 2, 2, 0] and marked.dtype == torch.uint8
    assert mask.flatten().tolist() == [1, 1, 0, 0]
