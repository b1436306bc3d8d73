"""Mends headers that are known to be wrong."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.data.utils import affine_to_spacing
from monai.transforms import InvertibleTransform, MapTransform
from monai.utils import convert_to_tensor

__all__ = ["MendOrientationd"]

logger = logging.getLogger(__name__)

# TCGA-LGG in the layout of BraTS, made of pictures: names, the header that all of its files have, and where its axes point
TCGA_LGG, TCGA_LGG_AFFINE, TCGA_LGG_AXCODES = "TCGA_", np.diag([2.0, 2.0, 5.0, 1.0]), "RPS"


class MendOrientationd(MapTransform, InvertibleTransform):
    """Put the true directions of a volume's axes in the place of wrong ones of its header; no voxel moves.

    The inverse puts the file's own affine back, so that results overlay the file they were made of.

    Args:
        keys: keys of the volumes (C, H, W, D), with the file's name in ``meta["filename_or_obj"]``.
        axcodes: where the axes truly point, such as ``RPS``; ``header`` for what the header says; ``auto`` for that too, but
            ``RPS`` for TCGA-LGG in the layout of BraTS: the header of its files (``TCGA_…``, affine diag(2, 2, 5, 1)) says
            that the second axis points to the front, but it points to the back.
        allow_missing_keys: don't raise an error if a key is missing.

    Raises:
        ValueError: for axis codes that are no orientation.
    """

    def __init__(self, keys: KeysCollection, axcodes: str = "auto", allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        pairs = ("LR", "PA", "IS")
        if axcodes not in ("auto", "header") and sorted(sum(c in pair for c in axcodes) for pair in pairs) != [1, 1, 1]:
            raise ValueError(f"header_axcodes must be auto, header or three letters such as RPS, got {axcodes}")
        self.axcodes, self.told = axcodes, False

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            image = convert_to_tensor(d[key], track_meta=True)
            axcodes = self._axcodes_of(image)
            d[key] = image.clone()  # its trace will be written to
            if axcodes:
                d[key].affine = _turned(image.affine, axcodes)
            self.push_transform(d[key], extra_info={"affine": image.affine.tolist()})
        return d

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            d[key].affine = torch.tensor(self.pop_transform(d[key])["extra_info"]["affine"], dtype=torch.float64)
        return d

    def _axcodes_of(self, image: MetaTensor) -> str | None:
        """Where the axes point, if the header is not to be believed."""
        if self.axcodes != "auto":
            return None if self.axcodes == "header" else self.axcodes
        name = Path(str(image.meta.get("filename_or_obj", ""))).name
        if not name.startswith(TCGA_LGG) or not np.array_equal(np.asarray(image.affine), TCGA_LGG_AFFINE):
            return None
        if not self.told:
            logger.info(f"{name}: read as {TCGA_LGG_AXCODES}, like all of TCGA-LGG, whatever its header says")
            self.told = True
        return TCGA_LGG_AXCODES


def _turned(affine: torch.Tensor, axcodes: str) -> torch.Tensor:
    """Affine with the same spacing whose axes point where ``axcodes`` say, without any tilt."""
    turned = torch.eye(4, dtype=affine.dtype)
    turned[:3, :3] = 0
    ornt = nib.orientations.axcodes2ornt(tuple(axcodes))
    for axis, ((world, sign), edge) in enumerate(zip(ornt, affine_to_spacing(affine, 3), strict=True)):
        turned[int(world), axis] = sign * float(edge)
    return turned
