from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch
from made_inputs import AFFINE, anomaly_map, load, noise, save
from monai.data import DataLoader, Dataset, MetaTensor, decollate_batch
from monai.transforms import Compose, Invertd, Orientationd
from PIL import Image
from skimage.filters import threshold_otsu

from scripts.data.reading import LoadSequencesd
from scripts.grids import FitSlicesd
from scripts.transforms import (
    MapToMask,
    MapToMaskd,
    RestoreIntensityd,
    ScaleIntensityByExtremesd,
    ScaleIntensityByForeground,
    ScaleIntensityByForegroundd,
    ScaleIntensityByWindow,
    ScaleIntensityByWindowd,
    SplitPredictiond,
    has_foreground,
)

# --- ScaleIntensityByForeground, RestoreIntensityd


def head(*shape, seed=0):
    """A bright block (100 to 200) in a background of zeros."""
    voxels = torch.zeros(shape)
    voxels[:, 4:12, 4:12] = 100 + 100 * torch.from_numpy(noise(*voxels[:, 4:12, 4:12].shape, seed=seed))
    return voxels


def test_the_median_of_the_foreground_becomes_what_was_asked():
    scaled = ScaleIntensityByForeground(foreground_median=0.3)(head(2, 16, 16, 8))
    assert scaled.min() == 0 and scaled.max() <= 1
    for channel in scaled.as_tensor():
        assert channel[channel > 0].median().item() == pytest.approx(0.3, abs=1e-3)


def test_the_unit_of_each_channel_does_not_matter():
    image = head(2, 16, 16, 8)
    other_unit = image * torch.tensor([0.01, 30.0]).reshape(2, 1, 1, 1)
    scaler = ScaleIntensityByForeground()
    torch.testing.assert_close(scaler(image).as_tensor(), scaler(other_unit).as_tensor())


def test_negative_values_become_zero_and_change_nothing_else():
    image = head(1, 16, 16, 8)
    cold = torch.where(image == 0, -1000.0, image)
    scaler = ScaleIntensityByForeground()
    assert torch.equal(scaler(image).as_tensor(), scaler(cold).as_tensor())


def test_bright_fat_is_clipped_and_leaves_the_rest_where_it_was():
    image = head(1, 16, 16, 8)
    fat = image.clone()
    fat[:, 4, 4] = 1500
    scaler = ScaleIntensityByForeground(percentile=90)
    assert scaler(fat).max() == 1
    assert scaler(fat)[0, 8, 8, 4].item() == pytest.approx(scaler(image)[0, 8, 8, 4].item(), rel=0.03)


def test_a_channel_without_positive_voxels_gives_zeros_and_scale_1():
    scaled = ScaleIntensityByForeground()(torch.cat([head(1, 16, 16, 8), -torch.ones(1, 16, 16, 8)]))
    assert not scaled[1].any() and scaled.meta["intensity_scale"][1] == 1.0


def test_scaling_leaves_its_input_and_its_meta_data_alone():
    image = MetaTensor(head(1, 16, 16, 8), affine=torch.as_tensor(AFFINE), meta={"filename_or_obj": "a"})
    before = image.clone()
    scaled = ScaleIntensityByForeground()(image)
    assert torch.equal(image, before) and "intensity_scale" not in image.meta
    assert torch.equal(scaled.affine, image.affine) and scaled.meta["filename_or_obj"] == "a"
    assert not scaled.applied_operations


def test_restoring_undoes_scaling_even_after_a_batch():
    image = torch.cat([head(1, 16, 16, 8), 7 * head(1, 16, 16, 8, seed=1)])
    transform = ScaleIntensityByForegroundd("image", foreground_median=0.2)
    batch = next(iter(DataLoader(Dataset([{"image": image}] * 2, transform), batch_size=2)))
    for item in decollate_batch(batch):
        item["healthy"] = item["image"].as_tensor()
        torch.testing.assert_close(RestoreIntensityd("healthy")(item)["healthy"], image)


def test_restoring_more_channels_than_the_scan_has_is_refused():
    data = ScaleIntensityByForegroundd("image")({"image": head(1, 16, 16, 8), "healthy": torch.zeros(2, 16, 16, 8)})
    with pytest.raises(ValueError, match="2 channels"):
        RestoreIntensityd("healthy")(data)


