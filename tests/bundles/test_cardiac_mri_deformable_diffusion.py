"""The cardiac bundle around a network whose motion is known exactly: real processes, made cines."""

from __future__ import annotations

import json
import logging
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import monai.bundle
import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT, files_below, finished, make_cine, rows_of, run, save_nifti, save_turned, torchrun
from monai.bundle import ConfigParser
from PIL import Image
from scipy import ndimage
from stand_in import Shrinking

from scripts.release.report import report

BUNDLE = ROOT / "bundles" / "cardiac_mri_deformable_diffusion"
SPACING = np.diag([1.4, 1.4, 10.0, 1.0])
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT / "tests")}  # where the stand-in is found
RESULTS = ("cine.gif", "cine.nii.gz", "displacement.nii.gz", "files.csv", "overview.png", "seg.nii.gz")


@pytest.fixture(scope="session")
def settings(tmp_path_factory) -> Path:
    """Override file that puts the stand-in in the network's place."""
    folder = tmp_path_factory.mktemp("settings")
    torch.save(Shrinking(rate=0.2).state_dict(), folder / "model.pt")
    override = {
        "network_def#_target_": "stand_in.Shrinking",
        "checkpointloader#load_path": str(folder / "model.pt"),
    }
    (folder / "stand_in.json").write_text(json.dumps(override))
    return folder / "stand_in.json"


def infer(settings: Path, dataset_dir: Path, output_dir: Path, *args: object) -> subprocess.CompletedProcess:
    files = ["configs/inference.json", str(settings)]
    return run(BUNDLE, str(files), "--dataset_dir", dataset_dir, "--output_dir", output_dir, *args, env=ENVIRONMENT)


@pytest.fixture
def infer_here(settings, monkeypatch) -> Callable[..., None]:
    """The same in this process, which saves the time to start one."""

    def infer_here(dataset_dir: Path, output_dir: Path, *configs: str, **changes: object) -> None:
        files = [f"configs/{name}.json" for name in ("inference", *configs)] + [str(settings)]
        changes |= {"dataset_dir": str(dataset_dir), "output_dir": str(output_dir)}
        monkeypatch.chdir(BUNDLE)
        monai.bundle.run(config_file=files, meta_file="configs/metadata.json", logging_file=False, **changes)

    return infer_here


def load(output: Path, case: str, ending: str) -> nib.Nifti1Image:
    return nib.load(output / case / f"{case}_{ending}.nii.gz")


@pytest.fixture(scope="module")
def cohort(settings, tmp_path_factory) -> tuple[Path, Path, subprocess.CompletedProcess]:
    """Good cases of several kinds and bad ones, after inference."""
    scans, output = tmp_path_factory.mktemp("scans"), tmp_path_factory.mktemp("cines") / "output"
    cine, labels = make_cine(5)
    save_turned(scans, cine, SPACING)
    save_nifti(scans / "thin.nii.gz", cine, np.diag([1.0, 1.0, 10.0, 1.0]))
    save_nifti(scans / "ras_ed_gt.nii.gz", labels[..., 0], SPACING)
    save_nifti(scans / "pair" / "pair_ed.nii.gz", cine[..., 0], SPACING)
    save_nifti(scans / "pair" / "pair_es.nii.gz", cine[..., -1], SPACING)
    save_nifti(scans / "bad_single.nii.gz", cine[..., 0], SPACING)
    save_nifti(scans / "bad_still.nii.gz", cine[..., [0, 0]], SPACING)
    save_nifti(scans / "bad_label.nii.gz", cine, SPACING)
    elsewhere = SPACING.copy()
    elsewhere[0, 3] = 40
    save_nifti(scans / "bad_label_ed_gt.nii.gz", labels[..., 0], elsewhere)
    save_nifti(scans / "bad_pair" / "x_ed.nii.gz", cine[..., 0], SPACING)
    save_nifti(scans / "bad_pair" / "x_es.nii.gz", cine[:-1, ..., -1], elsewhere)
    return scans, output, infer(settings, scans, output, "--num_frames", 4, "--assumed_spacing", "[1.5,1.5,10]")


