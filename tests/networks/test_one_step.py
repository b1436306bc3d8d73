from __future__ import annotations

import pytest
import torch
from monai.inferers import SliceInferer
from torch.testing import assert_close

from scripts.networks.anomaly_baselines import SmoothNet
from scripts.networks.one_step import OneStepNet

SMALL = {"spatial_size": (32, 32), "channels": (16, 32)}


def net(kind=OneStepNet, **kwargs):
    torch.manual_seed(0)
    made = kind(**{**SMALL, **kwargs})
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return made.eval()


def images(count=2, seed=0):
    return 0.2 + 0.6 * torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def losses(network, image, seed=0):
    return network.losses(image, None, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("steps", [1, 3])
def test_the_flow_of_a_network_that_knows_the_velocity_ends_at_the_clean_slice_in_any_number_of_steps(steps):
    network, clean, ill = OneStepNet(**SMALL, num_steps=steps), images(), images(seed=1)
    network.estimate = lambda x, t: (ill - clean, torch.zeros_like(x[:, :1]))
    assert_close(network.heal(ill)[0], clean)


def test_an_untrained_network_takes_every_slice_for_healthy():
    image = images()
    output = OneStepNet(**SMALL)(image)
    assert_close(output[:, 1:4], image)
    assert not output[:, 0].any() and (output[:, 4] > 0).all()  # 0 is for slices that are skipped


def test_the_map_weighs_sequences_and_what_is_darker_and_the_gate_only_lowers_it():
    image = images()
    network = net(map_weights=(0, 1, 0), darker_weight=0.0)
    anomaly, healthy, score = network.analyse(image)
    assert_close(anomaly, (image - healthy)[:, 1:2].clamp(min=0))
    largest = anomaly.flatten(1).amax(dim=1)
    assert_close(score, largest / (largest + 0.1))
    gated = net(map_weights=(0, 1, 0), darker_weight=0.0, gate=True).analyse(image)[0]
    assert (gated <= anomaly).all() and (gated < anomaly).any() and gated.any()


def test_what_is_brighter_than_the_median_in_one_sequence_and_not_in_another_is_added_to_the_map_and_not_to_the_score():
    image = images()
    plain, more = (net(brightness_weights=weights)(image) for weights in (None, (-1.5, 1, 0)))
    above = (image - 0.4).clamp(min=0)
    assert_close(more[:, :1], plain[:, :1] + (above[:, 1:2] - 1.5 * above[:, :1]).clamp(min=0))
    assert torch.equal(more[:, 1:], plain[:, 1:])


def test_the_output_of_a_slice_depends_on_no_other():
    network, image = net(), images(3)
    assert_close(network(image)[1:2], network(image[1:2]))
    volume = SliceInferer(roi_size=(32, 32), sw_batch_size=2, spatial_dim=2)(image.movedim(0, -1)[None], network)
    assert_close(volume[0].movedim(-1, 0), network(image))


def test_slices_without_foreground_are_skipped():
    assert not net()(torch.zeros(1, 3, 32, 32)).any()


@pytest.mark.parametrize("corruption", ["made", "noise"])
def test_a_corruption_stays_inside_its_mask_and_comes_from_its_seed(corruption):
    network, image = net(corruption=corruption), images(8)
    image[..., :6] = 0.0  # air
    corrupted, mask = network.corrupt(image, torch.Generator().manual_seed(0))
    assert_close(corrupted[(mask == 0).expand_as(image)], image[(mask == 0).expand_as(image)])
    assert (corrupted != image).any() and not mask[..., 0].any()
    assert torch.equal(corrupted, network.corrupt(image, torch.Generator().manual_seed(0))[0])


def test_coarse_noise_has_the_standard_deviation_that_is_asked_for():
    image = images()
    corrupted, _ = net(corruption="noise", noise_std=0.3).corrupt(image, torch.Generator().manual_seed(0))
    assert (corrupted - image).std().item() == pytest.approx(0.3, rel=0.01)


@pytest.mark.parametrize("corruption", ["made", "noise"])
def test_training_on_one_batch_lowers_the_losses(corruption):
    torch.manual_seed(0)
    network, image = OneStepNet(**SMALL, corruption=corruption), images(8)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    first = losses(network, image)
    assert set(first) == {"inside", "outside"} | ({"where"} if corruption == "made" else set())
    for _ in range(25):
        optimizer.zero_grad()
        sum(losses(network, image).values()).backward()
        optimizer.step()
    assert sum(losses(network, image).values()) < 0.8 * sum(first.values())


def test_the_smoothness_control_has_the_weights_and_needs_none():
    control, image = net(SmoothNet, sigma=4.0), images()
    control.load_state_dict(net().state_dict())
    anomaly, smooth, _ = control.analyse(image)
    assert smooth.std() < 0.6 * image.std() and anomaly.any()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"corruption": "blobs"}, "unknown corruption 'blobs': choose one of made, noise"),
        ({"corruption": "noise", "gate": True}, "does not say where"),
        ({"num_steps": 0}, "num_steps must be 1 or more"),
        ({"map_weights": (1, 1)}, "map_weights must be 3 numbers"),
        ({"brightness_weights": (1, 1)}, "brightness_weights must be 3 numbers"),
        ({"spatial_size": (30, 32)}, "multiples of 4"),
    ],
)
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        OneStepNet(**{**SMALL, **wrong})
