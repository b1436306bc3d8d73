"""How well anomaly maps fit masks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import NdarrayOrTensor, PathLike
from monai.data import MetaTensor
from monai.metrics import compute_dice
from monai.utils import convert_to_tensor
from scipy import ndimage
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor

from scripts.metrics import CohortMetrics, bootstrap_interval, dice
from scripts.transforms import upright

__all__ = ["SIZES", "AnomalyMetrics", "BinnedScores", "ImageMetrics", "cohort_figures", "lesions_found"]

BOOTSTRAPPED = ("dice", "slice_dice", "all_slices_dice", "healthy_ml", "control_dice", "control_healthy_ml")
SIZES = {"below 1 ml": (0.0, 1.0), "1 to 10 ml": (1.0, 10.0), "above 10 ml": (10.0, math.inf)}  # of lesions


class BinnedScores:
    """Scores of positives and negatives as two histograms: measures over any number of scores in flat memory.

    Bin 0 holds the scores at or below the lower bound, bin k the scores in ``(edge[k - 1], edge[k]]``, the last one
    also the scores above the upper bound. "Score > threshold" is therefore exact wherever the threshold is an edge, and
    the many zeros of a map stay apart from small scores.

    Args:
        bins: number of equal steps between the bounds; every measure is that of the scores rounded up to a step.
        value_range: lower and upper bound of the scores. Scores beyond it are not told apart from each other.

    Raises:
        ValueError: when ``bins`` is below 1 or the range is empty.
    """

    def __init__(self, bins: int = 4096, value_range: tuple[float, float] = (0.0, 1.0)) -> None:
        low, high = value_range
        if bins < 1 or not low < high:
            raise ValueError(f"At least one bin and a rising range are needed, got bins={bins} and {value_range}.")
        self.edges = np.linspace(low, high, bins + 1)
        self.counts = np.zeros((2, bins + 1), dtype=np.int64)  # row 0: negatives, row 1: positives

    def add(self, scores: NdarrayOrTensor, labels: NdarrayOrTensor) -> None:
        """Count scores in.

        Args:
            scores: numbers of any shape.
            labels: of the same shape, above 0 for positives.

        Raises:
            ValueError: when the shapes differ or a score is not a number.
        """
        scores, labels = torch.as_tensor(scores).double(), torch.as_tensor(labels) > 0
        if scores.shape != labels.shape:
            raise ValueError(f"Scores have shape {tuple(scores.shape)}, labels have {tuple(labels.shape)}.")
        if scores.isnan().any():
            raise ValueError("There are scores that are not a number (NaN).")
        low, high, bins = self.edges[0], self.edges[-1], len(self.edges) - 1
        index = ((scores - low) * (bins / (high - low))).ceil().clamp(0, bins).long()
        for row, chosen in zip(self.counts, (~labels, labels), strict=True):
            row += torch.bincount(index[chosen], minlength=bins + 1).cpu().numpy()

    def auroc(self) -> float:
        """Area under the receiver operating characteristic, in [0, 1]; NaN where a class is absent."""
        return self._of_ranks(roc_auc_score)

    def auprc(self) -> float:
        """Average precision, in [0, 1]; NaN where a class is absent."""
        return self._of_ranks(average_precision_score)

    def best_dice(self) -> tuple[float, float]:
        """Largest Dice over all thresholds from the lower bound up, and its threshold; NaN without positives."""
        if not self.counts[1].any():
            return math.nan, math.nan
        dices = self._dices()
        best = int(dices.argmax())
        return float(dices[best]), float(self.edges[best])

    def dice_at(self, threshold: float) -> float:
        """Dice of "score > threshold", the threshold being rounded to the nearest edge; 1 where both are empty."""
        return float(self._dices()[np.abs(self.edges - threshold).argmin()])

    def _of_ranks(self, measure: Any) -> float:
        if not self.counts.any(axis=1).all():
            return math.nan
        rank = np.arange(len(self.edges))  # both measures depend on the order of scores only
        labels = np.repeat([0, 1], len(rank))
        return float(measure(labels, np.tile(rank, 2), sample_weight=self.counts.ravel()))

    def _dices(self) -> np.ndarray:
        positives = self.counts[1].sum()
        above = self.counts.sum(axis=1, keepdims=True) - self.counts.cumsum(axis=1)
        size = above.sum(axis=0) + positives
        return np.where(size > 0, 2 * above[1] / np.maximum(size, 1), 1.0)


def lesions_found(
    pred: np.ndarray, label: np.ndarray, voxel_ml: float, least_share: float = 0.1
) -> list[tuple[float, bool]]:
    """Size of every lesion of a volume in millilitres, and whether it was found: at least so much of it.

    Args:
        pred: found mask, bool (H, W, D).
        label: true mask, bool (H, W, D); a lesion is what hangs together in it, by corners too.
        voxel_ml: size of a voxel in millilitres.
        least_share: share of a lesion's voxels in the found mask, from which it counts as found.
    """
    lesions, number = ndimage.label(label, structure=np.ones((3, 3, 3)))
    sizes = np.bincount(lesions.ravel(), minlength=number + 1)[1:]
    found = np.bincount(lesions[pred], minlength=number + 1)[1:]
    return [(float(size * voxel_ml), bool(part >= least_share * size)) for size, part in zip(sizes, found, strict=True)]


def cohort_figures(
    maps: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    own: Sequence[np.ndarray],
    truth: Sequence[tuple[np.ndarray, float]],
) -> dict[str, Any]:
    """Figures of a method over all slices of a labelled cohort.

    Args:
        maps: anomaly map of each case, (H, W, D), axial slices last, 0 or more.
        masks: what is found by a threshold, bool (H, W, D).
        own: the method's own mask, bool (H, W, D).
        truth: of each case the true mask, bool (H, W, D), and the size of a voxel in millilitres.

    Returns:
        ``dice`` of the masks, mean over the cases, with its bootstrap interval (``dice_low``, ``dice_high``); the same of
        ``own_dice``; ``recall <size>``: share of the lesions of a size that are found, see :func:`lesions_found`;
        ``best_dice`` and ``auprc`` of all voxels together; ``slice_auroc`` of the largest value of the map in a slice
        against "shows a lesion"; ``false_ml`` and ``own_false_ml``: found in lesion-free slices, millilitres a case;
        and ``cases``, a row of each.
    """
    pooled = BinnedScores(value_range=(0.0, max(float(max(anomaly.max() for anomaly in maps)), 1e-6)))
    rows, lesions, scores, ill = [], [], [], []
    for anomaly, mask, found, (label, voxel_ml) in zip(maps, masks, own, truth, strict=True):
        pooled.add(anomaly, label)
        lesions += lesions_found(mask, label, voxel_ml)
        scores += anomaly.max(axis=(0, 1)).tolist()
        shows = label.any(axis=(0, 1))
        ill += shows.tolist()
        rows.append(
            {
                "dice": dice(mask, label),
                "own_dice": dice(found, label),
                "false_ml": float(mask[..., ~shows].sum() * voxel_ml),
                "own_false_ml": float(found[..., ~shows].sum() * voxel_ml),
                "found_ml": float(mask.sum() * voxel_ml),
                "true_ml": float(label.sum() * voxel_ml),
            }
        )
    figures = {}
    for key in ("dice", "own_dice"):
        values = [row[key] for row in rows]
        low, high = bootstrap_interval(values)
        figures |= {key: float(np.mean(values)), f"{key}_low": low, f"{key}_high": high}
    for size, (least, most) in SIZES.items():
        hits = [hit for volume, hit in lesions if least <= volume < most]
        figures[f"recall {size}"] = float(np.mean(hits)) if hits else math.nan
    return {
        **figures,
        "best_dice": pooled.best_dice()[0],
        "auprc": pooled.auprc(),
        "slice_auroc": float(roc_auc_score(ill, scores)) if 0 < sum(ill) < len(ill) else math.nan,
        **{key: float(np.mean([row[key] for row in rows])) for key in ("false_ml", "own_false_ml")},
        "cases": rows,
    }


class AnomalyMetrics(CohortMetrics):
    """Ignite handler that writes an anomaly evaluation: a row a case, and the figures pooled over the cohort.

    It reads ``engine.state.batch`` and ``engine.state.output`` after the evaluator's postprocessing, lists with one dict a
    case, which together hold:

    - ``case``: name;
    - ``label``: (1, H, W, D) ``MetaTensor``, lesion where above 0, whatever its class;
    - ``pred``: (1, H, W, D), found mask;
    - ``map``: (1, H, W, D), anomaly map, 0 or more;
    - ``probability``: (1, H, W, D), of disease, constant over a slice, 0 on slices that were skipped; or ``slice_score``;
    - ``control``, if there is one: (1, H, W, D), mask of a control that is measured beside.

    Slices with 1 to ``min_lesion_area - 1`` lesion pixels are neither healthy nor diseased: they count in the voxel
    figures only.

    Columns of ``metrics.csv`` (NaN where a figure does not exist, e.g. AUROC of a case without lesion; rows ``mean``
    and ``std``, over the cases that have the figure, come last):

    - ``dice``: mask against label; ``best_dice``: largest Dice of the case's map over all thresholds;
    - ``slice_dice``: mean Dice of slices with at least ``min_lesion_area`` lesion pixels; ``all_slices_dice``: the same of
      all slices that were not skipped, 1 where there is no lesion and nothing is found;
    - ``auroc``, ``auprc``: of the map over all voxels;
    - ``lesion_mean``: mean map in the lesion; ``healthy_slice_mean``: mean map over slices without lesion;
    - ``predicted_ml``, ``true_ml``: volumes in millilitres; ``healthy_ml``: of what is found in slices without a lesion;
      ``num_slices``: slices that were not skipped;
    - ``control_dice``, ``control_healthy_ml``: the same of the control.

    Pooled figures, in ``engine.state.metrics`` and ``metrics_summary.json`` (null where a figure does not exist):

    - ``num_cases``, ``dice_mean``, ``dice_std``; of ``dice`` and what else is in :data:`BOOTSTRAPPED`, ``<figure>_mean``,
      ``<figure>_low`` and ``<figure>_high``: 95 % bootstrap interval over the cases;
    - ``best_dice``, ``best_threshold``: largest Dice with one threshold for all voxels of the cohort;
    - ``auroc``, ``auprc``: of all voxels;
    - ``best_dice_lesion_slices``, ``auroc_lesion_slices``, ``auprc_lesion_slices``: the same of slices with a lesion voxel
      only (the literature has both);
    - ``slice_auroc``, ``slice_auprc``: probability against "diseased slice", without ambiguous and skipped slices;
    - ``healthy_ratio``: mean map over slices without lesion, divided by mean map in lesions.

    Args:
        output_dir: folder of the two files, made if it is missing.
        value_range: bounds of the anomaly map; values beyond it are not told apart from each other.
        slice_dim: axis that slices are counted along: 0 to the right, 1 to the front, 2 to the head.
        min_lesion_area: lesion pixels from which a slice counts as diseased.
        slice_score: key of what takes the place of the probability, in [0, 1], too: such as ``abnormality``.
        filename: name of the table; the pooled figures are in ``<its stem>_summary.json``.
    """

    def __init__(
        self,
        output_dir: PathLike,
        value_range: tuple[float, float] = (0.0, 3.0),
        slice_dim: int = 2,
        min_lesion_area: int = 20,
        slice_score: str = "probability",
        filename: str = "metrics.csv",
    ) -> None:
        self.value_range = value_range
        self.slice_score = slice_score
        self.slice_dim = slice_dim
        self.min_lesion_area = min_lesion_area
        super().__init__(output_dir, filename)

    def _reset(self) -> None:
        super()._reset()
        self.voxels = BinnedScores(value_range=self.value_range)
        self.lesion_slice_voxels = BinnedScores(value_range=self.value_range)
        self.slices = BinnedScores(value_range=(-16.0, 16.0))  # logits: many probabilities lie close to 0 and 1
        self.sums = torch.zeros(2, 2, dtype=torch.float64)  # healthy slices, lesions: sum of the map, voxels

    def _evaluate(self, case: Mapping[str, Any]) -> dict[str, Any]:
        """Count one case into the pooled figures.

        Args:
            case: dict as described above.

        Returns:
            the case's row.

        Raises:
            ValueError: when the label is missing, a shape differs from the map's, or the map holds NaN.
        """
        name = case["case"]
        if case.get("label") is None:
            raise ValueError(
                f"Case {name} has no label to evaluate against: add one to the data set, leave the case out, or run "
                "inference only."
            )
        shape = tuple(case["map"].shape)
        for key in ("label", "pred", self.slice_score):
            if tuple(case[key].shape) != shape:
                raise ValueError(f"Case {name}: {key} has shape {tuple(case[key].shape)}, the anomaly map has {shape}.")

        anomaly = self._slices(case["map"]).double()
        label = self._slices(case["label"]) > 0
        pred = self._slices(case["pred"]) > 0
        probability = self._slices(case[self.slice_score]).amax(dim=1)
        if anomaly.isnan().any():
            raise ValueError(f"Case {name}: its anomaly map has voxels that are not a number (NaN).")

        area = label.sum(dim=1)
        shown = probability > 0
        healthy = shown & (area == 0)
        diseased = area >= self.min_lesion_area
        clear = healthy | (shown & diseased)

        voxels = BinnedScores(value_range=self.value_range)
        voxels.add(anomaly, label)
        self.voxels.counts += voxels.counts
        self.lesion_slice_voxels.add(anomaly[area > 0], label[area > 0])
        self.slices.add(torch.logit(probability[clear].double(), eps=1e-7), diseased[clear])
        for sums, values in zip(self.sums, (anomaly[healthy], anomaly[label]), strict=True):
            sums += torch.stack([values.sum(), torch.tensor(values.numel())])

        voxel_ml = abs(float(torch.linalg.det(case["label"].affine[:3, :3].double()))) / 1000
        row = {
            "case": name,
            "dice": dice(pred, label),
            "best_dice": voxels.best_dice()[0],
            "slice_dice": self._mean_dice(pred[diseased], label[diseased]),
            "all_slices_dice": self._mean_dice(pred[shown], label[shown]),
            "auroc": voxels.auroc(),
            "auprc": voxels.auprc(),
            "lesion_mean": anomaly[label].mean().item(),
            "healthy_slice_mean": anomaly[healthy].mean().item(),
            "predicted_ml": pred.sum().item() * voxel_ml,
            "true_ml": label.sum().item() * voxel_ml,
            "healthy_ml": pred[area == 0].sum().item() * voxel_ml,
            "num_slices": shown.sum().item(),
        }
        if "control" in case:
            control = self._slices(case["control"]) > 0
            row["control_dice"] = dice(control, label)
            row["control_healthy_ml"] = control[area == 0].sum().item() * voxel_ml
        return row

    def _mean_dice(self, pred: Tensor, label: Tensor) -> float:
        """Mean Dice of slices (N, pixels); NaN of none."""
        return compute_dice(pred[:, None], label[:, None], ignore_empty=False).mean().item() if len(pred) else math.nan

    def _slices(self, volume: NdarrayOrTensor) -> Tensor:
        """(1, H, W, D) to (slices, pixels of a slice), a plain tensor on the CPU, whatever axes the scan is stored with."""
        volume = upright(volume) if isinstance(volume, MetaTensor) else volume
        volume = convert_to_tensor(volume, device="cpu", track_meta=False)[0]
        return volume.movedim(self.slice_dim, 0).flatten(1)

    def _summarise(self, mean: Mapping[str, float], std: Mapping[str, float]) -> dict[str, float]:
        best_dice, best_threshold = self.voxels.best_dice()
        healthy_mean, lesion_mean = self.sums[:, 0] / self.sums[:, 1]
        intervals = {}
        for key in (key for key in BOOTSTRAPPED if key in mean):
            low, high = bootstrap_interval([row[key] for row in self.rows])
            intervals |= {f"{key}_mean": mean[key], f"{key}_low": low, f"{key}_high": high}
        return {
            "num_cases": len(self.rows),
            "dice_mean": mean["dice"],
            "dice_std": std["dice"],
            **intervals,
            "best_dice": best_dice,
            "best_threshold": best_threshold,
            "auroc": self.voxels.auroc(),
            "auprc": self.voxels.auprc(),
            "best_dice_lesion_slices": self.lesion_slice_voxels.best_dice()[0],
            "auroc_lesion_slices": self.lesion_slice_voxels.auroc(),
            "auprc_lesion_slices": self.lesion_slice_voxels.auprc(),
            "slice_auroc": self.slices.auroc(),
            "slice_auprc": self.slices.auprc(),
            "healthy_ratio": (healthy_mean / lesion_mean).item(),
        }


class ImageMetrics(CohortMetrics):
    """Ignite handler that writes the evaluation of images that have a class, and no mask: a row an image, and the cohort.

    It reads what :class:`AnomalyMetrics` reads, but for ``class_label``, 0 for healthy and 1 for diseased, in place of
    ``label``.

    Columns of ``metrics.csv``: ``class_label``; ``probability``, of disease, the largest over the slices; ``map_mean``, mean
    of the anomaly map; ``found``, share of the voxels that were found.

    Figures of the cohort, in ``engine.state.metrics`` and ``metrics_summary.json`` (null where a figure does not exist):
    ``num_healthy``, ``num_diseased``; ``auroc``, ``auprc`` of the probability, and ``map_auroc``, ``map_auprc`` of the mean
    map, of telling the classes apart; ``healthy_ratio``, mean map of healthy images divided by that of diseased ones;
    ``found_in_healthy``, ``found_in_diseased``, shares of the images in which anything was found.

    Args:
        output_dir: folder of the two files, made if it is missing.
        filename: name of the table; the cohort's figures are in ``<its stem>_summary.json``.
    """

    def _evaluate(self, case: Mapping[str, Any]) -> dict[str, Any]:
        """The row of a case.

        Raises:
            ValueError: if it has no class.
        """
        if case.get("class_label") is None:
            raise ValueError(
                f"Case {case['case']} has no class to evaluate against: put the images into folders healthy/ and diseased/, "
                "or run inference only."
            )
        return {
            "case": case["case"],
            "class_label": int(case["class_label"]),
            "probability": float(case["probability"].max()),
            "map_mean": float(case["map"].double().mean()),
            "found": float((case["pred"] > 0).double().mean()),
        }

    def _summarise(self, mean: Mapping[str, float], std: Mapping[str, float]) -> dict[str, float]:
        columns = {key: np.array([row[key] for row in self.rows], dtype=float) for key in list(self.rows[0])[1:]}
        diseased = columns["class_label"] > 0
        both = 0 < diseased.sum() < len(diseased)
        figures = {"num_healthy": int((~diseased).sum()), "num_diseased": int(diseased.sum())}
        for prefix, key in (("", "probability"), ("map_", "map_mean")):
            for name, measure in (("auroc", roc_auc_score), ("auprc", average_precision_score)):
                figures[prefix + name] = float(measure(diseased, columns[key])) if both else math.nan
        figures["healthy_ratio"] = math.nan
        if both and columns["map_mean"][diseased].mean() > 0:
            figures["healthy_ratio"] = float(columns["map_mean"][~diseased].mean() / columns["map_mean"][diseased].mean())
        for name, members in (("found_in_healthy", ~diseased), ("found_in_diseased", diseased)):
            figures[name] = float((columns["found"][members] > 0).mean()) if members.any() else math.nan
        return figures
