"""Where the voxels of a scan lie: what headers say of it, and how several files are brought to one grid."""

from __future__ import annotations

import logging
import os

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import ResampleToMatch

from scripts.transforms import with_meta

__all__ = ["on_grid_of", "stated_affine", "taken_affine"]

logger = logging.getLogger(__name__)

SAME = 1e-2  # mm: affines that differ by no more are equal but for rounding
UNITS = {1: ("metres", 1000.0), 3: ("microns", 1e-3)}  # codes of NIfTI that are not mm, and in mm; without a code it is mm
LEAST_SHARED = 0.5  # share of the one field of view that the other has to cover
SAME_PLACE = 0.8  # common share of two fields of view with as many voxels each, below which one of them is a mistake
LOST = 0.01  # share of a mask that may lie outside the image: rounding at its border


def stated_affine(scan: nib.spatialimages.SpatialImage) -> np.ndarray:
    """The affine of a file in mm, as its header states it: with zeros for a spacing of 0, of which nibabel makes 1."""
    affine = np.array(scan.affine, dtype=float)
    if isinstance(scan, nib.Nifti1Pair) and not scan.header["sform_code"]:
        with scan.file_map.get("header", scan.file_map["image"]).get_prepare_fileobj("rb") as file:
            pixdim = type(scan.header).from_fileobj(file, check=False)["pixdim"][1:4]
        affine[:, :3] *= pixdim != 0
    return _in_mm(affine, scan)


def taken_affine(path: str | os.PathLike, scan: nib.spatialimages.SpatialImage, loaded: np.ndarray) -> np.ndarray:
    """The affine of a file in mm, with a warning where a NIfTI header contradicts itself or is not in mm.

    Of two affines (sform and qform) that differ in spacing, the one is taken that has the header's ``pixdim``, as MONAI
    does, but never one whose code says that it is none; of two that differ in orientation alone, the sform.

    Args:
        path: the file.
        scan: the file, as nibabel opens it.
        loaded: the affine that MONAI gives it, (4, 4), in the header's own unit.
    """
    if not isinstance(scan, nib.Nifti1Pair):
        return loaded
    affines = {
        name: matrix for name in ("sform", "qform") if (matrix := getattr(scan, f"get_{name}")(coded=True)[0]) is not None
    }
    taken = next((name for name, affine in affines.items() if np.allclose(loaded, affine, rtol=1e-4, atol=1e-4)), None)
    taken = taken or next(iter(affines), None)
    affine = _in_mm(loaded if taken is None else affines[taken], scan)
    if _unit_code(scan) in UNITS:
        logger.warning(f"{path}: its header is in {UNITS[_unit_code(scan)][0]}; voxels of {_edges_of(affine)} mm are taken")
    if len(affines) == 2 and _differ(*affines.values()):
        told = {name: f"{_edges_of(a)} mm, {_axes_of(a)}" for name, a in affines.items()}
        other = "sform" if taken == "qform" else "qform"
        logger.warning(
            f"{path}: sform and qform contradict each other; the {taken} ({told[taken]}) is taken, not the {other} "
            f"({told[other]}), and the results have it"
        )
    return affine


def _unit_code(scan: nib.spatialimages.SpatialImage) -> int:
    return int(scan.header["xyzt_units"]) % 8 if isinstance(scan, nib.Nifti1Pair) else 0


def _in_mm(affine: np.ndarray, scan: nib.spatialimages.SpatialImage) -> np.ndarray:
    factor = UNITS.get(_unit_code(scan), ("mm", 1.0))[1]
    return np.diag([factor, factor, factor, 1.0]) @ affine


