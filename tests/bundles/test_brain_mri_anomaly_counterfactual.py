"""The counterfactual bundle as a user runs it: the real weights, made scans."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import (
    BRAIN,
    COUNTERFACTUAL,
    check_made_heads,
    files_below,
    infer_made_heads,
    make_head,
    rows_of,
    run_forked,
    save_nifti,
    save_patient,
)

from scripts.data.sections import section_of


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """A patient, a 4-D file, FLAIR alone and a bad file, after inference."""
    return infer_made_heads(COUNTERFACTUAL, tmp_path_factory.mktemp("counterfactual"))


def test_good_cases_are_finished_although_one_fails(cohort):
    check_made_heads(*cohort)


def test_the_bright_patch_of_a_made_scan_is_healed_more_than_what_is_beside_it(cohort):
    output, _ = cohort
    scan, mask = make_head()
    healthy = np.asarray(nib.load(output / "good_patient" / "good_patient_healthy.nii.gz").dataobj)
    lower, patch = scan[..., 1] - healthy[..., 1], mask > 0
    beside = (scan[..., 1] > 0) & ~patch
    assert lower[patch].mean() > 15 + np.abs(lower[beside].mean())  # of 60


def test_two_runs_give_the_same_bytes_and_no_guidance_gives_the_scan_back(cohort, tmp_path):
    scan, _ = make_head(1)
    save_nifti(tmp_path / "scans" / "a.nii.gz", scan)
    for name, scale in (("one", 10), ("again", 10), ("none", 0)):
        paths = ("--dataset_dir", tmp_path / "scans", "--output_dir", tmp_path / name)
        done = run_forked(COUNTERFACTUAL, "configs/inference.json", *paths, "--guidance_scale", scale, "--num_steps", 10)
        assert done.returncode == 0, done.stderr
    one, again, none = (files_below(tmp_path / name / "a") for name in ("one", "again", "none"))
    assert one == again
    assert one["a_map.nii.gz"] != none["a_map.nii.gz"]
    changes = {}
    for name in ("one", "none"):
        healthy = np.asarray(nib.load(tmp_path / name / "a" / "a_healthy.nii.gz").dataobj)
        changes[name] = np.abs(healthy - scan).mean() / scan.max()
    assert changes["none"] < 0.02 and changes["none"] < changes["one"]


def test_training_starts_from_the_other_bundles_weights_and_resumes_and_its_own_run(tmp_path):
    patients = tmp_path / "patients"
    names = [next(f"p{i}" for i in range(40) if section_of(f"p{i}") == section) for section in ("training", "validation")]
    for seed, name in enumerate(names):
        save_patient(patients, name, seed, num_slices=4)  # every second slice has a lesion
    size = ("--spatial_size", "[32,32]", "--pixdim", "[4.0,4.0,-1.0]")
    start = ("--start_weights", BRAIN / "models" / "model.pt")
    for epochs in (1, 2):
        args = ("--dataset_dir", patients, "--ckpt_dir", tmp_path / "trained", "--output_dir", tmp_path / "log")
        args += ("--epochs", epochs, "--epoch_length", 2, "--batch_size", 2, "--val_interval", 2)
        done = run_forked(COUNTERFACTUAL, "configs/train.json", *args, *size, *start)
        assert done.returncode == 0, done.stderr
    assert "going on from iteration 2" in done.stdout + done.stderr
    weights = tmp_path / "trained" / "model.pt"
    trained = torch.load(weights, weights_only=True)
    assert all(value.dtype == torch.float16 for value in trained.values())
    begun = torch.load(BRAIN / "models" / "model.pt", weights_only=True)["unet.conv_in.conv.weight"].float()
    moved = (trained["unet.conv_in.conv.weight"].float() - begun).abs().max().item()
    assert 0 < moved < 0.01
    paths = ("--dataset_dir", patients, "--output_dir", tmp_path / "out", "--checkpointloader#load_path", weights)
    done = run_forked(COUNTERFACTUAL, "configs/inference.json", *paths, *size, "--num_steps", 1)
    assert done.returncode == 0, done.stderr
    assert len(rows_of(tmp_path / "out" / "results.csv")) == 2
