from __future__ import annotations

import pytest
import torch
from monai.inferers import SliceInferer
from torch.testing import assert_close

from scripts.networks.anomaly_baselines import FlatNet
from scripts.networks.simplex import SimplexNet
from scripts.noise import NOISES, in_octaves
from scripts.samplers import SOLVERS, STOCHASTIC, alphas_cumprod_table, level_grid, noise_image

SMALL = {"spatial_size": (32, 32), "channels": (16, 32), "num_steps": 3}
A = alphas_cumprod_table()


def net(**kwargs):
    torch.manual_seed(0)
    made = SimplexNet(**{**SMALL, **kwargs})
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return made.eval()


def images(count=2, seed=0):
    return 0.2 + 0.6 * torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def losses(network, image, seed=0):
    return network.losses(image, None, torch.Generator().manual_seed(seed))


def power(x):
    """Mean power of images (B, C, H, W) at each frequency."""
    return torch.fft.fft2(x.double()).abs().square().mean(dim=(0, 1))


def wiener(image_power, noise_power):
    """The best noise estimate in images of one spectrum under Gaussian noise of another, each frequency by itself."""

    def estimate(x, t):
        a = A[t]
        share = (1 - a).sqrt() * noise_power / (a * image_power + (1 - a) * noise_power).clamp(min=1e-12)
        return torch.fft.ifft2(share * torch.fft.fft2(x)).real

    return estimate


def with_power(shape, wanted, seed):
    white = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.fft.ifft2((wanted / shape[-1] / shape[-2]).sqrt() * torch.fft.fft2(white)).real


@pytest.mark.parametrize("solver", [*SOLVERS, *STOCHASTIC])
def test_the_solvers_hold_for_noise_of_any_spectrum_if_it_is_the_same_at_all_levels(solver):
    shape, size = (200, 1, 16, 16), 16
    radius = (torch.fft.fftfreq(size)[:, None] ** 2 + torch.fft.fftfreq(size) ** 2).sqrt().double()
    image_power = 256 * 0.25 / (0.05 + radius)  # of the images
    noise_power = 256 * torch.exp(-((radius / 0.2) ** 2))  # of the noise, which hides the low frequencies first
    levels = level_grid(400, 200)[::-1]
    x0 = with_power(shape, image_power, 0)
    x = noise_image(x0, with_power(shape, noise_power, 1), A[levels[0]])
    model, draws = wiener(image_power, noise_power), iter(range(2, 1000))
    if solver in STOCHASTIC:
        drawn = {"draw_noise": lambda x: with_power(x.shape, noise_power, next(draws))}
        x = STOCHASTIC[solver](model, x, levels, A, **drawn)
    else:
        x = SOLVERS[solver](model, x, levels, A)
    rings = (radius * 8).long()
    for ring in range(6):
        found, wanted = (p[rings == ring].sum() for p in (power(x), power(x0)))
        assert found / wanted == pytest.approx(1, abs=0.12), ring


def test_white_steps_after_a_jump_with_a_spectrum_end_elsewhere():
    """What the published code does: the law above is not empty."""
    shape, size = (200, 1, 16, 16), 16
    radius = (torch.fft.fftfreq(size)[:, None] ** 2 + torch.fft.fftfreq(size) ** 2).sqrt().double()
    image_power, noise_power = 256 * 0.25 / (0.05 + radius), 256 * torch.exp(-((radius / 0.2) ** 2))
    x0, levels = with_power(shape, image_power, 0), level_grid(400, 200)[::-1]
    x = noise_image(x0, with_power(shape, noise_power, 1), A[400])
    x = STOCHASTIC["ancestral"](wiener(image_power, noise_power), x, levels, A)
    high = radius > 0.5
    assert power(x)[high].sum() > 1.5 * power(x0)[high].sum()


def test_the_mean_of_stochastic_ways_down_is_what_one_step_gives():
    """Of Gaussian images, whose best estimate is linear, so that the mean of the ways is the way of the mean noise, 0."""
    radius = (torch.fft.fftfreq(16)[:, None] ** 2 + torch.fft.fftfreq(16) ** 2).sqrt().double()
    model = wiener(256 * 0.25 / (0.05 + radius), 256 * torch.exp(-((radius / 0.2) ** 2)))
    x = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean = STOCHASTIC["ancestral"](model, x, level_grid(300, 30)[::-1], A, draw_noise=torch.zeros_like)
    assert_close(mean, SOLVERS["ddim"](model, x, [300, 0], A))


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("solver", ["ddim", "ancestral"])
def test_a_network_that_knows_the_slice_gives_it_back_from_any_noise(noise, solver):
    network, image = SimplexNet(**SMALL, noise=noise, solver=solver, num_repeats=3), images()
    x0 = (2 * image - 1).repeat(3, 1, 1, 1)
    network.estimate = lambda x, t: ((x - A[t].sqrt() * x0) / (1 - A[t]).sqrt()).float()
    assert_close(network.heal(image), image, atol=1e-4, rtol=0)


