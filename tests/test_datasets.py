from __future__ import annotations

import csv
import itertools
import logging
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import itk
import numpy as np
import pytest
import torch
from monai.data import DataLoader
from monai.transforms import Compose, RandFlipd, RandScaleIntensityd

from scripts.data.cines import find_cines
from scripts.data.cohort import CohortDataset, generated_cases, root_cause, unfinished
from scripts.data.layouts import add_slice_labels, find_cases, folder_pair, training_cases
from scripts.data.sections import section_by_order, section_of, take_section
from scripts.data.slices import BalancedBatchSampler, ShuffledBatchSampler, SliceDataset

SEQUENCES = ("t1", "flair")
SECTIONS = ("training", "validation", "test")


def touch(folder, *names):
    """Empty files, with their folders."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def table(path, *rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


# --- find_cases


def test_patients_in_the_layout_of_brats_are_found_in_the_order_of_the_sequences(tmp_path):
    touch(tmp_path, "b/b_flair.nii.gz", "b/b_t1.nii", "b/b_seg.nii.gz", "b/b_t2.nii.gz", "a/a_t1.nii.gz", "readme.txt")
    assert find_cases(tmp_path, SEQUENCES) == [
        {"case": "a", "image": [str(tmp_path / "a/a_t1.nii.gz"), None]},
        {
            "case": "b",
            "image": [str(tmp_path / "b/b_t1.nii"), str(tmp_path / "b/b_flair.nii.gz")],
            "label": str(tmp_path / "b/b_seg.nii.gz"),
        },
    ]


def test_the_suffix_of_the_masks_can_be_chosen(tmp_path):
    touch(tmp_path, "a/a_t1.nii.gz", "a/a_seg.nii.gz", "a/a_lesion.nii.gz")
    (case,) = find_cases(tmp_path, SEQUENCES, label="lesion")
    assert case["label"].endswith("a_lesion.nii.gz")


def test_in_a_flat_folder_every_nifti_file_is_a_case_and_masks_are_none(tmp_path):
    touch(tmp_path, "b.nii", "a.nii.gz", "a_seg.nii.gz", "notes.csv")
    assert find_cases(tmp_path, SEQUENCES) == [
        {"case": "a", "image": str(tmp_path / "a.nii.gz"), "label": str(tmp_path / "a_seg.nii.gz")},
        {"case": "b", "image": str(tmp_path / "b.nii")},
    ]


def test_a_folder_with_dicom_files_is_a_case(tmp_path):
    touch(tmp_path, "series2/1.dcm", "series1/1.dcm", "series1/2.dcm", "empty/readme.txt")
    assert find_cases(tmp_path, SEQUENCES) == [{"case": f"series{i}", "image": str(tmp_path / f"series{i}")} for i in (1, 2)]


def test_a_single_file_is_a_case(tmp_path):
    touch(tmp_path, "a.b.nii.gz", "c.nii.gz")
    assert find_cases(tmp_path / "a.b.nii.gz", SEQUENCES) == [{"case": "a.b", "image": str(tmp_path / "a.b.nii.gz")}]


@pytest.mark.parametrize("names", [("a/a_t1.nii.gz", "a/a_flair.nii.gz"), ("a/1.dcm",)], ids=["brats", "dicom"])
def test_a_single_patients_folder_is_the_case_that_it_is_among_others(tmp_path, names):
    touch(tmp_path, *names)
    assert find_cases(tmp_path / "a", SEQUENCES) == find_cases(tmp_path, SEQUENCES)
    assert [case["case"] for case in find_cases(tmp_path, SEQUENCES)] == ["a"]


def test_the_current_folder_can_be_a_patients_folder(tmp_path, monkeypatch):
    touch(tmp_path, "a/a_t1.nii.gz")
    monkeypatch.chdir(tmp_path / "a")
    assert [case["case"] for case in find_cases(".", SEQUENCES)] == ["a"]


def test_hidden_files_and_folders_are_ignored(tmp_path):
    touch(tmp_path, "a.nii.gz", "._a.nii.gz", ".DS_Store", ".b/.b_t1.nii.gz", ".c/1.dcm", "d/._1.dcm")
    assert [case["case"] for case in find_cases(tmp_path, SEQUENCES)] == ["a"]


def test_a_missing_folder_is_told_with_its_name_and_the_mend(tmp_path):
    with pytest.raises(FileNotFoundError, match="scans: no such folder.*--dataset_dir"):
        find_cases(tmp_path / "scans", SEQUENCES)


@pytest.mark.parametrize("names", [(), ("a/b_t1.nii.gz", "notes.txt")], ids=["empty", "nothing known"])
def test_a_folder_without_scans_is_told_with_its_name_and_what_is_expected(tmp_path, names):
    with pytest.raises(FileNotFoundError, match="no scan found; expected <patient>/<patient>_t1.nii.gz") as error:
        find_cases(touch(tmp_path, *names), SEQUENCES)
    assert str(error.value).startswith(str(tmp_path)) and "\n" not in str(error.value)


def test_a_section_gives_its_cases_alone(tmp_path):
    touch(tmp_path, *(f"case{i}.nii.gz" for i in range(40)))
    parts = [find_cases(tmp_path, SEQUENCES, section=section) for section in SECTIONS]
    assert all(section_of(c["case"]) == section for part, section in zip(parts, SECTIONS, strict=True) for c in part)
    assert sorted(c["case"] for part in parts for c in part) == [c["case"] for c in find_cases(tmp_path, SEQUENCES)]


# --- find_cases with pictures


def names_of(cases):
    return [case["case"] for case in cases]


def save_dicom(path, series):
    writer_io = itk.GDCMImageIO.New()
    writer_io.KeepOriginalUIDOn()
    image = itk.image_from_array(np.arange(20, dtype=np.int16).reshape(1, 5, 4))
    tags = image.GetMetaDataDictionary()
    tags["0008|0060"], tags["0020|000d"], tags["0020|000e"] = "CT", "1.2.3", f"1.2.4.{series}"
    tags["0008|0018"] = f"1.2.5.{path.stem}"
    writer = itk.ImageFileWriter[type(image)].New(Input=image, FileName=str(path), ImageIO=writer_io)
    writer.UseInputMetaDataDictionaryOn()
    writer.Update()


def test_pictures_are_cases_and_their_masks_are_none(tmp_path):
    touch(tmp_path, "b.JPEG", "a.png", "a_seg.bmp", "c.tif", ".d.png", "notes.txt", "e.nii.gz", "e_seg.nii.gz", "f/f_t1.nii")
    assert find_cases(tmp_path, SEQUENCES, pictures=True) == [
        {"case": "a", "image": str(tmp_path / "a.png"), "label": str(tmp_path / "a_seg.bmp")},
        {"case": "b", "image": str(tmp_path / "b.JPEG")},
        {"case": "c", "image": str(tmp_path / "c.tif")},
        {"case": "e", "image": str(tmp_path / "e.nii.gz"), "label": str(tmp_path / "e_seg.nii.gz")},
        {"case": "f", "image": [str(tmp_path / "f/f_t1.nii"), None]},
    ]
    assert names_of(find_cases(tmp_path, SEQUENCES)) == ["e", "f"]


def test_the_only_folder_with_pictures_stands_for_a_folder_without_cases(tmp_path, caplog):
    touch(tmp_path, "HeadCT/000000.jpeg", "HeadCT/000001.jpeg", "docs/readme.txt")
    expected = find_cases(tmp_path / "HeadCT", SEQUENCES, pictures=True)
    assert find_cases(tmp_path, SEQUENCES, pictures=True) == expected
    assert names_of(expected) == ["000000", "000001"] and "HeadCT" not in caplog.text


@pytest.mark.parametrize("names", [("a/1.png", "b/1.png"), ("a/notes.txt",)], ids=["two folders", "no picture"])
def test_a_folder_without_pictures_of_its_own_is_told_what_is_expected(tmp_path, names):
    with pytest.raises(FileNotFoundError, match="no scan found; expected.*or pictures.*only sub-folder") as error:
        find_cases(touch(tmp_path, *names), SEQUENCES, pictures=True)
    assert str(error.value).startswith(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="a DICOM series$"):
        find_cases(tmp_path, SEQUENCES)


def test_the_class_folder_is_taken_out_of_several(tmp_path):
    touch(tmp_path, "HeadCT/000000.jpeg", "CXR/000000.jpeg", "CXR/000001.jpeg")
    found = find_cases(tmp_path, SEQUENCES, pictures=True, class_folder="CXR")
    assert found == find_cases(tmp_path / "CXR", SEQUENCES, pictures=True)
    assert found == find_cases(tmp_path / "CXR", SEQUENCES, pictures=True, class_folder="CXR")


def test_pictures_in_a_sub_folder_do_not_join_a_folders_own_cases(tmp_path):
    touch(tmp_path, "a.nii.gz", "HeadCT/000000.jpeg")
    assert names_of(find_cases(tmp_path, SEQUENCES, pictures=True)) == ["a"]


def test_dicom_files_are_one_scan_if_they_are_one_series_and_pictures_if_they_are_several(tmp_path):
    for i in range(3):
        for kind, series in (("scan", 0), ("single", i)):
            (tmp_path / kind).mkdir(exist_ok=True)
            save_dicom(tmp_path / kind / f"{i}.dcm", series)
    assert names_of(find_cases(tmp_path / "scan", SEQUENCES, pictures=True)) == ["scan"]
    assert names_of(find_cases(tmp_path / "single", SEQUENCES, pictures=True)) == ["0", "1", "2"]
    assert names_of(find_cases(tmp_path / "single", SEQUENCES)) == ["single"]
    assert names_of(find_cases(tmp_path, SEQUENCES, pictures=True)) == ["scan", "single"]


def test_a_single_picture_is_a_case(tmp_path):
    touch(tmp_path, "a.png", "b.png")
    assert names_of(find_cases(tmp_path / "a.png", SEQUENCES, pictures=True)) == ["a"]


def test_pictures_go_to_sections_by_order_and_volumes_by_hash(tmp_path):
    touch(tmp_path, *(f"{i:02}.png" for i in range(36)), *(f"case{i}.nii.gz" for i in range(40)))
    for section, numbers in zip(SECTIONS, (range(32), range(32, 34), range(34, 36)), strict=True):
        cases = find_cases(tmp_path, SEQUENCES, section=section, pictures=True)
        volumes = find_cases(tmp_path, SEQUENCES, section=section)
        assert names_of(cases) == [f"{i:02}" for i in numbers] + sorted(names_of(volumes))


def test_an_empty_section_of_pictures_is_told_with_the_folder(tmp_path):
    touch(tmp_path, "a.png", "b.png")
    with pytest.raises(FileNotFoundError, match="none of the 2 cases falls into the test section"):
        find_cases(tmp_path, SEQUENCES, section="test", pictures=True)


def test_without_pictures_an_empty_section_is_an_empty_list(tmp_path):
    touch(tmp_path, "a.nii.gz")
    assert sorted(len(find_cases(tmp_path, SEQUENCES, section=section)) for section in SECTIONS) == [0, 0, 1]


# --- find_cines


def test_acdc_names_the_frames_in_its_info_file_and_counts_them_from_1(tmp_path):
    touch(tmp_path / "p1", "p1_4d.nii.gz", "p1_frame01_gt.nii.gz", "p1_frame12_gt.nii.gz", "p1_frame01.nii.gz")
    (tmp_path / "p1" / "Info.cfg").write_text("ED: 1\nES: 12\nGroup: DCM\nNbFrame: 30\n")
    (case,) = find_cines(tmp_path)
    assert case == {
        "case": "p1",
        "patient": "p1",
        "image": str(tmp_path / "p1/p1_4d.nii.gz"),
        "frames": (0, 11),
        "label": str(tmp_path / "p1/p1_frame01_gt.nii.gz"),
        "target_label": str(tmp_path / "p1/p1_frame12_gt.nii.gz"),
    }
    assert find_cines(tmp_path / "p1") == [case]


def test_an_info_file_without_the_frames_is_told_with_its_name(tmp_path):
    touch(tmp_path / "p1", "p1_4d.nii.gz")
    (tmp_path / "p1" / "Info.cfg").write_text("ED: 0\nES: 12\n")
    with pytest.raises(ValueError, match=r"Info\.cfg: needs the lines"):
        find_cines(tmp_path)


def test_cropped_acdc_goes_from_the_first_frame_to_the_last(tmp_path):
    touch(tmp_path / "p1", "p1_ed2es.nii.gz", "info.json", "p1_ed_gt.nii.gz", "p1_es_gt.nii.gz")
    (case,) = find_cines(tmp_path)
    assert case["image"] == str(tmp_path / "p1/p1_ed2es.nii.gz") and "frames" not in case
    assert case["label"].endswith("p1_ed_gt.nii.gz") and case["target_label"].endswith("p1_es_gt.nii.gz")


def test_two_files_of_a_folder_are_the_ends_of_a_cine(tmp_path):
    touch(tmp_path, "a/x_ed.nii.gz", "a/x_es.nii", "a/x_ed_gt.nii.gz", "b/y_ed.nii.gz")
    (case,) = find_cines(tmp_path)
    assert case["case"] == "a" and case["image"] == [str(tmp_path / "a/x_ed.nii.gz"), str(tmp_path / "a/x_es.nii")]
    assert case["label"] == str(tmp_path / "a/x_ed_gt.nii.gz") and "target_label" not in case


def test_files_of_a_flat_folder_go_from_the_first_frame_to_the_last_unless_a_table_says_which(tmp_path):
    touch(tmp_path, "a.nii.gz", "b.nii", "b_ed_gt.nii.gz")
    a, b = find_cines(tmp_path)
    assert a == {"case": "a", "patient": "a", "image": str(tmp_path / "a.nii.gz")}
    assert b["image"] == str(tmp_path / "b.nii") and b["label"] == str(tmp_path / "b_ed_gt.nii.gz")
    table(tmp_path / "frames.csv", ("file", "ed", "es"), ("a.nii.gz", 0, 7), ("b.nii", 3, 1))
    assert [case["frames"] for case in find_cines(tmp_path)] == [(0, 7), (3, 1)]
    assert find_cines(tmp_path / "a.nii.gz") == [a]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([("file", "ed"), ("a.nii.gz", 0)], "needs the columns file, ed and es"),
        ([("file", "ed", "es"), ("a.nii.gz", 0, "last")], "line 2 needs two frame numbers"),
        ([("file", "ed", "es"), ("b.nii.gz", 0, 1)], "no row or no file for a.nii.gz, b.nii.gz"),
    ],
)
def test_a_bad_table_of_frames_is_refused_with_its_name(tmp_path, rows, words):
    touch(tmp_path, "a.nii.gz")
    table(tmp_path / "frames.csv", *rows)
    with pytest.raises(ValueError, match=rf"frames\.csv: .*{words}"):
        find_cines(tmp_path)


@pytest.mark.parametrize("names", [(), ("readme.txt",), ("p1/p1_4d.nii.gz",)])
def test_a_folder_without_cines_is_told_the_layouts(tmp_path, names):
    touch(tmp_path, *names)
    with pytest.raises(FileNotFoundError, match=r"no cine found; expected .*Info\.cfg.*_ed2es.*_es.*frames\.csv"):
        find_cines(tmp_path)


def test_labelled_patients_of_cropped_acdc_are_the_test_and_no_others(tmp_path):
    names = [f"p{i}" for i in range(60)]
    for name in names:
        touch(tmp_path / name, f"{name}_ed2es.nii.gz", *([f"{name}_ed_gt.nii.gz"] if name in ("p3", "p7") else []))
    sections = {name: [case["case"] for case in find_cines(tmp_path, name)] for name in SECTIONS}
    assert sections["test"] == ["p3", "p7"] and 2 <= len(sections["validation"]) <= 12
    assert sorted(sum(sections.values(), [])) == sorted(names)


def test_other_cines_are_split_by_the_hash_of_their_patients(tmp_path):
    touch(tmp_path, *(f"p{i}.nii.gz" for i in range(60)), *(f"p{i}_ed_gt.nii.gz" for i in range(5)))
    for section in SECTIONS:
        found = find_cines(tmp_path, section)
        assert found and all(section_of(case["patient"]) == section for case in found)
    with pytest.raises(FileNotFoundError, match="none of the 60 cines falls into the test section"):
        find_cines(tmp_path, "test", fractions=(0.0, 0.1))


# --- section_by_order


def test_of_9000_pictures_the_last_1000_are_for_validation_and_test():
    cases = [{"case": f"{i:06}"} for i in range(9000)]
    bounds = [(part[0]["case"], part[-1]["case"]) for part in (section_by_order(cases, s) for s in (*SECTIONS, "all"))]
    assert bounds == [("000000", "007999"), ("008000", "008499"), ("008500", "008999"), ("000000", "008999")]


@pytest.mark.parametrize("fractions", [(1 / 18, 1 / 18), (0.5, 0.5), (0.0, 0.3), (1.0, 0.0)])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 50])
def test_sections_by_order_lie_end_to_end(count, fractions):
    cases = [{"case": f"{i:02}"} for i in range(count)]
    parts = [section_by_order(cases[::-1], section, fractions) for section in SECTIONS]
    assert sum(parts, []) == cases
    assert all(abs(len(part) - count * f) <= 1 for part, f in zip(parts[:0:-1], fractions, strict=True))


def test_an_unknown_section_is_refused():
    with pytest.raises(ValueError, match="training, validation, test, all, got tests"):
        section_by_order([], "tests")


# --- section_of, take_section


NAMES = [f"patient{i}" for i in range(2000)]


def test_a_patients_section_never_changes():
    """Another rule would mix old test patients into training: the literal values below hold for good."""
    assert Counter(map(section_of, NAMES)) == {"training": 1519, "test": 310, "validation": 171}
    assert [section_of(name) for name in ("patient0", "patient1", "patient10")] == ["test", "training", "validation"]


@pytest.mark.parametrize("fractions", [(0.15, 0.1), (0.5, 0.25), (0.0, 0.0)])
def test_sections_have_about_the_sizes_that_were_asked_for(fractions):
    counts = Counter(section_of(name, fractions) for name in NAMES)
    assert counts["test"] / 2000 == pytest.approx(fractions[0], abs=0.03)
    assert counts["validation"] / 2000 == pytest.approx(fractions[1], abs=0.03)


def test_new_patients_move_none_of_the_old():
    few, many = ([{"case": name} for name in names] for names in (NAMES[::7], NAMES))
    for section in SECTIONS:
        old = take_section(few, section)
        assert old == [case for case in take_section(many, section) if case in few]


def test_another_seed_gives_another_split():
    assert sum(section_of(name) != section_of(name, seed=1) for name in NAMES) > 400


def test_the_sections_are_disjoint_and_cover_all():
    cases = [{"case": name} for name in NAMES]
    parts = [{c["case"] for c in take_section(cases, section)} for section in SECTIONS]
    assert sum(map(len, parts)) == 2000 and set.union(*parts) == set(NAMES)
    assert take_section(cases) == cases


# --- folder_pair, add_slice_labels, training_cases


def test_the_folders_of_a_pair_are_the_classes(tmp_path):
    touch(tmp_path, "healthy/p1_0.png", "healthy/p2_1.JPG", "diseased/p1_2.nii.gz", "diseased/notes.txt")
    assert [(c["case"], c["patient"], c["class_label"]) for c in folder_pair(tmp_path)] == [
        ("healthy/p1_0", "p1", 0),
        ("healthy/p2_1", "p2", 0),
        ("diseased/p1_2", "p1", 1),
    ]
    assert all(Path(case["image"]).is_file() for case in folder_pair(tmp_path))


def test_hidden_files_of_a_pair_are_ignored(tmp_path):
    touch(tmp_path, "healthy/a_0.png", "healthy/._a_0.png", "diseased/b_0.png")
    assert [case["case"] for case in folder_pair(tmp_path)] == ["healthy/a_0", "diseased/b_0"]


def test_one_patients_pictures_are_all_in_one_section(tmp_path):
    touch(tmp_path, *(f"{k}/p{i}_view{v}.png" for i in range(30) for v in range(2) for k in ("healthy", "diseased")))
    parts = [{c["patient"] for c in training_cases(tmp_path, SEQUENCES, section)} for section in SECTIONS]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 30
    assert sum(len(training_cases(tmp_path, SEQUENCES, section)) for section in SECTIONS) == 120


def test_slice_labels_come_in_the_order_of_the_slices_and_for_the_cases_of_the_table(tmp_path):
    path = table(tmp_path / "a.csv", ["label", "case", "slice"], [1, "b", 2], [0, "b", 0], [1, "b", 1], [1, "c", 0])
    cases = [{"case": "a", "image": "a"}, {"case": "b", "image": "b"}]
    assert add_slice_labels(cases, path) == [{"case": "b", "image": "b", "slice_labels": [0, 1, 1]}]
    assert "slice_labels" not in cases[1]


def test_a_table_saved_by_excel_is_read(tmp_path):
    (tmp_path / "a.csv").write_text("case,slice,label\r\nb,0,1\r\n", encoding="utf-8-sig")
    assert add_slice_labels([{"case": "b"}], tmp_path / "a.csv") == [{"case": "b", "slice_labels": [1]}]


@pytest.mark.parametrize(
    ("words", "rows"),
    [
        ("needs the columns case, slice and label, has.*class", [["case", "slice", "class"], ["b", 0, 1]]),
        ("needs the columns", []),
        ("case b needs one row for every slice", [["case", "slice", "label"], ["b", 0, 1], ["b", 2, 1]]),
        ("case b needs one row for every slice", [["case", "slice", "label"], ["b", 1, 1], ["b", 2, 1]]),
        ("line 3.*0 or 1", [["case", "slice", "label"], ["b", 0, 1], ["b", 1, ""]]),
        ("line 2.*0 or 1", [["case", "slice", "label"], ["b", 0, 2]]),
    ],
    ids=["missing column", "empty file", "missing slice", "numbered from 1", "no label", "a label of 2"],
)
def test_a_bad_table_of_slice_labels_is_refused_with_its_name(tmp_path, words, rows):
    path = table(tmp_path / "labels.csv", *rows)
    with pytest.raises(ValueError, match=f"labels.csv: {words}"):
        add_slice_labels([{"case": "b"}], path)


def all_training_cases(*args):
    return training_cases(*args[:2], "all", *args[2:])


def test_training_takes_the_volumes_that_have_a_mask(tmp_path):
    touch(tmp_path, "a/a_t1.nii.gz", "a/a_seg.nii.gz", "b/b_t1.nii.gz")
    assert [case["case"] for case in all_training_cases(tmp_path, SEQUENCES)] == ["a"]


def test_training_takes_the_volumes_that_the_table_names(tmp_path):
    touch(tmp_path, "a/a_t1.nii.gz", "a/a_seg.nii.gz", "b/b_t1.nii.gz")
    path = table(tmp_path / "labels.csv", ["case", "slice", "label"], ["b", 0, 1])
    assert [case["slice_labels"] for case in all_training_cases(tmp_path, SEQUENCES, path)] == [[1]]


def test_training_on_pictures_takes_the_pair_of_folders(tmp_path):
    touch(tmp_path, "healthy/a_0.png", "diseased/b_0.png")
    assert sorted(case["class_label"] for case in all_training_cases(tmp_path, SEQUENCES)) == [0, 1]


@pytest.mark.parametrize("names", [("a/a_t1.nii.gz",), ("healthy/a.txt", "diseased/b.txt")], ids=["volumes", "pair"])
def test_training_without_labels_is_refused_with_the_folder_and_the_three_ways(tmp_path, names):
    with pytest.raises(FileNotFoundError, match="no labelled case.*_seg.nii.gz.*--slice_labels.*healthy/") as error:
        training_cases(touch(tmp_path, *names), SEQUENCES, "training")
    assert str(error.value).startswith(str(tmp_path))


# --- generated_cases, unfinished, root_cause, CohortDataset


def test_generated_cases_are_numbered_by_their_seeds_and_have_a_class_only_if_one_is_wanted():
    assert generated_cases(2, seed=9) == [{"case": "generated_9", "seed": 9}, {"case": "generated_10", "seed": 10}]
    assert generated_cases(1, label=0) == [{"case": "generated_0", "seed": 0, "class_label": 0}]


@pytest.mark.parametrize(("number", "seed", "mend"), [(0, 0, "--number"), (1, -1, "--seed"), (2, 2**32 - 1, "--seed")])
def test_a_number_or_seed_of_images_that_makes_no_sense_is_refused(number, seed, mend):
    with pytest.raises(ValueError, match=f"{mend} must be"):
        generated_cases(number, seed)


def test_finished_cases_are_looked_up_in_the_named_table(tmp_path):
    (tmp_path / "generated.csv").write_text("case,seed\ngenerated_1,1\n")
    cases = generated_cases(4)
    assert unfinished(cases, tmp_path, table="generated.csv") == [cases[0], *cases[2:]]
    assert unfinished(cases, tmp_path, rank=1, world_size=2, table="generated.csv") == [cases[3]]
    assert unfinished(cases, tmp_path) == cases


def test_cases_with_a_row_in_the_results_are_finished(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    cases = [{"case": name} for name in "abc"]
    assert unfinished(cases, tmp_path / "nothing") == cases
    table(tmp_path / "results.csv", ["case", "score"], ["b", 1], ["d", 1])
    assert unfinished(cases, tmp_path) == [{"case": "a"}, {"case": "c"}]
    assert "1 cases are finished already (--overwrite" in caplog.text
    assert unfinished(cases, tmp_path, overwrite=True) == cases


def test_the_root_cause_is_the_innermost_message_in_one_line():
    try:
        try:
            raise ValueError("a.nii.gz:\n  is broken")
        except ValueError as error:
            raise RuntimeError("applying transform") from error
    except RuntimeError as error:
        assert root_cause(error) == "a.nii.gz: is broken"


def test_an_error_without_words_is_told_by_its_type():
    assert root_cause(MemoryError()) == "MemoryError"


def read(data):
    """Stands for loading: cases whose image is "bad" can't be read, the others are volumes with a mask or labels."""
    if data["image"] == "bad":
        raise ValueError(f"{data['case']}: not\na scan")
    return {**data, "image": torch.ones(1, 4, 4, 4)}


