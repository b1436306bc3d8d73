"""Training losses of the diffusion models, each for one batch, each the mean over all its elements."""

from __future__ import annotations

import math

import torch
from monai.losses import JukeboxLoss
from torch import Tensor

__all__ = ["SpectralLoss", "gaussian_kl", "variational_bound"]


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
