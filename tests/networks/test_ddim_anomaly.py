from __future__ import annotations

import math

import pytest
import torch
from monai.inferers import SliceInferer
from monai.networks.layers import GaussianFilter
from torch import nn

from scripts.networks.anomaly_baselines import BrightNet
from scripts.networks.ddim_anomaly import DISEASED, HEALTHY, DDIMAnomalyNet
from scripts.samplers import SOLVERS, alphas_cumprod_table

A = alphas_cumprod_table()
S = 0.25  # spread of the grey levels that the ideal U-Net knows
SMALL = {"spatial_size": (32, 32), "channels": (16, 32), "classifier_channels": (32, 32)}


class IdealUNet(nn.Module):
    """The best noise estimate, or velocity, for images in [-1, 1] whose pixels are drawn from N(0, S²)."""

    def __init__(self, prediction_type="epsilon"):
        super().__init__()
        self.prediction_type = prediction_type

    def forward(self, x, step):
        a = A[step + 1].to(x.dtype).view(-1, 1, 1, 1)
        variance = a * S**2 + 1 - a
        noise, x0 = x * (1 - a).sqrt() / variance, x * a.sqrt() * S**2 / variance
        velocity = a.sqrt() * noise - (1 - a).sqrt() * x0
        return torch.cat([noise if self.prediction_type == "epsilon" else velocity, torch.zeros_like(x)], dim=1)


class Brightness(nn.Module):
    """A classifier to which brightness is disease."""

    scale = 10.0

    def forward(self, x, step):
        disease = self.scale * x.flatten(1).mean(dim=1)
        return torch.stack([torch.zeros_like(disease), disease], dim=1)  # HEALTHY, DISEASED


class Recorder(nn.Module):
    """Keeps what a sub-network is called with, and returns zeros."""

    def __init__(self, out_channels=None):
        super().__init__()
        self.out_channels, self.calls = out_channels, []

    def forward(self, x, step):
        self.calls.append((x.detach().clone(), step.clone()))
        zero = 0 * x.flatten(1).sum(dim=1)  # with a gradient, which is zero too
        return x.new_zeros(len(x), self.out_channels, *x.shape[2:]) if self.out_channels else torch.stack([zero] * 2, 1)


def network(in_channels=1, **kwargs):
    """A small network with random weights, those included that start at zero."""
    torch.manual_seed(0)
    kwargs = {"noise_level": 300, "num_steps": 3, "guidance_steps": 1, "min_foreground": 0.0, **kwargs}
    net = DDIMAnomalyNet(
        in_channels=in_channels, spatial_size=(32, 32), channels=(16, 32), classifier_channels=(32, 32), **kwargs
    )
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))  # the same however they are stored
    return net.eval()


def closed_form(in_channels=1, **kwargs):
    net = network(in_channels, **{"gradient_scale": 20.0, "smoothing": 0.0, **kwargs})
    net.unet, net.classifier = IdealUNet(net.prediction_type), Brightness()
    return net


