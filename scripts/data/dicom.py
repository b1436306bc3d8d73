"""DICOM series in, DICOM segmentation objects out.

Positions are in the patient's coordinates, mm: LPS in DICOM, RAS in MONAI's affines.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import itk
import numpy as np
from monai.data import ITKReader, MetaTensor
from monai.utils import SpaceKeys, ensure_tuple, optional_import

from scripts.data.stacks import Stack, normal_of, numbers_of
from scripts.files import written_aside

if TYPE_CHECKING:
    from pydicom import Dataset

# MONAI Label's environment has no highdicom, and still has to import the handlers
hd, _ = optional_import("highdicom")
pydicom, _ = optional_import("pydicom")
codes, _ = optional_import("pydicom.sr.codedict", name="codes")

__all__ = ["SeriesReader", "read_series", "write_segmentation"]

logger = logging.getLogger(__name__)

# beside pydicom, every LoadImage of MONAI 1.6 says twice that it has no nvImageCodec, which nobody asked for
logging.getLogger("monai.data.nvimgcodec_pydicom_plugin").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message="NvImgCodecPydicomReader")
# of every case it lists what it copies, and it takes slices for irregular that differ by rounding: we have our own measure
logging.getLogger("highdicom").setLevel(logging.ERROR)

GEOMETRY = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")
IDENTITY = ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID", "Modality")
FRAME_GROUPS = (
    *("PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence", "FrameContentSequence"),
    "PixelValueTransformationSequence",
)
# these may be empty in DICOM, and de-identified files often lack them
MAY_BE_EMPTY = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex"),
    *("StudyID", "StudyDate", "StudyTime", "AccessionNumber", "ReferringPhysicianName", "SliceThickness"),
)


def _need(slices: Sequence[Dataset], names: Sequence[str]) -> None:
    """Raise ValueError, with the file's name, if one of the attributes is missing or empty in a slice."""
    for header in slices:
        try:
            frames = int(header.get("NumberOfFrames") or 1)
            missing = [name for name in names if not header.get(name)]
        except Exception as error:  # pydicom reads an attribute when it is asked for
            raise ValueError(f"{header.filename}: damaged attributes ({error}); copy it or export it again") from error
        if frames > 1:
            raise ValueError(
                f"{header.filename}: several frames in one (enhanced) object; "
                "convert it to one file a slice (emf2sf of dcm4che), or to NIfTI"
            )
        if missing:
            raise ValueError(f"{header.filename}: no {', '.join(missing)}; export the series again with these attributes")


def _count_frames(path: Path) -> int:
    """Number of frames in a DICOM file; 0 for any other."""
    with open(path, "rb") as file:
        if file.read(132)[128:] != b"DICM":
            return 0
    try:
        return int(
            pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["NumberOfFrames"]).get("NumberOfFrames") or 1
        )
    except Exception:  # it is for ITK to say what is wrong
        return 1


def _files(folder: Path) -> list[str]:
    """The files that MONAI's ITKReader takes from a folder, which it chooses by their content, not by their names."""
    names = itk.GDCMSeriesFileNames.New()
    names.SetUseSeriesDetails(True)
    names.AddSeriesRestriction("0008|0021")
    names.SetDirectory(str(folder))
    groups = [names.GetFileNames(group) for group in names.GetSeriesUIDs()]
    if not groups:
        raise ValueError(f"{folder}: no DICOM images in this folder; check the path")
    if len(groups) > 1:
        found = ", ".join(f"{len(group)} like {Path(group[0]).name}" for group in groups)
        raise ValueError(
            f"{folder}: DICOM files of {len(groups)} series, or of one with several sizes, slice thicknesses or dates "
            f"({found}), of which one alone would be read; give each a folder of its own"
        )
    return list(groups[0])


