"""The registration bundle around a network whose motion is known exactly: made volumes of a heart."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import monai.bundle
import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import REGISTRATION, make_cine, rows_of, run, save_nifti
from stand_in import Shrinking

SPACING = np.diag([1.4, 1.4, 10.0, 1.0])
RESULTS = ("displacement.nii.gz", "files.csv", "inverse.nii.gz", "overview.png", "seg.nii.gz", "warped.nii.gz")


@pytest.fixture
def infer_here(tmp_path, monkeypatch) -> Callable[..., None]:
    """The bundle's inference in this process, with the stand-in in the network's place."""

    def infer_here(output_dir: Path, *configs: str, **changes: object) -> None:
        torch.save(Shrinking(rate=0.2).state_dict(), tmp_path / "model.pt")
        override = {"network_def#_target_": "stand_in.Shrinking", "checkpointloader#load_path": str(tmp_path / "model.pt")}
        (tmp_path / "stand_in.json").write_text(json.dumps(override))
        files = [f"configs/{name}.json" for name in ("inference", *configs)] + [str(tmp_path / "stand_in.json")]
        changes |= {"output_dir": str(output_dir)}
        monkeypatch.chdir(REGISTRATION)
        monai.bundle.run(config_file=files, meta_file="configs/metadata.json", logging_file=False, **changes)

    return infer_here


def load(output: Path, case: str, ending: str) -> nib.Nifti1Image:
    return nib.load(output / case / f"{case}_{ending}.nii.gz")


def test_two_files_are_registered_on_the_grid_of_the_fixed_one(infer_here, tmp_path):
    cine, labels = make_cine(5)
    moving = save_nifti(tmp_path / "a.nii.gz", cine[..., 0], SPACING)
    turned = nib.Nifti1Image(cine[..., -1], SPACING).as_reoriented(np.array([[1, -1], [2, 1], [0, 1]]))
    fixed = save_nifti(tmp_path / "b.nii.gz", np.asarray(turned.dataobj), turned.affine)
    label = save_nifti(tmp_path / "c.nii.gz", labels[..., 0], SPACING)
    output = tmp_path / "out"
    infer_here(output, moving=str(moving), fixed=str(fixed), moving_label=str(label))
    names = (*RESULTS, "labels.nii.gz")
    assert sorted(p.name for p in (output / "a_to_b").iterdir()) == sorted(f"a_to_b_{name}" for name in names)
    warped, field, inverse = (load(output, "a_to_b", name) for name in ("warped", "displacement", "inverse"))
    assert warped.shape == turned.shape and np.allclose(warped.affine, turned.affine)
    assert field.shape == inverse.shape == (*turned.shape, 1, 3) and field.header.get_intent()[0] == "displacement vector"
    assert load(output, "a_to_b", "labels").get_data_dtype() == np.uint8
    (row,) = rows_of(output / "results.csv")
    assert float(row["ejection_fraction_percent"]) > 10 and float(row["inverse_consistency_mm"]) > 1
    assert float(row["correlation_after"]) != float(row["correlation_before"])


def test_fractions_of_the_way_make_a_file_of_several_volumes(infer_here, tmp_path):
    path = save_nifti(tmp_path / "a_ed2es.nii.gz", make_cine(5)[0], SPACING)
    infer_here(tmp_path / "out", dataset_dir=str(path), etas=[0.0, 0.5, 1.0])
    warped = np.asarray(load(tmp_path / "out", "a_ed2es", "warped").dataobj)
    assert warped.shape == (32, 28, 6, 3) and np.array_equal(warped[..., 0], make_cine(5)[0][..., 0])
    assert not np.array_equal(warped[..., 1], warped[..., 2])


def test_the_way_back_can_be_left_out(infer_here, tmp_path):
    path = save_nifti(tmp_path / "a_ed2es.nii.gz", make_cine(5)[0], SPACING)
    infer_here(tmp_path / "out", dataset_dir=str(path), inverse=False)
    assert not list((tmp_path / "out").glob("*/*_inverse.nii.gz"))
    assert rows_of(tmp_path / "out" / "results.csv")[0]["inverse_consistency_mm"] == ""


def test_evaluation_measures_the_frames_between_and_both_directions(infer_here, tmp_path):
    cine, labels = make_cine(5)
    save_nifti(tmp_path / "scans" / "p2" / "p2_ed2es.nii.gz", cine, SPACING)
    for end, k in (("ed", 0), ("es", 4)):
        save_nifti(tmp_path / "scans" / "p2" / f"p2_{end}_gt.nii.gz", labels[..., k], SPACING)
    rows = {}
    for backward in (False, True):
        output = tmp_path / f"out_{backward}"
        infer_here(output, "evaluate", dataset_dir=str(tmp_path / "scans"), backward=backward, section="all")
        rows[backward] = rows_of(output / "metrics.csv")[0]
    assert [row["case"] for row in rows.values()] == ["p2", "p2_backward"]
    assert rows[False]["frames"] == "5" and float(rows[False]["inverse_consistency_mm"]) > 0
    dice = [float(row["dice_after"]) for row in rows.values()]
    assert dice[0] > dice[1], "what shrinks goes from end-diastole to end-systole, and not back"
    assert float(rows[False]["dice_before"]) == pytest.approx(float(rows[True]["dice_before"]))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("--moving", "a.nii.gz"), "--moving and --fixed go together"),
        (("--moving", "nowhere.nii.gz", "--fixed", "b.nii.gz"), "nowhere.nii.gz"),
    ],
)
def test_what_is_no_pair_gets_one_line(tmp_path, settings, words):
    done = run(REGISTRATION, "configs/inference.json", *settings, "--output_dir", tmp_path / "out")
    assert done.returncode == 1 and words in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