def test_an_error_that_names_no_file_is_told_with_the_first_of_the_case():
    def fail(data):
        raise ArithmeticError("no convergence")

    (item,) = CohortDataset([{"case": "a", "image": [None, "/scans/a_flair.nii.gz"]}], fail)
    assert item == {"case": "a", "failure": "/scans/a_flair.nii.gz: no convergence"}


def test_a_case_that_cannot_be_read_does_not_stop_the_others():
    cases = [{"case": "a", "image": "good"}, {"case": "b", "image": "bad"}, {"case": "c", "image": "good"}]
    first, bad, last = DataLoader(CohortDataset(cases, Compose([read])), batch_size=1)
    assert bad == {"case": ["b"], "failure": ["b: not a scan"]}
    assert first["image"].shape == last["image"].shape == (1, 1, 4, 4, 4) and "failure" not in first
    assert cases[0] == {"case": "a", "image": "good"}


# --- SliceDataset


def cut(data):
    """Stands for the preprocessing: a case's "label" lists the classes of its slices."""
    data = read(data)
    return [
        {"case": data["case"], "image": torch.full((1, 4, 4), 0.1 * i), "class_label": label, "slice": i, "position": i}
        for i, label in enumerate(data["label"])
    ]


def augmentation():
    return Compose([RandFlipd("image", 0.5, 0), RandScaleIntensityd("image", 0.5, 0.8)])


