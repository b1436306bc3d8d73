"""DICOM series in, DICOM segmentation objects out.

Positions are in the patient's coordinates, mm: LPS in DICOM, RAS in MONAI's affines.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import itk
import numpy as np
from monai.data import MetaTensor
from monai.utils import optional_import

from scripts.files import written_aside

if TYPE_CHECKING:
    from pydicom import Dataset

# MONAI Label's environment has no highdicom, and still has to import the handlers
hd, _ = optional_import("highdicom")
pydicom, _ = optional_import("pydicom")
codes, _ = optional_import("pydicom.sr.codedict", name="codes")

__all__ = ["read_series", "series_affine", "write_segmentation"]

logger = logging.getLogger(__name__)

# beside pydicom, every LoadImage of MONAI 1.6 says twice that it has no nvImageCodec, which nobody asked for
logging.getLogger("monai.data.nvimgcodec_pydicom_plugin").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message="NvImgCodecPydicomReader")

GEOMETRY = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")
IDENTITY = ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID", "Modality")
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


def _numbers(header: Dataset, name: str, count: int) -> np.ndarray:
    """Values of an attribute, which pydicom hands on as text where they are no numbers."""
    try:
        values = np.array(header[name].value, dtype=float)
    except (TypeError, ValueError):
        values = np.empty(0)
    if values.shape != (count,) or not np.isfinite(values).all():
        raise ValueError(f"{header.filename}: {name} is not {count} numbers; copy it or export it again")
    return values


def _normal(header: Dataset) -> np.ndarray:
    """Direction in which the slices follow each other, LPS, of length 1."""
    orientation = _numbers(header, "ImageOrientationPatient", 6)
    return np.cross(orientation[:3], orientation[3:])


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
    if len(slices) == 1:
        return slices
    _need(slices, GEOMETRY[:2])
    first = slices[0]
    for header in slices[1:]:
        orientations = [_numbers(one, "ImageOrientationPatient", 6) for one in (header, first)]
        if not np.allclose(*orientations, rtol=0, atol=1e-3):
            raise ValueError(
                f"{folder}: {Path(first.filename).name} and {Path(header.filename).name} lie in different planes; "
                "give the slices of a localizer, or of each stack, a folder of their own"
            )
    heights = np.array([_numbers(header, "ImagePositionPatient", 3) for header in slices]) @ _normal(first)
    order = np.argsort(heights, kind="stable")
    for low, high in zip(order[:-1], order[1:], strict=True):
        if heights[high] - heights[low] < 1e-3:
            names = " and ".join(Path(slices[i].filename).name for i in (low, high))
            raise ValueError(
                f"{folder}: {names} lie at the same position; remove copies, and give each time point, echo or phase a "
                "folder of its own"
            )
    return [slices[i] for i in order]


def series_affine(slices: Sequence[Dataset]) -> np.ndarray:
    """The affine that ITK gives a series: evenly spaced slices along their normal, from the first to the last.

    The spacing is the mean distance of neighbouring slices' positions, so of a series with a missing slice, with several
    spacings or of a tilted gantry, slices in between (or all but the first) lie elsewhere.

    Args:
        slices: headers, as :func:`read_series` gives them.

    Returns:
        float64, (4, 4), from array indices (column, row, slice) to RAS, mm; of one slice, the thickness is 1 mm.
    """
    first, last = slices[0], slices[-1]
    orientation = np.array(first.ImageOrientationPatient, dtype=float)
    start, end = (np.array(header.ImagePositionPatient, dtype=float) for header in (first, last))
    between_rows, between_columns = map(float, first.PixelSpacing)
    step = np.linalg.norm(end - start) / (len(slices) - 1) if len(slices) > 1 else 1.0
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = orientation[:3] * between_columns, orientation[3:] * between_rows
    affine[:3, 2], affine[:3, 3] = _normal(first) * step, start
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def _check_grid(folder: Path, slices: Sequence[Dataset], mask: MetaTensor) -> None:
    """Raise ValueError if the mask isn't on the series' grid; warn if the series isn't evenly spaced."""
    affine, shape = series_affine(slices), (slices[0].Columns, slices[0].Rows, len(slices))
    corners = np.array(np.meshgrid(*((0, size - 1) for size in shape), [1])).reshape(4, -1)
    tolerance = 0.1 * min(map(float, slices[0].PixelSpacing))
    if mask.shape != (1, *shape) or np.abs((mask.affine.cpu().numpy() - affine)[:3] @ corners).max() > tolerance:
        raise ValueError(
            f"{folder}: the mask, {tuple(mask.shape)}, isn't on the grid of the series, {(1, *shape)}, or has another "
            "affine; invert the preprocessing first"
        )
    even = [(affine @ [0, 0, k, 1])[:3] * (-1, -1, 1) for k in range(len(slices))]
    off = np.linalg.norm(np.array(even) - [header.ImagePositionPatient for header in slices], axis=1).max()
    if off > tolerance:
        logger.warning(
            f"{folder}: a slice is missing, or the slices are unevenly spaced or tilted: up to {off:.1f} mm off in the "
            "NIfTI files, which have even slices; in the DICOM segmentation each is at its own place"
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
    _check_grid(folder, slices, mask)
    pixels = np.ascontiguousarray(mask[0].cpu().numpy().transpose(2, 1, 0))  # frames, rows, columns
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
