"""Noise levels and solvers of the diffusion ODE, both ways.

A level ``t`` counts noising steps: 0 is the clean image, ``T`` (1000 by default) is almost pure noise. ``alphas_cumprod``
is a table with ``T + 1`` entries whose entry 0 is exactly 1, so that a step to or from the clean image is a step like
any other. A solver takes ``model(x, t)``, which returns the noise estimate of ``x`` at level ``t``, and an explicit grid
of levels; a rising grid encodes an image into noise, a falling one decodes it.

Signal and noise scale are the cosine and sine of an angle: ``x = cos(angle)·x0 + sin(angle)·noise``. The diffusion ODE is
then ``dx / dangle = v`` with the velocity ``v = cos(angle)·noise - sin(angle)·x0`` (Salimans & Ho 2022, arXiv 2202.00512),
smooth at the clean image and at pure noise. A DDIM step is a rotation by the difference of two angles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = [
    "SOLVERS",
    "STOCHASTIC",
    "alphas_cumprod_table",
    "antithetic_times",
    "ddim",
    "ddpm",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "draw_noised",
    "for_batch",
    "from_batch",
    "heun",
    "level_grid",
    "mean_of_processes",
    "multistep",
    "noise_from_v",
    "noise_image",
    "noise_to_gamma",
    "posterior",
]

Model = Callable[[Tensor, int], Tensor]
Correct = Callable[[Tensor, int, int], Tensor]


def _keep(x: Tensor, t: int, s: int) -> Tensor:
    return x


def alphas_cumprod_table(
    schedule: str = "linear", num_levels: int = 1000, beta_start: float = 1e-4, beta_end: float = 2e-2
) -> Tensor:
    """Share of the signal's variance that is left at each level.

    Args:
        schedule: ``linear`` (Ho et al. 2020, arXiv 2006.11239), ``scaled_linear`` (linear in the square root of beta,
            Rombach et al. 2022, arXiv 2112.10752) or ``cosine`` (Nichol & Dhariwal 2021, arXiv 2102.09672, eq. 17).
        num_levels: number of noising steps ``T``.
        beta_start: noise variance of the first step; not used by ``cosine``.
        beta_end: noise variance of the last step; not used by ``cosine``.

    Returns:
        float64 tensor (num_levels + 1,), falling from 1 at level 0.

    Raises:
        ValueError: for an unknown schedule.
    """
    if schedule == "linear":
        betas = torch.linspace(beta_start, beta_end, num_levels, dtype=torch.float64)
    elif schedule == "scaled_linear":
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_levels, dtype=torch.float64) ** 2
    elif schedule == "cosine":
        angle = (torch.arange(num_levels + 1, dtype=torch.float64) / num_levels + 0.008) / 1.008 * torch.pi / 2
        f = torch.cos(angle) ** 2
        betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    else:
        raise ValueError(f"unknown schedule '{schedule}': choose linear, scaled_linear or cosine")
    return torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - betas, dim=0)])


def level_grid(noise_level: int, num_steps: int) -> list[int]:
    """Rising grid of distinct, evenly spaced levels from 0 to ``noise_level``; reverse it to decode.

    Args:
        noise_level: the last level L.
        num_steps: number of steps wanted; the grid has at most ``noise_level`` of them.

    Raises:
        ValueError: if there is no step to take.
    """
    if noise_level < 1 or num_steps < 1:
        raise ValueError(f"noise_level ({noise_level}) and num_steps ({num_steps}) must be at least 1")
    num_steps = min(num_steps, noise_level)
    return [round(noise_level * i / num_steps) for i in range(num_steps + 1)]


def noise_image(x0: Tensor, noise: Tensor, a: Tensor) -> Tensor:
    """Noise a clean image in one jump to the level whose ``alphas_cumprod`` is ``a`` (broadcast over the batch)."""
    return a.sqrt() * x0 + (1 - a).sqrt() * noise


def for_batch(
    draw: Callable[..., Tensor], shape: Sequence[int], generator: torch.Generator, device: torch.device | str
) -> Tensor:
    """Random numbers for a batch, which do not depend on how many processes share it.

    They are drawn where the generator is. On the CPU a seed means the same numbers on every machine, which it doesn't on
    GPUs: so all generators of the project are made there.

    Args:
        draw: ``torch.rand`` or ``torch.randn``.
        shape: of the numbers, beginning with this process's share of the batch.
        generator: in the same state in all processes.
        device: where the numbers are wanted.

    Returns:
        what one process would draw for the whole batch; of several, each gets every ``world_size``-th row, beginning with
        its rank, as the batch samplers of :mod:`scripts.data.slices` share the slices.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    shape = (world_size * shape[0], *shape[1:])
    return draw(shape, generator=generator, device=generator.device)[rank::world_size].to(device)


