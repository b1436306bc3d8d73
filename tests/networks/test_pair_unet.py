"""Tests of the network of registration."""

import pytest
import torch
from monai.networks.nets import VoxelMorphUNet

from scripts.networks.pair_unet import LeanVoxelMorphUNet, unet_of_pairs

SIZE = (16, 16, 8)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("levels", [2, 3, 4])
def test_gives_what_the_network_of_monai_gives(levels):
    settings = {
        "spatial_dims": 3,
        "unet_out_channels": 6,
        "channels": (4, 5) * levels,
        "final_conv_channels": (3,),
    }
    lean, plain = LeanVoxelMorphUNet(**settings), VoxelMorphUNet(in_channels=2, **settings)
    plain.load_state_dict(lean.state_dict())
    x = torch.randn(2, 2, 16, 32, 16)
    assert torch.allclose(lean(x), plain(x), atol=1e-6)
    lean.lean = False
    assert torch.equal(lean(x), plain(x))


def test_gives_the_same_for_pairs_that_share_their_first_convolution():
    network = unet_of_pairs((4, 4, 4, 4), 4, (4,), 1)
    still, scaled = torch.randn(2, 2, 1, *SIZE)
    pairs = [network(torch.cat([still, factor * scaled], dim=1)) for factor in (0.0, 0.3, 1.0)]
    for network.lean in (True, False):
        fields = network.along(network.prepare(still, scaled), [0.0, 0.3, 1.0])
        assert torch.allclose(fields, torch.stack(pairs, dim=1), atol=1e-6)


def test_gives_the_same_gradient():
    settings = {
        "spatial_dims": 3,
        "unet_out_channels": 4,
        "channels": (4,) * 6,
        "final_conv_channels": (4,),
    }
    lean, plain = LeanVoxelMorphUNet(**settings), VoxelMorphUNet(in_channels=2, **settings)
    plain.load_state_dict(lean.state_dict())
    x = torch.randn(1, 2, *SIZE)
    for network in (lean, plain):
        network(x).square().mean().backward()
    for one, other in zip(lean.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=1e-3, atol=1e-8)