def test_the_extremes_become_0_and_1_and_are_restored():
    image = MetaTensor(torch.tensor([[[-50.0, 0.0], [25.0, 150.0]]]))
    scaled = ScaleIntensityByExtremesd("image")({"image": image})
    assert scaled["image"].flatten().tolist() == [0, 0.25, 0.375, 1] and image[0, 0, 0] == -50
    assert torch.equal(RestoreIntensityd("image")(scaled)["image"].as_tensor(), image.as_tensor())
    assert not ScaleIntensityByExtremesd("image")({"image": torch.full((1, 2, 2), 7.0)})["image"].any()


# --- ScaleIntensityByWindow, FitSlicesd


def ct(*shape, seed=0):
    """Hounsfield units from -1000 to 1000."""
    return torch.from_numpy(noise(*shape, seed=seed) * 2000 - 1000)


def grey_levels(*shape, seed=0):
    return torch.from_numpy(np.random.RandomState(seed).randint(0, 256, shape).astype(np.float32))


@pytest.mark.parametrize("units", ["hounsfield", "auto"])
def test_the_window_becomes_0_to_1_and_the_rest_is_clipped(units):
    scaled = ScaleIntensityByWindow((-20, 80), units)(torch.tensor([[-1000.0, -20, 30, 80, 3000]]))
    assert scaled[0].tolist() == [0, 0, 0.5, 1, 1]
    assert scaled.meta["units"] == "hounsfield"
    assert (scaled.meta["intensity_scale"], scaled.meta["intensity_offset"]) == ([100], [-20])


def test_the_lower_end_of_the_window_may_be_a_dark_grey_and_is_padded_with_and_restored():
    image = MetaTensor(torch.tensor([-1000.0, -20, 80]).reshape(1, 3, 1, 1), affine=torch.eye(4))
    scaled = ScaleIntensityByWindowd("image", (-20, 80), darkest=0.1)({"image": image})
    torch.testing.assert_close(scaled["image"].flatten().as_tensor(), torch.tensor([0.1, 0.1, 1]))
    torch.testing.assert_close(
        RestoreIntensityd("image")(scaled)["image"].flatten().as_tensor(), torch.tensor([-20.0, -20, 80])
    )
    fitted = FitSlicesd("image", (5, 3), pixdim=1.0, darkest=0.1)(scaled)["image"]
    torch.testing.assert_close(fitted.amin().item(), 0.1)


PICTURE, BYTES = {"has_geometry": False}, {"datatype": np.array(2)}  # what reading says of a picture, and of uint8 in NIfTI


@pytest.mark.parametrize(("units", "meta"), [("grey", {}), ("auto", PICTURE), ("auto", BYTES)])
def test_grey_levels_are_divided_by_255(units, meta):
    image = MetaTensor(torch.tensor([[0.0, 51, 255], [255, 0, 0]]), meta=meta)
    scaled = ScaleIntensityByWindow((-20, 80), units)(image)
    torch.testing.assert_close(scaled.as_tensor(), torch.tensor([[0, 0.2, 1], [1, 0, 0]]))
    assert scaled.meta["units"] == "grey"
    assert (scaled.meta["intensity_scale"], scaled.meta["intensity_offset"]) == ([255, 255], [0, 0])


def test_units_that_are_said_are_not_guessed():
    assert ScaleIntensityByWindow((0, 80), "hounsfield")(torch.tensor([[0.0, 40]])).tolist() == [[0, 0.5]]
    assert ScaleIntensityByWindow((0, 80), "grey")(torch.tensor([[-3.0, 255]])).tolist() == [[0, 1]]


@pytest.mark.parametrize("units", ["grey", "auto"])
def test_grey_levels_above_255_are_refused_with_the_files_name_and_the_mend(units):
    image = MetaTensor(torch.tensor([[0.0, 256]]), meta={"filename_or_obj": "case7.nii.gz", **PICTURE})
    with pytest.raises(ValueError, match="case7.nii.gz: grey levels up to 256.*--units hounsfield"):
        ScaleIntensityByWindowd("image", (0, 80), units)({"image": image})


CT_SERIES = {"0008|0060": "CT", "0028|0100": "16"}


@pytest.mark.parametrize(
    ("values", "meta"),
    [
        ((0.0, 35, 80), {}),  # clipped to a window of the brain
        ((0.0, 35, 80), CT_SERIES),
        ((0.0, 35, 255), CT_SERIES),
        ((0.0, 35, 3000), CT_SERIES),
        ((-1.0, 35, 255), BYTES),
    ],
)
def test_a_volume_that_was_clipped_is_in_hounsfield_units(values, meta):
    scaled = ScaleIntensityByWindow((0, 80))(MetaTensor(torch.tensor([values]), meta=meta))
    assert scaled.meta["units"] == "hounsfield" and scaled[0, 1].item() == pytest.approx(35 / 80)


