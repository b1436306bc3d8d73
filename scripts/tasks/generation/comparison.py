"""How well copies of training images are found, and members of the training, beside plain distances of pixels."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from monai.config import PathLike
from torch import Tensor, nn

from scripts.corruptions import ALTERATIONS, altered_copies
from scripts.files import check_own, own_file
from scripts.metrics import bootstrap_interval
from scripts.networks.copy_filter import CopyFilter
from scripts.tables import write_rows
from scripts.tasks.generation.evaluation import draw_samples
from scripts.tasks.generation.figures import contact_sheet
from scripts.tasks.generation.metrics import bits_of_each, membership, nearest, nearest_of_versions
from scripts.thresholds import rarely_exceeded

__all__ = ["copy_tables"]

logger = logging.getLogger(__name__)

PLANTED = {kind: (kind,) for kind in ALTERATIONS} | {"all": ALTERATIONS}
PICTURES = ("nearest_real.png", "nearest_generated.png", "missed.png")


def copy_tables(
    network: nn.Module,
    copies: CopyFilter,
    training: Tensor,
    validation: Tensor,
    test: Tensor,
    output_dir: PathLike,
    rate: float = 0.01,
    num_planted: int = 500,
    num_samples: int = 500,
    num_members: int = 500,
    num_times: int = 16,
    batch_size: int = 64,
    seed: int = 0,
) -> tuple[list[dict], list[dict]]:
    """Plant copies of training images, look for them in several ways, and attack the membership of the training.

    Every way has its threshold from the validation images, at one rate of false positives. Files of ``output_dir``:

    - ``copies.csv``: a row a way: the filter, the distance of the pixels, and the least such distance of ten versions
      (:func:`scripts.tasks.generation.metrics.nearest_of_versions`). ``false positives``: share of the test images that
      count as copies. A column for each kind of planted copies (:func:`scripts.corruptions.altered_copies`), and ``all``
      with every kind in half of the images: share that is found. ``_low`` and ``_high``: 95 % interval over the images;
    - ``membership.csv``: a row an attack, with its ``auroc`` and interval: which of training and test images have fewer bits
      a pixel, or lie nearer to a generated image, in pixels or to the filter;
    - ``copies.md``: both as tables;
    - ``nearest_real.png``, ``nearest_generated.png``, ``missed.png``: the test and generated images, and the planted copies
      not found, that are most alike to a training image, each followed by that image: nothing to publish.

    Args:
        network: see :func:`scripts.tasks.generation.evaluation.draw_samples`.
        copies: the filter.
        training: images that both were trained on, (N, 1, H, W) in [0, 1].
        validation: held-out images that the thresholds come from.
        test: held-out images to report.
        output_dir: folder of the files.
        rate: of false positives.
        num_planted: planted copies of each kind, of training images that are spread evenly.
        num_samples: generated images, of seed 0 on.
        num_members: training images, spread evenly, and test images to be told apart.
        num_times: times of the bound that an image's bits are the mean over.
        batch_size: images in a call of the network.
        seed: of the alterations.

    Returns:
        the rows of ``copies.csv`` and of ``membership.csv``.

    Raises:
        ValueError: for a file of somebody else's in the way.
    """
    folder = Path(output_dir)
    check_own(*(folder / name for name in ("copies.csv", "membership.csv", "copies.md", *PICTURES)))
    device = copies.index.device

    def by_filter(images: Tensor) -> Tensor:
        return copies.nearest(images.to(device))[0].cpu()

    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "copy filter": by_filter,
        "pixels": lambda images: -nearest(images, training)[0],
        "pixels, nearest of ten versions": lambda images: -nearest_of_versions(images, training),
    }
    originals = training[_evenly(len(training), num_planted)]
    generator = torch.Generator().manual_seed(seed)
    planted = {
        name: altered_copies(originals, generator, kinds, 0.5 if name == "all" else 1.0)[0]
        for name, kinds in PLANTED.items()
    }
    found = []
    for name, way in ways.items():
        limit = rarely_exceeded(way(validation).tolist(), rate)
        row = {"method": name, "threshold": limit}
        for what, images in {"false positives": test, **planted}.items():
            row |= _share(what, (way(images) > limit).numpy())
        found.append(row)
        logger.info(f"{name}: {row['false positives']:.1%} false positives, {row['all']:.1%} of the copies found")

    samples, _ = draw_samples(network, num_samples, test.shape[1:], 0, batch_size)
    members, others = training[_evenly(len(training), num_members)], test[_evenly(len(test), num_members)]
    points = copies.points(samples.to(device))
    attacks = {
        "likelihood": lambda images: -bits_of_each(network, images, num_times),
        "distance to generated images, pixels": lambda images: -nearest(images, samples)[0],
        "distance to generated images, copy filter": lambda images: (
            (copies.points(images.to(device)) @ points.T).amax(dim=1).cpu()
        ),
    }
    told = [{"method": name, **membership(attack(members), attack(others))} for name, attack in attacks.items()]

    missed = planted["all"][by_filter(planted["all"]) <= copies.limit(rate)]
    for name, images in zip(PICTURES, (test, samples, missed), strict=True):
        _draw_pairs(folder / name, images, training, copies)
    write_rows(folder / "copies.csv", found)
    write_rows(folder / "membership.csv", told)
    text = f"{_markdown(found, ['false positives', *planted], '.1%')}\n\n{_markdown(told, ['auroc'], '.3f')}\n"
    with own_file(folder / "copies.md") as aside:
        aside.write_text(text, encoding="utf-8")
    logger.info(f"{num_planted} copies of each kind, threshold at {rate:.1%} false positives\n{text}")
    return found, told


def _evenly(count: int, number: int) -> list[int]:
    """Numbers below ``count``, spread evenly, or all of them."""
    return np.linspace(0, count - 1, min(number, count)).round().astype(int).tolist()


def _share(name: str, hits: np.ndarray) -> dict[str, float]:
    low, high = bootstrap_interval(hits)
    return {name: float(hits.mean()), f"{name}_low": low, f"{name}_high": high}


def _markdown(rows: Sequence[dict], columns: Sequence[str], form: str) -> str:
    lines = [f"| method | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for row in rows:
        cells = (f"{row[key]:{form}} ({row[f'{key}_low']:{form}} to {row[f'{key}_high']:{form}})" for key in columns)
        lines.append(f"| {row['method']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _draw_pairs(path: Path, images: Tensor, training: Tensor, copies: CopyFilter, number: int = 20) -> None:
    """Draw the images that are most alike to a training image, each followed by that one; nothing for no image."""
    if not len(images):
        return
    similarity, numbers = (found.cpu() for found in copies.nearest(images.to(copies.index.device)))
    chosen = similarity.argsort(descending=True)[:number]
    pairs = torch.stack([images[chosen], training[numbers[chosen]]], dim=1).flatten(0, 1)
    titles = [text for i in chosen for text in (f"{similarity[i]:.3f}", "training")]
    with own_file(path) as aside:
        contact_sheet(aside, pairs, titles=titles, heading="most alike training images: nothing to publish")