def read_series(folder: str | Path) -> list[Dataset]:
    """Headers of the one series in a folder, in the order of the slices that ITK (and so MONAI) gives them.

    The order is by position along the normal of the slices; names of the files don't matter. ITK itself reads on, with
    or without a warning, where this raises an error: of two series it takes one, slices of a localizer and two slices at
    one place it stacks among the others.

    Args:
        folder: folder of a DICOM series.

    Raises:
        ValueError: in one line with the name and the mend, if there is no series, more than one, slices in different
            planes or two at the same position; if one of several files has several frames or no position.
    """
    folder = Path(folder)
    slices = []
    for file in _files(folder):
        try:
            slices.append(pydicom.dcmread(file, stop_before_pixels=True, force=True))
        except OSError as error:
            raise ValueError(f"{file}: unreadable ({error.strerror or error}); copy it again") from None
    return _in_order(folder, slices) if len(slices) > 1 else slices


def _in_order(source: Path, slices: Sequence[Dataset]) -> list[Dataset]:
    """Slices in the order of their places along their normal, or ValueError if they are no stack."""
    _need(slices, GEOMETRY)
    first = slices[0]
    for header in slices[1:]:
        orientations = [numbers_of(one, "ImageOrientationPatient", 6) for one in (header, first)]
        if not np.allclose(*orientations, rtol=0, atol=1e-3):
            raise ValueError(
                f"{source}: {Path(first.filename).name} and {Path(header.filename).name} lie in different planes; "
                "give the slices of a localizer, or of each stack, a folder of their own"
            )
    heights = np.array([numbers_of(header, "ImagePositionPatient", 3) for header in slices]) @ normal_of(first)
    order = np.argsort(heights, kind="stable")
    for low, high in zip(order[:-1], order[1:], strict=True):
        if heights[high] - heights[low] < 1e-3:
            names = " and ".join(Path(slices[i].filename).name for i in (low, high))
            raise ValueError(
                f"{source}: {names} lie at the same position; remove copies, and give each time point, echo or phase a "
                "folder of its own"
            )
    return [slices[i] for i in order]


def _frames(header: Dataset) -> list[Dataset]:
    """The frames of an enhanced object as if each were a file, in the order of their places, ``frame`` their numbers."""
    try:
        shared, groups = header.SharedFunctionalGroupsSequence[0], header.PerFrameFunctionalGroupsSequence
        own = [{name: (group if name in group else shared).get(name, [{}])[0] for name in FRAME_GROUPS} for group in groups]
    except (AttributeError, IndexError):
        own = []
    count = int(header.NumberOfFrames)
    if len(own) != count or header.get("SamplesPerPixel", 1) != 1:
        raise ValueError(
            f"{header.filename}: {count} frames in one object, in colour or without a place of each; convert it to NIfTI"
        )
    stacks = {groups_of["FrameContentSequence"].get("StackID") for groups_of in own}
    if len(stacks) > 1:
        raise ValueError(
            f"{header.filename}: {len(stacks)} stacks in one object; convert it to one series a stack, or to NIfTI"
        )
    frames = []
    for number, groups_of in enumerate(own):
        frame = pydicom.Dataset()
        for group in groups_of.values():
            frame.update({element.tag: element for element in group} if group else {})
        frame.Rows, frame.Columns, frame.frame = header.Rows, header.Columns, number
        frame.filename = f"{header.filename} frame {number + 1}"
        frames.append(frame)
    return _in_order(Path(header.filename), frames)


def _pixels(path: Path) -> np.ndarray:
    image = pydicom.dcmread(path)
    try:
        return image.pixel_array
    except (RuntimeError, NotImplementedError) as error:  # for want of a decoder, pydicom lists what might be installed
        raise ValueError(
            f"{path}: its frames are in {image.file_meta.TransferSyntaxUID.name}, for which there is no decoder; install "
            "python-gdcm, or convert it to NIfTI"
        ) from error


