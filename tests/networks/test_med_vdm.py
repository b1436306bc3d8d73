from __future__ import annotations

import pytest
import torch

from scripts.losses import discretised_logistic
from scripts.networks.med_vdm import FIRST_STD, DenseCodec, DenseScore, FiLMBlock
from scripts.networks.variational_diffusion import VariationalDiffusionNet

RANGE = (-13.3, 5.0)
GAMMA_0 = torch.tensor(-13.3)


def codec(num_classes=None):
    torch.manual_seed(0)
    return perturbed(DenseCodec((8, 6), 5, 16, 2, RANGE, num_classes))


def perturbed(module):
    """The module with random weights, those included that start at zero."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def images(count=3):
    return (torch.rand(count, 1, 8, 6, generator=torch.Generator().manual_seed(0)) * 255).round() / 255


def test_a_block_begins_as_the_identity_and_the_condition_moves_it_later():
    block, x = FiLMBlock(6, 4), torch.randn(2, 6)
    assert torch.equal(block(x, torch.randn(2, 4)), x)
    block = perturbed(block)
    assert not torch.allclose(block(x, torch.zeros(2, 4)), block(x, torch.ones(2, 4)))


def test_an_image_becomes_as_many_numbers_as_were_asked_for_and_an_image_again():
    net = codec()
    f = net.encode(images(), GAMMA_0, None)
    restored = net.decode(f, GAMMA_0, None)
    assert f.shape == (3, 5) and restored.shape == (3, 1, 8, 6)
    assert 0 < restored.min() and restored.max() < 1


def test_the_paper_sizes_are_six_blocks_of_the_codec_and_ten_of_the_score():
    net = VariationalDiffusionNet(model="medvdm", hidden_size=64)
    assert [len(part.blocks) for part in (net.codec.encoder, net.codec.decoder, net.score.network)] == [6, 6, 10]
    assert net.codec.latent_shape == (64,) and net.score.network.first.out_features == 128


def test_the_codec_begins_as_the_principal_components():
    torch.manual_seed(0)
    net = DenseCodec((8, 6), 5, 16, 2, RANGE, None)
    amounts, patterns = torch.randn(200, 3) * torch.tensor([3.0, 1.0, 0.3]), torch.linalg.qr(torch.randn(48, 3)).Q.T
    image = (0.5 + 0.02 * amounts @ patterns).view(200, 1, 8, 6)
    net.begin_linear(image)
    f = net.encode(image, GAMMA_0, None)
    torch.testing.assert_close(f[:, :3].T.cov(), FIRST_STD**2 * torch.eye(3), atol=1e-5, rtol=0.02)
    assert (net.decode(f, GAMMA_0, None) - image).abs().max() < 3e-4


def test_a_codec_is_not_begun_with_fewer_images_than_it_has_numbers():
    with pytest.raises(ValueError, match="4 images .* fewer than the 5 latent variables: .*latent_size"):
        codec().begin_linear(images(4))
    with pytest.raises(ValueError, match=r"hidden_size \(4\) must be at least latent_size \(5\)"):
        DenseCodec((8, 6), 5, 4, 2, RANGE, None)


def test_the_likelihood_is_that_of_a_bernoulli_distribution_of_each_pixel():
    net, z = codec(), torch.randn(3, 5)
    p = net.decode(z, GAMMA_0, None)
    expected = -(images() * p.log() + (1 - images()) * (1 - p).log()).sum(dim=(1, 2, 3))
    torch.testing.assert_close(net.negative_log_likelihood(images(), z, GAMMA_0, None)[0], expected)


def test_the_8_bit_likelihood_is_that_of_the_same_mean_and_one_scale():
    net, z = codec(), torch.randn(3, 5)
    net.grey_scale.fill_(0.02)
    expected = -discretised_logistic(images(), net.decode(z, GAMMA_0, None), 0.02).sum(dim=(1, 2, 3))
    torch.testing.assert_close(net.negative_log_likelihood(images(), z, GAMMA_0, None)[1]["recon_8bit"], expected)


def test_the_output_of_a_new_score_network_is_added_to_its_input():
    net = DenseScore(5, 16, 3, RANGE, None)
    torch.nn.init.zeros_(net.network.last.weight)
    torch.nn.init.zeros_(net.network.last.bias)
    z = torch.randn(2, 5)
    assert torch.equal(net(z, torch.tensor([-3.0, 2.0])), z)


def test_the_score_depends_on_the_time_and_on_the_class():
    torch.manual_seed(0)
    net, z = perturbed(DenseScore(5, 16, 2, RANGE, 3)), torch.randn(1, 5)
    by = [net(z, torch.tensor([g]), torch.tensor([c])) for g, c in ((-3.0, 0), (2.0, 0), (-3.0, 2))]
    assert not torch.allclose(by[0], by[1]) and not torch.allclose(by[0], by[2])


def test_the_class_reaches_the_encoder_and_the_decoder():
    net, z = codec(num_classes=2), torch.randn(1, 5)
    for call, x in ((net.encode, images(1)), (net.decode, z)):
        assert not torch.allclose(call(x, GAMMA_0, torch.tensor([0])), call(x, GAMMA_0, torch.tensor([2])))
