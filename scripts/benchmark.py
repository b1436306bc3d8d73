"""Speed and accuracy of the anomaly bundles: against the published procedure, and over the settings.

They are measured on labelled slices, or on painted ones where a bundle's data have no labels.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.transforms import Compose
from torch import Tensor, nn

from scripts.datasets import find_cases
from scripts.figures import guidance_table_figure
from scripts.metrics import BinnedScores, dice
from scripts.sprites import healthy_images, paint_sprites
from scripts.transforms import ExtractSlicesd, MapToMask

__all__ = [
    "benchmark",
    "build_network",
    "drawn_slices",
    "grey_level_baseline",
    "healthy_slices",
    "labelled_slices",
    "tune",
]

logger = logging.getLogger(__name__)


def build_network(bundle: Path, **settings: Any) -> nn.Module:
    """The bundle's network with its weights, in evaluation mode; ``settings`` replace arguments of ``network_def``."""
    parser = ConfigParser()
    parser.read_config(bundle / "configs" / "inference.json")
    for name, value in settings.items():
        parser[f"network_def#{name}"] = value
    network = parser.get_parsed_content("network_def").to(parser.get_parsed_content("device"))
    network.load_state_dict(torch.load(bundle / "models" / "model.pt", map_location="cpu", weights_only=True))
    return network.eval()


def labelled_slices(bundle: Path, dataset_dir: str, section: str) -> Iterator[list[dict]]:
    """Slices of one labelled case after the other, on the network's grid.

    Yields:
        a case's slices with enough foreground, each with ``image`` (C, H, W) in [0, 1], ``label`` (1, H, W) and
        ``class_label``.

    Raises:
        FileNotFoundError: if there are no labelled cases.
    """
    parser = ConfigParser()
    parser.read_config(bundle / "configs" / "train.json")
    cases = [c for c in find_cases(dataset_dir, parser.get_parsed_content("sequences"), section=section) if "label" in c]
    if not cases:
        raise FileNotFoundError(f"{dataset_dir}: no case of the section '{section}' has a mask")
    preprocessing = parser.get_parsed_content("preprocessing").transforms[:-1]
    slices_of = Compose([*preprocessing, ExtractSlicesd(keys=["image", "label"])])
    for case in cases:
        yield slices_of(case)


def healthy_slices(bundle: Path, dataset_dir: str, section: str, number: int | None = None) -> Tensor:
    """Held-out healthy slices (N, C, H, W) in [0, 1], read as the bundle's training reads them.

    Args:
        bundle: folder of a bundle whose ``train.json`` has ``validate_section``.
        dataset_dir: folder of healthy scans.
        section: section of the cases.
        number: how many slices, evenly spaced over those with foreground; None for all.

    Raises:
        ValueError: if there are fewer than ``number``.
    """
    parser = ConfigParser()
    parser.read_config(bundle / "configs" / "train.json")
    parser["dataset_dir"], parser["validate_section"] = str(dataset_dir), section
    return healthy_images(parser.get_parsed_content("validate#dataset"), number)


