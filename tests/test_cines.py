from __future__ import annotations

import logging

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import make_cine, save_nifti, save_turned
from monai.data import DataLoader, Dataset, MetaTensor, decollate_batch
from monai.transforms import Compose, Invertd, Orientationd

from scripts.data.cines import LoadCined, assume_spacing
from scripts.tasks.motion.transforms import DisplacementToWorldd, MeasureFoldingd, ScaleIntensityBySourced, WarpSourced
from scripts.transforms import Spacingd

SPACING = np.diag([1.4, 1.4, 10.0, 1.0])
THIN = np.diag([1.0, 1.0, 10.0, 1.0])


@pytest.fixture
def path(tmp_path):
    """A 4-D file of five frames."""
    return save_nifti(tmp_path / "cine.nii.gz", make_cine()[0], SPACING)


# --- LoadCined


def test_the_ends_are_two_channels_and_all_frames_between_are_kept(path):
    cine = make_cine()[0]
    data = LoadCined("image")({"image": str(path)})
    assert data["image"].shape == (2, 32, 28, 6) and data["image"].dtype == torch.float32
    assert np.array_equal(data["image"].numpy(), np.moveaxis(cine[..., [0, -1]], -1, 0))
    assert np.array_equal(data["cine"].numpy(), np.moveaxis(cine, -1, 0))
    assert np.allclose(data["image"].affine, SPACING) and data["image"].meta["num_frames"] == 5


@pytest.mark.parametrize(("ends", "expected"), [((1, 3), [1, 2, 3]), ((3, 1), [3, 4, 0, 1]), ((0, 4), [0, 1, 2, 3, 4])])
def test_named_frames_are_the_ends_and_a_cycle_goes_on_at_its_start(path, ends, expected):
    data = LoadCined("image")({"image": path, "frames": ends})
    cine = np.moveaxis(make_cine()[0], -1, 0)[expected]
    assert np.array_equal(data["cine"].numpy(), cine) and np.array_equal(data["image"].numpy(), cine[[0, -1]])


def test_for_training_all_frames_are_the_image(path):
    data = LoadCined("image", frames="all")({"image": path, "frames": (1, 4)})
    assert np.array_equal(data["image"].numpy(), np.moveaxis(make_cine()[0], -1, 0)[1:]) and "cine" not in data


def test_two_files_are_source_and_target(tmp_path):
    cine = make_cine()[0]
    paths = [save_nifti(tmp_path / f"{i}.nii.gz", cine[..., i], SPACING) for i in (0, 4)]
    data = LoadCined("image")({"image": paths})
    assert np.array_equal(data["image"].numpy(), np.moveaxis(cine[..., [0, -1]], -1, 0))
    assert torch.equal(data["cine"], data["image"])


def test_the_time_between_two_frames_is_that_of_the_file(tmp_path):
    image = nib.Nifti1Image(make_cine()[0], SPACING)
    image.header.set_zooms((1.4, 1.4, 10, 40))
    image.header.set_xyzt_units("mm", "msec")
    nib.save(image, tmp_path / "a.nii.gz")
    assert LoadCined("image")({"image": tmp_path / "a.nii.gz"})["cine"].meta["time_step"] == pytest.approx(0.04)
    files = [save_nifti(tmp_path / f"{i}.nii.gz", make_cine()[0][..., i]) for i in (0, 4)]
    assert LoadCined("image")({"image": files})["cine"].meta["time_step"] == 0


def refuse(words, image, **data):
    with pytest.raises(ValueError, match=words) as error:
        LoadCined("image")({"image": image, **data})
    assert "\n" not in str(error.value)


def test_a_single_frame_is_refused(tmp_path):
    refuse(r"a\.nii\.gz: a single frame.*4-D file", save_nifti(tmp_path / "a.nii.gz", make_cine()[0][..., 0]))


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        ((0, 5), r"cine\.nii\.gz: frames 0 and 5 wanted, it has 0 to 4"),
        ((-1, 2), "frames -1 and 2 wanted"),
        ((2, 2), r"source and target are both frame 2; give two"),
    ],
)
def test_frames_that_are_no_two_of_the_file_are_refused(path, frames, words):
    refuse(words, path, frames=frames)


def test_equal_ends_are_refused(tmp_path):
    still = make_cine()[0][..., [0, 1, 0]]
    refuse(r"a\.nii\.gz: source and target are the same", save_nifti(tmp_path / "a.nii.gz", still))
    files = [save_nifti(tmp_path / name, still[..., 0]) for name in ("b.nii.gz", "c.nii.gz")]
    refuse(r"b\.nii\.gz: source and target are the same", files)