def test_slices_of_all_cases_are_kept_in_half_precision_and_given_in_single():
    dataset = SliceDataset([{"case": "a", "image": "x", "label": [0, 1]}, {"case": "b", "image": "x", "label": [1]}], cut)
    assert len(dataset) == 3 and dataset.class_labels.tolist() == [0, 1, 1] and dataset.positions.tolist() == [0, 1, 0]
    assert all(item["image"].dtype == torch.float16 for item in dataset.slices)
    item = dataset[1]
    assert item["image"].dtype == torch.float32 and item["class_label"] == 1
    torch.testing.assert_close(item["image"], torch.full((1, 4, 4), 0.1), rtol=1e-3, atol=0)


def test_all_bad_cases_are_named_before_any_training():
    cases = [{"case": f"case{i}", "image": "bad" if i % 2 else "good", "label": [0, 1]} for i in range(5)]
    with pytest.raises(ValueError, match="2 of 5 cases can't be used for training") as error:
        SliceDataset(cases, Compose([cut]))
    assert str(error.value).splitlines()[1:] == ["case1: case1: not a scan", "case3: case3: not a scan"]


@pytest.mark.parametrize(("labels", "found"), [([0, 0], r"\[0\]"), ([1], r"\[1\]"), ([], r"\[\]")])
def test_training_without_slices_of_a_class_is_refused(labels, found):
    with pytest.raises(ValueError, match=f"healthy.*diseased.*found the classes {found} in 1 cases"):
        SliceDataset([{"case": "a", "image": "x", "label": labels}], cut)


