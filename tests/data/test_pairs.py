"""Tests of finding pairs to register."""

import numpy as np
import pytest
from conftest import make_cine, save_nifti
from made_inputs import touch

from scripts.data.cines import LoadCined
from scripts.data.pairs import find_pairs

SPACING = np.diag([1.4, 1.4, 10.0, 1.0])


@pytest.mark.parametrize("stem", ["", "a_"])
def test_two_files_of_a_folder_are_a_pair(tmp_path, stem):
    touch(tmp_path / "p1", f"{stem}moving.nii.gz", f"{stem}fixed.nii", f"{stem}moving_gt.nii.gz", f"{stem}fixed_gt.nii.gz")
    (case,) = find_pairs(tmp_path)
    assert case["image"] == [str(tmp_path / "p1" / f"{stem}{name}") for name in ("moving.nii.gz", "fixed.nii")]
    assert [case[key] for key in ("label", "target_label")] == [
        str(tmp_path / "p1" / f"{stem}{name}_gt.nii.gz") for name in ("moving", "fixed")
    ]


def test_one_of_the_two_alone_is_none(tmp_path):
    touch(tmp_path, "p1/moving.nii.gz", "p2/a_ed.nii.gz", "p2/a_es.nii.gz")
    assert [case["case"] for case in find_pairs(tmp_path)] == ["p2"]


def test_files_can_be_named(tmp_path):
    (case,) = find_pairs("nowhere", moving="x/a.nii.gz", fixed="y/b.nii", fixed_label="y/c.nii")
    assert case == {"case": "a_to_b", "patient": "a_to_b", "image": ["x/a.nii.gz", "y/b.nii"], "target_label": "y/c.nii"}


@pytest.mark.parametrize("given", [{"moving": "a.nii"}, {"fixed": "a.nii"}, {"moving_label": "a.nii"}])
def test_half_a_pair_is_refused(tmp_path, given):
    with pytest.raises(ValueError, match="--moving and --fixed go together"):
        find_pairs(tmp_path, **given)


def test_backward_exchanges_both_of_every_kind(tmp_path):
    cine, labels = make_cine(4)
    save_nifti(tmp_path / "c" / "c_ed2es.nii.gz", cine, SPACING)
    save_nifti(tmp_path / "c" / "c_ed_gt.nii.gz", labels[..., 0], SPACING)
    save_nifti(tmp_path / "d" / "moving.nii.gz", cine[..., 0], SPACING)
    save_nifti(tmp_path / "d" / "fixed.nii.gz", cine[..., 3], SPACING)
    there, back = (find_pairs(tmp_path, backward=backward) for backward in (False, True))
    assert [case["case"] for case in back] == ["c_backward", "d_backward"]
    assert "label" not in back[0] and back[0]["target_label"] == there[0]["label"]
    load = LoadCined("image", grid="target")
    for one, other in zip(there, back, strict=True):
        first, second = load(one)["image"], load(other)["image"]
        assert np.array_equal(first.flip(0), second)
    assert [load(back[0])["image"].meta[name] for name in ("source_frame", "target_frame")] == [3, 0]


def test_a_pair_is_read_on_the_grid_of_the_fixed_volume(tmp_path):
    cine, _ = make_cine(4)
    save_nifti(tmp_path / "d" / "moving.nii.gz", cine[..., 0], SPACING)
    save_nifti(tmp_path / "d" / "fixed.nii.gz", cine[:, :, ::2, 3], np.diag([1.4, 1.4, 20.0, 1.0]))
    (case,) = find_pairs(tmp_path)
    pair = LoadCined("image", grid="target")(case)["image"]
    assert pair.shape == (2, 32, 28, 3)
    assert np.array_equal(pair[1], cine[:, :, ::2, 3]) and np.allclose(pair[0], cine[:, :, ::2, 0], atol=1e-3)
    with pytest.raises(ValueError, match="grid must be source or target"):
        LoadCined("image", grid="middle")
