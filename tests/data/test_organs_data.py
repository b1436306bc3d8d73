from __future__ import annotations

import json
from pathlib import Path

import pytest
from made_inputs import touch

from scripts.data.organs import find_organ_cases, organ_training_cases, painted_cases
from scripts.data.sections import section_of

MASKS = ("p1_box_0", "p1_box_1", "p2_box_0")
LABELS = {"0": "background", "1": "pancreas", "2": "cancer"}


def decathlon(folder, labels=LABELS, names=("pancreas_001", "pancreas_004")):
    """A data set of the Medical Segmentation Decathlon with empty files."""
    pairs = [{"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"} for name in names]
    touch(folder, *(path for pair in pairs for path in pair.values()), "imagesTs/pancreas_002.nii.gz", "imagesTr/._a.nii.gz")
    described = {"labels": labels, "training": pairs, "test": ["./imagesTs/pancreas_002.nii.gz"]}
    (folder / "dataset.json").write_text(json.dumps(described))
    return folder


@pytest.mark.parametrize("labels", [LABELS, {"background": 0, "Pancreas": 1, "pancreas tumour": 2}])
def test_the_decathlon_names_organ_and_tumour_by_number_or_by_name(tmp_path, labels):
    cases = find_organ_cases(decathlon(tmp_path, labels))
    assert [case["case"] for case in cases] == ["pancreas_001", "pancreas_004"]
    label = str(tmp_path / "labelsTr/pancreas_001.nii.gz")
    assert cases[0] == {
        "case": "pancreas_001",
        "patient": "pancreas_001",
        "image": str(tmp_path / "imagesTr/pancreas_001.nii.gz"),
        "organ": label,
        "organ_values": [1, 2],
        "label": label,
        "label_values": [2],
    }


def test_a_data_set_of_healthy_organs_has_no_label(tmp_path):
    cases = find_organ_cases(decathlon(tmp_path, {"0": "background", "1": "pancreas"}))
    assert all("label" not in case and case["organ_values"] == [1] for case in cases)
    with pytest.raises(FileNotFoundError, match="no labelled case"):
        organ_training_cases(tmp_path, "all")


def test_a_missing_file_of_the_decathlon_fails_its_case_alone(tmp_path):
    decathlon(tmp_path)
    (tmp_path / "labelsTr/pancreas_001.nii.gz").unlink()
    bad, good = find_organ_cases(tmp_path)
    assert "pancreas_001.nii.gz: named in dataset.json, but not there" in bad["failure"] and "failure" not in good


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "needs 'labels' and, in 'training', pairs"),
        ('{"labels": {}}', "needs 'labels' and, in 'training', pairs"),
        (
            '{"labels": {"1": "liver"}, "training": []}',
            r"no 'pancreas' among its labels \(liver\); give the name by --organ",
        ),
    ],
)
def test_a_dataset_json_that_names_no_organ_is_refused(tmp_path, text, words):
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(ValueError, match=f"{tmp_path / 'dataset.json'}: {words}"):
        find_organ_cases(tmp_path)


def test_masks_lie_beside_the_scans_in_any_of_the_usual_ways(tmp_path):
    touch(tmp_path, "a.nii.gz", "a_pancreas.nii.gz", "a_seg.nii.gz", "b.nii", "b_total.nii.gz")
    touch(tmp_path, "c/ct.nii.gz", "c/segmentations/pancreas.nii.gz", "c/segmentations/liver.nii.gz")
    touch(tmp_path, "d/scan.nii.gz", "d/segmentations.nii.gz", "e/ct.nii.gz", "e/pancreas.nii.gz")
    cases = {case["case"]: case for case in find_organ_cases(tmp_path)}
    organs = {name: (case["organ"].removeprefix(f"{tmp_path}/"), case["organ_values"]) for name, case in cases.items()}
    assert organs == {
        "a": ("a_pancreas.nii.gz", []),
        "b": ("b_total.nii.gz", [7]),
        "c": ("c/segmentations/pancreas.nii.gz", []),
        "d": ("d/segmentations.nii.gz", [7]),
        "e": ("e/pancreas.nii.gz", []),
    }
    assert cases["a"]["label"] == str(tmp_path / "a_seg.nii.gz") and cases["a"]["label_values"] == []
    assert [case["case"] for case in organ_training_cases(tmp_path, "all")] == ["a"]
    assert [case["organ"] for case in find_organ_cases(tmp_path / "c")] == [cases["c"]["organ"]]


def test_a_scan_without_a_mask_is_told_how_to_make_one(tmp_path):
    touch(tmp_path, "a.nii.gz", "a_pancreas.nii.gz", "b.nii.gz", "pancreas.nii.gz")
    good, bad = find_organ_cases(tmp_path)
    assert "failure" not in good
    assert bad["failure"] == (
        f"{tmp_path}/b.nii.gz: no mask of the pancreas beside it; make one by: TotalSegmentator -i {tmp_path}/b.nii.gz -o "
        f"{tmp_path}/b_segmentations --roi_subset pancreas && cp {tmp_path}/b_segmentations/pancreas.nii.gz "
        f"{tmp_path}/b_pancreas.nii.gz"
    )


def test_masks_alone_are_no_scans(tmp_path):
    touch(tmp_path, "a_pancreas.nii.gz")
    with pytest.raises(FileNotFoundError, match="masks, but no CT that they belong to"):
        find_organ_cases(tmp_path)


def test_the_sections_are_drawn_by_patient(tmp_path):
    decathlon(tmp_path, names=[f"pancreas_{number:03}" for number in range(40)])
    parts = {section: find_organ_cases(tmp_path, section=section) for section in ("training", "validation", "test")}
    assert sum(map(len, parts.values())) == 40 and len(parts["training"]) > 25
    assert organ_training_cases(tmp_path, "training") == parts["training"]


def test_each_mask_of_painted_pictures_is_a_case_with_its_healthy_picture(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder masks.*scripts paint"):
        painted_cases(tmp_path, "training")
    touch(tmp_path, "healthy/p1_box.png", "healthy/p2_box.png", *(f"masks/{name}.png" for name in MASKS))
    section = section_of("p1")
    cases = [case for case in painted_cases(tmp_path, section) if case["patient"] == "p1"]
    assert [Path(case["label"]).name for case in cases] == ["p1_box_0.png", "p1_box_1.png"]
    assert {Path(case["image"]).name for case in cases} == {"p1_box.png"}
    assert all(Path(case["image"]).is_file() and Path(case["label"]).is_file() for case in cases)
