from __future__ import annotations

import pytest
import torch
from monai.inferers import SliceInferer
from torch import nn
from torch.testing import assert_close

from scripts.networks.counterfactual import NONE, CounterfactualNet
from scripts.networks.ddim_anomaly import DISEASED, HEALTHY, DDIMAnomalyNet
from scripts.samplers import alphas_cumprod_table

A = alphas_cumprod_table()
S = 0.25  # spread of the grey levels that the ideal U-Net knows
MEANS = {HEALTHY: -0.2, DISEASED: 0.4, NONE: 0.1}
SMALL = {"spatial_size": (32, 32), "channels": (16, 32)}


class IdealUNet(nn.Module):
    """The best noise estimate for images in [-1, 1] whose pixels are drawn from N(mean of the class, S²)."""

    def forward(self, x, step, class_labels):
        a = A[step + 1].to(x.dtype).view(-1, 1, 1, 1)
        mean = x.new_tensor([MEANS[label] for label in class_labels.tolist()]).view(-1, 1, 1, 1)
        return (1 - a).sqrt() * (x - a.sqrt() * mean) / (a * S**2 + 1 - a)


def network(**kwargs):
    """A small network with random weights, those included that start at zero."""
    torch.manual_seed(0)
    net = CounterfactualNet(**{**SMALL, "noise_level": 300, "num_steps": 3, "min_foreground": 0.0, **kwargs})
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return net.eval()


def closed_form(**kwargs):
    net = network(**{"num_steps": 100, "dynamic_normalisation": False, **kwargs})
    net.unet = IdealUNet()
    return net


def images(count=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (0.5 + S / 2 * torch.randn(count, 3, 32, 32, generator=generator)).clamp(0, 1)


def generator():
    return torch.Generator().manual_seed(0)


# --- counterfactuals


@pytest.mark.parametrize("solver", ["ddim", "heun", "multistep", "dpmpp_2m"])
def test_without_a_class_a_slice_comes_back_and_more_steps_bring_it_back_more_exactly(solver):
    image = images()
    errors = []
    for steps in (4, 12, 36):
        net = closed_form(solver=solver, num_steps=steps, guidance_scale=0.0)
        errors.append((net.decode(net.encode(image)) - image).abs().mean().item())
    assert errors[0] > 2 * errors[1] > 4 * errors[2] and errors[2] < 0.01


def test_guidance_of_1_moves_a_slice_by_what_tells_healthy_ones_from_all_and_more_moves_it_further():
    image = images()
    shifts = []
    for scale in (0.0, 1.0, 3.0):
        net = closed_form(noise_level=1000, guidance_scale=scale)
        shifts.append((net.decode(net.encode(image)) - image).mean().item())
    # grey levels in [0, 1] are half of those in [-1, 1]
    expected = (MEANS[HEALTHY] - MEANS[NONE]) / 2
    assert shifts == pytest.approx([0, expected, 3 * expected], abs=0.03)


def test_guidance_is_the_difference_of_two_estimates_of_one_batch():
    net, x = network(guidance_scale=2.5, dynamic_normalisation=False), images()
    without = net.estimate(x, 200, torch.full((2,), NONE))
    towards = net.estimate(x, 200, torch.full((2,), HEALTHY))
    assert not torch.allclose(without, towards)
    assert_close(net.noise(x, 200, HEALTHY), without + 2.5 * (towards - without))
    assert_close(net.noise(x, 200), without)
    calls = []
    net.unet.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    net.noise(x, 200, HEALTHY)
    assert calls == [4]


def test_dynamic_normalisation_bounds_the_clean_slice_that_an_estimate_implies():
    net, x = network(guidance_scale=0.5, dynamic_normalisation=True), 3 * images() - 1
    a = A[200].float()
    clean = (x - (1 - a).sqrt() * net.noise(x, 200, HEALTHY)) / a.sqrt()
    assert clean.abs().amax().item() == pytest.approx(1, abs=1e-4)
    assert net.noise(x, 0, HEALTHY).isfinite().all()
    dull = 0.2 * images()  # inside of [-1, 1] nothing is changed
    plain = network(guidance_scale=0.5, dynamic_normalisation=False)
    assert_close(net.noise(dull, 50, HEALTHY), plain.noise(dull, 50, HEALTHY))


def test_encoding_knows_no_class_and_no_normalisation():
    image = images()
    first, second = network(guidance_scale=9.0), network(guidance_scale=0.0, dynamic_normalisation=False)
    assert torch.equal(first.encode(image), second.encode(image))


# --- what comes out


def test_the_channels_are_the_map_the_healthy_sequences_and_the_abnormality():
    net, image = closed_form(num_steps=5, map_weights=(0, 1, 0.5), darker_weight=0.5, half_score=0.2), images()
    output, healthy = net(image), net.decode(net.encode(image))
    assert output.shape == (2, 5, 32, 32)
    assert_close(output[:, 1:-1], healthy)
    assert_close(output[:, :1], net.anomaly_map(image, healthy))
    largest = output[:, 0].flatten(1).amax(dim=1)
    assert_close(output[:, -1, 0, 0], largest / (largest + 0.2))


def test_the_output_of_a_slice_depends_on_no_other():
    net, image = network(), images(3)
    assert_close(net(image)[1:2], net(image[1:2]), rtol=1e-4, atol=1e-4)
    volume = SliceInferer(roi_size=(32, 32), sw_batch_size=2, spatial_dim=2)(image.movedim(0, -1)[None], net)
    assert_close(volume[0].movedim(-1, 0), net(image), rtol=1e-4, atol=1e-4)


def test_the_published_settings_are_settings_of_the_network():
    net = network()
    for name, value in net.published.items():
        assert hasattr(net, name)
        setattr(net, name, value)
    assert net.published["noise_level"] == 750 and net.published["num_steps"] == 100


# --- training


def test_some_of_the_classes_are_withheld_whatever_else_is_in_the_batch():
    net, seen = network(label_dropout=0.35), []
    net.unet.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs["class_labels"]), with_kwargs=True)
    label = torch.arange(400) % 2
    net.losses(torch.rand(400, 3, 32, 32), label, generator())
    withheld = seen[0] == NONE
    assert withheld.float().mean().item() == pytest.approx(0.35, abs=0.07)
    assert torch.equal(seen[0][~withheld], label[~withheld])


