"""The chest X-ray bundle as a user runs it, with a stand-in for the network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import monai.bundle
import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT, SCHEMA, files_below, finished, rows_of, run_command, torchrun
from jsonschema import validate
from monai.bundle import ConfigParser, verify_net_in_out
from PIL import Image
from stand_in import StandInNet

from scripts.networks.copy_filter import CopyFilter, load_copy_filter
from scripts.networks.orientation import OrientationNet
from scripts.tasks.generation.evaluation import draw_samples
from scripts.tasks.generation.transforms import seeded_noise

BUNDLE = ROOT / "bundles" / "chest_xray_generative_vdm"
NETWORK = {"network_def#_target_": "stand_in.StandInNet", "num_steps": 3}
NO_FILTER = {"copy_filter": False}
QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT / "tests")}  # where the stand-in is found


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """Weights of the stand-in."""
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    torch.save(StandInNet().state_dict(), path)
    return path


def overrides(output_dir: Path, weights: Path, **settings: object) -> dict[str, object]:
    return {**NETWORK, **NO_FILTER, "checkpointloader#load_path": str(weights), "output_dir": str(output_dir), **settings}


def generate(output_dir: Path, weights: Path, **settings: object) -> None:
    """``monai.bundle run`` in this process, which is faster than in one of its own."""
    settings = overrides(output_dir, weights, bundle_root=str(BUNDLE), **settings)
    monai.bundle.run(config_file=str(BUNDLE / "configs" / "inference.json"), **settings)


def options(output_dir: Path, weights: Path, **settings: object) -> list[object]:
    """The same settings for the command line."""
    return [word for name, value in overrides(output_dir, weights, **settings).items() for word in (f"--{name}", value)]


def pixels_of(path: Path) -> np.ndarray:
    """A picture's grey levels (x, y)."""
    return np.asarray(Image.open(path)).T


@pytest.fixture(scope="module")
def cohort(tmp_path_factory, weights) -> Path:
    output = tmp_path_factory.mktemp("cxr") / "output"
    generate(output, weights, number=5, seed=3, batch_size=2, sampler="ancestral")
    return output


def test_every_image_is_a_picture_and_a_nifti_file_and_a_row_and_a_sheet_shows_all(cohort):
    names = [f"generated_{seed}" for seed in range(3, 8)]
    files = ["contact_sheet.png", "generated.csv", *(f"{name}{e}" for name in names for e in (".nii.gz", ".png"))]
    assert sorted(files_below(cohort)) == sorted(files)
    rows = rows_of(cohort / "generated.csv")
    assert [(row["case"], row["seed"], row["sampler"], row["steps"]) for row in rows] == [
        (f"generated_{seed}", str(seed), "ancestral", "3") for seed in range(3, 8)
    ]
    assert Image.open(cohort / "contact_sheet.png").text["Seed"] == "3 to 7"


def test_an_image_is_what_the_network_makes_of_the_noise_of_its_seed(cohort):
    for seed in (3, 7):
        image = StandInNet()(seeded_noise(seed, (1, 64, 64))[None])[0, 0]
        expected = (255 * image).round().byte().numpy()
        assert np.array_equal(pixels_of(cohort / f"generated_{seed}.png"), expected)
        nifti = nib.load(cohort / f"generated_{seed}.nii.gz")
        assert np.array_equal(nifti.dataobj[..., 0], expected) and nifti.get_data_dtype() == np.uint8
        assert f"seed {seed}" in nifti.header["descrip"].item().decode()


def test_a_seed_gives_the_same_files_in_whatever_batch_and_run(cohort, weights, tmp_path):
    generate(tmp_path / "out", weights, number=2, seed=6)
    again = files_below(tmp_path / "out")
    before = files_below(cohort)
    for name in ("generated_6.png", "generated_6.nii.gz", "generated_7.png"):
        assert again[name] == before[name]


@pytest.fixture(scope="module")
def copy_weights(tmp_path_factory) -> Path:
    """A filter that knows the stand-in's images of the seeds 3 and 4, and takes little else for a copy."""
    torch.manual_seed(0)
    network = CopyFilter(2, 40)
    training, held_out = (draw_samples(StandInNet(), number, (1, 64, 64), seed)[0] for number, seed in ((2, 3), (40, 100)))
    network.calibrate([[{"image": training}], [{"image": held_out}]])
    path = tmp_path_factory.mktemp("filter") / "copy_filter.pt"
    torch.save(network.state_dict(), path)
    return path


