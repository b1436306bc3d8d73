"""How good a generative model is: its likelihood, how its images differ from real ones, and whether they are copies.

Every figure of generated images is compared with that of real ones: "real" is one held-out section against another.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from monai.bundle import ConfigParser
from monai.config import PathLike
from monai.metrics import FIDMetric, MMDMetric, MultiScaleSSIMMetric
from torch import Tensor, nn

from scripts.datasets import SliceDataset, find_cases
from scripts.figures import contact_sheet
from scripts.files import written_aside
from scripts.inferers import run_in_batches
from scripts.networks.orientation import OrientationNet
from scripts.speed import Trial, compare
from scripts.tables import markdown_table, mean_and_std, write_rows
from scripts.transforms import seeded_noise

__all__ = [
    "benchmark_sampling",
    "bound_terms",
    "draw_samples",
    "feature_network",
    "fourier_features",
    "generation_table",
    "image_scores",
    "nearest",
    "pair_similarity",
    "real_images",
    "with_weights",
]

logger = logging.getLogger(__name__)

REAL = "real (validation)"
MEMORISED_PERCENTILE = 1.0
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001)  # of MS-SSIM: its first three scales, the most that 64 x 64 has room for
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
    "memorised": ("memorised", ".1%"),
    "seconds": "s an image",
}
LOOK = {key: COLUMNS[key] for key in ("mmd", "mmd_mean", "frechet", "ms_ssim")}  # of :func:`image_scores`


def real_images(
    dataset_dir: PathLike, sequences: Sequence[str], section: str, transform: Callable, class_folder: str | None = None
) -> Tensor:
    """The images of a section (N, 1, H, W), 8-bit grey levels divided by 255.

    Args:
        dataset_dir: folder of pictures, see :func:`scripts.datasets.find_cases`.
        sequences: see there.
        section: see there.
        transform: preprocessing that ends with :class:`scripts.transforms.ExtractSlicesd`.
        class_folder: see there.
    """
    cases = find_cases(dataset_dir, sequences, section=section, pictures=True, class_folder=class_folder)
    dataset = SliceDataset(cases, transform, classes=(0,))
    return _eight_bit(torch.stack([item["image"].float() for item in dataset.slices]))  # it keeps half precision


def _eight_bit(images: Tensor) -> Tensor:
    return (255 * images).round().clamp(0, 255) / 255


def with_weights(network: nn.Module, path: PathLike) -> nn.Module:
    """The network in evaluation mode with the weights of ``path``, every name of which must be the network's."""
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network.eval()


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
    noise = torch.stack([seeded_noise(s, shape) for s in range(seed, seed + number)])
    images, seconds = run_in_batches(network, noise, batch_size)
    return _eight_bit(images), seconds


