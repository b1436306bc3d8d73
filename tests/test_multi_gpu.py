"""Several processes, started by torchrun as a user does, do together what one does (gloo, on the CPU)."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    BRAIN,
    CARDIAC,
    CHEST,
    COUNTERFACTUAL,
    HEAD_CT,
    ONE_STEP,
    SEGMENTATION,
    SIMPLEX,
    finished,
    make_cine,
    make_ct_slice,
    rows_of,
    run_forked,
    save_nifti,
    save_patient,
    torchrun,
)
from PIL import Image
from small_runs import TINY, losses

from scripts.data.sections import section_of

# settings of the trainings by bundle and overlay, to be quick
BRAIN_SIZES = ("--spatial_size", "[32,32]", "--pixdim", "[4.0,4.0,-1.0]")
SMALL = {
    ("brain",): (*BRAIN_SIZES, "--network_def#channels", "[16,32]", "--network_def#classifier_channels", "[16,32,32]"),
    ("one_step",): (*BRAIN_SIZES, "--network_def#channels", "[16,32]"),
    ("simplex",): (*BRAIN_SIZES, "--network_def#channels", "[16,32]"),
    ("counterfactual",): (*BRAIN_SIZES, "--network_def#channels", "[16,32]"),
    ("segmentation",): (*BRAIN_SIZES, "--network_def#channels", "[16,32]"),
    ("segmentation", "direct"): (*BRAIN_SIZES, "--network_def#channels", "[16,32]"),
    ("head_ct", "autoencoder"): (),
    ("head_ct",): ("--network_def#unet_channels", "[32,32]"),
    ("chest",): (*TINY["image"], "--spatial_size", "[16,16]"),
    ("chest", "medvdm"): (*TINY["medvdm"], "--spatial_size", "[16,16]"),
    ("cardiac",): ("--spatial_size", "[32,32,8]"),
    ("cardiac", "voxelmorph"): ("--spatial_size", "[32,32,8]"),
}


@pytest.fixture(scope="module")
def patients(tmp_path_factory) -> Path:
    """Two patients for the training and one for the validation."""
    folder = tmp_path_factory.mktemp("patients")
    names = [f"p{i}" for i in range(40)]
    training = [name for name in names if section_of(name) == "training"][:2]
    for name in (*training, next(name for name in names if section_of(name) == "validation")):
        save_patient(folder, name, num_slices=4)
    return folder


@pytest.fixture(scope="module")
def cines(tmp_path_factory) -> Path:
    """Four cines for the training and one for the validation."""
    folder = tmp_path_factory.mktemp("cines")
    names = [f"p{i}" for i in range(40)]
    training = [name for name in names if section_of(name) == "training"][:4]
    for seed, name in enumerate((*training, next(name for name in names if section_of(name) == "validation"))):
        save_nifti(folder / f"{name}.nii.gz", make_cine(4, seed)[0], np.diag([1.5, 1.5, 3.15, 1.0]))
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(36):
        Image.fromarray(make_ct_slice(i)).save(folder / f"{i:03}.png")
    return folder


@pytest.mark.parametrize(
    ("case", "bundle", "overlay"),
    [
        ("brain", BRAIN, ()),
        ("one_step", ONE_STEP, ()),
        ("simplex", SIMPLEX, ()),
        ("counterfactual", COUNTERFACTUAL, ()),
        ("segmentation", SEGMENTATION, ()),
        ("segmentation", SEGMENTATION, ("direct",)),
        ("head_ct", HEAD_CT, ("autoencoder",)),
        ("head_ct", HEAD_CT, ()),
    ]
    + [("chest", CHEST, ()), ("chest", CHEST, ("medvdm",)), ("cardiac", CARDIAC, ()), ("cardiac", CARDIAC, ("voxelmorph",))],
)
def test_training_in_two_processes_is_that_of_one_with_twice_the_batch(request, tmp_path, case, bundle, overlay):
    data = request.getfixturevalue({"head_ct": "pictures", "chest": "pictures", "cardiac": "cines"}.get(case, "patients"))
    files = ["configs/train.json", *(f"configs/train_{stage}.json" for stage in overlay)]
    states = {}
    for name, batch_size in (("one", 4), ("two", 2)):
        args = ["--dataset_dir", data, "--ckpt_dir", tmp_path / name, "--output_dir", tmp_path / name / "log"]
        args += ["--epochs", 1, "--epoch_length", 3, "--batch_size", batch_size, *SMALL[(case, *overlay)]]
        if name == "one":
            done = run_forked(bundle, str(files), *args)
            assert done.returncode == 0, done.stderr
        else:
            finished(torchrun(bundle, str([*files, "configs/multi_gpu_train.json"]), *args))
        states[name] = torch.load(tmp_path / name / "model.pt", weights_only=True)
    assert losses(tmp_path / "two" / "log") == pytest.approx(losses(tmp_path / "one" / "log"), rel=1e-4)
    for key, value in states["one"].items():
        torch.testing.assert_close(states["two"][key], value, rtol=0.02, atol=2e-3, msg=lambda m, key=key: f"{key}: {m}")


def test_a_cohort_is_shared_and_every_case_done_once_also_when_a_process_was_killed(tmp_path):
    names = [f"p{i}" for i in range(5)]
    for number, name in enumerate(names):
        save_patient(tmp_path / "scans", name, seed=number, num_slices=1)
    (tmp_path / "scans" / "bad.nii.gz").write_bytes(b"no scan")
    args = ["--dataset_dir", tmp_path / "scans", "--output_dir", tmp_path / "out", "--num_steps", 1, "--guidance_steps", 1]
    config = "['configs/inference.json','configs/multi_gpu_inference.json']"
    process = torchrun(BRAIN, config, *args, start_new_session=True)
    while process.poll() is None and not (tmp_path / "out" / "results.csv").is_file():
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = {row["case"]: row for row in rows_of(tmp_path / "out" / "results.csv")}
    assert before

    process = torchrun(BRAIN, config, *args)
    _, errors = process.communicate()
    assert process.returncode == 1 and "1 case(s) failed" in errors
    rows = rows_of(tmp_path / "out" / "results.csv")
    assert sorted(row["case"] for row in rows) == names
    assert all(row == before.get(row["case"], row) for row in rows), "a finished case was done again"
    assert [row["case"] for row in rows_of(tmp_path / "out" / "failures.csv")] == ["bad"]
    folders = {path.name for path in (tmp_path / "out").iterdir() if path.is_dir() and not path.name.startswith(".")}
    assert folders == set(names)
