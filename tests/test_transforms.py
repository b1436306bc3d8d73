from __future__ import annotations

import gzip
import os
from pathlib import Path

import itk
import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor, decollate_batch
from monai.transforms import Compose, Invertd, Orientationd
from PIL import Image
from skimage.filters import threshold_otsu

from scripts.data.reading import LoadSequencesd
from scripts.data.slices import ExtractSlicesd
from scripts.tasks.anomaly.transforms import RandSprited, RandStandInd, RemoveSmallLesions, RemoveSmallLesionsd, cohort_otsu
from scripts.tasks.generation.transforms import SeededNoised, seeded_noise
from scripts.transforms import (
    FitSlicesd,
    MapToMask,
    MapToMaskd,
    RestoreIntensityd,
    ScaleIntensityByForeground,
    ScaleIntensityByForegroundd,
    ScaleIntensityByWindow,
    ScaleIntensityByWindowd,
    Spacingd,
    SplitPredictiond,
    has_foreground,
)

AFFINE = np.array([[0.0, -2, 0, 90], [1.5, 0, 0, -20], [0, 0, -3, 7], [0, 0, 0, 1]])  # neither RAS nor isotropic


def noise(*shape, seed=0):
    return np.random.RandomState(seed).rand(*shape).astype(np.float32)


def save(path, voxels, affine=AFFINE):
    nib.save(nib.Nifti1Image(voxels, affine), path)
    return str(path)


def load(paths, sequences=("CT",), **kwargs):
    return LoadSequencesd("image", sequences, **kwargs)({"image": paths})["image"]


# --- LoadSequencesd


def test_a_volume_arrives_with_its_voxels_its_affine_and_its_path(tmp_path):
    voxels = noise(4, 5, 6)
    path = save(tmp_path / "a.nii.gz", voxels)
    image = load(path)
    assert image.dtype == torch.float32 and image.shape == (1, 4, 5, 6)
    np.testing.assert_array_equal(image[0].numpy(), voxels)
    np.testing.assert_allclose(image.affine, AFFINE)
    assert image.meta["filename_or_obj"] == path


def test_an_empty_mask_is_read_where_it_is_allowed(tmp_path):
    path = save(tmp_path / "a.nii.gz", np.zeros((4, 5, 6), np.uint8))
    assert load(path, allow_empty=True).sum() == 0
    with pytest.raises(ValueError, match="empty, all voxels"):
        load(path)


def test_a_4d_file_and_a_list_of_files_give_the_same_image(tmp_path):
    voxels = noise(4, 5, 6, 2)
    whole = load(save(tmp_path / "ab.nii.gz", voxels), ("A", "B"))
    parts = load([save(tmp_path / f"{i}.nii.gz", voxels[..., i]) for i in range(2)], ("A", "B"))
    assert whole.shape == (2, 4, 5, 6)
    assert torch.equal(whole.as_tensor(), parts.as_tensor()) and torch.equal(whole.affine, parts.affine)
    assert parts.meta["filename_or_obj"].endswith("0.nii.gz")


def test_the_stand_in_takes_the_place_of_missing_sequences(tmp_path):
    t1, flair = (save(tmp_path / f"{i}.nii.gz", noise(4, 5, 6, seed=i)) for i in range(2))
    image = load([None, t1, flair], ("T2", "T1", "FLAIR"), stand_in="FLAIR")
    assert torch.equal(image[0].as_tensor(), image[2].as_tensor()) and not torch.equal(image[0], image[1])
    assert image.meta["filename_or_obj"] == t1


def test_a_lone_single_channel_file_stands_for_all_sequences(tmp_path):
    image = load(save(tmp_path / "a.nii.gz", noise(4, 5, 6)), ("T1", "FLAIR"), stand_in="FLAIR")
    assert image.shape == (2, 4, 5, 6) and torch.equal(image[0], image[1])


def test_a_volume_of_one_slice_is_a_volume(tmp_path):
    assert load(save(tmp_path / "a.nii.gz", noise(4, 5, 1))).shape == (1, 4, 5, 1)


MODES = [("RGB", "jpg"), ("RGBA", "png"), ("L", "png"), ("P", "png"), ("RGB", "tif"), ("RGB", "bmp")]


