"""The solvers against the one case that is known exactly: grey levels x_0 ~ N(0, s²).

Relative error of the encoded latent and of the decoded image after n steps (linear schedule, noise level 1000, s 0.25):

    n     ddim               heun               multistep          dpmpp_2m
          encode   decode    encode   decode    encode   decode    encode   decode
      10  -4.4e-01 -4.4e-01  -2.0e-01 +1.4e-01  -3.0e-02 -3.5e-01  -4.3e-01 -4.2e-01
      20  -2.5e-01 -2.5e-01  -5.6e-02 +3.7e-02  +4.6e-02 -1.2e-01  -2.2e-01 -1.9e-01
      50  -1.1e-01 -1.1e-01  -8.4e-03 +6.6e-03  +1.6e-02 -2.3e-02  -7.0e-02 -3.0e-02
     333  -1.7e-02 -1.7e-02  -1.7e-04 +1.6e-04  +4.7e-04 -5.1e-04  -5.1e-03 -6.2e-04
    1000  -5.9e-03 -5.9e-03  -1.9e-05 +1.8e-05  +5.3e-05 -5.6e-05  -1.2e-03 -3.9e-04
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from scripts.samplers import (
    SOLVERS,
    STOCHASTIC,
    alphas_cumprod_table,
    antithetic_times,
    ddim,
    ddpm,
    dpmpp_2m,
    dpmpp_2m_sde,
    for_batch,
    level_grid,
    multistep,
    noise_from_v,
    noise_image,
    noise_to_gamma,
    posterior,
)

A = alphas_cumprod_table()
STEPS = (10, 20, 50, 333, 1000)
# largest relative error of encoding and of decoding, by (noise level, s), for each of STEPS
BOUNDS = {
    (300, 0.25): {
        "ddim": (1.7e-01, 8.4e-02, 3.5e-02, 6.2e-03, 6.2e-03),
        "heun": (2.1e-02, 4.9e-03, 7.4e-04, 2.0e-05, 2.0e-05),
        "multistep": (5.2e-02, 1.4e-02, 2.2e-03, 5.9e-05, 5.9e-05),
        "dpmpp_2m": (1.3e-01, 5.0e-02, 1.4e-02, 1.4e-03, 1.4e-03),
    },
    (300, 0.5): {
        "ddim": (8.4e-02, 4.3e-02, 1.8e-02, 3.0e-03, 3.0e-03),
        "heun": (3.4e-03, 8.2e-04, 1.3e-04, 3.5e-06, 3.5e-06),
        "multistep": (1.2e-02, 2.9e-03, 4.6e-04, 1.3e-05, 1.3e-05),
        "dpmpp_2m": (4.7e-02, 1.7e-02, 4.3e-03, 3.5e-04, 3.5e-04),
    },
    (1000, 0.25): {
        "ddim": (4.7e-01, 2.6e-01, 1.2e-01, 1.8e-02, 6.2e-03),
        "heun": (2.1e-01, 6.0e-02, 8.9e-03, 1.8e-04, 2.0e-05),
        "multistep": (3.7e-01, 1.3e-01, 2.5e-02, 5.4e-04, 5.9e-05),
        "dpmpp_2m": (4.5e-01, 2.3e-01, 7.4e-02, 5.4e-03, 1.4e-03),
    },
    (1000, 0.5): {
        "ddim": (2.8e-01, 1.5e-01, 6.1e-02, 9.4e-03, 3.2e-03),
        "heun": (4.2e-02, 9.9e-03, 1.5e-03, 3.2e-05, 3.6e-06),
        "multistep": (1.3e-01, 3.4e-02, 5.5e-03, 1.2e-04, 1.4e-05),
        "dpmpp_2m": (2.3e-01, 9.4e-02, 2.6e-02, 1.6e-03, 3.5e-04),
    },
}
CASES = [
    pytest.param(solver, *case, n, errors[i], id=f"{solver}-{case[0]}-{case[1]}-{n}")
    for case, solvers in BOUNDS.items()
    for solver, errors in solvers.items()
    for i, n in enumerate(STEPS)
]


def std(t, s):
    """Standard deviation at level t of images with standard deviation s."""
    return (A[t] * s**2 + 1 - A[t]).sqrt()


def ideal(s):
    """The noise estimate that no network can better, for images ~ N(0, s²)."""
    return lambda x, t: x * (1 - A[t]).sqrt() / std(t, s) ** 2


def image(s):
    return s * torch.tensor([-2.0, -1.0, 0.0, 0.5, 3.0], dtype=torch.float64)


def encode_error(solver, noise_level, s, n):
    x = SOLVERS[solver](ideal(s), image(s), level_grid(noise_level, n), A)
    exact = image(s) * std(noise_level, s) / s
    return ((x - exact).norm() / exact.norm()).item()


def decode_error(solver, noise_level, s, n):
    latent = image(s) * std(noise_level, s) / s
    x = SOLVERS[solver](ideal(s), latent, level_grid(noise_level, n)[::-1], A)
    return ((x - image(s)).norm() / image(s).norm()).item()


# --- levels


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "cosine"])
@pytest.mark.parametrize("num_levels", [10, 1000, 2000])
def test_every_schedule_starts_at_exactly_1_and_falls_strictly(schedule, num_levels):
    table = alphas_cumprod_table(schedule, num_levels)
    assert table.shape == (num_levels + 1,) and table.dtype == torch.float64
    assert table[0] == 1 and table[-1] > 0 and (table.diff() < 0).all()


def test_the_linear_schedule_is_the_product_of_its_steps():
    product = 1.0
    for t in range(1, 1001):
        product *= 1 - (1e-4 + (2e-2 - 1e-4) * (t - 1) / 999)
        assert A[t].item() == pytest.approx(product, rel=1e-12)


def test_the_scaled_linear_schedule_runs_between_its_end_points():
    table = alphas_cumprod_table("scaled_linear", 1000, 0.0015, 0.0205)
    betas = 1 - table[1:] / table[:-1]
    assert (betas[0].item(), betas[-1].item()) == pytest.approx((0.0015, 0.0205))
    assert betas[333].sqrt().item() == pytest.approx((0.0015**0.5 * 666 + 0.0205**0.5 * 333) / 999)


def test_the_cosine_schedule_is_its_closed_form_below_the_clamp():
    t = torch.arange(990, dtype=torch.float64)
    f = torch.cos((t / 1000 + 0.008) / 1.008 * torch.pi / 2) ** 2
    torch.testing.assert_close(alphas_cumprod_table("cosine")[:990], f / f[0])


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="unknown schedule 'sigmoid': choose linear"):
        alphas_cumprod_table("sigmoid")


@pytest.mark.parametrize("noise_level", [1, 2, 7, 50, 300, 999, 1000])
def test_a_grid_rises_in_even_distinct_steps_from_0_to_the_noise_level(noise_level):
    for n in range(1, 1100 if noise_level < 100 else 60):
        grid = level_grid(noise_level, n)
        assert grid[0] == 0 and grid[-1] == noise_level and len(grid) == min(n, noise_level) + 1
        steps = [s - t for t, s in pairwise(grid)]
        assert min(steps) >= 1 and max(steps) - min(steps) <= 2
        assert all(isinstance(t, int) for t in grid)


@pytest.mark.parametrize("num_steps", [300, 301, 5000])
def test_as_many_steps_as_levels_take_every_level(num_steps):
    assert level_grid(300, num_steps) == list(range(301))


@pytest.mark.parametrize(("noise_level", "num_steps"), [(0, 10), (300, 0), (-1, 10), (300, -5)])
def test_a_grid_without_a_step_is_refused(noise_level, num_steps):
    with pytest.raises(ValueError, match=rf"noise_level \({noise_level}\) and num_steps \({num_steps}\)"):
        level_grid(noise_level, num_steps)


# --- the exact Gaussian case


@pytest.mark.parametrize(("solver", "noise_level", "s", "n", "bound"), CASES)
def test_the_encoded_latent_is_the_exact_one_up_to_the_solvers_error(solver, noise_level, s, n, bound):
    assert encode_error(solver, noise_level, s, n) < bound


@pytest.mark.parametrize(("solver", "noise_level", "s", "n", "bound"), CASES)
def test_the_decoded_image_is_the_exact_one_up_to_the_solvers_error(solver, noise_level, s, n, bound):
    assert decode_error(solver, noise_level, s, n) < bound


@pytest.mark.parametrize(("solver", "noise_level", "s", "n", "bound"), CASES)
def test_a_round_trip_loses_no_more_than_both_ways_together(solver, noise_level, s, n, bound):
    grid = level_grid(noise_level, n)
    x = SOLVERS[solver](ideal(s), SOLVERS[solver](ideal(s), image(s), grid, A), grid[::-1], A)
    assert (x - image(s)).norm() / image(s).norm() < (1 + bound) ** 2 - 1


@pytest.mark.parametrize("error", [encode_error, decode_error])
@pytest.mark.parametrize(("solver", "factor"), [("ddim", 2), ("heun", 4), ("multistep", 4)])
def test_half_the_step_divides_the_error_as_the_order_says(solver, factor, error):
    errors = [error(solver, 1000, 0.5, n) for n in (50, 100, 200)]
    assert [a / b for a, b in pairwise(errors)] == pytest.approx([factor] * 2, rel=0.1)


def test_dpmpp_2m_is_of_second_order_away_from_the_clean_image():
    errors = []
    for n in (50, 100, 200):
        grid = [t for t in level_grid(1000, n) if t >= 200][::-1]
        x = dpmpp_2m(ideal(0.25), std(1000, 0.25), grid, A)
        errors.append(abs(x / std(200, 0.25) - 1).item())
    assert all(a / b > 3.5 for a, b in pairwise(errors))


@pytest.mark.parametrize("error", [encode_error, decode_error])
@pytest.mark.parametrize(("noise_level", "s"), BOUNDS)
@pytest.mark.parametrize("n", [50, 100, 200, 333, 600, 1000])
def test_every_second_order_solver_beats_ddim(noise_level, s, n, error):
    first_order = error("ddim", noise_level, s, n)
    assert error("dpmpp_2m", noise_level, s, n) < 0.7 * first_order
    assert max(error("heun", noise_level, s, n), error("multistep", noise_level, s, n)) < 0.3 * first_order


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_latent_of_many_images_has_the_exact_spread_where_the_levels_are_rounded(solver):
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = 0.25 * x / x.std()
    # MONAI 1.6.1's DDIMScheduler, whose steps are not those between its levels, arrives at 0.57 in place of 1.00
    latent = SOLVERS[solver](ideal(0.25), x, level_grid(1000, 600), A)
    assert latent.std().item() == pytest.approx(std(1000, 0.25).item(), rel=0.012)


@pytest.mark.parametrize("solver", [ddim, dpmpp_2m])
@pytest.mark.parametrize("levels", [[1000, 0], [300, 0], [1, 0], [700, 300, 20]])
def test_a_model_that_knows_the_image_recovers_it_in_one_step(solver, levels):
    x0, noise = image(1.0), image(1.0).flip(0)
    x = solver(lambda x, t: (x - A[t].sqrt() * x0) / (1 - A[t]).sqrt(), noise_image(x0, noise, A[levels[0]]), levels, A)
    torch.testing.assert_close(x, noise_image(x0, noise, A[levels[-1]]))


# --- one step


@pytest.mark.parametrize("levels", [range(4), range(3, -1, -1), [997, 998, 1000], [1000, 998, 500]])
def test_a_ddim_step_is_the_textbooks(levels):
    x = image(1.0)
    expected = x
    for t, s in pairwise(levels):
        noise = torch.sin(3 * expected + t)
        x0 = (expected - (1 - A[t]).sqrt() * noise) / A[t].sqrt()
        expected = A[s].sqrt() * x0 + (1 - A[s]).sqrt() * noise
    torch.testing.assert_close(ddim(lambda x, t: torch.sin(3 * x + t), x, levels, A), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("solver", "calls"),
    [("ddim", 10), ("heun", 20), ("multistep", 11), ("dpmpp_2m", 10), ("ancestral", 10), ("dpmpp_2m_sde", 10)],
)
def test_a_solver_calls_the_network_as_often_as_it_says(solver, calls):
    levels = []
    (SOLVERS | STOCHASTIC)[solver](lambda x, t: levels.append(t) or x, image(1.0), level_grid(300, 10)[::-1], A)
    assert len(levels) == calls and set(levels) <= set(level_grid(300, 10))


@pytest.mark.parametrize("solver", [*SOLVERS.values(), *STOCHASTIC.values()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_solver_keeps_shape_and_type(solver, dtype):
    x = torch.ones(2, 1, 3, 4, dtype=dtype)
    result = solver(lambda x, t: 0.5 * x, x, [300, 100, 0], A)
    assert result.shape == x.shape and result.dtype == dtype and torch.equal(x, torch.ones_like(x))


@pytest.mark.parametrize("solver", [*SOLVERS.values(), *STOCHASTIC.values()])
def test_correct_is_called_after_every_step_with_its_levels_and_its_result_is_used(solver):
    levels, pairs, seen = [300, 200, 50, 7, 0], [], []

    def correct(x, t, s):
        pairs.append((t, s))
        return torch.full_like(x, s)

    def model(x, t):
        seen.append((t, x[0].item()))
        return torch.zeros_like(x)

    x = solver(model, torch.full((3,), 300.0), levels, A, correct)
    assert pairs == list(pairwise(levels))
    assert torch.equal(x, torch.zeros(3))
    assert all((t, t) in seen for t in levels[:-1])


@pytest.mark.parametrize("solver", SOLVERS.values())
def test_encoding_can_be_corrected_too(solver):
    pairs = []
    solver(lambda x, t: x, image(1.0), [0, 5, 80, 300], A, lambda x, t, s: pairs.append((t, s)) or x)
    assert pairs == [(0, 5), (5, 80), (80, 300)]


# --- velocity


@pytest.mark.parametrize("t", [0, 1, 300, 1000])
def test_the_noise_comes_back_from_the_velocity(t):
    x0, noise = image(0.5), image(1.0).flip(0)
    velocity = A[t].sqrt() * noise - (1 - A[t]).sqrt() * x0
    torch.testing.assert_close(noise_from_v(noise_image(x0, noise, A[t]), velocity, A[t]), noise)


def test_multistep_is_exact_where_the_velocity_changes_evenly():
    angle = torch.atan2((1 - A).sqrt(), A.sqrt())

    def model(x, t):  # the noise estimate whose velocity is 1 + 2·angle, whatever x
        return angle[t].cos() * (1 + 2 * angle[t]) + angle[t].sin() * x

    levels = [0, 13, 400, 401, 900]
    x = multistep(model, torch.zeros(1, dtype=torch.float64), levels, A)
    torch.testing.assert_close(x[0], angle[900] + angle[900] ** 2)


# --- the posterior of a step


@pytest.mark.parametrize(("t", "s"), [(2, 1), (10, 9), (500, 499), (500, 300), (1000, 1)])
def test_the_posterior_is_bayes_rule_for_two_normal_distributions(t, s):
    x0, x = image(1.0), image(2.0).flip(0)
    # x_s given x_0 is N(sqrt(a_s)·x_0, 1 - a_s); x_t given x_s is N(sqrt(alpha)·x_s, 1 - alpha)
    alpha = A[t] / A[s]
    precision = 1 / (1 - A[s]) + alpha / (1 - alpha)
    expected = (A[s].sqrt() * x0 / (1 - A[s]) + alpha.sqrt() * x / (1 - alpha)) / precision
    mean, variance = posterior(x, x0, A[t], A[s])
    torch.testing.assert_close(mean, expected)
    torch.testing.assert_close(variance, 1 / precision)


@pytest.mark.parametrize(("t", "s"), [(500, 499), (500, 300)])
def test_the_posterior_is_what_noising_in_two_steps_leaves(t, s):
    x0, draws = 0.7, torch.randn(2, 400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x_s = A[s].sqrt() * x0 + (1 - A[s]).sqrt() * draws[0]
    x_t = (A[t] / A[s]).sqrt() * x_s + (1 - A[t] / A[s]).sqrt() * draws[1]
    mean, variance = posterior(x_t, torch.tensor(x0, dtype=torch.float64), A[t], A[s])
    rest = x_s - mean
    assert rest.mean().item() == pytest.approx(0, abs=4 * (variance / len(rest)).sqrt().item())
    assert rest.var().item() == pytest.approx(variance.item(), rel=0.01)
    assert abs(torch.corrcoef(torch.stack([rest, x_t]))[0, 1]) < 0.01  # nothing is left to learn from x_t


@pytest.mark.parametrize("t", [1, 2, 500, 1000])
def test_the_posterior_of_the_clean_image_is_the_clean_image(t):
    x0 = image(1.0)
    mean, variance = posterior(image(2.0).flip(0), x0, A[t], A[0])
    torch.testing.assert_close(mean, x0)
    assert variance == 0


def test_the_posterior_takes_numbers_and_levels_of_a_batch():
    x0, x, t = torch.stack([image(1.0)] * 3), torch.stack([image(2.0)] * 3), torch.tensor([5, 300, 1000])
    mean, variance = posterior(x, x0, A[t].view(-1, 1), A[t - 1].view(-1, 1))
    for i, level in enumerate(t.tolist()):
        one_mean, one_variance = posterior(x[i], x0[i], A[level].item(), A[level - 1].item())
        torch.testing.assert_close(mean[i], one_mean)
        assert variance[i].item() == pytest.approx(one_variance)


# --- stochastic steps


def variance_of_samples(s, n, learned):
    """Variance of the images that ddpm draws from the latents of images ~ N(0, s²), without sampling error.

    The ideal model is linear, so that x stays a weighted sum of the independent draws; x holds the weights.
    """
    grid = level_grid(1000, n)[::-1]
    below = dict(pairwise(grid))
    draws = iter(torch.eye(n, dtype=torch.float64))

    def model(x, t):
        u = below[t]
        if not (learned and u):
            return ideal(s)(x, t)
        beta = 1 - A[t] / A[u]
        lower, true = beta * (1 - A[u]) / (1 - A[t]), beta * (std(u, s) / std(t, s)) ** 2
        fraction = (true / lower).log() / (beta / lower).log()
        assert 0 <= fraction <= 1
        return ideal(s)(x, t), fraction

    x = ddpm(model, std(1000, s) * next(draws), grid, A, draw_noise=lambda x: next(draws))
    assert next(draws, None) is None  # a draw for the start and for every step but the last
    return (x @ x).item(), grid[-2]


@pytest.mark.parametrize("s", [0.25, 0.5])
def test_ddpm_draws_images_with_the_right_variance(s):
    variance, _ = variance_of_samples(s, 1000, learned=False)
    assert variance == pytest.approx(s**2, rel=0.03)


def error_of_even_steps(sampler, s, n):
    """Relative error of the variance of what a sampler draws in n steps, even in the log of the signal-to-noise ratio."""
    table = torch.sigmoid(-torch.linspace(-13.3, 9, n + 1, dtype=torch.float64))
    variances = table * s**2 + 1 - table
    draws = iter(torch.eye(n + 1, dtype=torch.float64))

    def model(x, t):
        return (1 - table[t]).sqrt() * x / variances[t]

    x = sampler(model, variances[n].sqrt() * next(draws), range(n, -1, -1), table, draw_noise=lambda x: next(draws))
    return abs((x @ x / variances[0]).item() - 1)


@pytest.mark.parametrize("s", [0.25, 0.5, 2.0])
@pytest.mark.parametrize(("sampler", "error", "factor"), [("ancestral", 0.34, 2), ("dpmpp_2m_sde", 0.057, 4)])
def test_half_the_step_divides_the_error_of_the_variance_as_the_order_says(sampler, error, factor, s):
    errors = [error_of_even_steps(STOCHASTIC[sampler], s, n) for n in (25, 50, 100)]
    assert errors[0] == pytest.approx(error, rel=0.02)
    assert all(0.8 * factor < coarse / fine < 1.05 * factor for coarse, fine in pairwise(errors))


@pytest.mark.parametrize("s", [0.25, 0.5])
@pytest.mark.parametrize("n", [5, 20, 333, 1000])
def test_with_the_true_variance_ddpm_is_exact_for_any_number_of_steps(s, n):
    variance, lowest = variance_of_samples(s, n, learned=True)
    # the last step gives the mean of the clean image, whose variance is smaller
    assert variance == pytest.approx((A[lowest] * s**4 / std(lowest, s) ** 2).item(), rel=1e-9)


def seeded_draws():
    generator = torch.Generator().manual_seed(5)
    return lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype)


def test_fraction_0_is_the_lower_variance():
    grid = level_grid(1000, 20)[::-1]
    plain = ddpm(ideal(0.5), image(1.0), grid, A, draw_noise=seeded_draws())
    model = ideal(0.5)
    pair = ddpm(lambda x, t: (model(x, t), torch.zeros_like(x)), image(1.0), grid, A, draw_noise=seeded_draws())
    torch.testing.assert_close(pair, plain)


def test_fraction_1_is_the_upper_variance():
    beta = 1 - A[300] / A[250]
    draw = torch.ones(5, dtype=torch.float64)
    model = ideal(0.5)
    means = ddpm(model, image(1.0), [300, 250], A, draw_noise=torch.zeros_like)
    x = ddpm(lambda x, t: (model(x, t), torch.ones_like(x)), image(1.0), [300, 250], A, draw_noise=lambda x: draw)
    torch.testing.assert_close(x - means, beta.sqrt() * draw)


@pytest.mark.parametrize("sampler", STOCHASTIC.values())
@pytest.mark.parametrize("t", [1, 50, 1000])
def test_the_step_to_the_clean_image_adds_no_noise(t, sampler):
    def refuse(x):
        raise AssertionError("noise was drawn")

    x0 = (image(1.0) - (1 - A[t]).sqrt() * ideal(0.5)(image(1.0), t)) / A[t].sqrt()
    torch.testing.assert_close(sampler(ideal(0.5), image(1.0), [t, 0], A, draw_noise=refuse), x0)


@pytest.mark.parametrize("sampler", STOCHASTIC.values())
def test_the_same_draws_give_the_same_sample_and_others_another(sampler):
    grid = level_grid(1000, 20)[::-1]
    first, second = (sampler(ideal(0.5), image(1.0), grid, A, draw_noise=seeded_draws()) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, sampler(ideal(0.5), image(1.0), grid, A))


def test_a_first_step_of_second_order_is_ddpms_and_the_next_goes_towards_what_the_calls_foresee():
    levels, seen = [600, 400, 250], []

    def model(x, t):
        seen.append((x, ideal(0.5)(x, t)))
        return seen[-1][1]

    first = dpmpp_2m_sde(model, image(1.0), levels[:2], A, draw_noise=torch.ones_like)
    torch.testing.assert_close(first, ddpm(ideal(0.5), image(1.0), levels[:2], A, draw_noise=torch.ones_like))

    seen.clear()
    x = dpmpp_2m_sde(model, image(1.0), levels, A, draw_noise=torch.ones_like)
    before, after = ((x - (1 - A[t]).sqrt() * noise) / A[t].sqrt() for (x, noise), t in zip(seen, levels, strict=False))
    log_snr = [(A[t] / (1 - A[t])).log() / 2 for t in levels]
    halfway = (log_snr[1] + log_snr[2]) / 2
    foreseen = before + (after - before) * (halfway - log_snr[0]) / (log_snr[1] - log_snr[0])
    mean, variance = posterior(seen[1][0], foreseen, A[400], A[250])
    torch.testing.assert_close(x, mean + variance.sqrt())


# --- continuous time


@pytest.mark.parametrize("number", [1, 2, 7, 64])
def test_antithetic_times_are_evenly_spaced_on_the_circle_from_a_random_start(number):
    starts = []
    for seed in range(200):
        times = antithetic_times((number,), torch.Generator().manual_seed(seed))
        assert times.shape == (number,) and 0 <= times.min() and times.max() < 1
        gaps = torch.cat([times.sort().values, times.min().view(1) + 1]).diff()
        torch.testing.assert_close(gaps, torch.full((number,), 1 / number), rtol=0, atol=1e-6)
        starts.append(times[0].item())
    assert torch.histc(torch.tensor(starts), 4, 0, 1).min() > 25


def test_processes_share_the_antithetic_times_of_the_whole_batch(monkeypatch):
    whole = for_batch(antithetic_times, (6,), torch.Generator().manual_seed(0), "cpu")
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr("torch.distributed.get_rank", lambda rank=rank: rank)
        share = for_batch(antithetic_times, (3,), torch.Generator().manual_seed(0), "cpu")
        assert torch.equal(share, whole[rank::2])


def test_noising_to_gamma_is_noising_to_its_alphas_cumprod():
    x0, noise = torch.randn(2, 5, 3, 4, 4, dtype=torch.float64)
    gamma = torch.tensor([-13.3, -5.0, 0.0, 5.0, 13.3], dtype=torch.float64)
    expected = noise_image(x0, noise, torch.sigmoid(-gamma).view(-1, 1, 1, 1))
    torch.testing.assert_close(noise_to_gamma(x0, noise, gamma), expected)


def test_hardly_any_noise_is_exact_in_single_precision():
    gamma, noise = torch.full((1,), -13.3), torch.ones(1, 1)
    added = noise_to_gamma(torch.zeros(1, 1), noise, gamma).item()
    assert added == pytest.approx(torch.sigmoid(gamma.double()).sqrt().item(), rel=1e-6)
    assert torch.sigmoid(-gamma).neg().add(1).sqrt().item() != pytest.approx(added, rel=1e-3)


@pytest.mark.parametrize("sampler", STOCHASTIC.values())
def test_the_last_stochastic_step_adds_noise_where_its_level_is_not_the_clean_image(sampler):
    x, table = torch.zeros(20000, dtype=torch.float64), torch.tensor([0.8, 0.3, 0.01], dtype=torch.float64)
    mean, variance = posterior(x, x, table[1].item(), table[0].item())
    assert mean.abs().max() == 0
    y = sampler(lambda x, t: torch.zeros_like(x), x, [1, 0], table)
    assert y.std().item() == pytest.approx(variance**0.5, rel=0.02)
