"""The models against cases that are known exactly: Gaussian data, and grey levels of which all are equally likely."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.distributions import Normal
from torch.nn import functional

from scripts.networks.grey_levels import lattice_noise
from scripts.networks.noise_schedules import SCHEDULES
from scripts.networks.variational_diffusion import SAMPLERS, VariationalDiffusionNet
from scripts.samplers import antithetic_times, noise_to_gamma

TINY = {"spatial_size": (8, 8), "channels": (32, 32), "hidden_size": 16, "num_blocks": 2, "score_size": 16}
TINY |= {"latent_size": 6, "score_blocks": 2, "num_steps": 4}
MODELS = ("image", "medvdm")


def network(**kwargs):
    """A small network with random weights, those included that start at zero."""
    torch.manual_seed(0)
    net = VariationalDiffusionNet(**{**TINY, **kwargs}).eval()
    with torch.no_grad():
        for parameter in [*net.codec.parameters(), *net.score.parameters()]:
            parameter.add_(0.05 * torch.randn_like(parameter))
    return net


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def images(count=4, size=(8, 8), seed=0):
    return (torch.rand(count, 1, *size, generator=generator(seed)) * 255).round() / 255


def noises(count=3, seed=0):
    return torch.randn(count, 1, 8, 8, generator=generator(seed))


class GaussianData(nn.Module):
    """Codec and score of data that are N(0, s²): f(x) is x, and both know the exact answer."""

    def __init__(self, s):
        super().__init__()
        self.s, self.latent_shape, self.grey_scale = s, (1,), None

    def encode(self, image, gamma_0, label):
        return image.flatten(1)

    def decode(self, z, gamma_0, label):
        return z

    def negative_log_likelihood(self, image, z, gamma_0, label):
        variance = 1 / (1 / self.s**2 + (-gamma_0).exp())  # of x given z_0 / sqrt(1 - var_0), by Bayes' rule
        posterior = Normal(variance * z * (-gamma_0).exp(), variance.sqrt())
        return -posterior.log_prob(image.flatten(1)).sum(dim=1), {}

    def forward(self, z, gamma, label=None):
        gamma = gamma[:, None]
        signal, noise = torch.sigmoid(-gamma), torch.sigmoid(gamma)
        return z * noise.sqrt() / (signal * self.s**2 + noise)


def gaussian_network(s=0.5, **kwargs):
    """A network whose parts are exact for one pixel that is N(0, s²)."""
    settings = {**TINY, "spatial_size": (1, 1), "latent_size": 1, "gamma_range": (-12.0, 12.0)}
    settings |= {"model": "medvdm", "schedule": "linear"}
    net = VariationalDiffusionNet(**{**settings, **kwargs}).double().eval()
    net.codec = net.score = GaussianData(s)
    return net


def total(net, image):
    """The bound of one pixel, in nats."""
    terms = net.bound(image, generator())
    return (terms["recon"] + terms["latent"] + terms["diffusion"]).mean().item() * math.log(2)


# --- the bound


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("s", [0.3, 1.0])
@pytest.mark.parametrize("value", [0.0, 0.7])
def test_the_bound_of_the_exact_score_is_the_negative_log_likelihood(schedule, s, value):
    net = gaussian_network(s, schedule=schedule)
    image = torch.full((200_000, 1, 1, 1), value, dtype=torch.float64)
    assert total(net, image) == pytest.approx(-Normal(0.0, s).log_prob(torch.tensor(value)).item(), abs=0.03)


def test_the_bound_falls_with_the_number_of_steps_to_that_of_continuous_time():
    image = torch.full((200_000, 1, 1, 1), 0.4, dtype=torch.float64)
    bounds = [total(gaussian_network(num_timesteps=steps), image) for steps in (8, 16, 32, 64, 2**14)]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[-1] == pytest.approx(total(gaussian_network(), image), abs=0.02)


def test_a_score_that_errs_costs_what_the_formula_says():
    net = gaussian_network()
    exact = net.codec
    image = torch.zeros(100, 1, 1, 1, dtype=torch.float64)
    right = net.bound(image, generator())["diffusion"]
    net.score = GaussianData(0.5)
    net.score.forward = lambda z, gamma, label: exact(z, gamma) + 0.1
    wrong = net.bound(image, generator())["diffusion"]
    g = generator()
    gamma = net.schedule(antithetic_times((100,), g)).double()
    _, noise = (torch.randn(100, 1, generator=g).double() for _ in range(2))
    gap = noise - exact(noise_to_gamma(torch.zeros_like(noise), noise, gamma), gamma)
    expected = 24 / 2 * ((gap - 0.1).square() - gap.square())[:, 0] / math.log(2)  # gamma' is 24
    torch.testing.assert_close(wrong - right, expected, rtol=1e-4, atol=1e-4)


def test_eight_bits_a_pixel_are_the_bound_of_grey_levels_that_are_all_equally_likely():
    net = network(gamma_range=(-13.3, 9.0))
    values = (2 * torch.arange(256) + 1) / 256 - 1

    def exact(z, gamma, label):
        gamma = gamma.view(-1, 1, 1, 1, 1)
        signal, std = torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()
        weights = torch.softmax(-((z[..., None] - signal * values) ** 2) / (2 * std**2), dim=-1)
        return ((z[..., None] - signal * (weights * values).sum(dim=-1, keepdim=True)) / std)[..., 0]

    net.score.forward = exact
    terms = net.bound(images(1000), generator())
    assert sum(term.mean().item() for term in terms.values()) == pytest.approx(8, abs=0.04)
    assert terms["recon"].mean() < 0.02 and terms["latent"].mean() < 1e-4


@pytest.mark.parametrize("model", MODELS)
def test_the_latent_term_is_its_closed_form(model):
    net, image = network(model=model), images()
    f = net.codec.encode(image, net.schedule(torch.zeros(1))[0], None).flatten(1).double()
    gamma = torch.tensor(9.0 if model == "image" else 5.0).double()
    variance = torch.sigmoid(gamma)
    expected = 0.5 * ((1 - variance) * f**2 + variance - variance.log() - 1).sum(dim=1) / (64 * math.log(2))
    torch.testing.assert_close(net.bound(image, generator())["latent"].double(), expected, rtol=2e-3, atol=1e-8)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("num_timesteps", [None, 10])
def test_the_losses_are_the_means_of_the_bound(model, num_timesteps):
    net = network(model=model, num_timesteps=num_timesteps)
    terms, losses = net.bound(images(), generator()), net.losses(images(), torch.zeros(4), generator())
    assert list(losses) == ["recon", "latent", "diffusion"]
    assert all(losses[name].item() == pytest.approx(terms[name].mean().item()) for name in losses)
    assert all(value.shape == (4,) and value.isfinite().all() for value in terms.values())


def test_the_floor_is_the_bernoulli_term_of_a_perfect_reconstruction():
    net, image = network(model="medvdm"), images()
    net.codec.logits = lambda z, gamma_0, label: torch.special.logit(image, eps=1e-7)
    torch.testing.assert_close(net.bound(image, generator())["recon"], net.floor(image), rtol=1e-4, atol=1e-5)
    assert net.floor(torch.full((1, 1, 8, 8), 0.5)).item() == 1.0
    assert net.floor(torch.zeros(1, 1, 8, 8)).item() == 0.0


def test_images_that_half_precision_has_moved_have_the_same_bound():
    net = network()
    one, other = net.bound(images(), generator()), net.bound(images().half().float(), generator())
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_gradient_term_is_zero_for_a_perfect_reconstruction_alone():
    net, image = network(model="medvdm", gradient_weight=0.5), images()
    assert net.losses(image, None, generator())["gradient"] > 0
    net.codec.decode = lambda z, gamma_0, label: image
    assert net.losses(image, None, generator())["gradient"] == 0


def test_calibration_finds_the_scale_that_makes_the_8_bit_likelihood_best():
    net = network(model="medvdm")
    mean = torch.full((1, 1, 8, 8), 0.5)
    net.codec.decode = lambda z, gamma_0, label: mean
    net.codec.logits = lambda z, gamma_0, label: torch.special.logit(mean).expand(len(z), 1, 8, 8)
    u = torch.rand(200, 1, 8, 8, generator=generator()).clamp(1e-4, 1 - 1e-4)
    image = ((0.5 + 0.03 * torch.special.logit(u)) * 255).round().clamp(0, 255) / 255  # logistic with scale 0.03
    net.calibrate([{"image": image[:100]}, {"image": image[100:]}])
    assert net.codec.grey_scale.item() == pytest.approx(0.03, rel=0.02)
    bits = []
    for scale in (0.024, 0.03, 0.0375):
        net.codec.grey_scale.fill_(scale)
        bits.append(net.bound(image, generator())["recon_8bit"].mean().item())
    assert bits[1] == min(bits)


# --- the score


@pytest.mark.parametrize("gamma", [-13.3, -12.5, -11.5, -10.0, -7.0])
def test_the_lattice_explains_the_noise_as_256_equally_likely_values_do(gamma):
    f = (2 * torch.randint(60, 190, (2000,), generator=generator()) + 1) / 256 - 1
    level = torch.full((2000,), gamma)
    z = noise_to_gamma(f, torch.randn(2000, generator=generator(1)), level).double()
    signal, std = torch.sigmoid(level[0].double().neg()).sqrt(), torch.sigmoid(level[0].double()).sqrt()
    values = (2 * torch.arange(256).double() + 1) / 256 - 1
    weights = torch.softmax(-((z[:, None] - signal * values) ** 2) / (2 * std**2), dim=-1)
    expected = (z - signal * (weights * values).sum(dim=-1)) / std
    torch.testing.assert_close(lattice_noise(z, level.double()), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(lattice_noise(z.float(), level), expected.float(), rtol=0.02, atol=0.02)


def test_a_new_score_network_knows_of_noise_above_the_grey_levels_only_that_it_is_part_of_the_input():
    torch.manual_seed(0)
    net = VariationalDiffusionNet(**TINY)
    z, gamma = noises(), torch.tensor([-5.0, 0.0, 5.0])
    z = z - functional.pixel_shuffle(functional.pixel_unshuffle(z, 2).mean(dim=(2, 3), keepdim=True), 2).tile(4, 4)
    torch.testing.assert_close(net.score(z, gamma), torch.sigmoid(gamma).sqrt().view(-1, 1, 1, 1) * z)


@pytest.mark.parametrize("gamma", [-8.0, -2.0, 3.0, 9.0])
def test_a_new_score_network_estimates_the_noise_of_the_finest_patterns_as_well_as_can_be(gamma):
    torch.manual_seed(0)
    net = VariationalDiffusionNet(**TINY)
    mean, std = torch.tensor([0.02, -0.05, 0.0]), torch.tensor([0.05, 0.01, 0.001])
    amounts = mean + std * torch.randn(5000, 3)
    f = functional.pixel_shuffle((amounts @ net.score.patterns.T)[:, :, None, None], 2).tile(4, 4)
    torch.testing.assert_close(net.score.patterns_of(f), amounts, rtol=1e-4, atol=1e-5)
    net.codec.encode = lambda image, gamma_0, label: image
    net.standardise([{"image": f[:2000]}, {"image": f[2000:]}])
    torch.testing.assert_close(net.score.std, std, rtol=0.05, atol=0)
    noise, level = torch.randn(f.shape), torch.full((5000,), gamma)
    with torch.no_grad():
        estimated = net.score.patterns_of(net.score(noise_to_gamma(f, noise, level), level))
    gap = (estimated - net.score.patterns_of(noise)).square().mean(dim=0)
    variance, signal = torch.sigmoid(level[0]) / 16, torch.sigmoid(-level[0])  # of the mean of 16 blocks' noise
    expected = (signal * std**2 / (signal * std**2 + variance)) / 16  # what is left of the variance 1/16
    torch.testing.assert_close(gap, expected, rtol=0.1, atol=1e-7)


@pytest.mark.parametrize("pixels", [(0, 1, 0, 1), (0, 0, 1, 1), (0, 1, 1, 0)])
def test_the_finest_patterns_are_columns_rows_and_checkerboard(pixels):
    net = VariationalDiffusionNet(**TINY)
    image = torch.tensor(pixels).float().view(1, 1, 2, 2).tile(4, 4)
    amount = net.score.patterns_of(image)[0]
    number = [(0, 1, 0, 1), (0, 0, 1, 1), (0, 1, 1, 0)].index(pixels)
    assert amount.abs().argmax() == number and amount.abs().sum().item() == 1


def test_the_papers_model_begins_as_a_linear_codec_and_has_no_patterns_to_measure():
    net = network(model="medvdm")
    image = torch.cat([images(), images(seed=1)])
    before = net.bound(image, generator())["recon"].mean()
    score = {name: value.clone() for name, value in net.score.state_dict().items()}
    net.standardise([{"image": image[:4]}, {"image": image[4:]}])
    assert net.bound(image, generator())["recon"].mean() < before
    assert all(torch.equal(value, score[name]) for name, value in net.score.state_dict().items())


def test_the_diffusion_weight_counts_in_the_training_of_the_papers_model_alone():
    for model, weight in (("medvdm", 0.1), ("image", 1.0)):
        net = network(model=model, diffusion_weight=0.1)
        whole, part = (net.train(mode).losses(images(), None, generator()) for mode in (False, True))
        assert part["recon"] == whole["recon"]
        for name in ("latent", "diffusion"):
            torch.testing.assert_close(part[name], weight * whole[name])


@pytest.mark.parametrize("detail", ["lattice", "fourier", "none"])
def test_the_score_has_a_gradient_by_every_weight(detail):
    net = network(detail=detail)
    net.score(noises(), torch.tensor([-13.0, 0.0, 5.0])).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.score.parameters())


# --- training


def test_the_mixed_weighting_is_for_training_alone():
    net = network(weighting="mixed")
    assert list(net.losses(images(), None, generator())) == ["recon", "latent", "diffusion"]
    assert list(net.train().losses(images(), None, generator())) == ["velocity"]


def test_the_velocity_error_is_zero_for_a_score_that_knows_the_noise_and_grows_with_its_square():
    net = network(weighting="mixed").train()
    seen = {}

    def knows(z, gamma, label):
        f = net.codec.encode(images(), None, None)
        gamma = gamma.view(-1, 1, 1, 1)
        seen["gamma"], error = gamma.flatten(), seen.get("error", 0.0)
        noise = (z - torch.sigmoid(-gamma).sqrt() * f) / torch.sigmoid(gamma).sqrt()
        return noise + error * torch.sigmoid(-gamma).sqrt()  # an error of the noise, from one of the velocity

    net.score.forward = knows
    assert net.losses(images(), None, generator())["velocity"].item() < 1e-4
    for error in (1.0, 2.0):
        seen["error"] = error
        assert net.losses(images(), None, generator())["velocity"].item() == pytest.approx(error**2, rel=1e-2)


@pytest.mark.parametrize("bound_share", [0.0, 0.25, 1.0])
def test_the_noise_levels_of_the_mixed_weighting_are_spread_as_it_says(bound_share):
    net = network(weighting="mixed", bound_share=bound_share).train()
    seen = []
    net.score.forward = lambda z, gamma, label: seen.append(gamma) or torch.zeros_like(z)
    net.losses(images(4000), None, generator())
    (gamma,) = seen
    assert gamma.isfinite().all() and gamma.min() >= -13.3 and gamma.max() <= 9
    for edge in (-12.0, -8.0, -2.4, 0.0, 4.0):
        expected = bound_share * (edge + 13.3) / 22.3
        expected += (1 - bound_share) * Normal(-2.4, 2.4).cdf(torch.tensor(edge)).item()
        assert (gamma < edge).float().mean().item() == pytest.approx(expected, abs=0.002)


@pytest.mark.parametrize(("model", "weighting"), [("image", "bound"), ("image", "mixed"), ("medvdm", "bound")])
def test_a_few_steps_of_training_lower_the_loss(model, weighting):
    net = network(model=model, weighting=weighting, schedule="linear" if weighting == "mixed" else "monotonic").train()
    image = images(1).expand(16, -1, -1, -1)
    optimizer = torch.optim.AdamW(net.parameters(), lr=4e-3)
    history = []
    for _ in range(20):
        loss = sum(net.losses(image, torch.zeros(16), generator()).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.9 * history[0]


@pytest.mark.parametrize("model", MODELS)
def test_classes_are_learned_and_can_be_asked_for(model):
    net = network(model=model, num_classes=2, channels=(64, 64)).train()  # of 32, the normalisation would hide the class
    sum(net.losses(images(), torch.tensor([0, 1, 0, 1]), generator()).values()).backward()
    embedding = net.score.unet.class_embedding if model == "image" else net.score.condition.content
    assert embedding.weight.grad[:2].abs().sum() > 0
    with torch.no_grad():
        embedding.weight.mul_(20)
    first, second, anyone = (net(noises(), label) for label in (torch.zeros(3).long(), torch.ones(3).long(), None))
    assert not torch.equal(first, second) and not torch.equal(first, anyone)


def test_a_tenth_of_the_training_images_loses_its_class():
    net = network(num_classes=2).train()
    seen = []
    net.score.forward = lambda z, gamma, label: seen.append(label) or torch.zeros_like(z)
    net.losses(images(2000), torch.ones(2000).long(), generator())
    assert (seen[0] == 2).float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert set(seen[0].tolist()) == {1, 2}


# --- sampling


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samples_of_gaussian_data_have_its_spread(sampler):
    net = gaussian_network(0.3, sampler=sampler, num_steps=100)
    x = net(torch.randn(1000, 1, 1, 1, generator=generator()))
    assert x.std().item() == pytest.approx(0.3, rel=0.08) and abs(x.mean().item()) < 0.03


def test_the_deterministic_samplers_are_exact_for_gaussian_data_in_the_limit():
    noise = torch.tensor([-2.0, -0.5, 1.0, 3.0]).view(-1, 1, 1, 1)
    for sampler, error in (("ddim", 0.02), ("heun", 5e-4), ("multistep", 5e-4), ("dpmpp_2m", 2e-3)):
        x = gaussian_network(0.3, sampler=sampler, num_steps=400)(noise)
        torch.testing.assert_close(x.float(), 0.3 * noise.flatten(1), rtol=error, atol=0)


def test_an_ancestral_step_is_the_formula_of_the_paper():
    net = network(sampler="ancestral", num_steps=2, seed=3)
    z, gammas = noises(1), net.schedule(torch.tensor([1.0, 0.5, 0.0]))
    draw = net._noise_of_each(z)
    for above, below in zip(gammas[:-1], gammas[1:], strict=True):
        c = -torch.expm1(below - above)
        estimate = net.score(z, above.expand(1), None)
        z = (torch.sigmoid(-below) / torch.sigmoid(-above)).sqrt() * (z - torch.sigmoid(above).sqrt() * c * estimate)
        z = z + (torch.sigmoid(below) * c).sqrt() * draw(z)
    expected = net.codec.decode(z / torch.sigmoid(-gammas[-1]).sqrt(), gammas[-1], None)
    assert (net(noises(1)) - expected).abs().max() < 1.5 / 255


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samples_are_images_that_two_runs_give_alike_and_that_do_not_depend_on_the_batch(model, sampler):
    net = network(model=model, sampler=sampler)
    together = net(noises())
    assert together.shape == (3, 1, 8, 8) and 0 <= together.min() and together.max() <= 1
    assert torch.equal(together, net(noises()))
    torch.testing.assert_close(net(noises()[1:2]), together[1:2], rtol=0, atol=1.1 / 255)


def test_another_seed_changes_stochastic_samples_alone():
    for sampler, same in (("ancestral", False), ("dpmpp_2m_sde", False), ("ddim", True)):
        one, other = (network(sampler=sampler, seed=seed)(noises()) for seed in (0, 1))
        assert torch.equal(one, other) == same


def test_different_images_get_different_ancestral_noise():
    draw = network()._noise_of_each(noises())
    first, second = draw(noises()), draw(noises())
    assert len({round(value, 4) for value in torch.cat([first, second])[:, 0, 0, 0].tolist()}) == 6


def test_samples_of_the_image_model_are_8_bit_values():
    values = network()(noises()) * 255
    torch.testing.assert_close(values, values.round(), rtol=0, atol=1e-4)


def test_the_papers_model_uses_the_first_numbers_of_the_noise():
    net, noise = network(model="medvdm", sampler="ddim"), noises()
    changed = noise.clone()
    changed[:, :, 4:] += 1  # beyond the first six numbers
    assert torch.equal(net(noise), net(changed)) and not torch.equal(net(noise), net(noise + 1))


def test_the_published_settings_are_those_of_the_network():
    assert network(**network().published | {"num_steps": 3}).sampler == "ancestral"
    assert network().published["num_steps"] == 20_000


# --- settings


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"model": "vae"}, "unknown model 'vae': choose one of image, medvdm"),
        ({"schedule": "cosine"}, "unknown schedule 'cosine': choose one of linear"),
        ({"sampler": "euler"}, "unknown sampler 'euler': choose one of ancestral, dpmpp_2m_sde, ddim"),
        ({"weighting": "p2"}, "unknown weighting 'p2'"),
        ({"detail": "waves"}, "unknown detail 'waves'"),
        ({"num_steps": 0}, r"num_steps \(0\)"),
        ({"num_timesteps": 0}, r"num_timesteps \(0\) must be at least 1"),
        ({"gamma_range": (5, -5)}, "the lower one first"),
        ({"spatial_size": (10, 8)}, "spatial_size must be a multiple of 4"),
        ({"model": "medvdm", "latent_size": 65}, "at most the number of pixels, 64, got 65"),
        ({"model": "medvdm", "weighting": "mixed"}, "give model 'medvdm' weighting 'bound'"),
    ],
)
def test_a_wrong_setting_is_refused_with_what_to_choose(kwargs, message):
    with pytest.raises(ValueError, match=message):
        VariationalDiffusionNet(**{**TINY, **kwargs})


@pytest.mark.parametrize("model", MODELS)
def test_half_precision_weights_load_strictly(model):
    net = network(model=model, schedule="learned_linear")
    state = {name: value.half() for name, value in net.state_dict().items()}
    other = network(model=model, schedule="learned_linear")
    other.load_state_dict(state, strict=True)
    assert other.schedule(torch.ones(1)).item() == pytest.approx(net.schedule(torch.ones(1)).item(), abs=0.05)
