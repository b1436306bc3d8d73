"""The head CT bundle as a user runs it: processes of their own, the real weights, made slices (and real ones)."""

from __future__ import annotations

import json
import subprocess
import tarfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import MEDNIST, ROOT, files_below, make_ct_slice, rows_of, run, run_forked, save_nifti
from monai.bundle import ConfigParser
from PIL import Image
from small_runs import training_images

from scripts.metrics import dice
from scripts.networks.latent_anomaly import LatentAnomalyNet

BUNDLE = ROOT / "bundles" / "head_ct_anomaly_ldm"
LPS = np.diag([-1.0, -1.0, 5.0, 1.0])
ENDINGS = ("files.csv", "healthy.nii.gz", "map.nii.gz", "overview.png", "seg.nii.gz")


def infer(dataset_dir: Path, output_dir: Path, *args: object) -> subprocess.CompletedProcess:
    return run_forked(BUNDLE, "configs/inference.json", "--dataset_dir", dataset_dir, "--output_dir", output_dir, *args)


def save_picture(path: Path, pixels: np.ndarray) -> Path:
    """Write a slice (x, y) as a picture, whose rows are y."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.T).save(path)
    return path


def with_blob(pixels: np.ndarray) -> np.ndarray:
    """The slice with a bright square in its brain."""
    return np.where(blob(), np.uint8(220), pixels)


def blob() -> np.ndarray:
    mask = np.zeros((64, 64), bool)
    mask[34:42, 28:38] = True
    return mask


def to_hounsfield(pixels: np.ndarray) -> np.ndarray:
    """Grey levels to Hounsfield units by the window of the configuration, air where nothing is."""
    hounsfield = -25 + (pixels / 255 - 0.098) / 0.902 * 155
    return np.where(pixels <= 25, -1000, hounsfield).astype(np.float32)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """Good cases of every layout and bad ones of several kinds, after inference."""
    scans = tmp_path_factory.mktemp("scans")
    stack = np.stack([with_blob(make_ct_slice(0)), make_ct_slice(1)], axis=-1)
    save_picture(scans / "good_picture.png", stack[..., 0])
    save_nifti(scans / "good_stack.nii.gz", stack, LPS)
    fine = to_hounsfield(stack).repeat(2, axis=0).repeat(2, axis=1)
    affine = np.diag([-2.15, -2.15, 5, 1])
    affine[:3, 3] = (-2.15 / 2, -2.15 / 2, 0)
    save_nifti(scans / "good_hounsfield.nii.gz", fine, affine)
    with_nan = to_hounsfield(stack)
    with_nan[30, 30, 0] = np.nan
    save_nifti(scans / "bad_nan.nii.gz", with_nan, LPS)
    save_nifti(scans / "bad_sequences.nii.gz", np.stack([stack, stack], axis=-1), LPS)
    save_nifti(scans / "bad_range.nii.gz", stack.astype(np.int16) * 10, LPS)
    (scans / "bad_bytes.png").write_bytes(b"no picture")
    output = tmp_path_factory.mktemp("ct") / "output"
    # a convolution may round otherwise in a batch of another size
    paths = ("--dataset_dir", scans, "--output_dir", output)
    return output, run(BUNDLE, "configs/inference.json", *paths, "--batch_size", 1)


def test_pictures_stacks_and_scans_in_hounsfield_units_are_finished_although_others_fail(cohort):
    output, done = cohort
    good = ["good_hounsfield", "good_picture", "good_stack"]
    assert sorted(row["case"] for row in rows_of(output / "results.csv")) == good
    for case in good:
        assert sorted(p.name for p in (output / case).iterdir()) == [f"{case}_{ending}" for ending in ENDINGS]


@pytest.mark.parametrize(
    ("case", "mend"),
    [
        ("bad_nan", "NaN or infinite voxels"),
        ("bad_sequences", "this bundle wants 1 (ct)"),
        ("bad_range", "--units hounsfield"),
        ("bad_bytes", "copy it again"),
    ],
)
def test_bad_case_gets_one_line_with_file_and_mend_and_leaves_nothing(cohort, case, mend):
    output, done = cohort
    assert done.returncode == 1
    report = done.stderr[done.stderr.index("4 case(s) failed:") :]
    (line,) = [line for line in report.splitlines() if line.startswith(f"{case}: ")]
    assert f"{case}." in line and mend in line
    assert "Traceback" not in done.stderr + done.stdout
    assert not [name for name in files_below(output) if case in name]


def test_a_picture_and_the_same_slice_in_a_stack_give_the_same(cohort):
    output, _ = cohort
    for ending in ("seg", "map", "healthy"):
        one, other = (nib.load(output / c / f"{c}_{ending}.nii.gz").get_fdata() for c in ("good_picture", "good_stack"))
        assert np.array_equal(one[..., 0], other[..., 0])


def test_the_blob_is_found_in_grey_levels_and_in_hounsfield_units(cohort):
    output, _ = cohort
    found = nib.load(output / "good_stack" / "good_stack_seg.nii.gz").get_fdata()
    assert dice(found[..., 0], blob()) > 0.4
    fine = nib.load(output / "good_hounsfield" / "good_hounsfield_seg.nii.gz").get_fdata()
    assert dice(fine[..., 0], blob().repeat(2, axis=0).repeat(2, axis=1)) > 0.4


def phantom(affine: np.ndarray, shape: tuple[int, int, int], angle: float = 0.0, shift: float = 0.0) -> np.ndarray:
    """A head in Hounsfield units with blood on its left, turned about the patient's long axis and shifted to the left."""
    x, y, z = np.einsum("ij,jabc->iabc", affine[:3, :3], np.indices(shape)) + affine[:3, 3, None, None, None]
    x = x - shift
    x, y = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    r = np.hypot(x / 72, y / 92)
    scan = np.where(r < 1, 1000.0, -1000.0)
    scan[r < 0.9] = 33
    scan[np.hypot(x + 28, y + 10) < 16] = 75
    table = (y > 105) & (y < 110)
    scan[table] = 300
    return (scan + np.random.default_rng(0).normal(0, 3, shape)).astype(np.float32)