@pytest.mark.parametrize("solver", ["multistep", "ancestral", "dpmpp_2m_sde"])
def test_the_output_of_a_slice_depends_on_no_other(solver):
    network, image = net(solver=solver, num_repeats=2), images(3)
    assert_close(network(image)[1:2], network(image[1:2]))
    assert torch.equal(network(image), network(image))
    volume = SliceInferer(roi_size=(32, 32), sw_batch_size=2, spatial_dim=2)(image.movedim(0, -1)[None], network)
    assert_close(volume[0].movedim(-1, 0), network(image))


def test_all_noise_of_a_stochastic_way_has_the_spectrum_that_was_asked_for(monkeypatch):
    drawn = []
    network = net(solver="ancestral", num_repeats=2)
    network.colour = lambda white: drawn.append(white.shape) or in_octaves(white)
    network.heal(images())
    assert drawn == [(2, 3, 32, 32)] * 3  # of the jump, and of each step but the last


def test_the_repeats_have_noise_of_their_own_and_the_healthy_version_is_their_mean():
    image = images(1)
    one, three = (net(num_repeats=n).heal(image) for n in (1, 3))
    assert not torch.allclose(one, three)
    network, seen = net(num_repeats=3), []
    estimate = network.estimate
    network.estimate = lambda x, t: seen.append(x) or estimate(x, t)
    network.heal(image)
    noised = seen[0]
    assert len({tuple(x.flatten()[:4].tolist()) for x in noised}) == 3


def test_the_map_weighs_sequences_and_what_is_darker_and_may_be_of_squares():
    image = images()
    network = net(map_weights=(0, 1, 0), darker_weight=0.0)
    anomaly, healthy, score = network.analyse(image)
    assert_close(anomaly, (image - healthy)[:, 1:2].clamp(min=0))
    largest = anomaly.flatten(1).amax(dim=1)
    assert_close(score, largest / (largest + 0.1))
    squared = net(squared=True)
    assert_close(squared.anomaly_map(image, healthy), ((image - healthy) ** 2).sum(dim=1, keepdim=True))


def test_a_sequence_of_negative_weight_counts_against_the_others_unless_it_repeats_them():
    network, image = net(map_weights=(-1, 1, 0)), images(2)
    image[1, 0] = image[1, 1]  # FLAIR stands in for T1
    healthy = network.heal(image)
    difference = (image - healthy).abs()
    wanted = torch.stack([(difference[0, 1] - difference[0, 0]).clamp(min=0), difference[1, 1]]).unsqueeze(1)
    assert_close(network.anomaly_map(image, healthy), wanted)
    assert (wanted[0] == 0).any() and (wanted[0] > 0).any()


def test_the_control_without_a_network_takes_the_weights_and_one_grey_level_for_healthy():
    control, image = FlatNet(**SMALL, map_weights=(-1, 1, 0), darker_weight=0.0), images()
    control.load_state_dict(net().state_dict())
    brighter = (image - 0.4).clamp(min=0)
    assert_close(control(image)[:, :1], (brighter[:, 1:2] - brighter[:, :1]).clamp(min=0))


def test_slices_without_foreground_are_skipped():
    assert not net()(torch.zeros(1, 3, 32, 32)).any()


def test_the_published_settings_are_settings_of_the_network():
    assert net(**SimplexNet(**SMALL).published).noise_level == 250


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_training_on_one_batch_lowers_the_loss(noise, prediction_type):
    torch.manual_seed(0)
    network, image = SimplexNet(**SMALL, noise=noise, prediction_type=prediction_type), images(8)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    first = losses(network, image)
    for _ in range(25):
        optimizer.zero_grad()
        losses(network, image)["noise"].backward()
        optimizer.step()
    assert losses(network, image)["noise"] < 0.8 * first["noise"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"noise": "simplex"}, "unknown noise 'simplex': choose one of gaussian, octaves"),
        ({"solver": "euler"}, "unknown solver 'euler'"),
        ({"num_repeats": 0}, "num_repeats must be 1 or more"),
        ({"noise_level": 2000}, "noise_level must lie in 1 ... 1000"),
        ({"map_weights": (1, 1)}, "3 numbers"),
        ({"spatial_size": (30, 32)}, "multiples of 4"),
    ],
)
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        SimplexNet(**{**SMALL, **wrong})
