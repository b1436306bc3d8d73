"""Do the scores of slices hold when the same slices come as pictures of another size, place, window or sharpness?"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from monai.config import PathLike
from monai.data import MetaTensor
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn.functional import interpolate

from scripts.inferers import run_in_batches
from scripts.tables import markdown_table, mean_and_std, write_rows

__all__ = ["changes_table"]

FLAGGED = 0.5  # score above which a slice counts as unlike healthy ones
ENLARGED = 4


def changes_table(
    network: nn.Module,
    healthy: Tensor,
    painted: Tensor,
    changes: Mapping[str, Callable],
    preprocessing: Callable,
    postprocessing: Callable,
    scores: Mapping[str, str],
    path: PathLike,
    batch_size: int = 8,
) -> list[dict]:
    """Scores of slices that come as changed pictures: print a Markdown table, and write it as CSV.

    Args:
        network: takes slices (B, C, W, H) in [0, 1] to (B, ..., W, H).
        healthy: slices (N, C, W, H) in [0, 1], columns first, of the size that the network takes.
        painted: slices (M, C, W, H) with something to find.
        changes: names and transforms of ``image``, a picture (C, 4 W, 4 H, 1) in [0, 1].
        preprocessing: from the picture, as if it had been read, to the network's frame, (C, W, H, 1).
        postprocessing: takes ``image`` and ``pred`` to the scores, each (1, W, H, 1).
        scores: their keys, and the headings they get.
        path: file of the rows: ``method``, the change; for each score ``flagged_KEY``, the share of healthy slices above
            0.5, and ``auroc_KEY``, painted against healthy ones; and ``unlike_training``, the share of all slices that
            :class:`scripts.fingerprint.CompareWithTrainingd` calls unlike it (above 1).

    Returns:
        the rows.
    """
    rows = []
    for name, change in changes.items():
        items = [preprocessing(change({"image": _picture(slice_)})) for slice_ in (*healthy, *painted)]
        pred, _ = run_in_batches(network, torch.stack([item["image"].as_tensor()[..., 0] for item in items]), batch_size)
        found = [postprocessing({**item, "pred": MetaTensor(p[..., None])}) for item, p in zip(items, pred, strict=True)]
        row: dict = {"method": name}
        for key in scores:
            values = torch.stack([result[key].max() for result in found])
            row[f"flagged_{key}"] = float((values[: len(healthy)] > FLAGGED).float().mean())
            row[f"auroc_{key}"] = float(roc_auc_score(torch.arange(len(values)) >= len(healthy), values))
        unlike = [float(item["image"].meta.get("unlike_training") or 0) > 1 for item in items]
        rows.append({**row, "unlike_training": sum(unlike) / len(unlike)})
    columns: dict[str, str | tuple[str, str]] = {}
    for key, heading in scores.items():
        columns[f"flagged_{key}"] = (f"healthy above 0.5, {heading}", ".0%")
        columns[f"auroc_{key}"] = (f"AUROC of {heading}", ".2f")
    print(markdown_table(mean_and_std(rows), {**columns, "unlike_training": ("unlike the training", ".0%")}))
    write_rows(path, rows)
    return rows


def _picture(slice_: Tensor) -> MetaTensor:
    """A slice as a larger grey picture that was read and scaled to [0, 1]."""
    large = interpolate(slice_[None], scale_factor=ENLARGED, mode="bilinear")[0, ..., None]
    none, factor = [0.0] * len(slice_), [255.0] * len(slice_)
    return MetaTensor(large, meta={"units": "grey", "intensity_scale": factor, "intensity_offset": none})