def test_copies_of_training_images_are_drawn_again_by_default_and_the_table_tells(cohort, weights, copy_weights, tmp_path):
    settings = {"number": 5, "seed": 3, "batch_size": 2, "copy_weights": str(copy_weights), "copy_rate": 0.1}
    default = ConfigParser.load_config_file(BUNDLE / "configs" / "inference.json")["copy_filter"]
    generate(tmp_path / "out", weights, **settings, copy_filter=default)
    rows = {int(row["seed"]): row for row in rows_of(tmp_path / "out" / "generated.csv")}
    limit = load_copy_filter(copy_weights).limit(0.1)
    for seed, row in rows.items():
        same = np.array_equal(*(pixels_of(folder / f"generated_{seed}.png") for folder in (cohort, tmp_path / "out")))
        assert same == (row["redraws"] == "0"), seed
        assert row["copy"] == "no" and float(row["copy_similarity"]) <= limit + 1e-4
    assert int(rows[3]["redraws"]) > 0 and int(rows[4]["redraws"]) > 0
    assert all(row["copy"] == "" for row in rows_of(cohort / "generated.csv"))


def test_a_copy_that_no_round_mends_is_written_and_told(weights, copy_weights, tmp_path):
    settings = {"number": 1, "seed": 3, "copy_weights": str(copy_weights), "copy_rate": 0.1, "copy_filter": True}
    generate(tmp_path, weights, **settings, copy_rounds=0)
    (row,) = rows_of(tmp_path / "generated.csv")
    copies = load_copy_filter(copy_weights)
    of_itself = 1 - copies.common[0].item() / 10
    assert (row["redraws"], row["copy"]) == ("0", "yes")
    assert copies.limit(0.1) < float(row["copy_similarity"]) == pytest.approx(of_itself, abs=1e-3)


def test_copies_and_membership_are_measured_by_a_configuration(weights, copy_weights, tmp_path):
    (tmp_path / "CXR").mkdir()
    for i, image in enumerate(draw_samples(StandInNet(), 72, (1, 64, 64), seed=100)[0]):
        Image.fromarray((255 * image[0].T).round().byte().numpy()).save(tmp_path / "CXR" / f"{i:06}.png")
    settings = overrides(tmp_path / "out", weights, bundle_root=str(BUNDLE), dataset_dir=str(tmp_path))
    settings |= {"copy_filter": True, "copy_weights": str(copy_weights), "copy_rate": 0.25}
    settings |= {"number": 3, "num_planted": 4, "num_members": 4, "num_times": 2}
    configs = [str(BUNDLE / "configs" / f"{name}.json") for name in ("inference", "evaluate", "evaluate_copies")]
    monai.bundle.run(config_file=configs, **settings)
    assert [row["method"] for row in rows_of(tmp_path / "out" / "copies.csv")][0] == "copy filter"
    assert len(rows_of(tmp_path / "out" / "membership.csv")) == 3


def test_the_shipped_filter_was_made_of_the_training_section_and_has_no_pixels():
    state = torch.load(BUNDLE / "models" / "copy_filter.pt", weights_only=True)
    assert state["index"].shape == (8000, 128) and state["held_out"].shape == (500,)
    assert all(value.dtype in (torch.float16, torch.int64) for value in state.values())
    network = load_copy_filter(BUNDLE / "models" / "copy_filter.pt")
    assert 0.3 < network.limit(0.01) < 1 and sum(p.numel() for p in network.parameters()) < 2e6


def test_the_class_that_is_asked_for_reaches_the_network_and_the_table(weights, tmp_path):
    plain, dark = tmp_path / "plain", tmp_path / "dark"
    generate(plain, weights, number=1)
    generate(dark, weights, number=1, label=1, num_classes=2)
    assert rows_of(dark / "generated.csv")[0]["label"] == "1" and rows_of(plain / "generated.csv")[0]["label"] == ""
    bright = pixels_of(plain / "generated_0.png").astype(int)
    assert np.abs(pixels_of(dark / "generated_0.png") - bright / 2).max() <= 1


def test_a_cohort_that_was_cut_off_is_finished_by_the_next_run_and_nothing_is_done_twice(weights, tmp_path):
    settings = {"number": 40, "batch_size": 1}
    command = run_command("configs/inference.json", *options(tmp_path / "out", weights, **settings))
    process = subprocess.Popen([sys.executable, *command], cwd=BUNDLE, env=ENVIRONMENT, **QUIET)
    while process.poll() is None and not (tmp_path / "out" / "generated.csv").is_file():
        time.sleep(0.01)
    process.kill()
    process.wait()
    before = rows_of(tmp_path / "out" / "generated.csv")
    assert 0 < len(before) < 40
    generate(tmp_path / "out", weights, **settings)
    rows = rows_of(tmp_path / "out" / "generated.csv")
    assert rows[: len(before)] == before and [int(row["seed"]) for row in rows] == list(range(40))
    generate(tmp_path / "whole", weights, **settings)
    cut, whole = (
        {k: v for k, v in files_below(tmp_path / name).items() if k.startswith(("generated_", "contact"))}
        for name in ("out", "whole")
    )
    assert len(whole) == 81 and cut == whole


