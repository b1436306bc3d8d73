"""DICOM series of known geometry in, segmentation objects out, compared in the patient's coordinates."""

from __future__ import annotations

import importlib.util
import logging
import shutil
import sys
from pathlib import Path

import highdicom as hd
import itk
import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from conftest import make_head, rows_of, run_forked
from made_inputs import COLUMN_SPACING, NAMES, OBLIQUE, ORIGIN, ROW_SPACING, STEP, save_series
from monai.data import MetaTensor
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import EnhancedCTImageStorage, JPEGLosslessSV1, MRImageStorage

from scripts.data import dicom
from scripts.data.dicom import read_series, write_segmentation
from scripts.data.layouts import find_cases
from scripts.data.reading import LoadSequencesd
from scripts.data.stacks import Stack

MADE_BY = {"bundle": "a_bundle", "version": "1.2.3", "weights": "abc"}


def load(folder):
    return LoadSequencesd("image", ["ct"])({"image": str(folder)})["image"]


def blob(image, labels=1):
    """A mask on an image's grid that no flip and no change of axes maps onto itself, with an empty slice."""
    mask = torch.zeros(image.shape, dtype=torch.uint8)
    mask[0, 40:60, 5:12, 1] = 1
    mask[0, 41:45, 5:30, 2:4] = labels
    return MetaTensor(mask, image.affine)


def places_in(path):
    """What a viewer makes of a segmentation: UID of the source slice, label and position (LPS) of every voxel in it."""
    seg = pydicom.dcmread(path)
    shared, frames = seg.SharedFunctionalGroupsSequence[0], seg.pixel_array.reshape(-1, seg.Rows, seg.Columns)
    orientation = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, dtype=float)
    row_spacing, column_spacing = shared.PixelMeasuresSequence[0].PixelSpacing
    places = []
    for frame, group in zip(frames, seg.PerFrameFunctionalGroupsSequence, strict=True):
        (source,) = group.DerivationImageSequence[0].SourceImageSequence
        label = (group if "SegmentIdentificationSequence" in group else shared).SegmentIdentificationSequence[0]
        start = np.array(group.PlanePositionSequence[0].ImagePositionPatient, dtype=float)
        for r, c in np.argwhere(frame):
            place = start + c * column_spacing * orientation[:3] + r * row_spacing * orientation[3:]
            places.append((source.ReferencedSOPInstanceUID, label.ReferencedSegmentNumber, *place.round(2) + 0.0))
    return sorted(places)


def places_of(mask, folder, names=NAMES, axes=OBLIQUE):
    """The same from the mask's voxels, by the numbers that the series was made with; ``names`` in the order of slices."""
    places = []
    for c, r, k in np.argwhere(mask[0].numpy()):
        header = pydicom.dcmread(folder / names[k])
        start = np.array(header.ImagePositionPatient, dtype=float)
        place = start + c * COLUMN_SPACING * axes[:, 0] + r * ROW_SPACING * axes[:, 1]
        places.append((header.SOPInstanceUID, int(mask[0, c, r, k]), *place.round(2) + 0.0))
    return sorted(places)


def same_places(one, two):
    assert [place[:2] for place in one] == [place[:2] for place in two]
    np.testing.assert_allclose([place[2:] for place in one], [place[2:] for place in two], atol=0.011)


# --- reading


def test_the_affine_of_an_oblique_series_is_that_of_its_headers_and_its_voxels_lie_in_order(tmp_path):
    voxels = np.random.default_rng(1).integers(-1000, 900, (64, 48, 5))
    image = load(save_series(tmp_path, voxels))
    np.testing.assert_array_equal(image[0].numpy(), voxels)
    expected = np.eye(4)
    expected[:3, :3] = OBLIQUE * (COLUMN_SPACING, ROW_SPACING, STEP)
    expected[:3, 3] = ORIGIN
    expected[:2] *= -1  # LPS to RAS
    np.testing.assert_allclose(image.affine, expected, atol=1e-5)
    np.testing.assert_allclose(Stack(read_series(tmp_path)).affine, expected, atol=1e-5)
    assert [Path(header.filename).name for header in read_series(tmp_path)] == NAMES
    assert image.meta["filename_or_obj"] == str(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"heights": [0, 2.5, 5, 10, 12.5]},
        {"heights": [8, 6, 4, 2, 0]},
        {"shift": (0.0, 0.02, 0.01)},
        {"voxels": np.arange(64 * 48).reshape(64, 48, 1)},
    ],
    ids=["missing slice", "downwards", "tilted by less than half a pixel", "one slice"],
)
def test_our_affine_is_the_one_of_itk(tmp_path, change):
    folder = save_series(tmp_path, **change)
    np.testing.assert_allclose(Stack(read_series(folder)).affine, load(folder).affine, atol=1e-5)


