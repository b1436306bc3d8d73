"""The inferer runs the network of the configuration with the weights of the one it is called with."""

from __future__ import annotations

import torch
from monai.inferers import SliceInferer
from torch import nn

from scripts.inferers import ConfiguredSliceInferer

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
