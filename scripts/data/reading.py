"""Reads scans and pictures of any format into one tensor with the sequences as channels, and refuses what is none."""

from __future__ import annotations

import gzip
import logging
import math
import os
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import itk
import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor, NibabelReader, PILReader
from monai.data.utils import correct_nifti_header_if_necessary, is_supported_format, to_affine_nd
from monai.transforms import LoadImage, MapTransform
from monai.utils import convert_to_numpy, ensure_tuple
from PIL import ExifTags, ImageOps
from PIL.Image import Image

from scripts.data.affines import on_grid_of, stated_affine, taken_affine
from scripts.data.dicom import SeriesReader
from scripts.transforms import with_meta

__all__ = ["LoadSequencesd", "PICTURE_AFFINE", "open_nifti"]

logger = logging.getLogger(__name__)

# MONAI's arrays of pictures are (x, y) with y downwards; without a word it takes them to be RAS
PICTURE_AFFINE = np.diag([-1.0, -1.0, 1.0, 1.0])
ITK_ENDINGS = (".mha", ".mhd", ".nrrd", ".nhdr")
MAX_DEFLATE = 1032  # bytes that gzip can make of one
MAX_VOXELS = 2**29  # of all sequences: 2 GB as float32
MAX_LEVEL = 1e30  # of a voxel, in its own unit: near the end of float32 results would be infinite
MIN_EDGE, MIN_LENGTH, MAX_LENGTH = 1e-4, 2.0, 3000.0  # mm, of a voxel and of the longest side of a scan


def _to_grey(picture: Image) -> Image:
    """A picture as it is seen, with one channel: 16 and 32 bit stay as they are, everything else becomes 0..255."""
    if getattr(picture, "n_frames", 1) > 1 and picture.format == "TIFF":
        raise ValueError("several pages, of which only the first would be read")
    if (
        picture.format == "TIFF"
        and picture.tag_v2.get(ExifTags.Base.Orientation, 1) > 4
        and picture.info["compression"] == "raw"
    ):
        raise ValueError("not compressed and noted to be turned, which Pillow scrambles")
    upright = ImageOps.exif_transpose(picture)  # cameras and phones only note how they were held
    grey = upright if upright.mode.startswith(("I", "F")) else upright.convert("L")
    grey.format = picture.format  # conversion sets it to None, which no batch of meta data can hold
    return grey


class _PictureReader(PILReader):
    """MONAI's reader of pictures, for TIFF too, which would else go to ITK and keep its colours."""

    suffixes = ("png", "jpg", "jpeg", "bmp", "tif", "tiff")

    def verify_suffix(self, filename: Sequence[str | os.PathLike] | str | os.PathLike) -> bool:
        return is_supported_format(filename, self.suffixes)


class _NiftiReader(NibabelReader):
    """MONAI's reader of NIfTI, also of pairs of two files, and whether or not a file is compressed as its ending says."""

    def verify_suffix(self, filename: Sequence[str | os.PathLike] | str | os.PathLike) -> bool:
        return all(str(name).lower().endswith((".nii", ".nii.gz", ".hdr", ".img")) for name in ensure_tuple(filename))

    def read(
        self, data: Sequence[str | os.PathLike] | str | os.PathLike, **kwargs: object
    ) -> nib.spatialimages.SpatialImage:
        (path,) = self.filenames = ensure_tuple(data)
        return correct_nifti_header_if_necessary(open_nifti(path))


def _is_packed(path: str | os.PathLike) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"\x1f\x8b"


def open_nifti(path: str | os.PathLike) -> nib.spatialimages.SpatialImage:
    """The scan of a NIfTI file or pair, its voxels unread.

    Raises:
        ValueError: with the mend, for a pair in the format of Analyze.
    """
    path, packed = Path(path).expanduser(), _is_packed(Path(path).expanduser())
    if packed == path.name.lower().endswith(".gz"):
        scan = nib.load(path)
        if not isinstance(scan, nib.Nifti1Pair):  # which NIfTI-2 and single files are, too
            raise ValueError(f"{path}: Analyze, which does not say which side is left; convert it to NIfTI from its source.")
        return scan
    stream = gzip.open(path) if packed else open(path, "rb")
    kind = nib.Nifti2Image if int.from_bytes(stream.read(4), "little") in (540, 0x1C020000) else nib.Nifti1Image
    stream.seek(0)
    return kind.from_file_map({"image": nib.FileHolder(fileobj=stream)})


