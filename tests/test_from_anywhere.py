"""The bundles run from a foreign folder, in the ways that MONAI offers: in the repository, packaged, beside each other."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import monai.bundle
import numpy as np
import pytest
import torch
from conftest import ROOT, code_of, make_cine, make_ct_slice, make_head, rows_of, save_nifti, save_patient
from monai.bundle import ConfigParser, ConfigWorkflow, create_workflow
from PIL import Image

from scripts.data.sections import section_of
from scripts.release.package import package

BRAIN, ONE_STEP, COUNTERFACTUAL, HEAD_CT, CINE, CHEST, SEGMENTATION, REGISTRATION, SIMPLEX = NAMES = (
    "brain_mri_anomaly_ddim",
    "brain_mri_anomaly_one_step",
    "brain_mri_anomaly_counterfactual",
    "head_ct_anomaly_ldm",
    "cardiac_mri_deformable_diffusion",
    "chest_xray_generative_vdm",
    "brain_mri_segmentation_ensemble",
    "cardiac_mri_registration_diffusemorph",
    "brain_mri_anomaly_simplex",
)
QUICK = {
    BRAIN: {"num_steps": 1, "guidance_steps": 1},
    ONE_STEP: {},
    COUNTERFACTUAL: {"num_steps": 1},
    HEAD_CT: {"num_steps": 1, "band_levels": 1, "calibrated_for#band_levels": 1, "healings": 1},
    CINE: {"num_frames": 2, "refinement_steps": 0, "coarse_steps": 0},
    CHEST: {"number": 1, "num_steps": 1},
    SEGMENTATION: {"num_steps": 1},
    REGISTRATION: {"refinement_steps": 0, "coarse_steps": 0},
    SIMPLEX: {"num_steps": 1, "num_repeats": 1},
}
TRAINING = {"epochs": 1, "epoch_length": 1, "batch_size": 2, "val_interval": 2}
QUICK_TRAINING = {
    BRAIN: {"spatial_size": [32, 32]},
    ONE_STEP: {"spatial_size": [32, 32]},
    COUNTERFACTUAL: {"spatial_size": [32, 32]},
    HEAD_CT: {"calibrate": False},
    CINE: {"spatial_size": [32, 32, 8]},
    CHEST: {"spatial_size": [16, 16], "network_def#channels": [32, 32], "network_def#num_steps": 2},
    SEGMENTATION: {"spatial_size": [32, 32], "network_def#channels": [16, 32]},
    REGISTRATION: {"spatial_size": [32, 32, 8]},
    SIMPLEX: {"spatial_size": [32, 32]},
}


@pytest.fixture(autouse=True)
def elsewhere(own_imports, tmp_path, monkeypatch) -> Iterator[None]:
    """A foreign folder, in which Python finds no code of the bundles; MONAI's set-up of logging is taken back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path and Path(path).resolve() != ROOT])
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    logging.root.handlers[:], logging.root.level = handlers, level


@pytest.fixture(scope="session")
def packages(tmp_path_factory) -> Path:
    """The folder of the packaged bundles."""
    folder = tmp_path_factory.mktemp("packages")
    for name in NAMES:
        package(ROOT / "bundles" / name, folder)
    return folder


@pytest.fixture(params=["in place", "packaged"])
def bundles(request) -> Path:
    """The folder of the bundles, in the repository or packaged."""
    return ROOT / "bundles" if request.param == "in place" else request.getfixturevalue("packages")


