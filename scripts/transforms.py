"""Transforms that all bundles share: reading scans, scaling grey levels, cutting slices, sprites, masks.

Arrays are channel first, ``(C, H, W)`` or ``(C, H, W, D)``, as everywhere in MONAI.
"""

from __future__ import annotations

import math
import os
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai import transforms as monai_transforms
from monai.config import KeysCollection, NdarrayOrTensor
from monai.data import MetaTensor, PILReader
from monai.data.utils import affine_to_spacing, is_supported_format, to_affine_nd
from monai.transforms import (
    Compose,
    GaussianSmooth,
    InvertibleTransform,
    LoadImage,
    MapTransform,
    RandomizableTransform,
    Resize,
    ResizeWithPadOrCrop,
    Spacing,
    Transform,
)
from monai.transforms.traits import MultiSampleTrait
from monai.transforms.utils_pytorch_numpy_unification import percentile
from monai.utils import convert_to_dst_type, convert_to_numpy, convert_to_tensor, ensure_tuple, ensure_tuple_rep
from PIL.Image import Image
from scipy import ndimage
from skimage.filters import threshold_otsu
from torch import Tensor

from scripts.dicom import read_series

__all__ = [
    "ExtractSlicesd",
    "FitSlicesd",
    "LoadSequencesd",
    "MapToMask",
    "MapToMaskd",
    "PICTURE_AFFINE",
    "RandSprited",
    "RandStandInd",
    "RemoveSmallLesions",
    "RemoveSmallLesionsd",
    "RestoreIntensityd",
    "ScaleIntensityByForeground",
    "ScaleIntensityByForegroundd",
    "ScaleIntensityByWindow",
    "ScaleIntensityByWindowd",
    "SeededNoised",
    "Spacingd",
    "SplitPredictiond",
    "cohort_otsu",
    "has_foreground",
    "seeded_noise",
]

# MONAI's arrays of pictures are (x, y) with y downwards; without a word it takes them to be RAS
PICTURE_AFFINE = np.diag([-1.0, -1.0, 1.0, 1.0])


MAX_DEFLATE = 1032  # bytes that gzip can make of one
MAX_VOXELS = 2**29  # of all sequences: 2 GB as float32
MAX_LEVEL = 1e30  # of a voxel, in its own unit: near the end of float32 results would be infinite
MIN_EDGE, MAX_LENGTH = 1e-3, 3000.0  # mm, of a voxel and of a scan


def has_foreground(image: Tensor, level: float = 0.1, share: float = 0.05) -> Tensor:
    """Which slices show enough of the body to be worth a look.

    Args:
        image: slices (B, C, H, W), or any further spatial axes.
        level: a pixel is foreground if any of its channels is above this grey level.
        share: least share of foreground pixels, in [0, 1].

    Returns:
        bool tensor (B,).
    """
    return (image > level).any(dim=1).flatten(1).float().mean(dim=1) >= share


def _with_meta(result: Tensor, like: MetaTensor, **meta: Any) -> MetaTensor:
    """``result`` with a copy of the meta data of ``like``, and ``meta`` added to it."""
    image = convert_to_dst_type(result, like, dtype=result.dtype)[0]
    image.meta.update(meta)
    return image


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
    stands for a missing sequence. ``meta["filename_or_obj"]`` is the first path.

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
            be read or is no image, a folder that isn't one DICOM series (see :func:`scripts.dicom.read_series`), too few
            axes, too many voxels, an affine that is none, the wrong number of sequences, another grid than the first
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
        return image

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
        return _with_meta(stacked.as_tensor(), like=first)

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
            image = _with_meta(image.as_tensor(), image, affine=affine, original_affine=affine.numpy(), space="RAS")
        if self.as_volume and image.ndim == 3:
            affine = torch.as_tensor(to_affine_nd(3, image.affine))
            image = _with_meta(
                image.as_tensor()[..., None],
                image,
                affine=affine,
                original_affine=affine.numpy(),
                spatial_shape=np.array([*image.shape[1:], 1]),
            )
            image.spatial_ndim = 3  # MONAI keeps the 2 of a picture, by which Resize would drop the new axis again
        return image