def images(count=2, channels=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (0.5 + S / 2 * torch.randn(count, channels, 32, 32, generator=generator)).clamp(0, 1)


# --- what comes out


@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize("mode", ["ddim", "ddpm"])
def test_the_channels_are_the_map_the_healthy_sequences_and_the_probability(in_channels, mode):
    net, image = closed_form(in_channels, mode=mode), images(channels=in_channels)
    output = net(image)
    assert output.shape == (2, in_channels + 2, 32, 32)
    healthy = net.decode(net.encode(image))
    torch.testing.assert_close(output[:, 1:-1], healthy)
    torch.testing.assert_close(output[:, :1], (image - healthy).abs().sum(dim=1, keepdim=True))
    probability = torch.sigmoid(Brightness.scale * (2 * image - 1).flatten(1).mean(dim=1))
    torch.testing.assert_close(output[:, -1], probability.view(-1, 1, 1).expand(-1, 32, 32))


def test_smoothing_filters_the_map_and_nothing_else():
    image = images()
    plain, smooth = closed_form()(image), closed_form(smoothing=1.5)(image)
    torch.testing.assert_close(smooth[:, :1], GaussianFilter(2, sigma=1.5)(plain[:, :1]))
    assert torch.equal(smooth[:, 1:], plain[:, 1:])


def test_the_map_weighs_sequences_and_what_is_darker_as_asked():
    net = network(in_channels=2, map_weights=(0.5, 2.0), darker_weight=0.25)
    image, healthy = images(channels=2), images(channels=2, seed=1)
    brighter, darker = (image - healthy).clamp(min=0), (healthy - image).clamp(min=0)
    weighed = brighter + 0.25 * darker
    torch.testing.assert_close(net.anomaly_map(image, healthy), 0.5 * weighed[:, :1] + 2 * weighed[:, 1:])
    with pytest.raises(ValueError, match="one for each sequence"):
        network(in_channels=2, map_weights=(1.0,))


def test_what_is_brighter_than_the_median_in_one_sequence_and_not_in_another_is_added_to_the_map():
    settings = {"in_channels": 2, "map_weights": (0.0, 1.0), "gradient_scale": 20.0, "smoothing": 1.0}
    image, weights = images(channels=2), (-1.5, 1.0)
    plain, more = (network(**settings, brightness_weights=given)(image) for given in (None, weights))
    above = (image - 0.4).clamp(min=0)
    brightness = GaussianFilter(2, sigma=1.0)(above[:, 1:] - 1.5 * above[:, :1]).clamp(min=0)
    torch.testing.assert_close(more[:, :1], plain[:, :1] + brightness)
    assert torch.equal(more[:, 1:], plain[:, 1:])
    control = BrightNet(**SMALL, in_channels=2, brightness_weights=weights, smoothing=1.0, min_foreground=0.0).eval()
    torch.testing.assert_close(control(image)[:, :1], brightness)
    assert torch.equal(control(image)[:, 1:3], image)
    with pytest.raises(ValueError, match="brightness_weights must be 2 numbers"):
        network(in_channels=2, brightness_weights=(1.0,))


def test_the_gate_weighs_the_map_of_a_slice_by_its_probability_of_disease():
    net, image = network(), images()
    plain = net(image)
    net.gate = True
    gated = net(image)
    torch.testing.assert_close(gated[:, :1], plain[:, :1] * plain[:, -1:])
    assert torch.equal(gated[:, 1:], plain[:, 1:])


@pytest.mark.parametrize("fold", [1, 4])
def test_folding_changes_the_cost_and_not_the_result_of_a_network_without_neighbours(fold):
    image = images(channels=2)
    torch.testing.assert_close(closed_form(2, fold=fold)(image), closed_form(2, fold=2)(image))


@pytest.mark.parametrize("empty", [[0], [1, 2], [3]])
@pytest.mark.parametrize("mode", ["ddim", "ddpm"])
def test_empty_slices_give_zero_and_do_not_touch_the_others(empty, mode):
    net, image = network(min_foreground=0.05, mode=mode), images(4)
    image[empty] = 0
    image[empty, :, :4, :10] = 1  # 4 % of the pixels
    full = [i for i in range(4) if i not in empty]
    output = net(image)
    assert not output[empty].any()
    torch.testing.assert_close(output[full], net(image[full]), atol=1e-5, rtol=1e-4)


def test_a_batch_of_empty_slices_needs_no_network():
    net = network(min_foreground=0.05)
    net.unet = net.classifier = None
    assert torch.equal(net(torch.zeros(3, 1, 32, 32)), torch.zeros(3, 3, 32, 32))


@pytest.mark.parametrize("mode", ["ddim", "ddpm"])
@pytest.mark.parametrize("guidance_steps", [0, 1])
def test_the_result_of_a_slice_does_not_depend_on_its_batch(mode, guidance_steps):
    net, image = network(2, mode=mode, guidance_steps=guidance_steps), images(3, channels=2)
    single = torch.cat([net(one[None]) for one in image])
    torch.testing.assert_close(net(image), single, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(net(image.flip(0)), single.flip(0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mode", ["ddim", "ddpm"])
def test_two_runs_give_the_same_bytes_whatever_the_global_state(mode):
    net, image = network(mode=mode), images()
    torch.manual_seed(1)
    first = net(image)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert torch.equal(net(image), first)
    assert torch.equal(torch.get_rng_state(), before)


def test_another_seed_draws_another_ddpm_sample_and_no_other_ddim_result():
    image = images()
    samples = [network(mode="ddpm", seed=seed)(image) for seed in (0, 1)]
    assert not torch.allclose(samples[0][:, :2], samples[1][:, :2], atol=1e-2)
    assert torch.equal(network(seed=0)(image), network(seed=1)(image))


def test_ddpm_noises_with_other_draws_than_it_denoises_with():
    net = closed_form(mode="ddpm", noise_level=1000)
    generators = [net._generator(stream) for stream in (0, 1)]
    first, second = (net._draw(images(1), generator) for generator in generators)
    assert abs(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]) < 0.15


# --- the way of the guidance


@pytest.mark.parametrize("mode", ["ddim", "ddpm"])
@pytest.mark.parametrize("guidance_steps", [0, 4])
@pytest.mark.parametrize("solver", SOLVERS)
def test_if_brightness_is_disease_guidance_to_healthy_darkens_and_to_diseased_brightens(mode, guidance_steps, solver):
    net = closed_form(mode=mode, guidance_steps=guidance_steps, solver=solver, num_steps=10)
    x = net.encode(images())
    net.gradient_scale = 0.0
    unguided = net.decode(x)
    net.gradient_scale = 20.0
    assert (net.decode(x, HEALTHY) < unguided - 1e-3).all()
    assert (net.decode(x, DISEASED) > unguided + 1e-3).all()
    assert torch.equal(net(images())[:, 1:2], net.decode(x, HEALTHY))


@pytest.mark.parametrize("guidance_steps", [0, 4])
def test_guidance_with_learned_networks_changes_the_probability_as_asked(guidance_steps):
    net = network(num_steps=10, guidance_steps=guidance_steps, noise_level=100)
    x = net.encode(images())
    net.gradient_scale = 10.0
    healthy, diseased = (net.probability(net.decode(x, target)) for target in (HEALTHY, DISEASED))
    assert (healthy < diseased - 1e-3).all()


@pytest.mark.parametrize("t", [1, 150, 1000])
@pytest.mark.parametrize("target", [HEALTHY, DISEASED])
def test_the_guided_noise_is_the_noise_minus_the_scaled_gradient(t, target):
    net, x = closed_form(2), 2 * images(channels=2) - 1
    diseased = torch.sigmoid(Brightness.scale * x.flatten(1).mean(dim=1))
    slope = -diseased if target == HEALTHY else 1 - diseased
    gradient = (slope * Brightness.scale / x[0].numel()).view(-1, 1, 1, 1).expand_as(x)
    torch.testing.assert_close(net.gradient(x, t, target), gradient)
    expected = net.noise(x, t) - 20 * math.sqrt(1 - A[t]) * gradient
    torch.testing.assert_close(net.estimate(x, t, target)[0], expected)


def test_the_gradient_of_a_slice_is_its_own():
    net, x = network(), 2 * images(3) - 1
    torch.testing.assert_close(net.gradient(x, 100)[1:2], net.gradient(x[1:2], 100), atol=1e-6, rtol=1e-4)
    assert not net.gradient(x, 100).requires_grad and all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("guidance_steps", [1, 4])
def test_split_guidance_adds_up_to_its_closed_form_where_the_gradient_is_constant(guidance_steps, monkeypatch):
    net = closed_form(guidance_steps=guidance_steps)
    monkeypatch.setattr(net, "gradient", lambda x, t, target: torch.full_like(x, 0.01))
    x = torch.zeros(1, 1, 32, 32)
    for t in range(300, 0, -30):
        x = net.guide(x, t, t - 30)
    # the integral of s·tan(angle)·gradient from the clean image up to level 300
    torch.testing.assert_close(x, torch.full_like(x, 20 * 0.01 * -0.5 * math.log(A[300])), atol=0, rtol=0.005)


@pytest.mark.parametrize("mode", ["ddim", "ddpm"])
@pytest.mark.parametrize("guidance_steps", [0, 1, 4])
def test_guidance_moves_gaussian_grey_levels_by_what_a_linear_classifier_says(mode, guidance_steps):
    # pixels x_0 of N(0, S²) and log p(healthy | x_0) = weight·x_0 + a constant: all densities are Gaussian
    weight, a = 5.0, A[300].item()
    variance = a * S**2 + 1 - a  # of x_300

    def gradient(x, t, target):
        return torch.full_like(x, weight * A[t].item() ** 0.5 * S**2 / (A[t].item() * S**2 + 1 - A[t].item()))

    decoded = []
    for scale in (1.0, 0.0):
        net = closed_form(mode=mode, guidance_steps=guidance_steps, gradient_scale=scale, num_steps=300, solver="heun")
        net.gradient = gradient
        decoded.append(2 * net.decode(images()) - 1)
    moved = {
        "ddpm": weight * S**2 * (1 - a) / variance,  # weight times the variance of x_0 given x_300
        "ddim": weight * S**2 * (1 - (a * S**2 / variance) ** 0.5),  # by the map from N(0, .) of x_300 to that of x_0
    }
    torch.testing.assert_close(decoded[0] - decoded[1], torch.full_like(decoded[0], moved[mode]), rtol=0.02, atol=0)


def test_split_guidance_converges_to_the_guided_solution():
    x = closed_form().encode(images())
    exact = closed_form(guidance_steps=0, solver="heun", num_steps=300).decode(x)
    errors = [(closed_form(guidance_steps=2, num_steps=n).decode(x) - exact).abs().max() for n in (5, 20, 80)]
    assert errors[0] < 0.1 and errors[1] < errors[0] / 3 and errors[2] < errors[1] / 2


# --- without guidance


ROUND_TRIP = {  # largest relative error for 10, 50 and 300 steps
    "ddim": (0.28, 0.065, 0.011),
    "heun": (0.005, 1e-4, 1e-4),
    "multistep": (0.02, 0.0015, 8e-4),
    "dpmpp_2m": (0.18, 0.01, 1e-4),
}


@pytest.mark.parametrize("guidance_steps", [0, 4])
@pytest.mark.parametrize("solver", SOLVERS)
def test_scale_0_returns_the_input_up_to_the_solvers_error(solver, guidance_steps):
    image, errors = images(), []
    for n, bound in zip((10, 50, 300), ROUND_TRIP[solver], strict=True):
        net = closed_form(gradient_scale=0.0, solver=solver, num_steps=n, guidance_steps=guidance_steps)
        errors.append(((net(image)[:, 1:2] - image).norm() / (image - 0.5).norm()).item())
        assert errors[-1] < bound
    assert errors[0] > errors[1] and (errors[1] > errors[2] or errors[2] < 1e-4)


def test_nothing_is_clipped_and_no_noise_is_added():
    image = torch.linspace(-1.5, 2.5, 2 * 32 * 32).view(2, 1, 32, 32)
    healthy = closed_form(gradient_scale=0.0, solver="heun", num_steps=50)(image)[:, 1:2]
    torch.testing.assert_close(healthy, image, atol=3e-4, rtol=0)


def test_scale_0_asks_the_classifier_for_the_probability_only():
    net = closed_form(gradient_scale=0.0)
    net.classifier = Recorder()
    net(images())
    ((x, step),) = net.classifier.calls
    assert torch.equal(x, net.fold(2 * images() - 1)) and step.tolist() == [0, 0]


# --- where it runs


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_guidance_works_whatever_the_caller_does_about_gradients(guard):
    net, image = network(), images()
    expected = net(image)
    with guard():
        output = net(image)
    assert torch.equal(output, expected) and not output.requires_grad


@pytest.mark.parametrize("mode", ["ddim", "ddpm"])
def test_a_volume_gives_the_same_as_its_slices(mode):
    net = network(2, mode=mode, min_foreground=0.05)
    volumes = images(10, channels=2).unflatten(0, (2, 5)).movedim(1, -1).contiguous()
    volumes[..., 3] = 0
    slices = torch.stack([net(volumes[..., i]) for i in range(5)], dim=-1)
    assert slices.shape == (2, 4, 32, 32, 5) and not slices[..., 3].any() and slices[..., 2].any()
    with torch.no_grad():
        inferred = SliceInferer(roi_size=(32, 32), spatial_dim=2, sw_batch_size=3)(volumes, net)
    torch.testing.assert_close(inferred, slices, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(net(volumes), slices, atol=1e-5, rtol=1e-4)


def test_bfloat16_networks_stay_close_to_float32():
    image = images()
    exact, rough = network(gradient_scale=10.0)(image), network(gradient_scale=10.0, amp=True)(image)
    assert rough.dtype == torch.float32 and not torch.equal(rough, exact)
    assert (rough - exact).abs().max() < 0.15 and (rough - exact).abs().mean() < 0.015


def test_the_input_is_left_alone_and_its_type_is_kept():
    net, image = network(), images().double()
    before = image.clone()
    assert net(image).dtype == torch.float64 and torch.equal(image, before)


@pytest.mark.parametrize("t", [1, 150, 1000])
def test_a_network_that_predicts_velocity_estimates_the_same_noise(t):
    x = 2 * images() - 1
    velocity = closed_form(prediction_type="v_prediction")
    torch.testing.assert_close(velocity.noise(x, t), closed_form().noise(x, t), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mode", ["ddim", "ddpm"])
def test_a_network_that_predicts_velocity_gives_the_same_result(mode):
    nets = [closed_form(prediction_type=kind, mode=mode, num_steps=10) for kind in ("epsilon", "v_prediction")]
    outputs = [net(images()) for net in nets]
    torch.testing.assert_close(*outputs, atol=5e-3, rtol=0)  # at level 0 the networks are asked about level 1


def test_levels_count_from_1_and_the_networks_steps_from_0():
    net = closed_form(num_steps=3, solver="ddim")
    net.unet, net.classifier = Recorder(out_channels=8), Recorder()
    net(images())
    assert [step.tolist() for _, step in net.unet.calls] == [[i] * 2 for i in (0, 99, 199, 299, 199, 99)]
    assert [step.tolist() for _, step in net.classifier.calls] == [[i] * 2 for i in (0, 199, 99, 0)]


# --- less work


def test_slices_that_look_healthy_come_back_as_they_are_without_a_call_of_the_unet():
    net = closed_form(skip_below=0.5, min_foreground=0.0)
    net.unet = Recorder(out_channels=8)
    x = torch.cat([torch.full((1, 1, 32, 32), 0.3), torch.full((1, 1, 32, 32), 0.7)])  # brightness is disease
    output = net(x)
    assert {len(slices) for slices, _ in net.unet.calls} == {1}
    assert torch.equal(output[0, 1:2], x[0]) and not output[0, :1].any() and 0 < output[0, 2].max() < 0.5
    assert output[1, :1].any() and torch.equal(output[1:], net(x[1:]))


@pytest.mark.parametrize("settings", [{"skip_below": 0.5}, {"skip_below": 0.5, "reference_steps": 2}])
def test_with_less_work_too_the_result_of_a_slice_does_not_depend_on_its_batch(settings):
    net = closed_form(gate=True, **settings)
    x = torch.cat([torch.full((1, 1, 32, 32), level) for level in (0.3, 0.7, 0.4, 0.9)])
    assert torch.allclose(net(x), torch.cat([net(x[i : i + 1]) for i in range(4)]), atol=1e-5)


def test_what_the_way_through_the_noise_changes_without_guidance_is_taken_from_the_map():
    x = images()
    plain, relative = (network(reference_steps=k, solver="ddim") for k in (0, 3))
    restored = plain.decode(plain.encode(x), target=None)
    expected = (plain.anomaly_map(x, plain.decode(plain.encode(x))) - plain.anomaly_map(x, restored)).clamp(min=0)
    assert torch.allclose(relative(x)[:, :1], expected, atol=1e-6) and expected.any()
    assert torch.equal(relative(x)[:, 1:], plain(x)[:, 1:])  # the same healthy slice and probability
    assert not network(reference_steps=3, gradient_scale=0.0)(x)[:, 0].any()


# --- what is refused


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (2, 1, 32, 48), (2, 1, 16, 32), (1, 32, 32), (32, 32)])
def test_slices_of_another_shape_are_refused_with_both_shapes(shape):
    with pytest.raises(ValueError) as error:
        network()(torch.zeros(shape))
    assert str((1, 32, 32)) in str(error.value) and str(shape[1:]) in str(error.value)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"solver": "euler"}, "unknown solver 'euler': choose one of ddim, heun, multistep, dpmpp_2m"),
        ({"mode": "ddmi"}, "unknown mode 'ddmi': choose one of ddim, ddpm"),
        ({"prediction_type": "sample"}, "unknown prediction_type 'sample': choose one of epsilon, v_prediction"),
        ({"schedule": "sigmoid"}, "unknown schedule 'sigmoid'"),
        ({"noise_level": 1001}, "noise_level must lie in 1 ... 1000, got 1001"),
        ({"noise_level": 0}, "noise_level must lie in 1 ... 1000, got 0"),
        ({"num_levels": 200}, "noise_level must lie in 1 ... 200, got 300"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, text):
    with pytest.raises(ValueError, match=text):
        network(**settings)


# --- weights


def test_the_weights_are_tensors_only_and_load_strictly_from_half_precision(tmp_path):
    net, other = network(), network()
    state = {name: tensor.half() for name, tensor in net.state_dict().items()}
    torch.save(state, tmp_path / "model.pt")
    assert all(type(tensor) is torch.Tensor for tensor in net.state_dict().values())
    assert {name.split(".")[0] for name in state} == {"unet", "classifier"}
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True), strict=True)
    assert all(p.dtype == torch.float32 and torch.equal(p, state[name].float()) for name, p in other.named_parameters())
    torch.testing.assert_close(other(images()), net(images()), atol=3e-2, rtol=0)