@pytest.mark.parametrize(("mode", "suffix"), MODES)
def test_a_picture_becomes_grey_and_keeps_its_8_bits(tmp_path, mode, suffix):
    grey = np.linspace(0, 255, 320).round().astype(np.uint8).reshape(20, 16)
    Image.fromarray(grey).convert(mode).save(tmp_path / f"a.{suffix}")
    image = load(tmp_path / f"a.{suffix}", ("X-ray",), min_ndim=2)
    assert image.shape == (1, 16, 20) and image.dtype == torch.float32
    np.testing.assert_allclose(image[0].T.numpy(), grey, atol=6)  # JPEG loses a little


def test_a_16_bit_picture_keeps_its_range(tmp_path):
    grey = (noise(8, 8) * 60000).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "a.png")
    np.testing.assert_array_equal(load(tmp_path / "a.png", ("X-ray",), min_ndim=2)[0].T.numpy(), grey)


def test_pictures_of_all_modes_fit_in_one_batch(tmp_path):
    for mode in ("RGB", "L"):
        Image.fromarray((noise(8, 8) * 255).astype(np.uint8)).convert(mode).save(tmp_path / f"{mode}.png")
    data = [{"image": str(tmp_path / f"{mode}.png")} for mode in ("RGB", "L")]
    batch = next(iter(DataLoader(Dataset(data, LoadSequencesd("image", ["X-ray"], min_ndim=2)), batch_size=2)))
    assert batch["image"].shape == (2, 1, 8, 8)


def save_dicom(folder, num_slices):
    writer_io = itk.GDCMImageIO.New()
    writer_io.KeepOriginalUIDOn()
    for k in range(num_slices):
        slice_k = itk.image_from_array((np.arange(20) + 100 * k).astype(np.int16).reshape(1, 5, 4))
        slice_k.SetSpacing([1.0, 2.0, 3.0])
        slice_k.SetOrigin([0.0, 0.0, 3.0 * k])
        tags = slice_k.GetMetaDataDictionary()
        tags["0008|0060"], tags["0020|000d"], tags["0020|000e"] = "CT", "1.2.3", "1.2.4"
        tags["0008|0018"], tags["0020|0013"], tags["0020|0032"] = f"1.2.5.{k}", str(k), f"0\\0\\{3 * k}"
        writer = itk.ImageFileWriter[type(slice_k)].New(Input=slice_k, FileName=str(folder / f"{k}.dcm"), ImageIO=writer_io)
        writer.UseInputMetaDataDictionaryOn()
        writer.Update()
    return folder


def test_a_dicom_folder_is_read_as_a_volume(tmp_path):
    image = load(save_dicom(tmp_path, 3))
    assert image.shape == (1, 4, 5, 3) and image[0, 1, 0].tolist() == [1, 101, 201]
    np.testing.assert_allclose(image.affine, np.diag([-1, -2, 3, 1]))


def marked_picture(path):
    """A grey picture 16 wide and 20 high, bright at x = 3, y = 5."""
    grey = np.full((20, 16), 50, np.uint8)
    grey[5, 3] = 200
    Image.fromarray(grey).save(path)
    return path


def marked_nifti(path, *shape):
    voxels = np.zeros(shape, np.float32)
    voxels[3, 5] = 1
    return save(path, voxels)


TWO_DIMENSIONAL = {
    "png": lambda f: marked_picture(f / "a.png"),
    "tiff": lambda f: marked_picture(f / "a.TIFF"),
    "bmp": lambda f: marked_picture(f / "a.bmp"),
    "nifti": lambda f: marked_nifti(f / "a.nii.gz", 16, 20),
    "nifti of one slice": lambda f: marked_nifti(f / "a.nii.gz", 16, 20, 1),
    "dicom": lambda f: save_dicom(f, 1) / "0.dcm",
}


@pytest.mark.parametrize("make", TWO_DIMENSIONAL.values(), ids=TWO_DIMENSIONAL.keys())
def test_a_2d_image_becomes_a_volume_of_one_slice(tmp_path, make):
    path = make(tmp_path)
    image, flat = load(path, min_ndim=2, as_volume=True), load(path, min_ndim=2)
    assert image.shape == (*flat.shape[:3], 1) and image.affine.shape == (4, 4)
    assert torch.equal(image.as_tensor().flatten(), flat.as_tensor().flatten())
    assert list(image.meta["spatial_shape"]) == list(image.shape[1:])
    np.testing.assert_array_equal(image.meta["original_affine"], image.affine)


def test_a_volume_stays_what_it_is_beside_2d_images(tmp_path):
    path = save(tmp_path / "a.nii.gz", noise(4, 5, 6))
    image = load(path, min_ndim=2, as_volume=True)
    assert torch.equal(image.as_tensor(), load(path).as_tensor()) and torch.equal(image.affine, load(path).affine)


