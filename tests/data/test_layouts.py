from __future__ import annotations

import logging
import os
from pathlib import Path

import itk
import numpy as np
import pytest
from made_inputs import SECTIONS, SEQUENCES, table, touch

from scripts.data.layouts import add_slice_labels, find_cases, folder_pair, image_cases, training_cases
from scripts.data.sections import section_of


def names_of(cases):
    return [case["case"] for case in cases]


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
    touch(tmp_path, "Thumbs.db", "desktop.ini", "__MACOSX/a.nii.gz", "a/._a_t1.nii.gz")
    assert [case["case"] for case in find_cases(tmp_path, SEQUENCES)] == ["a"]


def test_a_missing_folder_is_told_with_its_name_and_the_mend(tmp_path):
    with pytest.raises(FileNotFoundError, match="scans: no such folder.*--dataset_dir"):
        find_cases(tmp_path / "scans", SEQUENCES)


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ((), "it is empty"),
        (
            (*(f"p{i}/x/notes.txt" for i in range(40)), "a.txt", "b.txt", "c.docx"),
            r"it has folders \(p0, p1, p10 and 37 more\) and files \(2 .txt, 1 .docx\)",
        ),
    ],
    ids=["empty", "nothing known"],
)
def test_a_folder_without_scans_is_told_with_what_is_in_it_and_what_is_expected(tmp_path, names, found):
    with pytest.raises(FileNotFoundError, match=f"{found}, no scan found; expected <patient>/<patient>_t1.nii.gz") as error:
        find_cases(touch(tmp_path, *names), SEQUENCES)
    message = str(error.value)
    assert message.startswith(str(tmp_path)) and "\n" not in message and len(message.removeprefix(str(tmp_path))) < 300


def test_a_section_gives_its_cases_alone(tmp_path):
    touch(tmp_path, *(f"case{i}.nii.gz" for i in range(40)))
    parts = [find_cases(tmp_path, SEQUENCES, section=section) for section in SECTIONS]
    assert all(section_of(c["case"]) == section for part, section in zip(parts, SECTIONS, strict=True) for c in part)
    assert sorted(c["case"] for part in parts for c in part) == [c["case"] for c in find_cases(tmp_path, SEQUENCES)]


def image_of(folder, **names):
    return [str(folder / names[s]) if s in names else None for s in ("t1", "flair", "t1ce")]


BRATS = ("t1", "flair", "t1ce")


def test_files_of_several_patients_in_one_folder_are_one_patient_each_with_all_sequences(tmp_path):
    touch(tmp_path, *(f"p{i}_{s}.nii.gz" for i in (1, 2) for s in (*BRATS, "t2", "seg")), "p3_flair.nii", "p10_scan.nii")

    def whole(name):
        image = [str(tmp_path / f"{name}_{s}.nii.gz") for s in BRATS]
        return {"case": name, "image": image, "label": str(tmp_path / f"{name}_seg.nii.gz")}

    assert find_cases(tmp_path, BRATS) == [
        whole("p1"),
        {"case": "p10_scan", "image": str(tmp_path / "p10_scan.nii")},
        whole("p2"),
        {"case": "p3", "image": image_of(tmp_path, flair="p3_flair.nii")},
    ]


@pytest.mark.parametrize(
    ("names", "mask"),
    [
        (("t1n", "t2f", "t1c", "t2w"), "BraTS-GLI-00000-000-{}.nii.gz"),  # BraTS 2023
        (("T1", "FLAIR", "T1GD", "T2"), "UPENN-GBM-00001_11_{}.nii.gz"),
        (("T1w", "FLAIR", "T1c", "T2w"), "{}.nii.gz"),
        (("t1", "flair", "t1ce", "t2"), "p1.{}.NII.GZ"),
        (("t1", "flair", "t1ce", "t2"), "p1 {}.mha"),
    ],
    ids=["BraTS 2023", "capitals", "no patient", "points, capital ending", "spaces, MetaImage"],
)
def test_other_names_of_the_sequences_are_known_and_a_patients_folder_may_have_any(tmp_path, names, mask):
    folder = tmp_path / "visit 1"
    touch(folder, *(mask.format(name) for name in (*names, "seg")))
    image = image_of(folder, **dict(zip(BRATS, map(mask.format, names[:3]), strict=True)))
    case = {"image": image, "label": str(folder / mask.format("seg"))}
    assert find_cases(tmp_path, BRATS) == [{"case": "visit 1", **case}]
    assert [{**case, "case": ""} for case in find_cases(folder, BRATS)] == [{"case": "", **case}]


def test_scans_below_a_patients_folder_are_named_after_it_or_by_their_path_and_stay_together(tmp_path):
    touch(tmp_path, "a/study/p1_t1.nii", "a/study/p1_flair.nii", "b/s1/x/1.dcm", "b/s1/y/1.dcm", "b/s2/1.dcm")
    touch(tmp_path, "c/2001/z.nii.gz", "d/s1/f1.nii", "d/s1/f2.mha", "e/1/2/3/4/e_t1.nii", "f/1/2/3/4/5/f_t1.nii")
    assert [(c["case"], c.get("patient")) for c in find_cases(tmp_path, SEQUENCES)] == [
        ("a", None),
        ("b_s1_x", "b"),
        ("b_s1_y", "b"),
        ("b_s2", "b"),
        ("c", None),
        ("d_s1_f1", "d"),
        ("d_s1_f2", "d"),
        ("e", None),
    ]