def _check_header(path: str | os.PathLike, shape: Sequence[int], item_size: int, most: float) -> None:
    """Refuse a file whose header promises more than the file or memory can hold; MONAI takes memory before it reads."""
    count = math.prod(shape)
    if count * item_size > most:
        raise ValueError(
            f"{path}: unreadable, cut short or damaged: its header promises {' x '.join(map(str, shape))} voxels; "
            "copy it again."
        )
    if count > MAX_VOXELS:
        raise ValueError(f"{path}: {count} voxels, more than {MAX_VOXELS}; cut the scan or resample it.")


def _check_nifti(path: str | os.PathLike) -> nib.spatialimages.SpatialImage:
    """Check the header of a NIfTI file, and return its scan, unread, for its affine: MONAI replaces one that is none."""
    scan = open_nifti(path)
    voxels = scan.file_map["image"].filename or path
    most = os.stat(voxels).st_size * (MAX_DEFLATE if _is_packed(voxels) else 1)
    _check_header(path, scan.shape, scan.get_data_dtype().itemsize, most)
    return scan


def _check_volume(path: str | os.PathLike) -> None:
    """Check the header of a MetaImage or NRRD file."""
    io = itk.ImageIOFactory.CreateImageIO(str(path), itk.CommonEnums.IOFileMode_ReadMode)
    if io is None:
        raise ValueError("no reader")
    io.SetFileName(str(path))
    io.ReadImageInformation()
    shape = [io.GetDimensions(axis) for axis in range(io.GetNumberOfDimensions())]
    alone = str(path).lower().endswith((".mha", ".nrrd"))  # the others name a file with the voxels
    most = os.stat(path).st_size * MAX_DEFLATE if alone else math.inf
    _check_header(path, shape, io.GetComponentSize() * io.GetNumberOfComponents(), most)


def _check_geometry(path: str | os.PathLike, affine: np.ndarray, shape: Sequence[int]) -> None:
    """Refuse a volume whose affine is none, or of another size than what is scanned; a slice may have none."""
    if len(shape) < 3:
        return
    edges = np.linalg.norm(affine[:3, :3], axis=0)
    usable = np.isfinite(affine).all() and (edges >= MIN_EDGE).all()
    if not usable or abs(np.linalg.det(affine[:3, :3] / edges)) < 1e-3:
        raise ValueError(
            f"{path}: its affine (sform, qform or pixdim of the header) gives no place or spacing of the voxels; "
            "convert the scan again from its source."
        )
    length = (edges * shape[:3]).max()
    if not MIN_LENGTH <= length <= MAX_LENGTH:
        told = f"{length / 1000:.3g} m" if length > MAX_LENGTH else f"{length:.3g} mm"
        raise ValueError(
            f"{path}: {told} long after its affine; correct the spacing, which has to be in millimetres, or the unit in its "
            "header (xyzt_units)."
        )


