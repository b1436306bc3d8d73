from __future__ import annotations

import pytest
import torch

from scripts.corruptions import ALTERATIONS, altered_copies, foreign_content, inside_of_head, moved, random_blobs


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def heads(number=64, size=64):
    x, y = torch.meshgrid(torch.linspace(-1, 1, size), torch.linspace(-1, 1, size), indexing="ij")
    head = ((x / 0.7) ** 2 + (y / 0.85) ** 2 < 1).float()
    head[28:36, 28:36] = 0.0  # dark inside, as ventricles are
    return head * (0.4 + 0.05 * torch.rand(number, 3, size, size, generator=seeded(9)))


def test_the_inside_of_a_head_has_its_holes_and_not_its_rim():
    inside = inside_of_head(heads(1))[0, 0]
    assert inside[32, 32] and not inside[32, 5] and not inside[9, 32]
    assert 0.6 < inside.sum() / (heads(1)[0, 0] > 0.1).sum() < 1.1


def test_blobs_are_soft_and_inside_and_of_all_sizes_and_some_slices_have_none():
    inside = inside_of_head(heads())
    masks = random_blobs(inside, seeded())
    assert masks.shape == (64, 1, 64, 64) and masks.min() == 0 and masks.max() == 1
    assert not masks[~inside].any()
    area = (masks > 0.5).flatten(1).sum(dim=1)
    assert (area == 0).any() and ((area > 0) & (area < 40)).any() and (area > 400).any()
    assert ((masks > 0.1) & (masks < 0.9)).sum() > 0.05 * (masks > 0.1).sum()


def test_a_slice_without_any_place_for_a_blob_gets_none():
    assert not random_blobs(torch.zeros(4, 1, 64, 64, dtype=torch.bool), seeded()).any()


def test_foreign_content_is_brighter_or_darker_in_each_channel_by_itself_and_leaves_some_as_they_are():
    image = heads()
    content = foreign_content(image, seeded())
    assert content.min() >= 0 and content.max() <= 1
    change = (content - image)[..., 20:26, 40:46].flatten(2).mean(dim=2)
    same = (content == image).flatten(2).all(dim=2)
    assert 0.1 < same.float().mean() < 0.4
    changed = change[~same]
    assert 0.25 < (changed > 0).float().mean() < 0.75
    assert (change.sign()[:, 0] != change.sign()[:, 1]).any()


def test_made_anomalies_come_from_their_seed_alone():
    image = heads(6)
    for make in (lambda seed: foreign_content(image, seed), lambda seed: random_blobs(inside_of_head(image), seed)):
        assert torch.equal(make(seeded(3)), make(seeded(3)))
        assert not torch.equal(make(seeded(3)), make(seeded(4)))


# --- altered copies


def pictures(number=16):
    return torch.rand(number, 1, 24, 24, generator=seeded(5))


def test_a_copy_without_alterations_is_the_image():
    image = pictures()
    assert torch.allclose(altered_copies(image, seeded(), share=0.0)[0], image, atol=1e-5)
    assert torch.allclose(altered_copies(image, seeded(), kinds=())[0], image, atol=1e-5)


def test_a_mirrored_copy_is_left_to_right_and_a_quarter_turn_keeps_every_pixel():
    image = pictures()
    assert torch.allclose(altered_copies(image, seeded(), ("mirror",), 1.0)[0], image.flip(2), atol=1e-5)
    turned, _ = altered_copies(image, seeded(), ("quarter turn",), 1.0)
    by = [
        [torch.allclose(a, torch.rot90(b, k, (1, 2)), atol=1e-4) for k in (1, 2, 3)]
        for a, b in zip(turned, image, strict=True)
    ]
    assert all(any(one) for one in by) and all(any(turn) for turn in zip(*by, strict=True))


@pytest.mark.parametrize("kind", ALTERATIONS)
def test_every_kind_of_alteration_changes_the_image_and_stays_in_range(kind):
    image = pictures()
    copies, _ = altered_copies(image, seeded(), (kind,), 1.0)
    assert copies.shape == image.shape and 0 <= copies.min() and copies.max() <= 1
    assert ((copies - image).abs().flatten(1).amax(dim=1) > 1e-3).all()


def test_an_alteration_comes_to_its_share_of_the_images():
    image = pictures(400)
    changed = (altered_copies(image, seeded(), ("mirror",), 0.3)[0] - image).abs().flatten(1).amax(dim=1) > 1e-3
    assert 0.2 < changed.float().mean() < 0.4


def test_an_unknown_alteration_is_refused():
    with pytest.raises(ValueError, match="unknown alteration 'stretch': choose of mirror, "):
        altered_copies(pictures(), seeded(), ("stretch",))


def test_an_altered_copy_comes_back_by_the_inverse_of_its_pose():
    image = torch.nn.functional.interpolate(torch.rand(8, 1, 6, 6, generator=seeded()), size=(48, 48), mode="bilinear")
    kinds = ("mirror", "quarter turn", "turn", "shift", "crop")
    copies, poses = altered_copies(image, seeded(1), kinds, 1.0)
    back = moved(copies, torch.linalg.inv(poses))
    middle = (slice(None), slice(None), slice(19, 29), slice(19, 29))  # what stays in the image whatever is done
    assert (back[middle] - image[middle]).abs().max() < 0.05 < (copies[middle] - image[middle]).abs().max()
