"""How well masks fit labels, and whether what is said of their uncertainty is true."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import PathLike
from monai.data.utils import affine_to_spacing
from monai.metrics import compute_hausdorff_distance
from scipy import ndimage
from sklearn.metrics import roc_auc_score
from torch import Tensor

from scripts.files import check_own, own_file
from scripts.metrics import CohortMetrics, bootstrap_interval, dice
from scripts.results import millilitres
from scripts.tables import write_rows
from scripts.tasks.segmentation.figures import reliability_figure
from scripts.tasks.segmentation.transforms import conformal_factor

__all__ = ["SegmentationMetrics", "calibration_error", "energy_distance", "reliability_bins"]

BINS = 15
CLOSEST = 1e-4  # to 0 and 1 that a probability counts as, or one voxel would decide the likelihood
NEAR = 10.0  # mm around the label in which calibration is measured as well: elsewhere nearly all voxels are easy


def reliability_bins(probability: Tensor, lesion: Tensor) -> np.ndarray:
    """Voxels by their probability, in 15 bins of one width.

    Args:
        probability: any shape, in [0, 1].
        lesion: same shape, bool.

    Returns:
        (15, 3): number of voxels, sum of their probabilities, number of lesion voxels.
    """
    p, y = probability.flatten().double(), lesion.flatten().double()
    index = (p * BINS).long().clamp(0, BINS - 1)
    return torch.stack([torch.bincount(index, weights, minlength=BINS) for weights in (torch.ones_like(p), p, y)], 1).numpy()


def calibration_error(bins: np.ndarray) -> float:
    """Expected calibration error (Guo et al. 2017, arXiv 1706.04599, equation 3), in [0, 1], of :func:`reliability_bins`."""
    return float(np.abs(bins[:, 1] - bins[:, 2]).sum() / max(bins[:, 0].sum(), 1))


def energy_distance(samples: Tensor, label: Tensor) -> float:
    """Squared generalised energy distance between samples and one label (Kohl et al. 2018, arXiv 1806.05034, equation 4).

    The distance of two masks is 1 - IoU, 0 where both are empty.

    Args:
        samples: masks (n, H, W, D), bool.
        label: (1, H, W, D), bool.

    Returns:
        twice the mean distance from the label minus the mean distance of all pairs of samples, one with itself included.
    """
    flat = samples.flatten(1).float()
    size = flat.sum(dim=1)

    def distance(overlap: Tensor, union: Tensor) -> float:
        return torch.where(union > 0, 1 - overlap / union.clamp(min=1), 0.0).mean().item()

    among, truth = flat @ flat.T, label.flatten().float()
    with_label = flat @ truth
    apart = distance(with_label, size + truth.sum() - with_label)
    return 2 * apart - distance(among, size[:, None] + size[None] - among)


class SegmentationMetrics(CohortMetrics):
    """Ignite handler that writes the evaluation of masks and of their uncertainty: a row a case, and the cohort's figures.

    It reads dicts that hold ``case``, ``label`` and ``pred`` (1, H, W, D), ``mean`` (1, H, W, D), the probability of lesion,
    ``entropy`` (1, H, W, D), ``samples`` (n, H, W, D) and ``volume``
    (:class:`scripts.tasks.segmentation.transforms.MeasureVolumed`).

    Columns of ``metrics.csv``:

    - ``dice``; ``hd95_mm``: 95th percentile of the surface distance in mm, both ways (NaN where one mask is empty);
    - ``ece``, ``nll``: expected calibration error and negative log-likelihood (nats) of all voxels; ``near_ece``,
      ``near_nll``: of those within 10 mm of the label;
    - ``error_auroc``: of "the mask is wrong here" by the entropy, within 10 mm of the label;
    - ``energy``: generalised energy distance, ``diversity``: mean 1 - Dice of the samples with the mask;
    - ``predicted_ml``, ``true_ml``, ``low_ml``, ``high_ml``; ``raw_covered``, ``covered``: 1 if the interval, before and
      after its factor, holds the true volume; ``width_ml``: of the interval; ``agreement``, ``look``.

    Figures of the cohort: the mean of each, with the ends of its bootstrap interval over patients (``_low``, ``_high``);
    ``pooled_near_ece``; ``factor_needed``, the factor that would calibrate the interval on these cases, and
    ``look_quartile``, the lower quartile of the agreement, for choosing both on validation patients. ``reliability.csv`` and
    ``.png`` have the bins of the voxels near the labels.

    Args:
        output_dir: folder of the files, made if it is missing.
        level: share of intervals that shall hold the true volume.
        threshold: probability above which a voxel of a sample is lesion.
        name: of the method, in the picture.
        filename: name of the table.
    """

    means = ("dice", "hd95_mm", "ece", "near_ece", "nll", "near_nll", "error_auroc", "energy", "diversity")
    means += ("raw_covered", "covered", "width_ml")

    def __init__(
        self,
        output_dir: PathLike,
        level: float = 0.8,
        threshold: float = 0.5,
        name: str = "this run",
        filename: str = "metrics.csv",
    ) -> None:
        self.level, self.threshold, self.name = level, threshold, name
        super().__init__(output_dir, filename)
        self.reliability = [self.table_path.with_name(f"reliability.{ending}") for ending in ("csv", "png")]
        self.paths += self.reliability

    def _reset(self) -> None:
        super()._reset()
        self.bins = np.zeros((BINS, 3))
        self.spreads: list[tuple[float, float]] = []

    def _evaluate(self, case: Mapping[str, Any]) -> dict[str, Any]:
        """A case's row.

        Raises:
            ValueError: when the label is missing.
        """
        if case.get("label") is None:
            raise ValueError(
                f"Case {case['case']} has no label to evaluate against: add one to the data set, leave the case out, or run "
                "inference only."
            )
        label, found = (case[key].as_tensor().cpu() > 0 for key in ("label", "pred"))
        mean, entropy, samples = (case[key].as_tensor().cpu().float() for key in ("mean", "entropy", "samples"))
        masks, volume = samples > self.threshold, case["result"]
        spacing = affine_to_spacing(case["label"].affine, 3).tolist()
        near = label.clone()
        if label.any():
            near = torch.from_numpy(ndimage.distance_transform_edt(~label[0].numpy(), sampling=spacing))[None] <= NEAR
        bins = reliability_bins(mean[near], label[near])
        self.bins += bins
        self.spreads.append((volume["below"], volume["above"]))
        nll = torch.nn.functional.binary_cross_entropy(
            mean.clamp(CLOSEST, 1 - CLOSEST), label.float(), reduction="none"
        ).double()
        wrong = (found != label)[near]
        true = millilitres(case["label"] > 0)
        return {
            "case": case["case"],
            "dice": dice(found, label),
            "hd95_mm": self._surface_distance(found, label, spacing),
            "ece": calibration_error(reliability_bins(mean, label)),
            "near_ece": calibration_error(bins) if near.any() else math.nan,
            "nll": nll.mean().item(),
            "near_nll": nll[near].mean().item(),
            "error_auroc": roc_auc_score(wrong, entropy[near]) if 0 < wrong.sum() < len(wrong) else math.nan,
            "energy": energy_distance(masks, label),
            "diversity": 1 - float(np.mean([dice(mask[None], found) for mask in masks])),
            "predicted_ml": volume["ml"],
            "true_ml": true,
            "low_ml": volume["low_ml"],
            "high_ml": volume["high_ml"],
            "raw_covered": float(volume["ml"] - volume["below"] <= true <= volume["ml"] + volume["above"]),
            "covered": float(volume["low_ml"] <= true <= volume["high_ml"]),
            "width_ml": volume["high_ml"] - volume["low_ml"],
            "agreement": volume["agreement"],
            "look": volume["look"],
        }

    @staticmethod
    def _surface_distance(found: Tensor, label: Tensor, spacing: Sequence[float]) -> float:
        if not (found.any() and label.any()):
            return math.nan
        masks = (mask[None].float() for mask in (found, label))
        return compute_hausdorff_distance(*masks, include_background=True, percentile=95, spacing=spacing).item()

    def _summarise(self, mean: Mapping[str, float], std: Mapping[str, float]) -> dict[str, float]:
        summary = {"num_cases": len(self.rows), "dice_std": std["dice"]}
        for key in self.means:
            ends = bootstrap_interval([row[key] for row in self.rows])
            summary |= {key: mean[key], f"{key}_low": ends[0], f"{key}_high": ends[1]}
        column = {key: np.array([row[key] for row in self.rows]) for key in ("predicted_ml", "true_ml", "agreement")}
        try:
            factor = conformal_factor(column["predicted_ml"], np.array(self.spreads), column["true_ml"], self.level)
        except ValueError:  # too few cases
            factor = math.nan
        return {
            **summary,
            "pooled_near_ece": calibration_error(self.bins),
            "factor_needed": factor,
            "look_quartile": float(np.quantile(column["agreement"], 0.25)),
        }

    def _finish(self, engine: Any) -> None:
        super()._finish(engine)
        if self.rows:
            check_own(*self.reliability)
            table, picture = self.reliability
            write_rows(table, [dict(zip(("voxels", "probability", "lesion"), row, strict=True)) for row in self.bins])
            with own_file(picture) as aside:
                reliability_figure(aside, {self.name: self.bins})
