"""The bundle as a user runs it: the real weights, made scans."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import SEGMENTATION, make_head, rows_of, run_forked, save_nifti, save_patient, save_turned
from PIL import Image

from scripts.data.sections import section_of

QUICK = ("--num_samples", 2, "--num_steps", 2, "--threshold", 0.05)  # on a made head the network is unsure
EVALUATE = ["configs/inference.json", "configs/evaluate.json"]
SMALL = ("--spatial_size", "[32,32]", "--pixdim", "[8.0,8.0,-1.0]", "--network_def#channels", "[16,32]")


def infer(scans: Path, output: Path, *args: object, config: object = "configs/inference.json"):
    paths = ("--dataset_dir", scans, "--output_dir", output)
    done = run_forked(SEGMENTATION, str(config), *paths, *args)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


def test_a_case_gets_mask_uncertainty_picture_and_a_volume_with_its_interval(tmp_path):
    save_patient(tmp_path / "scans", "p")
    infer(tmp_path / "scans", tmp_path / "out", *QUICK)
    endings = ("files.csv", "overview.png", "seg.nii.gz", "uncertainty.nii.gz")
    assert sorted(path.name for path in (tmp_path / "out" / "p").iterdir()) == [f"p_{ending}" for ending in endings]
    scan = nib.load(tmp_path / "scans" / "p" / "p_flair.nii.gz")
    mask, uncertainty = (nib.load(tmp_path / "out" / "p" / f"p_{name}.nii.gz") for name in ("seg", "uncertainty"))
    assert mask.shape == uncertainty.shape == scan.shape and np.allclose(mask.affine, scan.affine)
    assert mask.get_data_dtype() == np.uint8 and uncertainty.get_data_dtype() == np.float32
    assert 0 <= uncertainty.get_fdata().min() and uncertainty.get_fdata().max() <= 1.0001
    assert Image.open(tmp_path / "out" / "p" / "p_overview.png").size[0] > 500
    (row,) = rows_of(tmp_path / "out" / "results.csv")
    assert row["sequences"] == "t1,flair,t1ce" and row["look"] in ("yes", "no")
    low, volume, high = (float(row[f"finding_{name}"]) for name in ("low_ml", "ml", "high_ml"))
    assert 0 <= low < volume < high
    assert volume == pytest.approx(np.asarray(mask.dataobj).sum() * 0.02, abs=1e-3)
    assert 0 <= float(row["agreement"]) <= 1 and float(row["unlike_training"]) > 0


def test_mask_and_uncertainty_lie_on_the_scan_however_it_is_stored(tmp_path):
    scan, _ = make_head()
    save_turned(tmp_path / "scans", scan, np.array([[2.0, 0, 0, -90], [0, 2, 0, -120], [0, 0, 5, 30], [0, 0, 0, 1]]))
    infer(tmp_path / "scans", tmp_path / "out", *QUICK)
    for ending in ("seg", "uncertainty"):
        ras, asl = (nib.load(tmp_path / "out" / n / f"{n}_{ending}.nii.gz") for n in ("ras", "asl"))
        assert ras.shape != asl.shape
        np.testing.assert_allclose(nib.as_closest_canonical(asl).get_fdata(), ras.get_fdata(), atol=1e-3)


@pytest.mark.parametrize("baseline", ["direct", "dropout", "members"])
def test_the_baselines_are_trained_and_evaluated_on_the_same_rails(tmp_path, baseline):
    names = [next(n for n in map(str, range(99)) if section_of(n) == s) for s in ("training", "validation")]
    for seed, name in enumerate(names):
        save_patient(tmp_path / "scans", name, seed, num_slices=4)
    train = ("--ckpt_dir", tmp_path / "model", "--epochs", 1, "--epoch_length", 2, "--batch_size", 2, "--val_interval", 2)
    infer(tmp_path / "scans", tmp_path / "log", *train, *SMALL, config=["configs/train.json", "configs/train_direct.json"])
    weights = tmp_path / "model" / "model.pt"
    chosen = ("--checkpointloader#load_path", weights)
    small = SMALL
    if baseline == "members":
        chosen = ("--member_weights", f"['{weights}','{weights}']", "--network_def#member#channels", "[16,32]")
        small = SMALL[:-2]
    config = [*EVALUATE, f"configs/{baseline}.json"]
    infer(tmp_path / "scans", tmp_path / "out", *chosen, *small, "--section", "all", config=config)
    rows = rows_of(tmp_path / "out" / "metrics.csv")
    assert [row["case"] for row in rows] == [*sorted(names), "mean", "std"]
    assert 0 <= float(rows[-2]["dice"]) <= 1 and (tmp_path / "out" / "reliability.png").is_file()


@pytest.mark.parametrize(("config", "samples"), [("direct", 1), ("dropout", 3)])
def test_the_direct_network_comes_with_weights_and_segments_as_the_ensemble_does(tmp_path, config, samples):
    save_patient(tmp_path / "scans", "p")
    config = ["configs/inference.json", f"configs/{config}.json"]
    infer(tmp_path / "scans", tmp_path / "out", "--num_samples", samples, "--threshold", 0.05, config=config)
    (row,) = rows_of(tmp_path / "out" / "results.csv")
    low, volume, high = (float(row[f"finding_{name}"]) for name in ("low_ml", "ml", "high_ml"))
    assert 0 <= low < volume < high
    assert (float(row["agreement"]) == 1) == (samples == 1)


def test_the_test_of_the_noisy_state_tells_how_much_the_estimate_depends_on_it(tmp_path):
    for name in (next(n for n in map(str, range(99)) if section_of(n) == s) for s in ("training", "validation")):
        save_patient(tmp_path / "scans", name, num_slices=4)
    config = ["configs/train.json", "configs/noisy_state.json"]
    infer(tmp_path / "scans", tmp_path / "out", "--noise_levels", 2, config=config)
    rows = rows_of(tmp_path / "out" / "noisy_state.csv")
    assert [row["level"] for row in rows] == ["1000"] * 4 + ["500"] * 4
    usual = [row for row in rows if row["state"] == "noised truth"]
    assert all(row["agreement"] == "1.0" and float(row["change"]) == 0 for row in usual)


def test_a_scan_with_a_missing_sequence_says_what_stands_in(tmp_path):
    scan, _ = make_head()
    save_nifti(tmp_path / "scans" / "flair.nii.gz", scan[..., 1])
    infer(tmp_path / "scans", tmp_path / "out", *QUICK)
    (row,) = rows_of(tmp_path / "out" / "results.csv")
    assert row["sequences"] == "t1<-flair,flair,t1ce<-flair"
