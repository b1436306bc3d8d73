from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import make_cine
from monai.data import MetaTensor

from scripts.tasks.motion import results
from scripts.tasks.motion.metrics import pumping

AFFINE = np.diag([1.5, 2.0, 10.0, 1.0])
META = {"original_affine": AFFINE, "time_step": 0.0}


def volume(array):
    return MetaTensor(torch.as_tensor(np.ascontiguousarray(array)), AFFINE, meta=META)


def made_case():
    """A cine whose carried labels stop at the third of its five frames."""
    cine, labels = (np.moveaxis(array, -1, 0) for array in make_cine(5))
    cine, labels = cine.astype(np.float32), labels[[0, 1, 2, 2, 2]]
    return {
        "case": "a",
        "cine": volume(cine),
        "frames": volume(cine),
        "displacement": volume(np.zeros((15, 32, 28, 6), np.float32)),
        "pred": volume(np.ones((1, 32, 28, 6), np.uint8)),
        "motion": volume(np.ones((1, 32, 28, 6), np.float32)),
        "folding": 0.0,
        "label": volume(labels[:1]),
        "labels": volume(labels),
        "target_label": volume(np.moveaxis(make_cine(5)[1], -1, 0)[-1:]),
    }


@pytest.fixture
def saver(tmp_path):
    return results.CineSaver(tmp_path, {"name": "bundle", "version": "1"}, tmp_path / "model.pt")


def test_the_picture_says_how_the_heart_pumps_by_the_carried_labels_and_by_the_true_ones(saver, tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(results, "cine_overview", lambda *args, title, **kwargs: titles.append(title))
    case = made_case()
    saver.write(tmp_path, "a", case)
    carried, true = (pumping(case["label"], last, AFFINE) for last in (case["labels"][-1:], case["target_label"]))
    assert carried["ejection_fraction"] < true["ejection_fraction"] - 5
    del case["target_label"]
    saver.write(tmp_path, "a", case)
    del case["label"], case["labels"]
    saver.write(tmp_path, "a", case)
    (fraction, true_fraction), (thicker, true_thicker) = (
        (f"{carried[name]:.0f} %", f"{true[name]:.0f} %") for name in ("ejection_fraction", "wall_thickening")
    )
    assert titles == [
        f"a, ejection fraction {fraction} (labels: {true_fraction}), wall thickening {thicker} (labels: {true_thicker})",
        f"a, ejection fraction {fraction}, wall thickening {thicker}",
        "a",
    ]


def test_a_row_has_the_figures_of_the_carried_labels_alone(saver):
    case = made_case()
    carried, row = pumping(case["label"], case["labels"][-1:], AFFINE), saver.figures(case)
    for name, value in carried.items():
        assert row[f"{name}_percent"] == f"{value:.1f}"
    assert row["source_frame"] == row["frames_by"] == ""  # not of one file


def test_a_registration_is_written_as_one_volume_with_the_way_back(tmp_path):
    case = made_case()
    shifted = volume(np.stack([np.full((32, 28, 6), 1.5), *np.zeros((2, 32, 28, 6))]).astype(np.float32))
    pair = {"cine": case["cine"][[0, -1]], "frames": case["frames"][-1:], "labels": case["labels"][-1:]}
    case |= {**pair, "displacement": shifted, "inverse": -shifted, "inverse_consistency": 0.5}
    saver = results.RegistrationSaver(tmp_path, {"name": "bundle", "version": "1"}, tmp_path / "model.pt", gammas=[1.0])
    saver.write(tmp_path, "a", case)
    assert {path.name for path in tmp_path.iterdir()} == {f"a_{ending}" for ending in saver.endings}
    assert np.array_equal(nib.load(tmp_path / "a_warped.nii.gz").get_fdata(), case["frames"][0])
    fields = [nib.load(tmp_path / f"a_{name}.nii.gz").get_fdata() for name in ("displacement", "inverse")]
    assert fields[0].shape == (32, 28, 6, 1, 3) and np.array_equal(fields[0], -fields[1])
    assert (fields[0][..., 0] == 1.5).all() and not fields[0][..., 1:].any()
    row = saver.figures(case)
    assert row["correlation_after"] == "1.0000" and float(row["correlation_before"]) < 1
    assert row["inverse_consistency_mm"] == "0.500"
    assert float(row["lv_first_ml"]) > float(row["lv_last_ml"]), "of the moving volume, and as it was warped"