def test_a_head_in_hounsfield_units_may_lie_turned_and_shifted(tmp_path):
    """The same blood is found at the same place of the patient, on the grid of each scan, one of which is not LPS."""
    grids = {"straight": ("LPS", 0.0, 0.0), "turned": ("LPS", 0.3, 25.0), "other_axes": ("RSA", 0.3, 25.0)}
    dices = {}
    for name, (axes, angle, shift) in grids.items():
        affine = np.diag([-2.0, -2.0, 8.0, 1.0])
        affine[:3, 3] = 127, 127, -8
        image = nib.Nifti1Image(phantom(affine, (128, 128, 3), angle, shift), affine)
        codes = nib.orientations.axcodes2ornt(axes)
        image = image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(image.affine), codes))
        save_nifti(tmp_path / "scans" / f"{name}.nii.gz", np.asarray(image.dataobj), image.affine)
    assert infer(tmp_path / "scans", tmp_path / "out").returncode == 0
    for name, (_, angle, shift) in grids.items():
        scan = nib.load(tmp_path / "scans" / f"{name}.nii.gz")
        mask, healthy = (nib.load(tmp_path / "out" / name / f"{name}_{what}.nii.gz") for what in ("seg", "healthy"))
        assert mask.shape == scan.shape and np.allclose(mask.affine, scan.affine)
        blood = phantom(scan.affine, scan.shape, angle, shift)
        blood = (blood > 60) & (blood < 90)
        dices[name] = dice(mask.get_fdata(), blood)
        brain = np.abs(scan.get_fdata() - 33) < 9
        assert np.median(np.abs(healthy.get_fdata() - 33)[brain]) < 8, "in Hounsfield units"
    assert min(dices.values()) > 0.5, dices
    assert max(dices.values()) - min(dices.values()) < 0.2, dices
    rows = {row["case"]: row for row in rows_of(tmp_path / "out" / "results.csv")}
    assert all(float(row["one_sided"]) > 0.3 for row in rows.values()), rows


def test_healed_scan_is_in_the_units_of_the_scan(cohort):
    output, _ = cohort
    stack = nib.load(output / "good_stack" / "good_stack_healthy.nii.gz").get_fdata()
    fine = nib.load(output / "good_hounsfield" / "good_hounsfield_healthy.nii.gz").get_fdata()
    assert 90 < np.median(stack[25:30, 25:30]) < 130  # the made brain has 110
    assert 10 < np.median(fine[50:60, 50:60]) < 50  # which is 32 HU