@pytest.mark.parametrize("suffix", ["png", "jpeg", "tif", "bmp"])
@pytest.mark.parametrize("as_volume", [False, True])
def test_a_picture_is_in_radiological_view(tmp_path, suffix, as_volume):
    image = load(marked_picture(tmp_path / f"a.{suffix}"), min_ndim=2, as_volume=as_volume)
    np.testing.assert_array_equal(image.affine, np.diag([-1, -1, 1, 1]))
    assert nib.aff2axcodes(image.affine.numpy()) == ("L", "P", "S")
    assert np.unravel_index(image.argmax(), image.shape)[1:3] == (3, 5)


def test_a_picture_in_radiological_view_is_lps_already(tmp_path):
    image = load(marked_picture(tmp_path / "a.png"), min_ndim=2, as_volume=True)
    turned = Orientationd("image", axcodes="LPS", labels=None)({"image": image})["image"]
    assert torch.equal(turned.as_tensor(), image.as_tensor()) and torch.equal(turned.affine, image.affine)


def test_a_tiff_with_several_pages_is_refused(tmp_path):
    first, second = (Image.fromarray((noise(8, 8, seed=i) * 255).astype(np.uint8)) for i in range(2))
    first.save(tmp_path / "a.tif", save_all=True, append_images=[second])
    with pytest.raises(ValueError, match="a.tif: unreadable.*NIfTI"):
        load(tmp_path / "a.tif", min_ndim=2)


