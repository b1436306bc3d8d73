from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import SCHEMA, stand_in_engine

from scripts.data.cohort import generated_cases
from scripts.files import sha256_of
from scripts.release import verify
from scripts.tasks.generation.results import GeneratedSaver
from scripts.tasks.generation.transforms import seeded_noise

NAME = "brain_mri_anomaly_ddim"


@pytest.fixture
def copy(bundle, tmp_path) -> Path:
    """A copy of the bundle that may be spoilt."""
    return Path(shutil.copytree(bundle, tmp_path / NAME))


def edit_metadata(bundle: Path, **changes: object) -> None:
    path = bundle / "configs" / "metadata.json"
    meta = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({key: value for key, value in meta.items() if value is not None}))


@pytest.mark.skipif(not SCHEMA.is_file(), reason="MONAI's schema is not there")
def test_verify_holds_the_metadata_against_monais_schema(copy):
    edit_metadata(copy, network_data_format={"inputs": {}})
    meta = json.loads((copy / "configs" / "metadata.json").read_text(encoding="utf-8"))
    with pytest.raises(ValueError, match=r"'outputs' is a required property\s+Failed validating"):
        list(verify._metadata_faults(copy, meta, str(SCHEMA)))


def test_verify_takes_the_schema_from_the_given_file_and_never_from_the_network(copy, tmp_path, monkeypatch):
    meta = json.loads((copy / "configs" / "metadata.json").read_text(encoding="utf-8"))
    monkeypatch.setattr("monai.apps.utils.urlretrieve", lambda *args, **kwargs: pytest.fail("a download was begun"))
    schema = tmp_path / "schema.json"
    with pytest.raises(FileNotFoundError, match="schema.json: no such file"):
        list(verify._metadata_faults(copy, meta, str(schema)))
    schema.write_text(json.dumps({"required": ["version"]}))
    assert list(verify._metadata_faults(copy, meta, str(schema))) == []
    schema.write_text(json.dumps({"required": ["colour"]}))
    with pytest.raises(ValueError, match="'colour' is a required property"):
        list(verify._metadata_faults(copy, meta, str(schema)))


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"version": "9.9.9"}, "version 9.9.9 is not in the changelog"),
        ({"task": None}, "metadata.json has no 'task'"),
        ({"name": "other"}, "is named other"),
    ],
)
def test_verify_tells_faults_of_the_metadata(copy, changes, fault):
    edit_metadata(copy, **changes)
    meta = json.loads((copy / "configs" / "metadata.json").read_text(encoding="utf-8"))
    assert any(fault in line for line in verify._metadata_faults(copy, meta))


def test_verify_tells_weights_that_are_not_the_published_ones(copy):
    weights = copy / "models" / "model.pt"
    weights.write_bytes(weights.read_bytes() + b"0")
    meta = json.loads((copy / "configs" / "metadata.json").read_text(encoding="utf-8"))
    assert "SHA-256" in next(verify._weight_faults(copy, meta))


def test_verify_holds_every_file_of_weights_against_the_metadata(copy):
    def faults():
        return list(verify._weight_faults(copy, json.loads((copy / "configs" / "metadata.json").read_text("utf-8"))))

    assert faults() == []
    path = copy / "models" / "other.pt"
    torch.save({"weight": torch.zeros(2)}, path)
    assert faults() == [f"other.pt has the SHA-256 {sha256_of(path)}, metadata.json says None"]
    edit_metadata(copy, other_weights_sha256={"other.pt": sha256_of(path)})
    assert faults() == []
    path.unlink()
    assert faults() == ["other.pt is missing, metadata.json states its SHA-256"]


def test_verify_tells_a_missing_file(copy):
    (copy / "docs" / "data_license.txt").unlink()
    assert verify.verify(copy) == ["docs/data_license.txt is missing"]


def test_verify_tells_a_link_to_no_code(copy, monkeypatch):
    monkeypatch.setattr(verify, "_run_faults", lambda *args: iter(()))
    shutil.rmtree(copy / "scripts")
    (copy / "scripts").symlink_to("../nowhere")
    faults = verify.verify(copy)
    assert len(faults) == 2 and all(f"SystemExit: no scripts in {copy}" in fault for fault in faults)


