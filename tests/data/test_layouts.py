from __future__ import annotations

from pathlib import Path

import itk
import numpy as np
import pytest
from made_inputs import SECTIONS, SEQUENCES, table, touch

from scripts.data.layouts import add_slice_labels, find_cases, folder_pair, training_cases
from scripts.data.sections import section_of

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
