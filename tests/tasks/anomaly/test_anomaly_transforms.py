from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import make_whole_head
from made_inputs import AFFINE, anomaly_map, noise, save
from monai.data import MetaTensor
from skimage.filters import threshold_otsu

from scripts.brains import brain_mask, brain_masks
from scripts.tasks.anomaly.transforms import (
    KeepBraind,
    RandSkullStripd,
    RandSprited,
    RandStandInd,
    RemoveSmallLesions,
    RemoveSmallLesionsd,
    ShiftBackground,
    SmoothAcrossSlicesd,
    cohort_otsu,
)
from scripts.transforms import RestoreIntensityd, ScaleIntensityByForegroundd

# --- cohort_otsu


def test_the_threshold_of_a_cohort_is_that_of_all_its_voxels(tmp_path):
    maps = [anomaly_map(seed) * (1 + seed) for seed in range(3)]
    for i, item in enumerate(maps):
        (tmp_path / f"case{i}").mkdir()
        save(tmp_path / f"case{i}" / f"case{i}_map.nii.gz", item[0].numpy())
    pooled = torch.cat([m.flatten() for m in maps]).numpy()
    assert cohort_otsu(tmp_path) == pytest.approx(threshold_otsu(pooled[pooled > 0], nbins=4096), rel=0.01)


def test_a_cohort_without_maps_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no map like"):
        cohort_otsu(tmp_path)


def test_a_cohort_of_zeros_is_refused(tmp_path):
    (tmp_path / "a").mkdir()
    save(tmp_path / "a" / "a_map.nii.gz", np.zeros((4, 4, 4), np.float32))
    with pytest.raises(ValueError, match="positive"):
        cohort_otsu(tmp_path)


# --- RemoveSmallLesions


def lesions(affine):
    """Two lesions of 27 and 8 voxels that touch by a corner only."""
    mask = torch.zeros(1, 10, 10, 10, dtype=torch.uint8)
    mask[:, 1:4, 1:4, 1:4], mask[:, 4:6, 4:6, 4:6] = 1, 1
    return MetaTensor(mask, affine=torch.as_tensor(affine, dtype=torch.float64), meta={"filename_or_obj": "a"})


@pytest.mark.parametrize(
    "affine",
    [AFFINE, np.diag([10.0, 1, 0.9, 1]), [[1.0, 0, 0, 0], [0, 1, 4, 0], [0, 0, 9, 0], [0, 0, 0, 1]]],
    ids=["turned", "scaled", "sheared"],
)
def test_lesions_below_the_volume_go_and_the_others_stay(affine):
    mask = lesions(affine)  # 0.009 ml a voxel
    remaining = [int(RemoveSmallLesions(volume)(mask).sum()) for volume in (0, 0.072, 0.073, 0.243, 0.244)]
    assert remaining == [35, 35, 27, 27, 0]


def test_removing_keeps_type_and_meta_data():
    mask = RemoveSmallLesionsd("pred", min_volume=0.1)({"pred": lesions(AFFINE)})["pred"]
    assert mask.dtype == torch.uint8 and mask.meta["filename_or_obj"] == "a"
    np.testing.assert_allclose(mask.affine, AFFINE)


def test_an_empty_mask_stays_empty():
    assert not RemoveSmallLesions(1.0)(torch.zeros(1, 4, 4, 4, dtype=torch.uint8)).any()


# --- RandSprited


def slice_with_head():
    """A ring of bone around a dark inside, with noise, in 2 channels."""
    rows, columns = np.indices((48, 40))
    distance = np.hypot(rows - 24, columns - 20)
    inside = np.where(distance < 14, 0.05, 0.7) * (distance < 17)
    return torch.from_numpy((inside * (0.8 + 0.2 * noise(2, 48, 40))).astype(np.float32)), distance < 17


def sprites(count=60, **kwargs):
    transform = RandSprited(**kwargs).set_random_state(seed=3)
    return [transform({"image": slice_with_head()[0]}) for _ in range(count)]


def test_the_same_seed_gives_the_same_bytes_and_another_draw_differs():
    first, second = sprites(5), sprites(5)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a["image"], b["image"]) and torch.equal(a["label"], b["label"])
    assert not torch.equal(first[0]["label"], first[1]["label"])


def test_a_sprite_is_one_grey_level_that_stands_out_inside_the_head():
    image, filled_head = slice_with_head()
    for item in sprites(contrast=0.25):
        mask = item["label"][0].bool()
        assert item["label"].dtype == torch.uint8 and item["label"].shape == (1, 48, 40) and mask.any()
        assert not (mask & ~torch.from_numpy(filled_head)).any()
        assert torch.equal(item["image"][:, ~mask], image[:, ~mask])
        for painted, covered in zip(item["image"][:, mask], image[:, mask], strict=True):
            assert len(painted.unique()) == 1 and 0 <= painted[0] <= 1
            assert abs(painted[0] - covered.mean()) >= 0.25 - 1e-6