@pytest.mark.parametrize(
    ("high", "meta"),
    [
        (255, {}),  # of pictures, or clipped there
        (80, BYTES),  # a dark picture, or CT clipped to a window and saved with 8 bits
        (80, {**CT_SERIES, "0028|0100": "8"}),
        (1, {}),  # scaled to 0 ... 1
        (3000, {}),  # without the offset of 1024, or clipped at 0
        (3000, {"0008|0060": "OT", "0028|0100": "16"}),
    ],
)
def test_units_that_cannot_be_told_are_refused_with_both_settings(high, meta):
    image = MetaTensor(torch.tensor([[0.0, high]]), meta={"filename_or_obj": "case7.nii.gz", **meta})
    with pytest.raises(ValueError, match=f"case7.nii.gz: values from 0 to {high}, .*--units hounsfield.*--units grey"):
        ScaleIntensityByWindow((0, 80))(image)


@pytest.mark.parametrize("bad", [{"units": "hu"}, {"window": (80, 0)}, {"window": (1, 1)}, {"window": (0, 1, 2)}])
def test_a_window_or_units_without_sense_are_refused(bad):
    with pytest.raises(ValueError, match="must be"):
        ScaleIntensityByWindow(**{"window": (0, 80), **bad})


def test_the_window_leaves_its_input_and_its_meta_data_alone():
    image = MetaTensor(ct(1, 4, 4, 4), affine=torch.as_tensor(AFFINE), meta={"filename_or_obj": "a"})
    before = image.clone()
    scaled = ScaleIntensityByWindow((0, 80))(image)
    assert torch.equal(image, before) and "units" not in image.meta
    assert torch.equal(scaled.affine, image.affine) and scaled.meta["filename_or_obj"] == "a"


@pytest.mark.parametrize("make", [ct, grey_levels])
def test_restoring_undoes_the_window_even_after_a_batch(make):
    image = make(2, 8, 8, 4)
    transform = ScaleIntensityByWindowd("image", (-1000, 1000), "hounsfield" if make is ct else "grey")
    batch = next(iter(DataLoader(Dataset([{"image": image}] * 2, transform), batch_size=2)))
    for item in decollate_batch(batch):
        item["healthy"] = item["image"].as_tensor()
        torch.testing.assert_close(RestoreIntensityd("healthy")(item)["healthy"], image, rtol=0, atol=1e-3)


def fit(path, spatial_size=(64, 64), pixdim=1.0):
    """Preprocessing, its result for one file after a batch, and the same inverted as a prediction would be."""
    preprocessing = Compose(
        [
            LoadSequencesd("image", ["CT"], min_ndim=2, as_volume=True),
            Orientationd("image", axcodes="LPS", labels=None),
            ScaleIntensityByWindowd("image", (0, 100)),
            FitSlicesd("image", spatial_size, pixdim),
        ]
    )
    (data,) = decollate_batch(next(iter(DataLoader(Dataset([{"image": str(path)}], preprocessing), batch_size=1))))
    fitted = data["image"]
    data["map"] = MetaTensor(fitted.as_tensor())
    data["healthy"] = MetaTensor(torch.cat([fitted.as_tensor()] * 2))
    invert = Invertd(["map", "healthy"], preprocessing, orig_keys="image", nearest_interp=False)
    return fitted, RestoreIntensityd(["map"])(invert(data))


def check_grid(data, scan):
    for key, channels in (("map", 1), ("healthy", 2)):
        assert data[key].shape == (channels, *scan.shape[1:]) and not data[key].applied_operations
        np.testing.assert_allclose(data[key].affine, scan.affine, atol=1e-6)
    torch.testing.assert_close(data["healthy"][0].as_tensor() * data["healthy"].meta["intensity_scale"][0], data["map"][0])


TURNS = {
    "RAS": np.diag([0.5, 0.5, 5, 1]),
    "LPI": np.diag([-0.5, -0.5, -5, 1]),
    "PIR": np.array([[0, 0, 0.5, 7], [-0.5, 0, 0, 3], [0, -5, 0, 1], [0, 0, 0, 1]]),
    "oblique": np.array([[0.4, 0.3, 0, 7], [-0.3, 0.4, 0, 3], [0, 0, 5, 1], [0, 0, 0, 1]]),
    "tilted gantry": np.array([[0.5, 0, 0, 7], [0, 0.5, 1.5, 3], [0, 0, 5, 1], [0, 0, 0, 1]]),
}