def test_two_processes_share_the_images(weights, tmp_path):
    config = "['configs/inference.json','configs/multi_gpu_inference.json']"
    finished(torchrun(BUNDLE, config, *options(tmp_path, weights, number=5), env=ENVIRONMENT))
    assert sorted(int(row["seed"]) for row in rows_of(tmp_path / "generated.csv")) == list(range(5))
    assert Image.open(tmp_path / "contact_sheet.png").text["Seed"] == "0 to 4"


def test_the_evaluation_compares_the_networks_with_held_out_images_of_mednist(weights, tmp_path):
    (tmp_path / "MedNIST" / "CXR").mkdir(parents=True)
    (tmp_path / "MedNIST" / "HeadCT").mkdir()
    for i, image in enumerate(draw_samples(StandInNet(), 72, (1, 64, 64), seed=100)[0]):
        pixels = (255 * image[0].T).round().byte().numpy()
        Image.fromarray(pixels).save(tmp_path / "MedNIST" / "CXR" / f"{i:06}.png")
    (tmp_path / "out").mkdir()
    torch.save(OrientationNet().state_dict(), tmp_path / "out" / "feature_network.pt")
    settings = overrides(tmp_path / "out", weights, bundle_root=str(BUNDLE), dataset_dir=str(tmp_path / "MedNIST"))
    settings |= {"number": 3, "seeds": [0, 1], "medvdm_weights": str(weights), "medvdm#_target_": "stand_in.StandInNet"}
    configs = [str(BUNDLE / "configs" / f"{name}.json") for name in ("inference", "evaluate")]
    monai.bundle.run(config_file=configs, **settings)
    rows = rows_of(tmp_path / "out" / "metrics.csv")
    assert [(row["method"], row["seed"]) for row in rows] == [
        ("real (validation)", "0"),
        ("default", "0"),
        ("default", "1"),
        ("MedVDM", "0"),
        ("MedVDM", "1"),
    ]
    assert rows[1]["floor"] == "" and float(rows[3]["floor"]) == 0.5  # a Bernoulli bound is the paper's model's alone
    about = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))["about"]
    assert (about["num_training"], about["num_validation"], about["num_test"]) == (64, 3, 3)
    settings = settings | {"output_dir": str(tmp_path / "alone"), "medvdm_weights": None, "seeds": [0]}
    (tmp_path / "alone").mkdir()
    shutil.copy(tmp_path / "out" / "feature_network.pt", tmp_path / "alone")
    monai.bundle.run(config_file=configs, **settings)
    assert [row["method"] for row in rows_of(tmp_path / "alone" / "metrics.csv")] == ["real (validation)", "default"]


@pytest.mark.skipif(not SCHEMA.is_file(), reason=f"no schema at {SCHEMA}")
def test_the_metadata_keep_to_the_schema_of_monai():
    validate(
        json.loads((BUNDLE / "configs" / "metadata.json").read_text(encoding="utf-8")),
        json.loads(SCHEMA.read_text(encoding="utf-8")),
    )


def test_noise_as_the_metadata_describe_it_goes_through_the_network():
    verify_net_in_out(
        net_id="network_def",
        meta_file=str(BUNDLE / "configs" / "metadata.json"),
        config_file=str(BUNDLE / "configs" / "inference.json"),
        device="cpu",
        **NETWORK,
    )


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ({"copy_filter": True, "copy_weights": "none.pt"}, "none.pt: no such file; train one"),
        ({"copy_filter": True, "copy_rate": 0.0001}, "a rate of 0.0001 can't be told by 500 values"),
        ({"number": 0}, "--number must be at least 1, got 0"),
        ({"seed": -1}, "--seed must be 0 or more"),
        ({"sampler": "none"}, "unknown sampler 'none': choose"),
    ],
)
def test_a_wrong_setting_is_told_in_a_line_and_nothing_is_written(weights, tmp_path, setting, line):
    with pytest.raises(RuntimeError) as error:
        generate(tmp_path / "out", weights, **setting)
    causes = [error.value]
    while causes[-1].__cause__:
        causes.append(causes[-1].__cause__)
    assert isinstance(causes[-1], ValueError) and str(causes[-1]).startswith(line) and "\n" not in str(causes[-1])
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_cannot_be_written_is_told_in_one_line(weights, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"file: can't write there \(.*\); choose another --output_dir$"):
        generate(tmp_path / "file", weights)
