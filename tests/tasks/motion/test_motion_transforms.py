from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import make_cine, save_nifti, save_turned
from made_inputs import AFFINE
from monai.data import DataLoader, Dataset, MetaTensor, decollate_batch
from monai.transforms import Compose, Invertd, Orientationd

from scripts.data.cines import LoadCined
from scripts.grids import Spacingd
from scripts.tasks.motion.transforms import (
    DisplacementToWorldd,
    MeasureFoldingd,
    MeasureInverseConsistencyd,
    ScaleIntensityBySourced,
    SplitInversed,
    WarpSourced,
)

SPACING = np.diag([1.4, 1.4, 10.0, 1.0])

THIN = np.diag([1.0, 1.0, 10.0, 1.0])


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


def preprocessing(frames="ends", **settings):
    return Compose(
        [
            LoadCined("image", frames=frames, **settings),
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
    transform = preprocessing(assumed_spacing=(1.5, 1.5, 10.0))
    batch = next(iter(DataLoader(Dataset([{"image": path}], transform), batch_size=1)))
    (item,) = decollate_batch(batch)
    back = Invertd("image", transform, nearest_interp=False)(item)["image"]
    assert back.shape == (2, 32, 28, 6) and np.allclose(np.diag(back.affine), [1.5, 1.5, 10, 1])
    assert np.allclose(back.meta["original_affine"], THIN)


# --- what a displacement makes of the source


def volume(array, **meta):
    return MetaTensor(torch.as_tensor(array), AFFINE, meta={"original_affine": AFFINE, **meta})


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


@pytest.mark.parametrize("key", ["label", "target_label"])
@pytest.mark.parametrize("wrong", ["shape", "axes"])
def test_labels_on_another_grid_are_refused_with_their_file(wrong, key):
    label = volume(torch.zeros(1, 6, 5, 5 if wrong == "shape" else 4), filename_or_obj="p_ed_gt.nii.gz")
    if wrong == "axes":
        label.meta["original_affine"] = np.eye(4)
    with pytest.raises(ValueError, match=r"p_ed_gt\.nii\.gz: its grid of .* resample it"):
        warped(torch.zeros(3, 6, 5, 4), **{key: label})


def test_a_shift_there_and_back_is_consistent_and_one_without_a_way_back_is_not():
    there = torch.zeros(3, 12, 12, 6)
    there[0] = 2.0
    image = MetaTensor(torch.zeros(2, 12, 12, 6), torch.diag(torch.tensor([1.5, 1.5, 4.0, 1.0])))
    measure = MeasureInverseConsistencyd("pred")
    for back, expected in ((-there, 0.0), (torch.zeros_like(there), 3.0), (there, 6.0)):
        measured = measure({"pred": torch.cat([0 * there, there, back]), "image": image})["inverse_consistency"]
        assert measured == pytest.approx(expected, abs=1e-6)


def test_the_way_back_is_taken_off():
    fields = torch.arange(9.0).view(9, 1, 1, 1)
    split = SplitInversed("displacement")({"displacement": fields})
    assert torch.equal(split["displacement"], fields[:6]) and torch.equal(split["inverse"], fields[6:])


def test_frames_of_different_scans_go_by_their_own_grey_levels():
    frame = torch.linspace(0, 1, 1000).view(1, 10, 10, 10)
    pair = torch.cat([frame, 50 + 7 * frame])
    one, each = (ScaleIntensityBySourced("image", each=each)({"image": pair})["image"] for each in (False, True))
    assert torch.allclose(each[0], each[1], atol=1e-5) and torch.equal(each[0], one[0]) and (one[1] == 1).all()
