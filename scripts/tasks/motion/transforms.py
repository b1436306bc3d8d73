"""Transforms of the motion bundles alone: displacements, and what they deform."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.data import MetaTensor
from monai.networks.blocks import Warp
from monai.transforms import MapTransform, ScaleIntensityRange
from monai.transforms.utils_pytorch_numpy_unification import percentile
from monai.utils import convert_to_dst_type, ensure_tuple_rep
from torch import Tensor

from scripts.losses import jacobian_determinant

__all__ = [
    "DisplacementToWorldd",
    "MeasureFoldingd",
    "MeasureInverseConsistencyd",
    "ScaleIntensityBySourced",
    "SplitInversed",
    "WarpSourced",
    "turn_vectors",
]


class ScaleIntensityBySourced(MapTransform):
    """Bring all frames to [-1, 1] by one mapping: two percentiles of the source, the first frame, become -1 and 1.

    Frames of different scans have no grey levels in common: with ``each`` a frame goes by its own percentiles. What lies
    outside is clipped. Not an ``InvertibleTransform`` on purpose: ``Invertd`` of a displacement would rescale it.

    Args:
        keys: keys of the frames (F, H, W, D), any unit.
        lower: percentile that becomes -1, in [0, 100].
        upper: percentile that becomes 1, in [0, 100].
        each: see above.
        allow_missing_keys: don't raise an error if a key is missing.

    Raises:
        ValueError: with the file's name, if the two percentiles are equal.
    """

    def __init__(
        self,
        keys: KeysCollection,
        lower: float = 0.5,
        upper: float = 99.5,
        each: bool = False,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.percentiles, self.each = [lower, upper], each

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            frames = d[key].split(1) if self.each else [d[key]]
            name = getattr(d[key], "meta", {}).get("filename_or_obj", key)
            scaled = torch.cat([torch.as_tensor(self._scaled(frame, name)) for frame in frames])
            d[key] = convert_to_dst_type(scaled, d[key])[0]
        return d

    def _scaled(self, frames: NdarrayOrTensor, name: str) -> NdarrayOrTensor:
        low, high = (float(percentile(frames[0], q)) for q in self.percentiles)
        if not low < high:
            raise ValueError(f"{name}: nearly all voxels of the source are {low:g}; export the scan again.")
        return ScaleIntensityRange(low, high, -1.0, 1.0, clip=True)(frames)


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


class MeasureInverseConsistencyd(MapTransform):
    """How far a point comes back from where it was, on the whole way and back: the mean of |u(p) + v(p + u(p))|.

    Christensen and Johnson 2001. p goes over the voxels; 0 mm where v is the inverse of u.

    Args:
        keys: keys of the displacements (3 F + 3, H, W, D), in voxels along the axes of ``data[ref_key]``: u, the last but
            one, and v, the last.
        output_keys: keys of the means, in mm.
        ref_key: key of the image whose affine is that of the grid.
        allow_missing_keys: don't raise an error if a key is missing.
    """

    def __init__(
        self,
        keys: KeysCollection,
        output_keys: KeysCollection = "inverse_consistency",
        ref_key: str = "image",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.output_keys, self.ref_key = ensure_tuple_rep(output_keys, len(self.keys)), ref_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key, output_key in self.key_iterator(d, self.output_keys):
            there, back = torch.as_tensor(d[key])[-6:].float().split(3)
            left = there + Warp("bilinear", "border")(back[None], there[None])[0]
            d[output_key] = turn_vectors(left, d[self.ref_key].affine[:3, :3]).norm(dim=0).mean().item()
        return d


class SplitInversed(MapTransform):
    """Take the way back, the last three channels, off the displacements of the way there.

    Args:
        keys: keys of the displacements (3 F + 3, H, W, D), which keep 3 F channels.
        output_keys: keys of the way back, (3, H, W, D).
        allow_missing_keys: don't raise an error if a key is missing.
    """

    def __init__(
        self, keys: KeysCollection, output_keys: KeysCollection = "inverse", allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.output_keys = ensure_tuple_rep(output_keys, len(self.keys))

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key, output_key in self.key_iterator(d, self.output_keys):
            d[key], d[output_key] = d[key][:-3], d[key][-3:]
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
        target_label_key: key of the target's, which only has to lie on the same grid.
        interpolation: of the source's intensities, ``bilinear`` or ``nearest``.
        allow_missing_keys: don't raise an error if a key is missing.

    Raises:
        ValueError: for another interpolation; with the file's name, if a label map lies on another grid.
    """

    def __init__(
        self,
        keys: KeysCollection = "displacement",
        cine_key: str = "cine",
        label_key: str = "label",
        target_label_key: str = "target_label",
        interpolation: str = "bilinear",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if interpolation not in ("bilinear", "nearest"):
            raise ValueError(f"interpolation must be bilinear or nearest, got {interpolation}.")
        self.cine_key, self.label_key, self.target_label_key = cine_key, label_key, target_label_key
        with warnings.catch_warnings():  # that PyTorch's own sampling is used
            warnings.simplefilter("ignore")
            self.warp, self.warp_linearly = Warp(interpolation, "border"), Warp("bilinear", "border")

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        cine, label = d[self.cine_key], d.get(self.label_key)
        for given in (label, d.get(self.target_label_key)):
            if given is not None:
                self._check_grid(given, cine)
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
