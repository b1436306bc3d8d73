"""Tests of the quick gradient of group normalisation."""

import pytest
import torch
from torch import nn

from scripts.networks.quick_norms import QuickGroupNorm, with_quick_norms


@pytest.mark.parametrize(("size", "layout"), [((5, 7), torch.channels_last), ((5, 7, 3), torch.channels_last_3d)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_result_and_gradients_are_pytorchs(size, layout, dtype, tolerance):
    torch.manual_seed(0)
    norm = nn.GroupNorm(2, 6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    quick = QuickGroupNorm(2, 6)
    quick.load_state_dict(norm.state_dict())
    image, wanted = torch.randn(3, 6, *size), torch.randn(3, 6, *size)
    found = []
    for module, x in ((norm.double(), image.double()), (quick.to(dtype), image.to(dtype, memory_format=layout))):
        x.requires_grad_()
        y = module(x)
        y.backward(wanted.to(y))
        found.append([value.double() for value in (y, x.grad, module.weight.grad, module.bias.grad)])
    for expected, value in zip(*found, strict=True):
        assert torch.allclose(value, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


def test_a_network_keeps_its_weights_and_their_names():
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4))
    before = network.state_dict()
    quick = with_quick_norms(network)
    assert isinstance(quick[1], QuickGroupNorm) and list(quick.state_dict()) == list(before)


def test_what_needs_no_gradient_of_the_image_gets_none():
    norm = QuickGroupNorm(2, 4)
    y = norm(torch.randn(1, 4, 5, 5).contiguous(memory_format=torch.channels_last))
    y.square().sum().backward()
    assert norm.weight.grad is not None
