from __future__ import annotations

import numpy as np
import pytest
import torch
from made_inputs import AFFINE, anomaly_map, noise, save
from monai.data import MetaTensor
from skimage.filters import threshold_otsu

from scripts.tasks.anomaly.transforms import RandSprited, RandStandInd, RemoveSmallLesions, RemoveSmallLesionsd, cohort_otsu

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
