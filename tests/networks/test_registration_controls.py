from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from scripts.networks.registration import warp
from scripts.networks.registration_controls import RefinementNet, fit_time_curve


def blob(shift=0.0, size=24):
    """A soft ball (1, 1, size, size, size) in [-1, 1] that lies so many voxels off the middle along the first axis."""
    axes = torch.meshgrid(*[torch.arange(size, dtype=torch.float32) - (size - 1) / 2] * 3, indexing="ij")
    squares = (axes[0] - shift).square() + axes[1].square() + axes[2].square()
    return (2 * torch.exp(-squares / 32) - 1)[None, None]


PAIR = torch.cat([blob(), blob(2.0)], dim=1)


@pytest.mark.parametrize("diffeomorphic", [False, True])
@pytest.mark.parametrize("reduction", [1, 2])
def test_without_a_network_the_refinement_finds_the_motion_of_a_pair(diffeomorphic, reduction):
    settings = {"window": 5, "squared_error": 1.0, "smoothness": 0.3, "reduction": reduction, "diffeomorphic": diffeomorphic}
    network = RefinementNet(num_frames=3, refinement_steps=40, **settings).eval()
    frames = network(PAIR)
    assert torch.equal(frames[:, 0], PAIR[:, 0])
    errors = [functional.mse_loss(frames[:, -1], PAIR[:, 1]), functional.mse_loss(PAIR[:, 0], PAIR[:, 1])]
    assert errors[0] < 0.1 * errors[1]
    _, half, whole = network.displace(PAIR)[0].split(1)
    if diffeomorphic:  # half of the way there, and then the other half
        assert (half + warp(half, half) - whole).abs().mean() < 0.1 * whole.abs().mean()
    else:
        torch.testing.assert_close(half, whole / 2)
    assert functional.mse_loss(frames[:, 1], blob(1.0)[0]) < 0.1 * functional.mse_loss(PAIR[:, 0], blob(1.0)[0])


@pytest.mark.parametrize("reduction", [1, 2])
def test_steps_at_half_the_resolution_find_it_too(reduction):
    settings = {"window": 5, "squared_error": 1.0, "smoothness": 0.3, "reduction": reduction, "diffeomorphic": True}
    network = RefinementNet(gammas=[1.0], coarse_steps=40, refinement_steps=5, **settings)
    errors = [functional.mse_loss(frame, PAIR[:, 1:]) for frame in (network(PAIR), PAIR[:, :1])]
    assert errors[0] < 0.1 * errors[1]


def test_without_refinement_it_repeats_the_source_and_it_has_nothing_that_is_trained():
    network = RefinementNet(num_frames=3)
    torch.testing.assert_close(network(PAIR), PAIR[:, :1].expand(-1, 3, -1, -1, -1), atol=1e-5, rtol=0)
    assert not network.state_dict() and not list(network.parameters())


def test_two_runs_give_the_same_and_sizes_need_no_multiple_of_eight():
    pair = PAIR[..., :21, :18, :13]
    one, two = (RefinementNet(num_frames=2, window=5, refinement_steps=3)(pair) for _ in range(2))
    assert one.shape == pair.shape and torch.equal(one, two)


def test_a_time_curve_says_how_much_of_the_way_is_gone():
    settings = {"window": 5, "squared_error": 1.0, "smoothness": 0.3, "refinement_steps": 20}
    even = RefinementNet(gammas=[0, 0.25, 0.5, 1], **settings).displace(PAIR)[0]
    late = RefinementNet(gammas=[0, 0.5, 0.75, 1], time_curve=[0, 0.25, 1], **settings).displace(PAIR)[0]
    torch.testing.assert_close(late[1], even[1])
    torch.testing.assert_close(late[3], even[3])
    torch.testing.assert_close(late[2], 0.625 * even[3])


def test_the_curve_of_cines_that_begin_slowly_is_found():
    network = RefinementNet(window=5, squared_error=1.0, smoothness=0.1, refinement_steps=40)
    times = torch.linspace(0, 1, 11).tolist()
    cine = torch.cat([blob(2 * time**2) for time in times], dim=1)
    curve = fit_time_curve(network, [cine, cine.flip(2)], knots=6, candidates=41)
    assert curve == pytest.approx([(k / 5) ** 2 for k in range(6)], abs=0.06)
