"""Tests of the diffusion deformable model."""

import pytest
import torch
from made_inputs import SMALL_DEFORMABLE as SMALL
from made_inputs import ball_pair as pair

from scripts.networks.deformable_diffusion import DeformableDiffusionNet

SIZE = (16, 16, 8)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def moved(network, shift):
    """The network with a code of ones, and fields that are the code along the first axis, ``shift`` voxels long."""

    class Field(torch.nn.Module):
        def prepare(self, source, code):
            return code

        def along(self, code, factors):
            length = shift * torch.stack([factor * code for factor in factors], dim=1)
            return torch.cat([length, torch.zeros_like(length), torch.zeros_like(length)], dim=2)

    class Code(torch.nn.Module):
        def forward(self, x, t):
            return 1 - (x[:, 2:] - x[:, :1])  # beside the difference of noised target and source

    network.deformation, network.diffusion = Field(), Code()
    return network


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_scales_the_code_along_the_way():
    network = moved(DeformableDiffusionNet(**SMALL, reduction=1, gammas=[0.0, 0.5, 1.0]), shift=2.0)
    image = torch.rand(1, 2, *SIZE)
    frames = network(image)
    assert torch.allclose(frames[:, 1, :-1], image[:, 0, 1:], atol=1e-6)  # a whole voxel
    assert torch.allclose(frames[:, 2, :-2], image[:, 0, 2:], atol=1e-6)


def test_leaves_the_field_of_the_target_as_the_deformation_module_gives_it():
    network, image = DeformableDiffusionNet(**SMALL, gammas=[1.0]), pair()
    with torch.no_grad():
        code = network.noise(image[:, :1], image[:, 1:], image[:, 1:], torch.zeros(1))
        expected = network.deformation(torch.cat([image[:, :1], code], dim=1))
    assert torch.allclose(network.displace(image), expected[:, None], atol=1e-5)


def test_estimates_the_noise_of_the_noised_target():
    network, image = DeformableDiffusionNet(**SMALL), pair()
    drawn = []
    network.noise = lambda source, target, noised, t: drawn.append((noised, t)) or torch.zeros_like(target)
    losses = network.losses(image, None, generator())
    noised, t = drawn[0]
    a = network.alphas_cumprod[t].float()
    noise = (noised - a.sqrt() * image[:, 1:]) / (1 - a).sqrt()
    assert losses["noise"].item() == pytest.approx(noise.square().mean().item(), rel=1e-3)
    assert 1 <= t.item() <= 2000


def test_makes_the_code_as_at_inference_in_the_clean_share_of_the_training():
    network, image = DeformableDiffusionNet(**SMALL, clean_share=1.0), pair()
    drawn = []
    network.noise = lambda source, target, noised, t: drawn.append((noised, t)) or torch.zeros_like(target)
    assert network.losses(image, None, generator())["noise"] == 0
    assert torch.equal(drawn[0][0], image[:, 1:]) and drawn[0][1] == 0


def test_the_code_is_the_difference_what_the_network_says_or_both():
    image = pair()
    source, target, t = image[:, :1], image[:, 1:], torch.zeros(1)
    codes = {}
    for code in ("both", "network", "difference"):
        torch.manual_seed(0)
        network = DeformableDiffusionNet(**SMALL, code=code)
        torch.nn.init.normal_(network.diffusion.out[-1].conv.weight)  # it begins with zeros
        codes[code] = network.noise(source, target, target, t).detach()
    assert torch.equal(codes["difference"], target - source) and codes["network"].abs().max() > 0
    assert torch.allclose(codes["both"], codes["network"] + codes["difference"], atol=1e-6)
    with pytest.raises(ValueError, match="code must be one of both, network, difference, got none"):
        DeformableDiffusionNet(**SMALL, code="none")


def test_has_the_noise_levels_of_the_paper():
    table = DeformableDiffusionNet(**SMALL).alphas_cumprod
    assert len(table) == 2001
    assert 1 - table[1] == pytest.approx(1e-6)
    assert 1 - table[-1] / table[-2] == pytest.approx(1e-2)


def test_draws_the_same_from_the_same_seed():
    network, image = DeformableDiffusionNet(**SMALL, frames_weight=1.0), torch.rand(1, 5, *SIZE)
    first, second = (network.losses(image, None, generator(3)) for _ in range(2))
    assert first == second
