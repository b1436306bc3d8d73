"""Brings the grey levels of heads in pictures, whose window nobody knows, nearer to the training's."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from monai.utils import convert_to_tensor

from scripts.heads import head_mask
from scripts.transforms import with_meta

__all__ = ["MatchHistogramd", "head_quantiles"]

LEAST_STEP = 1e-5  # between the levels of a curve, which has a way back


def head_quantiles(slices: np.ndarray, number: int) -> np.ndarray | None:
    """Quantiles of the grey levels inside heads, evenly spaced, the mean over the slices that show one.

    Args:
        slices: (D, rows, columns), grey levels in [0, 1].
        number: how many, the least and the largest among them.

    Returns:
        (number,); None if no slice shows a head.
    """
    masks = [head_mask(slice_) for slice_ in slices]
    shares = np.linspace(0, 1, number)
    found = [np.quantile(slice_[mask], shares) for slice_, mask in zip(slices, masks, strict=True) if mask.any()]
    return np.mean(found, axis=0) if found else None


class MatchHistogramd(MapTransform):
    """Move the grey levels of framed heads towards a histogram, such as that of the training's heads.

    The quantiles of the grey levels within the head are brought to those of ``reference``, as far as ``share`` says, by one
    rising curve for the whole stack, between whose points is interpolated; air stays. ``meta["intensity_curve"]``, the
    levels before and after, is the way back (:class:`scripts.transforms.RestoreIntensityd`). Only what
    :class:`scripts.heads.FrameHeadd` has framed is changed, and of that only grey pictures: Hounsfield units have the
    training's window.

    Args:
        keys: keys of the slices (1, W, H, D) in [0, 1], columns first.
        reference: quantiles of heads in the frame, evenly spaced, from air to the brightest, see :func:`head_quantiles`.
        share: 0 leaves everything as it is, 1 takes the histogram of the reference.
        allow_missing_keys: don't raise an error if a key is missing.

    Raises:
        ValueError: if ``share`` lies outside [0, 1], or the reference does not rise.
    """

    def __init__(
        self, keys: KeysCollection, reference: Sequence[float], share: float = 0.5, allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.reference, self.share = np.asarray(reference, dtype=float), share
        if not 0 <= share <= 1:
            raise ValueError(f"the share of the histogram that is matched must lie in [0, 1], got {share}")
        if len(self.reference) < 2 or (np.diff(self.reference) < LEAST_STEP).any():
            raise ValueError(f"the quantiles of the reference must rise, got {list(reference)}")

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            image = convert_to_tensor(d[key], track_meta=True)
            if self.share and image.meta.get("framed") and image.meta.get("units") == "grey":
                d[key] = self._matched(image)
        return d

    def _matched(self, image: MetaTensor) -> MetaTensor:
        voxels = image[0].cpu().numpy()
        own = head_quantiles(voxels.transpose(2, 1, 0), len(self.reference))
        if own is None:
            return image
        own[0], own[-1] = self.reference[0], max(own[-1], float(voxels.max()))
        own = np.maximum.accumulate(own) + LEAST_STEP * np.arange(len(own))
        matched = (1 - self.share) * own + self.share * self.reference
        levels = torch.from_numpy(np.interp(voxels, own, matched))[None].to(image.dtype)
        return with_meta(levels, like=image, intensity_curve=[own.tolist(), matched.tolist()])
