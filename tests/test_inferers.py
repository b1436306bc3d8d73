"""The inferers run the network of the configuration with the weights of the one they are called with."""

from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor, list_data_collate
from monai.inferers import SliceInferer
from stand_in import BrightAreCopies, Shrinking
from torch import nn

from scripts.inferers import ConfiguredSliceInferer, DisplacementInferer, RedrawingInferer, redraw, run_in_batches
from scripts.noise import stream_of

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


# --- images that are drawn again


class Brightness(nn.Module):
    """An image is as bright as its noise is in the mean; class 1 is half as bright."""

    def forward(self, noise, label=None):
        grey = torch.sigmoid(4 * noise.flatten(1).mean(dim=1)).view(-1, 1, 1, 1).expand_as(noise)
        return grey if label is None else grey * (1 - 0.5 * label.view(-1, 1, 1, 1))


def noise_of(number=12, bright=()):
    noise = torch.randn(number, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    noise[list(bright)] += 3
    return noise


def test_an_image_that_is_taken_for_a_copy_is_drawn_again_from_noise_of_its_own_and_the_others_stay():
    noise, network = noise_of(bright=(2, 5)), Brightness()
    images = network(noise)
    drawn = redraw(network, noise, images, BrightAreCopies(0.6), rate=0.01, rounds=50)
    for i in range(len(noise)):
        assert drawn.similarity[i] <= 0.6 and not drawn.copy[i]
        if not drawn.redraws[i]:
            assert images[i].mean() <= 0.6 and torch.equal(drawn.images[i], images[i])
            continue
        again = torch.randn(1, 4, 4, generator=stream_of(noise[i], f"redraw {drawn.redraws[i]}"))
        assert torch.equal(drawn.images[i], network(again[None])[0])
    assert drawn.redraws[2] > 0 and drawn.redraws[5] > 0


def test_what_is_drawn_again_does_not_depend_on_the_images_beside_it():
    noise, network = noise_of(bright=(2, 5)), Brightness()
    together, alone = (redraw(network, part, network(part), BrightAreCopies(0.6), 0.01, 50) for part in (noise, noise[5:6]))
    assert torch.equal(together.images[5], alone.images[0]) and together.redraws[5] == alone.redraws[0]


def test_the_least_similar_image_stays_where_no_round_helps_and_is_told():
    noise, network = noise_of(3), Brightness()
    drawn = redraw(network, noise, network(noise), BrightAreCopies(0.0), rate=0.01, rounds=4)
    assert drawn.copy.all() and drawn.redraws.tolist() == [4, 4, 4]
    for i in range(3):
        tried = [noise[i], *(torch.randn(1, 4, 4, generator=stream_of(noise[i], f"redraw {k}")) for k in (1, 2, 3, 4))]
        least = min(network(one[None]).mean().item() for one in tried)
        assert drawn.similarity[i].item() == pytest.approx(least) == drawn.images[i].mean().item()


def test_the_class_of_an_image_is_that_of_its_redraws():
    noise, label = noise_of(4, bright=(0, 1, 2, 3)), torch.tensor([0, 1, 0, 1])
    inferer = RedrawingInferer(BrightAreCopies(0.45), rounds=50)
    drawn = inferer(noise, Brightness(), label=label)
    assert (drawn.meta["redraws"][[0, 2]] > 0).all() and drawn.meta["copy_similarity"].max() <= 0.45
    again = torch.randn(1, 4, 4, generator=stream_of(noise[1], f"redraw {drawn.meta['redraws'][1]}"))
    assert torch.equal(drawn[1].as_tensor(), Brightness()(again[None], torch.tensor([1]))[0])


def test_without_a_filter_the_images_are_what_the_network_draws():
    noise = noise_of(bright=(1,))
    images = RedrawingInferer()(noise, Brightness())
    assert torch.equal(images, Brightness()(noise)) and not isinstance(images, MetaTensor)


def test_a_rate_that_the_filter_cannot_tell_and_a_wrong_cap_are_refused_before_anything_is_drawn():
    with pytest.raises(ValueError, match="a rate of 0 can't be told"):
        RedrawingInferer(BrightAreCopies(), rate=0)
    with pytest.raises(ValueError, match="--copy_rounds must be 0 or more, got -1"):
        RedrawingInferer(BrightAreCopies(), rounds=-1)
