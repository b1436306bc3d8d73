"""Nothing that a user owns is renamed away, replaced or removed, whatever the output folder is."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    BRAIN,
    CARDIAC,
    HEAD_CT,
    files_below,
    make_ct_slice,
    make_head,
    rows_of,
    run_forked,
    save_nifti,
    save_patient,
)
from ignite.engine import Engine
from monai.transforms import Compose
from PIL import Image

import scripts.files
from scripts.__main__ import draw
from scripts.data.cohort import CohortDataset, generated_cases, unfinished
from scripts.data.labels import LoadLabelsd
from scripts.data.layouts import find_cases
from scripts.data.reading import LoadSequencesd
from scripts.data.slices import SliceDataset
from scripts.engines import CohortEvaluator, ema_of
from scripts.files import files_written_aside, own_file, recorded_files, written_aside
from scripts.handlers import ModelSaver, TrainingCheckpoint
from scripts.release.package import package
from scripts.release.report import report
from scripts.results import FolderSaver
from scripts.tasks.anomaly.evaluation import sprite_table
from scripts.tasks.generation.evaluation import generation_table
from scripts.tasks.generation.results import GeneratedSaver
from scripts.tasks.motion.metrics import CineMetrics

QUICK = ("--spatial_size", "[32,32]", "--pixdim", "[8,8,-1]", "--num_steps", 1, "--guidance_steps", 1)
HEAD_QUICK = ("--spatial_size", "[32,32]", "--pixdim", 8.6, "--num_steps", 1)
HEAD_QUICK += ("--band_levels", 2, "--calibrated_for#band_levels", 2)
META = {"name": "a bundle", "version": "1.0"}


def write(folder: Path, **files: str) -> None:
    with files_written_aside(folder) as aside:
        for name, words in files.items():
            (aside / name).write_text(words)


def texts(folder: Path) -> dict[str, str]:
    """Texts of the files in a folder, but for its record."""
    return {path.name: path.read_text() for path in sorted(folder.iterdir()) if path.name != f"{folder.name}_files.csv"}


# --- files that are put into a folder


def test_a_folder_of_files_lists_them_with_their_hashes(tmp_path):
    write(tmp_path / "p1", a="one", b="two")
    assert texts(tmp_path / "p1") == {"a": "one", "b": "two"} and os.listdir(tmp_path) == ["p1"]
    assert {name for name, _ in recorded_files(tmp_path / "p1")} == {"a", "b"}


def test_files_are_written_again_beside_those_of_somebody_else_and_the_programs_old_ones_go(tmp_path):
    write(tmp_path / "p1", a="one", b="two")
    (tmp_path / "p1" / "notes.txt").write_text("mine")
    (tmp_path / "p1" / "more").mkdir()
    (tmp_path / "p1" / "more" / "scan").write_text("mine")
    write(tmp_path / "p1", a="three")
    (tmp_path / "p1" / "more" / "scan").unlink()
    (tmp_path / "p1" / "more").rmdir()
    assert texts(tmp_path / "p1") == {"a": "three", "notes.txt": "mine"}
    assert {name for name, _ in recorded_files(tmp_path / "p1")} == {"a"}


def test_a_file_that_was_changed_or_never_recorded_is_not_replaced_and_nothing_else_is(tmp_path):
    write(tmp_path / "changed", a="one", b="two")
    (tmp_path / "changed" / "b").write_text("corrected")
    (tmp_path / "older").mkdir()
    (tmp_path / "older" / "b").write_text("of an older version")
    before = files_below(tmp_path)
    for folder in ("changed", "older"):
        with pytest.raises(ValueError, match=f"{folder}/b: is not replaced.*move it elsewhere, or choose another"):
            write(tmp_path / folder, a="three", b="four")
    assert files_below(tmp_path) == before


def test_a_changed_file_that_is_not_written_again_stays(tmp_path):
    write(tmp_path / "p1", a="one", b="two")
    (tmp_path / "p1" / "b").write_text("corrected")
    write(tmp_path / "p1", a="three")
    assert texts(tmp_path / "p1") == {"a": "three", "b": "corrected"}


@pytest.mark.parametrize("moment", range(7))
def test_a_process_that_is_killed_amid_the_files_leaves_a_folder_that_the_next_one_knows(tmp_path, monkeypatch, moment):
    write(tmp_path / "p1", a="one", b="two", c="three")
    replace, calls = os.replace, []

    class Killed(BaseException):
        pass

    def killed(source, target):
        calls.append(target)
        if len(calls) > moment:
            raise Killed
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(scripts.files.os, "replace", killed)
        try:
            write(tmp_path / "p1", a="1", b="2")
        except Killed:
            pass
    write(tmp_path / "p1", a="1", b="2")
    assert texts(tmp_path / "p1") == {"a": "1", "b": "2"}


def test_a_file_never_takes_the_place_of_a_folder(tmp_path):
    (tmp_path / "results.csv").mkdir()
    (tmp_path / "results.csv" / "mine").write_text("mine")
    with pytest.raises(OSError), written_aside(tmp_path / "results.csv") as aside:
        aside.write_text("a table")
    assert files_below(tmp_path) == {"results.csv/mine": b"mine"}


# --- before the first case


@pytest.mark.parametrize(
    ("image", "output"),
    [
        ("p1/p1_t1.nii.gz", "."),  # --dataset_dir x --output_dir x
        ("p1/series/p1.nii.gz", "."),
        ("series", "series/results"),
        ("p1", "."),
        ("p1", "elsewhere/.."),
    ],
)
def test_results_that_would_lie_around_an_input_or_in_one_are_refused(tmp_path, image, output):
    path = tmp_path / image
    (path / "1.dcm" if "." not in image else path).parent.mkdir(parents=True)
    path.touch() if "." in image else (path / "1.dcm").touch()
    (tmp_path / "elsewhere").mkdir()
    case = {"case": "p1", "image": [None, str(path)]}
    with pytest.raises(ValueError, match=f"{path}: is an input.*choose another --output_dir"):
        unfinished([{"case": "p0", "image": str(tmp_path / "p0.nii")}, case], tmp_path / output, overwrite=True)


@pytest.mark.parametrize("key", ["label", "target_label"])
def test_a_label_in_the_folder_of_results_is_refused(tmp_path, key):
    case = {"case": "p1", "image": str(tmp_path / "a.nii.gz"), key: str(tmp_path / "out" / "p1" / "p1_seg.nii.gz")}
    with pytest.raises(ValueError, match="is an input"):
        unfinished([case], tmp_path / "out")


def test_a_link_in_the_folder_of_results_that_leads_to_an_input_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "p1").symlink_to(tmp_path / "scans" / "p1")
    case = {"case": "p1", "image": str(tmp_path / "scans" / "p1" / "p1_t1.nii.gz")}
    with pytest.raises(ValueError, match="is an input"):
        unfinished([case], tmp_path / "out")


def test_results_beside_the_scans_of_a_folder_are_no_danger(tmp_path):
    cases = [{"case": "p1", "patient": "p1", "image": str(tmp_path / "p1.nii.gz"), "frames": (0, 1)}]
    assert unfinished(cases, tmp_path) == cases


def test_a_table_of_somebody_else_is_refused_and_stays(tmp_path):
    (tmp_path / "results.csv").write_text("patient,age\nx,3\n")
    for overwrite in (True, False):
        with pytest.raises(ValueError, match=r"results.csv: is not of this program, .*choose another --output_dir"):
            unfinished([{"case": "p1", "image": "p1.nii.gz"}], tmp_path, overwrite)


def test_cases_of_one_name_are_refused_together_and_the_others_are_done(tmp_path):
    cases = [{"case": name, "image": f"/scans/{file}"} for name, file in (("a", "a.nii"), ("b", "b.nii"), ("a", "a.nii.gz"))]
    left = unfinished(cases, tmp_path)
    assert [case["case"] for case in left] == ["a", "b"] and left[1] == cases[1]
    assert left[0]["failure"].startswith("/scans/a.nii and /scans/a.nii.gz: 2 cases have one name")
    assert CohortDataset(left, lambda case: case)[0] == left[0]
    (tmp_path / "results.csv").write_text("case\na\n")  # of an earlier version, which did one of them
    assert unfinished(cases, tmp_path) == left
    assert [unfinished(cases, tmp_path, rank=rank, world_size=2) for rank in (0, 1)] == [left[:1], left[1:]]


class WordSaver(FolderSaver):
    endings = ("a.txt",)

    def write(self, folder, name, case):
        (folder / f"{name}_a.txt").write_text(case["words"])

    def figures(self, case):
        return {}


def engine_over(*names: str) -> SimpleNamespace:
    """What a saver asks of the engine that it starts with, which goes over cases of these names."""
    dataset = SimpleNamespace(data=[{"case": name} for name in names])
    state = SimpleNamespace(device=torch.device("cpu"), dataloader=SimpleNamespace(dataset=dataset))
    return SimpleNamespace(network=SimpleNamespace(amp=False), state=state)


def test_results_without_a_record_are_told_before_the_first_case_is_computed(tmp_path):
    saver = WordSaver(tmp_path, META, "none.pt")
    saver.start(engine_over("p1", "p2"))
    saver.save({"case": "p1", "words": "one"})
    saver.start(engine_over("p1", "p2"))
    for name in ("p2", "p3"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}_a.txt").write_text("of an older version")
    with pytest.raises(ValueError, match=r"p2_a.txt: would be replaced.*\(2 such files\); move it elsewhere"):
        saver.start(engine_over("p1", "p2", "p3"))


def test_trying_the_output_folder_leaves_what_is_in_it(tmp_path):
    (tmp_path / "write_test").mkdir()
    (tmp_path / "write_test" / "mine").write_text("mine")
    WordSaver(tmp_path, META, "none.pt").start(engine_over())
    assert files_below(tmp_path) == {"write_test/mine": b"mine"}


def test_failures_of_somebody_else_stay(tmp_path, caplog):
    (tmp_path / "failures.csv").write_text("case,why\na,b\n")
    for failures in ({}, {"p1": "torn"}):
        evaluator = SimpleNamespace(failures=failures)
        try:
            CohortEvaluator.report_failures(evaluator, tmp_path)
        except SystemExit as error:
            assert "p1: torn" in str(error)
    assert (tmp_path / "failures.csv").read_text() == "case,why\na,b\n"
    assert "failures.csv: is not of this program" in caplog.text


# --- single files: tables, pictures, pages, weights


def test_a_single_file_is_written_again_where_the_program_wrote_it_and_no_other_is_replaced(tmp_path):
    for words in ("one", "two"):
        for name in ("a", "b"):
            with own_file(tmp_path / name) as aside:
                aside.write_text(f"{name} {words}")
    assert texts(tmp_path) == {"a": "a two", "b": "b two"}
    (tmp_path / "a").write_text("corrected")
    (tmp_path / "c").write_text("mine")
    before = files_below(tmp_path)
    for name in ("a", "c"):
        with (
            pytest.raises(ValueError, match=rf"{name}: is not replaced.*move it elsewhere"),
            own_file(tmp_path / name) as aside,
        ):
            aside.write_text("lost")
    assert files_below(tmp_path) == before


@pytest.mark.parametrize("moment", range(6))
def test_a_process_that_is_killed_amid_a_single_file_leaves_what_the_next_one_knows(tmp_path, monkeypatch, moment):
    def write_file(words):
        with own_file(tmp_path / "a") as aside:
            aside.write_text(words)

    class Killed(BaseException):
        pass

    replace, calls = os.replace, []

    def killed(source, target):
        calls.append(target)
        if len(calls) > moment:
            raise Killed
        replace(source, target)

    write_file("one")
    with monkeypatch.context() as patched:
        patched.setattr(scripts.files.os, "replace", killed)
        try:
            write_file("two")
        except Killed:
            pass
    write_file("three")
    assert texts(tmp_path) == {"a": "three"}
    assert {name for name, _ in recorded_files(tmp_path)} == {"a"} and len(recorded_files(tmp_path)) == 1


def test_weights_that_no_training_wrote_are_kept_beside_those_that_replace_them(tmp_path, caplog):
    (tmp_path / "model.pt").write_bytes(b"shipped")
    trainer = Engine(lambda engine, batch: None)
    ModelSaver(tmp_path / "model.pt", ema_of(torch.nn.Linear(2, 3))).attach(trainer)
    trainer.run([0], max_epochs=3)
    kept = f"model.pt.{hashlib.sha256(b'shipped').hexdigest()[:12]}"
    assert sorted(os.listdir(tmp_path)) == sorted(["model.pt", kept, f"{tmp_path.name}_files.csv"])
    assert (tmp_path / kept).read_bytes() == b"shipped" and torch.load(tmp_path / "model.pt", weights_only=True)
    assert sum(f"its content is kept as {kept}" in line for line in caplog.messages) == 1


def test_a_state_that_is_no_trainings_is_told_and_stays(tmp_path):
    torch.save({"mine": torch.ones(3)}, tmp_path / "checkpoint.ckpt")
    before = files_below(tmp_path)
    with pytest.raises(ValueError, match=r"checkpoint.ckpt: is no state of such a training; move it elsewhere"):
        TrainingCheckpoint(tmp_path / "checkpoint.ckpt", {}, None).resume(Engine(lambda *_: None))
    assert files_below(tmp_path) == before


def test_tables_and_pictures_of_somebody_else_are_told_before_the_evaluation(tmp_path):
    (tmp_path / "lv_volume.png").write_text("mine")
    with pytest.raises(ValueError, match="lv_volume.png: is not replaced"):
        CineMetrics(tmp_path)._check_own()
    (tmp_path / "metrics.csv").write_text("mine")
    with pytest.raises(ValueError, match="metrics.csv: is not replaced"):
        sprite_table({}, torch.zeros(2, 1, 8, 8), tmp_path)
    with pytest.raises(ValueError, match="metrics.csv: is not replaced"):
        generation_table({}, *[torch.zeros(2, 1, 8, 8)] * 3, None, tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.csv").write_text("case\na\n")
    (tmp_path / "out" / "report.html").write_text("mine")
    with pytest.raises(SystemExit, match="report.html: is not replaced"):
        report(tmp_path / "out")
    assert (tmp_path / "out" / "report.html").read_text() == (tmp_path / "metrics.csv").read_text() == "mine"


def test_a_package_is_made_again_but_never_over_weights_that_were_trained_in_it(tmp_path):
    package(BRAIN, tmp_path)
    package(BRAIN, tmp_path)
    weights = tmp_path / BRAIN.name / "models" / "model.pt"
    weights.write_bytes(b"trained for days")
    with pytest.raises(ValueError, match="model.pt: is not replaced"):
        package(BRAIN, tmp_path)
    assert weights.read_bytes() == b"trained for days"


def test_a_drawn_scan_takes_the_place_of_no_file(tmp_path):
    (tmp_path / "scan.nii.gz").write_text("mine")
    with pytest.raises(SystemExit, match="scan.nii.gz: is there already, and is not replaced; name another file"):
        draw(CARDIAC.name, str(tmp_path / "scan.nii.gz"))
    assert (tmp_path / "scan.nii.gz").read_text() == "mine"


# --- two files where one is wanted


def test_two_masks_or_two_files_of_a_sequence_are_refused_with_both_names_and_other_cases_are_not(tmp_path):
    for name in ("p1", "p2", "p3"):
        save_patient(tmp_path, name, num_slices=1)
    save_nifti(tmp_path / "p2" / "p2_seg.nii", make_head(num_slices=1)[1])
    save_nifti(tmp_path / "p3" / "p3_t1.nii", make_head(num_slices=1)[0][..., 0])
    cases = find_cases(tmp_path, ("t1", "flair", "t1ce"))
    read = Compose([LoadSequencesd("image", ("t1", "flair", "t1ce")), LoadLabelsd()])
    first, *failed = (CohortDataset(cases, read)[number] for number in range(3))
    assert "failure" not in first and first["label"].shape == (1, 128, 128, 1)
    for case, file in zip(failed, ("p2_seg", "p3_t1"), strict=True):
        assert f"{file}.nii and {tmp_path}" in case["failure"] and f"{file}.nii.gz: two" in case["failure"]
    with pytest.raises(ValueError, match=r"2 of 3 cases can't be used for training:\n.*p2_seg.nii.*\n.*p3_t1.nii"):
        SliceDataset(cases, read)


def test_two_masks_of_a_picture_are_refused(tmp_path):
    for name in ("a.png", "a_seg.png", "a_seg.bmp"):
        Image.fromarray(make_ct_slice()).save(tmp_path / name)
    (case,) = find_cases(tmp_path, ("ct",), pictures=True)
    assert [Path(path).name for path in case["label"]] == ["a_seg.bmp", "a_seg.png"]


# --- generated images


def generated_saver(folder: Path) -> GeneratedSaver:
    return GeneratedSaver(folder, META, "none.pt", "ddim", 5)


@pytest.mark.parametrize("name", ["generated_6.png", "generated_6.nii.gz", "contact_sheet.png"])
def test_a_picture_that_was_not_generated_is_not_replaced(tmp_path, name):
    if name.endswith("png"):
        Image.fromarray(make_ct_slice()).save(tmp_path / name)
    else:
        save_nifti(tmp_path / name, make_ct_slice()[..., None])
    engine = engine_over(*(case["case"] for case in generated_cases(2, 5)))
    with pytest.raises(ValueError, match=f"{name}: would be replaced"):
        generated_saver(tmp_path).start(engine)


def test_generated_images_are_known_by_their_mark_and_made_again(tmp_path):
    saver, cases = generated_saver(tmp_path), generated_cases(2, 5)
    engine = engine_over(*(case["case"] for case in cases))
    for _ in range(2):
        saver.start(engine)
        saver.save([{**case, "pred": torch.full((1, 8, 8), 7, dtype=torch.uint8)} for case in cases])
        saver.draw_contact_sheet()
    assert [row["seed"] for row in rows_of(tmp_path / "generated.csv")] == ["5", "6"]


# --- a run as a user begins it


@pytest.mark.parametrize("place", [".", "p1"])
def test_an_output_folder_that_is_the_input_is_refused_and_every_file_stays(tmp_path, place):
    save_patient(tmp_path / "p1", "p1", num_slices=1) if place == "p1" else save_patient(tmp_path, "p1", num_slices=1)
    (tmp_path / "p1" / "notes.txt").write_text("mine")
    before = files_below(tmp_path)
    paths = ("--dataset_dir", tmp_path / place, "--output_dir", tmp_path / place)
    done = run_forked(BRAIN, "configs/inference.json", *paths, "--overwrite", True, *QUICK)
    assert done.returncode == 1 and "is an input" in done.stderr and "choose another --output_dir" in done.stderr
    assert files_below(tmp_path) == before


def test_what_a_user_put_into_the_folder_of_a_case_stays_when_it_is_done_again(tmp_path):
    save_nifti(tmp_path / "scans" / "p1.nii.gz", make_head(num_slices=1)[0])
    run = ("--dataset_dir", tmp_path / "scans", "--output_dir", tmp_path / "out", *QUICK, "--handlers#0#picture", False)
    run += ("--skip_below", 0)  # a made head looks healthy, and would stay as it is
    assert run_forked(BRAIN, "configs/inference.json", *run).returncode == 0
    case = tmp_path / "out" / "p1"
    (case / "notes.txt").write_text("mine")
    written = (case / "p1_map.nii.gz").read_bytes()
    done = run_forked(BRAIN, "configs/inference.json", *run, "--overwrite", True, "--noise_level", 300)
    assert done.returncode == 0, done.stderr
    assert (case / "notes.txt").read_text() == "mine" and (case / "p1_map.nii.gz").read_bytes() != written

    (case / "p1_seg.nii.gz").write_bytes(b"corrected by hand")
    before = files_below(case)
    done = run_forked(BRAIN, "configs/inference.json", *run, "--overwrite", True)
    assert done.returncode == 1 and "p1_seg.nii.gz: is not replaced, as it was changed" in done.stderr
    assert files_below(case) == before
    assert np.asarray(rows_of(tmp_path / "out" / "failures.csv")).size == 1


@pytest.mark.parametrize(
    ("bundle", "names", "settings"),
    [(BRAIN, ("dup.nii", "dup.nii.gz"), QUICK), (HEAD_CT, ("dup.png", "dup.bmp"), HEAD_QUICK)],
    ids=lambda value: getattr(value, "name", None),
)
def test_two_files_of_one_name_fail_with_both_paths_and_the_other_case_is_done(tmp_path, bundle, names, settings):
    for name in (*names, names[0].replace("dup", "other")):
        if bundle is BRAIN:
            save_nifti(tmp_path / "scans" / name, make_head(num_slices=1)[0])
        else:
            (tmp_path / "scans").mkdir(exist_ok=True)
            Image.fromarray(make_ct_slice()).save(tmp_path / "scans" / name)
    paths = ("--dataset_dir", tmp_path / "scans", "--output_dir", tmp_path / "out", "--handlers#0#picture", False)
    done = run_forked(bundle, "configs/inference.json", *paths, *settings)
    assert done.returncode == 1, done.stderr
    (failure,) = rows_of(tmp_path / "out" / "failures.csv")
    assert failure["case"] == "dup" and all(str(tmp_path / "scans" / name) in failure["reason"] for name in names)
    assert [row["case"] for row in rows_of(tmp_path / "out" / "results.csv")] == ["other"]
    assert not (tmp_path / "out" / "dup").exists()