class SeriesReader(ITKReader):
    """MONAI's ITKReader for the folder of one DICOM series, or a file with several frames (enhanced MR or CT).

    Levels are float32 after the slope and intercept of each slice, whatever those of the first are. The slices of a tilted
    gantry, which lie beside each other in steps, are moved within their planes onto one grid with orthogonal axes, as large
    as all of them (linear interpolation, the scan's lowest level around them). Of an enhanced object the frames are put in
    the order of their places; the pixels are decoded by pydicom, those of a series by ITK.
    """

    def __init__(self) -> None:
        super().__init__(pixel_type=itk.F)

    def verify_suffix(self, filename: Sequence[str | Path] | str | Path) -> bool:
        path = Path(ensure_tuple(filename)[0])
        return path.is_dir() or _count_frames(path) > 1

    def read(self, data: Sequence[str | Path] | str | Path, **_: object) -> tuple[list[Dataset], Any]:
        """Headers in the order of the slices, and an image of ITK or the voxels of frames.

        Raises:
            ValueError: for what :func:`read_series` refuses; frames without places, or in several stacks.
        """
        path = Path(ensure_tuple(data)[0])
        slices = read_series(path) if path.is_dir() else [pydicom.dcmread(path, stop_before_pixels=True)]
        files = [str(header.filename) for header in slices]
        if len(slices) == 1 and int(slices[0].get("NumberOfFrames") or 1) > 1:
            frames = _frames(slices[0])
            pixels = _pixels(Path(files[0]))
            levels = [
                pixels[f.frame] * float(f.get("RescaleSlope", 1)) + float(f.get("RescaleIntercept", 0)) for f in frames
            ]
            return frames, np.stack(levels, axis=-1).swapaxes(0, 1).astype(np.float32)
        kwargs = self.kwargs if slices[0].get("SamplesPerPixel", 1) == 1 else {}
        return slices, itk.imread(files if len(files) > 1 else files[0], **kwargs)

    def get_data(self, img: tuple[list[Dataset], Any]) -> tuple[np.ndarray, dict]:
        slices, image = img
        if isinstance(image, np.ndarray):
            voxels, meta = image, {"space": SpaceKeys.RAS, "original_channel_dim": float("nan")}
        else:
            voxels, meta = super().get_data(image)
        if len(slices) > 1:
            stack = Stack(slices)
            _tell(slices, stack)
            if stack.beside or "affine" not in meta:
                voxels = stack.joined(voxels)
                meta["affine"], meta["original_affine"] = stack.affine, stack.affine.copy()
                meta["spatial_shape"], meta["spacing"] = np.array(stack.shape), np.linalg.norm(stack.affine[:3, :3], axis=0)
        # as ITK tells them of a single file
        meta["0008|0060"], meta["0028|0100"] = slices[0].get("Modality") or "", str(slices[0].get("BitsAllocated", ""))
        return voxels, meta


def _tell(slices: Sequence[Dataset], stack: Stack) -> None:
    """Say that a series was tilted, and warn if slices do not lie where its affine says."""
    source = Path(slices[0].filename).parent
    if stack.beside:
        logger.info(
            f"{source}: a tilted gantry, slices lie up to {stack.beside:.1f} mm beside each other; they are moved "
            "to lie straight above each other, and the results lie on that grid"
        )
    if stack.unevenness > 0.1 * min(map(float, slices[0].PixelSpacing)):
        logger.warning(
            f"{source}: a slice is missing, or the slices are unevenly spaced: up to {stack.unevenness:.1f} mm off in the "
            "NIfTI files, which have even slices; in a DICOM segmentation each is at its own place"
        )


def _check_grid(folder: Path, stack: Stack, mask: MetaTensor, tolerance: float) -> None:
    """Raise ValueError if the mask isn't on the series' grid."""
    corners = np.array(np.meshgrid(*((0, size - 1) for size in stack.shape), [1])).reshape(4, -1)
    off = np.abs((mask.affine.cpu().numpy() - stack.affine)[:3] @ corners).max()
    if mask.shape != (1, *stack.shape) or off > tolerance:
        raise ValueError(
            f"{folder}: the mask, {tuple(mask.shape)}, isn't on the grid of the series, {(1, *stack.shape)}, or has another "
            "affine; invert the preprocessing first"
        )


