from __future__ import annotations

import pytest
import torch

from scripts.engines import _generator
from scripts.networks.segmentation_direct import DeepEnsembleNet, DirectSegmentationNet, MembersLoader

SMALL = {"spatial_size": (16, 16), "fold": 2, "channels": (16, 32)}


def make_network(seed: int = 0, **settings: object) -> DirectSegmentationNet:
    torch.manual_seed(seed)
    network = DirectSegmentationNet(**SMALL | settings).eval()
    for parameter in network.parameters():  # the last layers begin at zero
        parameter.data += 0.05 * torch.randn_like(parameter)
    return network


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    return torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 0.8 + 0.15


def test_one_sample_is_the_network_without_dropout(image):
    network = make_network(num_samples=1, dropout=0.5)
    output = network(image)
    torch.testing.assert_close(output[:, :1], network.unet(2 * image - 1).sigmoid())
    assert output.shape == (4, 4, 16, 16) and not output[:, 1].any()


def test_several_samples_are_dropouts_that_all_slices_share(image):
    network = make_network(num_samples=3, dropout=0.5)
    whole = network(image)
    assert whole[:, 1].max() > 1e-3
    torch.testing.assert_close(network(image[2:3]), whole[2:3], rtol=1e-4, atol=1e-5)
    same = network(image[:1].expand(4, -1, -1, -1))
    torch.testing.assert_close(same, same[:1].expand_as(same), rtol=1e-4, atol=1e-5)


def test_training_drops_by_the_generator_and_validation_does_not(image):
    network, label = make_network(dropout=0.5), (image[:, :1] > 0.5).float()
    losses = [network.losses(image, label, _generator(n))["dice_ce"].item() for n in (0, 1)]
    assert losses[0] == losses[1]
    network.train()
    losses = [network.losses(image, label, _generator(n))["dice_ce"].item() for n in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_a_deep_ensemble_has_a_sample_of_each_member(image, tmp_path):
    members = [make_network(seed, num_samples=1) for seed in (1, 2, 3)]
    for number, member in enumerate(members):
        torch.save(member.state_dict(), tmp_path / f"{number}.pt")
    member = {key: SMALL[key] for key in ("fold", "channels")}
    ensemble = DeepEnsembleNet(spatial_size=(16, 16), num_samples=3, member=member).eval()
    MembersLoader(ensemble, [str(tmp_path / f"{number}.pt") for number in range(3)])(None)
    output = ensemble(image)
    assert output.shape == (4, 6, 16, 16)
    for number, member in enumerate(members):
        torch.testing.assert_close(output[:, 3 + number], member(image)[:, 0])