@pytest.mark.parametrize("names", [["IM1", "IM2"], ["1.2.3", "1.2.4"], ["1.DCM", "2.DCM"], ["a.dcm", "b.dcm"]])
def test_a_series_is_found_whatever_its_files_are_called(tmp_path, names):
    series = save_series(tmp_path / "series", names=names)
    (tmp_path / "other").mkdir()
    for folder in (tmp_path, tmp_path / "other"):  # an index of the folder is no image
        (folder / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    (tmp_path / "other" / "notes").write_text("no images here")
    for folder in (tmp_path, series):
        assert find_cases(folder, ["ct"]) == [{"case": "series", "image": str(series)}]


def two_series(folder):
    save_series(folder)
    return save_series(folder, axes=np.roll(OBLIQUE, 1, axis=1), names=["localizer"], series="2")


def localizer_of_the_same_series(folder):
    save_series(folder)
    return save_series(folder, axes=np.roll(OBLIQUE, 1, axis=1), names=["localizer"])


def two_thicknesses(folder):
    save_series(folder)
    return save_series(folder, heights=[40, 45], names=["thick1", "thick2"], SliceThickness=5)


def without_geometry(folder):
    return save_series(folder, ImagePositionPatient=None)


def damaged_position(folder):
    file = save_series(folder) / "b"
    place = str(pydicom.dcmread(file).ImagePositionPatient[0]).encode()
    file.write_bytes(file.read_bytes().replace(place, place[:-1] + b"\xb2"))
    return folder


@pytest.mark.parametrize(
    ("make", "mend"),
    [
        (two_series, r"2 series, or .*1 like localizer.*, of which one alone would be read; give each a folder of its own"),
        (two_thicknesses, "slice thicknesses.*2 like thick1.*give each a folder of its own"),
        (localizer_of_the_same_series, "localizer lie in different planes; .* a folder of their own"),
        (lambda f: save_series(f, heights=[0, 1, 1, 2, 3]), "lie at the same position; remove copies"),
        (without_geometry, "no ImagePositionPatient; export the series again"),
        (lambda f: save_series(f, shift=(99, 0, 0)), "slices lie .* mm beside each other, more than their width; export"),
        (lambda f: save_series(f, PixelSpacing=[0, 1]), "PixelSpacing is not above 0; copy it"),
        (damaged_position, "b: ImagePositionPatient is not 3 numbers; copy it or export it again"),
    ],
    ids=[
        "two series",
        "two thicknesses",
        "localizer",
        "two slices at one position",
        "no position",
        "far beside",
        "no spacing",
        "damaged position",
    ],
)
def test_what_is_not_one_series_is_told_in_one_line_with_the_mend(tmp_path, make, mend):
    with pytest.raises(ValueError, match=mend) as error:
        load(make(tmp_path))
    assert str(error.value).startswith(str(tmp_path)) and "\n" not in str(error.value)


# --- a tilted gantry


TABLE = OBLIQUE @ [0.2, 0.5, 1]  # the way from slice to slice, neither along the normal nor in a plane of two axes
RADIUS = 6.0
ALONG = {"along the table": TABLE, "along the normal": OBLIQUE[:, 2]}


def save_tilted_cylinder(folder, along, count=9):
    """A series along TABLE of a cylinder of 1000 in -50; a point of its axis, and which pixels are in it."""
    steps = STEP * np.arange(count)
    columns, rows = np.mgrid[:64, :48]
    middle = ORIGIN + OBLIQUE @ [25 * COLUMN_SPACING, 20 * ROW_SPACING, 0]
    in_plane = columns[..., None] * COLUMN_SPACING * OBLIQUE[:, 0] + rows[..., None] * ROW_SPACING * OBLIQUE[:, 1]
    places = np.stack([ORIGIN + step * TABLE + in_plane for step in steps], axis=2)
    inside = distance_to(middle, along, places) < RADIUS
    sideways = STEP * (TABLE - OBLIQUE[:, 2])
    names = [f"{k:02}" for k in range(count)]
    save_series(folder, np.where(inside, 1000, -50), heights=steps, names=names, shift=sideways)
    return middle, inside


def distance_to(point, along, places):
    return np.linalg.norm(np.cross(places - point, along / np.linalg.norm(along)), axis=-1)


@pytest.mark.parametrize("along", ALONG.values(), ids=ALONG.keys())
def test_a_cylinder_is_straight_and_at_its_place_whatever_the_tilt(tmp_path, caplog, along):
    middle, _ = save_tilted_cylinder(tmp_path, along)
    with caplog.at_level(logging.INFO):
        image = load(tmp_path)
    assert "a tilted gantry, slices lie up to 10.8 mm beside each other" in caplog.text and "unevenly" not in caplog.text
    np.testing.assert_allclose(image.affine[:2, :3], (OBLIQUE * (COLUMN_SPACING, ROW_SPACING, STEP))[:2] * -1, atol=1e-5)
    assert image.shape == (1, 64 + 6, 48 + 12, 9) and image.min() == -50  # 8 steps of 0.5 and 1.25 mm
    np.testing.assert_array_equal(image.meta["original_affine"], image.affine)
    for k in range(image.shape[3]):
        weight = (image[0, ..., k].numpy() + 50) / 1050
        center = [(weight * index).sum() / weight.sum() for index in np.mgrid[: weight.shape[0], : weight.shape[1]]]
        place = (image.affine.numpy() @ [*center, k, 1])[:3] * (-1, -1, 1)
        assert distance_to(middle, along, place) < COLUMN_SPACING / 2
        if along is not TABLE:  # the axis of the grid: every slice shows the cylinder at the same pixels
            np.testing.assert_allclose(center, [25, 20], atol=0.5)


@pytest.mark.parametrize("along", ALONG.values(), ids=ALONG.keys())
def test_the_mask_of_a_tilted_series_lies_on_the_slices_in_its_segmentation_object(tmp_path, along):
    middle, inside = save_tilted_cylinder(tmp_path / "series", along)
    image = load(tmp_path / "series")
    mask = MetaTensor((image > 475).to(torch.uint8), image.affine)
    write_segmentation(tmp_path / "seg.dcm", tmp_path / "series", mask, ["lesion"], **MADE_BY)
    places = np.array([place[2:] for place in places_in(tmp_path / "seg.dcm")])
    assert len(places) == pytest.approx(inside.sum(), rel=0.03)
    assert distance_to(middle, along, places).max() < RADIUS + ROW_SPACING / 2
    sources = [pydicom.dcmread(tmp_path / "series" / f"{k:02}").SOPInstanceUID for k in range(9)]
    seg = hd.seg.segread(tmp_path / "seg.dcm")
    frames = seg.get_pixels_by_source_instance(sources, assert_missing_frames_are_empty=True)[..., 0].T
    assert (frames != inside).mean() < 0.003  # voxels at the rim


# --- levels


def change_slices(folder, change):
    for k, header in enumerate(read_series(folder)):
        header = pydicom.dcmread(header.filename)
        change(header, k)
        header.save_as(header.filename)


def slopes(header, k):
    header.RescaleSlope, header.RescaleIntercept = str(1 + 0.125 * k), str(-1024.5 + k)


def test_every_slice_has_its_own_slope_and_intercept_with_their_fractions(tmp_path):
    voxels = np.random.default_rng(1).integers(0, 900, (64, 48, 5))
    change_slices(save_series(tmp_path, voxels), slopes)
    expected = voxels * (1 + 0.125 * np.arange(5)) - 1024.5 + np.arange(5)
    np.testing.assert_allclose(load(tmp_path)[0].numpy(), expected, rtol=1e-6)


def lossless_jpeg(path):
    """Compress a file as most archives do: JPEG Lossless, Process 14, Selection Value 1."""
    image = itk.imread(str(path), itk.SS)
    compressed = itk.GDCMImageIO.New()
    compressed.SetCompressionType(itk.GDCMImageIOEnums.Compression_JPEG)
    compressed.KeepOriginalUIDOn()
    reader = itk.ImageFileReader[type(image)].New(FileName=str(path), ImageIO=itk.GDCMImageIO.New())
    reader.Update()
    writer = itk.ImageFileWriter[type(image)].New(Input=reader.GetOutput(), FileName=str(path), ImageIO=compressed)
    writer.UseCompressionOn()
    writer.Update()


def test_a_series_in_lossless_jpeg_is_the_series(tmp_path):
    voxels = np.random.default_rng(1).integers(-1000, 900, (64, 48, 5))
    for name in NAMES:
        lossless_jpeg(save_series(tmp_path, voxels) / name)
    assert pydicom.dcmread(tmp_path / "b").file_meta.TransferSyntaxUID == JPEGLosslessSV1
    np.testing.assert_array_equal(load(tmp_path)[0].numpy(), voxels)


# --- enhanced objects


def save_enhanced(path, order=(3, 0, 4, 1, 2), change=lambda header: None):
    """One CT object with the frames of a series in another order, each with its own slope; its levels, (64, 48, 5)."""
    voxels = np.random.default_rng(1).integers(0, 900, (64, 48, 5))
    folder = save_series(path.parent / "parts", voxels)
    change_slices(folder, slopes)
    parts = [pydicom.dcmread(folder / NAMES[k]) for k in order]
    header = parts[0]
    header.SOPClassUID, header.NumberOfFrames = EnhancedCTImageStorage, len(parts)
    header.PixelData = b"".join(part.PixelData for part in parts)
    groups = {
        "PlanePositionSequence": ["ImagePositionPatient"],
        "PlaneOrientationSequence": ["ImageOrientationPatient"],
        "PixelMeasuresSequence": ["PixelSpacing", "SliceThickness"],
        "PixelValueTransformationSequence": ["RescaleSlope", "RescaleIntercept"],
    }

    def made(part, names):
        item = pydicom.Dataset()
        for name in names:
            inner = pydicom.Dataset()
            for keyword in groups[name]:
                setattr(inner, keyword, part[keyword].value)
            setattr(item, name, [inner])
        return item

    names = list(groups)
    header.SharedFunctionalGroupsSequence = [made(header, names[1:3])]
    header.PerFrameFunctionalGroupsSequence = [made(part, [names[0], names[3]]) for part in parts]
    for keyword in [keyword for keywords in groups.values() for keyword in keywords]:
        delattr(header, keyword)
    change(header)
    header.save_as(path)
    shutil.rmtree(folder)
    return voxels * (1 + 0.125 * np.arange(5)) - 1024.5 + np.arange(5)


@pytest.mark.parametrize("in_folder", [False, True])
def test_the_frames_of_an_enhanced_object_lie_in_order_each_with_its_slope(tmp_path, in_folder):
    expected = save_enhanced(tmp_path / "a.dcm")
    image = load(tmp_path if in_folder else tmp_path / "a.dcm")
    np.testing.assert_allclose(image[0].numpy(), expected, rtol=1e-6)
    affine = np.eye(4)
    affine[:3, :3] = OBLIQUE * (COLUMN_SPACING, ROW_SPACING, STEP)
    affine[:3, 3] = ORIGIN
    affine[:2] *= -1
    np.testing.assert_allclose(image.affine, affine, atol=1e-5)
    np.testing.assert_array_equal(image.meta["original_affine"], image.affine)


def save_enhanced_in_jpeg(path):
    """The same, its frames in JPEG Lossless."""
    order = (3, 0, 4, 1, 2)

    def compress(header):
        size = len(header.PixelData) // len(order)
        frames = []
        for k in range(len(order)):
            part = save_series(path.parent / "jpeg", np.zeros((64, 48, 1))) / NAMES[0]
            single = pydicom.dcmread(part)
            single.PixelData = header.PixelData[k * size : (k + 1) * size]
            single.save_as(part)
            lossless_jpeg(part)
            frames.append(next(generate_frames(pydicom.dcmread(part).PixelData, number_of_frames=1)))
        shutil.rmtree(path.parent / "jpeg")
        header.PixelData = encapsulate(frames)
        header["PixelData"].is_undefined_length = True
        header.file_meta.TransferSyntaxUID = JPEGLosslessSV1

    return save_enhanced(path, order, compress)


def test_frames_in_lossless_jpeg_are_decoded(tmp_path):
    pytest.importorskip("gdcm")
    expected = save_enhanced_in_jpeg(tmp_path / "a.dcm")
    np.testing.assert_allclose(load(tmp_path / "a.dcm")[0].numpy(), expected, rtol=1e-6)


def test_frames_that_no_decoder_is_there_for_are_told_so(tmp_path, monkeypatch):
    def refuse(dataset):
        raise RuntimeError("Unable to decompress: plugins are missing dependencies")

    save_enhanced_in_jpeg(tmp_path / "a.dcm")
    monkeypatch.setattr(pydicom.Dataset, "pixel_array", property(refuse))
    with pytest.raises(ValueError, match="a.dcm: its frames are in JPEG Lossless.* no decoder; install python-gdcm, or"):
        load(tmp_path / "a.dcm")


def two_stacks(header):
    for k, item in enumerate(header.PerFrameFunctionalGroupsSequence):
        content = pydicom.Dataset()
        content.StackID = str(k % 2)
        item.FrameContentSequence = [content]


def two_echoes(header):
    groups = header.PerFrameFunctionalGroupsSequence
    groups[1].PlanePositionSequence = groups[0].PlanePositionSequence


def no_places(header):
    del header.PerFrameFunctionalGroupsSequence


@pytest.mark.parametrize(
    ("change", "mend"),
    [
        (two_stacks, "a.dcm: 2 stacks in one object; convert it"),
        (two_echoes, "a.dcm: a.dcm frame 1 and a.dcm frame 2 lie at the same position"),
        (no_places, "a.dcm: 5 frames in one object, in colour or without a place of each; convert it to NIfTI"),
    ],
)
def test_an_enhanced_object_that_is_not_one_stack_is_refused(tmp_path, change, mend):
    save_enhanced(tmp_path / "a.dcm", change=change)
    with pytest.raises(ValueError, match=mend) as error:
        load(tmp_path / "a.dcm")
    assert str(error.value).startswith(str(tmp_path)) and "\n" not in str(error.value)


def test_monai_does_not_complain_about_a_decoder_that_nobody_asked_for(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        load(save_series(tmp_path))
    assert "nvImageCodec" not in caplog.text


# --- write_segmentation


def test_every_voxel_of_the_mask_lies_at_its_place_in_the_patient_and_on_its_slice(tmp_path):
    folder = save_series(tmp_path / "series")
    mask = blob(load(folder))
    write_segmentation(tmp_path / "seg.dcm", folder, mask, ["lesion"], **MADE_BY)
    same_places(places_in(tmp_path / "seg.dcm"), places_of(mask, folder))
    assert len(places_of(mask, folder)) == mask.sum() == 20 * 7 + 2 * 4 * 25

    seg = hd.seg.segread(tmp_path / "seg.dcm")  # a reader that finds the frames by the slices they refer to
    sources = [pydicom.dcmread(folder / name).SOPInstanceUID for name in NAMES]
    frames = seg.get_pixels_by_source_instance(sources, assert_missing_frames_are_empty=True)
    np.testing.assert_array_equal(frames[..., 0].T, mask[0])
    assert len(seg.PerFrameFunctionalGroupsSequence) == 3  # of 5 slices: those without a finding are left out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["seg.dcm", "series"]


def test_the_object_says_what_it_shows_who_made_it_and_whose_it_is(tmp_path):
    folder = save_series(tmp_path / "series")
    write_segmentation(tmp_path / "seg.dcm", folder, blob(load(folder), 2), ["lesion", "anomaly"], **MADE_BY)
    seg, source = pydicom.dcmread(tmp_path / "seg.dcm"), pydicom.dcmread(folder / "b")
    assert (seg.Modality, seg.SegmentationType, seg.SOPClassUID.name) == ("SEG", "BINARY", "Segmentation Storage")
    for keyword in ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyInstanceUID", "FrameOfReferenceUID"):
        assert seg[keyword].value == source[keyword].value
    assert seg.SeriesInstanceUID != source.SeriesInstanceUID == seg.ReferencedSeriesSequence[0].SeriesInstanceUID
    assert (seg.ManufacturerModelName, seg.SoftwareVersions, seg.DeviceSerialNumber) == tuple(MADE_BY.values())
    assert [(s.SegmentNumber, s.SegmentLabel) for s in seg.SegmentSequence] == [(1, "lesion"), (2, "anomaly")]
    for segment, kind in zip(seg.SegmentSequence, ("52988006", "49755003"), strict=True):
        assert segment.SegmentAlgorithmType == "AUTOMATIC" and segment.SegmentAlgorithmName == "a_bundle"
        assert segment.SegmentedPropertyCategoryCodeSequence[0].CodeValue == "49755003"
        assert segment.SegmentedPropertyTypeCodeSequence[0].CodeValue == kind
        (algorithm,) = segment.SegmentationAlgorithmIdentificationSequence
        assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == ("a_bundle", "1.2.3")
    same_places(places_in(tmp_path / "seg.dcm"), places_of(blob(load(folder), 2), folder))


def test_an_empty_mask_has_a_frame_for_every_slice(tmp_path):
    folder = save_series(tmp_path / "series")
    mask = blob(load(folder)) * 0
    write_segmentation(tmp_path / "seg.dcm", folder, mask, ["lesion"], **MADE_BY)
    seg = pydicom.dcmread(tmp_path / "seg.dcm")
    assert seg.NumberOfFrames == 5 and not seg.pixel_array.any()


def test_the_same_mask_gives_the_same_bytes_and_anything_else_another_object(tmp_path):
    folder = save_series(tmp_path / "series")
    mask = blob(load(folder))
    made = {
        "one": (mask, MADE_BY),
        "same": (mask, MADE_BY),
        "mask": (mask * 0, MADE_BY),
        "version": (mask, {**MADE_BY, "version": "1.2.4"}),
        "weights": (mask, {**MADE_BY, "weights": "abd"}),
    }
    for name, (of, by) in made.items():
        write_segmentation(tmp_path / name, folder, of, ["lesion"], **by)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "same").read_bytes()
    objects = [pydicom.dcmread(tmp_path / name) for name in made]
    assert len({seg.SOPInstanceUID for seg in objects}) == len({seg.SeriesInstanceUID for seg in objects}) == 4
    assert all(seg.SOPInstanceUID != seg.SeriesInstanceUID for seg in objects)
    assert (objects[0].ContentDate, objects[0].ContentTime) == ("20200102", "030500")


def test_a_series_without_the_patients_attributes_gets_an_object_with_empty_ones(tmp_path):
    left_out = (*dicom.MAY_BE_EMPTY, "SeriesDate", "SeriesTime", "SeriesNumber")
    folder = save_series(tmp_path / "series", **dict.fromkeys(left_out))
    mask = blob(load(folder))
    write_segmentation(tmp_path / "seg.dcm", folder, mask, ["lesion"], **MADE_BY)
    seg = pydicom.dcmread(tmp_path / "seg.dcm")
    assert not any(seg.get(keyword) for keyword in dicom.MAY_BE_EMPTY) and seg.ContentDate == "19000101"
    same_places(places_in(tmp_path / "seg.dcm"), places_of(mask, folder))


@pytest.mark.parametrize(
    ("encoding", "name"), [("ISO_IR 100", "Müller^Jörg"), (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎")]
)
def test_the_patients_name_keeps_its_letters(tmp_path, encoding, name):
    folder = save_series(tmp_path / "series", SpecificCharacterSet=encoding, PatientName=name)
    write_segmentation(tmp_path / "seg.dcm", folder, blob(load(folder)), ["lesion"], **MADE_BY)
    assert pydicom.dcmread(tmp_path / "seg.dcm").PatientName == name


def test_slices_that_are_not_evenly_spaced_keep_their_own_places_and_a_warning_tells(tmp_path, caplog):
    folder = save_series(tmp_path / "series", heights=[0, 2.5, 5, 10, 12.5])
    mask = blob(load(folder))
    write_segmentation(tmp_path / "seg.dcm", folder, mask, ["lesion"], **MADE_BY)
    same_places(places_in(tmp_path / "seg.dcm"), places_of(mask, folder))
    (record,) = [r for r in caplog.records if r.name == "scripts.data.dicom"]
    assert record.message.startswith(f"{folder}: a slice is missing, or the slices are unevenly spaced: up to")
    assert float(record.message.split("up to ")[1].split(" mm")[0]) == pytest.approx(1.25, abs=0.06)


def test_of_a_regular_series_nothing_is_said(tmp_path, caplog, capfd):
    folder = save_series(tmp_path / "series")
    with caplog.at_level(logging.INFO):
        write_segmentation(tmp_path / "seg.dcm", folder, blob(load(folder)), ["lesion"], **MADE_BY)
    assert not caplog.text and capfd.readouterr() == ("", "")


def test_a_single_slice_is_a_series_too(tmp_path):
    folder = save_series(tmp_path / "series", np.arange(64 * 48).reshape(64, 48, 1))
    mask = MetaTensor(torch.ones(1, 64, 48, 1, dtype=torch.uint8), load(folder).affine)
    write_segmentation(tmp_path / "seg.dcm", folder, mask, ["lesion"], **MADE_BY)
    same_places(places_in(tmp_path / "seg.dcm"), places_of(mask, folder))


def moved(mask):
    affine = mask.affine.clone()
    affine[:3, 3] += 0.2
    return MetaTensor(mask.as_tensor(), affine)


@pytest.mark.parametrize(
    ("attributes", "change", "mend"),
    [
        ({"FrameOfReferenceUID": None}, lambda m: m, "no FrameOfReferenceUID; export the series again"),
        ({}, moved, "another affine; invert the preprocessing first"),
        ({}, lambda m: m[:, :, :-1], "isn't on the grid of the series, .*invert the preprocessing first"),
        ({}, lambda m: m * 2, r"the mask has the label 2, which none of \['lesion'\] names"),
    ],
    ids=["no frame of reference", "moved", "cropped", "unknown label"],
)
def test_a_mask_that_does_not_belong_to_the_series_is_refused_and_nothing_is_written(tmp_path, attributes, change, mend):
    folder = save_series(tmp_path / "series", **attributes)
    with pytest.raises(ValueError, match=mend) as error:
        write_segmentation(tmp_path / "seg.dcm", folder, change(blob(load(folder))), ["lesion"], **MADE_BY)
    assert "\n" not in str(error.value) and not (tmp_path / "seg.dcm").exists()


def test_a_multi_frame_object_is_refused_with_the_mend(tmp_path):
    voxels = np.random.default_rng(0).integers(0, 900, (64, 48 * 3, 1))
    folder = save_series(tmp_path / "series", voxels, Rows=48, NumberOfFrames=3)
    mask = MetaTensor(torch.ones(1, 64, 48, 3, dtype=torch.uint8), np.eye(4))
    with pytest.raises(ValueError, match="IM00012: several frames in one .* object; convert it to one file a slice"):
        write_segmentation(tmp_path / "seg.dcm", folder, mask, ["lesion"], **MADE_BY)


def test_the_module_can_be_imported_where_highdicom_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "highdicom", None)
    spec = importlib.util.spec_from_file_location("dicom_without_highdicom", dicom.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(ImportError, match="highdicom"):
        _ = module.hd.seg


# --- the bundle as a user runs it


def test_a_bundle_writes_the_mask_of_a_dicom_series_as_nifti_and_as_a_segmentation_object(bundle, tmp_path):
    scan, _ = make_head(num_slices=2)
    folder = save_series(tmp_path / "scans" / "patient", scan[..., 1], SOPClassUID=MRImageStorage, Modality="MR")
    settings = ("--num_steps", 1, "--guidance_steps", 1, "--threshold", "otsu", "--min_threshold", 0, "--min_volume", 0)
    settings += ("--skip_below", 0)  # a made head looks healthy
    paths = ("--dataset_dir", tmp_path / "scans", "--output_dir", tmp_path / "output")
    done = run_forked(bundle, "configs/inference.json", *paths, *settings)
    assert done.returncode == 0, done.stderr
    assert "nvImageCodec" not in done.stdout + done.stderr
    case = tmp_path / "output" / "patient"
    endings = ("files.csv", "healthy.nii.gz", "map.nii.gz", "overview.png", "seg.dcm", "seg.nii.gz")
    assert sorted(path.name for path in case.iterdir()) == [f"patient_{ending}" for ending in endings]
    assert [row["case"] for row in rows_of(tmp_path / "output" / "results.csv")] == ["patient"]

    mask = nib.load(case / "patient_seg.nii.gz")
    np.testing.assert_allclose(mask.affine, load(folder).affine, atol=1e-4)
    voxels = np.asarray(mask.dataobj)
    assert voxels.shape == (128, 128, 2) and 0 < voxels.sum() < voxels.size
    same_places(places_in(case / "patient_seg.dcm"), places_of(torch.from_numpy(voxels)[None], folder))
    assert pydicom.dcmread(case / "patient_seg.dcm").SegmentSequence[0].SegmentLabel == "lesion"