@pytest.fixture(scope="session")
def scans(tmp_path_factory) -> Path:
    """A file or folder of the bundle's name for each, to train on and, with ``one_``, for inference."""
    folder = tmp_path_factory.mktemp("scans")
    names = [next(n for n in map(str, range(99)) if section_of(n) == s) for s in ("training", "validation")]
    for seed, name in enumerate(names):
        for bundle in (BRAIN, ONE_STEP, COUNTERFACTUAL, SEGMENTATION, SIMPLEX):
            save_patient(folder / bundle, name, seed, num_slices=2)
        for bundle in (CINE, REGISTRATION):
            save_nifti(folder / bundle / f"{name}.nii.gz", make_cine(3, seed)[0], np.diag([1.5, 1.5, 3.15, 1.0]))
    for name in (HEAD_CT, CHEST):
        (folder / name).mkdir()
        for i in range(36):
            Image.fromarray(make_ct_slice(i)).save(folder / name / f"{i:02}.png")
    for bundle in (BRAIN, ONE_STEP, COUNTERFACTUAL, SEGMENTATION, SIMPLEX):
        save_nifti(folder / f"one_{bundle}" / "a.nii.gz", make_head(1)[0])
    save_nifti(folder / f"one_{HEAD_CT}" / "a.nii.gz", make_ct_slice()[..., None])
    for bundle in (CINE, REGISTRATION):
        shutil.copytree(folder / bundle, folder / f"one_{bundle}", ignore=lambda _, files: files[1:])
    (folder / f"one_{CHEST}").mkdir()
    return folder


def inference(bundle: Path, scans: Path, output: Path, **settings: object) -> ConfigWorkflow:
    """An inference, ready to run."""
    settings = {"dataset_dir": str(scans / f"one_{bundle.name}"), "output_dir": str(output), **settings}
    return workflow(bundle, "inference", **QUICK[bundle.name], **settings)


def training(bundle: Path, scans: Path, output: Path) -> ConfigWorkflow:
    """A training of one iteration, ready to run."""
    settings = {"dataset_dir": str(scans / bundle.name), "ckpt_dir": str(output), "output_dir": str(output / "log")}
    return workflow(bundle, "train", **TRAINING, **QUICK_TRAINING[bundle.name], **settings)


def workflow(bundle: Path, kind: str, **settings: object) -> ConfigWorkflow:
    config = str(bundle / "configs" / f"{kind}.json")
    return create_workflow(config_file=config, workflow_type=kind, bundle_root=str(bundle), amp=False, **settings)


def rows_in(output: Path) -> list[dict[str, str]]:
    return rows_of(next(output.glob("*.csv")))


@pytest.mark.parametrize("name", NAMES)
def test_an_inference_made_in_python_runs_with_the_bundles_own_code(bundles, name, scans, tmp_path):
    made = inference(bundles / name, scans, tmp_path / "out")
    made.run()
    made.finalize()
    assert len(rows_in(tmp_path / "out")) == 1
    assert code_of(made.network_def, made.evaluator) == {(bundles / name / "scripts").resolve()}


@pytest.mark.parametrize("name", NAMES)
def test_a_training_made_in_python_runs_with_the_bundles_own_code(bundles, name, scans, tmp_path):
    made = training(bundles / name, scans, tmp_path / "out")
    made.run()
    made.finalize()
    assert (tmp_path / "out" / "model.pt").is_file()
    assert code_of(made.network_def, made.trainer) == {(bundles / name / "scripts").resolve()}


@pytest.mark.parametrize("make", [inference, training])
def test_two_packaged_bundles_beside_each_other_each_run_with_their_own_code(packages, scans, tmp_path, make):
    made = {}
    for name in ("one", "two"):  # each writes a table or a sheet with its own name
        bundle = Path(shutil.copytree(packages / CHEST, tmp_path / name / CHEST))
        code = (bundle / "scripts" / "tasks" / "generation" / "results.py").read_text(encoding="utf-8")
        code = code.replace('"generated.csv"', f'"{name}.csv"').replace("samples_{epoch", f"{name}_{{epoch")
        (bundle / "scripts" / "tasks" / "generation" / "results.py").write_text(code, encoding="utf-8")
        made[bundle] = make(bundle, scans, tmp_path / name / "out")
    for bundle in made:
        made[bundle].run()
        engine = made[bundle].evaluator if make is inference else made[bundle].trainer
        assert code_of(made[bundle].network_def, engine) == {bundle / "scripts"}
        written = {path.stem.partition("_")[0] for path in bundle.parent.glob("out/**/*.*")}
        assert written & {"one", "two"} == {bundle.parent.name}


