"""The bundle as a user runs it, from a data set in the Decathlon's layout to the table of its evaluation."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import PANCREAS, rows_of, run_forked
from PIL import Image

from scripts.data.sections import section_of
from scripts.release.phantoms import draw_abdomens, paint_boxes

GRID = ("--pixdim", "[3.2,3.2,-1.0]", "--spatial_size", "[64,32]")
NETWORK = ("--network_def#channels", "[16,32]", "--network_def#classifier_channels", "[16,32,32]")
TRAINING = ("--epochs", 1, "--epoch_length", 2, "--batch_size", 2, "--val_interval", 1)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    """A made data set with enough patients for all sections."""
    folder = tmp_path_factory.mktemp("made") / "Task07"
    names = [f"pancreas_{number:03}" for number in range(1, 60)]
    sections = [section_of(name) for name in names]
    number = 1 + max(sections.index(section) for section in ("training", "validation", "test"))
    draw_abdomens(folder, max(number, 9), shape=(96, 72, 6), spacing=(3.6, 3.6, 6.0))
    return folder


@pytest.fixture(scope="module")
def trained(cohort, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    paths = ("--dataset_dir", cohort, "--ckpt_dir", folder, "--output_dir", folder / "log")
    # all patients, since the made ones of a small section may all be healthy
    whole = ("--train#dataset#data#section", "all", "--validate#dataset#data#section", "all")
    done = run_forked(PANCREAS, "configs/train.json", *paths, *TRAINING, *GRID, *NETWORK, *whole)
    assert done.returncode == 0, done.stderr
    return folder / "model.pt"


def infer(config: str, dataset_dir: Path, output_dir: Path, *args: object):
    paths = ("--dataset_dir", dataset_dir, "--output_dir", output_dir)
    return run_forked(PANCREAS, config, *paths, "--num_steps", 1, "--guidance_steps", 1, *args)


def test_a_data_set_in_the_decathlons_layout_is_trained_on_and_evaluated(cohort, trained, tmp_path):
    weights = ("--checkpointloader#load_path", trained, *GRID, *NETWORK)
    config = "['configs/inference.json','configs/evaluate.json']"
    done = infer(config, cohort, tmp_path / "out", *weights, "--section", "all", "--threshold", 0.001, "--gate", False)
    assert done.returncode == 0, done.stderr
    rows = {row["case"]: row for row in rows_of(tmp_path / "out" / "metrics.csv")}
    assert rows["pancreas_001"]["true_ml"] != "0.0" and rows["pancreas_003"]["auroc"] == "nan", "the third is healthy"
    (case,) = (tmp_path / "out").glob("pancreas_001")
    ct = nib.load(cohort / "imagesTr" / "pancreas_001.nii.gz")
    organ = nib.load(cohort / "labelsTr" / "pancreas_001.nii.gz").get_fdata() > 0
    results = {name: nib.load(case / f"pancreas_001_{name}.nii.gz") for name in ("seg", "map", "healthy")}
    assert all(np.allclose(image.affine, ct.affine) and image.shape == ct.shape for image in results.values())
    found, healthy = results["map"].get_fdata() > 0, results["healthy"].get_fdata()
    assert found.any() and not found[~organ].any(), "nothing is looked for beyond the organ"
    assert np.array_equal(healthy[~organ], ct.get_fdata()[~organ])
    assert not np.array_equal(healthy[organ], ct.get_fdata()[organ])
    inside = ct.get_fdata()[organ]
    assert abs(np.median(healthy[organ]) - np.median(inside)) < 100, "Hounsfield units"
    assert Image.open(case / "pancreas_001_overview.png").format == "PNG"


def test_the_demo_scan_runs_with_the_weights_and_a_ct_without_a_mask_is_told_the_command(tmp_path):
    (tmp_path / "scans").mkdir()
    for name in ("demo.nii.gz", "demo_pancreas.nii.gz"):
        (tmp_path / "scans" / name).write_bytes((PANCREAS / "docs" / name).read_bytes())
    (tmp_path / "scans" / "bare.nii.gz").write_bytes((PANCREAS / "docs" / "demo.nii.gz").read_bytes())
    done = infer("configs/inference.json", tmp_path / "scans", tmp_path / "out")
    assert [row["case"] for row in rows_of(tmp_path / "out" / "results.csv")] == ["demo"]
    assert done.returncode == 1 and "TotalSegmentator -i" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "bare").exists()


def test_the_head_alone_can_be_looked_at_and_what_the_frame_cuts_is_told(tmp_path):
    (tmp_path / "scans").mkdir()
    for name in ("demo.nii.gz", "demo_pancreas.nii.gz"):
        (tmp_path / "scans" / name).write_bytes((PANCREAS / "docs" / name).read_bytes())
    quick = ("--gate", False, "--pixdim", "[3.2,3.2,-1.0]")
    done = infer("configs/inference.json", tmp_path / "scans", tmp_path / "head", *quick, "--organ_share", 0.4)
    assert done.returncode == 0, done.stderr
    seen = nib.load(tmp_path / "head" / "demo" / "demo_map.nii.gz").get_fdata() > 0
    organ = nib.load(PANCREAS / "docs" / "demo_pancreas.nii.gz").get_fdata() > 0
    x = np.flatnonzero(organ.any(axis=(1, 2)))  # from the patient's right to the left
    assert seen.any() and np.flatnonzero(seen.any(axis=(1, 2))).max() <= x[0] + 0.4 * (x[-1] - x[0]) + 1
    cut = infer("configs/inference.json", tmp_path / "scans", tmp_path / "cut", *quick, "--spatial_size", "[32,32]")
    assert cut.returncode == 0 and "of the organ lies beyond the network's frame" in cut.stdout + cut.stderr


def test_training_takes_healthy_pictures_and_masks_of_what_to_paint_into_them(tmp_path):
    names = [f"patient{i}" for i in range(40)]
    (tmp_path / "boxes").mkdir()
    for section in ("training", "validation"):
        name = next(n for n in names if section_of(n) == section)
        pixels = np.random.default_rng(0).normal(150, 8, (64, 64)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "boxes" / f"{name}_1.png")
    paint_boxes(tmp_path / "boxes", tmp_path / "painted", copies=2, size=64)
    paths = ("--dataset_dir", tmp_path / "painted", "--ckpt_dir", tmp_path / "out", "--output_dir", tmp_path / "log")
    config = "['configs/train.json','configs/train_painted.json']"
    small = (*TRAINING, *NETWORK, "--spatial_size", "[64,64]")
    done = run_forked(PANCREAS, config, *paths, *small)
    assert done.returncode == 0, done.stderr
    state = torch.load(tmp_path / "out" / "model.pt", weights_only=True)
    assert state["unet.conv_in.conv.weight"].shape[1] == 4  # one channel, 2 x 2 pixels folded
    again = ("--start_weights", tmp_path / "out" / "model.pt", "--classifier_alone", True, "--ckpt_dir", tmp_path / "more")
    done = run_forked(PANCREAS, config, *paths[:2], *paths[4:], *again, *small)
    assert done.returncode == 0, done.stderr
    assert torch.load(tmp_path / "more" / "model.pt", weights_only=True).keys() == state.keys()