def test_a_case_whose_preprocessing_gives_no_slices_is_trained_on_as_a_whole():
    volume = torch.rand(3, 4, 5, 6).half()
    dataset = SliceDataset([{"case": "a", "image": "x"}], lambda case: {"image": volume.float()}, classes=(0,))
    assert len(dataset) == 1
    assert torch.equal(dataset[0]["image"], volume.float())
    assert dataset[0]["class_label"] == 0


def test_healthy_slices_alone_are_enough_where_they_are_all_that_is_wanted():
    dataset = SliceDataset([{"case": "a", "image": "x", "label": [0, 0]}], cut, classes=(0,))
    assert len(dataset) == 2 and dataset.class_labels.tolist() == [0, 0]


@pytest.mark.parametrize(("labels", "found"), [([0, 1], r"\[0, 1\]"), ([], r"\[\]")])
def test_training_on_healthy_slices_alone_refuses_others_and_none(labels, found):
    with pytest.raises(ValueError, match=rf"needs healthy \(0\) slices alone, found the classes {found} in 1 cases"):
        SliceDataset([{"case": "a", "image": "x", "label": labels}], cut, classes=(0,))


def test_cases_of_monai_label_have_no_name_and_are_accepted():
    dataset = SliceDataset([{"image": "/data/scan7.nii.gz", "label": [0, 1]}], cut)
    assert [item["case"] for item in dataset.slices] == ["scan7.nii.gz"] * 2
    dataset = SliceDataset([{"image": ["/data/scan8_t1.nii.gz", None], "label": [0, 1]}], cut)
    assert dataset.slices[0]["case"] == "scan8_t1.nii.gz"


