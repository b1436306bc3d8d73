"""What ends a command is told in one line, the last."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import BRAIN, CARDIAC, CHEST, make_cine, make_head, run_command, run_forked, save_nifti, save_patient

from scripts import messages


def told(error: BaseException, capsys: pytest.CaptureFixture) -> str:
    messages._tell(type(error), error, error.__traceback__)
    return capsys.readouterr().err


def wrapped(error: Exception) -> RuntimeError:
    """An error within the layers that MONAI puts around it."""
    for layer in ("Failed to instantiate component 'scripts.a' with keywords: b", "Failed to evaluate ConfigExpression"):
        outer = RuntimeError(layer)
        outer.__cause__ = error
        error = outer
    return error


def test_the_line_is_the_innermost_one(capsys):
    assert told(wrapped(ValueError("a.nii: torn;\n  mend it")), capsys) == "a.nii: torn; mend it\n"


def test_an_error_that_nobody_expected_has_its_kind_and_says_how_to_see_more(capsys):
    assert told(wrapped(KeyError("x")), capsys) == "KeyError: 'x' (--debug shows where)\n"
    assert told(ValueError(), capsys) == "ValueError:  (--debug shows where)\n"


def test_a_very_long_error_is_cut(capsys):
    assert len(told(ValueError("name " * 1000), capsys)) < 700


def test_ctrl_c_is_one_line(capsys):
    line = told(KeyboardInterrupt(), capsys)
    assert line.startswith("interrupted; ") and line.count("\n") == 1


def test_only_the_command_line_of_bundles_is_changed():
    assert not messages.is_bundle_command() and sys.excepthook is not messages._tell


def no_folder(tmp_path: Path) -> tuple:
    return (
        BRAIN,
        "configs/inference.json",
        ("--dataset_dir", tmp_path / "nowhere"),
        "nowhere: no such folder; give the folder",
    )


def wrong_sampler(tmp_path: Path) -> tuple:
    return CHEST, "configs/inference.json", ("--sampler", "fast"), "fast"


def one_patient(tmp_path: Path) -> tuple:
    save_patient(tmp_path / "scans", "p0")
    settings = ("--dataset_dir", tmp_path / "scans", "--ckpt_dir", tmp_path / "models")
    return BRAIN, "configs/train.json", settings, "29 patients are enough in 19 of 20 cohorts"


def bad_frames(tmp_path: Path) -> tuple:
    save_nifti(tmp_path / "scans" / "a.nii.gz", make_cine(3)[0])
    (tmp_path / "scans" / "frames.csv").write_text("file,ed\na.nii.gz,0\n")
    return CARDIAC, "configs/inference.json", ("--dataset_dir", tmp_path / "scans"), "frames.csv: needs the columns file, ed"


@pytest.mark.parametrize("make", [no_folder, wrong_sampler, one_patient, bad_frames])
def test_what_is_wrong_comes_last_and_alone(tmp_path, make):
    bundle, config, settings, words = make(tmp_path)
    done = run_forked(bundle, config, *settings, "--output_dir", tmp_path / "out")
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr, done.stderr
    assert words in done.stderr.splitlines()[-1]


def test_a_traceback_comes_with_debug(tmp_path):
    bundle, config, settings, words = no_folder(tmp_path)
    done = run_forked(bundle, config, *settings, "--debug")
    assert done.returncode == 1 and "Traceback" in done.stderr and words in done.stderr


def test_ctrl_c_ends_a_run_with_one_line(tmp_path):
    save_nifti(tmp_path / "scans" / "p1.nii.gz", make_head(num_slices=8)[0])
    settings = ("--dataset_dir", tmp_path / "scans", "--output_dir", tmp_path / "out", "--num_steps", 1000)
    command = [sys.executable, *run_command("configs/inference.json", *settings)]
    with open(tmp_path / "log", "w+") as log:
        # a shell lets what it begins in the background ignore Ctrl-C
        process = subprocess.Popen(
            command, cwd=BRAIN, stdout=log, stderr=log, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
        )
    try:
        while "computing on" not in (text := (tmp_path / "log").read_text()):
            assert process.poll() is None, text
            time.sleep(0.2)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        process.wait(60)
    finally:
        process.kill()
    text = (tmp_path / "log").read_text()
    assert process.returncode and "Traceback" not in text and text.splitlines()[-1].startswith("interrupted; "), text
