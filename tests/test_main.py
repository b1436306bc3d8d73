"""The command line as a user calls it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import ROOT, save_patient

from scripts import release

NAME = "brain_mri_anomaly_ddim"


def command(*args: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "scripts", *map(str, args)], cwd=ROOT, capture_output=True, text=True)


@pytest.fixture
def copy(bundle, tmp_path) -> Path:
    """A copy of the bundle that may be spoilt."""
    return Path(shutil.copytree(bundle, tmp_path / NAME))


def edit_metadata(bundle: Path, **changes: object) -> None:
    path = bundle / "configs" / "metadata.json"
    meta = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in meta.items() if value is not None}))


def test_list_names_every_bundle_with_its_version():
    done = command("list")
    names = [path.name for path in (ROOT / "bundles").iterdir()]
    assert sorted(line.split()[0] for line in done.stdout.splitlines()) == sorted(names)


def test_an_unknown_bundle_is_answered_with_the_known_ones():
    done = command("verify", "no_such_bundle")
    assert done.returncode == 1 and NAME in done.stderr and "Traceback" not in done.stderr


def test_demo_writes_the_results_where_it_says(tmp_path):
    done = command("demo", "--output_dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    paths = [Path(line.split(":", 1)[1].strip()) for line in done.stdout.splitlines()]
    assert len(paths) == 5 and all(path.is_file() for path in paths)
    mask = nib.load(tmp_path / "out" / "demo" / "demo_seg.nii.gz").get_fdata()
    assert mask.any(), "the demo scan has a lesion"


def test_verify_finds_no_fault_in_the_bundle(bundle):
    schema = ROOT.parent / "shared" / "schema" / "meta_schema_20240725.json"
    assert release.verify(bundle, str(schema) if schema.is_file() else None) == []


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
    meta = json.loads((copy / "configs" / "metadata.json").read_text())
    assert any(fault in line for line in release._metadata_faults(copy, meta))


def test_verify_tells_weights_that_are_not_the_published_ones(copy):
    weights = copy / "models" / "model.pt"
    weights.write_bytes(weights.read_bytes() + b"0")
    meta = json.loads((copy / "configs" / "metadata.json").read_text())
    assert "SHA-256" in next(release._weight_faults(copy, meta))


def test_verify_tells_a_missing_file(copy):
    (copy / "docs" / "data_license.txt").unlink()
    assert release.verify(copy) == ["docs/data_license.txt is missing"]


def test_verify_tells_results_that_are_not_turned_back(copy):
    config = copy / "configs" / "inference.json"
    parsed = json.loads(config.read_text())
    steps = parsed["postprocessing"]["transforms"]
    steps.remove(next(step for step in steps if step["_target_"] == "Invertd"))
    parsed["num_steps"] = parsed["guidance_steps"] = 1
    config.write_text(json.dumps(parsed))
    assert any("ASL" in fault for fault in release._orientation_faults(copy, {}))


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

    monkeypatch.setattr(release, "run_inference", copy_scans)
    data = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    (tmp_path / "docs").mkdir()
    nib.save(nib.Nifti1Image(data, np.diag(affine)), tmp_path / "docs" / "demo.nii.gz")
    faults = list(release._orientation_faults(tmp_path, {}))
    assert len(faults) == (0 if turned_back else 3)
    assert all("ASL differs" in fault for fault in faults)


def test_benchmark_and_tune_print_their_tables(tmp_path):
    save_patient(tmp_path / "scans", "p1", num_slices=4)
    options = ("--dataset_dir", tmp_path / "scans", "--num_slices", 2, "--section", "all")
    done = command("tune", NAME, *options, "--noise_levels", "[2]", "--gradient_scales", "[10,20]", "--num_steps", 1)
    assert done.returncode == 0, done.stderr
    assert [line.split("|")[1:3] for line in done.stderr.splitlines() if line.startswith("| 2")] == [
        [" 2 ", " 10 "],
        [" 2 ", " 20 "],
    ]


def test_package_and_download_by_the_command_line(tmp_path):
    done = command("package", NAME, "--output", tmp_path / "dist")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "dist" / NAME / "scripts" / "networks" / "ddim_anomaly.py").is_file()
    refused = command("download", NAME, "--url", "http://127.0.0.1:9/nothing.zip", "--output", tmp_path / "got")
    assert refused.returncode == 1 and len(refused.stderr.strip().splitlines()) == 1


def test_report_says_where_the_page_is_or_what_is_missing(tmp_path):
    assert "results.csv" in command("report", tmp_path).stderr
    (tmp_path / "results.csv").write_text(
        "case,finding_ml,score,trust,seconds,bundle,version,weights\na,1.0,0.1,0.9,2.0,b,0.1.0,abc\n"
    )
    done = command("report", tmp_path)
    assert done.stdout.strip() == str(tmp_path / "report.html") and "abc" in (tmp_path / "report.html").read_text()