def test_the_mask_comes_back_in_the_orientation_of_the_scan(tmp_path):
    stack = np.stack([make_ct_slice(0), with_blob(make_ct_slice(1))], axis=-1)
    image = nib.Nifti1Image(stack, LPS)
    turned = image.as_reoriented(
        nib.orientations.ornt_transform(nib.io_orientation(LPS), nib.orientations.axcodes2ornt("SAR"))
    )
    for name, scan in (("plain", image), ("turned", turned)):
        save_nifti(tmp_path / "scans" / f"{name}.nii.gz", np.asarray(scan.dataobj), scan.affine)
    assert infer(tmp_path / "scans", tmp_path / "out").returncode == 0
    plain, other = (nib.load(tmp_path / "out" / n / f"{n}_seg.nii.gz") for n in ("plain", "turned"))
    assert other.shape == turned.shape and np.allclose(other.affine, turned.affine)
    back = other.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(other.affine), nib.io_orientation(LPS)))
    assert plain.get_fdata().any() and np.array_equal(back.get_fdata(), plain.get_fdata())


def test_monai_labels_way_of_calling_gives_the_same_mask(tmp_path):
    """Its task instantiates the parts of inference.json one by one, and hands a path and nothing else to preprocessing."""
    stack = np.stack([with_blob(make_ct_slice(0)), make_ct_slice(1)], axis=-1)
    path = save_nifti(tmp_path / "scans" / "a.nii.gz", stack, LPS)
    assert infer(tmp_path / "scans", tmp_path / "out").returncode == 0
    parser = ConfigParser()
    parser.read_config(BUNDLE / "configs" / "inference.json")
    parser.read_meta(BUNDLE / "configs" / "metadata.json")
    parser.config |= {"bundle_root": str(BUNDLE), "amp": False}
    pre, inferer, post = (parser.get_parsed_content(name) for name in ("preprocessing", "inferer", "postprocessing"))
    network = parser.get_parsed_content("network_def").eval()
    network.load_state_dict(torch.load(BUNDLE / "models" / "model.pt", weights_only=True))
    data = pre({"image": str(path)})
    with torch.no_grad():
        data["pred"] = inferer(data["image"][None], network)[0]
    mask = post(data)["pred"]
    assert mask.dtype == torch.uint8
    assert np.array_equal(mask[0].numpy(), nib.load(tmp_path / "out" / "a" / "a_seg.nii.gz").get_fdata())


def test_same_seed_gives_same_bytes_and_a_setting_changes_the_result(tmp_path):
    save_picture(tmp_path / "scans" / "a.png", with_blob(make_ct_slice()))
    for output, args in (("first", ()), ("second", ()), ("other", ("--smoothing", "3.0"))):
        assert infer(tmp_path / "scans", tmp_path / output, *args).returncode == 0
    first, second, other = (files_below(tmp_path / output) for output in ("first", "second", "other"))
    del first["results.csv"], second["results.csv"]  # they hold seconds
    assert first == second and first["a/a_map.nii.gz"] != other["a/a_map.nii.gz"]


def test_settings_that_the_quantiles_do_not_belong_to_are_refused_before_the_first_case(tmp_path):
    save_picture(tmp_path / "scans" / "a.png", make_ct_slice())
    done = infer(tmp_path / "scans", tmp_path / "out", "--texture_offset", 0)
    told = "the quantiles of healthy slices were measured with texture_offset 0.1, not 0: "
    assert done.returncode and told in done.stderr and "--recalibrate True" in done.stderr
    assert not (tmp_path / "out").exists()


def test_what_the_quantiles_belong_to_is_what_the_bundle_is_trained_and_used_with():
    parser = ConfigParser()
    parser.read_config(BUNDLE / "configs" / "inference.json")
    network = parser.get_parsed_content("network_def")
    assert set(parser["calibrated_for"]) == set(network.settings.measured)
    assert not set(parser["calibrated_for"]) & set(parser["displayable_configs"])
    network.calibration.check(network.settings)
    parser = ConfigParser()
    parser.read_config(BUNDLE / "configs" / "train.json")
    network.calibration.check(parser.get_parsed_content("network_def").settings)


