"""Compares generative networks with real images, and real images of one section with those of another."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from monai.config import PathLike
from torch import Tensor, nn

from scripts.data.layouts import find_cases
from scripts.data.slices import SliceDataset
from scripts.files import check_own, own_file
from scripts.inferers import redraw, run_in_batches
from scripts.networks.copy_filter import CopyFilter
from scripts.networks.orientation import OrientationNet
from scripts.tables import markdown_table, mean_and_std, write_rows
from scripts.tasks.generation.figures import contact_sheet
from scripts.tasks.generation.metrics import bound_terms, image_scores, nearest
from scripts.tasks.generation.transforms import seeded_noise

__all__ = ["draw_samples", "generation_table", "real_images"]

logger = logging.getLogger(__name__)

REAL = "real (validation)"
NEAR_PERCENTILE = 1.0  # of the pixel distances of test images
COLUMNS = {
    "bits": "bits a pixel (8 bit)",
    "recon": "reconstruction",
    "floor": "its floor",
    "latent": ("latent", ".2e"),
    "diffusion": ("diffusion", ".4f"),
    "mmd": ("MMD", ".5f"),
    "mmd_mean": ("MMD of the means", ".3f"),
    "frechet": "Fréchet distance",
    "ms_ssim": "MS-SSIM of pairs",
    "nearest": ("distance to training", ".4f"),
    "nearer_than_real": ("nearer in pixels than 99 % of real", ".1%"),
    "copies": ("above the copy filter's threshold", ".1%"),
    "seconds": "s an image",
}


def real_images(
    dataset_dir: PathLike, sequences: Sequence[str], section: str, transform: Callable, class_folder: str | None = None
) -> Tensor:
    """The images of a section (N, 1, H, W), 8-bit grey levels divided by 255.

    Args:
        dataset_dir: folder of pictures, see :func:`scripts.data.layouts.find_cases`.
        sequences: see there.
        section: see there.
        transform: preprocessing that ends with :class:`scripts.data.slices.ExtractSlicesd`.
        class_folder: see there.
    """
    cases = find_cases(dataset_dir, sequences, section=section, pictures=True, class_folder=class_folder)
    dataset = SliceDataset(cases, transform, classes=(0,))
    return eight_bit(torch.stack([item["image"].float() for item in dataset.slices]))  # it keeps half precision


def eight_bit(images: Tensor) -> Tensor:
    return (255 * images).round().clamp(0, 255) / 255


def draw_samples(
    network: nn.Module, number: int, shape: Sequence[int], seed: int = 0, batch_size: int = 64
) -> tuple[Tensor, float]:
    """Generated images, the same as inference writes for these seeds.

    Args:
        network: takes noise (B, 1, H, W) to images in [0, 1].
        number: how many.
        shape: of an image, (1, H, W).
        seed: seed of the first; the others follow.
        batch_size: images in a call.

    Returns:
        (number, 1, H, W), 8-bit grey levels divided by 255, and the seconds an image.
    """
    images, seconds = run_in_batches(network, _noise(number, shape, seed), batch_size)
    return eight_bit(images), seconds


def _noise(number: int, shape: Sequence[int], seed: int) -> Tensor:
    """Noise of images (number, *shape), whose seeds follow each other."""
    return torch.stack([seeded_noise(s, shape) for s in range(seed, seed + number)])


def generation_table(
    networks: Mapping[str, nn.Module],
    training: Tensor,
    validation: Tensor,
    test: Tensor,
    features: OrientationNet,
    output_dir: PathLike,
    number: int = 500,
    seeds: Sequence[int] = (0, 1, 2),
    batch_size: int = 64,
    num_nearest: int = 20,
    copies: CopyFilter | None = None,
    copy_rate: float = 0.01,
    copy_rounds: int = 10,
) -> list[dict]:
    """Compare networks, and real images, with the test images: print a Markdown table, and write the figures it is made of.

    Set ``s`` of the samples has the image seeds ``s * number`` to ``(s + 1) * number - 1``. As many validation images stand
    beside them, and as many test images are compared with, since a Fréchet distance falls with the number of images. Files
    of ``output_dir``:

    - ``metrics.csv``: a row a network and set, with :func:`bound_terms` of the test images, :func:`image_scores`,
      ``nearest`` (mean distance of the pixels to the nearest training image), ``nearer_than_real`` (share of images that are
      nearer to a training image, in pixels, than 99 % of the test images are) and ``seconds`` an image; with a filter
      against copies also ``copies``, the share of images that it takes for copies, and a row ``<network>, filtered``, of
      the same images after the copies among them were drawn again, with ``redraws`` an image;
    - ``metrics.json``: mean and standard deviation over the sets, the feature network's ``accuracy``, the numbers of
      images, and ``nearer_than_real_below``, the distance that the test images give; ``metrics.md``: the table;
    - ``contact_sheet_<network>.png``: the first images; ``nearest_<network>.png``: those nearest to a training image,
      each followed by that real image, so that this picture is nothing to publish.

    Args:
        networks: names and networks, see :func:`draw_samples` and :func:`bound_terms`.
        training: images that the networks were trained on, (N, 1, H, W) in [0, 1].
        validation: held-out images, which stand for the samples of a perfect network.
        test: held-out images that all are compared with.
        features: see :func:`feature_network`.
        output_dir: folder of the files, made if it is missing.
        number: images in a set of samples.
        seeds: numbers of the sets.
        batch_size: images in a call of a network.
        num_nearest: pairs in the picture of the nearest.
        copies: filter against copies; None for none.
        copy_rate: see :func:`scripts.inferers.redraw`.
        copy_rounds: see there.

    Returns:
        the rows of ``metrics.csv``.

    Raises:
        ValueError: for a file of somebody else's in the way, or if fewer than two samples, or no set of them, are asked for.
    """
    if number < 2 or not seeds:
        raise ValueError(f"--number must be at least 2 and --seeds not empty, got {number} and {list(seeds)}")
    folder = Path(output_dir)
    pictures = (f"{kind}_{name}.png" for kind in ("contact_sheet", "nearest") for name in networks)
    check_own(*(folder / name for name in ("metrics.csv", "metrics.json", "metrics.md", *pictures)))
    limit = torch.quantile(nearest(test, training)[0], NEAR_PERCENTILE / 100).item()
    device = None if copies is None else copies.index.device

    def scores_of(images: Tensor) -> tuple[dict[str, float], Tensor, Tensor]:
        distances, numbers = nearest(images, training)
        near = {"nearest": distances.mean().item(), "nearer_than_real": (distances < limit).double().mean().item()}
        if copies is not None:
            alike = copies.nearest(images.to(device))[0] > copies.limit(copy_rate)
            near["copies"] = alike.double().mean().item()
        return image_scores(images, test, features) | near, distances, numbers

    rows = [{"method": REAL, "seed": 0, **scores_of(validation[:number])[0]}]
    for name, network in networks.items():
        for seed in seeds:
            samples, seconds = draw_samples(network, number, test.shape[1:], seed * number, batch_size)
            scores, distances, numbers = scores_of(samples)
            terms = bound_terms(network, test, seed, batch_size)
            rows.append({"method": name, "seed": seed, **terms, **scores, "seconds": seconds})
            if copies is not None:
                noise = _noise(number, test.shape[1:], seed * number).to(device)
                drawn = redraw(network, noise, samples.to(device), copies, copy_rate, copy_rounds)
                filtered = scores_of(eight_bit(drawn.images.cpu()))[0]
                redraws = drawn.redraws.double().mean().item()
                rows.append({"method": f"{name}, filtered", "seed": seed, **filtered, "redraws": redraws})
            logger.info(f"{name}, set {seed}: {terms['bits']:.3f} bits a pixel, MMD {scores['mmd']:.4f}")
            if seed == seeds[0]:
                chosen = distances.argsort()[:num_nearest]
                pairs = torch.stack([samples[chosen], training[numbers[chosen]]], dim=1).flatten(0, 1)
                titles = [text for i in chosen for text in (f"{distances[i]:.3f}", "real")]
                _draw(folder / f"contact_sheet_{name}.png", samples[:100], heading=f"generated by {name}, show no patient")
                _draw(folder / f"nearest_{name}.png", pairs, titles=titles, heading=f"{name}: the nearest training images")

    summary = mean_and_std(rows)
    about = {
        "accuracy_of_features": float(features.accuracy),
        "num_training": len(training),
        "num_validation": min(number, len(validation)),
        "num_test": min(number, len(test)),
        "num_samples": number,
        "nearer_than_real_below": limit,
    }
    table = markdown_table(summary, COLUMNS)
    write_rows(folder / "metrics.csv", rows)
    for path, text in (("metrics.json", json.dumps({**summary, "about": about}, indent=4)), ("metrics.md", table)):
        with own_file(folder / path) as aside:
            aside.write_text(text + "\n", encoding="utf-8")
    logger.info(f"{len(seeds)} set(s) of {number} samples, {len(test)} test images\n{table}")
    return rows


def _draw(path: Path, images: Tensor, heading: str, **settings: object) -> None:
    with own_file(path) as aside:
        contact_sheet(aside, images, heading=heading, text={"Description": heading}, **settings)
