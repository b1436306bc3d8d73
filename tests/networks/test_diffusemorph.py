"""Tests of DiffuseMorph."""

import pytest
import torch
from made_inputs import SMALL_DEFORMABLE as SMALL
from made_inputs import ball_pair as pair

from scripts.networks.diffusemorph import DiffuseMorphNet
from scripts.networks.registration import warp


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def trained(**settings):
    network = DiffuseMorphNet(**SMALL, similarity_weight=1.0, window=5, smoothness=0.1, **settings)
    optimizer = torch.optim.Adam(network.parameters(), 5e-3)
    for step in range(60):
        optimizer.zero_grad()
        sum(network.losses(pair(), None, generator(step)).values()).backward()
        optimizer.step()
    return network


def test_gives_the_warped_volume_and_the_displacement_that_warps_it():
    network, image = DiffuseMorphNet(**SMALL, gammas=[0.5, 1.0]), torch.rand(2, 2, 13, 18, 5)
    result = network(image)
    assert result.shape == (2, 8, 13, 18, 5)
    fields = network.displace(image)
    assert torch.equal(result[:, 2:], fields.flatten(1, 2))
    assert torch.equal(result[:, 1:2], warp(image[:, :1], fields[:, 1]))


@pytest.mark.parametrize("settings", [{}, {"diffeomorphic": True}, {"code": "network"}, {"along": "score"}])
def test_learns_to_bring_a_ball_to_another(settings):
    image = pair()
    warped = trained(**settings)(image)[:, :1]
    assert (warped - image[:, 1:]).square().mean() < 0.5 * (image[:, :1] - image[:, 1:]).square().mean()


def test_in_time_half_of_the_way_twice_is_the_whole():
    network, image = trained(diffeomorphic=True), pair()
    half, whole = network.displace(image, [0.5, 1.0]).unbind(1)
    assert whole.abs().max() > 0.5
    error = half + warp(half, half) - whole
    assert error.norm(dim=1).mean() < 0.05 * whole.norm(dim=1).mean()


def test_by_the_score_the_deformation_network_sees_a_part_of_it():
    network, image = DiffuseMorphNet(**SMALL, along="score"), pair()
    with torch.no_grad():
        code = network.noise(image[:, :1], image[:, 1:], image[:, 1:], torch.zeros(1))
        expected = network.deformation(torch.cat([image[:, :1], 0.25 * code], dim=1))
    assert torch.allclose(network.displace(image, [0.25]), expected[:, None], atol=1e-5)


def test_refuses_another_way():
    with pytest.raises(ValueError, match="along must be one of time, score, got space"):
        DiffuseMorphNet(**SMALL, along="space")


def test_a_perfect_estimate_of_the_noise_makes_the_fixed_volume():
    """Given the fixed volume, the noise in it is known, and says nothing of the moving one."""
    network, image = DiffuseMorphNet(**SMALL), pair()

    def noise(source, target, noised, t):
        a = network.alphas_cumprod[t].to(noised).view(-1, 1, 1, 1, 1)
        return (noised - a.sqrt() * target) / (1 - a).sqrt().clamp(min=1e-9)

    network.noise = noise
    made = network.synthesise(image, 10, generator())
    assert torch.allclose(made, image[:, 1:], atol=1e-4)


def test_synthesises_the_same_from_the_same_seed():
    network, image = DiffuseMorphNet(**SMALL), pair()
    first, second, other = (network.synthesise(image, 3, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)
