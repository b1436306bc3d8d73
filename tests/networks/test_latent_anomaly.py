from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from monai.inferers import SliceInferer
from monai.networks.layers import GaussianFilter
from torch import nn

from scripts.networks import latent_anomaly
from scripts.networks.healthy_model import blur, evenness
from scripts.networks.latent_anomaly import LatentAnomalyNet, divergence, levels_of
from scripts.samplers import SOLVERS, alphas_cumprod_table, level_grid, noise_image

A = alphas_cumprod_table()
HEALING = [("b", "ddim"), ("c", "ddim"), *(("d", solver) for solver in SOLVERS)]
SIZE = (32, 32)  # of the slices; of the latents 8 x 8
TINY = {
    "spatial_size": SIZE,
    "autoencoder": {"channels": (8, 16), "num_embeddings": 16, "embedding_dim": 4},
    "unet_channels": (32, 32),
    "min_foreground": 0.0,
    "band_levels": 5,
    "start_level": 30,
    "num_steps": 4,
}


def network(**kwargs):
    """A small network with random weights, those included that start at zero, and half of the places above the threshold."""
    torch.manual_seed(0)
    net = LatentAnomalyNet(**{**TINY, **kwargs}).eval()
    with torch.no_grad():
        for part, spread in ((net.unet, 0.05), (net.autoencoder.encoder, 0.08), (net.autoencoder.decoder, 0.08)):
            for parameter in part.parameters():
                parameter.add_(spread * torch.randn_like(parameter))
        net.standardise([{"image": images(16, net.in_channels)}])
        quantiser = net.autoencoder.quantizer.quantizer
        quantiser.embedding.weight.copy_(net.latent_mean.view(1, -1) + net.latent_std.view(1, -1) * torch.randn(16, 4))
        unlike, _ = net.measure(images(channels=net.in_channels))
        net.healthy_places.fill_(unlike.median())
        net.healthy_scores.fill_(unlike.mean())
    return net


def images(count=2, channels=1, seed=0):
    return torch.rand(count, channels, *SIZE, generator=torch.Generator().manual_seed(seed))


def latents(count=2, channels=4, seed=0):
    return torch.randn(count, channels, 8, 8, generator=torch.Generator().manual_seed(seed))


def left_half(count=2):
    mask = torch.zeros(count, 1, 8, 8, dtype=torch.bool)
    mask[..., :4] = True
    return mask


def a(t):
    """``alphas_cumprod`` at levels t, float32, to be multiplied with latents."""
    return A[t].float().view(-1, 1, 1, 1)


def ideal(s):
    """The best noise estimate for latents that are drawn from N(0, s²)."""
    return lambda x, t: x * (1 - a(t)).sqrt() / (a(t) * s**2 + 1 - a(t))


def identity_decoder(net):
    """Let latents be what comes out."""
    net.decode = lambda latent: latent
    return net


def mean_divergence(net, z0, levels):
    """The divergence map of a network, the mean over its levels."""
    return divergence(net.noise, z0, levels, A, net._generator(0), net.settings.max_batch) / len(levels)


def healed(net, z0, mask):
    return net.heal(z0, mask, net._generator(1))


def smooth(net, mask):
    return blur(nn.functional.interpolate(mask.float(), SIZE), net.settings.smoothing)