@pytest.mark.parametrize("affine", TURNS.values(), ids=TURNS.keys())
def test_a_ct_is_brought_to_the_pixel_size_and_results_come_back_to_their_place(tmp_path, affine):
    long_axis = int(abs(affine[:3, :3]).max(axis=0).argmax())
    shape = np.insert([96, 80], long_axis, 7)
    voxels = np.full(shape, -1000, np.float32)
    place = np.insert([50, 30], long_axis, 2)
    first, last = place - np.insert([4, 4], long_axis, 0), place + np.insert([5, 5], long_axis, 1)
    voxels[tuple(map(slice, first, last))] = 100
    scan = load(save(tmp_path / "a.nii.gz", voxels, affine))
    fitted, data = fit(tmp_path / "a.nii.gz")
    assert fitted.shape == (1, 64, 64, 7) and fitted.meta["units"] == "hounsfield"
    np.testing.assert_allclose(np.linalg.norm(fitted.affine[:3, :3], axis=0)[:2], 1)
    check_grid(data, scan)
    found = data["map"][0].numpy()
    centre = (np.indices(shape) * found).reshape(3, -1).sum(axis=1) / found.sum()
    np.testing.assert_allclose(centre, place, atol=0.3)
    assert found[tuple(place)] > 50


def test_a_ct_larger_than_the_network_sees_comes_back_with_zeros_around(tmp_path):
    scan = load(save(tmp_path / "a.nii.gz", ct(100, 90, 3).numpy(), np.diag([1.0, 1, 5, 1])))
    fitted, data = fit(tmp_path / "a.nii.gz")
    check_grid(data, scan)
    seen = data["map"][0].as_tensor()
    assert not seen[:18].any() and not seen[82:].any() and not seen[:, :13].any() and not seen[:, 77:].any()
    torch.testing.assert_close(seen[18:82, 13:77], scan[0, 18:82, 13:77].as_tensor().clamp(0, 100), rtol=0, atol=1e-3)
    assert fitted.shape == (1, 64, 64, 3)


def test_the_noise_of_a_fine_grid_does_not_stay_in_full(tmp_path):
    save(tmp_path / "a.nii.gz", noise(256, 256, 2) * 100 - 1e-3, np.diag([0.25, 0.25, 5, 1]))
    save(tmp_path / "b.nii.gz", (noise(256, 256, 2) * 255).round().astype(np.uint8))
    for name in "ab":
        assert fit(tmp_path / f"{name}.nii.gz")[0][:, 4:-4, 4:-4].std() < 0.5 * noise(256, 256).std()


@pytest.mark.parametrize("affine", [np.eye(4), TURNS["LPI"], TURNS["PIR"]], ids=["RAS", "LPI", "PIR"])
def test_stacked_pictures_of_the_networks_size_are_kept_bit_for_bit(tmp_path, affine):
    long_axis = 1 if affine[2, 1] else 2
    shape = np.insert([64, 64], long_axis, 3)
    scan = load(save(tmp_path / "a.nii.gz", grey_levels(*shape).numpy().astype(np.uint8), affine))
    fitted, data = fit(tmp_path / "a.nii.gz")
    assert fitted.shape == (1, 64, 64, 3) and nib.aff2axcodes(fitted.affine.numpy()) == ("L", "P", "S")
    check_grid(data, scan)
    assert torch.equal(data["map"].as_tensor(), scan.as_tensor() / 255 * 255)


def test_a_picture_of_another_size_is_stretched_and_comes_back_in_its_own(tmp_path):
    grey = np.zeros((100, 80), np.uint8)
    grey[56:65, 16:25] = 255
    Image.fromarray(grey).save(tmp_path / "a.png")
    fitted, data = fit(tmp_path / "a.png")
    assert fitted.shape == (1, 64, 64, 1) and fitted.meta["units"] == "grey"
    check_grid(data, load(tmp_path / "a.png", min_ndim=2, as_volume=True))
    found = data["map"][0, ..., 0].numpy()
    np.testing.assert_allclose(
        (np.indices(found.shape) * found).reshape(2, -1).sum(axis=1) / found.sum(), [20, 60], atol=0.3
    )
    assert found[20, 60] > 200 and not found[:10].any() and not found[:, :50].any()