def seeded_noise(seed: int, shape: Sequence[int]) -> Tensor:
    """Standard normal noise of any shape, float32, which depends on the seed alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class SeededNoised(MapTransform):
    """Draw the noise that a generative network starts from, see :func:`seeded_noise`.

    Args:
        keys: keys of the noise.
        shape: its shape (C, H, W[, D]).
        seed_key: key of the seed, a whole number of 0 or more.
    """

    def __init__(self, keys: KeysCollection, shape: Sequence[int], seed_key: str = "seed") -> None:
        super().__init__(keys)
        self.shape, self.seed_key = tuple(shape), seed_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        return {**data, **{key: seeded_noise(data[self.seed_key], self.shape) for key in self.keys}}


class ScaleIntensityByForeground(Transform):
    """Scale each channel of a volume so that 0 stays 0 and the foreground's median becomes ``foreground_median``.

    Foreground are the voxels above ``foreground_fraction`` times the ``percentile`` of the positive voxels. Values are
    clipped to [0, 1], negative ones (CT, or after resampling) to 0; a channel without a positive voxel gives zeros.

    Why the median and not a high percentile: bright fat decides the latter. Over the patients of TCGA-LGG (FLAIR) the
    brain's grey level has a coefficient of variation of 0.08 after this scaling, and of 0.21 after a division by the
    99.5th percentile.

    ``meta["intensity_scale"]`` of the result is a list with one factor a channel, by which a scaled value has to be
    multiplied to be in the scan's own unit again (1 for a channel of zeros); :class:`RestoreIntensityd` does that. Not
    an ``InvertibleTransform`` on purpose: ``Invertd`` of a prediction would rescale the anomaly map too.

    Args:
        foreground_median: where the foreground's median goes, in (0, 1).
        foreground_fraction: share of the percentile above which a voxel is foreground, in [0, 1).
        percentile: percentile of the positive voxels, in [0, 100].
    """

    def __init__(self, foreground_median: float = 0.4, foreground_fraction: float = 0.1, percentile: float = 99.5) -> None:
        self.foreground_median = foreground_median
        self.foreground_fraction = foreground_fraction
        self.percentile = percentile

    def __call__(self, img: NdarrayOrTensor) -> MetaTensor:
        """
        Args:
            img: volume or slice (C, H, W[, D]), any unit.

        Returns:
            float32, same shape, in [0, 1].
        """
        image = convert_to_tensor(img, dtype=torch.float32, track_meta=True)
        channels = image.as_tensor()
        scales = [self._scale(channel) for channel in channels]
        scaled = [(channel / scale).clamp(0, 1) for channel, scale in zip(channels, scales, strict=True)]
        return _with_meta(torch.stack(scaled), like=image, intensity_scale=scales)

    def _scale(self, channel: Tensor) -> float:
        positive = channel[channel > 0]
        if len(positive) == 0:
            return 1.0
        foreground = positive[positive > self.foreground_fraction * percentile(positive, self.percentile)]
        return float(percentile(foreground, 50)) / self.foreground_median


class ScaleIntensityByForegroundd(MapTransform):
    """Dictionary form of :class:`ScaleIntensityByForeground`.

    Args:
        keys: keys of the images.
        foreground_median: see there.
        foreground_fraction: see there.
        percentile: see there.
        allow_missing_keys: don't raise an error if a key is missing.
    """

    def __init__(
        self,
        keys: KeysCollection,
        foreground_median: float = 0.4,
        foreground_fraction: float = 0.1,
        percentile: float = 99.5,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.scaler = ScaleIntensityByForeground(foreground_median, foreground_fraction, percentile)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = self.scaler(d[key])
        return d


class ScaleIntensityByWindow(Transform):
    """Bring CT to [0, 1]: Hounsfield units by a window, the grey levels of pictures by a division by 255.

    ``meta`` of the result gets ``units`` (``hounsfield`` or ``grey``) and, as lists with one number a channel,
    ``intensity_scale`` and ``intensity_offset``: a scaled value times the one plus the other is in the scan's own unit
    again, up to clipping; :class:`RestoreIntensityd` does that. Not an ``InvertibleTransform`` for the same reason as
    :class:`ScaleIntensityByForeground`.

    Args:
        window: the values lo and hi, in Hounsfield units, that become ``darkest`` and 1; what lies outside is clipped.
        units: ``hounsfield``; ``grey``, 0 to 255, clipped; or ``auto``, which is ``hounsfield`` if any voxel is negative,
            else ``grey``: 8-bit pictures have no negative values, and a CT in Hounsfield units always shows air. A CT
            without it, such as a brain cut out of its skull, needs ``hounsfield`` said.
        darkest: grey level of what lies at or below the window, in [0, 1).

    Raises:
        ValueError: for unknown units, or a window that is no two numbers lo < hi.
    """

    def __init__(self, window: Sequence[float], units: str = "auto", darkest: float = 0.0) -> None:
        if units not in ("auto", "hounsfield", "grey"):
            raise ValueError(f"units must be auto, hounsfield or grey, got {units}.")
        if len(window) != 2 or not window[0] < window[1]:
            raise ValueError(f"window must be two numbers, the lower one first, got {window}.")
        self.low, self.high = map(float, window)
        self.units, self.darkest = units, darkest

    def __call__(self, img: NdarrayOrTensor) -> MetaTensor:
        """
        Args:
            img: volume or slice (C, H, W[, D]), Hounsfield units or grey levels from 0 to 255.

        Returns:
            float32, same shape, in [0, 1].

        Raises:
            ValueError: with the file's name, if grey levels exceed 255.
        """
        image = convert_to_tensor(img, dtype=torch.float32, track_meta=True)
        voxels = image.as_tensor()
        units = self.units
        if units == "auto":
            units = "hounsfield" if voxels.min() < 0 else "grey"
        if units == "grey" and voxels.max() > 255:
            raise ValueError(
                f"{image.meta.get('filename_or_obj', 'image')}: grey levels up to {voxels.max():g}, pictures have 0 to 255; "
                "give --units hounsfield if this is a CT, else save it with 8 bits."
            )
        offset, scale, darkest = 0.0, 255.0, 0.0
        if units == "hounsfield":
            scale, darkest = (self.high - self.low) / (1 - self.darkest), self.darkest
            offset = self.high - scale
        return _with_meta(
            ((voxels - offset) / scale).clamp(darkest, 1),
            like=image,
            units=units,
            intensity_scale=[scale] * len(voxels),
            intensity_offset=[offset] * len(voxels),
        )


class ScaleIntensityByWindowd(MapTransform):
    """Dictionary form of :class:`ScaleIntensityByWindow`.

    Args:
        keys: keys of the images.
        window: see there.
        units: see there.
        darkest: see there.
        allow_missing_keys: don't raise an error if a key is missing.
    """

    def __init__(
        self,
        keys: KeysCollection,
        window: Sequence[float],
        units: str = "auto",
        darkest: float = 0.0,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.scaler = ScaleIntensityByWindow(window, units, darkest)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = self.scaler(d[key])
        return d


class RestoreIntensityd(MapTransform):
    """Bring a scaled image, such as the pseudo-healthy one, back to the scan's own unit.

    Channel ``i`` is multiplied by ``meta["intensity_scale"][i]`` of ``data[ref_key]``, and ``meta["intensity_offset"][i]``,
    if there is one, is added; see :class:`ScaleIntensityByForeground` and :class:`ScaleIntensityByWindow`.

    Args:
        keys: keys of the images (C, H, W[, D]) to restore.
        ref_key: key of the scaled scan.
        allow_missing_keys: don't raise an error if a key is missing.

    Raises:
        ValueError: if an image has more channels than the scan.
    """

    def __init__(self, keys: KeysCollection, ref_key: str = "image", allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.ref_key = ref_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        scales = d[self.ref_key].meta["intensity_scale"]
        offsets = d[self.ref_key].meta.get("intensity_offset", [0.0] * len(scales))
        for key in self.key_iterator(d):
            image = d[key]
            if len(image) > len(scales):
                raise ValueError(f"{key} has {len(image)} channels, but {self.ref_key} only {len(scales)} scales.")
            scale, offset = (
                torch.tensor(numbers[: len(image)], dtype=image.dtype, device=image.device).reshape(
                    -1, *[1] * (image.ndim - 1)
                )
                for numbers in (scales, offsets)
            )
            d[key] = image * scale + offset
        return d


class Spacingd(monai_transforms.Spacingd):
    """MONAI's Spacingd, which sees the images alone.

    MONAI's copies what it knows of ``image`` into every item whose key begins with ``image_``, and fails where that is no
    dictionary, as MONAI Label's ``image_path``.
    """

    def __call__(self, data: Mapping[Hashable, Any], lazy: bool | None = None) -> dict[Hashable, Any]:
        return {**data, **super().__call__({key: data[key] for key in self.keys if key in data}, lazy)}


class FitSlicesd(MapTransform, InvertibleTransform):
    """Bring the slices of a volume (C, H, W, D) to the network's size; the number of slices stays.

    A CT in Hounsfield units (``meta["units"]`` of :class:`ScaleIntensityByWindow`) is resampled in the plane to
    ``pixdim`` and then cut or padded. Everything else, pictures and stacks of them, has no
    millimetres to trust: each slice is stretched to the size, and left bit for bit if it has it already. Both smooth
    before they sample more coarsely, or else the noise of a fine grid would stay in full.

    The inverse is on the grid of the input. It reads the way that was taken from the image's trace, which ``Invertd``
    hands to the prediction.

    Args:
        keys: keys of the volumes, scaled to [0, 1], with slices along the last axis.
        spatial_size: height and width of a slice in pixels.
        pixdim: edge of a pixel in millimetres, for CT.
        darkest: grey level that a CT is padded with.
        allow_missing_keys: don't raise an error if a key is missing.
    """

    def __init__(
        self,
        keys: KeysCollection,
        spatial_size: Sequence[int],
        pixdim: float,
        darkest: float = 0.0,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.spatial_size = tuple(spatial_size)
        self.pixdim = pixdim
        size = [*spatial_size, -1]
        self.ways = {
            "millimetres": Compose([Spacing(pixdim=[pixdim, pixdim, -1]), ResizeWithPadOrCrop(size, value=darkest)]),
            "stretched": Compose([Resize(size, mode="trilinear", anti_aliasing=True)]),
        }

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            image = convert_to_tensor(d[key], track_meta=True).clone()  # its trace will be written to
            size = image.shape[1:]
            if image.meta.get("units") == "hounsfield":
                way, image = "millimetres", self._smooth(image)
            else:
                way = "as it is" if tuple(size[:2]) == self.spatial_size else "stretched"
            d[key] = self.ways[way](image) if way in self.ways else image
            self.push_transform(d[key], orig_size=size, extra_info={"way": way})
        return d

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            way = self.pop_transform(d[key])["extra_info"]["way"]
            if way in self.ways:
                d[key] = self.ways[way].inverse(d[key])
        return d

    def _smooth(self, image: MetaTensor) -> MetaTensor:
        """The image without what the coarser grid can't show; the width is that of MONAI's and scikit-image's resize."""
        factors = self.pixdim / affine_to_spacing(image.affine, 3)[:2]
        sigma = [max((float(factor) - 1) / 2, 0.0) for factor in factors]
        return GaussianSmooth([*sigma, 0.0])(image) if any(sigma) else image


