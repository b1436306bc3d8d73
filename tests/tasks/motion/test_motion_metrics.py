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

from scripts.tasks.motion.metrics import (
    CineMetrics,
    ejection_fraction,
    frame_errors,
    second_difference,
    structure_dice,
    volume_curve,
    wall_thickening,
)

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
    assert psnr == pytest.approx([10 * math.log10(100 / 1), 10 * math.log10(100 / 4)])
    assert nmse == pytest.approx([125 / (real[1] ** 2).sum(), 500 / (real[1] ** 2).sum()])


@pytest.mark.parametrize("count", [2, 3])
def test_frames_that_have_no_counterpart_have_no_errors(count):
    assert frame_errors(np.ones((count, 2, 2, 2)), np.ones((2, 2, 2, 2))) == ([], [])


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


def test_the_ejection_fraction_is_the_share_that_is_gone():
    assert ejection_fraction(120, 48) == 60 and ejection_fraction(50, 60) == -20
    assert math.isnan(ejection_fraction(0, 0))


def rings(*radii, slices=4, size=101):
    """Label maps (size, size, slices) with a cavity and a wall of these inner and outer radii, a pair a slice."""
    distance = np.hypot(*(np.mgrid[:size, :size] - size // 2))
    label = np.zeros((size, size, slices), np.uint8)
    for k, (inner, outer) in enumerate(radii):
        label[..., k][distance < outer] = 2
        label[..., k][distance < inner] = 3
    return label


@pytest.mark.parametrize("slice_dim", [0, 1, 2])
def test_the_wall_thickens_by_the_thickness_of_rings_of_its_area_in_slices_that_both_frames_have(slice_dim):
    first = rings((25, 35), (20, 30), (15, 25), (0, 12))  # 10 thick where there is a cavity
    last = rings((20, 35), (14, 29), (0, 20), (10, 15))  # 15 thick in the two slices that count
    first, last = (np.moveaxis(label, -1, slice_dim) for label in (first, last))
    assert wall_thickening(first, last) == pytest.approx(50, abs=1.5)
    assert wall_thickening(first, first) == 0
    assert math.isnan(wall_thickening(first, np.zeros_like(first)))


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
        "inverse_consistency": 0.25,
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


def test_the_frame_in_the_middle_has_a_gain_of_its_own(tmp_path):
    made = case(cine=case()["cine"], frames=case()["cine"][:1].repeat(4, 1, 1, 1))
    made["frames"][1] = made["cine"][1] + 1
    _, rows = evaluate(tmp_path, made)
    still = frame_errors(made["cine"][:1].expand(4, -1, -1, -1), made["cine"])[0]
    expected = frame_errors(made["frames"], made["cine"])[0][0] - still[0]
    assert float(rows[0]["middle_psnr_gain"]) == pytest.approx(expected) and expected > 0


def test_labels_that_arrive_at_the_target_close_the_gap(tmp_path):
    summary, rows = evaluate(tmp_path, case(group="NOR"), case("b"))
    assert [row.pop("group") for row in rows] == ["NOR", "", "", ""]
    row = {key: float(value) for key, value in rows[0].items() if key != "case"}
    assert row["dice_after"] == row["gap_closed"] == row["dice_after_lv"] == 1 and row["dice_before"] < 0.95
    assert row["folding_percent"] == pytest.approx(0.1) and row["roughness_mm"] == 0
    assert row["inverse_consistency_mm"] == 0.25
    assert row["psnr"] > row["still_psnr"] + 10 and row["psnr_gain"] == pytest.approx(row["psnr"] - row["still_psnr"])
    volumes = volume_curve(case()["labels"], AFFINE)
    assert [row["lv_first_ml"], row["lv_last_ml"], row["lv_falls"]] == pytest.approx([volumes[0], volumes[-1], 1])
    assert row["lv_true_last_ml"] == pytest.approx(volumes[-1])
    assert row["ejection_fraction_percent"] == row["true_ejection_fraction_percent"]
    assert row["ejection_fraction_percent"] == pytest.approx(100 * (1 - volumes[-1] / volumes[0]))
    assert row["wall_thickening_percent"] > 10 and row["wall_thickening_error"] == 0
    assert summary == {**json.loads((tmp_path / "metrics_summary.json").read_text(encoding="utf-8"))}
    assert summary["dice_after_low"] == summary["dice_after_high"] == 1
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


def test_errors_of_the_pumping_figures_are_signed_by_case_and_their_sizes_are_the_cohorts(tmp_path):
    labels = case()["labels"]
    too_little = case("a", labels=labels[[0, 1, 1, 1]])
    too_much = case("b", target_label=labels[1:2])
    summary, rows = evaluate(tmp_path, too_little, too_much)
    errors = [float(row["ejection_fraction_error"]) for row in rows[:2]]
    assert errors[0] < 0 and errors[1] == pytest.approx(-errors[0])
    assert summary["ejection_fraction_error"] == pytest.approx(0, abs=1e-9)
    assert summary["ejection_fraction_abs_error"] == pytest.approx(errors[1])
    true = [float(row["true_ejection_fraction_percent"]) for row in rows[:2]]
    volumes = volume_curve(labels, AFFINE)
    assert true == pytest.approx([100 * (1 - volumes[k] / volumes[0]) for k in (3, 1)])


def test_cases_without_labels_have_figures_of_their_frames_alone(tmp_path):
    bare = case()
    for key in ("label", "target_label", "labels"):
        del bare[key]
    summary, rows = evaluate(tmp_path, bare)
    assert float(rows[0]["psnr"]) > 0 and rows[0]["dice_after"] == rows[0]["lv_falls"] == "nan"
    assert json.loads((tmp_path / "metrics_summary.json").read_text(encoding="utf-8"))["gap_closed"] is None
    assert math.isnan(summary["gap_closed"]) and not (tmp_path / "lv_volume.png").exists()
