from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from scripts.noise import NOISES, coarse_noise, in_octaves, stream_of
from scripts.samplers import alphas_cumprod_table, draw_noised, for_batch

SHAPE = (5, 2, 64, 96)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def coarse(shape, generator):
    return coarse_noise(shape, 8, generator)


def drawn(colour):
    return lambda shape, generator: colour(for_batch(torch.randn, shape, generator, "cpu"))


GAUSSIAN, OCTAVES = (drawn(NOISES[name]) for name in ("gaussian", "octaves"))


def energy(noise):
    """Share of the power at frequencies of at most f cycles a pixel, as a function."""
    power = torch.fft.fft2(noise).abs().square().mean(dim=(0, 1))
    radius = (torch.fft.fftfreq(noise.shape[2])[:, None] ** 2 + torch.fft.fftfreq(noise.shape[3]) ** 2).sqrt()
    return lambda frequency: (power[radius <= frequency].sum() / power.sum()).item()


@pytest.mark.parametrize("draw", [OCTAVES, coarse])
def test_every_image_of_any_batch_has_zero_mean_and_unit_variance(draw):
    for number in (1, 5):
        noise = draw((number, *SHAPE[1:]), seeded())
        assert noise.shape == (number, *SHAPE[1:])
        assert_close(noise.mean(dim=(2, 3)), torch.zeros(number, 2), atol=1e-5, rtol=0)
        assert_close(noise.var(dim=(2, 3), correction=0), torch.ones(number, 2), atol=1e-4, rtol=0)


@pytest.mark.parametrize("draw", [GAUSSIAN, OCTAVES, coarse])
def test_noise_comes_from_its_seed_alone_and_differs_between_images_and_channels(draw):
    noise = draw(SHAPE, seeded(1))
    assert torch.equal(noise, draw(SHAPE, seeded(1)))
    assert not torch.allclose(noise, draw(SHAPE, seeded(2)))
    flat = noise.flatten(0, 1).flatten(1)
    assert (torch.corrcoef(flat) - torch.eye(len(flat))).abs().max() < 0.6


def test_octaves_have_the_power_that_the_persistence_gives_them():
    below = energy(in_octaves(torch.randn(32, 1, 128, 128, generator=seeded()), wavelength=64, octaves=6, persistence=0.8))
    power = torch.tensor([0.8 ** (2 * k) for k in range(6)])
    shares = (power / power.sum()).cumsum(0)
    for octave, share in enumerate(shares[:-1].tolist()):
        assert below(2**octave / 64) == pytest.approx(share, abs=0.06)  # the first octave has few frequencies
    assert below(1 / 128) < 0.01 and below(0.5) > 0.99  # nothing below the first or beyond the last


def test_gaussian_noise_is_white_and_coarse_noise_is_not():
    white, coarsely = (energy(draw((16, 1, 64, 64), seeded()))(1 / 16) for draw in (GAUSSIAN, coarse))
    assert white == pytest.approx(torch.pi / 16**2, abs=0.01)  # the share of the disc
    assert coarsely > 0.7


def test_octaves_that_an_image_is_too_small_for_are_left_out_and_none_at_all_is_refused():
    assert in_octaves(torch.randn(1, 1, 32, 32), wavelength=64).isfinite().all()
    with pytest.raises(ValueError, match="no frequency in 1 octaves from 64"):
        in_octaves(torch.randn(1, 1, 16, 16), wavelength=64, octaves=1)


@pytest.mark.parametrize("name", NOISES)
def test_images_are_noised_with_the_noise_that_is_asked_for(name):
    table = alphas_cumprod_table()
    x0 = torch.rand(3, 1, 32, 32, generator=seeded())
    x, t, noise = draw_noised(x0, table, seeded(4), colour=NOISES[name])
    a = table[t].float().view(-1, 1, 1, 1)
    assert_close(x, a.sqrt() * x0 + (1 - a).sqrt() * noise)
    assert (energy(noise)(1 / 8) > 0.5) == (name == "octaves")


def test_further_noise_of_an_image_depends_on_its_first_noise_and_the_name_alone():
    noise = torch.randn(2, 1, 4, 4, generator=seeded())
    drawn = [torch.randn(9, generator=stream_of(one, name)) for one, name in ((noise[0], 3), (noise[0].clone(), "3"))]
    assert_close(*drawn, rtol=0, atol=0)
    for one, name in ((noise[1], 3), (noise[0], 4)):
        assert not torch.equal(torch.randn(9, generator=stream_of(one, name)), drawn[0])
