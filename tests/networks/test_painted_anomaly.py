"""The network that learns from anomalies painted into healthy slices."""

from __future__ import annotations

import pytest
import torch

from scripts.networks.ddim_anomaly import DISEASED, HEALTHY, DDIMAnomalyNet
from scripts.networks.painted_anomaly import PaintedAnomalyNet

SMALL = {"in_channels": 1, "spatial_size": (64, 64), "channels": (16, 32), "classifier_channels": (32, 32)}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def organs(number: int) -> torch.Tensor:
    """Noisy grey slices, black beyond their middle."""
    image = torch.zeros(number, 1, 64, 64)
    image[:, :, 8:56, 8:56] = (0.6 + 0.05 * torch.randn(number, 1, 48, 48, generator=generator())).clamp(0, 1)
    return image


def squares(number: int, place: int = 20, size: int = 16) -> torch.Tensor:
    mask = torch.zeros(number, 1, 64, 64)
    mask[:, :, place : place + size, place : place + size] = 1
    return mask


def test_a_slice_is_as_healthy_as_all_of_its_places_together():
    network = PaintedAnomalyNet(**SMALL)
    places = torch.tensor([[-3.0, -2.0, 1.0], [-30.0, -30.0, -30.0], [40.0, -3.0, -3.0]])
    classes = network._of_slice(places).exp()
    assert torch.allclose(classes[:, HEALTHY], (1 - places.sigmoid()).prod(dim=1), atol=1e-6)
    assert torch.allclose(classes.sum(dim=1), torch.ones(3), atol=1e-5) and classes.isfinite().all()
    x = 2 * organs(2) - 1
    assert torch.allclose(network.classify(x, 10).exp().sum(dim=1), torch.ones(2), atol=1e-5)
    assert (network.probability(organs(2)) < 0.95).all(), "no slice is a sure case before any training"


def test_painting_darkens_what_is_shown_in_the_mask_and_nothing_far_from_it():
    network = PaintedAnomalyNet(**SMALL, contrast=(0.1, 0.2))
    image, mask = organs(4), squares(4, place=48)  # half of its width lies beyond the organ
    painted, seen = network.paint(image, mask, generator())
    assert torch.equal(seen, mask * (image > 0)) and 0 < seen.sum() < mask.sum()
    inner = torch.zeros_like(mask)
    inner[..., 52:55, 52:55] = 1
    darker = (image - painted)[inner > 0].view(4, -1)
    assert ((darker > 0.095) & (darker < 0.201)).all()
    assert torch.allclose(darker, darker[:, :1].expand_as(darker), atol=5e-3), "the texture stays"
    assert torch.equal(painted[..., :40, :40], image[..., :40, :40]) and torch.equal(painted[image == 0], image[image == 0])


def test_a_painted_twin_without_contrast_can_not_be_told_from_its_slice():
    """A rim, or a noise of its own, would give the class away."""
    network = PaintedAnomalyNet(**SMALL, contrast=(0.0, 0.0), place_weight=0.0, classifier_alone=True)
    seen = []
    network.classifier.register_forward_hook(lambda module, args, out: seen.append(out))
    network.painted_losses(organs(3), squares(3), generator())
    healthy, painted = seen[0].chunk(2)
    assert torch.allclose(healthy, painted, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({}, {"classifier", "places", "noise", "variance"}),
        ({"place_weight": 0.0}, {"classifier", "noise", "variance"}),
        ({"classifier_alone": True}, {"classifier", "places"}),
    ],
)
def test_the_parts_of_the_losses_are_settings(settings, names):
    network = PaintedAnomalyNet(**SMALL, **settings)
    losses = network.painted_losses(organs(2), squares(2), generator())
    assert set(losses) == names and all(loss.isfinite() for loss in losses.values())
    assert set(network.losses(organs(2), torch.tensor([HEALTHY, DISEASED]), generator())) == names - {"places"}


def test_what_is_painted_beyond_the_organ_is_no_disease():
    network = PaintedAnomalyNet(**SMALL, place_weight=0.0, classifier_alone=True)
    for place, is_painted in ((54, False), (20, True)):  # of the first, 4 pixels lie in the organ
        painted, mask = network.paint(organs(2), squares(2, place, size=7), generator())
        assert mask.any() == is_painted and torch.equal(painted, organs(2)) != is_painted


def test_without_places_its_classifier_is_that_which_pools():
    with pytest.raises(ValueError, match="needs places"):
        PaintedAnomalyNet(**SMALL, places=False, place_gate=True)
    network = PaintedAnomalyNet(**SMALL, places=False, classifier_alone=True)
    plain = DDIMAnomalyNet(**SMALL)
    plain.load_state_dict(network.state_dict())
    x = 2 * organs(2) - 1
    assert torch.allclose(network.classify(x, 10), plain.classify(x, 10).log_softmax(dim=1), atol=1e-5)
    assert set(network.painted_losses(organs(2), squares(2), generator())) == {"classifier"}


def test_places_gate_the_map_if_wanted():
    image = organs(2)
    maps = {}
    for gated in (False, True):
        torch.manual_seed(0)
        network = PaintedAnomalyNet(**SMALL, place_gate=gated, num_steps=1, guidance_steps=1, noise_level=50)
        maps[gated] = network.analyse(image)[0]
    assert network.place_map(image).shape == image.shape
    assert maps[False].any() and torch.allclose(maps[True], maps[False] * network.place_map(image), atol=1e-6)


def test_it_learns_to_tell_painted_slices_from_healthy_ones_and_where_they_are_painted():
    torch.manual_seed(0)
    network = PaintedAnomalyNet(**SMALL, contrast=(0.15, 0.25), classifier_alone=True, level_power=6.0, fold=4)
    optimizer = torch.optim.Adam(network.classifier.parameters(), 3e-3)
    draws = generator(1)
    for _ in range(60):
        place = int(torch.randint(8, 40, (), generator=draws))
        losses = network.painted_losses(organs(8), squares(8, place), draws)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    painted, _ = network.paint(organs(8), squares(8), generator(2))
    assert network.probability(painted).min() > network.probability(organs(8)).max()
    found = network.place_map(painted).mean(dim=0)[0]
    assert found[20:36, 20:36].mean() > 2 * found[44:].mean()
    gradient = network.gradient(2 * painted - 1, 1, HEALTHY).mean(dim=0)[0]
    assert gradient[20:36, 20:36].mean() > 3 * gradient[40:, 40:].mean().abs(), "health lies in brighter grey there"
