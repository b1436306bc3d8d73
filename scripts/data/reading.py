"""Reads scans and pictures of any format into one tensor with the sequences as channels, and refuses what is none."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor, PILReader
from monai.data.utils import is_supported_format, to_affine_nd
from monai.transforms import LoadImage, MapTransform
from monai.utils import convert_to_numpy, ensure_tuple
from PIL.Image import Image

from scripts.data.dicom import read_series
from scripts.transforms import with_meta

__all__ = ["LoadSequencesd", "PICTURE_AFFINE"]

logger = logging.getLogger(__name__)

# MONAI's arrays of pictures are (x, y) with y downwards; without a word it takes them to be RAS
PICTURE_AFFINE = np.diag([-1.0, -1.0, 1.0, 1.0])
MAX_DEFLATE = 1032  # bytes that gzip can make of one
MAX_VOXELS = 2**29  # of all sequences: 2 GB as float32
MAX_LEVEL = 1e30  # of a voxel, in its own unit: near the end of float32 results would be infinite
MIN_EDGE, MAX_LENGTH = 1e-3, 3000.0  # mm, of a voxel and of a scan


def _to_grey(picture: Image) -> Image:
    """A picture with one channel: 16 and 32 bit stay as they are, everything else becomes 0..255."""
    if getattr(picture, "n_frames", 1) > 1 and picture.format == "TIFF":
        raise ValueError("several pages, of which only the first would be read")
    if picture.mode.startswith(("I", "F")):
        return picture
    grey = picture.convert("L")
    grey.format = picture.format  # conversion sets it to None, which no batch of meta data can hold
    return grey


class _PictureReader(PILReader):
    """MONAI's reader of pictures, for TIFF too, which would else go to ITK and keep its colours."""

    suffixes = ("png", "jpg", "jpeg", "bmp", "tif", "tiff")

    def verify_suffix(self, filename: Sequence[str | os.PathLike] | str | os.PathLike) -> bool:
        return is_supported_format(filename, self.suffixes)


def _check_nifti(path: str | os.PathLike) -> nib.spatialimages.SpatialImage:
    """Refuse a file whose header promises more than the file can hold or memory can, or return it, unread.

    MONAI takes the memory before it reads, and puts another affine in the place of one that is none.
    """
    scan = nib.load(path)
    count = math.prod(scan.shape)
    most = os.stat(path).st_size * (MAX_DEFLATE if str(path).endswith(".gz") else 1)
    if count * scan.get_data_dtype().itemsize > most:
        raise ValueError(
            f"{path}: unreadable, cut short or damaged: its header promises {' x '.join(map(str, scan.shape))} voxels; "
            "copy it again."
        )
    if count > MAX_VOXELS:
        raise ValueError(f"{path}: {count} voxels, more than {MAX_VOXELS}; cut the scan or resample it.")
    return scan


def _check_geometry(path: str | os.PathLike, affine: np.ndarray, shape: Sequence[int]) -> None:
    """Refuse a volume whose affine is none, or says that it is larger than any scanner; a slice may have none."""
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
    if length > MAX_LENGTH:
        raise ValueError(
            f"{path}: {length / 1000:.3g} m long after its affine; correct the spacing, which has to be in millimetres."
        )


class LoadSequencesd(MapTransform):
    """Read the sequences of a scan into one image (len(sequences), H, W, D), float32, on the scan's own grid.

    ``data[key]`` is one path or a list of paths in the order of ``sequences``. One path is a 3-D NIfTI file, a 4-D one
    with the sequences along its last axis, a folder with one DICOM series (read through ITK) or, if ``min_ndim`` is 2,
    a picture, which becomes (C, H, W). Colours become grey; the 8 bits of a picture stay 0 to 255. In a list, ``None``
    stands for a missing sequence. ``meta["filename_or_obj"]`` is the first path, ``meta["sequences"]`` what the channels
    hold, such as ``t1,flair,t1ce<-flair`` where FLAIR stands in for T1ce.

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
            few axes, too many voxels, an affine that is none, the wrong number of sequences, another grid than the first
            sequence, voxels that are no finite numbers, or (without ``allow_empty``) voxels that are all equal.
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
            if image.shape != first.shape or not torch.allclose(image.affine, first.affine, rtol=0, atol=1e-2):
                raise ValueError(
                    f"{path}: shape {tuple(image.shape[1:])} or affine differs from {case} with "
                    f"{tuple(first.shape[1:])}; register and resample the sequences to one grid first."
                )
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
        try:
            Path(path).expanduser().stat()  # tells a missing file from one behind a closed folder
            if not os.access(Path(path).expanduser(), os.R_OK):
                raise PermissionError
            if str(path).endswith((".nii", ".nii.gz")):
                scan = _check_nifti(path)
                self._check_geometry(path, scan.affine, scan.shape)
            image = self.loader(path)
        except FileNotFoundError as error:
            raise ValueError(f"{path}: no such file, or a folder without DICOM images; check the path.") from error
        except PermissionError as error:
            raise ValueError(f"{path}: no permission to read it; change its mode (chmod u+r) or its owner.") from error
        except Exception as error:  # each of the readers has its own ways to fail
            if str(error).startswith(f"{path}: "):
                raise
            raise ValueError(
                f"{path}: unreadable ({type(error).__name__}), cut short or not an image; copy it again, or convert it "
                "to NIfTI."
            ) from error
        if Path(path).expanduser().is_dir():
            read_series(path)  # refuses what ITK reads without a word, though it isn't one series
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
