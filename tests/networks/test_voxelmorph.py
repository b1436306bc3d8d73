"""Tests of VoxelMorph."""

import torch
from made_inputs import ball_pair as pair

from scripts.networks.voxelmorph import VoxelMorphNet

SMALL = {"channels": (4, 4, 4, 4), "out_channels": 4, "final_channels": (4,)}


def test_scales_its_field():
    network = VoxelMorphNet(**SMALL, gammas=[0.5, 1.0])
    half, whole = network.displace(pair()).unbind(1)
    assert torch.allclose(2 * half, whole)
