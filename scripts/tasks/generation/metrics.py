"""How images differ from real ones, how diverse they are, and how near to copies."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from monai.config import PathLike
from monai.metrics import FIDMetric, MMDMetric, MultiScaleSSIMMetric
from scipy.stats import rankdata
from torch import Tensor, nn

from scripts.bundle import with_weights
from scripts.files import written_aside
from scripts.metrics import bootstrap_interval
from scripts.networks.orientation import OrientationNet

__all__ = [
    "bits_of_each",
    "bound_terms",
    "feature_network",
    "fourier_features",
    "image_scores",
    "membership",
    "nearest",
    "nearest_of_versions",
    "pair_similarity",
]

logger = logging.getLogger(__name__)

SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001)  # of MS-SSIM: its first three scales, the most that 64 x 64 has room for


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


@torch.no_grad()
def bits_of_each(network: nn.Module, images: Tensor, num_times: int = 16, seed: int = 0) -> Tensor:
    """Bound of each image by itself, in bits per pixel, all with the same noise at the same times.

    Args:
        network: see :func:`bound_terms`.
        images: (N, 1, H, W) in [0, 1].
        num_times: times, spread evenly, that the bound is the mean over.
        seed: seed of times and noise.

    Returns:
        (N,).
    """
    network.eval()
    device = next(network.parameters()).device
    bits = []
    for image in images:
        terms = network.bound(image.to(device).expand(num_times, -1, -1, -1), torch.Generator().manual_seed(seed))
        bits.append(terms.get("recon_8bit", terms["recon"]) + terms["latent"] + terms["diffusion"])
    return torch.stack(bits).mean(dim=1).cpu()


def membership(members: Tensor, others: Tensor) -> dict[str, float]:
    """How well a score tells images of the training from others (membership inference).

    Args:
        members: scores (N,) of training images, which shall be the higher ones.
        others: scores (M,) of held-out images.

    Returns:
        ``auroc``, 0.5 where nothing can be told, and the ends of its 95 % interval over the images, ``auroc_low`` and
        ``auroc_high``.
    """
    scores = torch.cat([members, others]).double().numpy()
    belongs = np.arange(len(scores)) < len(members)

    def auroc(scores: np.ndarray, belongs: np.ndarray, axis: int = -1) -> np.ndarray:
        count, total = belongs.sum(axis=axis), belongs.shape[axis]
        ranks = (rankdata(scores, axis=axis) * belongs).sum(axis=axis)
        return (ranks - count * (count + 1) / 2) / (count * (total - count))

    low, high = bootstrap_interval(scores, belongs, statistic=auroc, resamplings=2000)
    return {"auroc": float(auroc(scores, belongs)), "auroc_low": low, "auroc_high": high}


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


def nearest_of_versions(images: Tensor, training: Tensor, shift: int = 4) -> Tensor:
    """Distance of :func:`nearest`, the least of ten versions of an image.

    They are the image and its mirror image, each in its place and shifted to the four sides.

    Args:
        images: (N, 1, H, W) in [0, 1].
        training: (M, 1, H, W) in [0, 1].
        shift: in pixels; what goes out on one side comes in on the other.

    Returns:
        (N,), in grey levels of [0, 1].
    """
    shifts = ((0, 0), (shift, 0), (-shift, 0), (0, shift), (0, -shift))
    versions = (version.roll(by, dims=(2, 3)) for version in (images, images.flip(2)) for by in shifts)
    return torch.stack([nearest(version, training)[0] for version in versions]).amin(dim=0)


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
