"""Tests of the steps of deformable registration."""

import pytest
import torch
from made_inputs import ball_pair

from scripts.networks.registration import Mismatch, refine, to_displacement, warp

SIZE = (16, 16, 8)
SOURCE, TARGET = ball_pair().split(1, dim=1)


def test_a_velocity_that_is_everywhere_alike_is_its_displacement():
    velocity = torch.tensor([1.0, -2.0, 0.5]).view(1, 3, 1, 1, 1).expand(1, 3, *SIZE)
    assert torch.allclose(to_displacement(velocity), velocity, atol=1e-5)
    assert torch.equal(to_displacement(velocity, squarings=0), velocity)
    on_blocks = torch.nn.functional.interpolate(velocity / 2, scale_factor=0.5)  # in voxels of a grid half as fine
    assert torch.allclose(to_displacement(on_blocks, reduction=2), velocity, atol=1e-5)


@pytest.mark.parametrize("reduction", [1, 2])
def test_a_linear_velocity_is_integrated_to_its_exponential(reduction):
    x = torch.arange(32.0) - 15.5
    on_grid = torch.arange(32.0 / reduction) - (32 / reduction - 1) / 2
    velocity = torch.zeros(1, 3, len(on_grid), 16 // reduction, 8 // reduction)
    velocity[:, 0] = (-0.5 * on_grid)[:, None, None]  # dx/dt = -x/2, towards the middle
    displacement = to_displacement(velocity, reduction)[0, 0, :, 8, 4]
    inside = slice(reduction, -reduction)  # beyond its outermost points a grid knows nothing
    assert torch.allclose((x + displacement)[inside], (x * torch.exp(torch.tensor(-0.5)))[inside], atol=0.05)


def test_a_volume_is_taken_from_where_the_displacement_points_and_goes_on_beyond_its_border():
    volume = torch.rand(1, 1, *SIZE)
    shift = torch.zeros(1, 3, *SIZE)
    shift[:, 0] = 2.0
    warped = warp(volume, shift)
    assert torch.allclose(warped[:, :, :-2], volume[:, :, 2:], atol=1e-6)
    assert torch.allclose(warped[:, :, -2:], volume[:, :, -1:].expand(-1, -1, 2, -1, -1), atol=1e-6)


def test_a_field_that_folds_over_costs_something():
    there = torch.arange(SIZE[0], dtype=torch.float32)
    field = torch.zeros(1, 3, *SIZE)
    field[:, 0] = (-1.5 * there)[:, None, None]  # x - 1.5 x: a determinant of -0.5 everywhere
    mismatch = Mismatch(folding=2.0)
    assert mismatch(SOURCE, field, TARGET)["folding"].item() == pytest.approx(1.0)
    assert mismatch(SOURCE, 0.5 * field, TARGET)["folding"] == 0


def test_the_squared_error_costs_the_share_that_the_motion_leaves():
    mismatch, still = Mismatch(squared_error=2.0), torch.zeros(1, 3, *SIZE)
    for target in (TARGET, SOURCE + 0.1 * torch.rand(1, 1, *SIZE)):  # much motion, and hardly any
        assert mismatch(SOURCE, still, target)["squared_error"].item() == pytest.approx(2.0)
    assert mismatch(SOURCE, still, SOURCE)["squared_error"] < 1e-6


def test_what_has_no_weight_is_not_computed():
    still = torch.zeros(1, 3, *SIZE)
    assert Mismatch()(SOURCE, still, SOURCE).keys() == {"similarity", "smoothness"}


def test_a_velocity_is_fitted_to_its_pair_and_no_step_leaves_it_as_it_is():
    def displacements(velocities):
        return to_displacement(velocities.flatten(0, 1)).unflatten(0, velocities.shape[:2])

    zero, mismatch = torch.zeros(1, 1, 3, *SIZE), Mismatch(smoothness=0.1, squared_error=1.0)
    assert torch.equal(refine(zero, SOURCE, TARGET, mismatch, displacements, steps=0), zero)
    with torch.inference_mode():
        refined = refine(zero, SOURCE, TARGET, mismatch, displacements, steps=20)
    left = (warp(SOURCE, displacements(refined)[:, 0]) - TARGET).square().mean()
    assert left < 0.3 * (SOURCE - TARGET).square().mean() and not zero.any()
