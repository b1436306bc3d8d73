"""Speed and quality of sampling, against the published procedure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from monai.bundle import ConfigParser
from monai.config import PathLike
from torch import nn

from scripts.speed import Trial, compare
from scripts.tasks.generation.evaluation import COLUMNS, eight_bit
from scripts.tasks.generation.metrics import image_scores
from scripts.tasks.generation.transforms import seeded_noise

__all__ = ["benchmark_sampling"]

LOOK = {key: COLUMNS[key] for key in ("mmd", "mmd_mean", "frechet", "ms_ssim")}  # of :func:`image_scores`


def benchmark_sampling(
    bundle: Path, networks: Mapping[str, nn.Module], dataset_dir: PathLike, number: int, section: str
) -> list[dict]:
    """Work, speed and quality of sampling, from the same noise with the same weights, see :func:`scripts.speed.compare`.

    Args:
        bundle: folder of a bundle whose ``evaluate.json`` has ``training``, ``validation``, ``features`` and
            ``batch_size``.
        networks: see :func:`scripts.speed.compare`.
        dataset_dir: folder of real images.
        number: images of each; a Fréchet distance needs more of them than there are features.
        section: section of the real images that they are compared with.
    """
    parser = ConfigParser()
    parser.read_config([bundle / "configs" / f"{name}.json" for name in ("inference", "evaluate")])
    parser["bundle_root"], parser["dataset_dir"], parser["validation#section"] = str(bundle), str(dataset_dir), section
    real, features, batch_size = (parser.get_parsed_content(name) for name in ("validation", "features", "batch_size"))
    trial = Trial(
        [seeded_noise(seed, real.shape[1:])[None] for seed in range(number)],
        "image",
        min(batch_size, number),
        judge=lambda images: image_scores(eight_bit(torch.cat(images)), real, features),
        columns=LOOK,
    )
    return compare(networks, trial, next(networks["default"].parameters()).device)