def test_verify_tells_results_that_are_not_turned_back(copy):
    config = copy / "configs" / "inference.json"
    parsed = json.loads(config.read_text(encoding="utf-8"))
    steps = parsed["postprocessing"]["transforms"]
    steps.remove(next(step for step in steps if step["_target_"] == "Invertd"))
    parsed["num_steps"] = parsed["guidance_steps"] = 1
    config.write_text(json.dumps(parsed))
    assert any("ASL" in fault for fault in verify._orientation_faults(copy, {}))


@pytest.mark.parametrize(("shape", "affine"), [((8, 9, 6), [-4.5, -4.5, 5, 1]), ((8, 9, 6, 3), [2, 2, 5, 1])])
@pytest.mark.parametrize("turned_back", [True, False])
def test_orientation_is_checked_on_demo_scans_of_one_sequence_and_of_several(
    tmp_path, monkeypatch, shape, affine, turned_back
):
    def copy_scans(bundle, dataset_dir, output_dir):
        for name in ("plain", "turned"):
            scan = nib.load(dataset_dir / f"{name}.nii.gz")
            if not turned_back:  # right axes around data whose first axis was forgotten
                scan = nib.Nifti1Image(np.asarray(scan.dataobj)[:: 1 if name == "plain" else -1], scan.affine)
            for ending in ("seg", "map", "healthy"):
                (output_dir / name).mkdir(parents=True, exist_ok=True)
                nib.save(scan, output_dir / name / f"{name}_{ending}.nii.gz")

    monkeypatch.setattr(verify, "run_inference", copy_scans)
    data = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    (tmp_path / "docs").mkdir()
    nib.save(nib.Nifti1Image(data, np.diag(affine)), tmp_path / "docs" / "demo.nii.gz")
    faults = list(verify._orientation_faults(tmp_path, {}))
    assert len(faults) == (0 if turned_back else 3)
    assert all("ASL differs" in fault for fault in faults)


@pytest.fixture
def generated(tmp_path, monkeypatch) -> dict[str, object]:
    """Settings of an inference that is replaced by the saver: images of one grey level, or that depend on their number."""
    settings = {"flat": False, "together": False}

    def generate(bundle, dataset_dir, output_dir, number, seed, **others):
        saver = GeneratedSaver(output_dir, {"name": "cxr", "version": "1.0"}, "none.pt", "ddim", 5)
        saver.start(stand_in_engine())
        cases = generated_cases(number, seed)
        noise = [seeded_noise(case["seed"] + (number if settings["together"] else 0), (1, 8, 8)) for case in cases]
        pixels = [(255 * image.sigmoid() * (not settings["flat"])).byte() for image in noise]
        saver.save([{**case, "pred": image} for case, image in zip(cases, pixels, strict=True)])
        saver.draw_contact_sheet()

    monkeypatch.setattr(verify, "run_inference", generate)
    return settings


CXR = {"name": "cxr", "version": "1.0"}


def test_images_that_carry_their_mark_and_come_from_their_seeds_are_verified(generated, tmp_path):
    assert list(verify._generation_faults(tmp_path, CXR)) == []


def test_verify_tells_images_of_one_grey_level_and_marks_of_another_version(generated, tmp_path):
    generated["flat"] = True
    faults = list(verify._generation_faults(tmp_path, CXR | {"version": "2.0"}))
    assert faults == [
        fault
        for seed in (5, 6)
        for fault in (
            f"the image of seed {seed} is one grey level throughout",
            f"the PNG of seed {seed} does not say 2.0",
            f"the NIfTI of seed {seed} does not say 2.0",
        )
    ]


def test_verify_tells_an_image_that_its_seed_alone_does_not_give(generated, tmp_path):
    generated["together"] = True
    assert list(verify._generation_faults(tmp_path, CXR)) == ["the image of seed 6 depends on what is generated beside it"]


def test_a_network_that_noise_goes_into_is_verified_by_generating(tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "_generation_faults", lambda *args: iter(["generated"]))
    monkeypatch.setattr(verify, "_orientation_faults", lambda *args: iter(["turned"]))
    for kind, fault in (("noise", "generated"), ("image", "turned")):
        meta = {"network_data_format": {"inputs": {"image": {"type": kind}}}}
        assert list(verify._run_faults(tmp_path, meta)) == [fault]