def _differ(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two affines differ in spacing, by more than 1 %, or in orientation, by more than 0.01."""
    edges = [np.linalg.norm(affine[:3, :3], axis=0) for affine in (one, other)]
    ways = [affine[:3, :3] / np.maximum(edge, 1e-9) for affine, edge in zip((one, other), edges, strict=True)]
    return not (np.allclose(*edges, rtol=1e-2, atol=0) and np.allclose(*ways, rtol=0, atol=1e-2))


def _edges_of(affine: np.ndarray) -> str:
    return " x ".join(f"{edge:.4g}" for edge in np.linalg.norm(affine[:3, :3], axis=0))


def _axes_of(affine: np.ndarray) -> str:
    return "".join(map(str, nib.aff2axcodes(affine)))


def on_grid_of(image: MetaTensor, reference: MetaTensor, labels: bool = False) -> MetaTensor:
    """An image brought to the grid of another one by the affines of both files; as it is if it lies there already.

    Where the header of the reference lost its spacing, which was assumed (its affine is not that of its file), or where one
    of the two has no geometry at all (pictures, NIfTI without sform and qform), images of one shape lie on one grid.

    Args:
        image: (C, H, W[, D]), with ``meta["original_affine"]``, that of its file, and ``meta["filename_or_obj"]``.
        reference: (C, H', W'[, D']), the same.
        labels: whether these are labels, which are taken from the nearest voxel; else linear interpolation, 0 outside.

    Returns:
        (C, H', W'[, D']), same type; with the affine of the reference if it was resampled.

    Raises:
        ValueError: naming both files, if the fields of view don't meet: the image covers less than half of the reference;
            of labels, more than 1 % of what is marked lies outside, or there are as many voxels in another place.
    """
    names = [item.meta.get("filename_or_obj", "image") for item in (image, reference)]
    source, target = (np.asarray(item.meta.get("original_affine", item.affine), dtype=float) for item in (image, reference))
    same_shape = image.shape[1:] == reference.shape[1:]
    if same_shape and (image.ndim < 4 or _is_same_grid(image, reference, source, target)):
        return image
    sizes = [" x ".join(map(str, item.shape[1:])) for item in (image, reference)]
    flat = image.ndim < 4 or reference.ndim < 4 or 0 in (np.linalg.det(source[:3, :3]), np.linalg.det(target[:3, :3]))
    if flat or not (_has_geometry(image) and _has_geometry(reference)):
        raise ValueError(
            f"{names[0]}: has {sizes[0]} voxels, {names[1]} has {sizes[1]}, and no affine says how they lie; save both "
            "with one shape"
        )
    _check_places(image, reference, np.linalg.inv(target) @ source, labels, names)
    logger.info(f"{names[0]}: brought to the grid of {names[1]} by the affines of both")
    placed = MetaTensor(image.as_tensor(), affine=torch.as_tensor(source))
    onto = MetaTensor(reference.as_tensor()[:1], affine=torch.as_tensor(target))
    resample = ResampleToMatch(mode="nearest" if labels else "bilinear", padding_mode="zeros", dtype=np.float64)
    resampled = resample(placed, onto).as_tensor().to(image.dtype)
    where = {"original_affine": target.copy(), "spatial_shape": np.array(resampled.shape[1:])}
    return with_meta(resampled, image, affine=reference.affine.clone(), **where)


def _has_geometry(image: MetaTensor) -> bool:
    """Whether the file says where its voxels lie; pictures don't, nor NIfTI headers without sform and qform."""
    codes = [image.meta.get(f"{form}form_code") for form in "sq"]
    return image.meta.get("has_geometry", True) and (None in codes or any(int(code) > 0 for code in codes))


def _is_same_grid(image: MetaTensor, reference: MetaTensor, source: np.ndarray, target: np.ndarray) -> bool:
    if np.allclose(source, target, rtol=0, atol=SAME) or not (_has_geometry(image) and _has_geometry(reference)):
        return True
    assumed = not np.allclose(target, reference.affine.numpy(), rtol=0, atol=SAME)
    return assumed and _axes_of(source) == _axes_of(target)


def _check_places(image: MetaTensor, reference: MetaTensor, to_reference: np.ndarray, labels: bool, names: list) -> None:
    """Raise ValueError if two fields of view don't meet; ``to_reference`` leads from voxels of the one to the other's."""
    size, wanted = (np.array(item.shape[1:]) for item in (image, reference))
    corners = np.array(np.meshgrid(*((-0.5, n - 0.5) for n in size), [1])).reshape(4, -1)
    places = (to_reference @ corners)[:3]
    low, high = places.min(axis=1), places.max(axis=1)
    common = np.clip(np.minimum(high, wanted - 0.5) - np.maximum(low, -0.5), 0, None).prod()
    covered = common / wanted.prod()
    fault = None
    if labels:
        union = (high - low).prod() + wanted.prod() - common
        outside = _share_outside(image, to_reference, wanted)
        if common == 0:
            fault = "they have no place in common"
        elif outside > LOST:
            fault = f"{100 * outside:.0f} % of what it marks lies outside"
        elif sorted(size) == sorted(wanted) and common / union < SAME_PLACE:
            fault = "it has as many voxels, but in another place"
    elif covered < LEAST_SHARED:
        fault = f"it covers {100 * covered:.0f} % of it"
    elif covered < 0.99:
        logger.warning(f"{names[0]}: covers {100 * covered:.0f} % of {names[1]}; the rest is taken as 0")
    if fault:
        raise ValueError(
            f"{names[0]}: its field of view does not meet that of {names[1]}: {fault}; give files of one scan, correct the "
            "affine of one, or resample it"
        )


def _share_outside(label: MetaTensor, to_reference: np.ndarray, wanted: np.ndarray) -> float:
    """Share of the voxels above 0 whose centres lie outside the reference."""
    voxels = label.as_tensor().cpu().numpy().any(axis=0).nonzero()
    if not len(voxels[0]):
        return 0.0
    places = to_reference[:3, :3] @ np.array(voxels) + to_reference[:3, 3:]
    inside = ((places >= -0.5) & (places <= wanted[:, None] - 0.5)).all(axis=0)
    return float(1 - inside.mean())
