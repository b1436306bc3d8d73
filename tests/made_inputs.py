"""Made arrays and files, and what is asked of pictures, for the tests of several rooms."""

from __future__ import annotations

import csv
import io

import nibabel as nib
import numpy as np
import pydicom
import torch
from matplotlib.image import imread
from monai.data import MetaTensor
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
from scipy.spatial.transform import Rotation
from stand_in import StandInNet

from scripts.data.reading import LoadSequencesd
from scripts.tasks.generation.evaluation import draw_samples

AFFINE = np.array([[0.0, -2, 0, 90], [1.5, 0, 0, -20], [0, 0, -3, 7], [0, 0, 0, 1]])  # neither RAS nor isotropic


def noise(*shape, seed=0):
    return np.random.RandomState(seed).rand(*shape).astype(np.float32)


def save(path, voxels, affine=AFFINE):
    nib.save(nib.Nifti1Image(voxels, affine), path)
    return str(path)


def load(paths, sequences=("CT",), **kwargs):
    return LoadSequencesd("image", sequences, **kwargs)({"image": paths})["image"]


def anomaly_map(seed=0):
    """Weak residuals, a block of strong ones and zeros around."""
    voxels = torch.zeros(1, 12, 12, 12)
    voxels[:, 1:11, 1:11, 1:11] = 0.1 * torch.from_numpy(noise(1, 10, 10, 10, seed=seed))
    voxels[:, 4:7, 4:7, 4:7] += 0.6
    return MetaTensor(voxels, affine=torch.as_tensor(AFFINE), meta={"filename_or_obj": "a"})


def draw(function, *args, **kwargs):
    """Pixels of a figure, (height, width, 3) in 0 to 255."""
    buffer = io.BytesIO()
    function(buffer, *args, **kwargs)
    buffer.seek(0)
    return (imread(buffer)[..., :3] * 255).round().astype(int)


def has_color(pixels, color):
    return (np.abs(pixels - color).max(axis=-1) < 3).sum() > 50


SEQUENCES = ("t1", "flair")

SECTIONS = ("training", "validation", "test")


def touch(folder, *names):
    """Empty files, with their folders."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def table(path, *rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


def read(data):
    """Stands for loading: cases whose image is "bad" can't be read, the others are volumes with a mask or labels."""
    if data["image"] == "bad":
        raise ValueError(f"{data['case']}: not\na scan")
    return {**data, "image": torch.ones(1, 4, 4, 4)}


SHAPE = (1, 64, 64)


def images_of(number: int, seed: int = 0) -> torch.Tensor:
    """Images with squares at random places."""
    return draw_samples(StandInNet(), number, SHAPE, seed)[0]


META = {"name": "a bundle", "version": "1.2.3", "task": "to find"}


def no_space(*args, **kwargs):
    raise OSError(28, "No space left on device")


OBLIQUE = Rotation.from_euler("xyz", [20, -35, 50], degrees=True).as_matrix()  # columns: along a row, a column, the normal

ROW_SPACING, COLUMN_SPACING, STEP, ORIGIN = 0.9, 0.7, 2.5, np.array([-11.0, -22.0, 33.0])

NAMES = ["IM00012", "c.dcm", "1.2.840.99", "A.DCM", "b"]  # the first slice has none of the first names


def save_series(folder, voxels=None, axes=OBLIQUE, heights=None, names=NAMES, series="1", shift=(0, 0, 0), **attributes):
    """A CT series of 64 columns and 48 rows, or of the given voxels (columns, rows, slices), with slices at the heights.

    ``shift`` moves every slice against the one below, in mm. Attributes of the value None are left out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    voxels = np.random.default_rng(0).integers(0, 900, (64, 48, 5)) if voxels is None else voxels
    heights = STEP * np.arange(voxels.shape[2]) if heights is None else heights
    for k, (height, name) in enumerate(zip(heights, names, strict=False)):
        header = pydicom.Dataset()
        header.file_meta = pydicom.dataset.FileMetaDataset()
        header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        header.SOPClassUID, header.Modality = CTImageStorage, "CT"
        header.StudyInstanceUID, header.SeriesInstanceUID, header.FrameOfReferenceUID, header.SOPInstanceUID = (
            generate_uid(entropy_srcs=[x]) for x in ("study", f"series {series}", "frame", f"{series} {name}")
        )
        header.PatientID, header.PatientName, header.PatientSex, header.PatientBirthDate = "7", "Doe^Jane", "F", "19700203"
        header.StudyID, header.StudyDate, header.StudyTime, header.AccessionNumber = "1", "20200102", "030405", "9"
        header.Manufacturer, header.ManufacturerModelName = "Acme", "Scanner"
        header.SeriesDate, header.SeriesTime, header.SeriesNumber, header.InstanceNumber = "20200102", "030500", 3, 99 - k
        position = ORIGIN + height * axes[:, 2] + k * np.array(shift)
        header.ImagePositionPatient = [f"{x:.6f}" for x in position]
        header.ImageOrientationPatient = [f"{x:.9f}" for x in axes[:, :2].T.flatten()]
        header.PixelSpacing, header.SliceThickness = [ROW_SPACING, COLUMN_SPACING], STEP
        header.Columns, header.Rows, header.SamplesPerPixel = *voxels.shape[:2], 1
        header.BitsAllocated, header.BitsStored, header.HighBit, header.PixelRepresentation = 16, 16, 15, 1
        header.PhotometricInterpretation, header.RescaleIntercept, header.RescaleSlope = "MONOCHROME2", 0, 1
        header.PixelData = voxels[..., k].T.astype(np.int16).tobytes()
        for keyword, value in attributes.items():
            setattr(header, keyword, value)
            if value is None:
                delattr(header, keyword)
        header.save_as(folder / name, enforce_file_format=True)
    return folder


def ball(centre, size=(16, 16, 8)):
    """A ball of 1 in -1, with a soft edge: (1, 1, H, W, D)."""
    axes = torch.meshgrid(*[torch.arange(n, dtype=torch.float32) for n in size], indexing="ij")
    square = sum(((axis - c) / r) ** 2 for axis, c, r in zip(axes, centre, (4, 4, 3), strict=True))
    return (2 * torch.sigmoid(3 * (1.5 - square)) - 1)[None, None]


# settings of a deformable model that is as small as it can be, for volumes of 16 x 16 x 8
SMALL_DEFORMABLE = {
    "channels": (4, 4, 8),
    "deformation_channels": (4, 4, 4, 4),
    "deformation_out": 4,
    "final_channels": (4,),
}


def ball_pair():
    """A ball that moves by three voxels, source and target: (1, 2, 16, 16, 8)."""
    return torch.cat([ball((6, 8, 4)), ball((9, 8, 4))], dim=1)
