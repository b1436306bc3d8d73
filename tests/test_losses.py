from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from monai.losses import JukeboxLoss
from torch.distributions import Normal, kl_divergence

from scripts.losses import (
    SpectralLoss,
    binary_entropy,
    discretised_gaussian,
    discretised_logistic,
    gaussian_kl,
    gradient_difference,
    jacobian_determinant,
    variational_bound,
)
from scripts.samplers import alphas_cumprod_table, noise_image

A = alphas_cumprod_table()


def draw(count=4, dtype=torch.float64):
    """Estimated noise, fraction and true noise of ``count`` slices."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count, 2, 3, 5, generator=generator, dtype=dtype)
    error = 0.3 * torch.randn(noise.shape, generator=generator, dtype=dtype)
    return noise + error, torch.rand(noise.shape, generator=generator, dtype=dtype), noise


def posterior(x, x0, t):
    """q(x_{t-1} | x_t, x_0) of Ho et al. 2020, eq. 6 and 7; at level 1, which has no variance, with level 2's."""
    beta = 1 - A[t] / A[t - 1]
    mean = (A[t - 1].sqrt() * beta * x0 + (1 - beta).sqrt() * (1 - A[t - 1]) * x) / (1 - A[t])
    u = max(t, 2)
    variance = (1 - A[u] / A[u - 1]) * (1 - A[u - 1]) / (1 - A[u])
    return mean, variance, beta


@pytest.mark.parametrize("t", [1, 2, 3, 10, 300, 999, 1000])
def test_the_bound_is_the_divergence_of_two_normal_distributions_in_bits(t):
    noise_pred, fraction, noise = draw()
    x0 = torch.linspace(-1, 1, noise.numel(), dtype=noise.dtype).view_as(noise)
    x = noise_image(x0, noise, A[t])
    estimated_x0 = (x - (1 - A[t]).sqrt() * noise_pred) / A[t].sqrt()
    true_mean, lower, upper = posterior(x, x0, t)
    mean, _, _ = posterior(x, estimated_x0, t)
    deviation = (lower ** (1 - fraction) * upper**fraction).sqrt()
    expected = kl_divergence(Normal(true_mean, lower.sqrt()), Normal(mean, deviation)).mean() / math.log(2)
    bound = variational_bound(noise_pred, fraction, noise, torch.full((4,), t), A)
    torch.testing.assert_close(bound, expected, rtol=1e-7, atol=1e-12)


def test_the_bound_of_a_batch_is_the_mean_over_its_slices():
    noise_pred, fraction, noise = draw()
    t = torch.tensor([1, 2, 500, 1000])
    slices = [variational_bound(p[None], f[None], e[None], u[None], A) for p, f, e, u in zip(*draw(), t, strict=True)]
    torch.testing.assert_close(variational_bound(noise_pred, fraction, noise, t, A), torch.stack(slices).mean())


