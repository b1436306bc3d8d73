"""The one-step bundle as a user runs it: the real weights, made scans (and a real one where there is one)."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import (
    LGG,
    ONE_STEP,
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
    return infer_made_heads(ONE_STEP, tmp_path_factory.mktemp("one_step"))


def test_good_cases_are_finished_although_one_fails(cohort):
    check_made_heads(*cohort)


def test_the_bright_patch_of_a_made_scan_is_found_and_healed(cohort):
    output, _ = cohort
    scan, mask = make_head()
    found, healthy = (
        np.asarray(nib.load(output / "good_patient" / f"good_patient_{ending}.nii.gz").dataobj)
        for ending in ("seg", "healthy")
    )
    assert found.dtype == np.uint8 and dice(found, mask) > 0.5
    patch = mask > 0
    assert scan[..., 1][patch].mean() - healthy[..., 1][patch].mean() > 30  # of 60


def test_two_runs_give_the_same_bytes_and_more_steps_another_map(cohort, tmp_path):
    scan, _ = make_head(1)
    save_nifti(tmp_path / "scans" / "a.nii.gz", scan)
    for name, steps in (("one", 1), ("again", 1), ("three", 3)):
        paths = ("--dataset_dir", tmp_path / "scans", "--output_dir", tmp_path / name)
        done = run_forked(ONE_STEP, "configs/inference.json", *paths, "--num_steps", steps)
        assert done.returncode == 0, done.stderr
    one, again, three = (files_below(tmp_path / name / "a") for name in ("one", "again", "three"))
    assert one == again
    assert one["a_map.nii.gz"] != three["a_map.nii.gz"]


def test_training_sees_lesion_free_slices_alone_and_resumes_and_its_weights_run(tmp_path):
    patients = tmp_path / "patients"
    names = [next(f"p{i}" for i in range(40) if section_of(f"p{i}") == section) for section in ("training", "validation")]
    for seed, name in enumerate(names):
        save_patient(patients, name, seed, num_slices=4)  # every second slice has a lesion
    parser = configuration(ONE_STEP, "train")
    parser["dataset_dir"] = str(patients)
    slices = parser.get_parsed_content("train#dataset").slices
    assert [(s["slice"], s["class_label"]) for s in slices] == [(1, 0), (3, 0)]
    size = ("--spatial_size", "[32,32]", "--pixdim", "[8.0,8.0,-1.0]", "--network_def#channels", "[16,32]")
    for epochs in (1, 2):
        args = ("--dataset_dir", patients, "--ckpt_dir", tmp_path / "trained", "--output_dir", tmp_path / "log")
        args += ("--epochs", epochs, "--epoch_length", 2, "--batch_size", 2)
        done = run_forked(ONE_STEP, "configs/train.json", *args, *size)
        assert done.returncode == 0, done.stderr
    assert "going on from iteration 2" in done.stdout + done.stderr
    weights = tmp_path / "trained" / "model.pt"
    assert all(value.dtype == torch.float16 for value in torch.load(weights, weights_only=True).values())
    paths = ("--dataset_dir", patients, "--output_dir", tmp_path / "out", "--checkpointloader#load_path", weights)
    done = run_forked(ONE_STEP, "configs/inference.json", *paths, *size)
    assert done.returncode == 0, done.stderr
    assert len(rows_of(tmp_path / "out" / "results.csv")) == 2


def test_the_autoencoder_beside_it_is_trained_and_runs_on_the_same_rails(tmp_path):
    for section in ("training", "validation"):
        save_patient(tmp_path / "patients", next(f"p{i}" for i in range(40) if section_of(f"p{i}") == section), num_slices=4)
    size = ("--spatial_size", "[32,32]", "--pixdim", "[8.0,8.0,-1.0]", "--dataset_dir", tmp_path / "patients")
    args = ("--ckpt_dir", tmp_path, "--output_dir", tmp_path / "log", "--epochs", 1, "--epoch_length", 2, "--batch_size", 2)
    config = ["configs/train.json", "configs/train_vae.json"]
    done = run_forked(ONE_STEP, str(config), *size, *args, "--val_interval", 1)
    assert done.returncode == 0, done.stderr
    config = ["configs/inference.json", "configs/vae.json"]
    weights = ("--checkpointloader#load_path", tmp_path / "model.pt")
    done = run_forked(ONE_STEP, str(config), *size, "--output_dir", tmp_path / "out", *weights)
    assert done.returncode == 0, done.stderr
    assert len(rows_of(tmp_path / "out" / "results.csv")) == 2


@pytest.mark.skipif(not LGG.is_dir(), reason=f"no real scans at {LGG}")
def test_real_volume_that_was_not_trained_on_gets_its_lesion(tmp_path):
    case = next(c for c in find_cases(LGG, ["t1", "flair", "t1ce"], section="validation") if "HT_7884" in c["case"])
    paths = ("--dataset_dir", LGG / case["case"], "--output_dir", tmp_path)
    done = run_forked(ONE_STEP, "configs/inference.json", *paths)
    assert done.returncode == 0, done.stderr
    found = nib.load(tmp_path / case["case"] / f"{case['case']}_seg.nii.gz").get_fdata()
    assert dice(found, nib.load(case["label"]).get_fdata()) > 0.5