def random_slices():
    def transform(data):
        image = torch.from_numpy(np.random.RandomState(0).rand(1, 4, 4).astype(np.float32))
        return [{"image": image, "class_label": label, "position": 0.0} for label in (0, 1)]

    return SliceDataset([{"case": "a", "image": "x"}], transform, augmentation())


def test_augmentation_depends_on_the_seed_of_the_item_alone():
    dataset, other = random_slices(), random_slices()
    seeds = list(range(12))
    images = {seed: dataset[0, seed]["image"].clone() for seed in seeds}
    np.random.seed(5)
    torch.manual_seed(5)
    for seed in reversed(seeds):
        assert torch.equal(other[1, seed]["image"], images[seed])
    assert len({image.numpy().tobytes() for image in images.values()}) > 4
    assert torch.equal(dataset[0]["image"], dataset.slices[0]["image"].float())


# --- BalancedBatchSampler


def labelled(num_healthy=50, num_diseased=10):
    """Diseased slices lie between 0.4 and 0.6, healthy ones everywhere."""
    positions = np.concatenate([np.linspace(0, 1, num_healthy), np.linspace(0.41, 0.59, num_diseased)])
    return SimpleNamespace(class_labels=np.repeat([0, 1], [num_healthy, num_diseased]), positions=positions)


