"""Work and speed of the motion bundles against the published procedure."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from scripts.bundle import build_network, configuration
from scripts.speed import Trial, compare

__all__ = ["DenseCorrelation", "cine_benchmark", "control"]

logger = logging.getLogger(__name__)


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


def cine_benchmark(
    bundle: Path, networks: Mapping[str, nn.Module], dataset_dir: str, number: int, section: str
) -> list[dict]:
    """Work and speed of inference, see :func:`scripts.speed.compare`, and of a training step by the window.

    ``without refinement`` does what the published procedure does; ``refinement alone`` is the control without a network, in
    as many steps as the default. ``difference`` is the largest one of a frame from the published one's, the source's range
    being 2.

    Args:
        bundle: folder of a bundle of cines.
        networks: see :func:`scripts.speed.compare`.
        dataset_dir: folder of the cines.
        number: number of cines.
        section: section of the cines.
    """
    parser = configuration(bundle, "train")
    parser["dataset_dir"], parser["training_section"] = str(dataset_dir), section
    dataset = parser.get_parsed_content("train#dataset")
    cines = [dataset[(i, i)]["image"][None] for i in range(min(number, len(dataset)))]
    device = next(networks["published"].parameters()).device
    published = [networks["published"](cine[:, [0, -1]].to(device)).cpu() for cine in cines]

    def difference(frames: list[Tensor]) -> dict[str, float]:
        pairs = zip(frames, published, strict=True)  # a control may make the frames alone, without the displacements
        return {"difference": max((made - true[:, : made.shape[1]]).abs().max().item() for made, true in pairs)}

    trial = Trial(
        [cine[:, [0, -1]] for cine in cines],
        "cine",
        judge=difference,
        columns={"difference": ("largest difference", ".1e")},
        others={
            "without refinement": build_network(bundle, amp=False, refinement_steps=0, coarse_steps=0),
            "refinement alone": control(bundle).to(device),
        },
    )
    rows = compare(networks, trial, device)
    trained, cine = parser.get_parsed_content("network_def").to(device).train(), cines[0].to(device)
    seconds = []
    for similarity in (trained.mismatch.similarity, DenseCorrelation().to(device)):
        trained.mismatch = replace(trained.mismatch, similarity=similarity)
        seconds.append(_seconds_of_training_step(trained, cine))
    logger.info(f"training step {seconds[0]:.3f} s, with a dense window {seconds[1] / seconds[0]:.2f} times as long")
    return rows


def control(bundle: Path) -> nn.Module:
    """The refinement alone with the settings of the bundle's inference, in 32 bits."""
    parser = configuration(bundle, "inference", "evaluate_refinement")
    parser["amp"] = False
    return parser.get_parsed_content("network_def").eval()


def _seconds_of_training_step(network: nn.Module, cine: Tensor, repeats: int = 3) -> float:
    """The shortest of several, after one that pays for set-up."""
    seconds = []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        loss = sum(network.losses(cine, None, torch.Generator(cine.device)).values())
        loss.backward()
        loss.item()  # waits for a GPU
        seconds.append(time.perf_counter() - begun)
    return min(seconds[1:])