# --- losses


def losses(net, count=4, seed=0, **kwargs):
    labels = torch.arange(count) % 2
    return net.losses(images(count, **kwargs), labels, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_losses_are_finite_and_train_every_weight(prediction_type):
    net = network(prediction_type=prediction_type)
    values = losses(net)
    assert set(values) == {"noise", "variance", "classifier"}
    assert all(value.shape == () and value.isfinite() and value >= 0 for value in values.values())
    sum(values.values()).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    for part in (net.unet, net.classifier):
        assert sum(bool(p.grad.any()) for p in part.parameters()) > 0.9 * len(list(part.parameters()))


def test_losses_depend_on_the_generator_only():
    net = network()
    torch.manual_seed(1)
    first = losses(net)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    again, other = losses(net), losses(net, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) and first[name] != other[name] for name in first)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_an_estimate_of_zero_costs_the_variance_of_what_was_to_be_estimated(prediction_type):
    net = network(prediction_type=prediction_type)
    net.unet = Recorder(out_channels=8)
    image = torch.arange(64).remainder(2).float().view(-1, 1, 1, 1).expand(-1, 1, 32, 32)  # x_0 is -1 or 1
    values = net.losses(image, torch.zeros(64, dtype=torch.long), torch.Generator().manual_seed(0))
    assert values["noise"].item() == pytest.approx(1, abs=0.02)