def loss_of_one_that_knows_the_clean_slices(net, image, label):
    def estimate(x, t, label):
        a = net._alpha(t)
        return (x - a.sqrt() * (2 * image - 1)) / (1 - a).sqrt()

    net.estimate = estimate
    return net.losses(image, label, generator())["noise"].item()


@pytest.mark.parametrize(("dropout", "label", "kept"), [(0.0, HEALTHY, False), (1.0, HEALTHY, True), (0.0, DISEASED, False)])
def test_made_anomalies_are_taken_out_of_healthy_slices_and_stay_in_those_without_a_class(dropout, label, kept):
    net, image = network(made_share=1.0, label_dropout=dropout), images(8)
    loss = loss_of_one_that_knows_the_clean_slices(net, image, torch.full((8,), label))
    assert loss > 0.1 if kept else loss < 1e-8  # diseased slices get none


def test_no_share_of_made_anomalies_is_the_papers_training():
    net, image = network(made_share=0.0, label_dropout=1.0), images(8)
    assert loss_of_one_that_knows_the_clean_slices(net, image, torch.full((8,), HEALTHY)) < 1e-8


def test_training_on_one_batch_lowers_the_loss_and_the_classes_part():
    torch.manual_seed(0)
    net, image, label = CounterfactualNet(**SMALL, label_dropout=0.0), images(8), torch.arange(8) % 2
    image[label == 1, :, 10:20, 10:20] = 0.95
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    assert torch.equal(*net.estimate(image[:1].repeat(2, 1, 1, 1), 300, torch.tensor([HEALTHY, DISEASED])))
    first = net.losses(image, label, generator())
    assert set(first) == {"noise"}
    for _ in range(25):
        optimizer.zero_grad()
        net.losses(image, label, generator())["noise"].backward()
        optimizer.step()
    assert net.losses(image, label, generator())["noise"] < 0.8 * first["noise"]
    assert net.losses(image, label, generator())["noise"] < net.losses(image, 1 - label, generator())["noise"]


def test_a_network_that_starts_from_another_bundles_estimates_what_that_does_for_every_class(tmp_path):
    torch.manual_seed(1)
    other = DDIMAnomalyNet(**SMALL, classifier_channels=(32, 32))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    torch.save(other.state_dict(), tmp_path / "other.pt")
    net, x = network(), images()
    net.start_from(tmp_path / "other.pt")
    for label in (HEALTHY, DISEASED, NONE):
        assert_close(net.estimate(x, 300, torch.full((2,), label)), other.noise(x, 300))
    trained = network()  # its classes have parted
    torch.save(trained.state_dict(), tmp_path / "trained.pt")
    net.start_from(tmp_path / "trained.pt")
    assert_close(net.state_dict(), trained.state_dict())


def test_weights_that_do_not_fit_are_refused_by_the_name_of_their_file(tmp_path):
    torch.save(network(channels=(32, 64)).state_dict(), tmp_path / "wider.pt")
    with pytest.raises(ValueError, match=r"wider.pt: has no U-Net of these channels"):
        network().start_from(tmp_path / "wider.pt")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"solver": "euler"}, "unknown solver 'euler': choose one of ddim, heun, multistep, dpmpp_2m"),
        ({"noise_level": 1001}, "noise_level must lie in"),
    ],
)
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        CounterfactualNet(**{**SMALL, **wrong})