class Recorder(nn.Module):
    """Keeps what the U-Net is called with, and returns zeros."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x, step):
        self.calls.append((x.detach().clone(), step.clone()))
        return torch.zeros_like(x)


# --- the divergence map


@pytest.mark.parametrize("levels", [[2], [3, 40], [400, 500, 600], [1000]])
def test_the_map_of_a_network_that_knows_the_noise_is_zero(levels):
    net, z0 = network(), latents()
    net.noise = lambda x, t: (x - a(t).sqrt() * z0.repeat(len(x) // len(z0), 1, 1, 1)) / (1 - a(t)).sqrt()
    found = mean_divergence(net, z0, levels)
    assert found.shape == (2, 1, 8, 8) and found.abs().max() < 1e-6


@pytest.mark.parametrize("levels", [[2], [3, 40], [400, 500, 600], [1000, 400]])
def test_the_map_of_an_error_of_the_noise_is_its_closed_form(levels):
    net, z0, error = network(), latents(), latents(seed=1)

    def noise(x, t):
        true = (x - a(t).sqrt() * z0.repeat(len(x) // len(z0), 1, 1, 1)) / (1 - a(t)).sqrt()
        return true + error.repeat(len(x) // len(z0), 1, 1, 1)

    net.noise = noise
    weights = []
    for t in levels:  # Ho et al. 2020, eq. 12, with the variance of the posterior
        alpha = A[t] / A[t - 1]
        variance = (1 - alpha) * (1 - A[t - 1]) / (1 - A[t])
        weights.append((1 - alpha) ** 2 / (2 * variance * alpha * (1 - A[t])))
    expected = sum(weights).item() / len(levels) * (error**2).sum(dim=1, keepdim=True)
    torch.testing.assert_close(
        mean_divergence(net, z0, levels), expected, rtol=0.01 if min(levels) < 400 else 1e-3, atol=1e-5
    )


def test_the_map_is_weighted_before_it_is_smoothed():
    settings, image = {"texture_offset": 0.1, "band": (300, 400), "band_levels": 2}, images()
    net, smoothed = network(**settings), network(**settings, divergence_smoothing=0.8)
    weight = nn.functional.avg_pool2d(evenness(image, 0.1), 4)
    weighted = mean_divergence(net, net.encode(image), [300, 400]) * weight
    torch.testing.assert_close(net.measure(image)[0], weighted)
    torch.testing.assert_close(smoothed.measure(image)[0], GaussianFilter(2, sigma=0.8)(weighted))


def test_a_place_is_the_less_unlike_the_more_uneven_it_is():
    net, image = network(texture_offset=0.1), images()
    image[..., :18] = 0.4
    found = mean_divergence(net, net.encode(image), levels_of(net.settings.band, net.settings.band_levels))
    expected = found * nn.functional.avg_pool2d(evenness(image, 0.1), 4)
    torch.testing.assert_close(net.measure(image)[0], expected)
    ratio = expected / found
    torch.testing.assert_close(ratio[..., :4], torch.ones(2, 1, 8, 4))  # the even half
    assert (ratio[..., 6:] < 0.4).all()
    torch.testing.assert_close(net.measure(image)[1], expected.flatten(1).amax(dim=1))


def test_the_map_is_the_mean_over_its_levels():
    net, z0 = network(), latents()
    net.noise = lambda x, t: torch.sin(x) * a(t)
    noise = torch.randn(3, 4, 8, 8, generator=net._generator(0))
    single = []
    for t, eps in zip([400, 500, 600], noise, strict=True):
        error = net.noise(noise_image(z0, eps, a(t)), torch.tensor([t])) - eps
        alpha = A[t] / A[t - 1]
        weight = (1 - alpha) * (1 - A[t]) / (2 * (1 - A[t - 1]) * alpha * (1 - A[t]))
        single.append(weight.float() * (error**2).sum(dim=1, keepdim=True))
    torch.testing.assert_close(
        mean_divergence(net, z0, [400, 500, 600]), torch.stack(single).mean(dim=0), rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("max_batch", [1, 3, 4, 7, 10, 1000])
def test_the_map_does_not_depend_on_how_many_latents_the_unet_takes_at_once(max_batch):
    net, levels = network(), [400, 450, 500, 550, 600]
    found = mean_divergence(net.with_settings(max_batch=max_batch), latents(), levels)
    torch.testing.assert_close(found, mean_divergence(net, latents(), levels), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("max_batch", "calls"), [(1, [1] * 5), (2, [2, 2, 1]), (4, [4, 1]), (5, [5]), (256, [5])])
def test_max_batch_says_how_many_latents_the_unet_takes_at_once(max_batch, calls):
    net = network(max_batch=max_batch)
    net.unet = Recorder()
    mean_divergence(net, latents(1), [400, 450, 500, 550, 600])
    assert [len(x) for x, _ in net.unet.calls] == calls
    assert torch.cat([step for _, step in net.unet.calls]).tolist() == [399, 449, 499, 549, 599]  # the U-Net's count from 0


def test_the_band_has_the_asked_number_of_levels_from_its_first_to_its_last():
    levels = levels_of((400, 600), 50)
    steps = [u - t for t, u in pairwise(levels)]
    assert len(levels) == 50 and levels[0] == 400 and levels[-1] == 600 and set(steps) <= {4, 5}
    assert levels_of((1, 1000), 3) == [2, 501, 1000]  # level 1 has no width
    assert torch.isfinite(network(band=(1, 1)).measure(images())[0]).all()


def test_each_level_of_the_map_has_noise_of_its_own_and_every_slice_the_same():
    net = network()
    net.unet = Recorder()
    z0 = latents(1).expand(3, -1, -1, -1)
    mean_divergence(net, z0, [500, 500])
    ((x, _),) = net.unet.calls
    assert torch.equal(x[0], x[1]) and torch.equal(x[3], x[5]) and not torch.allclose(x[0], x[3], atol=0.1)


# --- healing


@pytest.mark.parametrize(("variant", "solver"), HEALING)
def test_an_empty_mask_gives_the_decoded_original_and_a_full_one_does_not(variant, solver):
    net, image = network(variant=variant, solver=solver), images()
    latent = net.encode(image)
    original = net.decode(latent)
    assert torch.equal(healed(net, latent, torch.zeros_like(left_half())), original)
    assert (healed(net, latent, torch.ones_like(left_half())) - original).abs().mean() > 0.005


@pytest.mark.parametrize(("variant", "solver"), HEALING)
def test_outside_the_mask_the_healed_latents_are_exactly_the_original(variant, solver):
    net, z0, mask = network(variant=variant, solver=solver), latents(), left_half()
    found = healed(identity_decoder(net), z0, mask)
    assert torch.equal(found[..., 4:], z0[..., 4:])
    assert ((found - z0)[..., :4].abs() > 1e-3).float().mean() > 0.95


@pytest.mark.parametrize("variant", ["c", "d"])
def test_outside_the_mask_every_step_sees_the_original_noised_to_its_level(variant):
    net, z0 = identity_decoder(network(variant=variant, start_level=300, num_steps=3)), latents()
    net.unet = Recorder()
    healed(net, z0, left_half())
    levels = [300, 200, 100] if variant == "d" else list(range(300, 0, -1))
    assert [step.tolist() for _, step in net.unet.calls] == [[t - 1] * 2 for t in levels]
    noise = [(x - a(t).sqrt() * z0)[..., 4:] / (1 - a(t)).sqrt() for t, (x, _) in zip(levels, net.unet.calls, strict=True)]
    first = net._draw(z0, net._generator(1))[..., 4:]
    torch.testing.assert_close(noise[0], first, atol=1e-4, rtol=1e-4)
    for one, other in pairwise(noise):
        if variant == "d":  # deterministic steps keep the noise
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
        else:
            assert abs(torch.corrcoef(torch.stack([one[0].flatten(), other[0].flatten()]))[0, 1]) < 0.5


@pytest.mark.parametrize("s", [1.0, 0.5])
@pytest.mark.parametrize("solver", SOLVERS)
def test_healing_everything_in_many_steps_is_the_exact_map_of_the_diffusion_ode(solver, s):
    net, z0 = identity_decoder(network(solver=solver, start_level=500, num_steps=500)), latents()
    net.noise = ideal(s)
    start = noise_image(z0, net._draw(z0, net._generator(1)), a(500))
    expected = start * s / (a(500) * s**2 + 1 - a(500)).sqrt()
    assert (healed(net, z0, torch.ones_like(left_half())) - expected).norm() / expected.norm() < (
        0.01 if solver == "ddim" else 1e-3
    )


@pytest.mark.parametrize("s", [1.0, 0.5])
def test_stochastic_healing_draws_latents_with_the_right_spread(s):
    z0 = latents(1, channels=64)
    net = identity_decoder(network(variant="c", start_level=500))
    net.noise = ideal(s)
    start = noise_image(z0, net._draw(z0, net._generator(1)), a(500))
    found = healed(net, z0, torch.ones_like(left_half(1)))
    # each step draws from the posterior of N(0, s²), in which the start is forgotten but for its correlation
    correlation = a(500).sqrt() * s / (a(500) * s**2 + 1 - a(500)).sqrt()
    spread = (correlation**2 * start.var() * s**2 / (a(500) * s**2 + 1 - a(500)) + s**2 * (1 - correlation**2)).sqrt()
    assert found.std().item() == pytest.approx(spread.item(), rel=0.03)


def test_another_seed_heals_otherwise_and_the_same_seed_the_same():
    image, mask = images(), left_half()
    for variant in ("c", "d"):
        nets = [network(variant=variant, seed=seed) for seed in (0, 0, 1)]
        first, again, other = (healed(net, net.encode(image), mask) for net in nets)
        assert torch.equal(first, again) and (first - other).abs().mean() > 0.002


# --- the variants


def test_variant_a_heals_everything_whatever_the_mask():
    net, image = network(variant="a"), images()
    first = net(image)
    net.healthy_places.fill_(1e9)  # nothing is unlike any more
    assert torch.equal(net(image), first)
    assert torch.equal(first[:, 1:2], healed(net, net.encode(image), torch.ones_like(left_half())))
    torch.testing.assert_close(first[:, :1], (image - first[:, 1:2]).abs())


def test_variant_c_is_variant_b_times_the_smoothed_mask():
    b, c, image = network(variant="b"), network(variant="c"), images()
    mask = c.measure(image)[0] > c.healthy_places[0]
    assert 0.2 < mask.float().mean() < 0.8
    torch.testing.assert_close(c(image)[:, :1], b(image)[:, :1] * smooth(c, mask))
    assert torch.equal(c(image)[:, 1:], b(image)[:, 1:])
    torch.testing.assert_close(b(image)[:, :1], (image - healed(b, b.encode(image), mask)).abs())


def test_variant_d_is_deterministic_healing_within_the_smoothed_mask():
    net, image = network(variant="d"), images()
    mask = net.measure(image)[0] > net.healthy_places[0]
    found = healed(net, net.encode(image), mask)
    output = net(image)
    assert torch.equal(output[:, 1:2], found)
    torch.testing.assert_close(output[:, :1], (image - found).abs() * smooth(net, mask))


def test_the_published_settings_are_settings_of_the_network():
    net = network()
    published = network(**net.published)
    assert (
        published.settings.variant == "c"
        and published.settings.band_levels == 50
        and published(images()).shape == (2, 3, *SIZE)
    )


# --- the score


@pytest.mark.parametrize("score", ["max", "mean"])
def test_the_score_is_of_the_map_if_it_has_no_band_of_its_own(score):
    net, image = network(score=score), images()
    unlike = net.measure(image)[0].flatten(1)
    torch.testing.assert_close(net.measure(image)[1], unlike.amax(dim=1) if score == "max" else unlike.mean(dim=1))


@pytest.mark.parametrize("score", ["max", "mean"])
def test_the_score_is_of_the_band_of_its_own_everywhere(score):
    image = images(20)
    net, other = network(score=score, score_band=(700, 900)), network(score=score, band=(700, 900))
    torch.testing.assert_close(net.measure(image)[1], other.measure(image)[1])
    assert not torch.allclose(net.measure(image)[1], network(score=score).measure(image)[1], rtol=1e-3)
    assert torch.equal(net.measure(image)[0], network().measure(image)[0])
    net.calibrate([{"image": image}])
    other.calibrate([{"image": image}])
    torch.testing.assert_close(net.healthy_scores, other.healthy_scores)
    assert not torch.allclose(net.healthy_places, other.healthy_places, rtol=1e-3)
    healthy = net.healthy_scores[1950]
    torch.testing.assert_close(net(image)[:, -1, 0, 0], net.measure(image)[1] / (net.measure(image)[1] + healthy))


@pytest.mark.parametrize("settings", [{}, {"healings": 2}, {"texture_offset": 0.1, "score_band": (700, 900)}])
def test_inference_and_calibration_encode_a_slice_once(settings):
    net, calls = network(**settings), []
    encode = net.autoencoder.encode
    net.autoencoder.encode = lambda image: calls.append(len(image)) or encode(image)
    net(images(2))
    net.calibrate([{"image": images(3)}])
    assert calls == [2, 3]


@pytest.mark.parametrize("score_band", [None, (700, 900)])
def test_calibration_and_inference_compute_each_map_once(score_band, monkeypatch):
    net, calls = network(score_band=score_band), []
    monkeypatch.setattr(latent_anomaly, "divergence", lambda *args: calls.append(args[2]) or divergence(*args))
    net.calibrate([{"image": images(4)}])
    net(images())
    assert len(calls) == (2 if score_band is None else 4)


def test_after_calibration_a_small_share_of_the_healthy_places_is_unlike():
    net, image = network(), images(40)
    net.calibrate([{"image": part} for part in image.split(16)])
    share = (net.measure(image)[0] > net.calibration.threshold(net.settings)).float().mean()
    assert share.item() == pytest.approx(0.025, abs=0.002)
    order = net.measure(image)[1].argsort()
    abnormality = net(image)[order, -1, 0, 0]
    assert abnormality[38].item() == pytest.approx(0.5, abs=1e-4) and abnormality[0] < 0.5 < abnormality[39]  # 0.975 · 39


# --- where it runs


@pytest.mark.parametrize("variant", ["a", "b", "c", "d"])
def test_the_result_of_a_slice_does_not_depend_on_its_batch(variant):
    net, image = network(variant=variant, in_channels=2), images(3, channels=2)
    torch.testing.assert_close(
        net.measure(image)[0], torch.cat([net.measure(one[None])[0] for one in image]), rtol=1e-4, atol=1e-5
    )
    net, mask = identity_decoder(net), left_half(3)  # a rounding error may choose another entry of the codebook
    single = torch.cat([healed(net, net.encode(one[None]), mask[:1]) for one in image])
    torch.testing.assert_close(healed(net, net.encode(image), mask), single, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(healed(net, net.encode(image.flip(0)), mask), single.flip(0), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("variant", ["a", "b", "c", "d"])
def test_two_runs_give_the_same_bytes_whatever_the_global_state(variant):
    net, image = network(variant=variant), images()
    torch.manual_seed(1)
    first = net(image)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert torch.equal(net(image), first) and torch.equal(torch.get_rng_state(), before)


def test_a_volume_gives_the_same_as_its_slices():
    net = network(min_foreground=0.05)
    volumes = images(6).unflatten(0, (2, 3)).movedim(1, -1).contiguous()
    volumes[..., 1] = 0
    slices = torch.stack([net(volumes[..., i]) for i in range(3)], dim=-1)
    assert slices.shape == (2, 3, *SIZE, 3) and not slices[..., 1].any() and slices[..., 2].any()
    torch.testing.assert_close(net(volumes), slices, atol=1e-4, rtol=1e-3)
    with torch.no_grad():
        inferred = SliceInferer(roi_size=SIZE, spatial_dim=2, sw_batch_size=4)(volumes, net)
    torch.testing.assert_close(inferred, slices, atol=1e-4, rtol=1e-3)


def test_a_batch_of_empty_slices_needs_no_network():
    net = network(min_foreground=0.05)
    net.unet = net.autoencoder = None
    assert torch.equal(net(torch.zeros(3, 1, *SIZE)), torch.zeros(3, 3, *SIZE))


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_no_gradient_is_recorded_whatever_the_caller_does(guard):
    net, image = network(), images()
    expected = net(image)
    with guard():
        output, score = net(image), net.measure(image)[1]
    assert torch.equal(output, expected) and not output.requires_grad and not score.requires_grad


def test_bfloat16_networks_stay_close_to_float32():
    exact, rough, image = network(), network(amp=True), images()
    assert rough.measure(image)[0].dtype == torch.float32
    torch.testing.assert_close(rough.measure(image)[0], exact.measure(image)[0], rtol=0.2, atol=0.01)
    assert not torch.equal(rough.measure(image)[0], exact.measure(image)[0])


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (2, 1, 32, 48), (1, 32, 32), (1, 1, 16, 32, 5)])
def test_slices_of_another_shape_are_refused_with_the_expected_one(shape):
    with pytest.raises(ValueError, match=r"expected slices of shape \(1, 32, 32\), got"):
        network()(torch.zeros(shape))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"variant": "e"}, "unknown variant 'e': choose one of a, b, c, d"),
        ({"variant": "cd"}, "unknown variant 'cd'"),
        ({"solver": "euler"}, "unknown solver 'euler': choose one of ddim, heun, multistep, dpmpp_2m"),
        ({"band": (0, 600)}, r"must lie in 1 \.\.\. 1000"),
        ({"band": (400, 1001)}, r"must lie in 1 \.\.\. 1000"),
        ({"score_band": (0, 600)}, r"must lie in 1 \.\.\. 1000"),
        ({"start_level": 0}, r"must lie in 1 \.\.\. 1000"),
        ({"start_level": 61, "band": (10, 60), "num_levels": 60}, r"must lie in 1 \.\.\. 60"),
        ({"schedule": "sigmoid"}, "unknown schedule 'sigmoid'"),
        ({"score": "median"}, "unknown score 'median'"),
    ],
)
def test_impossible_settings_are_refused(settings, text):
    with pytest.raises(ValueError, match=text):
        LatentAnomalyNet(**{**TINY, **settings})


# --- weights and drawing


def test_the_weights_carry_everything_in_full_and_in_half_precision():
    net, image = network(), images(20)
    net.calibrate([{"image": image}])
    expected = net.measure(image)[0]
    state = net.state_dict()
    assert {"latent_mean", "latent_std", "healthy_places", "healthy_scores"} <= set(state) and "alphas_cumprod" not in state
    full, half = LatentAnomalyNet(**TINY).eval(), LatentAnomalyNet(**TINY).eval()
    full.load_state_dict(state, strict=True)
    assert torch.equal(full(image), net(image))
    half.load_state_dict({k: v.half() if v.is_floating_point() else v for k, v in state.items()}, strict=True)
    assert all(v.dtype == torch.float32 for v in half.state_dict().values() if v.is_floating_point())
    torch.testing.assert_close(half.healthy_places, net.healthy_places, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(half.healthy_scores, net.healthy_scores, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(half.measure(image)[0], expected, rtol=0.1, atol=0.01)


def test_drawn_slices_are_grey_levels_and_differ_from_each_other():
    net = network()
    slices = net.draw(3, num_steps=5)
    assert slices.shape == (3, 1, *SIZE) and 0 <= slices.min() and slices.max() <= 1 and not slices.requires_grad
    assert torch.equal(net.draw(3, num_steps=5), slices)
    assert (slices[0] - slices[1]).abs().mean() > 0.005


def test_drawing_is_the_exact_map_from_noise_alone():
    net = network()
    net.noise, net.decode = ideal(0.2), lambda latent: latent + 0.5
    noise = torch.randn(3, 4, 8, 8, generator=net._generator(0))
    expected = noise * 0.2 / (a(1000) * 0.2**2 + 1 - a(1000)).sqrt() + 0.5
    torch.testing.assert_close(net.draw(3, num_steps=300), expected.clamp(0, 1), atol=2e-3, rtol=0)
    assert level_grid(1000, 300)[-1] == 1000


# --- training


def losses(net, count=4, seed=0):
    return net.losses(images(count), torch.zeros(count, dtype=torch.long), torch.Generator().manual_seed(seed))


def test_standardised_latents_have_mean_0_and_standard_deviation_1():
    torch.manual_seed(0)
    net, image = LatentAnomalyNet(**TINY).eval(), images(12)
    tokens = net.autoencoder.tokens(net.autoencoder.encode(image))
    restored = net.decode(net.encode(image))
    net.standardise({"image": part} for part in image.split(5))
    latent = net.encode(image)
    torch.testing.assert_close(latent.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(latent.std(dim=(0, 2, 3)), torch.ones(4), atol=1e-5, rtol=0)
    assert net.latent_mean.any() and not torch.allclose(net.latent_std, torch.ones(1))
    assert torch.equal(net.autoencoder.tokens(net.autoencoder.encode(image)), tokens)
    torch.testing.assert_close(net.decode(latent), restored)  # what the autoencoder does stays the same


def test_standardising_twice_is_standardising_once():
    net = network()
    before = net.latent_mean.clone(), net.latent_std.clone()
    net.standardise([{"image": images(16)}])
    torch.testing.assert_close((net.latent_mean, net.latent_std), before)


def test_the_loss_trains_the_unet_and_nothing_else_and_falls():
    net = network().train()
    before = {k: v.clone() for k, v in net.state_dict().items() if not k.startswith("unet.")}
    value = losses(net)["noise"]
    value.backward()
    for name, parameter in net.named_parameters():
        assert (parameter.grad is not None) == name.startswith("unet."), name
    assert sum(bool(p.grad.any()) for p in net.unet.parameters()) > 0.9 * len(list(net.unet.parameters()))
    held_out = [losses(net, seed=1000 + i)["noise"].item() for i in range(3)]
    optimizer = torch.optim.Adam(net.unet.parameters(), lr=2e-3)
    for seed in range(30):
        optimizer.zero_grad()
        losses(net, seed=seed)["noise"].backward()
        optimizer.step()
    assert sum(losses(net, seed=1000 + i)["noise"].item() for i in range(3)) < 0.8 * sum(held_out)
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())


def test_the_loss_depends_on_the_generator_only():
    net = network().train()
    torch.manual_seed(1)
    first = losses(net)["noise"]
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert torch.equal(losses(net)["noise"], first) and torch.equal(torch.get_rng_state(), before)
    assert losses(net, seed=1)["noise"] != first


def test_an_estimate_of_zero_costs_1_and_the_ideal_one_less():
    net = network()
    net.unet = Recorder()
    zero = losses(net, 64)["noise"].item()
    net.noise = ideal(1.0)
    assert zero == pytest.approx(1, abs=0.03) and losses(net, 64)["noise"] < 0.7 * zero


@pytest.mark.parametrize("power", [1.0, 1.5])
def test_the_unet_sees_noised_latents_at_levels_that_cover_the_schedule(power):
    net = network(level_power=power)
    net.unet = Recorder()
    losses(net, 2000)
    ((x, step),) = net.unet.calls
    assert 0 <= step.min() < 10 and 990 < step.max() <= 999
    assert (step < 500).float().mean().item() == pytest.approx(0.5 ** (1 / power), abs=0.04)
    assert x.var().item() == pytest.approx(1, abs=0.03)  # standardised latents stay so at every level


# --- smoothing and the table's variants


def test_the_divergence_is_smoothed_if_asked():
    plain, smoothed = (network(divergence_smoothing=smoothing).measure(images())[0] for smoothing in (0.0, 0.8))
    torch.testing.assert_close(smoothed, GaussianFilter(2, sigma=0.8)(plain))


def test_the_variants_of_a_table_share_the_weights_and_the_published_one_has_thresholds_of_its_own():
    net = network(band=(150, 350), divergence_smoothing=0.6, texture_offset=0.1, percentile=99.0, healings=2)
    net.calibrate([{"image": images(4)}])
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    found = net.variants(["a", "b", "c", "d", "published"], [{"image": images(4)}])
    assert {name: v.settings.variant for name, v in found.items()} == {
        **{name: name for name in "abcd"},
        "published": "c",
    }
    assert all(v.unet is net.unet for v in found.values())
    assert torch.equal(found["d"](images()), net(images()))
    assert all(torch.equal(found[name].healthy_places, net.healthy_places) for name in "abcd")
    assert all(torch.equal(buffer, before[name]) for name, buffer in net.named_buffers())
    published, alone = found["published"], network(**{**net.published, "max_batch": 256})
    alone.calibrate([{"image": images(4)}])
    assert published.settings.max_batch == net.settings.max_batch and not torch.equal(
        published.healthy_places, net.healthy_places
    )
    torch.testing.assert_close(published.healthy_places, alone.healthy_places)
    # 500 steps would take long
    torch.testing.assert_close(*(one.with_settings(start_level=20)(images()) for one in (published, alone)))


def test_drawn_slices_depend_on_the_seed_alone_and_lie_between_0_and_1():
    first, again, other = (network(seed=seed).draw(2, num_steps=3) for seed in (0, 0, 1))
    assert first.shape == (2, 1, *SIZE) and first.min() >= 0 and first.max() <= 1
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_the_autoencoder_and_nothing_else_is_taken_from_the_weights(tmp_path):
    source, net = network(), LatentAnomalyNet(**TINY)
    unet = {name: value.clone() for name, value in net.unet.state_dict().items()}
    torch.save(source.state_dict(), tmp_path / "model.pt")
    net.autoencoder.load_from(tmp_path / "model.pt")
    taken = net.autoencoder.state_dict()
    assert all(torch.equal(value, taken[name]) for name, value in source.autoencoder.state_dict().items())
    assert all(torch.equal(value, unet[name]) for name, value in net.unet.state_dict().items())
    assert not net.healthy_places.any() and not net.latent_mean.any()


@pytest.mark.parametrize(
    "change",
    [
        {"band": [150, 350]},
        {"band_levels": 6},
        {"divergence_smoothing": 1.0},
        {"texture_offset": 0.1},
        {"score": "mean"},
        {"score_band": [700, 900]},
    ],
)
def test_quantiles_of_another_divergence_are_refused_and_named(change):
    ((name, value),) = change.items()
    measured = LatentAnomalyNet(**TINY).settings
    shipped = {key: getattr(measured, key) for key in measured.measured}
    net = LatentAnomalyNet(**TINY | change, calibrated_for=shipped).eval()
    told = f"measured with {name} {shipped[name]}, not {tuple(value) if isinstance(value, list) else value}: "
    with pytest.raises(ValueError) as error:
        net(images())
    assert told in str(error.value) and "--recalibrate True" in str(error.value)
    net.calibrate([{"image": images()}])
    assert net(images()).any()


def test_settings_of_the_healing_need_no_other_quantiles():
    net = network(calibrated_for={"band": [400, 600], "score_band": None})
    changes = {"variant": "c", "start_level": 3, "num_steps": 2, "solver": "heun", "percentile": 60, "max_batch": 3}
    assert net.with_settings(**changes)(images()).any()
    with pytest.raises(ValueError, match=r"must lie in 1 \.\.\. 1000"):
        net.with_settings(start_level=1001)
