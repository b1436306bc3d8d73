from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
from conftest import files_below, rows_of
from PIL import Image
from scipy import ndimage

from scripts.data.layouts import folder_pair
from scripts.data.organs import find_organ_cases
from scripts.release.phantoms import draw_abdomen, draw_abdomens, paint_boxes, paint_tumour

SMALL = {"shape": (96, 72, 8), "spacing": (3.6, 3.6, 6.0)}


def box(seed=0, size=(60, 90), level=0.6):
    """A box round a made organ: tissue with texture, fat round it."""
    noise = np.random.default_rng(seed).normal(0, 0.03, size)
    inside = np.ones(size, bool)
    inside[:8], inside[-8:] = False, False
    return np.clip(np.where(inside, level, 0.15) + noise, 0, 1)


def save_boxes(folder, *patients):
    folder.mkdir()
    for number, name in enumerate(patients):
        Image.fromarray((255 * box(number)).astype(np.uint8)).save(folder / f"{name}_slice_1.png")
    return folder


def test_made_abdomens_have_the_decathlons_layout_and_darker_tumours_in_two_of_three(tmp_path):
    draw_abdomens(tmp_path / "cohort", 3, contrast=60, seed=1, **SMALL)
    described = json.loads((tmp_path / "cohort" / "dataset.json").read_text(encoding="utf-8"))
    assert described["numTraining"] == 3 and described["labels"]["2"] == "cancer"
    cases = find_organ_cases(tmp_path / "cohort")
    ct, labels = ([nib.load(case[key]).get_fdata() for case in cases] for key in ("image", "organ"))
    assert [bool((label == 2).any()) for label in labels] == [True, True, False]
    for scan, label in zip(ct[:2], labels[:2], strict=True):
        assert scan[label == 1].mean() - scan[label == 2].mean() > 20
    assert ct[0].min() >= -1024 and nib.aff2axcodes(nib.load(cases[0]["image"]).affine) == ("L", "P", "S")
    assert all(1 < (label > 0).sum() * 3.6 * 3.6 * 6 / 1000 < 200 for label in labels), "ml"


def test_made_abdomens_depend_on_the_seed_alone_and_replace_nothing(tmp_path):
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        draw_abdomens(tmp_path / folder, 1, seed=seed, **SMALL)
    a, b, c = (files_below(tmp_path / folder / "imagesTr") for folder in ("a", "b", "c"))
    assert a == b and a != c
    with pytest.raises(FileExistsError):
        draw_abdomens(tmp_path / "a", 1, **SMALL)


def test_a_made_abdomen_comes_with_the_mask_of_its_pancreas(tmp_path):
    draw_abdomen(tmp_path / "demo.nii.gz", num_slices=5)
    (case,) = find_organ_cases(tmp_path)
    assert case["organ"] == str(tmp_path / "demo_pancreas.nii.gz")
    assert nib.load(case["organ"]).shape == nib.load(case["image"]).shape == (192, 144, 5)


def test_a_painted_tumour_is_darker_by_its_contrast_and_keeps_the_texture():
    image = box()
    painted, mask, drawn = paint_tumour(image, np.random.default_rng(3), contrast=(40, 40), diameter=(16, 16))
    change = 400 * (image - painted)
    assert drawn == {"contrast": 40, "diameter": 16} and 60 < mask.sum() < 500
    assert change.min() >= 0 and change.max() <= 40.01 and np.array_equal(mask, change > 20)
    core = ndimage.binary_erosion(mask, iterations=4)
    assert change[core].mean() == pytest.approx(40, abs=2)
    assert np.corrcoef(image[core], painted[core])[0, 1] > 0.99
    outside = ~ndimage.binary_dilation(mask, iterations=8)
    assert change[outside].max() < 1


def test_what_holds_no_tissue_is_left_as_it_is():
    air = np.zeros((40, 40))
    painted, mask, _ = paint_tumour(air, np.random.default_rng(0))
    assert np.array_equal(painted, air) and not mask.any()


def test_boxes_become_a_folder_of_healthy_and_one_of_painted_pictures_in_one_frame(tmp_path):
    boxes = save_boxes(tmp_path / "boxes", "patient1", "patient2")
    Image.new("L", (30, 200)).save(boxes / "patient3_slice_1.png")  # black: no place for a tumour
    assert paint_boxes(boxes, tmp_path / "painted", copies=2, size=64) == 4
    cases = folder_pair(tmp_path / "painted")
    assert [(case["patient"], case["class_label"]) for case in cases] == [
        *((f"patient{n}", 0) for n in (1, 2, 3)),
        *((f"patient{n}", 1) for n in (1, 1, 2, 2)),
    ]
    assert {Image.open(case["image"]).size for case in cases} == {(64, 64)}
    rows = rows_of(tmp_path / "painted" / "tumours.csv")
    assert [row["file"] for row in rows] == sorted(p.name for p in (tmp_path / "painted" / "masks").iterdir())
    assert all(10 <= float(row["contrast"]) <= 60 and 5 <= float(row["diameter"]) <= 40 for row in rows)
    for folder, wanted in ((boxes, FileExistsError), (tmp_path / "none", FileNotFoundError)):
        with pytest.raises(wanted):
            paint_boxes(folder, tmp_path / "painted")