def cut(path):
    """The file without its end."""
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[: len(content) * 2 // 3])
    return path


def text(path):
    path.write_text("not an image")
    return path


def picture(path):
    Image.fromarray(np.eye(8, dtype=np.uint8)).save(path)
    return path


def with_voxel(value):
    voxels = noise(8, 8, 8)
    voxels[0, 0, 0] = value
    return voxels


def pair(folder, voxels, affine=AFFINE):
    return [save(folder / "a.nii.gz", noise(8, 8, 8)), save(folder / "b.nii.gz", voxels, affine)]


def promise(path, *shape, content=b"", **fields):
    """A file with the header of a uint8 volume of this shape, and something else after it."""
    header = nib.Nifti1Header()
    header.set_data_dtype(np.uint8)
    header["dim"][: len(shape) + 1] = len(shape), *shape
    for name, value in {"magic": b"n+1", "vox_offset": 352, **fields}.items():
        header[name] = value
    data = header.binaryblock + bytes(4) + content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def rubbish():
    return np.random.default_rng(0).bytes(10**6)


BAD_INPUTS = {
    "missing file": ("none.nii.gz: no such file", lambda f: f / "none.nii.gz"),
    "folder without images": ("without DICOM", lambda f: f),
    "cut gzip": ("unreadable", lambda f: cut(save(f / "a.nii.gz", noise(8, 8, 8)))),
    "cut file": ("unreadable", lambda f: cut(save(f / "a.nii", noise(8, 8, 8)))),
    "cut picture": ("unreadable", lambda f: cut(picture(f / "a.png"))),
    "text as NIfTI": ("unreadable", lambda f: text(f / "a.nii.gz")),
    "text": ("unreadable", lambda f: text(f / "a.txt")),
    "picture": ("a.png: 2-D image", lambda f: picture(f / "a.png")),
    "2-D NIfTI": ("2-D image", lambda f: save(f / "a.nii.gz", noise(8, 8))),
    "5-D NIfTI": ("4-D image", lambda f: save(f / "a.nii.gz", noise(4, 4, 4, 1, 2))),
    "NaN": ("NaN or infinite", lambda f: save(f / "a.nii.gz", with_voxel(np.nan))),
    "huge": ("infinite voxels, or above", lambda f: save(f / "a.nii.gz", with_voxel(-2e38))),
    "infinite": ("NaN or infinite", lambda f: save(f / "a.nii.gz", with_voxel(np.inf))),
    "empty": ("all voxels of sequence 1 are 1", lambda f: save(f / "a.nii.gz", np.ones((8, 8, 8), np.float32))),
    "one for two": (r"is 1, this bundle wants 2 \(T1, FLAIR\)", lambda f: save(f / "a.nii.gz", noise(8, 8, 8))),
    "three for two": ("is 3, this bundle wants 2", lambda f: save(f / "a.nii.gz", noise(8, 8, 8, 3))),
    "more voxels than bytes": ("damaged: its header promises 99", lambda f: promise(f / "a.nii", 99, 99, 99)),
    "more than gzip packs": ("damaged: its header promises 3", lambda f: promise(f / "a.nii.gz", *[30000] * 3)),
    "more than memory": ("1000000000 voxels, more than", lambda f: promise(f / "a.nii.gz", *[1000] * 3, content=rubbish())),
    "no slice": ("0-D image", lambda f: promise(f / "a.nii.gz", 8, 8, 0)),
    "flat affine": ("affine.*no place", lambda f: promise(f / "a.nii", 8, 8, 8, content=rubbish(), sform_code=1)),
    "NaN affine": (
        "affine.*no place",
        lambda f: promise(f / "a.nii", 8, 8, 8, content=rubbish(), sform_code=1, srow_x=np.nan),
    ),
    "metres": ("16 m long", lambda f: save(f / "a.nii.gz", noise(8, 8, 8), np.diag([2000.0, 2, 5, 1]))),
    "list of three": ("list has 3 files", lambda f: [*pair(f, noise(8, 8, 8)), None]),
    "sequence missing": ("no file for FLAIR", lambda f: [save(f / "a.nii.gz", noise(8, 8, 8)), None]),
    "4-D in a list": ("b.nii.gz: 2 sequences where FLAIR", lambda f: pair(f, noise(8, 8, 8, 2))),
    "other shape": ("b.nii.gz: shape.*a.nii.gz", lambda f: pair(f, noise(8, 8, 7))),
    "other affine": ("b.nii.gz:.*affine differs", lambda f: pair(f, noise(8, 8, 8), AFFINE + 0.1)),
}


@pytest.mark.parametrize(("words", "make"), BAD_INPUTS.values(), ids=BAD_INPUTS.keys())
def test_bad_input_is_told_in_one_line_with_the_files_name(tmp_path, words, make):
    with pytest.raises(ValueError, match=words) as error:
        load(make(tmp_path), ("T1", "FLAIR"))
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(str(tmp_path))


def test_a_stand_in_that_is_missing_itself_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no file for FLAIR.*at least FLAIR"):
        load([save(tmp_path / "a.nii.gz", noise(8, 8, 8)), None], ("T1", "FLAIR"), stand_in="FLAIR")


def test_a_file_without_read_permission_is_told_so(tmp_path, monkeypatch):
    path = save(tmp_path / "a.nii.gz", noise(4, 5, 6))
    monkeypatch.setattr(os, "access", lambda *args: False)
    with pytest.raises(ValueError, match="a.nii.gz: no permission"):
        load(path)


def test_a_reader_that_may_not_read_is_told_so(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError

    path = save(tmp_path / "a.nii.gz", noise(4, 5, 6))
    monkeypatch.setattr(nib, "load", refuse)
    with pytest.raises(ValueError, match="a.nii.gz: no permission"):
        load(path)


def test_an_affine_that_differs_by_rounding_is_the_same_grid(tmp_path):
    paths = [save(tmp_path / f"{i}.nii.gz", noise(4, 5, 6), AFFINE + i * 1e-3) for i in range(2)]
    assert load(paths, ("A", "B")).shape == (2, 4, 5, 6)


def test_a_stand_in_that_is_no_sequence_is_refused():
    with pytest.raises(ValueError, match="stand_in"):
        LoadSequencesd("image", ["T1"], stand_in="FLAIR")


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


@pytest.mark.parametrize("units", ["grey", "auto"])
def test_grey_levels_are_divided_by_255(units):
    scaled = ScaleIntensityByWindow((-20, 80), units)(torch.tensor([[0.0, 51, 255], [255, 0, 0]]))
    torch.testing.assert_close(scaled.as_tensor(), torch.tensor([[0, 0.2, 1], [1, 0, 0]]))
    assert scaled.meta["units"] == "grey"
    assert (scaled.meta["intensity_scale"], scaled.meta["intensity_offset"]) == ([255, 255], [0, 0])


def test_units_that_are_said_are_not_guessed():
    assert ScaleIntensityByWindow((0, 80), "hounsfield")(torch.tensor([[0.0, 40]])).tolist() == [[0, 0.5]]
    assert ScaleIntensityByWindow((0, 80), "grey")(torch.tensor([[-3.0, 255]])).tolist() == [[0, 1]]


@pytest.mark.parametrize("units", ["grey", "auto"])
def test_grey_levels_above_255_are_refused_with_the_files_name_and_the_mend(units):
    image = MetaTensor(torch.tensor([[0.0, 256]]), meta={"filename_or_obj": "case7.nii.gz"})
    with pytest.raises(ValueError, match="case7.nii.gz: grey levels up to 256.*--units hounsfield"):
        ScaleIntensityByWindowd("image", (0, 80), units)({"image": image})


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
    transform = ScaleIntensityByWindowd("image", (-1000, 1000))
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
    save(tmp_path / "b.nii.gz", (noise(256, 256, 2) * 255).round())
    for name in "ab":
        assert fit(tmp_path / f"{name}.nii.gz")[0][:, 4:-4, 4:-4].std() < 0.5 * noise(256, 256).std()


@pytest.mark.parametrize("affine", [np.eye(4), TURNS["LPI"], TURNS["PIR"]], ids=["RAS", "LPI", "PIR"])
def test_stacked_pictures_of_the_networks_size_are_kept_bit_for_bit(tmp_path, affine):
    long_axis = 1 if affine[2, 1] else 2
    shape = np.insert([64, 64], long_axis, 3)
    scan = load(save(tmp_path / "a.nii.gz", grey_levels(*shape).numpy(), affine))
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


# --- has_foreground, ExtractSlicesd


def volume(num_slices=6):
    """Slices 1 and up show a body; 2 has a large lesion, 3 a small one."""
    image = torch.zeros(2, 16, 16, num_slices)
    image[1, 2:14, 2:14, 1:] = 0.5
    mask = torch.zeros(1, 16, 16, num_slices)
    mask[:, 4:9, 4:9, 2] = 1
    mask[:, 4:6, 4:6, 3] = 1
    return {"image": MetaTensor(image, meta={"filename_or_obj": "case7.nii.gz"}), "label": mask, "case": "case7"}


def test_foreground_is_counted_over_all_channels():
    image = torch.zeros(3, 2, 10, 10)
    image[1, 0, :2], image[2, 1, 0, :4] = 1, 1
    assert has_foreground(image, level=0.1, share=0.05).tolist() == [False, True, False]


def test_slices_get_their_class_from_the_mask_and_ambiguous_ones_are_left_out():
    slices = ExtractSlicesd()(volume())
    assert [(s["slice"], s["class_label"]) for s in slices] == [(1, 0), (2, 1), (4, 0), (5, 0)]
    assert [s["position"] for s in slices] == [0.2, 0.4, 0.8, 1.0]
    assert all(s["case"] == "case7" and "label" not in s for s in slices)


def test_a_slice_is_a_plain_tensor_of_its_own():
    data = volume()
    item = ExtractSlicesd()(data)[0]
    assert type(item["image"]) is torch.Tensor and item["image"].dtype == torch.float32
    assert torch.equal(item["image"], data["image"].as_tensor()[..., 1])
    assert item["image"].untyped_storage().nbytes() == 2 * 16 * 16 * 4


@pytest.mark.parametrize("spatial_dim", [0, 1, 2])
def test_cutting_along_any_axis_gives_the_same_slices(spatial_dim):
    data = volume()
    turned = {**data, **{k: data[k].as_subclass(torch.Tensor).movedim(3, spatial_dim + 1) for k in ("image", "label")}}
    expected, slices = ExtractSlicesd()(data), ExtractSlicesd(spatial_dim=spatial_dim)(turned)
    assert [s["slice"] for s in slices] == [s["slice"] for s in expected]
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(slices, expected, strict=True))


def test_slices_get_their_class_from_a_list():
    data = {**volume(), "slice_labels": [0, 1, 1, 0, 0, 1]}
    del data["label"]
    slices = ExtractSlicesd()(data)
    assert [s["class_label"] for s in slices] == [1, 1, 0, 0, 1] and "slice_labels" not in slices[0]


def test_a_list_of_the_wrong_length_is_refused_with_the_cases_name():
    data = {"image": volume()["image"], "slice_labels": [0, 1]}
    with pytest.raises(ValueError, match="case7.*2 slice labels for 6 slices"):
        ExtractSlicesd()(data)


def test_a_picture_gives_one_slice_with_its_own_class():
    (item,) = ExtractSlicesd()({"image": torch.zeros(1, 8, 8), "class_label": 1, "case": "a"})
    assert (item["class_label"], item["slice"], item["position"], item["case"]) == (1, 0, 0.0, "a")


def test_a_volume_of_one_slice_lies_at_position_0():
    (item,) = ExtractSlicesd()({"image": torch.ones(1, 8, 8, 1), "slice_labels": [1]})
    assert item["position"] == 0.0


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 8, 8, 2)])
def test_images_without_labels_are_refused_with_the_cases_name(shape):
    with pytest.raises(ValueError, match="case9.*add"):
        ExtractSlicesd()({"image": torch.ones(shape), "case": "case9"})


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 8, 8, 1), (1, 8, 8, 3)])
def test_without_labels_every_slice_is_healthy(shape):
    slices = ExtractSlicesd(labelled=False)({"image": torch.ones(shape), "case": "a"})
    assert [(s["class_label"], s["slice"], s["image"].shape) for s in slices] == [
        (0, i, (1, 8, 8)) for i in range(shape[3] if len(shape) > 3 else 1)
    ]


