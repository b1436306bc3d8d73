"""A bundle of one's own: the folder of another one, with a network that lies beside its configurations."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import BRAIN, ROOT, files_below, make_head, rows_of, run_forked, save_nifti, save_patient
from monai.bundle import ConfigParser

from scripts import __main__ as main
from scripts.data.sections import section_of
from scripts.files import sha256_of

NETWORK = '''
"""What is brighter than a level is an anomaly."""

import torch
from torch import nn

from scripts.networks.slice_network import SliceNetwork
from scripts.precision import autocast


class BrightnessNet(SliceNetwork):
    def __init__(self, level: float = 0.5, passes: int = 1, amp: bool | str = False) -> None:
        super().__init__(3, (128, 128), min_foreground=0.05, foreground_level=0.1, amp=amp)
        self.passes, self.published = passes, {"passes": 4}
        self.level = nn.Parameter(torch.tensor(level))
        self.blur = nn.Conv2d(1, 1, 3, padding=1, bias=False)
        nn.init.constant_(self.blur.weight, 1 / 9)

    def analyse(self, image):
        anomaly = (image[:, 1:2] - self.level).clamp(min=0)
        with autocast(image, self.amp):
            for _ in range(self.passes):
                anomaly = self.blur(anomaly)
        anomaly = anomaly.float()
        return anomaly, image.clamp(max=self.level.item()), anomaly.flatten(1).amax(dim=1)
'''


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    """The folder of the brain bundle under another name, with another network; nothing else of the project is touched."""
    folder = tmp_path_factory.mktemp("own") / "brain_mri_anomaly_brightness"
    shutil.copytree(BRAIN, folder, symlinks=True)
    (folder / "scripts").unlink()
    for control in (folder / "configs").glob("control_*.json"):  # they have the other network's classifier
        control.unlink()
    (folder / "scripts").symlink_to(ROOT / "scripts")
    (folder / "brightness_anomaly.py").write_text(NETWORK, encoding="utf-8")
    for name in ("inference", "train"):
        path = folder / "configs" / f"{name}.json"
        config = ConfigParser.load_config_file(path)
        own = {"_target_": "brightness_anomaly.BrightnessNet", "_requires_": "$@find_code()", "amp": "@amp"}
        path.write_text(json.dumps({**config, "network_def": own}), encoding="utf-8")
    sys.path.insert(0, str(folder))
    try:
        from brightness_anomaly import BrightnessNet
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop("brightness_anomaly", None)
    torch.save(BrightnessNet().state_dict(), folder / "models" / "model.pt")
    meta = ConfigParser.load_config_file(folder / "configs" / "metadata.json")
    meta |= {"name": folder.name, "weights_sha256": sha256_of(folder / "models" / "model.pt")}
    (folder / "configs" / "metadata.json").write_text(json.dumps(meta), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def patients(tmp_path_factory) -> Path:
    """A labelled patient each for validation and test."""
    folder = tmp_path_factory.mktemp("patients")
    for section in ("validation", "test"):
        save_patient(folder, next(n for n in map(str, range(99)) if section_of(n) == section))
    return folder


@pytest.fixture(scope="module")
def result(bundle, patients, tmp_path_factory) -> Path:
    """What its inference writes."""
    output = tmp_path_factory.mktemp("result")
    done = run_forked(bundle, "configs/inference.json", "--dataset_dir", patients, "--output_dir", output)
    assert done.returncode == 0, done.stderr[-3000:]
    return output


def test_inference_marks_what_the_network_of_ones_own_finds(result, patients):
    rows = rows_of(result / "results.csv")
    assert {row["case"] for row in rows} == {path.name for path in patients.iterdir()}
    for row in rows:
        found, true = (
            np.asarray(nib.load(folder / row["case"] / f"{row['case']}_seg.nii.gz").dataobj) for folder in (result, patients)
        )
        assert 2 * (found * true).sum() > 0.6 * (found.sum() + true.sum())


def test_evaluation_measures_it(bundle, patients, tmp_path):
    configs = "['configs/inference.json','configs/evaluate.json']"
    done = run_forked(bundle, configs, "--dataset_dir", patients, "--output_dir", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert float(rows_of(tmp_path / "metrics.csv")[0]["dice"]) > 0.6


def test_verify_finds_no_fault(bundle, capsys, own_imports):
    main.verify(str(bundle))
    assert capsys.readouterr().out.splitlines()[-1] == f"{bundle.name}: verified"


def test_benchmark_tells_its_work(bundle, patients, caplog, own_imports):
    with caplog.at_level(logging.INFO):
        main.run_benchmark(str(bundle), str(patients), num_slices=2)
    assert "published: passes 4" in caplog.text and "work: 4.0 times less" in caplog.text


def test_its_fingerprint_is_measured_by_one_command_and_says_what_is_unlike(bundle, tmp_path, capsys, own_imports):
    folder = shutil.copytree(bundle, tmp_path / bundle.name, symlinks=True)
    (folder / "models" / "fingerprint.json").unlink()
    for number in range(40):
        save_patient(tmp_path / "patients", f"p{number}", seed=number, num_slices=2)
    main.fingerprint(str(folder), str(tmp_path / "patients"))
    assert "training cases" in capsys.readouterr().out
    scan = make_head(2, seed=99)[0]
    for name, data in (("plain", scan), ("small", scan[::2, ::2])):
        save_nifti(tmp_path / "scans" / f"{name}.nii.gz", data)
    done = run_forked(
        folder, "configs/inference.json", "--dataset_dir", tmp_path / "scans", "--output_dir", tmp_path / "out"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    plain, small = rows_of(tmp_path / "out" / "results.csv")
    assert float(plain["unlike_training"]) < 2 < float(small["unlike_training"]) and "size" in small["unlike_in"]


def test_its_package_holds_the_network_and_gives_the_same_files(bundle, patients, result, tmp_path):
    main.package(str(bundle), output=str(tmp_path / "dist"))
    packed = tmp_path / "dist" / bundle.name
    assert (packed / "brightness_anomaly.py").read_text(encoding="utf-8") == NETWORK
    assert (packed / "scripts" / "networks" / "slice_network.py").is_file()  # which the network alone imports
    assert not (packed / "scripts").is_symlink() and not (packed / "scripts" / "networks" / "ddim_anomaly.py").exists()
    done = run_forked(packed, "configs/inference.json", "--dataset_dir", patients, "--output_dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = ({k: v for k, v in files_below(p).items() if k.endswith(".nii.gz")} for p in (result, tmp_path / "out"))
    assert ours and ours == theirs
