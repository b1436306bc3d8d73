from __future__ import annotations

import copy

import pytest
import torch
from made_inputs import images_of
from torch.utils.data import DataLoader

from scripts.corruptions import altered_copies
from scripts.networks.copy_filter import CopyFilter, grey_levels_and_ranks, load_copy_filter
from scripts.networks.orientation import turn


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def textures(number, seed=0, size=32):
    """Images that all differ: smooth noise."""
    coarse = torch.rand(number, 1, 8, 8, generator=seeded(seed))
    return torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")


def small_filter(num_images=64, num_held_out=40, **settings):
    torch.manual_seed(0)
    settings = {"spatial_size": (32, 32), "channels": (8, 8, 16, 16), "size": 16} | settings
    return CopyFilter(num_images, num_held_out, **settings)


@pytest.fixture(scope="module")
def trained():
    """A filter that has seen its 64 images a few times, the images, and held-out ones."""
    torch.manual_seed(0)
    network, training, held_out = small_filter(), textures(64), textures(40, seed=1)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    network.train()
    for step in range(60):
        loss = network.losses(training, None, seeded(step))["contrast"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.calibrate([DataLoader([{"image": image} for image in images], 30) for images in (training, held_out)])
    return network, training, held_out


def test_points_lie_on_the_unit_sphere_whatever_the_batch():
    network, images = small_filter(), textures(5)
    points = network.points(images)
    assert points.shape == (5, 16) and torch.allclose(points.norm(dim=1), torch.ones(5))
    assert torch.allclose(points[2:3], network.points(images[2:3]), atol=1e-5)


def test_training_brings_altered_copies_to_their_images_and_away_from_others(trained):
    network, training, _ = trained

    def loss(network):
        with torch.no_grad():
            return network.losses(training, None, seeded(99))["contrast"]

    assert loss(network) < 0.5 * loss(small_filter())


def test_copies_that_were_turned_and_shifted_are_aligned_with_their_images(trained):
    network, training, _ = trained
    copies, _ = altered_copies(training[:16], seeded(7), ("turn", "shift"), share=1.0)
    similarity, numbers = network.nearest(copies)
    assert (numbers == torch.arange(16)).float().mean() >= 0.8
    unaligned = (network.points(copies) * network.index[:16]).sum(dim=1) - network.common[:16] / 10
    assert (similarity - unaligned).mean() > 0.2 and (similarity >= unaligned - 1e-5).all()


def test_ranks_are_alike_whatever_the_contrast():
    image = (255 * textures(4)).round() / 255
    levels = grey_levels_and_ranks(image)
    assert torch.equal(levels[:, :1], image) and levels.shape == (4, 2, 32, 32)
    assert torch.allclose(levels[:, 1].flatten(1).mean(dim=1), torch.full((4,), 0.5), atol=1e-6)
    darker = grey_levels_and_ranks((255 * (image / 2 + 0.25)).round() / 255)
    assert (darker[:, 1] - levels[:, 1]).abs().max() < 0.02
    assert torch.equal(grey_levels_and_ranks(torch.zeros(1, 1, 4, 4))[:, 1], torch.full((1, 4, 4), 0.5))


def test_the_index_holds_the_points_of_the_training_images_and_a_training_image_finds_itself(trained):
    network, training, _ = trained
    assert torch.allclose(network.index, network.points(training), atol=1e-5)
    similarity, numbers = network.nearest(training[7:9])
    assert numbers.tolist() == [7, 8] and torch.allclose(similarity, 1 - network.common[7:9] / 10, atol=1e-5)


def test_what_is_common_is_the_similarity_to_the_most_similar_of_the_other_training_images(trained):
    network, training, _ = trained
    points = network.points(training)
    likeness = torch.stack([network.points(turn(training, orientation)) @ points.T for orientation in range(8)]).amax(dim=0)
    likeness.fill_diagonal_(0)
    assert torch.allclose(network.common, likeness.amax(dim=0), atol=1e-3)
    assert torch.equal(network.common.half().float(), network.common)


def test_a_training_image_that_is_alike_to_many_has_to_be_more_alike_to_count(trained):
    network, training, _ = trained
    other, image = copy.deepcopy(network), altered_copies(training[7:8], seeded(), ("blur", "noise"), share=1.0)[0]
    before = network.nearest(image)[0]
    other.common[7] += 0.2
    assert torch.allclose(other.nearest(image)[0], before - 0.02, atol=1e-5)


def test_no_more_held_out_images_than_the_rate_are_above_the_limit(trained):
    network, _, held_out = trained
    similarity = network.nearest(held_out)[0]
    assert (network.held_out >= similarity).all() and (network.held_out - similarity).max() <= 1 / 2048
    assert torch.equal(network.held_out.half().float(), network.held_out)
    for rate in (0.03, 0.1, 0.5):
        assert (similarity > network.limit(rate)).float().mean() <= rate
    assert network.limit(0.5) < network.limit(0.1) < network.limit(0.03)


def test_a_mirrored_or_turned_copy_is_as_similar_as_the_image_itself(trained):
    network, training, _ = trained
    for orientation in range(8):
        similarity, numbers = network.nearest(turn(training[7:9], orientation))
        expected = 1 - network.common[7:9] / 10
        assert numbers.tolist() == [7, 8] and torch.allclose(similarity, expected, atol=1e-4), orientation


def test_gain_and_offset_of_the_grey_levels_change_a_point_little():
    network, image = small_filter(), textures(4) / 2
    assert (network.points(image) * network.points(0.8 * image + 0.1)).sum(dim=1).min() > 0.99


def test_an_image_that_is_not_square_is_refused():
    with pytest.raises(ValueError, match=r"have to be square, got \(32, 64\)"):
        small_filter(spatial_size=(32, 64))


def test_a_rate_that_so_few_held_out_images_cannot_tell_is_refused(trained):
    with pytest.raises(ValueError, match=r"a rate of 0.01 can't be told by 40 values; the least that can is 0.024"):
        trained[0].limit(0.01)


def test_losses_depend_on_the_generator_alone():
    network, images = small_filter(), textures(6)
    first, again, other = (network.losses(images, None, seeded(seed))["contrast"] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_file_is_loaded_whatever_the_number_of_its_images(tmp_path):
    network = CopyFilter(5, 3, size=32)
    network.index.copy_(torch.rand(5, 32))
    torch.save(
        {name: v.half() if v.is_floating_point() else v for name, v in network.state_dict().items()}, tmp_path / "f.pt"
    )
    loaded = load_copy_filter(tmp_path / "f.pt")
    assert torch.equal(loaded.index, network.index.half().float()) and not loaded.training
    assert loaded.nearest(images_of(2))[0].shape == (2,)


def test_a_missing_wrong_or_unfit_file_is_told_with_what_to_do(tmp_path):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pt")
    torch.save(CopyFilter(5, 3, spatial_size=(32, 32)).state_dict(), tmp_path / "small.pt")
    for name, fault in (
        ("none.pt", "no such file"),
        ("other.pt", "not the weights of a copy filter"),
        ("small.pt", "was made for images of 32 x 32 pixels"),
    ):
        with pytest.raises(ValueError, match=rf"{name}: {fault}; train one .*give its file as --copy_weights"):
            load_copy_filter(tmp_path / name)