def batches(count, start=0, **kwargs):
    sampler = BalancedBatchSampler(labelled(), **{"batch_size": 8, **kwargs})
    sampler.start = start
    return list(itertools.islice(sampler, count))


@pytest.mark.parametrize("batch_size", [8, 5])
def test_half_of_a_batch_is_diseased(batch_size):
    for batch in batches(20, batch_size=batch_size):
        assert len(batch) == batch_size and sum(labelled().class_labels[i] for i, _ in batch) == batch_size // 2


def test_a_batch_depends_on_the_seed_and_its_number_alone():
    np.random.seed(1)
    straight = batches(10)
    np.random.seed(2)
    assert batches(10) == straight and batches(4, start=6) == straight[6:]
    assert batches(10, seed=1) != straight and len({tuple(batch) for batch in straight}) == 10


def test_every_slice_of_a_sequence_gets_its_own_seed():
    seeds = [seed for batch in batches(10) for _, seed in batch]
    assert len(set(seeds)) == 80 and all(0 <= seed < 2**31 for seed in seeds)


def test_processes_share_one_sequence_of_batches_out():
    ranks = [batches(5, rank=rank, world_size=2) for rank in (0, 1)]
    both = [[item for pair in zip(*group, strict=True) for item in pair] for group in zip(*ranks, strict=True)]
    assert both == batches(5, batch_size=2 * len(ranks[0][0]))