def test_evaluation_with_masks_writes_metrics_of_every_case(tmp_path):
    for name, pixels, mask in (("a", with_blob(make_ct_slice()), blob()), ("b", make_ct_slice(1), np.zeros((64, 64), bool))):
        save_picture(tmp_path / "scans" / f"{name}.png", pixels)
        save_picture(tmp_path / "scans" / f"{name}_seg.png", mask.astype(np.uint8))
    args = ("--dataset_dir", tmp_path / "scans", "--output_dir", tmp_path / "out", "--section", "all")
    done = run_forked(BUNDLE, "['configs/inference.json','configs/evaluate_labels.json']", *args)
    assert done.returncode == 0, done.stderr
    rows = {row["case"]: row for row in rows_of(tmp_path / "out" / "metrics.csv")}
    assert list(rows) == ["a", "b", "mean", "std"]
    found = nib.load(tmp_path / "out" / "a" / "a_seg.nii.gz").get_fdata()[..., 0]
    assert float(rows["a"]["dice"]) == pytest.approx(dice(found, blob()))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """A folder in MedNIST's layout: 36 slices, of which the last two are for the test, two for the validation."""
    folder = tmp_path_factory.mktemp("MedNIST")
    for i in range(36):
        save_picture(folder / "HeadCT" / f"{i:06}.jpeg", make_ct_slice(i))
    return folder


def test_evaluation_with_sprites_writes_the_table_of_the_variants(pictures, tmp_path):
    args = (
        "--dataset_dir",
        pictures,
        "--output_dir",
        tmp_path / "out",
        "--variants",
        "['b','d']",
        "--seeds",
        "[0,1]",
        "--number",
        2,
        "--start_level",
        20,  # of variant b as many steps
    )
    done = run_forked(BUNDLE, "['configs/inference.json','configs/evaluate.json']", *args, "--contrasts", "[]")
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "out" / "metrics.csv")
    methods = ("evenness", "b", "d")
    assert [(row["method"], row["seed"]) for row in rows] == [(method, seed) for method in methods for seed in "01"]
    summary = json.loads((tmp_path / "out" / "metrics_summary.json").read_text(encoding="utf-8"))
    assert summary["d"]["best_dice"]["mean"] == pytest.approx(np.mean([float(r["best_dice"]) for r in rows[4:]]))


def test_evaluation_measures_the_quantiles_anew_if_asked(pictures, tmp_path):
    """Of made slices more places are unlike than of real ones, unless the threshold is measured on such slices."""
    args = ("--dataset_dir", pictures, "--variants", "['d']", "--seeds", "[0]", "--contrasts", "[]", "--number", 2)
    found = []
    for recalibrate in ("False", "True"):
        options = (*args, "--recalibrate", recalibrate, "--output_dir", tmp_path / recalibrate)
        done = run_forked(BUNDLE, "['configs/inference.json','configs/evaluate.json']", *options)
        assert done.returncode == 0, done.stderr
        found.append([row for row in rows_of(tmp_path / recalibrate / "metrics.csv") if row["method"] == "d"])
    (stored,), (anew,) = found
    assert stored["best_dice"] != anew["best_dice"]


def test_what_framed_slices_give_is_measured_in_the_form_of_the_shipped_table(pictures, tmp_path):
    args = ("--dataset_dir", pictures, "--output_dir", tmp_path, "--times", 2)
    done = run_forked(BUNDLE, "['configs/inference.json','configs/calibrate_framed.json']", *args)
    assert done.returncode == 0, done.stderr
    tables = json.loads((tmp_path / "usual_scores.json").read_text(encoding="utf-8"))
    shipped = ConfigParser.load_config_file(BUNDLE / "configs" / "inference.json")
    for name, table in tables.items():
        assert list(table) == list(shipped[name]) and list(table.values()) == sorted(table.values())
    assert shipped["framed_usual"]["50"] < 0.5 < shipped["framed_usual"]["97.5"] < 0.6


def test_scores_are_measured_after_small_changes_of_the_pictures(pictures, tmp_path):
    args = ("--dataset_dir", pictures, "--output_dir", tmp_path, "--number", 4, "--section", "training")
    done = run_forked(BUNDLE, "['configs/inference.json','configs/evaluate_changes.json']", *args)
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "changes.csv")
    assert [row["method"] for row in rows][::9] == ["as it is", "noise of 0.04"]
    assert all(0 <= float(row[key]) <= 1 for row in rows for key in row if key != "method")
    assert f"| {rows[-1]['method']} |" in done.stdout