def test_files_on_different_grids_are_refused(tmp_path):
    cine = make_cine()[0]
    one = save_nifti(tmp_path / "a.nii.gz", cine[..., 0], SPACING)
    refuse("b.nii.gz: shape .* differs", [one, save_nifti(tmp_path / "b.nii.gz", cine[:-1, ..., 4], SPACING)])
    refuse("c.nii.gz: .*affine differs", [one, save_nifti(tmp_path / "c.nii.gz", cine[..., 4], THIN)])


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="ends or all"):
        LoadCined("image", frames="some")
    with pytest.raises(ValueError, match="three lengths above 0"):
        LoadCined("image", assumed_spacing=(1.5, 10))


# --- spacing that the header has lost


@pytest.mark.parametrize(
    ("spacing", "shape", "expected"),
    [
        ((1.4, 1.4, 10), (100, 90, 7), (1.4, 1.4, 10)),
        ((1, 1, 10), (100, 90, 7), (1.5, 1.6, 10)),
        ((1.0, 1.3, 8), (100, 90, 7), (1.5, 1.3, 8)),
        ((10, 1, 1), (7, 100, 90), (10, 1.5, 1.6)),
        ((1, 1, 2), (100, 90, 40), (1, 1, 2)),
        ((1, 1, 1), (100, 90, 80), (1, 1, 1)),
        ((1, 1, 1), (100, 90, 7), (1.5, 1.6, 9)),
        ((1.4, 1.4, 0), (100, 90, 7), (1.4, 1.4, 9)),
        ((0, 0, 0), (100, 90, 7), (1.5, 1.6, 9)),
    ],
)
def test_only_a_lost_spacing_is_assumed(spacing, shape, expected):
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = (3, 4, 5)
    mended = assume_spacing(affine, shape, (1.5, 1.6, 9))
    assert np.allclose(np.diag(mended)[:3], expected) and np.array_equal(mended[:3, 3], (3, 4, 5))


def test_directions_are_kept_where_a_spacing_is_assumed():
    turned = np.array([[0, -1, 0, 9], [0.6, 0, 8, 0], [0.8, 0, -6, 0], [0, 0, 0, 1.0]])
    mended = assume_spacing(turned, (100, 90, 7), (1.5, 1.5, 9))
    assert np.allclose(mended[:3, :3], turned[:3, :3] * [1.5, 1.5, 1])


def test_an_assumed_spacing_is_told_once_and_reaches_the_resampling_but_not_the_files_own_affine(tmp_path, caplog):
    path = save_nifti(tmp_path / "a.nii.gz", make_cine()[0], THIN)
    with caplog.at_level(logging.WARNING):
        data = LoadCined("image")({"image": path})
    (warning,) = caplog.messages
    assert f"{path}: lost spacing, 1 x 1 x 10 mm in the header; 1.5 x 1.5 x 10 mm is assumed" == warning
    assert np.allclose(np.diag(data["image"].affine), [1.5, 1.5, 10, 1])
    assert np.allclose(data["image"].meta["original_affine"], THIN)
    assert Spacingd("image", pixdim=[3.0, 3.0, 5.0])(data)["image"].shape == (2, 16, 14, 11)


def test_a_header_with_zeros_is_read_with_the_assumed_spacing(tmp_path):
    path = save_nifti(tmp_path / "a.nii.gz", make_cine()[0], SPACING)
    image = nib.load(path)
    image.header["srow_x"] = image.header["srow_y"] = image.header["srow_z"] = 0
    image.header["pixdim"][1:4], image.header["vox_offset"] = 0, 352
    with open(tmp_path / "b.nii", "wb") as file:
        file.write(image.header.binaryblock + b"\0" * 4 + np.asarray(image.dataobj).tobytes("F"))
    data = LoadCined("image")({"image": tmp_path / "b.nii"})
    assert np.allclose(np.diag(data["image"].affine), [1.5, 1.5, 10, 1])
    assert np.allclose(data["image"].meta["original_affine"], data["image"].affine)
    assert np.array_equal(data["cine"].numpy(), np.moveaxis(make_cine()[0], -1, 0))


# --- grey levels and the whole of the preprocessing


def test_percentiles_of_the_source_become_the_bounds_of_both_frames():
    source = torch.arange(1001.0).reshape(1, 7, 11, 13)
    scaled = ScaleIntensityBySourced("image", lower=10, upper=90)({"image": torch.cat([source, source + 100])})["image"]
    assert scaled[0].flatten()[[100, 500, 900]].tolist() == pytest.approx([-1, 0, 1])
    assert torch.allclose(scaled[1], ((source[0] + 100 - 500) / 400).clamp(-1, 1), atol=1e-5)


def test_a_source_without_grey_levels_is_refused():
    image = torch.zeros(2, 10, 10, 10)
    image[0, 0, 0, 0] = 1
    with pytest.raises(ValueError, match="nearly all voxels of the source are 0"):
        ScaleIntensityBySourced("image")({"image": MetaTensor(image)})