def test_labels_that_are_not_asked_for_are_ignored_and_empty_slices_still_left_out():
    assert [(s["slice"], s["class_label"]) for s in ExtractSlicesd(labelled=False)(volume())] == [
        (i, 0) for i in range(1, 6)
    ]
    (item,) = ExtractSlicesd(labelled=False)({"image": torch.ones(1, 8, 8), "class_label": 1})
    assert item["class_label"] == 0


def test_a_least_foreground_of_zero_keeps_every_slice():
    slices = ExtractSlicesd(labelled=False, min_foreground=0)(volume())
    assert [s["slice"] for s in slices] == list(range(6))


def test_transforms_after_the_cut_see_every_slice():
    slices = Compose([ExtractSlicesd(), ScaleIntensityByForegroundd("image")])(volume())
    assert len(slices) == 4 and all(s["image"].shape == (2, 16, 16) for s in slices)


# --- SplitPredictiond


def test_a_prediction_is_cut_in_order_and_keeps_its_meta_data():
    pred = MetaTensor(torch.arange(5.0).reshape(5, 1, 1, 1).expand(5, 2, 3, 4), affine=torch.as_tensor(AFFINE))
    parts = SplitPredictiond("pred", {"map": 1, "healthy": 3, "probability": 1})({"pred": pred})
    assert [parts[key].unique().tolist() for key in ("map", "healthy", "probability")] == [[0], [1, 2, 3], [4]]
    assert torch.equal(parts["healthy"].affine, pred.affine) and parts["probability"].shape == (1, 2, 3, 4)


