from __future__ import annotations

import pytest
import torch

from scripts.networks.noise_schedules import SCHEDULES, MonotonicSchedule, with_slope

TIMES = torch.linspace(0, 1, 401, dtype=torch.float64)


def schedule(name, spread=0.0):
    """A schedule from -13.3 to 5 whose weights are moved at random, as training might move them."""
    torch.manual_seed(0)
    module = SCHEDULES[name](-13.3, 5.0).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(spread * torch.randn_like(parameter))
    return module


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("spread", [0.0, 0.3, 3.0, 30.0])
def test_gamma_never_falls_whatever_the_weights(name, spread):
    gamma = schedule(name, spread)(TIMES)
    assert gamma.isfinite().all() and (gamma.diff() >= 0).all() and gamma[-1] > gamma[0]


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_new_schedule_runs_from_the_one_end_to_the_other_almost_straight(name):
    gamma = schedule(name)(TIMES)
    assert (gamma[0].item(), gamma[-1].item()) == pytest.approx((-13.3, 5.0), abs=1e-5)
    assert (gamma - (-13.3 + 18.3 * TIMES)).abs().max() < (1.0 if name == "monotonic" else 1e-5)


@pytest.mark.parametrize("spread", [0.3, 3.0, 30.0])
def test_the_ends_of_the_monotonic_network_stay_where_they_are_pinned(spread):
    gamma = schedule("monotonic", spread)(TIMES)
    assert (gamma[0].item(), gamma[-1].item()) == pytest.approx((-13.3, 5.0), abs=1e-9)


def test_the_monotonic_network_can_learn_another_curve():
    torch.manual_seed(0)
    module, wanted = MonotonicSchedule(-10.0, 10.0).double(), 20 * TIMES**3 - 10
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        (module(TIMES) - wanted).square().mean().backward()
        optimizer.step()
    assert (module(TIMES) - wanted).abs().max() < 0.5


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_slope_is_the_derivative_also_where_gradients_are_off(name):
    module = schedule(name, 0.3)
    t = TIMES.clone().requires_grad_()
    (expected,) = torch.autograd.grad(module(t).sum(), t)
    with torch.no_grad():
        gamma, slope = with_slope(module, TIMES)
    torch.testing.assert_close(slope, expected)
    torch.testing.assert_close(gamma, module(TIMES))


@pytest.mark.parametrize("name", ["learned_linear", "monotonic"])
def test_the_slope_has_a_gradient_by_the_weights(name):
    module = schedule(name, 0.3)
    weight = module.log_slope if name == "learned_linear" else module.weight
    _, slope = with_slope(module, TIMES[:5])
    (gradient,) = torch.autograd.grad(slope.square().sum(), weight)
    first = weight.data.flatten()[0].item()
    moved = []
    for step in (1e-5, -1e-5):
        weight.data.view(-1)[0] = first + step
        moved.append(with_slope(module, TIMES[:5])[1].square().sum().item())
    assert gradient.flatten()[0].item() == pytest.approx((moved[0] - moved[1]) / 2e-5, rel=1e-4)