@torch.no_grad()
def bound_terms(network: nn.Module, images: Tensor, seed: int = 0, batch_size: int = 64) -> dict[str, float]:
    """Mean terms of the variational bound over images, in bits per pixel.

    Args:
        network: has ``bound(image, generator)``, a dictionary of terms (B,), and ``floor(image)``, (B,).
        images: (N, 1, H, W) in [0, 1].
        seed: seed of times and noise.
        batch_size: images in a call.

    Returns:
        ``recon``, ``latent``, ``diffusion``, and ``bits``, their sum as a bound of 8-bit values: with ``recon_8bit`` in
        place of ``recon`` where the bound has one, because its pixels are Bernoulli's. Then there are also ``total``, the
        sum with ``recon`` itself, and ``floor``, the least ``recon`` that is possible.
    """
    network.eval()
    device = next(network.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    sums: dict[str, float] = {}
    for batch in images.to(device).split(batch_size):
        terms = network.bound(batch, generator)
        if "recon_8bit" in terms:
            terms = terms | {"floor": network.floor(batch)}
        for name, values in terms.items():
            sums[name] = sums.get(name, 0.0) + values.sum().item()
    means = {name: total / len(images) for name, total in sums.items()}
    means["bits"] = means.get("recon_8bit", means["recon"]) + means["latent"] + means["diffusion"]
    if "recon_8bit" in means:
        means["total"] = means["recon"] + means["latent"] + means["diffusion"]
    return means


def feature_network(
    path: PathLike, training: Tensor, held_out: Tensor, iterations: int = 1000, seed: int = 0
) -> OrientationNet:
    """The network whose features the Fréchet distance compares: read from ``path`` if it is there, else trained and kept.

    Args:
        path: file of its weights.
        training: images (N, 1, H, H) in [0, 1] to train on.
        held_out: images to measure its accuracy on, which is logged.
        iterations: see :meth:`scripts.networks.orientation.OrientationNet.fit`.
        seed: see there.

    Raises:
        ValueError: if the file holds other weights.
    """
    network, path = OrientationNet(), Path(path)
    if path.is_file():
        try:
            with_weights(network, path)
        except Exception as error:  # torch has many ways to refuse a file
            raise ValueError(
                f"{path}: not the weights of the feature network; delete it, to have it trained anew"
            ) from error
    else:
        network.fit(training, iterations, seed=seed)
        network.measure(held_out)
        with written_aside(path) as aside:
            torch.save(network.state_dict(), aside)
    logger.info(f"feature network {path}: {float(network.accuracy):.1%} of the orientations of held-out images told rightly")
    return network.eval()


def fourier_features(reference: Tensor, number: int = 4096, seed: int = 0) -> Callable[[Tensor], Tensor]:
    """Random Fourier features, whose inner product is the Gaussian kernel (Rahimi & Recht 2007).

    The kernel's width is the median distance between the reference images. For ``MMDMetric``, which by itself compares the
    mean images only.

    Args:
        reference: images (N, 1, H, W), two at least.
        number: number of features.
        seed: seed of the directions.

    Returns:
        a function that takes images (B, 1, H, W) to features (B, number).
    """
    flat = reference.flatten(1)
    width = torch.pdist(flat[:1000]).median()
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(flat.shape[1], number, generator=generator) / width
    phase = 2 * math.pi * torch.rand(number, generator=generator)
    return lambda images: math.sqrt(2 / number) * torch.cos(images.flatten(1) @ directions + phase)


def pair_similarity(images: Tensor, num_pairs: int = 1000, seed: int = 0) -> float:
    """Mean MS-SSIM between random pairs of different images: the lower, the more diverse they are.

    Args:
        images: (N, 1, H, W) in [0, 1], H and W above 40, two images at least.
        num_pairs: number of pairs.
        seed: seed of the pairs.
    """
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(len(images), (num_pairs,), generator=generator)
    second = (first + torch.randint(1, len(images), (num_pairs,), generator=generator)) % len(images)
    weights = [weight / sum(SCALE_WEIGHTS) for weight in SCALE_WEIGHTS]
    metric = MultiScaleSSIMMetric(spatial_dims=2, data_range=1.0, weights=weights)
    for pair in zip(first.split(100), second.split(100), strict=True):
        metric(*(images[chosen] for chosen in pair))
    return metric.aggregate().item()


def nearest(images: Tensor, training: Tensor) -> tuple[Tensor, Tensor]:
    """Distance of images to the nearest training image, and its number.

    Args:
        images: (N, 1, H, W) in [0, 1].
        training: (M, 1, H, W) in [0, 1].

    Returns:
        root of the mean squared difference of the pixels, (N,), in grey levels of [0, 1], and numbers (N,).
    """
    references = training.flatten(1).double()  # so that a copy has the distance 0, but for 1e-7
    found = [torch.cdist(batch.flatten(1).double(), references).min(dim=1) for batch in images.split(100)]
    distances, numbers = (torch.cat([part[i] for part in found]) for i in (0, 1))
    return distances / math.sqrt(references.shape[1]), numbers


def image_scores(images: Tensor, real: Tensor, features: OrientationNet) -> dict[str, float]:
    """How a set of images differs from real ones, and how diverse it is.

    Args:
        images: (N, 1, H, W) in [0, 1].
        real: as many real images; more of them are left out, and more of the others too.
        features: see :func:`feature_network`.

    Returns:
        ``mmd``: squared maximum mean discrepancy with a Gaussian kernel on the pixels, see :func:`fourier_features`;
        ``mmd_mean``: the same with MONAI's own linear kernel, the squared distance between the mean images (unbiased, so
        that both may be a little below 0); ``ms_ssim``: see :func:`pair_similarity`; and, if there are more images than
        features, ``frechet``: Fréchet distance of the features.
    """
    size = min(len(images), len(real))
    images, real = images[:size], real[:size]
    mine, theirs = features.features(images), features.features(real)
    scores = {
        "mmd": MMDMetric(fourier_features(real))(real, images).item(),
        "mmd_mean": MMDMetric()(real, images).item(),
        "ms_ssim": pair_similarity(images),
    }
    return scores | ({"frechet": FIDMetric()(mine, theirs).item()} if size > mine.shape[1] else {})


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
) -> list[dict]:
    """Compare networks, and real images, with the test images: print a Markdown table, and write the figures it is made of.

    Set ``s`` of the samples has the image seeds ``s * number`` to ``(s + 1) * number - 1``. Files of ``output_dir``:

    - ``metrics.csv``: a row a network and set, with :func:`bound_terms` of the test images, :func:`image_scores`,
      ``nearest`` (mean distance to the nearest training image), ``memorised`` (share of images that are nearer to a
      training image than 99 % of the test images are) and ``seconds`` an image;
    - ``metrics.json``: mean and standard deviation over the sets, the feature network's ``accuracy``, the numbers of
      images, and ``memorised_below``, the distance that the test images give; ``metrics.md``: the table;
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

    Returns:
        the rows of ``metrics.csv``.

    Raises:
        ValueError: if fewer than two samples, or no set of them, are asked for.
    """
    if number < 2 or not seeds:
        raise ValueError(f"--number must be at least 2 and --seeds not empty, got {number} and {list(seeds)}")
    folder = Path(output_dir)
    limit = torch.quantile(nearest(test, training)[0], MEMORISED_PERCENTILE / 100).item()

    def scores_of(images: Tensor) -> tuple[dict[str, float], Tensor, Tensor]:
        distances, numbers = nearest(images, training)
        copies = {"nearest": distances.mean().item(), "memorised": (distances < limit).double().mean().item()}
        return image_scores(images, test, features) | copies, distances, numbers

    rows = [{"method": REAL, "seed": 0, **scores_of(validation)[0]}]
    for name, network in networks.items():
        for seed in seeds:
            samples, seconds = draw_samples(network, number, test.shape[1:], seed * number, batch_size)
            scores, distances, numbers = scores_of(samples)
            terms = bound_terms(network, test, seed, batch_size)
            rows.append({"method": name, "seed": seed, **terms, **scores, "seconds": seconds})
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
        "num_validation": len(validation),
        "num_test": len(test),
        "num_samples": number,
        "memorised_below": limit,
    }
    table = markdown_table(summary, COLUMNS)
    write_rows(folder / "metrics.csv", rows)
    for path, text in (("metrics.json", json.dumps({**summary, "about": about}, indent=4)), ("metrics.md", table)):
        with written_aside(folder / path) as aside:
            aside.write_text(text + "\n", encoding="utf-8")
    logger.info(f"{len(seeds)} set(s) of {number} samples, {len(test)} test images\n{table}")
    return rows


def _draw(path: Path, images: Tensor, heading: str, **settings: object) -> None:
    with written_aside(path) as aside:
        contact_sheet(aside, images, heading=heading, text={"Description": heading}, **settings)


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
        judge=lambda images: image_scores(_eight_bit(torch.cat(images)), real, features),
        columns=LOOK,
    )
    return compare(networks, trial, next(networks["default"].parameters()).device)