def test_a_sprite_that_keeps_the_texture_shifts_what_was_there():
    image, _ = slice_with_head()
    for flat, half, kept in zip(*(sprites(20, texture=texture) for texture in (0.0, 0.5, 1.0)), strict=True):
        mask = kept["label"][0].bool()
        assert torch.equal(flat["label"], kept["label"]) and torch.equal(kept["image"][:, ~mask], image[:, ~mask])
        inside = (x[:, mask] for x in (flat["image"], half["image"], kept["image"], image))
        for grey, middle, painted, covered in zip(*inside, strict=True):
            torch.testing.assert_close(painted, (grey + covered - covered.mean()).clamp(0, 1), atol=1e-6, rtol=0)
            torch.testing.assert_close(middle, (grey + (covered - covered.mean()) / 2).clamp(0, 1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", ["square", "ellipse", "heart"])
def test_sprites_of_a_shape_keep_to_the_radius(shape):
    image = torch.full((1, 64, 64), 0.5)
    transform = RandSprited(shapes=[shape], radius=(5, 8)).set_random_state(seed=0)
    for _ in range(30):
        rows, columns = np.nonzero(transform({"image": image})["label"][0].numpy())
        assert max(np.ptp(rows), np.ptp(columns)) <= 2 * 8 * 2**0.5
        assert len(rows) <= (2 * 8 + 1) ** 2


def test_a_slice_without_a_head_gets_no_sprite():
    item = RandSprited()({"image": torch.zeros(1, 16, 16)})
    assert not item["label"].any() and not item["image"].any() and item["label"].shape == (1, 16, 16)


def test_the_input_of_a_sprite_is_left_alone():
    image = MetaTensor(slice_with_head()[0], meta={"filename_or_obj": "a"})
    before = image.clone()
    item = RandSprited()({"image": image})
    assert torch.equal(image, before) and item["label"].meta["filename_or_obj"] == "a"


def test_probability_zero_paints_nothing():
    assert not any(item["label"].any() for item in sprites(5, prob=0.0))


@pytest.mark.parametrize("bad", [{"shapes": ["star"]}, {"contrast": 0.6}, {"texture": -0.1}, {"texture": 1.1}])
def test_settings_that_no_sprite_can_meet_are_refused(bad):
    with pytest.raises(ValueError):
        RandSprited(**bad)


# --- RandStandInd


def test_the_stand_in_takes_the_place_of_all_sequences_as_often_as_asked():
    image = torch.from_numpy(noise(3, 4, 4))
    assert torch.equal(RandStandInd("image", channel=1, prob=0.0)({"image": image})["image"], image)
    replaced = RandStandInd("image", channel=1, prob=1.0)({"image": image})["image"]
    assert all(torch.equal(channel, image[1]) for channel in replaced)


def test_the_stand_in_is_drawn_from_the_seed():
    transform = RandStandInd("image", channel=0, prob=0.5)
    image = torch.from_numpy(noise(2, 4, 4))

    def replaced(seed):
        return torch.equal(*transform.set_random_state(seed=seed)({"image": image})["image"])

    first = [replaced(seed) for seed in range(40)]
    assert first == [replaced(seed) for seed in range(40)]
    assert 10 < sum(first) < 30


def test_the_stand_in_takes_the_place_of_one_sequence_where_only_that_is_replaced():
    image = torch.from_numpy(noise(3, 4, 4))
    replaced = RandStandInd("image", channel=1, prob=1.0, replaced=[2])({"image": image})["image"]
    assert torch.equal(replaced, image[[0, 1, 1]])


# --- RandSkullStripd


def test_nothing_but_the_brain_stays():
    image = torch.from_numpy(make_whole_head()[0])
    found = brain_mask(image.numpy())
    stripped = RandSkullStripd("image", prob=1.0)({"image": 0.8 * image})["image"]
    assert not stripped[:, ~found].any() and stripped.shape == image.shape
    assert stripped[:, 45, 64].tolist() == pytest.approx([0.4] * 3), "the brain's median is where a stripped scan's is"
    assert torch.equal(RandSkullStripd("image", prob=0.0)({"image": image})["image"], image)


def test_a_map_is_kept_in_the_brain_alone_or_as_it_is():
    image, brain = make_whole_head()
    data = {"map": MetaTensor(torch.ones(1, 128, 128, 2)), "image": torch.from_numpy(np.stack([image, image], axis=-1))}
    kept = KeepBraind("map")(data)["map"]
    assert isinstance(kept, MetaTensor) and kept.mean().item() == pytest.approx(brain.mean(), rel=0.05)
    assert not kept[:, ~brain_masks(data["image"].numpy())].any()
    assert torch.equal(KeepBraind("map", keep=False)(data)["map"], data["map"])


@pytest.mark.parametrize("grey", [0.0, 0.6])
def test_a_slice_without_a_brain_is_not_stripped(grey):
    image = torch.zeros(3, 128, 128)
    image[:, 55:70, 55:70] = grey
    assert torch.equal(RandSkullStripd("image", prob=1.0)({"image": image})["image"], image)


# --- ShiftBackground


def scan_in_air(air=0.0):
    """A volume (2, 32, 32, 4) as a scanner gives it: a head of 50 to 150 in air."""
    rng = np.random.default_rng(0)
    x, y = np.mgrid[-1:1:32j, -1:1:32j]
    head = np.broadcast_to((np.hypot(x, y) < 0.7)[..., None], (2, 32, 32, 4))
    voxels = np.where(head, rng.uniform(50, 150, head.shape), rng.uniform(0, 1, head.shape) * air)
    return MetaTensor(torch.from_numpy(voxels.astype(np.float32)), meta={"filename_or_obj": "scan.nii.gz"}), head


@pytest.mark.parametrize("air", [0.0, 3.0])
def test_a_scan_that_was_z_scored_as_a_whole_is_as_it_was_before(air):
    scan, _ = scan_in_air(air)
    shifted = ShiftBackground()((scan - scan.mean()) / scan.std())
    assert torch.allclose(shifted * scan.std(), scan, atol=0.1)
    assert (shifted >= 0).all() and len(shifted.meta["intensity_offset"]) == 2


def test_no_brain_is_lost_where_only_the_brain_was_z_scored():
    scan, head = scan_in_air()
    inside = scan[torch.from_numpy(head.copy())]
    scored = torch.where(torch.from_numpy(head.copy()), (scan - inside.mean()) / inside.std(), 0.0)
    shifted = ShiftBackground()(scored)
    assert not shifted[torch.from_numpy(~head)].any()
    assert (shifted[torch.from_numpy(head.copy())] > 0).float().mean() > 0.99


def test_results_of_a_shifted_scan_come_back_in_its_own_units():
    scan, _ = scan_in_air()
    scored = (scan - scan.mean()) / scan.std()
    data = ScaleIntensityByForegroundd("image")({"image": ShiftBackground()(scored)})
    assert torch.allclose(RestoreIntensityd("image")(data)["image"], scored, atol=0.01)


def test_scans_without_much_below_zero_stay_as_they_are():
    scan, _ = scan_in_air()
    assert ShiftBackground()(scan) is scan
    ringing = scan - 1 * (scan == 0)
    assert torch.equal(ShiftBackground()(ringing), ringing)


def test_negative_grey_levels_without_a_background_are_refused_with_the_name():
    voxels = torch.randn(1, 16, 16, 4)
    voxels[:, [0, 0, -1, -1], [0, -1, 0, -1]] = 0.1
    with pytest.raises(ValueError, match="scan.nii.gz: negative grey levels in sequence 1"):
        ShiftBackground()(MetaTensor(voxels, meta={"filename_or_obj": "scan.nii.gz"}))


# --- SmoothAcrossSlicesd


@pytest.mark.parametrize("distance", [1.0, 2.5, 5.0])
def test_maps_are_smoothed_as_wide_in_millimetres_however_thick_the_slices_are(distance):
    affine = torch.diag(torch.tensor([2.0, 2, distance, 1]))
    anomaly = torch.zeros(1, 2, 2, 101)
    anomaly[..., 50] = 1
    data = {"map": MetaTensor(anomaly, affine=affine), "image": MetaTensor(anomaly, affine=affine)}
    smoothed = SmoothAcrossSlicesd("map", sigma=5.0)(data)["map"][0, 0, 0].numpy()
    places = distance * (np.arange(101) - 50)
    assert smoothed.sum() == pytest.approx(1, abs=1e-3)
    assert np.sqrt((smoothed * places**2).sum()) == pytest.approx(5, rel=0.06)


def test_no_width_smooths_nothing():
    anomaly = MetaTensor(torch.rand(1, 2, 2, 5))
    assert torch.equal(SmoothAcrossSlicesd("map", sigma=0.0)({"map": anomaly, "image": anomaly})["map"], anomaly)
