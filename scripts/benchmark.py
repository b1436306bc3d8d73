"""Speed of every bundle against the published procedure; accuracy of the anomaly bundles, and over the settings.

The anomaly bundles are measured on labelled slices, or on painted ones where a bundle's data have no labels. Another kind of
bundle names its own function in ``evaluate.json``, see :func:`benchmark`.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from pydoc import locate
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.transforms import Compose
from torch import Tensor, nn

from scripts.datasets import find_cases
from scripts.figures import guidance_table_figure
from scripts.metrics import BinnedScores, dice
from scripts.networks.healthy_model import HealthyModel
from scripts.sprites import healthy_images, paint_sprites
from scripts.transforms import ExtractSlicesd, MapToMask

__all__ = [
    "DenseCorrelation",
    "anomaly_benchmark",
    "benchmark",
    "build_network",
    "cine_benchmark",
    "drawn_slices",
    "grey_level_baseline",
    "healthy_slices",
    "labelled_slices",
    "tune",
]

logger = logging.getLogger(__name__)


def _configuration(bundle: Path, *names: str) -> ConfigParser:
    parser = ConfigParser()
    parser.read_config([bundle / "configs" / f"{name}.json" for name in names])
    parser["bundle_root"] = str(bundle)
    return parser


def build_network(bundle: Path, **settings: Any) -> nn.Module:
    """The bundle's network with its weights, in evaluation mode; ``settings`` replace arguments of ``network_def``."""
    parser = _configuration(bundle, "inference")
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
    parser = _configuration(bundle, "train")
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
    parser = _configuration(bundle, "train")
    parser["dataset_dir"], parser["validate_section"] = str(dataset_dir), section
    return healthy_images(parser.get_parsed_content("validate#dataset"), number)


def drawn_slices(bundle: Path, dataset_dir: str, num_slices: int, section: str) -> tuple[Tensor, Tensor]:
    """Slices with lesion, then as many without, a fixed choice from the cases of a section.

    If the bundle's ``evaluate.json`` has ``sprites``, arguments of :func:`scripts.sprites.paint_sprites`, the lesions are
    painted into the first half of evenly spaced healthy slices.

    Returns:
        images (N, C, H, W) in [0, 1], and masks (N, 1, H, W), bool.
    """
    parser = _configuration(bundle, "inference", "evaluate")
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


def benchmark(bundle: Path, dataset_dir: str, number: int, section: str) -> Any:
    """Print a table of the published procedure and of the bundle's default, on the same data with the same weights.

    What the published procedure is, the network says (``published``, settings of its own). What is measured, and on what,
    is up to the function that ``benchmark`` in the bundle's ``evaluate.json`` names; without it to
    :func:`anomaly_benchmark`, whose arguments it has.
    """
    default = build_network(bundle)
    networks = {"default": default, "published": build_network(bundle, **default.published)}
    settings = ", ".join(f"{key} {value}" for key, value in default.published.items())
    logger.info(f"{bundle.name} on {dataset_dir} ({section}); published: {settings}")
    own = ConfigParser.load_config_file(bundle / "configs" / "evaluate.json").get("benchmark")
    return (locate(own) if own else anomaly_benchmark)(bundle, networks, dataset_dir, number, section)


def anomaly_benchmark(
    bundle: Path, networks: Mapping[str, nn.Module], dataset_dir: str, number: int, section: str
) -> dict[str, dict[str, float]]:
    """Speed and accuracy on slices, of which the published procedure gets one at a time.

    Everything but the procedure, such as the weights of the sequences in the map, is alike in both, so that the samplers
    are compared; a model of healthy slices is calibrated anew for the published procedure, on validation slices.

    Args:
        bundle: folder of an anomaly bundle.
        networks: ``default`` and ``published``.
        dataset_dir: folder of the cases.
        number: number of slices, half of them with a lesion.
        section: section of the cases.
    """
    images, masks = drawn_slices(bundle, dataset_dir, number, section)
    default, published = networks["default"], networks["published"]
    if isinstance(published, HealthyModel):
        healthy = healthy_slices(bundle, dataset_dir, "validation")
        published.calibrate([{"image": batch} for batch in healthy.split(50)])
    default(images[:1].to(next(default.parameters()).device))  # the first call pays for set-up
    rows = {
        "default": _evaluate(default, images, masks, _configuration(bundle, "inference")["batch_size"]),
        "published": _evaluate(published, images, masks, batch_size=1),
    }
    threads, device = torch.get_num_threads(), next(default.parameters()).device.type
    logger.info(f"{len(images)} slices, half with a lesion; {threads} threads on {device}")
    logger.info(f"{'':<12}{'s/slice':>10}{'slices/min':>12}{'Dice Otsu':>12}{'best Dice':>12}{'AUROC':>10}{'healthy':>10}")
    for name, row in rows.items():
        logger.info(
            f"{name:<12}{row['seconds']:>10.3f}{60 / row['seconds']:>12.1f}{row['dice']:>12.3f}{row['best_dice']:>12.3f}"
            f"{row['auroc']:>10.3f}{row['healthy_ratio']:>10.3f}"
        )
    logger.info(f"{rows['published']['seconds'] / rows['default']['seconds']:.1f} times faster")
    return rows