def healthy_positions(matched, dataset=None, count=200):
    dataset = dataset or labelled()
    sampler = BalancedBatchSampler(dataset, 8, matched=matched)
    chosen = [i for batch in itertools.islice(sampler, count) for i, _ in batch]
    return dataset.positions[[i for i in chosen if dataset.class_labels[i] == 0]]


def test_matched_healthy_slices_lie_where_the_diseased_do():
    positions = healthy_positions(matched=1)
    assert 0.4 <= positions.min() and positions.max() < 0.6
    assert positions.mean() == pytest.approx(0.5, abs=0.02)


def test_unmatched_healthy_slices_lie_everywhere():
    counts = np.histogram(healthy_positions(matched=0), bins=10, range=(0, 1))[0]
    assert counts.min() > 0.6 * counts.mean() and counts.max() < 1.4 * counts.mean()


def test_healthy_slices_that_never_lie_near_diseased_ones_are_drawn_evenly():
    dataset = SimpleNamespace(class_labels=np.array([0] * 4 + [1]), positions=np.array([0.0, 0.1, 0.2, 0.3, 0.9]))
    counts = Counter(healthy_positions(matched=1, dataset=dataset).tolist())
    assert len(counts) == 4 and min(counts.values()) > 150


def test_a_loader_gives_the_batches_of_the_sampler():
    dataset = SliceDataset([{"case": "a", "image": "x", "label": [0, 1, 0, 1]}], cut, augmentation())
    sampler = BalancedBatchSampler(dataset, batch_size=4)
    batch = next(iter(DataLoader(dataset, batch_sampler=sampler, num_workers=0)))
    expected = [dataset[key]["image"] for key in next(iter(sampler))]
    assert torch.equal(batch["image"], torch.stack(expected)) and batch["class_label"].tolist() == [1, 1, 0, 0]


