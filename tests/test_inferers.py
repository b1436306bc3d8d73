"""The inferers run the network of the configuration with the weights of the one they are called with."""

from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor, list_data_collate
from monai.inferers import SliceInferer
from stand_in import Shrinking
from torch import nn

from scripts.inferers import ConfiguredSliceInferer, DisplacementInferer, run_in_batches

SLICES = {"roi_size": (4, 4), "spatial_dim": 2, "sw_batch_size": 2}


class Scaled(nn.Module):
    """A network with one weight and one setting."""

    def __init__(self, weight: float, setting: float) -> None:
        super().__init__()
        self.weight, self.setting = nn.Parameter(torch.tensor(weight)), setting

    def forward(self, image):
        return image * self.weight * self.setting


def test_the_settings_are_those_of_the_configuration_and_the_weights_those_of_the_network():
    volume, network = torch.rand(1, 1, 4, 4, 3), Scaled(weight=2.0, setting=1.0).eval()
    configured = Scaled(weight=7.0, setting=5.0)
    result = ConfiguredSliceInferer(network_def=configured, **SLICES)(volume, network)
    torch.testing.assert_close(result, volume * 10)
    assert not configured.training and network.setting == 1


def test_the_network_of_the_configuration_itself_is_run_as_it_is():
    volume, network = torch.rand(1, 1, 4, 4, 3), Scaled(weight=2.0, setting=3.0)
    result = ConfiguredSliceInferer(network_def=network, **SLICES)(volume, network)
    assert torch.equal(result, SliceInferer(**SLICES)(volume, network)) and network.training


def test_images_are_run_in_batches_in_evaluation_mode_and_in_their_order():
    network, images = Scaled(weight=2.0, setting=3.0).train(), torch.rand(5, 1, 4, 4)
    output, seconds = run_in_batches(network, images, batch_size=2)
    assert torch.equal(output, images * 6) and not output.requires_grad and not network.training and seconds > 0


def test_a_network_without_parameters_is_run_in_batches_too():
    network, images = torch.nn.BatchNorm2d(1, affine=False), torch.rand(3, 1, 4, 4)
    output, _ = run_in_batches(network, images, batch_size=2)
    torch.testing.assert_close(output, images, rtol=1e-4, atol=1e-5)


def pair(num_frames=None):
    """Source and target as they come from a loader."""
    image = MetaTensor(torch.rand(2, 8, 7, 6), meta={"num_frames": num_frames} if num_frames else {})
    return list_data_collate([{"image": image}])["image"]


def test_displacements_come_in_voxels_frame_by_frame_with_the_weights_of_the_network():
    network, configured = Shrinking(rate=0.5), Shrinking(rate=0.1)
    result = DisplacementInferer(network_def=configured, num_frames=3)(pair(), network)
    assert result.shape == (1, 9, 8, 7, 6) and not result[:, :3].any()
    assert torch.allclose(result[0, 6, :, 0, 0], 0.5 * (torch.arange(8.0) - 3.5))
    assert torch.allclose(result[:, 3:6], result[:, 6:] / 2)


@pytest.mark.parametrize(
    ("settings", "in_cine", "expected"),
    [
        ({"num_frames": 3}, 12, [0, 0.5, 1]),
        ({"num_frames": 3, "gammas": [0.25, 1]}, 12, [0.25, 1]),
        ({}, 5, [0, 0.25, 0.5, 0.75, 1]),
        ({"default_frames": 3}, 2, [0, 0.5, 1]),
        ({"default_frames": 3}, None, [0, 0.5, 1]),
    ],
)
def test_the_frames_are_those_of_the_settings_or_as_many_as_the_cine_has(settings, in_cine, expected):
    network = Shrinking(rate=1.0)
    result = DisplacementInferer(network_def=network, **settings)(pair(in_cine), network)
    assert (result[0, ::3, -1, 0, 0] / 3.5).tolist() == pytest.approx(expected)


def test_fewer_than_two_frames_are_refused():
    with pytest.raises(ValueError, match="num_frames must be 2 at least"):
        DisplacementInferer(network_def=Shrinking(), num_frames=1)
