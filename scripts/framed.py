"""Scores of slices whose head was brought to the frame, on the scale of slices that lay in it already.

A model that was measured on slices as its training has them finds framed ones more unlike: what is framed by itself, of the
base or the vertex, is larger than there, and has been resampled.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection, PathLike
from monai.transforms import MapTransform

from scripts.files import own_file
from scripts.inferers import run_in_batches
from scripts.networks.healthy_model import SCORE_PERCENTILE, Calibration, HealthyModel
from scripts.one_sided import OneSided
from scripts.transforms import has_foreground

__all__ = ["AsUnframedd", "usual_scores"]

logger = logging.getLogger(__name__)

PERCENTILES = (25, 50, 75, 90, 95, 97.5, 99, 99.5, 100)


class AsUnframedd(MapTransform):
    """Bring the abnormality of framed slices to the scale of slices that lie in the frame by nature.

    A framed slice gets the abnormality that, among those of held-out healthy slices that were not framed, has the percentile
    that its own has among framed ones. So 0.5 is the 97.5th percentile of healthy slices in both, and the order of slices
    stays. Beyond the percentiles both grow by the same factor. What is not framed stays as it is.

    Args:
        keys: key of the abnormality, as :meth:`scripts.networks.healthy_model.Calibration.abnormality` gives it.
        usual: percentiles of held-out healthy slices that were framed, and their abnormality, such as ``{"50": 0.3,
            "97.5": 0.6}``, see :func:`usual_scores`; None to leave everything as it is.
        calibration: returns that of the network.
        ref_key: key of the slices, whose ``meta["framed"]`` says which they are (:class:`scripts.heads.FrameHeadd`).
        allow_missing_keys: don't raise an error if a key is missing.

    Raises:
        ValueError: if the abnormality falls with the percentiles, or reaches 1.
    """

    def __init__(
        self,
        keys: KeysCollection,
        usual: Mapping[str, float] | None,
        calibration: Callable[[], Calibration],
        ref_key: str = "image",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.calibration, self.ref_key = calibration, ref_key
        pairs = [(0.0, 0.0), *sorted((float(name), value) for name, value in usual.items())] if usual else []
        self.percentiles, values = np.array(pairs).reshape(-1, 2).T
        if (np.diff(values) < 0).any() or (values >= 1).any():
            raise ValueError(
                f"the abnormality of healthy slices must not fall with the percentiles, and be below 1: {dict(usual)}"
            )
        self.framed = values / (1 - values)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        if not len(self.framed) or not d[self.ref_key].meta.get("framed"):
            return d
        quantiles = self.calibration().scores.double().cpu().numpy()
        at = np.linspace(0, 100, len(quantiles))
        unframed = np.interp(self.percentiles, at, quantiles) / np.interp(SCORE_PERCENTILE, at, quantiles)
        unframed[0] = 0.0  # of an empty slice
        for key in self.key_iterator(d):
            values = d[key].double().cpu().numpy().clip(0, 1 - 1e-9)
            odds = values / (1 - values)
            beyond = np.maximum(odds / self.framed[-1], 1)
            odds = np.interp(odds, self.framed, unframed) * beyond
            d[key] = torch.zeros_like(d[key]) + torch.as_tensor(odds / (1 + odds)).to(d[key])
        return d


def usual_scores(
    network: HealthyModel, batches: Iterable[dict], one_sided: OneSided, path: PathLike
) -> dict[str, dict[str, float]]:
    """Measure the scores of healthy slices that were framed.

    Args:
        network: with its weights.
        batches: dictionaries with ``image``, the slices (B, C, W, H) in [0, 1]; those that show nothing do not count.
        one_sided: how bright something in a slice is on one side alone.
        path: file that the result is written to, as JSON.

    Returns:
        percentiles and the score there: ``framed_usual`` for :class:`AsUnframedd`, and ``one_sided_usual`` for
        :class:`scripts.one_sided.OneSided`.

    Raises:
        ValueError: if no slice shows anything.
    """
    abnormality, sides = [], []
    for batch in batches:
        image = batch["image"].float()
        image = image[has_foreground(image, network.foreground_level, network.min_foreground)]
        if len(image):
            output, _ = run_in_batches(network, image, len(image))
            abnormality += output[:, -1].flatten(1).amax(dim=1).tolist()
            sides += [one_sided.score(*pair) for pair in zip(image[:, 0].numpy(), output[:, 1].numpy(), strict=True)]
    if not sides:
        raise ValueError("no slice shows any foreground: there is nothing to measure")
    usual = {
        name: {f"{percentile:g}": round(float(np.percentile(scores, percentile)), 4) for percentile in PERCENTILES}
        for name, scores in (("framed_usual", abnormality), ("one_sided_usual", sides))
    }
    with own_file(path) as aside:
        aside.write_text(json.dumps(usual) + "\n", encoding="utf-8")
    share = float((np.array(abnormality) > 0.5).mean())
    logger.info(f"{share:.1%} of the framed healthy slices have an abnormality above 0.5: {json.dumps(usual)}")
    return usual