def from_batch(x: Tensor, number: int) -> Tensor:
    """Another row of the batch for each row of x, the same one whether one process has the batch or several share it.

    Args:
        x: this process's share (B, ...) of the batch, every ``world_size``-th row, see :func:`for_batch`.
        number: any whole number of 0 or more; which partner a row gets depends on it. A batch of one row has no other.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    shares = [x]
    if world_size > 1:
        shares = [torch.empty_like(x) for _ in range(world_size)]
        dist.all_gather(shares, x.contiguous())
    batch = torch.stack(shares, dim=1).flatten(0, 1)
    return batch.roll(1 + number % max(len(batch) - 1, 1), dims=0)[rank::world_size]


def mean_of_processes(value: Tensor) -> Tensor:
    """Mean of what each process has one of, any shape, without a gradient; of one process its own."""
    value = value.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value


def draw_noised(
    x0: Tensor,
    alphas_cumprod: Tensor,
    generator: torch.Generator,
    level_power: float = 1.0,
    colour: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Noise each image of a batch to a level of its own, for training.

    Args:
        x0: clean images (B, ...).
        alphas_cumprod: table with one entry a level, entry 0 being 1.
        generator: source of the levels and of the noise, see :func:`for_batch`.
        level_power: levels are T·u^level_power, u uniform, rounded up; above 1 the lower ones come more often.
        colour: what makes the noise of white noise, one of :data:`scripts.noise.NOISES`; None leaves it white.

    Returns:
        noised images (B, ...), their levels (B,) from 1 to T, and the noise (B, ...).
    """
    num_levels = len(alphas_cumprod) - 1
    u = for_batch(torch.rand, (len(x0),), generator, x0.device)
    t = 1 + (num_levels * u**level_power).long().clamp(max=num_levels - 1)
    noise = for_batch(torch.randn, x0.shape, generator, x0.device)
    noise = colour(noise) if colour else noise
    a = alphas_cumprod[t].to(x0.dtype).view(-1, *[1] * (x0.ndim - 1))
    return noise_image(x0, noise, a), t, noise


def antithetic_times(shape: Sequence[int], generator: torch.Generator, device: torch.device | str = "cpu") -> Tensor:
    """Times in [0, 1), evenly spaced from one random start (Kingma et al. 2021, arXiv 2107.00630, appendix I.1).

    Each is uniform by itself, and together they cover the interval, which makes the mean over a batch vary less. To be
    shared by several processes through :func:`for_batch`.
    """
    (number,) = shape
    start = torch.rand(1, generator=generator, device=device)
    return (start + torch.arange(number, device=device) / number) % 1


def noise_to_gamma(x0: Tensor, noise: Tensor, gamma: Tensor) -> Tensor:
    """Noise each clean image (B, ...) to the negative log of the signal-to-noise ratio ``gamma`` (B,), in continuous time.

    As :func:`noise_image` with a = sigmoid(-gamma), but exact in float32 where there is hardly any noise.
    """
    gamma = gamma.view(-1, *[1] * (x0.ndim - 1))
    return torch.sigmoid(-gamma).sqrt() * x0 + torch.sigmoid(gamma).sqrt() * noise


def noise_from_v(x: Tensor, v: Tensor, a: Tensor) -> Tensor:
    """Noise estimate of a v-predicting network (Salimans & Ho 2022, arXiv 2202.00512): v = sqrt(a)·noise - sqrt(1-a)·x0."""
    return a.sqrt() * v + (1 - a).sqrt() * x


def posterior(x: Tensor, x0: Tensor, a_t: Tensor | float, a_s: Tensor | float) -> tuple[Tensor, Tensor | float]:
    """Mean and variance of the Gaussian q(x_s | x_t, x_0) (Ho et al. 2020, arXiv 2006.11239, eq. 6 and 7).

    Args:
        x: noised image x_t.
        x0: clean image, or an estimate of it, which makes this p(x_s | x_t).
        a_t: ``alphas_cumprod`` at the level t of x.
        a_s: the same at the lower level s.
    """
    beta = 1 - a_t / a_s
    mean = (a_s**0.5 * beta * x0 + (a_t / a_s) ** 0.5 * (1 - a_s) * x) / (1 - a_t)
    return mean, beta * (1 - a_s) / (1 - a_t)