def write_segmentation(
    path: str | Path,
    series_dir: str | Path,
    mask: MetaTensor,
    label_names: Sequence[str],
    bundle: str,
    version: str,
    weights: str = "none",
) -> None:
    """Write a mask as a DICOM segmentation object (SEG, binary), for a viewer to lay over the series.

    Every frame refers to its slice and has that slice's position; the k-th slice of the mask belongs to the k-th file in
    the order of position. Frames without a finding are left out, but an empty mask has all of them, since the object
    needs one. Patient and study are those of the series; attributes that may be empty are, if the series lacks them.

    The same mask of the same series gives the same bytes: UIDs are a hash of the slices' UIDs, bundle, version, weights
    and mask; dates and times of the content are those of the series (1900-01-01 if it has none), not of the run.

    Args:
        path: file to write, whole or not at all.
        series_dir: folder of the series that the mask belongs to.
        mask: (1, H, W, D) uint8, H the columns and W the rows of the series, as MONAI reads it, with its affine (RAS, mm).
        label_names: names of the labels 1, 2, …
        bundle: name of the bundle.
        version: version of the bundle.
        weights: hash of the weights, as the device's serial number.

    Raises:
        ValueError: in one line, for what :func:`read_series` refuses, a multi-frame object, missing attributes, or a mask
            on another grid or with a label that has no name.
        OSError: if the file can't be written.
    """
    folder = Path(series_dir)
    slices = read_series(folder)
    _need(slices, GEOMETRY + IDENTITY)
    stack = Stack(slices)
    _check_grid(folder, stack, mask, tolerance=0.1 * min(map(float, slices[0].PixelSpacing)))
    pixels = np.ascontiguousarray(stack.parted(mask[0].cpu().numpy()).transpose(2, 1, 0))  # frames, rows, columns
    if pixels.max() > len(label_names):
        raise ValueError(f"{folder}: the mask has the label {pixels.max()}, which none of {list(label_names)} names")

    first = slices[0]
    for name in MAY_BE_EMPTY:
        if name not in first:
            setattr(first, name, None)
    made_from = [h.SOPInstanceUID for h in slices] + [bundle, version, weights, *label_names, sha256(pixels).hexdigest()]
    series_uid, instance_uid, dimension_uid = (
        pydicom.uid.generate_uid(entropy_srcs=[kind, *made_from]) for kind in ("series", "instance", "dimension")
    )
    dates = [(first.get(f"{kind}Date"), first.get(f"{kind}Time")) for kind in ("Content", "Series", "Study")]
    date, time = next(((day, hour or "000000") for day, hour in dates if day), ("19000101", "000000"))
    algorithm = hd.AlgorithmIdentificationSequence(bundle, codes.DCM.ArtificialIntelligence, version)
    abnormal = codes.SCT.MorphologicallyAbnormalStructure
    segmentation = hd.seg.Segmentation(
        source_images=slices,
        pixel_array=pixels,
        segmentation_type="BINARY",
        segment_descriptions=[
            hd.seg.SegmentDescription(
                segment_number=number,
                segment_label=name,
                segmented_property_category=abnormal,
                segmented_property_type=codes.SCT.Lesion if name == "lesion" else abnormal,
                algorithm_type="AUTOMATIC",
                algorithm_identification=algorithm,
            )
            for number, name in enumerate(label_names, start=1)
        ],
        series_instance_uid=series_uid,
        series_number=1000 + int(first.get("SeriesNumber") or 0),
        sop_instance_uid=instance_uid,
        instance_number=1,
        manufacturer="MONAI diffusion bundles",
        manufacturer_model_name=bundle,
        software_versions=version,
        device_serial_number=weights,
        content_label="SEGMENTATION",
        content_description="Automatic, for research",
        series_description=f"{bundle} {version}",
        specific_character_set="ISO_IR 192",  # UTF-8; highdicom refuses some sets that a series may have
        content_date=date,
        content_time=time,
        omit_empty_frames=bool(pixels.any()),
    )
    # what highdicom draws at random or takes from the clock
    segmentation.InstanceCreationDate, segmentation.InstanceCreationTime = date, time
    segmentation.ContributingEquipmentSequence[-1].ContributionDateTime = date + time
    for item in (*segmentation.DimensionOrganizationSequence, *segmentation.DimensionIndexSequence):
        item.DimensionOrganizationUID = dimension_uid
    segmentation.ContentCreatorName = ""  # must be there, and highdicom leaves it out
    with written_aside(path) as aside:
        segmentation.save_as(aside)
