"""The bundle as a user runs it: processes of their own, the real weights, made scans (and a real one where there is one)."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import LGG, files_below, make_head, rows_of, run, run_forked, save_nifti, save_patient
from PIL import Image

from scripts.bundle import configuration
from scripts.data.layouts import find_cases
from scripts.data.sections import SECTIONS, section_of
from scripts.metrics import dice

QUICK = ("--num_steps", 2, "--guidance_steps", 1, "--spatial_size", "[64,64]", "--pixdim", "[4.0,4.0,-1.0]")
SMALL = ("--network_def#channels", "[16,32]", "--network_def#classifier_channels", "[16,32,32]")


def infer(bundle: Path, dataset_dir: Path, output_dir: Path, *args: object) -> subprocess.CompletedProcess:
    paths = ("--dataset_dir", dataset_dir, "--output_dir", output_dir)
    return run_forked(bundle, "configs/inference.json", *paths, *QUICK, *args)


@pytest.fixture(scope="module")
def cohort(bundle, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """A cohort of three good cases, one layout each, and of every kind of bad one, after inference."""
    scans = tmp_path_factory.mktemp("scans")
    scan, _ = make_head()
    save_patient(scans, "good_patient")
    save_nifti(scans / "good_4d.nii.gz", scan)
    save_nifti(scans / "good_flair_only.nii.gz", scan[..., 1])
    save_nifti(scans / "bad_two_sequences.nii.gz", scan[..., :2])
    save_patient(scans, "bad_shapes")
    elsewhere = np.diag([2.0, 2.0, 5.0, 1.0])
    elsewhere[0, 3] = 999
    save_nifti(scans / "bad_shapes" / "bad_shapes_t1.nii.gz", scan[:100, ..., 0], elsewhere)
    with_nan = scan.astype(np.float32)
    with_nan[64, 64, 1, 1] = np.nan
    save_nifti(scans / "bad_nan.nii.gz", with_nan)
    save_nifti(scans / "bad_empty.nii.gz", np.zeros_like(scan))
    save_nifti(scans / "bad_flat.nii.gz", scan[:, :, 0, 0])
    cut = save_nifti(scans / "bad_truncated.nii.gz", scan)
    cut.write_bytes(cut.read_bytes()[:5000])
    output = scans.parent / "cohort_output"
    paths = ("--dataset_dir", scans, "--output_dir", output)
    return output, run(bundle, "configs/inference.json", *paths, *QUICK)


def test_good_cases_are_finished_although_others_fail(cohort):
    output, done = cohort
    assert sorted(row["case"] for row in rows_of(output / "results.csv")) == ["good_4d", "good_flair_only", "good_patient"]
    for case in ("good_4d", "good_flair_only", "good_patient"):
        endings = ("files.csv", "healthy.nii.gz", "map.nii.gz", "overview.png", "seg.nii.gz")
        assert sorted(p.name for p in (output / case).iterdir()) == [f"{case}_{ending}" for ending in endings]


@pytest.mark.parametrize(
    ("case", "mend"),
    [
        ("bad_two_sequences", "this bundle wants 3 (t1, flair, t1ce)"),
        ("bad_shapes", "bad_shapes_t1.nii.gz: it covers 0 % of it; give files of one scan"),
        ("bad_nan", "NaN or infinite voxels"),
        ("bad_empty", "empty"),
        ("bad_flat", "2-D image, this bundle wants 3-D"),
        ("bad_truncated", "copy it again"),
    ],
)
def test_bad_case_gets_one_line_with_file_and_mend_and_leaves_nothing(cohort, case, mend):
    output, done = cohort
    assert done.returncode == 1
    report = done.stderr[done.stderr.index("6 case(s) failed:") :]
    (line,) = [line for line in report.splitlines() if line.startswith(f"{case}: ")]
    assert ".nii.gz" in line and mend in line
    assert "Traceback" not in done.stderr + done.stdout
    assert not [name for name in files_below(output) if case in name]


def save_stored_as(path: Path, axcodes: str, voxels: np.ndarray) -> None:
    """Write voxels (RAS, 2 x 2 x 5 mm, not at the origin) with other axes, and the affine that says so."""
    image = nib.Nifti1Image(voxels, np.array([[2.0, 0, 0, -90], [0, 2, 0, -120], [0, 0, 5, 30], [0, 0, 0, 1]]))
    turn = nib.orientations.ornt_transform(nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(axcodes))
    turned = image.as_reoriented(turn)
    save_nifti(path, np.asarray(turned.dataobj), turned.affine)


def test_figures_and_slice_labels_do_not_depend_on_how_a_scan_and_its_mask_are_stored(bundle, tmp_path):
    scan, mask = make_head(num_slices=5)
    mask[..., 3:] = 0  # not the same upside down
    ways = {"ras": ("RAS", "RAS"), "asl": ("ASL", "LPS"), "lpi": ("LPI", "RAS"), "rai": ("RAS", "RAI")}
    for case, (image_axes, mask_axes) in ways.items():
        for channel, sequence in enumerate(("t1", "flair", "t1ce")):
            axes = "PIR" if (case, sequence) == ("rai", "t1ce") else image_axes
            save_stored_as(tmp_path / "scans" / case / f"{case}_{sequence}.nii.gz", axes, scan[..., channel])
        save_stored_as(tmp_path / "scans" / case / f"{case}_seg.nii.gz", mask_axes, mask)
    paths = ("--dataset_dir", tmp_path / "scans", "--output_dir", tmp_path / "out", "--section", "all")
    config = "['configs/inference.json','configs/evaluate.json']"
    found = ("--gate", False, "--skip_below", 0, "--threshold", 0.05, "--min_volume", 0)  # a few steps find little
    done = run_forked(bundle, config, *paths, *QUICK, *found, "--handlers#0#picture", False)
    assert done.returncode == 0, done.stderr
    results = {row["case"]: row for row in rows_of(tmp_path / "out" / "results.csv")}
    metrics = {row["case"]: row for row in rows_of(tmp_path / "out" / "metrics.csv")}
    assert float(results["ras"]["score"]) > 0 and metrics["ras"]["num_slices"] == "5" and float(metrics["ras"]["dice"]) > 0
    for case in ways:
        for table, columns in (
            (results, ("finding_ml", "score", "probability", "unlike_training")),
            (metrics, list(metrics["ras"])[1:]),
        ):
            for column in columns:
                assert float(table[case][column]) == pytest.approx(float(table["ras"][column]), rel=1e-3, abs=2e-5), column

    cases = {case["case"]: case for case in find_cases(tmp_path / "scans", ("t1", "flair", "t1ce"))}
    preprocessing = configuration(bundle, "train").get_parsed_content("preprocessing")
    slices = {name: [(s["slice"], s["class_label"]) for s in preprocessing(case)] for name, case in cases.items()}
    assert slices["ras"] == [(0, 1), (1, 0), (2, 1), (3, 0), (4, 0)] and all(s == slices["ras"] for s in slices.values())


def test_four_dimensional_file_and_list_of_files_give_the_same(cohort):
    output, _ = cohort
    for ending in ("seg", "map", "healthy"):
        one, other = (output / c / f"{c}_{ending}.nii.gz" for c in ("good_4d", "good_patient"))
        assert np.array_equal(nib.load(one).get_fdata(), nib.load(other).get_fdata())


def test_mask_is_uint8_on_the_grid_of_the_scan_and_healthy_scan_has_its_units(cohort):
    output, _ = cohort
    mask = nib.load(output / "good_patient" / "good_patient_seg.nii.gz")
    healthy = nib.load(output / "good_patient" / "good_patient_healthy.nii.gz")
    assert mask.get_data_dtype() == np.uint8 and mask.shape == (128, 128, 3)
    assert np.allclose(mask.affine, np.diag([2, 2, 5, 1]))
    assert healthy.shape == (128, 128, 3, 3)
    assert 60 < np.median(healthy.get_fdata()[50:60, 50:60]) < 120  # the made head has 90


def test_second_run_skips_finished_cases_and_same_seed_gives_same_bytes(bundle, tmp_path):
    save_patient(tmp_path / "scans", "p1", num_slices=2)
    for output in ("first", "second"):
        assert infer(bundle, tmp_path / "scans", tmp_path / output).returncode == 0
    first, second = (files_below(tmp_path / output) for output in ("first", "second"))
    del first["results.csv"], second["results.csv"]  # they hold seconds
    assert first == second and len(first) == 5
    before = (tmp_path / "first" / "results.csv").stat().st_mtime_ns
    again = infer(bundle, tmp_path / "scans", tmp_path / "first")
    assert again.returncode == 0 and "finished already" in again.stdout
    assert (tmp_path / "first" / "results.csv").stat().st_mtime_ns == before


def test_unwritable_output_folder_ends_with_one_clear_line(bundle, tmp_path):
    save_patient(tmp_path / "scans", "p1")
    (tmp_path / "file").write_text("in the way")
    done = infer(bundle, tmp_path / "scans", tmp_path / "file")
    assert done.returncode == 1 and "choose another --output_dir" in done.stderr
    assert "Traceback" not in done.stderr


def test_ddpm_mode_and_paper_solver_run_by_settings(bundle, tmp_path):
    save_patient(tmp_path / "scans", "p1", num_slices=1)
    assert infer(bundle, tmp_path / "scans", tmp_path / "ddpm", "--mode", "ddpm").returncode == 0
    paper = ("--solver", "ddim", "--guidance_steps", "0", "--smoothing", "0")
    assert infer(bundle, tmp_path / "scans", tmp_path / "ddim", *paper).returncode == 0
    maps = [nib.load(tmp_path / mode / "p1" / "p1_map.nii.gz").get_fdata() for mode in ("ddpm", "ddim")]
    assert not np.array_equal(*maps)


def test_evaluation_writes_metrics_of_every_case(bundle, tmp_path):
    for name in ("p1", "p2"):
        save_patient(tmp_path / "scans", name, num_slices=2)
    args = ("--dataset_dir", tmp_path / "scans", "--output_dir", tmp_path / "out", "--section", "all", *QUICK)
    done = run_forked(bundle, "['configs/inference.json','configs/evaluate.json']", *args)
    assert done.returncode == 0, done.stderr
    rows = {row["case"]: row for row in rows_of(tmp_path / "out" / "metrics.csv")}
    assert list(rows) == ["p1", "p2", "mean", "std"]
    mask = nib.load(tmp_path / "out" / "p1" / "p1_seg.nii.gz").get_fdata()
    label = nib.load(tmp_path / "scans" / "p1" / "p1_seg.nii.gz").get_fdata()
    assert float(rows["p1"]["dice"]) == pytest.approx(dice(mask, label))


def test_training_resumes_and_its_weights_run(bundle, tmp_path):
    patients = [f"p{i}" for i in range(40)]
    chosen = [next(p for p in patients if section_of(p) == section) for section in ("training", "validation")]
    for name in chosen:
        save_patient(tmp_path / "scans", name, num_slices=4)
    args = ["--dataset_dir", tmp_path / "scans", "--ckpt_dir", tmp_path / "ckpt", "--output_dir", tmp_path / "log"]
    args += ["--epoch_length", 1, "--batch_size", 2, "--val_interval", 1, *QUICK[4:], *SMALL]
    assert run_forked(bundle, "configs/train.json", *args, "--epochs", 1).returncode == 0
    done = run_forked(bundle, "configs/train.json", *args, "--epochs", 2, "--augment", True)
    assert done.returncode == 0 and "going on from iteration 1" in done.stdout
    assert any(p.name.startswith("events") for p in (tmp_path / "log").iterdir())
    state = torch.load(tmp_path / "ckpt" / "model.pt", weights_only=True)
    assert all(v.dtype == torch.float16 for v in state.values())
    weights = ("--checkpointloader#load_path", tmp_path / "ckpt" / "model.pt")
    assert infer(bundle, tmp_path / "scans", tmp_path / "out", *weights, *SMALL).returncode == 0


def test_images_of_two_folders_are_trained_on_healed_and_evaluated(bundle, tmp_path):
    scan, _ = make_head(num_slices=2)
    patients = [f"patient{i}" for i in range(40)]
    chosen = {section: next(p for p in patients if section_of(p) == section) for section in SECTIONS}
    for number, folder in enumerate(("healthy", "diseased")):
        (tmp_path / "images" / folder).mkdir(parents=True)
        for name in chosen.values():
            pixels = Image.fromarray(scan[:, :, 1 - number, 1]).resize((100, 150))
            pixels.save(tmp_path / "images" / folder / f"{name}_1.png")
    args = ["--dataset_dir", tmp_path / "images", "--ckpt_dir", tmp_path / "ckpt", "--output_dir", tmp_path / "log"]
    args += ["--epochs", 1, "--epoch_length", 1, "--batch_size", 2, "--val_interval", 1, *QUICK[4:6], *SMALL]
    done = run_forked(bundle, "['configs/train.json','configs/train_images.json']", *args)
    assert done.returncode == 0, done.stderr
    weights = tmp_path / "ckpt" / "model.pt"
    state = torch.load(weights, weights_only=True)
    assert state["unet.conv_in.conv.weight"].shape[1] == 4  # one channel, 2 x 2 pixels folded

    def run_on_images(dataset_dir, output, *configs):
        config = str([f"configs/{name}.json" for name in ("inference", "inference_images", *configs)])
        paths = ("--dataset_dir", dataset_dir, "--output_dir", tmp_path / output, "--checkpointloader#load_path", weights)
        done = run_forked(bundle, config, *paths, *QUICK[:6], *SMALL)
        assert done.returncode == 0, done.stderr
        return tmp_path / output

    out = run_on_images(tmp_path / "images", "evaluation", "evaluate_images")
    rows = {row["case"]: row for row in rows_of(out / "metrics.csv")}
    healthy, diseased = (f"{folder}_{chosen['test']}_1" for folder in ("healthy", "diseased"))
    assert list(rows) == [healthy, diseased, "mean", "std"]
    assert [float(rows[case]["class_label"]) for case in (healthy, diseased)] == [0, 1]
    summary = json.loads((out / "metrics_summary.json").read_text())
    assert summary["num_healthy"] == summary["num_diseased"] == 1 and summary["auroc"] in (0, 0.5, 1)

    out = run_on_images(tmp_path / "images" / "diseased", "unlabelled")  # pictures of no class
    case = f"{chosen['test']}_1"
    assert len(rows_of(out / "results.csv")) == 3
    with Image.open(tmp_path / "images" / "diseased" / f"{case}.png") as picture:
        grey = np.asarray(picture, dtype=float).T[:, :, None]
    found = {ending: nib.load(out / case / f"{case}_{ending}.nii.gz") for ending in ("seg", "map", "healthy")}
    assert all(image.shape == (100, 150, 1) for image in found.values())
    assert np.corrcoef(found["healthy"].get_fdata().ravel(), grey.ravel())[0, 1] > 0.5  # not turned, and in its grey levels
    assert (out / case / f"{case}_overview.png").is_file()


@pytest.mark.skipif(not LGG.is_dir(), reason=f"no real scans at {LGG}")
def test_real_volume_that_was_not_trained_on_gets_its_lesion(bundle, tmp_path):
    name = next(p.name for p in sorted(LGG.iterdir()) if section_of(p.name) == "validation")
    (tmp_path / "scans").mkdir()
    os.symlink(LGG / name, tmp_path / "scans" / name)
    done = run_forked(
        bundle, "configs/inference.json", "--dataset_dir", tmp_path / "scans", "--output_dir", tmp_path / "out"
    )
    assert done.returncode == 0, done.stderr
    mask = nib.load(tmp_path / "out" / name / f"{name}_seg.nii.gz").get_fdata()
    label = nib.load(LGG / name / f"{name}_seg.nii.gz").get_fdata()
    assert dice(mask, label) > 0.4
