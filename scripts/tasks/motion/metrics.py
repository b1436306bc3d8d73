"""How generated cines differ from real ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine
from monai.config import NdarrayOrTensor, PathLike
from monai.utils import convert_to_numpy
from skimage.metrics import peak_signal_noise_ratio

from scripts.data.cines import slice_axis
from scripts.files import own_file
from scripts.metrics import CohortMetrics, bootstrap_interval, dice
from scripts.tasks.motion.figures import volume_curves

__all__ = [
    "CineMetrics",
    "FIGURES",
    "STRUCTURES",
    "ejection_fraction",
    "frame_errors",
    "gap_closed_of",
    "pumping",
    "second_difference",
    "structure_dice",
    "volume_curve",
    "wall_thickening",
]

STRUCTURES = {"rv": 1, "myo": 2, "lv": 3}  # ACDC's labels: right ventricle, myocardium, left ventricle


def frame_errors(generated: NdarrayOrTensor, real: NdarrayOrTensor) -> tuple[list[float], list[float]]:
    """PSNR and NMSE of each frame between both ends.

    Args:
        generated: (F, H, W, D).
        real: (F, H, W, D) in the same unit; PSNR takes its range, over all frames, as the range of the data.

    Returns:
        of the frames 1 to F - 2, peak signal-to-noise ratio in dB, and squared error divided by the squares of the real
        frame; nothing if there is none, or there are not as many generated frames as real ones.
    """
    generated, real = (convert_to_numpy(cine, dtype=np.float64) for cine in (generated, real))
    if len(generated) != len(real):
        return [], []
    data_range = real.max() - real.min()
    pairs = list(zip(real[1:-1], generated[1:-1], strict=True))
    psnr = [float(peak_signal_noise_ratio(true, made, data_range=data_range)) for true, made in pairs]
    return psnr, [float(((true - made) ** 2).sum() / (true**2).sum()) for true, made in pairs]


def structure_dice(pred: NdarrayOrTensor, label: NdarrayOrTensor) -> dict[str, float]:
    """Dice of each of :data:`STRUCTURES` between two label maps of one shape; NaN for one that the label map has not."""
    pred, label = (torch.as_tensor(volume) for volume in (pred, label))
    return {
        name: dice(pred == value, label == value) if (label == value).any() else math.nan
        for name, value in STRUCTURES.items()
    }


def gap_closed_of(before: NdarrayOrTensor, after: NdarrayOrTensor, axis: int | None = None) -> np.ndarray:
    """Share of the way from the Dice with nothing done to 1, of the means along ``axis``; NaN where that is no way."""
    before, after = np.mean(before, axis=axis), np.mean(after, axis=axis)
    return np.divide(after - before, 1 - before, out=np.full_like(before, np.nan), where=before < 1)


# of a cohort: the columns that a figure is made of, and how
FIGURES: dict[str, tuple[tuple[str, ...], Callable[..., np.ndarray]]] = {
    "psnr_gain": (("psnr_gain",), np.mean),
    "dice_after": (("dice_after",), np.mean),
    "gap_closed": (("dice_before", "dice_after"), gap_closed_of),
}


def second_difference(displacement: NdarrayOrTensor) -> float:
    """Mean length of the second difference of a displacement along its frames: 0 for a steady motion.

    Args:
        displacement: (3 F, H, W, D).

    Returns:
        in the unit of the displacement; NaN for fewer than three frames.
    """
    frames = torch.as_tensor(displacement).reshape(-1, 3, *displacement.shape[1:])
    if len(frames) < 3:
        return math.nan
    return frames.diff(n=2, dim=0).norm(dim=1).mean().item()


def volume_curve(labels: NdarrayOrTensor, affine: NdarrayOrTensor, value: int = STRUCTURES["lv"]) -> list[float]:
    """Volume of a structure in each frame.

    Args:
        labels: label maps (F, H, W, D).
        affine: (4, 4), in mm.
        value: the structure's label.

    Returns:
        volumes in ml.
    """
    voxel_ml = abs(np.linalg.det(np.asarray(affine)[:3, :3])) / 1000
    return [int(count) * voxel_ml for count in (torch.as_tensor(labels) == value).flatten(1).sum(dim=1)]


def ejection_fraction(first_ml: float, last_ml: float) -> float:
    """Share in percent of the volume at end-diastole that is gone at end-systole; NaN if there is none."""
    return 100 * (first_ml - last_ml) / first_ml if first_ml else math.nan


def wall_thickening(first: NdarrayOrTensor, last: NdarrayOrTensor) -> float:
    """By how many percent the wall of the left ventricle is thicker in the last frame than in the first.

    A slice's thickness is that of a ring with the areas that are labelled: sqrt((A_lv + A_myo) / pi) - sqrt(A_lv / pi). The
    thickening is (T_last - T_first) / T_first, T being the mean over the slices in which both frames have both structures.
    The pixels' size has no part in it.

    Args:
        first: label map of end-diastole (H, W, D), the axis with the fewest voxels (of several, the last) counting slices.
        last: that of end-systole, on the same grid.

    Returns:
        in percent; NaN if no slice has both structures in both frames.
    """
    frames = torch.stack([torch.as_tensor(label).cpu() for label in (first, last)])
    frames = frames.movedim(slice_axis(frames.shape[1:]) + 1, 1).flatten(2)
    cavity, muscle = ((frames == STRUCTURES[name]).sum(dim=2).double() for name in ("lv", "myo"))
    used = ((cavity > 0) & (muscle > 0)).all(dim=0)
    thickness = ((cavity + muscle).sqrt() - cavity.sqrt())[:, used].mean(dim=1)  # NaN of no slice
    return (100 * (thickness[1] / thickness[0] - 1)).item()


def pumping(first: NdarrayOrTensor | None, last: NdarrayOrTensor | None, affine: NdarrayOrTensor) -> dict[str, float]:
    """``ejection_fraction`` and ``wall_thickening`` in percent by the label maps of both ends, (1, H, W, D) each.

    Args:
        first: label map of end-diastole.
        last: that of end-systole; if one of them is None, both figures are NaN.
        affine: (4, 4), in mm.
    """
    if first is None or last is None:
        return {"ejection_fraction": math.nan, "wall_thickening": math.nan}
    volumes = [volume_curve(label, affine)[0] for label in (first, last)]
    return {"ejection_fraction": ejection_fraction(*volumes), "wall_thickening": wall_thickening(first[0], last[0])}


class CineMetrics(CohortMetrics):
    """Ignite handler that writes the evaluation of generated cines, see :class:`scripts.metrics.CohortMetrics`.

    A case's dictionary holds

    - ``case``: name; ``group``, if it has one;
    - ``cine``: the real frames (F, H, W, D) from source to target;
    - ``frames``: the generated ones, as many and evenly spaced, or else there are no figures of the frames;
    - ``displacement``: (3 F, H, W, D) in mm; ``folding``: largest share of voxels, over the frames, that it folds;
    - if there are labels, ``label`` and ``target_label`` (1, H, W, D) of both ends, and ``labels`` (F, H, W, D), the former
      warped to every frame.

    Columns of ``metrics.csv`` (NaN where a figure does not exist):

    - ``psnr`` (dB) and ``nmse``: generated against real frames, both ends left out; ``still_psnr`` and ``still_nmse``: of
      the source repeated; ``psnr_gain``: the difference in dB; ``middle_psnr_gain``: that of the frame in the middle alone,
      of two the earlier one;
    - ``dice_before``, ``dice_after``: label maps of source and last generated frame against the target's, mean over the
      structures; ``gap_closed``: (after - before) / (1 - before); ``dice_after_rv``, ``dice_after_myo``, ``dice_after_lv``
      and the same with ``before``;
    - ``folding_percent``: share of voxels that fold; ``roughness_mm``: mean second difference of the displacement along the
      frames; ``inverse_consistency_mm``, if the way back was found, see
      :class:`scripts.tasks.motion.transforms.MeasureInverseConsistencyd`;
    - ``lv_first_ml``, ``lv_last_ml``, ``lv_true_last_ml``: volumes of the left ventricle at the source, at the last frame,
      and of the target's label map; ``lv_falls``: 1 if it never rises from one frame to the next, else 0;
    - ``ejection_fraction_percent`` and ``wall_thickening_percent`` from the first frame to the last, by the labels that were
      carried along, see :func:`ejection_fraction` and :func:`wall_thickening`; the same with ``true_``: by both ends' own
      label maps; ``ejection_fraction_error``, ``wall_thickening_error``: the former less the latter, in percentage points.

    The figures of the cohort are the means (``lv_falls``: share of the cases), but for ``gap_closed``, which is that of the
    mean Dice before and after, as the literature has it; the mean sizes of both errors are there too, as ``…_abs_error``.
    ``…_low`` and ``…_high`` of ``psnr_gain``, ``dice_after`` and ``gap_closed`` are the ends of 95 % intervals, see
    :func:`scripts.metrics.bootstrap_interval`.
    ``lv_volume.png`` draws the volumes, a line a case.

    Args:
        output_dir: folder of the files, made if it is missing.
        filename: name of the table.
    """

    def __init__(self, output_dir: PathLike, filename: str = "metrics.csv") -> None:
        super().__init__(output_dir, filename)
        self.figure_path = self.table_path.with_name("lv_volume.png")
        self.paths.append(self.figure_path)

    def _reset(self) -> None:
        super()._reset()
        self.curves: dict[str, list[float]] = {}

    def _evaluate(self, case: Mapping[str, Any]) -> dict[str, Any]:
        cine = case["cine"]
        psnrs, nmses = frame_errors(case["frames"], cine)
        still_psnrs, still_nmses = frame_errors(cine[:1].expand(len(case["frames"]), -1, -1, -1), cine)
        psnr, nmse, still_psnr, still_nmse = map(_mean, (psnrs, nmses, still_psnrs, still_nmses))
        middle = (len(psnrs) - 1) // 2
        return {
            "case": case["case"],
            "group": case.get("group", ""),
            "frames": len(case["frames"]),
            "psnr": psnr,
            "still_psnr": still_psnr,
            "psnr_gain": psnr - still_psnr,
            "middle_psnr_gain": psnrs[middle] - still_psnrs[middle] if psnrs else math.nan,
            "nmse": nmse,
            "still_nmse": still_nmse,
            **self._overlap(case),
            "folding_percent": 100 * case["folding"],
            "inverse_consistency_mm": case.get("inverse_consistency", math.nan),
            "roughness_mm": second_difference(case["displacement"]),
            **self._volumes(case),
            **_function(case),
        }

    def _overlap(self, case: Mapping[str, Any]) -> dict[str, float]:
        empty = dict.fromkeys(STRUCTURES, math.nan)
        target = case.get("target_label")
        has_both = target is not None and case.get("label") is not None
        before = structure_dice(case["label"][0].cpu(), target[0]) if has_both else empty
        after = structure_dice(case["labels"][-1].cpu(), target[0]) if has_both else empty
        means = [_mean(dices.values()) for dices in (before, after)]
        return {
            "dice_before": means[0],
            "dice_after": means[1],
            "gap_closed": float(gap_closed_of(*means)),
            **{f"dice_before_{name}": value for name, value in before.items()},
            **{f"dice_after_{name}": value for name, value in after.items()},
        }

    def _volumes(self, case: Mapping[str, Any]) -> dict[str, float]:
        affine, target = case["cine"].affine, case.get("target_label")
        true_last = math.nan if target is None else volume_curve(target, affine)[0]
        if "labels" not in case:
            return {"lv_first_ml": math.nan, "lv_last_ml": math.nan, "lv_true_last_ml": true_last, "lv_falls": math.nan}
        curve = self.curves[case["case"]] = volume_curve(case["labels"], affine)
        falls = all(later <= earlier for earlier, later in zip(curve, curve[1:], strict=False))
        return {"lv_first_ml": curve[0], "lv_last_ml": curve[-1], "lv_true_last_ml": true_last, "lv_falls": int(falls)}

    def _summarise(self, mean: Mapping[str, float], std: Mapping[str, float]) -> dict[str, float]:
        figures = {name: value for name, value in mean.items() if name not in ("case", "frames")}
        gap_closed = float(gap_closed_of(mean["dice_before"], mean["dice_after"]))
        sizes = {
            f"{name}_abs_error": _mean(abs(row[f"{name}_error"]) for row in self.rows)
            for name in ("ejection_fraction", "wall_thickening")
        }
        intervals = {}
        for name, (columns, statistic) in FIGURES.items():
            ends = bootstrap_interval(*([row[column] for row in self.rows] for column in columns), statistic=statistic)
            intervals |= dict(zip((f"{name}_low", f"{name}_high"), ends, strict=True))
        return {"num_cases": len(self.rows), **figures, "gap_closed": gap_closed, **sizes, **intervals}

    def _finish(self, engine: Engine) -> None:
        super()._finish(engine)
        if self.curves:
            with own_file(self.figure_path) as aside:
                volume_curves(aside, self.curves)


def _function(case: Mapping[str, Any]) -> dict[str, float]:
    """How well the heart pumps, by the carried labels and by the true ones."""
    affine, label, target = case["cine"].affine, case.get("label"), case.get("target_label")
    lasts = (case["labels"][-1:] if "labels" in case else None, target)
    carried, true = (pumping(label, last, affine) for last in lasts)
    row = {}
    for name in carried:
        row |= {
            f"{name}_percent": carried[name],
            f"true_{name}_percent": true[name],
            f"{name}_error": carried[name] - true[name],
        }
    return row


def _mean(values: Any) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