def preprocessing(frames="ends"):
    return Compose(
        [
            LoadCined("image", frames=frames),
            ScaleIntensityBySourced("image"),
            Orientationd("image", axcodes="RAS", labels=None),
            Spacingd("image", pixdim=[2.0, 2.0, 5.0]),
        ]
    )


@pytest.mark.parametrize("frames", ["ends", "all"])
def test_a_cine_stored_with_other_axes_is_the_same_to_the_network(tmp_path, frames):
    ras, asl = (preprocessing(frames)({"image": p})["image"] for p in save_turned(tmp_path, make_cine()[0], SPACING))
    assert ras.shape == (2 if frames == "ends" else 5, 23, 20, 11)
    assert torch.allclose(ras.as_tensor(), asl.as_tensor(), atol=1e-4)


def test_the_preprocessing_can_be_undone_with_an_assumed_spacing_too(tmp_path):
    path = save_nifti(tmp_path / "a.nii.gz", make_cine()[0], THIN)
    transform = preprocessing()
    batch = next(iter(DataLoader(Dataset([{"image": path}], transform), batch_size=1)))
    (item,) = decollate_batch(batch)
    back = Invertd("image", transform, nearest_interp=False)(item)["image"]
    assert back.shape == (2, 32, 28, 6) and np.allclose(np.diag(back.affine), [1.5, 1.5, 10, 1])
    assert np.allclose(back.meta["original_affine"], THIN)


# --- what a displacement makes of the source

OBLIQUE = np.array([[0.0, -2, 0, 90], [1.5, 0, 0, -20], [0, 0, -3, 7], [0, 0, 0, 1]])


def volume(array, **meta):
    return MetaTensor(torch.as_tensor(array), OBLIQUE, meta={"original_affine": OBLIQUE, **meta})


def test_a_step_along_an_axis_is_a_vector_along_that_axis_in_the_world():
    steps = torch.zeros(6, 4, 4, 4)
    steps[1], steps[5] = 1, 2  # first frame: one voxel along the second axis; second frame: two along the third
    data = DisplacementToWorldd("pred")({"pred": steps, "image": volume(torch.zeros(2, 4, 4, 4))})
    assert torch.allclose(data["displacement"][:3, 0, 0, 0].as_tensor(), torch.tensor([-2.0, 0, 0]))
    assert torch.allclose(data["displacement"][3:, 0, 0, 0].as_tensor(), torch.tensor([0.0, 0, -6]))


def test_the_folding_of_the_worst_frame_is_told():
    steps = torch.zeros(6, 8, 8, 8)
    steps[3, 4:] = -9  # what lies behind this plane takes from far in front of it
    assert MeasureFoldingd("pred")({"pred": steps})["folding"] == 2 / 8
    assert MeasureFoldingd("pred")({"pred": steps[:3]})["folding"] == 0


def warped(millimetres, **data):
    cine = volume(torch.rand(5, 6, 5, 4) * 1000)
    return cine, WarpSourced()({"displacement": volume(millimetres), "cine": cine, **data})


def test_no_displacement_gives_the_source_exactly_and_a_whole_voxel_its_neighbour():
    millimetres = torch.zeros(6, 6, 5, 4)
    millimetres[3] = -2  # of the world's x axis: one voxel along the second axis
    cine, data = warped(millimetres)
    assert data["frames"].dtype == torch.float32 and torch.equal(data["frames"][0], cine[0])
    assert torch.allclose(data["frames"][1, :, :-1].as_tensor(), cine[0, :, 1:].as_tensor(), rtol=1e-6)
    assert torch.allclose(data["frames"][1, :, -1].as_tensor(), cine[0, :, -1].as_tensor(), rtol=1e-6)
    assert data["motion"].shape == (1, 6, 5, 4) and (data["motion"] == 2).all() and "labels" not in data


def test_labels_stay_whole_numbers_on_their_way():
    label = volume(torch.randint(0, 4, (1, 6, 5, 4)).float())
    millimetres = torch.zeros(3, 6, 5, 4)
    millimetres[0] = -0.8  # less than half a voxel
    _, data = warped(millimetres, label=label)
    assert data["labels"].dtype == torch.uint8 and torch.equal(data["labels"].as_tensor(), label.as_tensor().byte())


@pytest.mark.parametrize("wrong", ["shape", "axes"])
def test_labels_on_another_grid_are_refused_with_their_file(wrong):
    label = volume(torch.zeros(1, 6, 5, 5 if wrong == "shape" else 4), filename_or_obj="p_ed_gt.nii.gz")
    if wrong == "axes":
        label.meta["original_affine"] = np.eye(4)
    with pytest.raises(ValueError, match=r"p_ed_gt\.nii\.gz: its grid of .* resample it"):
        warped(torch.zeros(3, 6, 5, 4), label=label)