def _angles(levels: Sequence[int], alphas_cumprod: Tensor) -> list[float]:
    """Angle of each level, 0 at the clean image and pi / 2 at pure noise."""
    a = alphas_cumprod[list(levels)].double()
    return torch.atan2((1 - a).sqrt(), a.sqrt()).tolist()


def _velocity(model: Model, x: Tensor, t: int, angle: float) -> Tensor:
    """Derivative of x by the angle, from the noise estimate at level t."""
    return (model(x, t) - math.sin(angle) * x) / math.cos(angle)


def ddim(model: Model, x: Tensor, levels: Sequence[int], alphas_cumprod: Tensor, correct: Correct = _keep) -> Tensor:
    """First order, one network call a step (Song et al. 2021, arXiv 2010.02502, eq. 12 and 14): a rotation.

    Args:
        model: ``model(x, t)`` returns the noise estimate at level t, with the shape of x.
        x: image or noise at ``levels[0]``.
        levels: grid of levels, rising to encode, falling to decode.
        alphas_cumprod: table with one entry a level, entry 0 being 1.
        correct: ``correct(x, t, s)`` is called after the step from t to s and returns the x to go on with, such as one that
            a classifier has steered.

    Returns:
        x at ``levels[-1]``.
    """
    angle = _angles(levels, alphas_cumprod)
    for i, t in enumerate(levels[:-1]):
        step = angle[i + 1] - angle[i]
        x = math.cos(step) * x + math.sin(step) * _velocity(model, x, t, angle[i])
        x = correct(x, t, levels[i + 1])
    return x


def heun(model: Model, x: Tensor, levels: Sequence[int], alphas_cumprod: Tensor, correct: Correct = _keep) -> Tensor:
    """Second order, two network calls a step: the trapezoidal rule (Karras et al. 2022, arXiv 2206.00364, algorithm 1).

    Arguments and result as :func:`ddim`.
    """
    angle = _angles(levels, alphas_cumprod)
    for i, (t, s) in enumerate(pairwise(levels)):
        step = angle[i + 1] - angle[i]
        v = _velocity(model, x, t, angle[i])
        x = x + step / 2 * (v + _velocity(model, x + step * v, s, angle[i + 1]))
        x = correct(x, t, s)
    return x


def multistep(model: Model, x: Tensor, levels: Sequence[int], alphas_cumprod: Tensor, correct: Correct = _keep) -> Tensor:
    """Second order, one network call a step: the two-step rule of Adams and Bashforth with unequal steps.

    The velocity is extrapolated linearly from the last two calls; the first step is Heun's, at the price of one more
    call. Unlike :func:`dpmpp_2m` it stays second order in the step that touches the clean image, so that encoding and
    decoding are equally exact (multistep rules for this ODE: Liu et al. 2022, arXiv 2202.09778). Arguments and result
    as :func:`ddim`.
    """
    angle = _angles(levels, alphas_cumprod)
    last = None
    for i, t in enumerate(levels[:-1]):
        step = angle[i + 1] - angle[i]
        v = _velocity(model, x, t, angle[i])
        if last is None:
            slope = (_velocity(model, x + step * v, levels[1], angle[1]) - v) / step
        else:
            slope = (v - last) / (angle[i] - angle[i - 1])
        x = correct(x + step * (v + step / 2 * slope), t, levels[i + 1])
        last = v
    return x