def test_the_command_line_runs_a_bundle_from_a_foreign_folder_even_one_with_other_code(bundles, tmp_path):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "__init__.py").write_text("raise ImportError('the wrong code')")
    bundle, alone = bundles / CHEST, {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-m", "monai.bundle", "run", "--bundle_root", str(bundle)]
    command += ["--config_file", str(bundle / "configs" / "inference.json"), "--output_dir", str(tmp_path / "out")]
    command += ["--number", "1", "--num_steps", "1", "--amp", "False"]
    done = subprocess.run(command, cwd=tmp_path, env=alone, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(rows_in(tmp_path / "out")) == 1


@pytest.mark.parametrize("kind", ["inference", "train"])
def test_a_forgotten_bundle_root_is_told_in_one_line(bundles, kind):
    for name in NAMES:
        with pytest.raises(SystemExit, match=r"^no scripts in \.: give --bundle_root, the folder of the bundle$"):
            create_workflow(config_file=str(bundles / name / "configs" / f"{kind}.json"), workflow_type=kind)


@pytest.mark.parametrize("name", NAMES)
def test_monai_loads_the_network_with_its_weights_and_the_settings_of_the_inference(bundles, name):
    bundle = bundles / name
    network = monai.bundle.load(
        name=name, bundle_dir=str(bundles), workflow_type="inference", args_file={"bundle_root": str(bundle)}
    )
    assert code_of(network) == {(bundle / "scripts").resolve()}
    weights = torch.load(bundle / "models" / "model.pt", weights_only=True)
    assert all(torch.equal(value, weights[key].to(value.dtype)) for key, value in network.state_dict().items())
    told = json.loads((bundle / "configs" / "inference.json").read_text(encoding="utf-8"))
    assert getattr(getattr(network, "settings", network), "num_steps", None) == told.get("num_steps")


def test_monai_loads_a_network_for_training_as_its_documentation_writes_it(bundles, monkeypatch):
    for name in NAMES:
        monkeypatch.chdir(bundles / name)
        assert code_of(monai.bundle.load(name=name, bundle_dir="..")) == {(bundles / name / "scripts").resolve()}


def files_of(bundle: Path) -> dict[str, str]:
    """Arguments of MONAI's functions that check or export a network."""
    files = {
        "meta_file": str(bundle / "configs" / "metadata.json"),
        "config_file": str(bundle / "configs" / "inference.json"),
    }
    return {"net_id": "network_def", "bundle_root": str(bundle), **files}


@pytest.mark.parametrize("name", NAMES)
def test_monai_finds_that_the_network_keeps_to_the_metadata(bundles, name):
    quick = {key: value for key, value in QUICK[name].items() if key not in ("number", "num_frames")}
    monai.bundle.verify_net_in_out(**files_of(bundles / name), device="cpu", amp=False, **quick)


@pytest.mark.parametrize("name", NAMES)
def test_no_network_becomes_torchscript_and_the_metadata_say_why(name, tmp_path):
    bundle = ROOT / "bundles" / name
    with pytest.raises((RuntimeError, torch.jit.frontend.UnsupportedNodeError)):
        monai.bundle.ckpt_export(
            filepath=str(tmp_path / "model.ts"), ckpt_file=str(bundle / "models" / "model.pt"), **files_of(bundle)
        )
    meta = json.loads((bundle / "configs" / "metadata.json").read_text(encoding="utf-8"))
    assert meta["torchscript"].startswith("not possible: ")


def test_a_bare_parser_has_everything_once_it_has_the_network(bundles):
    for name in NAMES:
        parser = ConfigParser()
        parser.read_config(bundles / name / "configs" / "inference.json")
        parser["bundle_root"] = str(bundles / name)
        parts = [parser.get_parsed_content(part) for part in ("network_def", "preprocessing", "inferer", "postprocessing")]
        assert code_of(parts[0], parts[1].transforms[0]) == {(bundles / name / "scripts").resolve()}


def test_the_threshold_of_an_earlier_run_can_be_asked_for(bundles, tmp_path):
    save_nifti(tmp_path / "RESULTS" / "a" / "a_map.nii.gz", np.linspace(0, 1, 64, dtype=np.float32).reshape(4, 4, 4))
    parser = ConfigParser()
    parser.read_config(bundles / BRAIN / "configs" / "inference.json")
    parser["bundle_root"], parser["threshold"] = str(bundles / BRAIN), "$@cohort_otsu('RESULTS')"
    assert parser.get_parsed_content("threshold") == pytest.approx(0.5, abs=0.1)
