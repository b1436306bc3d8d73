"""Transforms of cines: reading the two ends of a motion and the frames between, and what a displacement makes of them.

A *cine* is (F, H, W, D), frames first; its first frame is the source (end-diastole), its last one the target
(end-systole). A displacement field of F frames has 3 F channels, the components x, y, z of one frame after the other.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.data.utils import is_supported_format
from monai.networks.blocks import Warp
from monai.transforms import MapTransform, ScaleIntensityRange
from monai.transforms.utils_pytorch_numpy_unification import percentile
from monai.utils import convert_to_dst_type, ensure_tuple, ensure_tuple_rep
from torch import Tensor

from scripts.cine_metrics import jacobian_determinant
from scripts.transforms import LoadSequencesd

__all__ = [
    "DisplacementToWorldd",
    "LoadCined",
    "MeasureFoldingd",
    "ScaleIntensityBySourced",
    "WarpSourced",
    "assume_spacing",
    "turn_vectors",
]

logger = logging.getLogger(__name__)

THICK_MM = 5.0  # slices this far apart are of a stack, whose pixels are hardly 1 mm by chance
MIN_HEART_MM = 30.0  # no heart is shorter


def assume_spacing(affine: np.ndarray, shape: Sequence[int], assumed: Sequence[float]) -> np.ndarray:
    """Affine with a spacing where the header has lost it.

    The axis with the fewest voxels (of several, the last) counts the slices. Lost is a spacing of 0, which takes the
    directions of all axes with it; exactly 1 mm in the plane of slices that are 5 mm or more apart; and exactly 1 mm along
    all axes if no heart fits between the first and the last slice. Converters that know of no spacing write such.

    Args:
        affine: (4, 4), in mm.
        shape: number of voxels along the three axes.
        assumed: two spacings in the plane and that of the slices, in mm.

    Returns:
        (4, 4); equal to ``affine`` where nothing is lost.
    """
    affine = np.array(affine, dtype=float)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    through = 2 - int(np.argmin(shape[::-1]))
    axes = [axis for axis in range(3) if axis != through] + [through]
    is_one = abs(spacing - 1) < 1e-4
    lost = spacing == 0
    if is_one.all():
        lost |= shape[through] < MIN_HEART_MM
    elif spacing[through] >= THICK_MM:
        lost |= is_one
    wanted = spacing.copy()
    wanted[axes] = assumed
    wanted = np.where(lost, wanted, spacing)
    affine[:3, :3] = np.diag(wanted) if (spacing == 0).any() else affine[:3, :3] * (wanted / spacing)
    return affine


class LoadCined(LoadSequencesd):
    """Read a cine, or the two ends of one, on the scan's own grid, float32, in the file's own unit.

    ``data[key]`` is the path of one 4-D NIfTI file (frames along its last axis), or a list with two paths of 3-D files,
    source and target. ``data[frames_key]``, if it is there, has the numbers of source and target in the 4-D file, counted
    from 0; else they are ``ends``, or the first and the last frame. A cine is one cycle: if the target comes before the
    source, the frames between go on at the start of the file.

    The result is ``data[key]``, (2, H, W, D) with source and target or, with ``frames="all"``, (F, H, W, D); and in the
    former case ``data[cine_key]``, (F, H, W, D), all frames from source to target (two of two files). Their meta data have
    ``num_frames`` (F) and ``time_step`` (seconds between two frames; 0 if unknown).

    Where the header has lost the spacing (:func:`assume_spacing`), ``affine`` has the assumed one, and a warning says so;
    ``meta["original_affine"]`` stays that of the file, in which results are to be written.

    Args:
        keys: key of the paths.
        frames: ``ends`` or ``all``.
        ends: numbers of source and target in 4-D files of which ``data`` has none, in place of the first and last frame.
        frames_key: key of the numbers of source and target.
        cine_key: key of all frames.
        assumed_spacing: two spacings in the plane and that of the slices, in mm, for a header that has lost them.
        allow_missing_keys: don't raise an error if a key is missing.

    Raises:
        ValueError: in one line with the file's name and the mend, for everything that :class:`LoadSequencesd` refuses, two
            files on different grids among it; a single frame; numbers out of range; source and target that are the same.
    """

    def __init__(
        self,
        keys: KeysCollection,
        frames: str = "ends",
        ends: Sequence[int] | None = None,
        frames_key: str = "frames",
        cine_key: str = "cine",
        assumed_spacing: Sequence[float] = (1.5, 1.5, 10.0),
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, ("source", "target"), allow_missing_keys=allow_missing_keys)
        if frames not in ("ends", "all"):
            raise ValueError(f"frames must be ends or all, got {frames}.")
        if len(assumed_spacing) != 3 or min(assumed_spacing) <= 0:
            raise ValueError(f"assumed_spacing must be three lengths above 0, in mm, got {assumed_spacing}.")
        self.frames, self.ends, self.frames_key, self.cine_key = frames, ends, frames_key, cine_key
        self.assumed_spacing = tuple(map(float, assumed_spacing))

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            paths = ensure_tuple(d[key])
            cine = (
                self._load_frames(paths[0], d.get(self.frames_key, self.ends)) if len(paths) == 1 else self._load_list(paths)
            )
            if torch.equal(cine[0].as_tensor(), cine[-1].as_tensor()):
                raise ValueError(f"{paths[0]}: source and target are the same image; give two different frames.")
            self._describe(cine, paths[0])
            if self.frames == "ends":
                d[self.cine_key] = cine
                cine = cine[[0, -1]]
            d[key] = cine
        return d

    def _check_geometry(self, path: str | os.PathLike, affine: np.ndarray, shape: Sequence[int]) -> None:
        if not np.isfinite(affine).all() or np.linalg.norm(affine[:3, :3], axis=0).all():
            super()._check_geometry(path, affine, shape)  # where a spacing is 0, another one is assumed

    def _load_frames(self, path: str | os.PathLike, ends: Sequence[int] | None) -> MetaTensor:
        """The frames of a 4-D file from source to target."""
        cine = self._read(path)
        count = len(cine)
        if count < 2:
            raise ValueError(
                f"{path}: a single frame, no motion; give a 4-D file with the frames along its last axis, or two 3-D files, "
                "end-diastole and end-systole."
            )
        first, last = (0, count - 1) if ends is None else map(int, ends)
        if not (0 <= first < count and 0 <= last < count):
            raise ValueError(f"{path}: frames {first} and {last} wanted, it has 0 to {count - 1}; correct their numbers.")
        if first == last:
            raise ValueError(f"{path}: source and target are both frame {first}; give two different frames.")
        between = range(first, last + 1) if first < last else [*range(first, count), *range(last + 1)]
        return cine[list(between)]

    def _describe(self, cine: MetaTensor, path: str | os.PathLike) -> None:
        """Give a cine the spacing that it lacks, and what the results need to know of its time."""
        affine = cine.affine.numpy()
        mended = assume_spacing(affine, cine.shape[1:], self.assumed_spacing)
        if not np.allclose(mended, affine):
            spacings = (" x ".join(f"{s:g}" for s in np.linalg.norm(a[:3, :3], axis=0).round(4)) for a in (affine, mended))
            logger.warning("{}: lost spacing, {} mm in the header; {} mm is assumed".format(path, *spacings))
            if np.linalg.det(affine[:3, :3]) == 0:
                cine.meta["original_affine"] = mended  # no other program could place results on a grid without extent
            cine.affine = torch.as_tensor(mended)
        # MONAI's reader overwrites the time in the header that it keeps
        header = nib.load(path).header if is_supported_format(path, ("nii", "nii.gz")) else nib.Nifti1Header()
        unit = {"msec": 1e-3, "usec": 1e-6}.get(header.get_xyzt_units()[1], 1.0)
        cine.meta["time_step"] = unit * float(header["pixdim"][4]) if header["dim"][0] > 3 else 0.0
        cine.meta["num_frames"] = len(cine)


class ScaleIntensityBySourced(MapTransform):
    """Bring all frames to [-1, 1] by one mapping: two percentiles of the source, the first frame, become -1 and 1.

    What lies outside is clipped. Not an ``InvertibleTransform`` on purpose: ``Invertd`` of a displacement would rescale it.

    Args:
        keys: keys of the frames (F, H, W, D), any unit.
        lower: percentile that becomes -1, in [0, 100].
        upper: percentile that becomes 1, in [0, 100].
        allow_missing_keys: don't raise an error if a key is missing.

    Raises:
        ValueError: with the file's name, if the two percentiles are equal.
    """

    def __init__(
        self, keys: KeysCollection, lower: float = 0.5, upper: float = 99.5, allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.percentiles = [lower, upper]

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            low, high = (float(percentile(d[key][0], q)) for q in self.percentiles)
            if not low < high:
                name = getattr(d[key], "meta", {}).get("filename_or_obj", key)
                raise ValueError(f"{name}: nearly all voxels of the source are {low:g}; export the scan again.")
            d[key] = ScaleIntensityRange(low, high, -1.0, 1.0, clip=True)(d[key])
        return d


def turn_vectors(displacement: Tensor, matrix: Tensor) -> Tensor:
    """Displacements (3 F, H, W, D) whose vectors are multiplied by a matrix (3, 3)."""
    vectors = displacement.reshape(-1, 3, *displacement.shape[1:])
    return torch.einsum("ij,fjhwd->fihwd", matrix.to(vectors), vectors).reshape(displacement.shape)


class MeasureFoldingd(MapTransform):
    """Largest share of voxels, over the frames, at which a displacement folds space over: Jacobian determinant 0 or less.

    Args:
        keys: keys of the displacements (3 F, H, W, D), in voxels of their own grid.
        output_keys: keys of the shares, in [0, 1].
        allow_missing_keys: don't raise an error if a key is missing.
    """

    def __init__(
        self, keys: KeysCollection, output_keys: KeysCollection = "folding", allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.output_keys = ensure_tuple_rep(output_keys, len(self.keys))

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key, output_key in self.key_iterator(d, self.output_keys):
            frames = torch.as_tensor(d[key]).reshape(-1, 3, *d[key].shape[1:])
            d[output_key] = max((jacobian_determinant(frame) <= 0).float().mean().item() for frame in frames)
        return d


class DisplacementToWorldd(MapTransform):
    """Turn displacements from voxels of a grid to mm along the world's axes, so that they can be resampled and turned.

    Args:
        keys: keys of the displacements (3 F, H, W, D), in voxels along the axes of ``data[ref_key]``.
        output_keys: keys of the results, in mm towards the right, front and head of the patient (RAS).
        ref_key: key of the image whose affine is that of the grid.
        allow_missing_keys: don't raise an error if a key is missing.
    """

    def __init__(
        self,
        keys: KeysCollection,
        output_keys: KeysCollection = "displacement",
        ref_key: str = "image",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.output_keys, self.ref_key = ensure_tuple_rep(output_keys, len(self.keys)), ref_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        reference = d[self.ref_key]
        for key, output_key in self.key_iterator(d, self.output_keys):
            turned = turn_vectors(torch.as_tensor(d[key]), reference.affine[:3, :3])
            d[output_key] = convert_to_dst_type(turned, reference, dtype=turned.dtype, device=turned.device)[0]
        return d


class WarpSourced(MapTransform):
    """Warp the scan's own source, the first frame of its cine, and its label map by displacements on the scan's own grid.

    A voxel of a frame takes the source at its own place plus the displacement, or the label that weighs most there by linear
    interpolation, in double precision, so that a displacement of 0 returns the source as it is. The results are
    ``data["frames"]`` (F, H, W, D), float32, in the scan's unit; ``data["labels"]`` (F, H, W, D), uint8, if there is a
    label map; and ``data["motion"]`` (1, H, W, D), the largest length of the displacement over the frames, in mm.

    Args:
        keys: key of the displacement (3 F, H, W, D), in mm along the world's axes.
        cine_key: key of the cine (frames, H, W, D).
        label_key: key of the source's label map (1, H, W, D).
        interpolation: of the source's intensities, ``bilinear`` or ``nearest``.
        allow_missing_keys: don't raise an error if a key is missing.

    Raises:
        ValueError: for another interpolation; with the file's name, if the label map lies on another grid.
    """

    def __init__(
        self,
        keys: KeysCollection = "displacement",
        cine_key: str = "cine",
        label_key: str = "label",
        interpolation: str = "bilinear",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if interpolation not in ("bilinear", "nearest"):
            raise ValueError(f"interpolation must be bilinear or nearest, got {interpolation}.")
        self.cine_key, self.label_key = cine_key, label_key
        with warnings.catch_warnings():  # that PyTorch's own sampling is used
            warnings.simplefilter("ignore")
            self.warp, self.warp_linearly = Warp(interpolation, "border"), Warp("bilinear", "border")

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        cine, label = d[self.cine_key], d.get(self.label_key)
        if label is not None:
            self._check_grid(label, cine)
        for key in self.key_iterator(d):
            millimetres = torch.as_tensor(d[key])
            fields = turn_vectors(millimetres.double(), cine.affine[:3, :3].double().inverse())
            fields = fields.reshape(-1, 3, *fields.shape[1:])
            source = cine[:1].as_tensor().to(fields)[None]
            frames = torch.cat([self.warp(source, field[None])[0] for field in fields]).float()
            d["frames"] = convert_to_dst_type(frames, cine, dtype=frames.dtype, device=frames.device)[0]
            if label is not None:
                labels = torch.stack([self._warp_label(label.as_tensor(), field) for field in fields])
                d["labels"] = convert_to_dst_type(labels, label, dtype=labels.dtype, device=labels.device)[0]
            lengths = millimetres.reshape(fields.shape).norm(dim=1)
            d["motion"] = convert_to_dst_type(lengths.amax(dim=0, keepdim=True), cine, device=lengths.device)[0]
        return d

    def _warp_label(self, label: Tensor, field: Tensor) -> Tensor:
        """Label map (1, H, W, D) by a field (3, H, W, D), in voxels: (H, W, D), uint8."""
        values = label.unique().to(field.device)
        weights = torch.cat([(label.to(field.device) == value).to(field) for value in values])
        chosen = self.warp_linearly(weights[None], field[None])[0].argmax(dim=0)
        return values[chosen].to(torch.uint8)

    @staticmethod
    def _check_grid(label: MetaTensor, cine: MetaTensor) -> None:
        axes = [nib.aff2axcodes(np.asarray(item.meta["original_affine"])) for item in (label, cine)]
        if label.shape[1:] != cine.shape[1:] or axes[0] != axes[1]:
            raise ValueError(
                f"{label.meta.get('filename_or_obj', 'label')}: its grid of {tuple(label.shape[1:])} voxels, "
                f"{''.join(axes[0])}, is not that of the cine, {tuple(cine.shape[1:])}, {''.join(axes[1])}; resample it."
            )