class DenseCorrelation(nn.Module):
    """Mean squared local correlation, negated, by one dense convolution a sum, as the published training computes it.

    Args:
        kernel_size: edge of the window in voxels.
    """

    def __init__(self, kernel_size: int = 9) -> None:
        super().__init__()
        self.register_buffer("window", torch.ones(1, 1, *[kernel_size] * 3))

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        """Of images (B, 1, H, W, D); a scalar."""
        images = (pred, target, pred * pred, target * target, pred * target)
        p, t, pp, tt, pt = (nn.functional.conv3d(image, self.window, padding="same") for image in images)
        number = self.window.numel()
        spread = ((pp - p * p / number).clamp(min=1e-5), (tt - t * t / number).clamp(min=1e-5))
        return -((pt - p * t / number) ** 2 / (spread[0] * spread[1])).mean()


def _seconds(call: Callable[[], Any], repeats: int) -> float:
    """Mean time of a call, after one that pays for set-up."""
    call()
    begun = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begun) / repeats


def cine_benchmark(
    bundle: Path, networks: Mapping[str, nn.Module], dataset_dir: str, number: int, section: str
) -> dict[str, float]:
    """Speed of inference, and of a training step against one with a dense window of the correlation.

    Args:
        bundle: folder of a bundle of cines.
        networks: ``default`` and ``published``.
        dataset_dir: folder of the cines.
        number: number of cines.
        section: section of the cines.

    Returns:
        seconds a cine: ``published``, ``default``, ``unrefined``, the default without its refinement, and ``exact``,
        which is that in 32 bits; ``default_error`` and so on, the largest difference of a frame from the published one, the
        source's range being 2; seconds a training step: ``dense`` and ``step``.
    """
    parser = _configuration(bundle, "train")
    parser["dataset_dir"], parser["training_section"] = str(dataset_dir), section
    dataset = parser.get_parsed_content("train#dataset")
    cines = [dataset[(i, i)]["image"][None] for i in range(min(number, len(dataset)))]
    exact, unrefined = (copy.deepcopy(networks["default"]) for _ in range(2))
    exact.amp, exact.refinement_steps, unrefined.refinement_steps = False, 0, 0
    networks = {**networks, "exact": exact, "unrefined": unrefined}
    frames = {name: [network(cine[:, [0, -1]]) for cine in cines] for name, network in networks.items()}
    rows = {}
    for name, network in networks.items():
        rows[name] = _seconds(lambda run=network: [run(cine[:, [0, -1]]) for cine in cines], 1) / len(cines)
        pairs = zip(frames[name], frames["published"], strict=True)
        rows[f"{name}_error"] = max((made - true).abs().max().item() for made, true in pairs)
    trained = parser.get_parsed_content("network_def").train()
    for name, similarity in (("step", trained.similarity), ("dense", DenseCorrelation())):
        trained.similarity = similarity
        rows[name] = _seconds(lambda: sum(trained.losses(cines[0], None, torch.Generator()).values()).backward(), 3)
    shape = " x ".join(map(str, cines[0].shape[2:]))
    logger.info(f"{len(cines)} cines of {shape}, {len(exact.gammas)} frames; {torch.get_num_threads()} threads")
    for name in ("published", "exact", "unrefined", "default"):
        logger.info(
            f"{name:<12}{rows[name]:>8.3f} s a cine{rows['published'] / rows[name]:>8.2f} times faster, "
            f"largest difference {rows[f'{name}_error']:.1e}"
        )
    ratio = rows["dense"] / rows["step"]
    logger.info(f"training step {rows['step']:.3f} s, with a dense window {rows['dense']:.3f} s ({ratio:.2f} times)")
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
