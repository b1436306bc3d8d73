"""Training losses of the diffusion models, each for one batch, and what they are made of."""

from __future__ import annotations

import math

import torch
from monai.config import NdarrayOrTensor
from monai.losses import JukeboxLoss
from torch import Tensor
from torch.nn.functional import logsigmoid

__all__ = [
    "SpectralLoss",
    "binary_entropy",
    "discretised_gaussian",
    "discretised_logistic",
    "gaussian_kl",
    "gradient_difference",
    "jacobian_determinant",
    "variational_bound",
]


class SpectralLoss(JukeboxLoss):
    """MONAI's spectral loss (Dhariwal et al. 2020, arXiv 2005.00341, section 3.3), with a gradient everywhere.

    The root in the amplitude has none at zero, where MONAI's loss gives NaN and ruins a training.
    """

    def _get_fft_amplitude(self, images: Tensor) -> Tensor:
        spectrum = torch.fft.fftn(images, dim=self.fft_dim, norm=self.fft_norm)
        return (spectrum.real**2 + spectrum.imag**2 + 1e-8).sqrt()


def gaussian_kl(mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor) -> Tensor:
    """Divergence KL( N(mean, variance) || N(other_mean, other_variance) ) of each element, in nats; shapes broadcast."""
    gap = (log_variance - other_log_variance).exp() + (mean - other_mean) ** 2 * (-other_log_variance).exp()
    return (other_log_variance - log_variance + gap - 1) / 2


def variational_bound(noise_pred: Tensor, fraction: Tensor, noise: Tensor, t: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """Term of the variational bound that trains the learned variance (Nichol & Dhariwal 2021, arXiv 2102.09672, eq. 14-16).

    It is the closed-form divergence KL( q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t) ) of two Gaussians. Its mean gets no
    gradient, so that only the variance is trained by it. At level 1, where the true posterior has no variance, that of
    level 2 is used.

    Args:
        noise_pred: estimated noise (B, C, ...); used without gradient.
        fraction: place of the log variance between its lower bound (0) and its upper bound (1), same shape.
        noise: the true noise, same shape.
        t: levels (B,), 1 to T.
        alphas_cumprod: table (T + 1,), entry 0 being 1.

    Returns:
        scalar, in bits per element.
    """
    a = alphas_cumprod.double()
    betas = 1 - a[1:] / a[:-1]
    lower = betas * (1 - a[:-1]) / (1 - a[1:])
    lower[0] = lower[1]
    mean_scale = betas / ((1 - betas) * (1 - a[1:])).sqrt()  # of a noise difference in the posterior mean

    def at(values: Tensor) -> Tensor:
        return values[t - 1].to(fraction.dtype).view(-1, *[1] * (fraction.ndim - 1))

    log_lower, log_upper = at(lower.log()), at(betas.log())
    log_variance = torch.lerp(log_lower, log_upper, fraction)
    mean_gap = at(mean_scale) * (noise_pred.detach() - noise)
    return gaussian_kl(mean_gap, log_lower, torch.zeros_like(mean_gap), log_variance).mean() / math.log(2)


def discretised_gaussian(image: Tensor, mean: Tensor, std: Tensor | float) -> Tensor:
    """Log probability of 8-bit values: a Gaussian's density there over its sum over all 256 values.

    This is p(x | z_0) of Kingma et al. 2021 (arXiv 2107.00630, equation 8).

    Args:
        image: 8-bit values divided by 255, any shape.
        mean: mean of the Gaussian on the scale of ``image``, same shape.
        std: its standard deviation on that scale.

    Returns:
        in nats, same shape.
    """
    values = torch.arange(256, device=mean.device) / 255

    def log_density(value: Tensor) -> Tensor:
        return -((value - mean[..., None]) ** 2) / (2 * std**2)

    return log_density(image[..., None])[..., 0] - log_density(values).logsumexp(dim=-1)


def discretised_logistic(image: Tensor, mean: Tensor, scale: Tensor | float) -> Tensor:
    """Log probability of 8-bit values: the mass of a logistic distribution between the middles to the next values.

    The first and the last value get all that lies beyond them (Salimans et al. 2017, arXiv 1701.05517, section 2.1).

    Args:
        image: 8-bit values divided by 255, any shape.
        mean: mean of the distribution on the scale of ``image``, same shape.
        scale: its scale there, which is 0.55 of its standard deviation.

    Returns:
        in nats, same shape.
    """
    upper, lower = ((image + half - mean) / scale for half in (0.5 / 255, -0.5 / 255))
    # log(sigmoid(upper) - sigmoid(lower)), without the difference of two numbers that are almost the same
    between = logsigmoid(upper) + logsigmoid(-lower) + torch.log(-torch.expm1(-torch.as_tensor(1 / 255 / scale)))
    return torch.where(image < 0.5 / 255, logsigmoid(upper), torch.where(image > 254.5 / 255, logsigmoid(-lower), between))


def binary_entropy(image: Tensor) -> Tensor:
    """Entropy of a coin whose probability of heads is a pixel's grey level in [0, 1], in nats, same shape."""
    return -(torch.xlogy(image, image) + torch.xlogy(1 - image, 1 - image))


def gradient_difference(image: Tensor, other: Tensor) -> Tensor:
    """Mean difference of the amounts of the gradients of two images (Mathieu et al. 2016, arXiv 1511.05440, equation 6).

    Args:
        image: (B, C, H, W).
        other: same shape.

    Returns:
        (B,), the mean over pixels and channels of the differences along both axes, absolute, summed.
    """
    total = image.new_zeros(len(image))
    for axis in (-2, -1):
        gap = image.diff(dim=axis).abs() - other.diff(dim=axis).abs()
        total = total + gap.abs().flatten(1).mean(dim=1)
    return total


def jacobian_determinant(displacement: NdarrayOrTensor) -> Tensor:
    """Determinant of the Jacobian of x -> x + displacement(x), by central differences (one-sided at the border).

    Args:
        displacement: (..., 3, H, W, D), in voxels along the three axes.

    Returns:
        (..., H, W, D): 1 where volume is kept, 0 or less where space folds over. An axis of one voxel has no derivative.
    """
    field = torch.as_tensor(displacement).movedim(-4, -1)
    slopes = [torch.gradient(field, dim=i)[0] if field.shape[i] > 1 else torch.zeros_like(field) for i in (-4, -3, -2)]
    x, y, z = (slope + axis for slope, axis in zip(slopes, torch.eye(3).to(field), strict=True))
    # the triple product has a gradient everywhere, which torch.linalg.det does not where it is 0
    return (x * torch.linalg.cross(y, z)).sum(dim=-1)