class ExtractSlicesd(MapTransform, MultiSampleTrait):
    """Cut a preprocessed volume into a list of labelled slices for training.

    Each slice is a dictionary with the image (C, H, W) as a plain float32 tensor, ``class_key`` (0 healthy, 1
    diseased), ``slice`` (index), ``position`` (index / (n - 1), in [0, 1]; 0 for a volume of one slice), and all other
    entries of the volume's dictionary that are no arrays. Slices that show too little of the body are left out.

    The classes come from the mask ``data[label_key]`` (1, H, W, D) if there is one, else from
    ``data[slice_labels_key]``, 0 or 1 for each slice. With a mask, slices with 1 to ``min_lesion_area - 1`` positive
    pixels are ambiguous and left out. A 2-D image (C, H, W) has its class in ``data[class_key]`` and gives one slice,
    whatever it shows. With ``labelled=False``, for training on healthy scans only, every slice has class 0.

    Args:
        keys: keys of the images; the first one decides what is foreground.
        label_key: key of the mask.
        class_key: key of the class, in the result and for 2-D images in the input.
        slice_labels_key: key of the classes of all slices.
        spatial_dim: the spatial axis to cut along.
        foreground_level: grey level above which a pixel is foreground, see :func:`has_foreground`.
        min_foreground: least share of foreground pixels in a slice, in [0, 1]; 0 keeps every slice.
        min_lesion_area: least number of positive pixels in a diseased slice.
        labelled: look for labels; if not, every slice is healthy, and a mask is ignored.
        allow_missing_keys: don't raise an error if a key is missing.

    Raises:
        ValueError: with the case's name, if there are no labels, or not as many as slices.
    """

    def __init__(
        self,
        keys: KeysCollection = ("image",),
        label_key: str = "label",
        class_key: str = "class_label",
        slice_labels_key: str = "slice_labels",
        spatial_dim: int = 2,
        foreground_level: float = 0.1,
        min_foreground: float = 0.05,
        min_lesion_area: int = 20,
        labelled: bool = True,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.label_key = label_key
        self.class_key = class_key
        self.slice_labels_key = slice_labels_key
        self.spatial_dim = spatial_dim
        self.foreground_level = foreground_level
        self.min_foreground = min_foreground
        self.min_lesion_area = min_lesion_area
        self.labelled = labelled

    def __call__(self, data: Mapping[Hashable, Any]) -> list[dict[Hashable, Any]]:
        images = {
            key: convert_to_tensor(data[key], dtype=torch.float32, track_meta=False) for key in self.key_iterator(data)
        }
        used = {*images, self.label_key, self.class_key, self.slice_labels_key}
        rest = {k: v for k, v in data.items() if k not in used and not isinstance(v, (np.ndarray, Tensor))}
        first_key = self.first_key(data)
        case = getattr(data[first_key], "meta", {}).get("filename_or_obj", rest or first_key)

        if images[first_key].ndim == 3:
            if self.labelled and self.class_key not in data:
                raise ValueError(f"{case}: a 2-D image without a class; add its class (0 or 1) as {self.class_key}.")
            label = int(data[self.class_key]) if self.labelled else 0
            return [{**rest, **images, self.class_key: label, "slice": 0, "position": 0.0}]

        stacks = {key: image.movedim(self.spatial_dim + 1, 0) for key, image in images.items()}
        shown = has_foreground(stacks[first_key], self.foreground_level, self.min_foreground)
        classes = self._classes(data, case, len(shown))
        return [
            {
                **rest,
                # a view would keep the whole volume in memory and in every pickle
                **{key: stack[i].clone(memory_format=torch.contiguous_format) for key, stack in stacks.items()},
                self.class_key: classes[i],
                "slice": i,
                "position": i / max(len(shown) - 1, 1),
            }
            for i in range(len(shown))
            if shown[i] and classes[i] is not None
        ]

    def _classes(self, data: Mapping[Hashable, Any], case: Any, num_slices: int) -> list[int | None]:
        """0 or 1 for each slice, or None where that is ambiguous."""
        if not self.labelled:
            return [0] * num_slices
        if self.label_key in data:
            mask = convert_to_tensor(data[self.label_key], track_meta=False)
            areas = (mask > 0).movedim(self.spatial_dim + 1, 0).flatten(1).sum(dim=1).tolist()
            labels = [0 if area == 0 else 1 if area >= self.min_lesion_area else None for area in areas]
        elif self.slice_labels_key in data:
            labels = [int(label) for label in data[self.slice_labels_key]]
        else:
            raise ValueError(
                f"{case}: no labels; add a mask as {self.label_key}, or 0 or 1 for each slice as {self.slice_labels_key}."
            )
        if len(labels) != num_slices:
            raise ValueError(f"{case}: {len(labels)} slice labels for {num_slices} slices; give one for each slice.")
        return labels


class SplitPredictiond(MapTransform):
    """Cut the channels of a prediction, in order, into new entries of the dictionary; the meta data are kept.

    Args:
        keys: key of the prediction (C, H, W[, D]).
        channels: name and number of channels of each part, such as ``{"map": 1, "healthy": 3}``.
        allow_missing_keys: don't raise an error if a key is missing.

    Raises:
        ValueError: if the numbers do not add up to the prediction's channels.
    """

    def __init__(self, keys: KeysCollection, channels: dict[str, int], allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.channels = channels

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            sizes = list(self.channels.values())
            if len(d[key]) != sum(sizes):
                raise ValueError(f"{key} has {len(d[key])} channels, but {self.channels} need {sum(sizes)}.")
            d.update(zip(self.channels, torch.split(d[key], sizes), strict=True))
        return d


class MapToMask(Transform):
    """Cut an anomaly map into a mask: 1 where the map is above a threshold, which goes to ``meta["threshold"]``.

    Args:
        threshold: a number, or ``otsu`` for Otsu's threshold of the positive values of this map (Otsu 1979, IEEE Trans.
            Syst. Man Cybern. 9:62).
        minimum: floor of Otsu's threshold; without it the map of a case without any lesion would be cut in two as well.

    Raises:
        ValueError: if the threshold is neither a number nor ``otsu``.
    """

    def __init__(self, threshold: float | str = "otsu", minimum: float = 0.0) -> None:
        self.threshold = threshold if threshold == "otsu" else float(threshold)
        self.minimum = minimum

    def __call__(self, img: NdarrayOrTensor) -> MetaTensor:
        """
        Args:
            img: anomaly map (1, H, W[, D]), zero or positive.

        Returns:
            uint8, same shape and meta data; empty for a map that is all zero.
        """
        image = convert_to_tensor(img, track_meta=True)
        threshold = self._otsu(convert_to_numpy(image)) if self.threshold == "otsu" else self.threshold
        return _with_meta((image.as_tensor() > threshold).to(torch.uint8), like=image, threshold=threshold)

    def _otsu(self, anomaly_map: np.ndarray) -> float:
        positive = anomaly_map[anomaly_map > 0]
        return max(float(threshold_otsu(positive)), self.minimum) if positive.size else self.minimum


class MapToMaskd(MapTransform):
    """Dictionary form of :class:`MapToMask`.

    Args:
        keys: keys of the maps.
        output_keys: keys of the masks.
        threshold: see there.
        minimum: see there.
        allow_missing_keys: don't raise an error if a key is missing.
    """

    def __init__(
        self,
        keys: KeysCollection = "map",
        output_keys: KeysCollection = "pred",
        threshold: float | str = "otsu",
        minimum: float = 0.0,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.output_keys = ensure_tuple_rep(output_keys, len(self.keys))
        self.cutter = MapToMask(threshold, minimum)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key, output_key in self.key_iterator(d, self.output_keys):
            d[output_key] = self.cutter(d[key])
        return d


def cohort_otsu(directory: str | os.PathLike, pattern: str = "*/*_map.nii.gz") -> float:
    """Otsu's threshold of the positive values of all saved maps together, for :class:`MapToMask`.

    The maps are read one after the other, twice (range, then one pooled histogram), so that memory does not grow with
    their number.

    Args:
        directory: folder with the results.
        pattern: which files below it are maps.

    Returns:
        the threshold, in the unit of the maps.

    Raises:
        ValueError: if there is no map, or no map has a positive value.
    """
    paths = sorted(Path(directory).glob(pattern))
    if not paths:
        raise ValueError(f"{directory}: no map like {pattern}; give the folder that inference has written.")
    load = LoadImage(image_only=True)
    top = max(float(load(path).max()) for path in paths)
    if top <= 0:
        raise ValueError(f"{directory}: no map has a positive value, so no threshold parts them.")
    edges = np.linspace(0, top, 4097)
    counts = np.zeros(len(edges) - 1)
    for path in paths:
        values = convert_to_numpy(load(path))
        counts += np.histogram(values[values > 0], edges)[0]
    return float(threshold_otsu(hist=(counts, (edges[:-1] + edges[1:]) / 2)))


class RemoveSmallLesions(Transform):
    """Remove the connected components of a mask (joined by faces) that are smaller than a volume.

    Unlike MONAI's ``RemoveSmallObjects``, which multiplies the voxel's edges, this takes the determinant of the affine,
    so that volumes are right on a sheared grid too, such as head CT with a tilted gantry.

    Args:
        min_volume: least volume in millilitres; 0 changes nothing.
    """

    def __init__(self, min_volume: float) -> None:
        self.min_volume = min_volume

    def __call__(self, img: NdarrayOrTensor) -> MetaTensor:
        """
        Args:
            img: mask (1, H, W, D), 0 is background; its affine is in millimetres.

        Returns:
            same shape, type and meta data.
        """
        mask = convert_to_tensor(img, track_meta=True)
        voxel_volume = abs(float(torch.linalg.det(mask.affine[:3, :3]))) / 1000
        components, _ = ndimage.label(convert_to_numpy(mask))
        volumes = np.bincount(components.ravel()) * voxel_volume
        # background is component 0, where the mask is zero anyway; the tolerance is for rounding
        keep = volumes >= self.min_volume * (1 - 1e-6)
        return mask * convert_to_dst_type(keep[components], mask)[0]


class RemoveSmallLesionsd(MapTransform):
    """Dictionary form of :class:`RemoveSmallLesions`.

    Args:
        keys: keys of the masks.
        min_volume: least volume in millilitres.
        allow_missing_keys: don't raise an error if a key is missing.
    """

    def __init__(self, keys: KeysCollection, min_volume: float, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.remover = RemoveSmallLesions(min_volume)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = self.remover(d[key])
        return d


# Inside or not, for coordinates in units of the radius; ``aspect`` is the short axis of the ellipse. The factor 1.2
# keeps the heart within about the radius.
SPRITES = {
    "square": lambda x, y, aspect: np.maximum(abs(x), abs(y)) <= 1,
    "ellipse": lambda x, y, aspect: x**2 + (y / aspect) ** 2 <= 1,
    "heart": lambda x, y, aspect: ((1.2 * x) ** 2 + (1.2 * y) ** 2 - 1) ** 3 <= (1.2 * x) ** 2 * (1.2 * y) ** 3,
}


class RandSprited(RandomizableTransform, MapTransform):
    """Paint one synthetic anomaly into a slice, of constant grey unless it keeps the texture, and write its mask.

    Shape, place inside the head, size, rotation and grey level are random, as in Pinaya et al. 2022, arXiv 2206.03461.
    The sprite ends at the border of the head, whose holes count as head. A slice without foreground gets no sprite and
    an empty mask, and so does one that ``prob`` leaves out.

    Args:
        keys: keys of the slices (C, H, W), in [0, 1]; the first one says where the head is.
        mask_key: key of the mask, uint8 (1, H, W).
        radius: least and largest radius in pixels (half the side of a square, half the long axis of an ellipse).
        contrast: least difference, in each channel, between the grey level and the mean of what it covers, in [0, 0.5].
        texture: share, in [0, 1], of what lies there that shows through the sprite, without its mean: 0 gives one grey
            level, 1 what was there, darker or brighter.
        shapes: which shapes to draw from.
        level: grey level above which a pixel, in any channel, is foreground.
        prob: probability of a sprite.
        allow_missing_keys: don't raise an error if a key is missing.

    Raises:
        ValueError: for an unknown shape, a contrast that no grey level in [0, 1] may reach, or a texture that is no share.
    """

    def __init__(
        self,
        keys: KeysCollection = "image",
        mask_key: str = "label",
        radius: tuple[float, float] = (3, 9),
        contrast: float = 0.2,
        texture: float = 0.0,
        shapes: Sequence[str] = ("square", "ellipse", "heart"),
        level: float = 0.1,
        prob: float = 1.0,
        allow_missing_keys: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        RandomizableTransform.__init__(self, prob)
        if not set(shapes) <= set(SPRITES):
            raise ValueError(f"shapes must be among {', '.join(SPRITES)}, got {', '.join(shapes)}.")
        if not 0 <= contrast <= 0.5:
            raise ValueError(f"contrast must be in [0, 0.5], got {contrast}.")
        if not 0 <= texture <= 1:
            raise ValueError(f"texture must be in [0, 1], got {texture}.")
        self.mask_key = mask_key
        self.radius = radius
        self.contrast = contrast
        self.texture = texture
        self.shapes = shapes
        self.level = level

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        reference = d[self.first_key(d)]
        self.randomize((convert_to_numpy(reference) > self.level).any(axis=0))
        d[self.mask_key] = convert_to_dst_type(self.sprite[None], reference, dtype=torch.uint8)[0]
        if self.sprite.any():
            for key in self.key_iterator(d):
                d[key] = convert_to_dst_type(self._paint(convert_to_numpy(d[key])), d[key])[0]
        return d

    def randomize(self, foreground: np.ndarray) -> None:
        """Draw the sprite's pixels, bool (H, W), for a slice with this foreground."""
        super().randomize(None)
        self.sprite = np.zeros_like(foreground)
        if not self._do_transform or not foreground.any():
            return
        inside = SPRITES[self.shapes[self.R.randint(len(self.shapes))]]
        candidates = np.argwhere(foreground)
        row, column = candidates[self.R.randint(len(candidates))]
        radius = self.R.uniform(*self.radius)
        angle = self.R.uniform(0, 2 * math.pi)
        aspect = self.R.uniform(0.5, 1)
        rows, columns = np.indices(foreground.shape)
        y, x = (rows - row) / radius, (columns - column) / radius
        x, y = math.cos(angle) * x + math.sin(angle) * y, math.cos(angle) * y - math.sin(angle) * x
        self.sprite = inside(x, y, aspect) & ndimage.binary_fill_holes(foreground)

    def _paint(self, image: np.ndarray) -> np.ndarray:
        painted = image.copy()
        for channel in painted:
            mean = float(channel[self.sprite].mean())
            # uniform over [0, mean - contrast] and [mean + contrast, 1], laid end to end
            darker, brighter = max(mean - self.contrast, 0), max(1 - mean - self.contrast, 0)
            grey = self.R.uniform(0, darker + brighter)
            grey = grey if grey < darker else mean + self.contrast + (grey - darker)
            channel[self.sprite] = np.clip(grey + self.texture * (channel[self.sprite] - mean), 0, 1)
        return painted


class RandStandInd(RandomizableTransform, MapTransform):
    """Put one sequence in the place of all others, as :class:`LoadSequencesd` does for a patient who has only this one.

    Args:
        keys: keys of the images (C, H, W[, D]).
        channel: number of the sequence that stands in.
        prob: how often.
        allow_missing_keys: don't raise an error if a key is missing.
    """

    def __init__(self, keys: KeysCollection, channel: int, prob: float = 0.1, allow_missing_keys: bool = False) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        RandomizableTransform.__init__(self, prob)
        self.channel = channel

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        self.randomize(None)
        if self._do_transform:
            for key in self.key_iterator(d):
                d[key] = d[key][self.channel : self.channel + 1].expand_as(d[key]).clone()
        return d
