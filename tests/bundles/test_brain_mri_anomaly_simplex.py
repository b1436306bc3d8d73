"""The simplex bundle as a user runs it: the real weights, made scans (and a real one where there is one)."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import (
    LGG,
    SIMPLEX,
    check_made_heads,
    files_below,
    infer_made_heads,
    make_head,
    rows_of,
    run_forked,
    save_nifti,
    save_patient,
)

from scripts.bundle import configuration
from scripts.data.layouts import find_cases
from scripts.data.sections import section_of
from scripts.metrics import dice


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """A patient, a 4-D file, FLAIR alone and a bad file, after inference."""
    return infer_made_heads(SIMPLEX, tmp_path_factory.mktemp("simplex"))


def test_good_cases_are_finished_although_one_fails(cohort):
    check_made_heads(*cohort)


def test_the_bright_patch_of_a_made_scan_is_found_and_healed(cohort):
    output, _ = cohort
    scan, mask = make_head()
    found, healthy = (
        np.asarray(nib.load(output / "good_patient" / f"good_patient_{ending}.nii.gz").dataobj)
        for ending in ("seg", "healthy")
    )
    patch = mask > 0
    assert found.dtype == np.uint8 and found[patch].any() and not found[~patch.any(axis=2)].any()
    assert scan[..., 1][patch].mean() - healthy[..., 1][patch].mean() > 30  # of 60


def test_two_runs_give_the_same_bytes_and_other_settings_another_map(tmp_path):
    scan, _ = make_head(1)
    save_nifti(tmp_path / "scans" / "a.nii.gz", scan)
    quick = {"num_steps": 2, "num_repeats": 1}
    others = {
        "more": {"num_repeats": 2},
        "deeper": {"noise_level": 500},
        "drawn": {"solver": "ancestral"},
        "seed": {"seed": 1},
    }
    for name, changed in {"one": {}, "again": {}, **others}.items():
        paths = ("--dataset_dir", tmp_path / "scans", "--output_dir", tmp_path / name)
        settings = [part for key, value in {**quick, **changed}.items() for part in (f"--{key}", value)]
        done = run_forked(SIMPLEX, "configs/inference.json", *paths, *settings)
        assert done.returncode == 0, done.stderr
    one, again, *changed = (files_below(tmp_path / name / "a") for name in ("one", "again", *others))
    assert one == again
    assert len({files["a_map.nii.gz"] for files in (one, *changed)}) == 1 + len(others)


def test_training_sees_lesion_free_slices_alone_and_resumes_and_its_weights_run(tmp_path):
    patients = tmp_path / "patients"
    names = [next(f"p{i}" for i in range(40) if section_of(f"p{i}") == section) for section in ("training", "validation")]
    for seed, name in enumerate(names):
        save_patient(patients, name, seed, num_slices=4)  # every second slice has a lesion
    parser = configuration(SIMPLEX, "train")
    parser["dataset_dir"] = str(patients)
    slices = parser.get_parsed_content("train#dataset").slices
    assert [(s["slice"], s["class_label"]) for s in slices] == [(1, 0), (3, 0)]
    size = ("--spatial_size", "[32,32]", "--pixdim", "[8.0,8.0,-1.0]", "--network_def#channels", "[16,32]")
    for epochs in (1, 2):
        args = ("--dataset_dir", patients, "--ckpt_dir", tmp_path / "trained", "--output_dir", tmp_path / "log")
        args += ("--epochs", epochs, "--epoch_length", 2, "--batch_size", 2)
        done = run_forked(SIMPLEX, "configs/train.json", *args, *size)
        assert done.returncode == 0, done.stderr
    assert "going on from iteration 2" in done.stdout + done.stderr
    weights = tmp_path / "trained" / "model.pt"
    assert all(value.dtype == torch.float16 for value in torch.load(weights, weights_only=True).values())
    paths = ("--dataset_dir", patients, "--output_dir", tmp_path / "out", "--checkpointloader#load_path", weights)
    done = run_forked(SIMPLEX, "configs/inference.json", *paths, *size)
    assert done.returncode == 0, done.stderr
    assert len(rows_of(tmp_path / "out" / "results.csv")) == 2


@pytest.mark.skipif(not LGG.is_dir(), reason=f"no real scans at {LGG}")
def test_real_volume_that_was_not_trained_on_gets_its_lesion(tmp_path):
    case = next(c for c in find_cases(LGG, ["t1", "flair", "t1ce"], section="validation") if "HT_7884" in c["case"])
    paths = ("--dataset_dir", LGG / case["case"], "--output_dir", tmp_path)
    done = run_forked(SIMPLEX, "configs/inference.json", *paths)
    assert done.returncode == 0, done.stderr
    found = nib.load(tmp_path / case["case"] / f"{case['case']}_seg.nii.gz").get_fdata()
    assert dice(found, nib.load(case["label"]).get_fdata()) > 0.5
