from __future__ import annotations

import pytest
import torch

from scripts.networks.slice_network import SliceNetwork, brightness_map


class Halved(SliceNetwork):
    """A made method: half the grey level is healthy, the other half the anomaly."""

    def analyse(self, image):
        assert image.is_contiguous() and image.dtype == torch.float32
        return image.mean(dim=1, keepdim=True) / 2, image / 2, image.mean(dim=(1, 2, 3))


def network(**kwargs):
    return Halved(2, (4, 6), min_foreground=0.5, foreground_level=0.1, **kwargs)


def test_the_output_is_map_healthy_version_and_a_constant_probability():
    image = torch.rand(3, 2, 4, 6, generator=torch.Generator().manual_seed(0)) + 0.1
    output = network()(image)
    assert torch.equal(output[:, :1], image.mean(dim=1, keepdim=True) / 2) and torch.equal(output[:, 1:3], image / 2)
    torch.testing.assert_close(output[:, 3], image.mean(dim=(1, 2, 3)).view(-1, 1, 1).expand(3, 4, 6))


def test_slices_without_foreground_are_zero_and_a_volume_is_a_batch_of_slices():
    volume = torch.rand(2, 2, 4, 6, 3, generator=torch.Generator().manual_seed(0)) + 0.1
    volume[1, ..., 2] = 0.05
    output = network()(volume)
    assert output.shape == (2, 4, 4, 6, 3) and not output[1, ..., 2].any()
    assert all(torch.equal(output[..., i], network()(volume[..., i])) for i in range(3))


@pytest.mark.parametrize("shape", [(1, 1, 4, 6), (1, 2, 6, 4)])
def test_slices_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected slices of shape \(2, 4, 6\)"):
        network()(torch.ones(shape))


def test_every_slice_gets_the_same_noise_which_depends_on_seed_and_stream():
    x = torch.empty(2, 3, 4, 4)
    draws = {(s, i): network(seed=s)._draw(x, network(seed=s)._generator(i)) for s in (0, 1) for i in (0, 1)}
    assert all(torch.equal(noise[0], noise[1]) for noise in draws.values())
    assert len({noise.sum().item() for noise in draws.values()}) == 4


def test_what_is_bright_on_both_sides_counts_half_where_the_sequence_against_it_is_missing():
    flair = torch.zeros(1, 40, 30)
    flair[:, 7:34] = 0.4  # a head, its middle in column 20
    flair[:, 10:13, 5:9] = flair[:, 28:31, 5:9] = 0.9  # fat
    flair[:, 28:31, 20:24] = 0.6  # a lesion
    t1 = torch.where(flair > 0.8, 0.9, flair.clamp(max=0.4))
    both, alone = torch.stack([torch.stack([t1[0], flair[0]]), torch.stack([flair[0], flair[0]])]).split(1)
    expected = torch.zeros(1, 1, 40, 30)
    expected[..., 28:31, 20:24] = 0.2
    torch.testing.assert_close(brightness_map(both, (-1.5, 1.0), 0.0), expected)
    expected[..., 10:13, 5:9] = expected[..., 28:31, 5:9] = 0.25
    torch.testing.assert_close(brightness_map(alone, (-1.5, 1.0), 0.0), expected)
    mixed = brightness_map(torch.cat([alone, both]), (-1.5, 1.0), 0.0)
    torch.testing.assert_close(mixed[1:], brightness_map(both, (-1.5, 1.0), 0.0))
    torch.testing.assert_close(brightness_map(alone, (0.0, 1.0), 0.0), (flair - 0.4).clamp(min=0)[None])