def test_several_dicom_series_of_a_patient_are_told_where_a_bundle_wants_several_sequences(tmp_path, caplog):
    touch(tmp_path, "b/flair/1.dcm", "b/dwi/1.dcm", "c/1.dcm")
    find_cases(tmp_path, ["ct"])
    assert not caplog.text
    find_cases(tmp_path, SEQUENCES)
    assert "several DICOM series of one patient are each taken as a scan of its own (b); keep only" in caplog.text


def test_two_files_of_one_sequence_fail_that_patient_alone(tmp_path):
    touch(tmp_path, "a_t1.nii", "a_t1.nii.gz", "b_t1.nii", "c/c_t1.nii", "c/c_T1w.nii")
    failures = {case["case"]: case.get("failure") for case in find_cases(tmp_path, SEQUENCES)}
    assert failures["b"] is None
    assert (
        failures["a"]
        == f"{tmp_path / 'a_t1.nii'} and {tmp_path / 'a_t1.nii.gz'}: two files of one sequence; remove one of them"
    )
    assert "c_T1w.nii and" in failures["c"]


def test_what_is_passed_over_is_told_in_a_line_and_notes_and_used_files_are_not(tmp_path, caplog):
    touch(tmp_path, "p1_t1.nii", "p1_seg.nii", "p1_brainmask.nii", "b.nii", "b_mask.nii", "c.minc", "notes.csv", "c.img")
    touch(tmp_path, "d/d_t1.nii", "d/adc.nii", "empty/readme.txt", "q_t2.nii", "e.mhd", "e.raw", "nobody_seg.nii")
    assert names_of(find_cases(tmp_path, SEQUENCES)) == ["b", "d", "e", "p1"]
    told = [record.message for record in caplog.records]
    assert told == [
        f"{tmp_path}: passed over, as no scans that are asked for: b_mask.nii, c.img, c.minc, d/adc.nii, nobody_seg.nii "
        "and 2 more",
        f"{tmp_path}: left out, as no scans were found in them: empty",
    ]


def test_a_name_in_another_encoding_is_passed_over_and_told_once(tmp_path, caplog):
    touch(tmp_path, "Müller.nii", os.fsdecode("Jörg.nii".encode("latin-1")))
    assert names_of(find_cases(tmp_path, SEQUENCES)) == ["Müller"]
    (record,) = caplog.records
    assert record.message.endswith(r"the encoding of the locale: 'J\udcf6rg.nii'; rename them, or set PYTHONUTF8=1")


def test_results_beside_the_scans_are_no_scans(tmp_path):
    touch(tmp_path, "p1.nii.gz", "results/p1/p1_map.nii.gz", "results/p1/p1_files.csv", "p1/p1_map.nii", "p1/p1_files.csv")
    assert names_of(find_cases(tmp_path, SEQUENCES)) == ["p1"]


# --- find_cases with pictures


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


def test_an_empty_section_is_told_with_the_patients_in_each_and_how_many_it_takes(tmp_path):
    touch(tmp_path, "a.nii.gz")  # a training case
    assert names_of(find_cases(tmp_path, SEQUENCES, section="training")) == ["a"]
    for section, enough in (("validation", 29), ("test", 19)):
        with pytest.raises(FileNotFoundError) as error:
            find_cases(tmp_path, SEQUENCES, section=section)
        assert f"falls into the {section} section (patients in each: training 1, validation 0, test 0)" in str(error.value)
        assert f"by a hash of the patient's name, by which {'10%' if enough == 29 else '15%'} fall" in str(error.value)
        assert f"{enough} patients are enough in 19 of 20 cohorts; add patients" in str(error.value)


def test_a_section_says_how_many_patients_each_has(tmp_path, caplog):
    touch(tmp_path, *(f"case{i}.nii.gz" for i in range(40)))
    with caplog.at_level(logging.INFO):
        counts = [len(find_cases(tmp_path, SEQUENCES, section=section)) for section in SECTIONS]
    expected = ", ".join(f"{section} {count}" for section, count in zip(SECTIONS, counts, strict=True))
    assert sum(counts) == 40 and caplog.text.count(f"patients in each: {expected}") == 3


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


def test_images_of_a_pair_have_names_for_folders_and_the_sections_of_the_training(tmp_path):
    touch(tmp_path, *(f"{kind}/p{i}_0.png" for i in range(60) for kind in ("healthy", "diseased")))
    every = image_cases(tmp_path, ("frontal",))
    assert len({case["case"] for case in every}) == 120 and every[0]["case"] == "healthy_p0_0"
    for section in SECTIONS:
        found = image_cases(tmp_path, ("frontal",), section)
        trained = training_cases(tmp_path, ("frontal",), section)
        assert [case["image"] for case in found] == [case["image"] for case in trained] and found
    alone = image_cases(tmp_path / "healthy", ("frontal",))
    assert len(alone) == 60 and "class_label" not in alone[0]


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