def test_an_ideal_estimate_costs_the_least():
    net = closed_form()
    ideal = losses(net, 64)["noise"]
    net.unet = Recorder(out_channels=8)
    assert ideal < 0.5 * losses(net, 64)["noise"]


def test_the_classifiers_loss_falls_where_the_label_is_right():
    net, image = closed_form(), torch.cat([torch.full((32, 1, 32, 32), 0.1), torch.full((32, 1, 32, 32), 0.9)])
    labels = torch.tensor([HEALTHY] * 32 + [DISEASED] * 32)
    right, wrong = (
        net.losses(image, label, torch.Generator().manual_seed(0))["classifier"] for label in (labels, 1 - labels)
    )
    assert right < math.log(2) < wrong


@pytest.mark.parametrize("power", [1.0, 1.5])
def test_both_networks_see_the_same_noised_slices_at_levels_that_cover_the_schedule(power):
    net = network(level_power=power)
    net.unet, net.classifier = Recorder(out_channels=8), Recorder()
    losses(net, 2000)
    ((x, step),), ((x_classifier, step_classifier),) = net.unet.calls, net.classifier.calls
    assert torch.equal(x, x_classifier) and torch.equal(step, step_classifier)
    assert 0 <= step.min() < 10 and 990 < step.max() <= 999
    assert (step < 500).float().mean().item() == pytest.approx(0.5 ** (1 / power), abs=0.04)
    a = A[step + 1]
    expected = a * (2 * images(2000) - 1).var() + 1 - a
    assert (x.flatten(1).var(dim=1) / expected).mean().item() == pytest.approx(1, abs=0.02)


def test_the_published_procedure_of_guided_ddim_takes_every_level_by_single_steps():
    published = network(noise_level=20, **network().published)
    assert published._levels() == list(range(21))
    assert (published.solver, published.guidance_steps, published.smoothing) == ("ddim", 0, 0.0)
