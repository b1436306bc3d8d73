"""Training losses of the diffusion models, each for one batch, each the mean over all its elements."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["variational_bound"]


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
    gap = (log_lower - log_variance).exp() + mean_gap**2 * (-log_variance).exp()
    return (log_variance - log_lower + gap - 1).mean() / (2 * math.log(2))