def test_numbers_that_do_not_add_up_are_refused():
    with pytest.raises(ValueError, match="pred has 5 channels"):
        SplitPredictiond("pred", {"map": 1, "healthy": 3})({"pred": torch.zeros(5, 2, 2)})


# --- MapToMask, cohort_otsu


def anomaly_map(seed=0):
    """Weak residuals, a block of strong ones and zeros around."""
    voxels = torch.zeros(1, 12, 12, 12)
    voxels[:, 1:11, 1:11, 1:11] = 0.1 * torch.from_numpy(noise(1, 10, 10, 10, seed=seed))
    voxels[:, 4:7, 4:7, 4:7] += 0.6
    return MetaTensor(voxels, affine=torch.as_tensor(AFFINE), meta={"filename_or_obj": "a"})


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


def test_spacing_leaves_alone_what_is_called_like_the_image_and_can_be_undone(tmp_path):
    nib.save(nib.Nifti1Image(np.random.default_rng(0).random((4, 6, 2)), np.diag([2.0, 2, 5, 1])), tmp_path / "a.nii.gz")
    path = str(tmp_path / "a.nii.gz")
    preprocessing = Compose([LoadSequencesd("image", ["flair"]), Spacingd("image", pixdim=(1.0, 1.0, -1.0))])
    data = preprocessing({"image": path, "image_path": path})
    assert data["image"].shape == (1, 7, 11, 2) and data["image_path"] == path
    assert preprocessing.inverse(data)["image"].shape == (1, 4, 6, 2)


def test_noise_is_standard_normal_and_depends_on_the_seed_alone():
    noise = seeded_noise(3, (1, 64, 64))
    assert noise.shape == (1, 64, 64) and noise.dtype == torch.float32
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    torch.manual_seed(9)  # the state of the process does not count
    drawn = SeededNoised(keys="image", shape=[1, 64, 64])({"case": "a", "seed": 3})
    assert torch.equal(drawn["image"], noise) and drawn["case"] == "a"
    assert not torch.equal(seeded_noise(4, (1, 64, 64)), noise)
