from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from scripts.framed import AsUnframedd, usual_scores
from scripts.networks.anomaly_baselines import EvennessNet
from scripts.networks.healthy_model import NUM_QUANTILES, Calibration
from scripts.one_sided import OneSided

HALF = 0.8  # score of the 97.5th percentile of the slices that were not framed


def calibration() -> Calibration:
    """Scores that rise evenly from 0."""
    scores = torch.linspace(0, HALF * 100 / 97.5, NUM_QUANTILES)
    return Calibration(torch.zeros(NUM_QUANTILES), scores, None)


def usual(factor: float) -> dict[str, float]:
    """Abnormality of framed slices whose scores are higher by a factor."""
    scores = {p: factor * HALF * float(p) / 97.5 for p in ("25", "50", "97.5", "100")}
    return {p: score / (score + HALF) for p, score in scores.items()}


def as_unframed(values, table, **meta):
    data = {
        "image": MetaTensor(torch.zeros(1, 4, 4, len(values)), meta=meta),
        "abnormality": torch.zeros(1, 4, 4, len(values)) + torch.tensor(values),
    }
    result = AsUnframedd("abnormality", table, calibration)(data)["abnormality"]
    assert result.shape == data["abnormality"].shape and (result == result[:, :1, :1]).all()
    return result[0, 0, 0].numpy()


def test_a_framed_slice_that_is_unlike_as_2_and_a_half_percent_of_framed_healthy_ones_has_one_half():
    table = usual(3.0)
    assert as_unframed([table["97.5"]], table, framed=True) == pytest.approx(0.5, abs=1e-5)


def test_scores_that_are_higher_by_a_factor_are_divided_by_it_within_the_percentiles_and_beyond():
    odds = np.array([0.0, 0.05, 0.6, 3.0, 12.0])
    values = as_unframed((odds / (1 + odds)).tolist(), usual(3.0), framed=True)
    assert values / (1 - values) == pytest.approx(odds / 3, abs=1e-4)


@pytest.mark.parametrize(("table", "meta"), [(None, {"framed": True}), (usual(3.0), {}), (usual(3.0), {"framed": False})])
def test_what_is_not_framed_stays_and_so_does_everything_without_a_table(table, meta):
    values = [0.0, 0.2, 0.7]
    assert as_unframed(values, table, **meta) == pytest.approx(values)


@pytest.mark.parametrize("table", [{"50": 0.4, "97.5": 0.3}, {"97.5": 1.0}])
def test_a_table_that_falls_or_reaches_1_is_refused(table):
    with pytest.raises(ValueError, match=r"must not fall with the percentiles, and be below 1: \{"):
        AsUnframedd("abnormality", table, calibration)


def test_the_table_of_slices_that_a_network_was_measured_with_changes_nothing(tmp_path):
    network = EvennessNet(spatial_size=(16, 16), texture_offset=0.1, score="mean").eval()
    batches = [{"image": 0.2 + torch.rand(50, 1, 16, 16, generator=torch.Generator().manual_seed(i))} for i in range(4)]
    network.calibrate(batches)
    before = network.healthy_scores.clone()
    usual = measured(network, batches, tmp_path)
    assert json.loads((tmp_path / "usual.json").read_text(encoding="utf-8")) == usual
    table = usual["framed_usual"]
    assert table["97.5"] == pytest.approx(0.5, abs=1e-3) and torch.equal(network.healthy_scores, before)
    image = MetaTensor(torch.zeros(1, 16, 16, 1), meta={"framed": True})
    transform = AsUnframedd("abnormality", table, lambda: network.calibration)
    for value in (table["50"], 0.5, table["99"], 0.7):
        data = {"image": image, "abnormality": torch.full((1, 16, 16, 1), value)}
        assert transform(data)["abnormality"].mean().item() == pytest.approx(value, abs=2e-3)


def measured(network, batches, folder):
    return usual_scores(network, batches, OneSided({"50": 0.1}), folder / "usual.json")


def test_what_is_bright_on_one_side_of_healthy_slices_is_measured_too(tmp_path):
    network = EvennessNet(spatial_size=(64, 64)).eval()
    y, x = np.mgrid[:64, :64] - 31.5
    head = torch.tensor(np.where(np.hypot(x, y) < 28, 0.5, 0.1), dtype=torch.float32)
    spotted = head.clone()
    spotted[10:16, 28:36] = 0.9  # columns first: on one side
    empty = torch.zeros_like(head)
    slices = torch.stack([head, spotted, empty])[:, None]
    network.calibrate([{"image": slices}])
    healed = head.expand(2, 1, 64, 64)
    network.forward = lambda image: torch.cat([image, healed, torch.zeros_like(image)], dim=1)
    table = measured(network, [{"image": slices}], tmp_path)["one_sided_usual"]
    assert table["25"] < 0.15 < 0.3 < table["100"] and list(table.values()) == sorted(table.values())
    with pytest.raises(ValueError, match="nothing to measure"):
        measured(network, [{"image": slices[2:]}], tmp_path)
