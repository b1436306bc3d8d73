from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_cine, rows_of
from monai.data import MetaTensor
from PIL import Image

from scripts.tasks.motion.metrics import CineMetrics, frame_errors, second_difference, structure_dice, volume_curve

AFFINE = np.diag([1.5, 2.0, 10.0, 1.0])


# --- the figures themselves


def test_frames_are_compared_between_the_ends_alone():
    real = np.zeros((4, 5, 5, 5))
    real[:, 0, 0, 0], real[:, 1] = 10, 2
    made = real.copy()
    made[1] += 1
    made[2] += 2
    made[[0, 3]] += 50  # the ends do not count
    psnr, nmse = frame_errors(made, real)
    assert psnr == pytest.approx((10 * math.log10(100 / 1) + 10 * math.log10(100 / 4)) / 2)
    assert nmse == pytest.approx((125 + 500) / 2 / (real[1] ** 2).sum())


@pytest.mark.parametrize("count", [2, 3])
def test_frames_that_have_no_counterpart_have_no_errors(count):
    assert all(math.isnan(v) for v in frame_errors(np.ones((count, 2, 2, 2)), np.ones((2, 2, 2, 2))))


def test_structures_that_the_label_map_has_not_have_no_dice():
    label, pred = torch.zeros(4, 4, 4), torch.zeros(4, 4, 4)
    label[0], label[1] = 1, 3
    pred[0, :2], pred[1], pred[2] = 1, 3, 3
    result = structure_dice(pred, label)
    assert result["rv"] == pytest.approx(2 / 3) and result["lv"] == pytest.approx(2 / 3) and math.isnan(result["myo"])


def test_a_steady_motion_is_smooth_and_a_jump_is_not():
    step = torch.tensor([3.0, 0.0, 4.0]).reshape(3, 1, 1, 1).expand(3, 2, 2, 2)
    assert second_difference(torch.cat([0 * step, step, 2 * step])) == 0
    assert second_difference(torch.cat([0 * step, 0 * step, step])) == 5
    assert math.isnan(second_difference(torch.cat([0 * step, step])))


def test_volumes_are_in_ml_by_the_affine():
    labels = torch.zeros(3, 10, 10, 10)
    for frame, count in enumerate((10, 4, 0)):
        labels[frame, 0, 0, :count] = 3
    assert volume_curve(labels, AFFINE) == pytest.approx([0.3, 0.12, 0])


# --- CineMetrics


def case(name="a", **changes):
    """A generated cine that is the real one but for noise, with labels."""
    cine, labels = (MetaTensor(torch.from_numpy(np.moveaxis(a, -1, 0).copy()), AFFINE) for a in make_cine(4))
    noise = torch.from_numpy(np.random.default_rng(0).normal(0, 1, cine.shape)).float()
    return {
        "case": name,
        "cine": cine.float(),
        "frames": cine.float() + noise,
        "displacement": torch.zeros(12, 32, 28, 6),
        "folding": 0.001,
        "label": labels[:1],
        "target_label": labels[-1:],
        "labels": labels,
        **changes,
    }


def evaluate(output_dir, *cases):
    metrics = CineMetrics(output_dir)
    engine = SimpleNamespace(state=SimpleNamespace(metrics={}))
    for item in cases:
        engine.state.batch, engine.state.output = [item], [{}]
        metrics._update(engine)
    metrics._finish(engine)
    return engine.state.metrics, rows_of(output_dir / "metrics.csv")


def test_labels_that_arrive_at_the_target_close_the_gap(tmp_path):
    summary, rows = evaluate(tmp_path, case())
    row = {key: float(value) for key, value in rows[0].items() if key != "case"}
    assert row["dice_after"] == row["gap_closed"] == row["dice_after_lv"] == 1 and row["dice_before"] < 0.95
    assert row["folding_percent"] == pytest.approx(0.1) and row["roughness_mm"] == 0
    assert row["psnr"] > row["still_psnr"] + 10 and row["psnr_gain"] == pytest.approx(row["psnr"] - row["still_psnr"])
    volumes = volume_curve(case()["labels"], AFFINE)
    assert [row["lv_first_ml"], row["lv_last_ml"], row["lv_falls"]] == pytest.approx([volumes[0], volumes[-1], 1])
    assert row["lv_true_last_ml"] == pytest.approx(volumes[-1])
    assert summary == {**json.loads((tmp_path / "metrics_summary.json").read_text(encoding="utf-8"))}
    assert Image.open(tmp_path / "lv_volume.png").format == "PNG"


def test_the_gap_of_a_cohort_is_that_of_its_mean_dice(tmp_path):
    still = case("b")
    still["labels"] = still["label"].expand(4, -1, -1, -1)
    still["target_label"] = still["target_label"].roll(2, dims=1)
    summary, rows = evaluate(tmp_path, case("a"), still)
    before, after = ([float(row[f"dice_{when}"]) for row in rows[:2]] for when in ("before", "after"))
    assert float(rows[1]["gap_closed"]) == 0
    assert summary["gap_closed"] == pytest.approx((np.mean(after) - np.mean(before)) / (1 - np.mean(before)))
    assert summary["gap_closed"] < np.mean([float(row["gap_closed"]) for row in rows[:2]])


def test_a_volume_that_rises_once_does_not_fall(tmp_path):
    labels = case()["labels"]
    summary, rows = evaluate(tmp_path, case("a"), case("b", labels=labels[[0, 2, 1, 3]]))
    assert [row["lv_falls"] for row in rows[:2]] == ["1", "0"] and summary["lv_falls"] == 0.5


def test_cases_without_labels_have_figures_of_their_frames_alone(tmp_path):
    bare = case()
    for key in ("label", "target_label", "labels"):
        del bare[key]
    summary, rows = evaluate(tmp_path, bare)
    assert float(rows[0]["psnr"]) > 0 and rows[0]["dice_after"] == rows[0]["lv_falls"] == "nan"
    assert json.loads((tmp_path / "metrics_summary.json").read_text(encoding="utf-8"))["gap_closed"] is None
    assert math.isnan(summary["gap_closed"]) and not (tmp_path / "lv_volume.png").exists()