def test_good_cases_are_finished_although_others_fail(cohort):
    _, output, done = cohort
    assert sorted(row["case"] for row in rows_of(output / "results.csv")) == ["asl", "pair", "ras", "thin"]
    for case in ("asl", "pair", "ras", "thin"):
        extra = ("labels.nii.gz",) if case == "ras" else ()
        assert sorted(p.name for p in (output / case).iterdir()) == sorted(f"{case}_{e}" for e in RESULTS + extra)
    assert "thin.nii.gz: lost spacing" in done.stdout


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("bad_single", "bad_single.nii.gz: a single frame"),
        ("bad_still", "source and target are the same image"),
        ("bad_label", "bad_label_ed_gt.nii.gz: its field of view does not meet that of"),
        ("bad_pair", "x_es.nii.gz: its field of view does not meet that of"),
    ],
)
def test_a_bad_case_gets_one_line_with_file_and_mend_and_leaves_nothing(cohort, case, words):
    _, output, done = cohort
    assert done.returncode == 1
    report = done.stderr[done.stderr.index("4 case(s) failed:") :]
    (line,) = [line for line in report.splitlines() if line.startswith(f"{case}: ")]
    assert words in line and "Traceback" not in done.stderr + done.stdout
    assert not [name for name in files_below(output) if case in name]


@pytest.mark.parametrize("case", ["ras", "asl", "thin", "pair"])
def test_the_first_frame_is_the_source_voxel_by_voxel_on_the_scans_own_grid(cohort, case):
    scans, output, _ = cohort
    scan = nib.load(scans / ("pair/pair_ed.nii.gz" if case == "pair" else f"{case}.nii.gz"))
    cine = load(output, case, "cine")
    assert cine.shape == (*scan.shape[:3], 4) and np.array_equal(cine.affine, scan.affine)
    assert cine.get_data_dtype() == np.float32
    source = np.asarray(scan.dataobj)
    assert np.array_equal(np.asarray(cine.dataobj)[..., 0], source if source.ndim == 3 else source[..., 0])


def test_the_displacement_is_the_networks_in_mm_of_the_world(cohort):
    _, output, _ = cohort
    field = load(output, "ras", "displacement")
    assert field.shape == (32, 28, 6, 4, 3) and field.header.get_intent()[0] == "displacement vector"
    middle = np.array([31, 27, 5]) / 2 * [1.4, 1.4, 10]
    offset = np.stack(np.meshgrid(*(np.arange(n) for n in (32, 28, 6)), indexing="ij"), axis=-1) * [1.4, 1.4, 10] - middle
    inside = (slice(2, -2), slice(2, -2), slice(1, -1))  # the coarser grid may end before the scan's last voxel
    for k, gamma in enumerate((0, 1 / 3, 2 / 3, 1)):
        assert np.allclose(np.asarray(field.dataobj)[..., k, :][inside], gamma * 0.2 * offset[inside], atol=1.5 * gamma)
    assert not np.asarray(field.dataobj)[..., 0, :].any()


def test_displacements_in_the_file_warp_the_scan_to_the_frames(cohort):
    scans, output, _ = cohort
    for case in ("asl", "thin"):
        scan, cine, field = (
            nib.load(scans / f"{case}.nii.gz"),
            load(output, case, "cine"),
            load(output, case, "displacement"),
        )
        vectors = np.asarray(field.dataobj)[..., 3, :] @ np.linalg.inv(scan.affine[:3, :3]).T
        places = np.indices(scan.shape[:3]) + np.moveaxis(vectors, -1, 0)
        warped = ndimage.map_coordinates(np.asarray(scan.dataobj)[..., 0].astype(float), places, order=1, mode="nearest")
        assert np.allclose(np.asarray(cine.dataobj)[..., 3], warped, atol=0.1)


def test_a_cine_stored_with_other_axes_gives_the_same_results(cohort):
    _, output, _ = cohort
    for ending, atol in (("cine", 0.5), ("displacement", 1e-3), ("seg", 0)):
        ras, asl = load(output, "ras", ending), load(output, "asl", ending)
        assert not np.array_equal(np.asarray(ras.dataobj), 0) and nib.aff2axcodes(asl.affine) == ("A", "S", "L")
        turn = nib.orientations.ornt_transform(nib.io_orientation(asl.affine), nib.io_orientation(ras.affine))
        assert np.allclose(asl.as_reoriented(turn).get_fdata(), ras.get_fdata(), atol=atol)


