"""Label maps on the grid of their image, however both are stored."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch
from made_inputs import AFFINE, load, noise, save
from PIL import Image

from scripts.data.cines import LoadCined
from scripts.data.labels import LoadLabelsd
from scripts.data.reading import LoadSequencesd

SHAPE = (8, 9, 6)


def mask(shape=SHAPE):
    voxels = np.zeros(shape, np.uint8)
    voxels[1:4, 2:5, 0] = 1
    voxels[5, 5, 3] = 2
    return voxels


def stored_as(axcodes, voxels, affine=AFFINE):
    """The voxels and the affine of the same image with other axes."""
    image = nib.Nifti1Image(voxels, affine)
    turn = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt(axcodes))
    turned = image.as_reoriented(turn)
    return np.asarray(turned.dataobj), turned.affine


def read_both(folder, label_voxels, label_affine=AFFINE, image=None, **settings):
    """Image and label as the bundles read them."""
    paths = {"image": image or save(folder / "scan.nii.gz", noise(*SHAPE)), "label": str(folder / "scan_seg.nii.gz")}
    save(folder / "scan_seg.nii.gz", label_voxels, label_affine)
    return LoadLabelsd(**settings)(LoadSequencesd("image", ["CT"], min_ndim=2, **settings)(paths))


@pytest.mark.parametrize("axcodes", ["RAS", "LPS", "ASL", "SRP", "LIA"])
def test_a_label_map_that_is_stored_with_other_axes_is_the_same(tmp_path, axcodes):
    d = read_both(tmp_path, *stored_as(axcodes, mask()))
    assert torch.equal(d["label"].as_tensor(), torch.as_tensor(mask()).float()[None])
    np.testing.assert_allclose(d["label"].affine, d["image"].affine)


def test_a_mask_that_was_cut_out_is_put_where_it_belongs(tmp_path):
    affine = AFFINE.copy()
    affine[:, 3] = AFFINE @ [1, 2, 0, 1]
    d = read_both(tmp_path, mask()[1:6, 2:7, :4], affine)
    assert torch.equal(d["label"][0].as_tensor(), torch.as_tensor(mask()).float())


def test_a_mask_of_a_finer_grid_takes_the_nearest_label(tmp_path):
    fine = mask().repeat(2, axis=0).repeat(2, axis=1).repeat(2, axis=2)
    affine = AFFINE @ np.array([[0.5, 0, 0, -0.25], [0, 0.5, 0, -0.25], [0, 0, 0.5, -0.25], [0, 0, 0, 1]])
    d = read_both(tmp_path, fine, affine)
    assert torch.equal(d["label"][0].as_tensor(), torch.as_tensor(mask()).float())


def lost(**changes):
    affine = np.eye(4)
    affine[:3, 3] = changes.get("origin", (0, 0, 0))
    return affine


ELSEWHERE = {
    "no affine of its own": (mask(), np.eye(4), "they have no place in common"),
    "another spacing": (mask(), AFFINE @ np.diag([0.7, 0.7, 0.7, 1]), "it has as many voxels, but in another place"),
    "another scan": (mask(), lost(origin=(900, 0, 0)), "they have no place in common"),
    "half outside": (mask((8, 9, 12)) + mask((8, 9, 12))[..., ::-1], AFFINE, "50 % of what it marks lies outside"),
}


@pytest.mark.parametrize(("voxels", "affine", "words"), ELSEWHERE.values(), ids=ELSEWHERE.keys())
def test_a_mask_of_another_place_is_refused_with_both_files(tmp_path, voxels, affine, words):
    with pytest.raises(
        ValueError, match=rf"scan_seg.nii.gz: its field of view .*scan.nii.gz: ({words}); give files"
    ) as error:
        read_both(tmp_path, voxels, affine)
    assert "\n" not in str(error.value)


def test_whole_numbers_that_a_file_rounded_are_whole_and_probabilities_are_refused(tmp_path):
    voxels = mask().astype(np.float32) * 1.5
    d = read_both(tmp_path, np.where(mask() == 2, np.float32(2.9999998), mask()))
    assert d["label"].unique().tolist() == [0, 1, 3]
    with pytest.raises(ValueError, match=r"scan_seg.nii.gz: has the value 1.5, a label map has whole numbers; cut a map"):
        read_both(tmp_path, voxels)
    with pytest.raises(ValueError, match="has the value -1, labels are 0 or more"):
        read_both(tmp_path, mask().astype(np.int16) - 1)


def test_two_masks_of_one_case_are_refused_with_both_names(tmp_path):
    image = load(save(tmp_path / "a.nii", noise(*SHAPE)))
    with pytest.raises(ValueError, match=r"a_seg.nii and a_seg.nii.gz: two label maps of one case"):
        LoadLabelsd()({"image": image, "label": ["a_seg.nii", "a_seg.nii.gz"]})


def test_a_picture_is_the_mask_of_a_scan_of_its_size_and_of_no_other(tmp_path):
    drawn = np.zeros((9, 8), np.uint8)
    drawn[2:5, 1:4] = 255
    Image.fromarray(drawn).save(tmp_path / "scan_seg.png")
    for shape in (SHAPE[:2], (8, 7)):
        paths = {"image": save(tmp_path / "scan.nii.gz", noise(*shape, 1)), "label": str(tmp_path / "scan_seg.png")}
        d = LoadSequencesd("image", ["CT"])(paths)
        if shape == SHAPE[:2]:
            label = LoadLabelsd(min_ndim=2, as_volume=True)(d)["label"]
            assert np.array_equal(label[0, ..., 0].numpy(), drawn.T)
        else:
            with pytest.raises(ValueError, match=r"scan_seg.png: has 8 x 9 x 1 voxels, .*no affine says how they lie"):
                LoadLabelsd(min_ndim=2, as_volume=True)(d)


def test_a_label_map_of_a_cine_that_lost_its_spacing_lies_where_its_voxels_are(tmp_path):
    thin = np.diag([1.0, 1, 10, 1])
    cine = np.stack([noise(*SHAPE, seed=seed) for seed in range(3)], axis=-1)
    paths = {"image": save(tmp_path / "c.nii.gz", cine, thin), "frames": (0, 2)}
    load = LoadCined("image", assumed_spacing=(1.5, 1.5, 10.0))
    for affine in (thin, np.diag([1.5, 1.5, 10, 1])):
        paths["label"] = save(tmp_path / "c_ed_gt.nii.gz", mask(), affine)
        label = LoadLabelsd()(load(paths))["label"]
        assert np.array_equal(label[0].numpy(), mask())
    paths["label"] = save(tmp_path / "c_ed_gt.nii.gz", *stored_as("LPS", mask(), thin))
    label = LoadLabelsd()(load(paths))["label"]
    assert np.array_equal(label[0].numpy(), mask())


# --- sequences


@pytest.mark.parametrize("axcodes", ["RAS", "ASL"])
def test_a_sequence_that_is_stored_with_other_axes_is_the_same(tmp_path, axcodes):
    voxels = noise(*SHAPE, seed=1)
    paths = [save(tmp_path / "t1.nii.gz", noise(*SHAPE)), save(tmp_path / "flair.nii.gz", *stored_as(axcodes, voxels))]
    image = load(paths, ("T1", "FLAIR"))
    assert np.abs(image[1].numpy() - voxels).max() < 1e-6
    assert np.array_equal(image[0].numpy(), noise(*SHAPE))


def test_a_sequence_of_a_coarser_grid_is_interpolated_onto_that_of_the_first(tmp_path, caplog):
    x, y, z = np.mgrid[:8, :9, :6].astype(np.float32)
    coarse = (x + 10 * y + 100 * z)[::2, ::2, ::2]
    paths = [
        save(tmp_path / "t1.nii.gz", noise(*SHAPE)),
        save(tmp_path / "f.nii.gz", coarse, AFFINE @ np.diag([2, 2, 2, 1])),
    ]
    image = load(paths, ("T1", "FLAIR"))
    assert np.allclose(image[1, :7, :, :5], (x + 10 * y + 100 * z)[:7, :, :5], atol=1e-3)
    assert "f.nii.gz: covers" not in caplog.text or "the rest is taken as 0" in caplog.text