def test_fitting_leaves_its_input_and_its_trace_alone():
    for units in ("hounsfield", "grey"):
        for size in (8, 12):
            image = MetaTensor(torch.rand(1, size, size, 2), affine=torch.eye(4), meta={"units": units})
            before = image.clone()
            FitSlicesd("image", (8, 8), 1.0)({"image": image})
            assert torch.equal(image, before) and not image.applied_operations


def test_a_missing_image_may_be_left_out_of_fitting():
    assert FitSlicesd("image", (8, 8), 1.0, allow_missing_keys=True)({"a": 1}) == {"a": 1}


# --- has_foreground


def test_foreground_is_counted_over_all_channels():
    image = torch.zeros(3, 2, 10, 10)
    image[1, 0, :2], image[2, 1, 0, :4] = 1, 1
    assert has_foreground(image, level=0.1, share=0.05).tolist() == [False, True, False]


# --- SplitPredictiond


def test_a_prediction_is_cut_in_order_and_keeps_its_meta_data():
    pred = MetaTensor(torch.arange(5.0).reshape(5, 1, 1, 1).expand(5, 2, 3, 4), affine=torch.as_tensor(AFFINE))
    parts = SplitPredictiond("pred", {"map": 1, "healthy": 3, "probability": 1})({"pred": pred})
    assert [parts[key].unique().tolist() for key in ("map", "healthy", "probability")] == [[0], [1, 2, 3], [4]]
    assert torch.equal(parts["healthy"].affine, pred.affine) and parts["probability"].shape == (1, 2, 3, 4)


def test_numbers_that_do_not_add_up_are_refused():
    with pytest.raises(ValueError, match="pred has 5 channels"):
        SplitPredictiond("pred", {"map": 1, "healthy": 3})({"pred": torch.zeros(5, 2, 2)})


# --- MapToMask


def test_otsu_finds_the_lesion_and_tells_its_threshold():
    result = MapToMaskd("map", "pred")({"map": anomaly_map()})
    mask = result["pred"]
    assert mask.dtype == torch.uint8 and mask.shape == (1, 12, 12, 12)
    assert mask[:, 4:7, 4:7, 4:7].all() and mask.sum() < 1.3 * 27
    positive = result["map"][result["map"] > 0].numpy()
    assert mask.meta["threshold"] == pytest.approx(threshold_otsu(positive))
    assert torch.equal(mask.affine, result["map"].affine) and "threshold" not in result["map"].meta


def test_the_floor_keeps_a_case_without_a_lesion_empty():
    healthy = 0.1 * torch.from_numpy(noise(1, 8, 8, 8))
    assert MapToMask()(healthy).any()
    floored = MapToMask(minimum=0.2)(healthy)
    assert not floored.any() and floored.meta["threshold"] == 0.2


@pytest.mark.parametrize("threshold", [0.3, "0.3"])
def test_a_number_is_the_threshold(threshold):
    mask = MapToMask(threshold, minimum=0.9)(anomaly_map())
    assert torch.equal(mask.as_tensor(), (anomaly_map().as_tensor() > 0.3).byte()) and mask.meta["threshold"] == 0.3


def test_a_map_of_zeros_gives_an_empty_mask():
    assert not MapToMask()(torch.zeros(1, 4, 4, 4)).any()


def test_an_unknown_threshold_is_refused():
    with pytest.raises(ValueError):
        MapToMask("otzu")


def test_a_share_of_the_peak_finds_a_faint_lesion_and_drops_what_is_weak_beside_it():
    anomaly = torch.zeros(1, 8, 8, 8)
    anomaly[:, 1:3, 1:3, 1:3] = 0.04
    anomaly[:, 3, 1:3, 1:3] = 0.012  # the lesion's rim
    anomaly[:, 5:7, 5:7, 5:7] = 0.015  # above the lower share, but nowhere above the higher one
    mask = MapToMask("peak", peak_shares=(0.25, 0.5))(anomaly)
    assert mask[0, 1:4, 1:3, 1:3].all() and mask.sum() == 12 and mask.dtype == torch.uint8
    assert mask.meta["threshold"] == pytest.approx(0.01)
    assert not MapToMask("peak", minimum=0.05)(anomaly).any() and not MapToMask("peak")(0 * anomaly).any()


@pytest.mark.parametrize("shares", [(0.5, 0.25), (0.0, 0.5), (0.5, 1.5), (0.5,)])
def test_shares_that_are_none_are_refused(shares):
    with pytest.raises(ValueError, match="peak_shares"):
        MapToMask("peak", peak_shares=shares)
