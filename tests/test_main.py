"""The command line as a user calls it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import pytest
from conftest import ROOT, SCHEMA, rows_of, save_patient

from scripts import __main__ as main
from scripts.tables import write_rows
from scripts.tasks.motion.comparison import COLUMNS

NAME = "brain_mri_anomaly_ddim"
MEASURED = {column for columns, _ in COLUMNS.values() for column in columns}  # of an evaluated cine


def command(*args: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "scripts", *map(str, args)], cwd=ROOT, capture_output=True, text=True)


def test_list_names_every_bundle_with_its_version():
    done = command("list")
    names = [path.name for path in (ROOT / "bundles").iterdir()]
    assert sorted(line.split()[0] for line in done.stdout.splitlines()) == sorted(names)


def test_an_unknown_bundle_is_answered_with_the_known_ones():
    done = command("verify", "no_such_bundle")
    assert done.returncode == 1 and NAME in done.stderr and "Traceback" not in done.stderr


def test_demo_writes_the_results_where_it_says(tmp_path):
    done = command("demo", "--output_dir", tmp_path / "out", "--num_steps", 3, "--guidance_steps", 1)
    assert done.returncode == 0, done.stderr
    paths = [Path(line.split(":", 1)[1].strip()) for line in done.stdout.splitlines()]
    assert len(paths) == 5 and all(path.is_file() for path in paths)
    mask = nib.load(tmp_path / "out" / "demo" / "demo_seg.nii.gz").get_fdata()
    assert mask.any(), "the demo scan has a lesion"


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "bundles").iterdir()))
def test_verify_finds_no_fault_in_the_bundle(name):
    done = command("verify", name, *(("--schema", SCHEMA) if SCHEMA.is_file() else ()))
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == f"{name}: verified", done.stdout + done.stderr


def test_verify_says_what_is_not_checked_without_a_schema(capsys, monkeypatch):
    monkeypatch.setattr(main, "faults_of", lambda bundle, schema: [])
    main.verify(NAME)
    assert capsys.readouterr().out.splitlines() == [
        "not checked, as no --schema is given: the metadata beyond the required keys",
        f"{NAME}: verified",
    ]
    main.verify(NAME, schema="schema.json")
    assert capsys.readouterr().out.splitlines() == [f"{NAME}: verified"]


def test_compare_evaluates_every_method_of_the_bundle_on_the_same_section(tmp_path, monkeypatch):
    runs = {}

    def evaluate(bundle, dataset_dir, output_dir, configs, **settings):
        runs[output_dir.name] = (configs, settings)
        cases = [{"case": name, "group": "", **dict.fromkeys(MEASURED, 0.5)} for name in ("a", "b")]
        for table in ("metrics", "results"):
            write_rows(output_dir / f"{table}.csv", [{**case, "seconds": 1} for case in cases])

    monkeypatch.setattr(main, "run_inference", evaluate)
    also = tmp_path / "also.json"
    also.write_text(json.dumps({"mine": {"configs": ["evaluate_voxelmorph"], "smoothness": 3}}))
    options = {"dataset_dir": tmp_path, "output_dir": tmp_path / "out", "also": also, "amp": False}
    main.compare("cardiac_mri_deformable_diffusion", **options)
    assert runs["default"] == (("evaluate",), {"section": "test", "amp": False})
    changes = {"section": "test", "amp": False, "coarse_steps": 40}
    assert runs["refinement_alone_as_long"] == (("evaluate", "evaluate_refinement"), changes)
    assert runs["mine"] == (("evaluate", "evaluate_voxelmorph"), {"section": "test", "amp": False, "smoothness": 3})
    assert {row["method"] for row in rows_of(tmp_path / "out" / "comparison.csv")} >= {"default", "networks alone", "mine"}
    with pytest.raises(SystemExit, match="methods of its own"):
        main.compare("cardiac_mri_deformable_diffusion", NAME, **options)


def test_a_comparison_of_anomalies_refuses_a_setting_that_it_does_not_have(tmp_path):
    with pytest.raises(SystemExit, match="--most_ml: no such setting"):
        main.compare(NAME, dataset_dir=tmp_path, output_dir=tmp_path / "out", most_ml=3)
    assert not (tmp_path / "out").exists()


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
        "case,finding_ml,score,probability,seconds,bundle,version,weights\na,1.0,0.1,0.9,2.0,b,0.1.0,abc\n"
    )
    done = command("report", tmp_path)
    assert done.stdout.strip() == str(tmp_path / "report.html") and "abc" in (tmp_path / "report.html").read_text(
        encoding="utf-8"
    )