# --- ShuffledBatchSampler


def shuffled(count, length=24, batch_size=8, start=0, **kwargs):
    sampler = ShuffledBatchSampler(range(length), batch_size, **kwargs)
    sampler.start = start
    return list(itertools.islice(sampler, count))


def indices(batches):
    return [index for batch in batches for index, _ in batch]


@pytest.mark.parametrize(("length", "batch_size"), [(24, 8), (24, 24), (1, 1), (1000, 40), (10, 3), (3, 8), (1, 4)])
def test_each_pass_shows_every_slice_exactly_once(length, batch_size):
    passes = 4
    batches = shuffled(-(-passes * length // batch_size), length, batch_size)
    assert all(len(batch) == batch_size for batch in batches)
    for i in range(passes):
        assert sorted(indices(batches)[i * length : (i + 1) * length]) == list(range(length))


def test_each_pass_has_its_own_order():
    chosen = indices(shuffled(12))
    assert len({tuple(chosen[i : i + 24]) for i in range(0, 96, 24)}) == 4 and chosen[:24] != sorted(chosen[:24])


@pytest.mark.parametrize("length", [24, 10, 3])
@pytest.mark.parametrize("start", [1, 3, 7])
def test_shuffled_batches_resume_where_they_were_cut_off(length, start):
    np.random.seed(start)
    assert shuffled(10 - start, length, start=start) == shuffled(10, length)[start:]


def test_shuffled_batches_depend_on_the_seed():
    assert shuffled(3, seed=1) != shuffled(3) == shuffled(3)
    seeds = [seed for batch in shuffled(10) for _, seed in batch]
    assert len(set(seeds)) == 80 and all(type(seed) is int and 0 <= seed < 2**31 for seed in seeds)


@pytest.mark.parametrize("start", [0, 2])
def test_processes_share_the_shuffled_batches_out(start):
    ranks = [shuffled(5, rank=rank, world_size=3, start=start) for rank in range(3)]
    whole = [[item for group in zip(*parts, strict=True) for item in group] for parts in zip(*ranks, strict=True)]
    assert whole == shuffled(5, batch_size=3 * len(ranks[0][0]), start=start)


def test_a_loader_gives_the_shuffled_batches():
    dataset = SliceDataset([{"case": "a", "image": "x", "label": [0] * 6}], cut, augmentation(), classes=(0,))
    sampler = ShuffledBatchSampler(dataset, batch_size=4)
    batch = next(iter(DataLoader(dataset, batch_sampler=sampler, num_workers=0)))
    assert torch.equal(batch["image"], torch.stack([dataset[key]["image"] for key in next(iter(sampler))]))