def test_labels_are_warped_to_every_frame_and_shrink(cohort):
    scans, output, _ = cohort
    labels = np.asarray(load(output, "ras", "labels").dataobj)
    assert labels.dtype == np.uint8 and labels.shape == (32, 28, 6, 4)
    assert np.array_equal(labels[..., 0], np.asarray(nib.load(scans / "ras_ed_gt.nii.gz").dataobj))
    volumes = (labels == 3).sum(axis=(0, 1, 2)) * 1.4 * 1.4 * 10 / 1000
    assert (np.diff(volumes) < 0).all()
    (row,) = [row for row in rows_of(output / "results.csv") if row["case"] == "ras"]
    assert [row["lv_first_ml"], row["lv_last_ml"]] == [f"{volumes[0]:.1f}", f"{volumes[-1]:.1f}"]
    assert float(row["ejection_fraction_percent"]) == pytest.approx(100 * (1 - volumes[-1] / volumes[0]), abs=0.06)
    assert row["wall_thickening_percent"] and float(row["folding_percent"]) == 0 and row["frames"] == "4"


def test_the_moving_picture_goes_there_and_back(cohort):
    _, output, _ = cohort
    with Image.open(output / "ras" / "ras_cine.gif") as gif:
        assert gif.n_frames == 6


def test_a_report_shows_the_cohort(cohort):
    _, output, _ = cohort
    page = report(output, output.parent / "report.html").read_text(encoding="utf-8")
    assert "largest displacement (mm)" in page and "Histogram: share that folds" in page and page.count("<img alt") >= 4
    assert "doubtful findings" not in page and "bad_single.nii.gz" in page


def test_evaluation_generates_as_many_frames_as_the_cine_has_and_writes_the_metrics(infer_here, tmp_path):
    cine, labels = make_cine(5)
    for end, k in (("ed", 0), ("es", 4)):
        save_nifti(tmp_path / "scans" / "p2" / f"p2_{end}_gt.nii.gz", labels[..., k], SPACING)
        turned = nib.load(save_turned(tmp_path, labels[..., k], SPACING)[1])
        save_nifti(tmp_path / "scans" / "p10" / f"p10_{end}_gt.nii.gz", np.asarray(turned.dataobj), turned.affine)
    for name in ("p1", "p2", "p10"):  # p1 is of the training section
        save_nifti(tmp_path / "scans" / name / f"{name}_ed2es.nii.gz", cine, SPACING)
    infer_here(tmp_path / "scans", tmp_path / "out", "evaluate")
    rows = {row["case"]: row for row in rows_of(tmp_path / "out" / "metrics.csv")}
    assert list(rows) == ["p10", "p2", "mean", "std"] and rows["p2"]["frames"] == "5"
    assert rows["p10"] == rows["p2"] | {"case": "p10"}, "the same labels, stored with other axes"
    assert load(tmp_path / "out", "p2", "cine").shape == (32, 28, 6, 5)
    summary = json.loads((tmp_path / "out" / "metrics_summary.json").read_text(encoding="utf-8"))
    assert summary["num_cases"] == 2 and summary["lv_falls"] == 1
    assert float(rows["p2"]["psnr"]) == pytest.approx(float(rows["p2"]["still_psnr"]) + float(rows["p2"]["psnr_gain"]))
    assert Image.open(tmp_path / "out" / "lv_volume.png").format == "PNG"


def test_a_cine_of_the_whole_cycle_is_evaluated_from_end_diastole_to_the_end_systole_that_was_found(infer_here, tmp_path):
    cine = make_cine(6)[0][..., [0, 2, 5, 3, 1, 0]]  # end-systole is frame 2
    path = save_nifti(tmp_path / "a.nii.gz", cine, SPACING)
    infer_here(path, tmp_path / "out", "evaluate", section="all")
    (row,) = rows_of(tmp_path / "out" / "results.csv")
    assert [row[name] for name in ("frames", "source_frame", "target_frame", "frames_by")] == ["3", "0", "2", "found"]
    assert rows_of(tmp_path / "out" / "metrics.csv")[0]["frames"] == "3"
    assert load(tmp_path / "out", "a", "cine").shape == (32, 28, 6, 3)