def drawn_slices(bundle: Path, dataset_dir: str, num_slices: int, section: str) -> tuple[Tensor, Tensor]:
    """Slices with lesion, then as many without, a fixed choice from the cases of a section.

    If the bundle's ``evaluate.json`` has ``sprites``, arguments of :func:`scripts.sprites.paint_sprites`, the lesions are
    painted into the first half of evenly spaced healthy slices.

    Returns:
        images (N, C, H, W) in [0, 1], and masks (N, 1, H, W), bool.
    """
    parser = ConfigParser()
    parser.read_config([bundle / "configs" / f"{name}.json" for name in ("inference", "evaluate")])
    if "sprites" in parser:
        images = healthy_slices(bundle, dataset_dir, section, num_slices)
        masks = torch.zeros_like(images[:, :1], dtype=torch.bool)
        half = num_slices // 2
        images[:half], masks[:half] = paint_sprites(images[:half], **parser.get_parsed_content("sprites"))
        return images, masks
    slices = [item for case in labelled_slices(bundle, dataset_dir, section) for item in case]
    rng = np.random.default_rng(0)
    chosen = []
    for label, number in ((1, num_slices // 2), (0, num_slices - num_slices // 2)):
        members = [i for i, item in enumerate(slices) if item["class_label"] == label]
        chosen += sorted(rng.permutation(members)[:number].tolist())
    images, masks = (torch.stack([slices[i][key] for i in chosen]) for key in ("image", "label"))
    return images, masks > 0


def grey_level_baseline(bundle: Path, dataset_dir: str, channel: int) -> float:
    """Mean Dice over the test volumes of a plain threshold on one sequence, the best one for the validation volumes."""

    def dices(section: str, thresholds: Sequence[float]) -> np.ndarray:
        volumes = [
            [torch.stack([item[key] for item in case]) for key in ("image", "label")]
            for case in labelled_slices(bundle, dataset_dir, section)
        ]
        return np.array([[dice(x[:, channel] > t, y[:, 0]) for t in thresholds] for x, y in volumes]).mean(axis=0)

    thresholds = np.linspace(0.3, 1.0, 36).tolist()
    best = thresholds[int(dices("validation", thresholds).argmax())]
    (result,) = dices("test", [best])
    logger.info(f"threshold {best:.2f} on channel {channel}: mean Dice {result:.3f} over the test volumes")
    return float(result)


def _evaluate(network: nn.Module, images: Tensor, masks: Tensor, batch_size: int) -> dict[str, float]:
    """Seconds a slice, and how well the maps of the slices fit the masks."""
    device = next(network.parameters()).device
    begun = time.perf_counter()
    maps = torch.cat([network(batch.to(device)).cpu()[:, :1] for batch in images.split(batch_size)])
    seconds = (time.perf_counter() - begun) / len(images)
    scores = BinnedScores(value_range=(0.0, float(images.shape[1])))
    scores.add(maps, masks)
    lesion = masks.flatten(1).any(dim=1)
    otsu = [dice(MapToMask()(anomaly), mask) for anomaly, mask in zip(maps[lesion], masks[lesion], strict=True)]
    return {
        "seconds": seconds,
        "dice": float(np.mean(otsu)),
        "best_dice": scores.best_dice()[0],
        "auroc": scores.auroc(),
        "healthy_ratio": (maps[~lesion].mean() / maps[masks].mean()).item(),
    }


def benchmark(bundle: Path, dataset_dir: str, num_slices: int, section: str) -> dict[str, dict[str, float]]:
    """Print a table of the published procedure and of the bundle's default, on the same slices with the same weights.

    What the published procedure is, the network says (``published``, settings of its own); it gets one slice at a time.
    Everything else, such as the weights of the sequences in the map, is alike in both, so that the samplers are compared.
    """
    images, masks = drawn_slices(bundle, dataset_dir, num_slices, section)
    default = build_network(bundle)
    parser = ConfigParser()
    parser.read_config(bundle / "configs" / "inference.json")
    published = build_network(bundle, **default.published)
    default(images[:1].to(next(default.parameters()).device))  # the first call pays for set-up
    rows = {
        "default": _evaluate(default, images, masks, parser.get_parsed_content("batch_size")),
        "published": _evaluate(published, images, masks, batch_size=1),
    }
    logger.info(
        f"{len(images)} slices of {dataset_dir} ({section}), half with a lesion; published: "
        f"{', '.join(f'{key} {value}' for key, value in default.published.items())}; "
        f"{torch.get_num_threads()} threads on {next(default.parameters()).device.type}"
    )
    logger.info(f"{'':<12}{'s/slice':>10}{'slices/min':>12}{'Dice Otsu':>12}{'best Dice':>12}{'AUROC':>10}{'healthy':>10}")
    for name, row in rows.items():
        logger.info(
            f"{name:<12}{row['seconds']:>10.3f}{60 / row['seconds']:>12.1f}{row['dice']:>12.3f}{row['best_dice']:>12.3f}"
            f"{row['auroc']:>10.3f}{row['healthy_ratio']:>10.3f}"
        )
    logger.info(f"{rows['published']['seconds'] / rows['default']['seconds']:.1f} times faster")
    return rows


def tune(
    bundle: Path,
    dataset_dir: str,
    noise_levels: Sequence[int],
    gradient_scales: Sequence[float],
    num_slices: int,
    section: str,
    figure: str | None,
    settings: Mapping[str, Any],
) -> list[dict[str, float]]:
    """Print, as a Markdown table, Dice and AUROC of every noise level and gradient scale; draw them if asked to.

    The bundle's network is a :class:`scripts.networks.ddim_anomaly.DDIMAnomalyNet`.
    """
    images, masks = drawn_slices(bundle, dataset_dir, num_slices, section)
    logger.info("| L | s | Dice (Otsu) | best Dice | AUROC | healthy / lesion | s a slice |\n|---|---|---|---|---|---|---|")
    rows = []
    for noise_level in noise_levels:
        for gradient_scale in gradient_scales:
            network = build_network(bundle, **settings, noise_level=noise_level, gradient_scale=float(gradient_scale))
            row = _evaluate(network, images, masks, batch_size=8)
            rows.append({"noise_level": noise_level, "gradient_scale": gradient_scale, **row})
            logger.info(
                f"| {noise_level} | {gradient_scale:g} | {row['dice']:.3f} | {row['best_dice']:.3f} | {row['auroc']:.3f} "
                f"| {row['healthy_ratio']:.3f} | {row['seconds']:.2f} |"
            )
    if figure:
        guidance_table_figure(figure, rows)
    return rows
