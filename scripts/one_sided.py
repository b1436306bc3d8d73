"""A score of a slice: is something in it brighter than its healed version, and on one side of the head alone?

Most anatomy that a model of healthy slices doubts, such as ventricles, calcified plexus and the skull base, is there on both
sides. Fresh blood hardly ever is.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform
from scipy import ndimage
from torch import Tensor

from scripts.heads import find_head, head_mask, mirrored
from scripts.networks.healthy_model import NUM_QUANTILES, Calibration

__all__ = ["OneSided", "OneSidedd"]


class OneSided:
    """How much brighter than its healed version and than the other side a slice is somewhere, on the scale of healthy ones.

    The score s is the largest value of sqrt(a b) at ``rim`` pixels or more from the edge of the head: a is by how much a
    smoothed pixel exceeds all within ``reach`` pixels of its mirror image (:func:`scripts.heads.mirrored`), b by how much it
    exceeds its healed version; both count from 0. What is darker, at the rim or alike on both sides is not seen.

    Args:
        usual: percentiles of held-out healthy slices and their scores, such as ``{"50": 0.02, "90": 0.2}``; what lies
            between is interpolated, 0 is that of the percentile 0.
        percentile: of these, whose score becomes 0.5.
        sigma: standard deviation of the smoothing, in pixels.
        reach: half the width of the square that a pixel's mirror image is looked for in, in pixels.
        rim: width of what does not count, in pixels.

    Raises:
        ValueError: if the scores do not rise with the percentiles, or that of ``percentile`` is 0.
    """

    def __init__(
        self, usual: Mapping[str, float], percentile: float = 90.0, sigma: float = 0.7, reach: int = 1, rim: float = 8.0
    ) -> None:
        self.percentile, self.sigma, self.reach, self.rim = percentile, sigma, reach, rim
        percentiles, scores = np.array([(0.0, 0.0), *sorted((float(name), score) for name, score in usual.items())]).T
        self.limit = float(np.interp(percentile, percentiles, scores))
        if (np.diff(scores) < 0).any() or not self.limit > 0:
            raise ValueError(f"scores of healthy slices must rise with the percentiles, above 0: {dict(usual)}")
        quantiles = np.interp(np.linspace(0, 100, NUM_QUANTILES), percentiles, scores)
        self.calibration = Calibration(torch.zeros(NUM_QUANTILES), torch.from_numpy(quantiles), None)

    def score(self, image: np.ndarray, healthy: np.ndarray) -> float:
        """The score s of a slice.

        Args:
            image: (columns, rows), as volumes in LPS are, grey levels in [0, 1].
            healthy: its healed version; all zero where there is none, which gives 0.

        Returns:
            0 or more, in grey levels.
        """
        image, healthy = image.T, healthy.T
        mask = head_mask(image)
        inner = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1] > self.rim
        if not inner.any() or not healthy.any():
            return 0.0
        smooth = ndimage.gaussian_filter(image, self.sigma)
        other = ndimage.maximum_filter(mirrored(smooth, find_head(mask, image)), 2 * self.reach + 1)
        unhealed = ndimage.gaussian_filter(image - healthy, self.sigma)
        return float(np.sqrt((smooth - other).clip(0) * unhealed.clip(0))[inner].max())

    def __call__(self, image: np.ndarray, healthy: np.ndarray) -> float:
        """s / (s + h), in [0, 1), h being the ``percentile`` of healthy slices; arguments as :meth:`score`."""
        score = self.score(image, healthy)
        return score / (score + self.limit)

    def of_case(self, slices: Tensor) -> float:
        """That of a case from those of its slices, (N,): :meth:`scripts.networks.healthy_model.Calibration.of_case`."""
        return self.calibration.of_case(slices, self.percentile)


class OneSidedd(MapTransform):
    """Say of each slice how far something in it is bright on one side alone, see :class:`OneSided`.

    Args:
        keys: key of the slices (1, W, H, D), columns first, as the network sees them.
        score: says it of one slice.
        healthy_key: key of their healed versions.
        output_key: key of the result, (1, W, H, D), constant over a slice.
        allow_missing_keys: don't raise an error if a key is missing.
    """

    def __init__(
        self,
        keys: KeysCollection,
        score: OneSided,
        healthy_key: str = "healthy",
        output_key: str = "one_sided",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.score, self.healthy_key, self.output_key = score, healthy_key, output_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            image, healthy = (d[name][0].float().cpu().numpy() for name in (key, self.healthy_key))
            values = [self.score(image[..., i], healthy[..., i]) for i in range(image.shape[-1])]
            like = d[self.healthy_key]
            d[self.output_key] = torch.zeros_like(like[:1]) + torch.tensor(values, device=like.device)
        return d