def test_frames_and_fractions_can_be_named(infer_here, tmp_path):
    path = save_nifti(tmp_path / "a.nii.gz", make_cine(5)[0], SPACING)
    infer_here(path, tmp_path / "out", ends=[1, 3], gammas=[0.0, 0.25, 1.0])
    cine = np.asarray(load(tmp_path / "out", "a", "cine").dataobj)
    assert cine.shape[-1] == 3 and np.array_equal(cine[..., 0], make_cine(5)[0][..., 1])
    (row,) = rows_of(tmp_path / "out" / "results.csv")
    assert [row[name] for name in ("source_frame", "target_frame", "frames_by")] == ["1", "3", "given"]


def test_without_the_target_among_the_frames_there_is_no_ejection_fraction(infer_here, tmp_path):
    save_nifti(tmp_path / "scans" / "a.nii.gz", make_cine(3)[0], SPACING)
    save_nifti(tmp_path / "scans" / "a_ed_gt.nii.gz", make_cine(3)[1][..., 0], SPACING)
    infer_here(tmp_path / "scans", tmp_path / "out", gammas=[0.0, 0.5])
    (row,) = rows_of(tmp_path / "out" / "results.csv")
    assert row["lv_last_ml"] and row["ejection_fraction_percent"] == row["wall_thickening_percent"] == ""


def test_two_runs_give_the_same_bytes_and_a_third_one_has_nothing_left_to_do(infer_here, tmp_path, caplog):
    path = save_nifti(tmp_path / "a.nii.gz", make_cine(3)[0], SPACING)
    with caplog.at_level(logging.INFO):
        for output in ("one", "two", "two"):
            infer_here(path, tmp_path / output)
    assert sum("1 cases are finished already" in message for message in caplog.messages) == 1
    one, two = (files_below(tmp_path / output / "a") for output in ("one", "two"))
    assert len(one) == 6 and one == two


def test_monai_labels_way_of_calling_gives_the_mask_of_what_moves(infer_here, settings, tmp_path):
    """Its task instantiates the parts of inference.json one by one, and hands a path and nothing else to preprocessing."""
    path = save_nifti(tmp_path / "a.nii.gz", make_cine(5)[0], SPACING)
    infer_here(path, tmp_path / "out", min_motion=3.0)
    parser = ConfigParser()
    parser.read_config([BUNDLE / "configs" / "inference.json", settings])
    parser["displayable_configs"].update({"num_frames": 10, "min_motion": 3.0})
    parser.parse()
    pre, inferer, post = (parser.get_parsed_content(name) for name in ("preprocessing", "inferer", "postprocessing"))
    network = Shrinking(rate=0.0).eval()
    network.load_state_dict(torch.load(settings.parent / "model.pt", weights_only=True))
    data = pre({"image": str(path), "image_path": str(path)})
    with torch.no_grad():
        data["pred"] = inferer(data["image"][None], network)[0]
    mask = post(data)["pred"]
    assert mask.dtype == torch.uint8 and mask.any() and not mask.all()
    assert np.array_equal(mask[0].numpy(), np.asarray(load(tmp_path / "out", "a", "seg").dataobj))
    assert np.allclose(mask.meta["original_affine"], SPACING)


def test_two_processes_share_a_cohort(settings, tmp_path):
    for name in ("a", "b", "c"):
        save_nifti(tmp_path / "scans" / f"{name}.nii.gz", make_cine(3)[0], SPACING)
    files = ["configs/inference.json", "configs/multi_gpu_inference.json", str(settings)]
    paths = ("--dataset_dir", tmp_path / "scans", "--output_dir", tmp_path / "out")
    finished(torchrun(BUNDLE, str(files), *paths, env=ENVIRONMENT))
    assert sorted(row["case"] for row in rows_of(tmp_path / "out" / "results.csv")) == ["a", "b", "c"]