class LoadSequencesd(MapTransform):
    """Read the sequences of a scan into one image (len(sequences), H, W, D), float32, on the scan's own grid.

    ``data[key]`` is one path or a list of paths in the order of ``sequences``. One path is a 3-D file (NIfTI, MetaImage,
    NRRD), a 4-D one with the sequences along its last axis, a folder with one DICOM series (read through ITK) or, if
    ``min_ndim`` is 2, a picture, which becomes (C, H, W). Colours become grey; the 8 bits of a picture stay 0 to 255. In a
    list, ``None`` stands for a missing sequence. ``meta["filename_or_obj"]`` is the first path, ``meta["sequences"]`` what
    the channels hold, such as ``t1,flair,t1ce<-flair`` where FLAIR stands in for T1ce. Files on other grids are brought to
    that of the first by the affines of both, see :func:`scripts.data.affines.on_grid_of`. Of a NIfTI header in metres or
    microns, and of one whose two affines contradict each other, a warning says what was taken.

    PNG, JPEG, TIFF and BMP have no geometry. Such a picture is taken to be in radiological view, the patient's left on
    the right, front up, with pixels of 1 mm: its affine is diag(-1, -1, 1, 1), its orientation LPS.

    Args:
        keys: keys of the paths.
        sequences: names of the sequences that the bundle expects, in order.
        stand_in: the sequence that takes the place of missing ones; a lone single-channel file then stands for all
            sequences. ``None``: every sequence must be given.
        min_ndim: least number of spatial axes, 3 for volumes (of one slice or more), 2 to accept pictures as well.
        as_volume: make a 2-D image a volume of one slice, (C, H, W, 1), with an affine of 4 x 4.
        allow_empty: take images whose voxels are all equal: masks, and slices beside the head.
        allow_missing_keys: don't raise an error if a key is missing.

    Raises:
        ValueError: in one line with the file's name and the mend, for a file that is missing, may not be read, can't
            be read or is no image, a folder that isn't one DICOM series (see :func:`scripts.data.dicom.read_series`), too
            few axes, too many voxels, an affine that is none, the wrong number of sequences, a field of view that does not
            meet that of the first, voxels that are no finite numbers, or (without ``allow_empty``) that are all equal.
    """

    def __init__(
        self,
        keys: KeysCollection,
        sequences: Sequence[str],
        stand_in: str | None = None,
        min_ndim: int = 3,
        as_volume: bool = False,
        allow_empty: bool = False,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.sequences = ensure_tuple(sequences)
        self.stand_in = stand_in
        self.min_ndim = min_ndim
        self.as_volume = as_volume
        self.allow_empty = allow_empty
        self.wanted = f"{len(self.sequences)} ({', '.join(self.sequences)})"
        self.loader = LoadImage(image_only=True, ensure_channel_first=True)
        self.picture_reader = _PictureReader(converter=_to_grey)
        self.nifti_reader = _NiftiReader()
        self.loader.register(SeriesReader())
        self.loader.register(self.nifti_reader)
        self.loader.register(self.picture_reader)
        if stand_in is not None and stand_in not in self.sequences:
            raise ValueError(f"stand_in must be one of {', '.join(self.sequences)}, got {stand_in}.")

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            paths = ensure_tuple(d[key])
            d[key] = self._load_single(paths[0]) if len(paths) == 1 else self._load_list(paths)
        return d

    def _load_single(self, path: str | os.PathLike) -> MetaTensor:
        image = self._read(path)
        if len(image) == 1 and self.stand_in is not None:
            image = torch.cat([image] * len(self.sequences))
        if len(image) != len(self.sequences):
            raise ValueError(
                f"{path}: the number of sequences is {len(image)}, this bundle wants {self.wanted}; "
                "give one 4-D file with them along its last axis, or one file for each, in this order."
            )
        return self._named(image, path)

    def _load_list(self, paths: Sequence[str | os.PathLike | None]) -> MetaTensor:
        given = [path for path in paths if path is not None]
        case = given[0] if given else "empty list"
        if len(paths) != len(self.sequences):
            raise ValueError(
                f"{case}: the list has {len(paths)} files, this bundle wants {self.wanted}; "
                "give one for each, in this order, and null for a missing one."
            )
        images = {name: self._read(path) for name, path in zip(self.sequences, paths, strict=True) if path is not None}
        missing = [name for name in self.sequences if name not in images]
        if missing and self.stand_in not in images:
            raise ValueError(
                f"{case}: no file for {', '.join(missing)}; this bundle wants {self.wanted}, "
                + (f"and at least {self.stand_in}." if self.stand_in else "add the missing ones.")
            )
        first = next(iter(images.values()))
        for (name, image), path in zip(images.items(), given, strict=True):
            if len(image) != 1:
                raise ValueError(f"{path}: {len(image)} sequences where {name} is expected; give a file with it alone.")
            images[name] = on_grid_of(image, first)
        stacked = torch.cat([images.get(name, images.get(self.stand_in)) for name in self.sequences])
        return self._named(with_meta(stacked.as_tensor(), like=first), case)

    def _named(self, image: MetaTensor, case: str | os.PathLike) -> MetaTensor:
        """The image, which says what its channels hold; some data sets repeat the stand-in in a file of its own."""
        names = list(self.sequences)
        if self.stand_in is not None:
            present = image[names.index(self.stand_in)].as_tensor()
            for i, name in enumerate(self.sequences):
                if name != self.stand_in and torch.equal(image[i].as_tensor(), present):
                    names[i] = f"{name}<-{self.stand_in}"
        image.meta["sequences"] = ",".join(names)
        if missing := [name.split("<-")[0] for name in names if "<-" in name]:
            logger.warning(f"{case}: {self.stand_in} stands in for {', '.join(missing)}, which makes results worse")
        return image

    def _read(self, path: str | os.PathLike) -> MetaTensor:
        scan = None
        try:
            Path(path).expanduser().stat()  # tells a missing file from one behind a closed folder
            if not os.access(Path(path).expanduser(), os.R_OK):
                raise PermissionError
            if self.nifti_reader.verify_suffix(path):
                scan = _check_nifti(path)
                self._check_geometry(path, stated_affine(scan), scan.shape)
            elif str(path).lower().endswith(ITK_ENDINGS):
                _check_volume(path)
            image = self.loader(path)
            if scan is not None:
                loaded = convert_to_numpy(image.affine)
                affine = taken_affine(path, scan, loaded)
                if not np.array_equal(affine, loaded):
                    image = with_meta(image.as_tensor(), image, affine=torch.as_tensor(affine), original_affine=affine)
        except FileNotFoundError as error:
            raise ValueError(f"{path}: no such file, or a folder without DICOM images; check the path.") from error
        except PermissionError as error:
            raise ValueError(f"{path}: no permission to read it; change its mode (chmod u+r) or its owner.") from error
        except Exception as error:  # each of the readers has its own ways to fail
            if isinstance(error, ValueError) and str(error).startswith(str(path)):
                raise
            raise ValueError(
                f"{path}: unreadable ({type(error).__name__}), cut short or not an image; copy it again, or convert it "
                "to NIfTI."
            ) from error
        voxels = image.as_tensor()
        if not self.min_ndim <= voxels.ndim - 1 <= 3:
            wanted = "3-D" if self.min_ndim == 3 else "2-D or 3-D"
            raise ValueError(
                f"{path}: {voxels.ndim - 1}-D image, this bundle wants {wanted}; "
                "give a NIfTI file with a volume (4-D with several sequences) or a folder with a DICOM series."
            )
        if not self.picture_reader.verify_suffix(path):
            self._check_geometry(path, convert_to_numpy(image.affine), voxels.shape[1:])
        if not (voxels.abs() <= MAX_LEVEL).all():
            raise ValueError(
                f"{path}: NaN or infinite voxels, or above {MAX_LEVEL:g}; replace them (numpy.nan_to_num) and save it again."
            )
        for number, channel in enumerate(voxels, start=1):
            if channel.min() == channel.max() and not self.allow_empty:
                raise ValueError(
                    f"{path}: empty, all voxels of sequence {number} are {channel.min():g}; export the scan again."
                )
        return self._place(image, path)

    def _check_geometry(self, path: str | os.PathLike, affine: np.ndarray, shape: Sequence[int]) -> None:
        _check_geometry(path, affine, shape)

    def _place(self, image: MetaTensor, path: str | os.PathLike) -> MetaTensor:
        """The image with the affine of a picture if it is one, and with three axes if they are wanted."""
        if self.picture_reader.verify_suffix(path):
            affine = torch.from_numpy(PICTURE_AFFINE.copy())
            image = with_meta(image.as_tensor(), image, affine=affine, original_affine=affine.numpy(), space="RAS")
            image.meta["has_geometry"] = False
        if self.as_volume and image.ndim == 3:
            affine = torch.as_tensor(to_affine_nd(3, image.affine))
            image = with_meta(
                image.as_tensor()[..., None],
                image,
                affine=affine,
                original_affine=affine.numpy(),
                spatial_shape=np.array([*image.shape[1:], 1]),
            )
            image.spatial_ndim = 3  # MONAI keeps the 2 of a picture, by which Resize would drop the new axis again
        return image