@pytest.mark.parametrize("t", [1, 2, 3, 50, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_bound_is_zero_for_the_true_noise_and_the_lower_variance(t, dtype):
    _, fraction, noise = draw(dtype=dtype)
    bound = variational_bound(noise, torch.zeros_like(fraction), noise, torch.full((4,), t), A)
    assert bound.dtype == dtype and bound.abs() < 1e-6


@pytest.mark.parametrize("t", [1, 2, 3, 50, 1000])
@pytest.mark.parametrize("fraction", [-0.5, 0.0, 0.2, 1.0, 2.0])
def test_the_bound_is_never_negative(t, fraction):
    noise_pred, _, noise = draw(dtype=torch.float32)
    for pred in (noise, noise_pred):
        assert variational_bound(pred, torch.full_like(noise, fraction), noise, torch.full((4,), t), A) >= -1e-6


def test_only_the_variance_is_trained_by_the_bound():
    noise_pred, fraction, noise = draw()
    noise_pred.requires_grad_(), fraction.requires_grad_()
    variational_bound(noise_pred, fraction, noise, torch.tensor([1, 2, 300, 1000]), A).backward()
    assert noise_pred.grad is None
    assert fraction.grad.isfinite().all() and fraction.grad.flatten(1).any(dim=1).all()


def test_the_gradient_raises_a_variance_that_is_too_small_for_the_error():
    _, fraction, noise = draw()
    fraction = torch.full_like(fraction, 0.5).requires_grad_()
    variational_bound(noise + 5, fraction, noise, torch.full((4,), 3), A).backward()
    assert (fraction.grad < 0).all()
    fraction.grad = None
    variational_bound(noise, fraction, noise, torch.full((4,), 3), A).backward()
    assert (fraction.grad > 0).all()


# --- the divergence of two normal distributions


def normals(dtype=torch.float64):
    """Mean and log variance of five normal distributions, and of five others."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 5, generator=generator, dtype=dtype)


def test_the_divergence_is_that_of_torch():
    mean, log_variance, other_mean, other_log_variance = normals()
    p, q = Normal(mean, (log_variance / 2).exp()), Normal(other_mean, (other_log_variance / 2).exp())
    torch.testing.assert_close(gaussian_kl(*normals()), kl_divergence(p, q))


def test_the_divergence_is_the_mean_log_ratio_of_the_densities_of_samples():
    mean, log_variance, other_mean, other_log_variance = normals()
    p, q = Normal(mean, (log_variance / 2).exp()), Normal(other_mean, (other_log_variance / 2).exp())
    draws = torch.randn(200_000, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = p.mean + p.stddev * draws
    ratio = p.log_prob(x) - q.log_prob(x)
    error = ratio.std(dim=0) / len(x) ** 0.5
    assert ((gaussian_kl(*normals()) - ratio.mean(dim=0)).abs() < 4 * error).all() and error.max() < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_divergence_of_a_distribution_from_itself_is_zero_and_from_others_positive(dtype):
    mean, log_variance, other_mean, other_log_variance = normals(dtype)
    assert torch.equal(gaussian_kl(mean, log_variance, mean, log_variance), torch.zeros_like(mean))
    assert (gaussian_kl(mean, log_variance, other_mean, other_log_variance) > 0).all()


def test_the_divergence_broadcasts():
    mean, log_variance, other_mean, other_log_variance = normals()
    single = gaussian_kl(mean, log_variance[:1], other_mean[:, None], other_log_variance[0])
    assert single.shape == (5, 5)
    torch.testing.assert_close(single[3, 2], gaussian_kl(mean[2], log_variance[0], other_mean[3], other_log_variance[0]))


# --- the spectral loss


def test_the_spectral_loss_is_monais():
    images = torch.rand(2, 3, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(SpectralLoss(2)(*images), JukeboxLoss(2)(*images), rtol=1e-4, atol=1e-7)


def test_the_spectral_loss_has_a_gradient_where_an_amplitude_is_zero():
    image = torch.zeros(1, 1, 8, 8, requires_grad=True)
    SpectralLoss(2)(image, torch.rand(1, 1, 8, 8)).backward()
    assert image.grad.isfinite().all()


# --- likelihoods of 8-bit values

VALUES = torch.arange(256, dtype=torch.float64) / 255


@pytest.mark.parametrize("likelihood", [discretised_gaussian, discretised_logistic])
@pytest.mark.parametrize("mean", [-0.02, 0.0, 0.3, 0.4991, 1.01])
@pytest.mark.parametrize("width", [5e-4, 0.01, 0.3])
def test_the_probabilities_of_all_values_sum_to_1(likelihood, mean, width):
    log_p = likelihood(VALUES, torch.full((256,), mean, dtype=torch.float64), width)
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-5)
    inner = log_p[1:-1]  # the logistic's first and last value stand for all beyond them, too
    assert inner.argmax() == (VALUES[1:-1] - mean).abs().argmin()


def test_the_discretised_gaussian_falls_from_its_mean_as_a_gaussian_does():
    log_p = discretised_gaussian(VALUES, torch.full((256,), 100 / 255, dtype=torch.float64), 2 / 255)
    assert (log_p[100] - log_p[103]).item() == pytest.approx(3**2 / (2 * 2**2))


def test_the_discretised_logistic_is_the_difference_of_the_distribution_function_also_where_that_underflows():
    mean, scale = 0.5, 0.02
    upper, lower = (torch.sigmoid((VALUES[1:-1] + half / 255 - mean) / scale) for half in (0.5, -0.5))
    found = discretised_logistic(VALUES[1:-1], torch.full((254,), mean, dtype=torch.float64), scale)
    torch.testing.assert_close(found, (upper - lower).log(), rtol=1e-4, atol=1e-4)
    far = discretised_logistic(torch.tensor([0.0, 1.0, 0.9]), torch.tensor([1.0, 0.0, 0.0]), 1e-3)
    assert far.isfinite().all() and far.max() < -800


def test_the_entropy_of_a_pixel_is_that_of_a_coin():
    expected = torch.tensor([0.0, -0.25 * math.log(0.25) - 0.75 * math.log(0.75), math.log(2), 0.0])
    torch.testing.assert_close(binary_entropy(torch.tensor([0.0, 0.25, 0.5, 1.0])), expected)


def test_the_gradient_difference_is_that_of_the_amounts_along_both_axes():
    flat, ramp = torch.zeros(2, 1, 4, 4), torch.arange(4.0).expand(2, 1, 4, 4)
    torch.testing.assert_close(gradient_difference(flat, ramp), torch.ones(2))
    torch.testing.assert_close(gradient_difference(ramp, ramp + ramp.mT), torch.ones(2))
    assert not gradient_difference(ramp, -ramp).any()


def linear_field(matrix, shape=(6, 5, 4)):
    """Displacement x -> matrix · x, in voxels."""
    places = torch.stack(torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in shape), indexing="ij"))
    return torch.einsum("ij,jhwd->ihwd", torch.tensor(matrix, dtype=torch.float64), places)


@pytest.mark.parametrize(
    "matrix",
    [
        [[0, 0, 0], [0, 0, 0], [0, 0, 0]],
        [[0.1, 0, 0], [0, -0.2, 0], [0, 0, 0.3]],
        [[0.1, 0.4, 0], [-0.3, -0.2, 0.2], [0.5, 0, 0.3]],
        [[-2, 0, 0], [0, 0, 0], [0, 0, 0]],
    ],
)
def test_the_jacobian_of_a_linear_map_is_its_determinant_everywhere(matrix):
    expected = np.linalg.det(np.eye(3) + np.array(matrix))
    determinant = jacobian_determinant(linear_field(matrix))
    assert determinant.shape == (6, 5, 4) and torch.allclose(determinant, torch.tensor(expected))


def test_along_an_axis_of_one_voxel_nothing_is_stretched():
    assert torch.allclose(
        jacobian_determinant(linear_field(np.diag([0.5, 0.0, 7.0]), (6, 5, 1))), torch.tensor(1.5).double()
    )
