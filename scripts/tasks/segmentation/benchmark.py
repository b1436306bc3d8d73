"""Work, speed and accuracy of segmentation by diffusion, against the published procedure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from scripts.bundle import configuration
from scripts.metrics import dice
from scripts.speed import Trial, compare

__all__ = ["labelled_slices", "segmentation_benchmark"]


def labelled_slices(bundle: Path, dataset_dir: str, number: int, section: str) -> tuple[Tensor, Tensor]:
    """Slices with a lesion, the first half, then as many without, read as the training reads them: a fixed choice.

    Returns:
        images (N, C, H, W) in [0, 1], and masks (N, 1, H, W), bool.
    """
    parser = configuration(bundle, "train")
    parser["dataset_dir"], parser["validate#dataset#data#section"] = str(dataset_dir), section
    dataset = parser.get_parsed_content("validate#dataset")
    rng, chosen = np.random.default_rng(0), []
    for label, wanted in ((1, number - number // 2), (0, number // 2)):
        chosen += sorted(rng.permutation(np.flatnonzero(dataset.class_labels == label))[:wanted].tolist())
    items = [dataset[index] for index in chosen]
    return torch.stack([item["image"] for item in items]), torch.stack([item["label"] for item in items]) > 0


def segmentation_benchmark(
    bundle: Path, networks: Mapping[str, nn.Module], dataset_dir: str, number: int, section: str
) -> list[dict]:
    """Work, speed and accuracy on slices, see :func:`scripts.speed.compare`.

    Args:
        bundle: folder of the bundle.
        networks: see :func:`scripts.speed.compare`.
        dataset_dir: folder of labelled cases.
        number: number of slices, half of them with a lesion.
        section: section of the cases.
    """
    images, masks = labelled_slices(bundle, dataset_dir, number, section)

    def judge(outputs: list[Tensor]) -> dict[str, float]:
        mean = torch.cat(outputs)[:, :1]
        lesion = masks.flatten(1).any(dim=1)
        return {
            "dice": float(np.mean([dice(p > 0.5, y) for p, y in zip(mean[lesion], masks[lesion], strict=True)])),
            "pooled_dice": dice(mean > 0.5, masks),
            "brier": ((mean - masks.float()) ** 2).mean().item(),
        }

    trial = Trial(
        images.split(1),
        "slice",
        configuration(bundle, "inference")["batch_size"],
        judge=judge,
        columns={"dice": "Dice of lesion slices", "pooled_dice": "Dice of all pixels", "brier": ("Brier score", ".5f")},
    )
    return compare(networks, trial, next(networks["default"].parameters()).device)
