from __future__ import annotations

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from scripts.tasks.segmentation.metrics import (
    SegmentationMetrics,
    calibration_error,
    energy_distance,
    reliability_bins,
)
from scripts.tasks.segmentation.transforms import MeasureVolumed

AFFINE = np.diag([2.0, 2.0, 5.0, 1.0])


def make_case(name: str, shift: int = 0) -> dict:
    """A label of 10 x 10 x 2 voxels, and a mask that is shifted; two samples, of which one is the mask."""
    label = torch.zeros(1, 30, 30, 4)
    label[:, 10:20, 10:20, 1:3] = 1
    mask = label.roll(shift, 1)
    samples = torch.cat([mask, mask.roll(1, 2)])
    mean = samples.mean(dim=0, keepdim=True)
    case = {
        "case": name,
        "label": label,
        "pred": mask,
        "mean": mean,
        "samples": samples,
        "entropy": 4 * mean * (1 - mean),
        "image": torch.zeros(3, 30, 30, 4),
    }
    case = {key: value if key == "case" else MetaTensor(value, affine=AFFINE) for key, value in case.items()}
    return MeasureVolumed(factor=1.5)(case)


def evaluate(folder, cases):
    metrics = SegmentationMetrics(folder)
    engine = SimpleNamespace(state=SimpleNamespace(batch=cases, output=[{} for _ in cases], metrics={}))
    metrics._update(engine)
    metrics._finish(engine)
    with open(folder / "metrics.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file)), json.loads((folder / "metrics_summary.json").read_text(encoding="utf-8"))


def test_calibrated_probabilities_have_no_calibration_error_and_overconfident_ones_have():
    rng = torch.Generator().manual_seed(0)
    p = torch.rand(200_000, generator=rng)
    lesion = torch.rand(200_000, generator=rng) < p
    assert calibration_error(reliability_bins(p, lesion)) < 0.01
    sure = (p > 0.5).float()
    assert calibration_error(reliability_bins(sure, lesion)) == pytest.approx(0.25, abs=0.01)


def test_bins_hold_every_voxel_also_at_both_ends():
    bins = reliability_bins(torch.tensor([0.0, 1.0, 0.5]), torch.tensor([False, True, True]))
    assert bins.sum(axis=0).tolist() == [3, 1.5, 2]


def test_the_energy_distance_is_nought_for_samples_that_are_the_label_and_falls_with_diversity():
    label = torch.zeros(1, 4, 4, 4, dtype=torch.bool)
    label[:, :2] = True
    assert energy_distance(label.expand(3, -1, -1, -1), label) == pytest.approx(0, abs=1e-6)
    far = label.roll(2, 1)
    assert energy_distance(far.expand(2, -1, -1, -1), label) == pytest.approx(2)
    assert energy_distance(torch.cat([far, label]), label) == pytest.approx(2 * 0.5 - 0.5)
    assert energy_distance(torch.zeros(2, 4, 4, 4, dtype=torch.bool), torch.zeros(1, 4, 4, 4).bool()) == 0


def test_the_evaluation_measures_masks_surfaces_volumes_and_errors(tmp_path):
    rows, summary = evaluate(tmp_path, [make_case("a"), make_case("b", shift=2)])
    a, b, mean, _ = rows
    assert (a["case"], float(a["dice"]), float(a["hd95_mm"])) == ("a", 1.0, 0.0)
    assert float(b["dice"]) == pytest.approx(0.8) and float(b["hd95_mm"]) == pytest.approx(4.0)  # two pixels of 2 mm
    assert float(b["true_ml"]) == pytest.approx(4.0) and float(b["predicted_ml"]) == pytest.approx(4.0)
    assert a["covered"] == "1.0" and 0.5 < float(b["error_auroc"]) <= 1
    assert float(b["near_ece"]) > float(b["ece"]) > float(a["ece"])
    assert summary["dice"] == pytest.approx(float(mean["dice"])) and summary["dice_low"] <= 0.9 <= summary["dice_high"]
    assert summary["factor_needed"] is None  # two patients are too few
    assert (tmp_path / "reliability.png").stat().st_size > 1000 and (tmp_path / "reliability.csv").is_file()


def test_a_case_without_a_label_is_refused_by_name(tmp_path):
    case = make_case("a") | {"label": None}
    with pytest.raises(ValueError, match="Case a has no label"):
        SegmentationMetrics(tmp_path)._evaluate(case)