def dpmpp_2m(model: Model, x: Tensor, levels: Sequence[int], alphas_cumprod: Tensor, correct: Correct = _keep) -> Tensor:
    """DPM-Solver++ (2M): second order in the log of the signal-to-noise ratio, one network call a step.

    Lu et al. 2022, arXiv 2211.01095, algorithm 2; with a rising grid its inverse. The first step and the step that
    touches the clean image, where that logarithm is infinite, are DDIM's. Arguments and result as :func:`ddim`.
    """
    angle = _angles(levels, alphas_cumprod)
    last = None
    for i, t in enumerate(levels[:-1]):
        step = angle[i + 1] - angle[i]
        v = _velocity(model, x, t, angle[i])
        denoised = math.cos(angle[i]) * x - math.sin(angle[i]) * v
        x = math.cos(step) * x + math.sin(step) * v
        if last is not None and angle[i - 1] and angle[i + 1]:
            log_snr = [-math.log(math.tan(a)) for a in angle[i - 1 : i + 2]]
            slope = (denoised - last) / (log_snr[1] - log_snr[0])
            # the second-order term of eq. 4.1, as a correction of DDIM's step
            h = log_snr[2] - log_snr[1]
            x = x - math.cos(angle[i + 1]) * math.expm1(-h) * h / 2 * slope
        last = denoised if angle[i] else None
        x = correct(x, t, levels[i + 1])
    return x


def ddpm(
    model: Callable[[Tensor, int], Tensor | tuple[Tensor, Tensor]],
    x: Tensor,
    levels: Sequence[int],
    alphas_cumprod: Tensor,
    correct: Correct = _keep,
    draw_noise: Callable[[Tensor], Tensor] = torch.randn_like,
) -> Tensor:
    """Stochastic ancestral sampling down a grid of levels (Ho et al. 2020, arXiv 2006.11239, eq. 6 and 7).

    Args:
        model: as in :func:`ddim`; it may return a pair (noise, fraction), the fraction in [0, 1] placing the log variance
            of the step between its lower and upper bound (Nichol & Dhariwal 2021, arXiv 2102.09672, eq. 15).
        x: noise or noised image at ``levels[0]``.
        levels: falling grid of levels.
        alphas_cumprod: table with one entry a level, entry 0 being 1.
        correct: as in :func:`ddim`.
        draw_noise: returns standard normal noise in the shape of its argument.

    Returns:
        x at ``levels[-1]``; no noise is added by a step to the clean image, where the table is 1.
    """
    for t, s in pairwise(levels):
        a_t, a_s = alphas_cumprod[t].item(), alphas_cumprod[s].item()
        noise = model(x, t)
        noise, fraction = noise if isinstance(noise, tuple) else (noise, None)
        x0 = (x - (1 - a_t) ** 0.5 * noise) / a_t**0.5
        x, lower = posterior(x, x0, a_t, a_s)
        if lower > 0:
            upper = 1 - a_t / a_s
            deviation = lower**0.5 if fraction is None else (upper / lower) ** (fraction / 2) * lower**0.5
            x = x + deviation * draw_noise(x)
        x = correct(x, t, s)
    return x


def dpmpp_2m_sde(
    model: Model,
    x: Tensor,
    levels: Sequence[int],
    alphas_cumprod: Tensor,
    correct: Correct = _keep,
    draw_noise: Callable[[Tensor], Tensor] = torch.randn_like,
) -> Tensor:
    """SDE-DPM-Solver++ (2M): stochastic, second order in the log of the signal-to-noise ratio, one network call a step.

    Lu et al. 2022, arXiv 2211.01095, section 5: a step of :func:`ddpm` towards the clean image as the last two calls
    foresee it for the middle of the step. The noise mends errors of earlier steps, for which a solver of the ODE has no
    means; the second order lets few steps do. Arguments and result as :func:`ddpm`, but for the model's fraction.
    """
    a = alphas_cumprod[list(levels)].double()
    log_snr = ((a / (1 - a)).log() / 2).tolist()
    last = None
    for i, (t, s) in enumerate(pairwise(levels)):
        a_t, a_s = a[i].item(), a[i + 1].item()
        denoised = (x - (1 - a_t) ** 0.5 * model(x, t)) / a_t**0.5
        foreseen = denoised
        if last is not None and a_s < 1:
            ratio = (log_snr[i + 1] - log_snr[i]) / (log_snr[i] - log_snr[i - 1])
            foreseen = denoised + ratio / 2 * (denoised - last)
        x, variance = posterior(x, foreseen, a_t, a_s)
        if variance > 0:
            x = x + variance**0.5 * draw_noise(x)
        last = denoised
        x = correct(x, t, s)
    return x


SOLVERS = {"ddim": ddim, "heun": heun, "multistep": multistep, "dpmpp_2m": dpmpp_2m}
STOCHASTIC = {"ancestral": ddpm, "dpmpp_2m_sde": dpmpp_2m_sde}
