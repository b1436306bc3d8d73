from __future__ import annotations

import gzip
import os
from pathlib import Path

import itk
import nibabel as nib
import numpy as np
import pytest
import torch
from made_inputs import AFFINE, load, noise, save
from monai.data import DataLoader, Dataset
from monai.transforms import Orientationd
from PIL import Image

from scripts.data.reading import LoadSequencesd


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


@pytest.mark.parametrize("name", ["a.NII.GZ", "a.NII", "a.nii", "a.nii.gz"])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("packed", [False, True])
def test_a_nifti_file_is_read_by_its_content_not_by_its_ending(tmp_path, name, kind, packed):
    voxels = noise(4, 5, 6)
    content = kind(voxels, AFFINE).to_bytes()
    (tmp_path / name).write_bytes(gzip.compress(content) if packed else content)
    image = load(tmp_path / name)
    np.testing.assert_array_equal(image[0].numpy(), voxels)
    np.testing.assert_allclose(image.affine, AFFINE)


def test_a_header_is_not_believed_whatever_the_ending_is(tmp_path):
    (tmp_path / "b.nii.gz").write_bytes(promise(tmp_path / "a.nii", *[300] * 3).read_bytes())
    with pytest.raises(ValueError, match="b.nii.gz: unreadable, cut short or damaged: its header promises 300 x 300 x 300"):
        load(tmp_path / "b.nii.gz")


def save_itk(path, compression):
    """The volume of 4 x 5 x 6 voxels through ITK, which has the first axis last, and LPS."""
    voxels = noise(4, 5, 6)
    image = itk.image_from_array(np.ascontiguousarray(voxels.T))
    lps = np.diag([-1, -1, 1, 1]) @ AFFINE
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image.SetSpacing(spacing)
    image.SetDirection(lps[:3, :3] / spacing)
    image.SetOrigin(lps[:3, 3])
    itk.imwrite(image, str(path), compression=compression)
    return voxels


@pytest.mark.parametrize("compression", [False, True])
@pytest.mark.parametrize("ending", ["mha", "mhd", "nrrd", "nhdr"])
def test_a_metaimage_or_nrrd_volume_arrives_with_its_voxels_and_its_affine(tmp_path, ending, compression):
    voxels = save_itk(tmp_path / f"a.{ending}", compression)
    image = load(tmp_path / f"a.{ending}")
    np.testing.assert_array_equal(image[0].numpy(), voxels)
    np.testing.assert_allclose(image.affine, AFFINE, atol=1e-9)


def test_a_nifti_pair_arrives_with_its_voxels_and_its_affine_and_plain_analyze_is_refused(tmp_path):
    voxels = noise(4, 5, 6)
    nib.save(nib.Nifti1Pair(voxels, AFFINE), tmp_path / "a.img")
    nib.save(nib.Spm99AnalyzeImage(voxels, np.diag([2.0, 2, 5, 1])), tmp_path / "b.img")
    for ending in ("hdr", "img"):
        image = load(tmp_path / f"a.{ending}")
        np.testing.assert_array_equal(image[0].numpy(), voxels)
        np.testing.assert_allclose(image.affine, AFFINE)
    with pytest.raises(ValueError, match="b.hdr: Analyze, which does not say which side is left; convert it to NIfTI"):
        load(tmp_path / "b.hdr")


TURNED = {1: (), 3: (Image.Transpose.ROTATE_180,), 6: (Image.Transpose.ROTATE_90,), 8: (Image.Transpose.ROTATE_270,)}


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_a_picture_that_notes_how_the_camera_was_held_is_read_as_it_is_seen(tmp_path, orientation, suffix):
    seen = Image.fromarray(np.repeat(np.repeat(np.arange(12, dtype=np.uint8).reshape(3, 4) * 20, 8, 0), 8, 1))
    stored = seen
    for turn in TURNED[orientation]:
        stored = stored.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / f"a.{suffix}", exif=exif, **({"compression": "tiff_lzw"} if suffix == "tif" else {}))
    image = load(tmp_path / f"a.{suffix}", ("X-ray",), min_ndim=2)
    assert image.shape == (1, 32, 24)
    np.testing.assert_allclose(image[0].T.numpy(), np.asarray(seen), atol=6)  # JPEG loses a little


def test_a_turned_tiff_that_pillow_would_scramble_is_refused(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (32, 24)).save(tmp_path / "a.tif", exif=exif)
    with pytest.raises(ValueError, match="a.tif: unreadable.*convert it"):
        load(tmp_path / "a.tif", min_ndim=2)


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


def moved(millimetres):
    affine = AFFINE.copy()
    affine[0, 3] += millimetres
    return affine


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


def promise_itk(path, *shape, file="LOCAL"):
    """A MetaImage file with the header of a uint8 volume of this shape, and next to nothing after it."""
    lines = {"NDims": 3, "DimSize": " ".join(map(str, shape)), "ElementType": "MET_UCHAR", "ElementDataFile": file}
    path.write_text("ObjectType = Image\n" + "".join(f"{key} = {value}\n" for key, value in lines.items()) + "\0")
    return path


def rubbish():
    return np.random.default_rng(0).bytes(10**6)


BAD_INPUTS = {
    "missing file": ("none.nii.gz: no such file", lambda f: f / "none.nii.gz"),
    "folder without images": ("no DICOM images in this folder", lambda f: f),
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
    "MetaImage": ("cut short or damaged: its header promises 9999", lambda f: promise_itk(f / "a.mha", 9999, 9999, 99)),
    "MetaImage of text": ("unreadable", lambda f: text(f / "a.mha")),
    "cut MetaImage": ("unreadable", lambda f: save_itk(f / "a.mha", False) is not None and cut(f / "a.mha")),
    "cut NRRD": ("unreadable", lambda f: save_itk(f / "a.nrrd", True) is not None and cut(f / "a.nrrd")),
    "MetaImage without voxels": ("unreadable", lambda f: promise_itk(f / "a.mhd", 8, 8, 8, file="none.raw")),
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
    "half of it": ("b.nii.gz: its field.*a.nii.gz: it covers 38 %", lambda f: pair(f, noise(8, 8, 3))),
    "other place": ("b.nii.gz: its field.*a.nii.gz: it covers 0 %", lambda f: pair(f, noise(8, 8, 8), moved(99))),
    "metres not said": ("b.nii.gz: 0.012 mm long", lambda f: [save(f / "b.nii.gz", noise(8, 8, 8), AFFINE / 2000)]),
    "no spacing": (
        "no place or spacing",
        lambda f: promise(f / "a.nii", 8, 8, 8, content=rubbish(), qform_code=1, pixdim=0),
    ),
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


# --- what the channels hold


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (("t1", "flair", "t1ce"), "t1,flair,t1ce"),
        (("flair",), "t1<-flair,flair,t1ce<-flair"),
        (("t1", "flair"), "t1,flair,t1ce<-flair"),
        (("t1", "flair", "flair again"), "t1,flair,t1ce<-flair"),
    ],
)
def test_a_sequence_that_stands_in_is_told_even_where_its_file_was_copied(tmp_path, caplog, given, expected):
    seeds = {"t1": 1, "flair": 2, "t1ce": 3, "flair again": 2}
    paths = [save(tmp_path / f"{name}.nii", noise(4, 5, 6, seed=seeds[name])) for name in given]
    paths = paths if len(given) != 2 else [*paths, None]
    image = load(paths, ("t1", "flair", "t1ce"), stand_in="flair")
    assert image.meta["sequences"] == expected
    assert ("flair stands in for" in caplog.text) == ("<-" in expected)