def test_both_stages_train_resume_and_their_weights_run(pictures, tmp_path):
    args = ["--dataset_dir", pictures, "--ckpt_dir", tmp_path / "ckpt", "--output_dir", tmp_path / "log"]
    args += ["--epoch_length", 1, "--batch_size", 2, "--val_interval", 1]
    stage = "['configs/train.json','configs/train_autoencoder.json']"
    assert run_forked(BUNDLE, stage, *args, "--epochs", 1).returncode == 0
    done = run_forked(BUNDLE, stage, *args, "--epochs", 2)
    assert done.returncode == 0 and "going on from iteration 1" in done.stdout, done.stderr
    first = torch.load(tmp_path / "ckpt" / "model.pt", weights_only=True)
    args += ["--initial_weights", tmp_path / "ckpt" / "model.pt"]
    assert run_forked(BUNDLE, "configs/train.json", *args, "--epochs", 1).returncode == 0
    done = run_forked(BUNDLE, "configs/train.json", *args, "--epochs", 2)
    assert done.returncode == 0 and "going on from iteration 1" in done.stdout, done.stderr
    state = torch.load(tmp_path / "ckpt" / "model.pt", weights_only=True)
    assert all(torch.equal(state[k], v) for k, v in first.items() if k.startswith("autoencoder."))
    assert state["healthy_places"].max() > 0
    net = LatentAnomalyNet()
    net.load_state_dict(first)
    net.standardise([{"image": training_images(BUNDLE, pictures)}])
    assert all(torch.equal(state[name], getattr(net, name).half()) for name in ("latent_mean", "latent_std"))
    weights = ("--checkpointloader#load_path", tmp_path / "ckpt" / "model.pt")
    assert infer(pictures / "HeadCT" / "000000.jpeg", tmp_path / "out", *weights).returncode == 0


@pytest.mark.parametrize("baseline", ["vae", "transformer"])
def test_baselines_train_by_their_configurations(pictures, tmp_path, baseline):
    args = ["--dataset_dir", pictures, "--ckpt_dir", tmp_path / "ckpt", "--output_dir", tmp_path / "log"]
    args += ["--epoch_length", 1, "--batch_size", 2, "--val_interval", 1, "--epochs", 1]
    done = run_forked(BUNDLE, f"['configs/train.json','configs/train_{baseline}.json']", *args)
    assert done.returncode == 0, done.stderr
    assert torch.load(tmp_path / "ckpt" / "model.pt", weights_only=True)["healthy_places"].max() > 0


@pytest.mark.skipif(not MEDNIST.is_dir(), reason=f"no real slices at {MEDNIST}")
def test_sprites_in_a_volume_of_real_slices_that_were_not_trained_on_are_found(tmp_path):
    from scripts.tasks.anomaly.evaluation import paint_sprites

    with tarfile.open(MEDNIST / "HeadCT.tar") as tar:
        pictures = [Image.open(tar.extractfile(f"HeadCT/{i:06}.jpeg")) for i in range(8500, 9000, 25)]
        slices = np.stack([np.asarray(picture.convert("L")).T for picture in pictures])
    images = torch.from_numpy(slices)[:, None] / 255
    images = images[(images > 0.3).flatten(1).float().mean(dim=1) > 0.15]
    painted, masks = paint_sprites(images, seed=0, radius=(5, 9), contrast=0.3)
    save_nifti(tmp_path / "a.nii.gz", (255 * painted[:, 0]).round().byte().permute(1, 2, 0).numpy(), LPS)
    assert infer(tmp_path / "a.nii.gz", tmp_path / "out").returncode == 0
    found = nib.load(tmp_path / "out" / "a" / "a_seg.nii.gz").get_fdata()
    assert dice(found, masks[:, 0].permute(1, 2, 0).numpy()) > 0.3


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (("inference",), "dataset#data"),
        (("inference", "evaluate"), "dataset#data"),
        (("train",), "train#dataset#data"),
        (("train",), "validate#dataset#data"),
    ],
)
def test_of_a_folder_with_several_classes_the_head_ct_is_taken(tmp_path, names, wanted):
    for folder in ("CXR", "HeadCT", "Hand"):
        for number in range(20):
            save_picture(tmp_path / folder / f"{number:06}.png", make_ct_slice(number))
    parser = ConfigParser()
    parser.read_config([BUNDLE / "configs" / f"{name}.json" for name in names])
    parser["dataset_dir"] = str(tmp_path)
    images = [Path(case["image"]) for case in parser.get_parsed_content(wanted)]
    assert images and all(image.parent.name == "HeadCT" for image in images)
