"""Heads in pictures are brought to the training's frame, and results back to the picture's."""

import logging

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Orientationd
from scipy import ndimage

from scripts.heads import FrameHeadd, find_head, head_mask
from scripts.transforms import RestoreIntensityd


def picture(height=90.0, centre=(100.0, 80.0), angle=0.0, size=(200, 180), background=0.05, tissue=0.3, text=True):
    """A skull round a brain with a bright spot near its front, a table below it, and a burnt-in mark."""
    rows, columns = np.mgrid[: size[0], : size[1]].astype(float)
    y, x = rows - centre[0], columns - centre[1]
    along, across = np.cos(angle) * y + np.sin(angle) * x, np.cos(angle) * x - np.sin(angle) * y
    r = np.hypot(along / (height / 2), across / (0.4 * height))
    image = np.full(size, background)
    image[r < 1] = 1.0
    image[r < 0.85] = tissue
    image[np.hypot(along + 0.25 * height, across) < 0.05 * height] = 0.8
    image[-6:-3, 20:160] = 0.7
    if text:
        image[4:12, 4:12] = 1.0
    return image


def volume(image, units="grey"):
    meta = {"units": units, "intensity_scale": [255.0], "intensity_offset": [0.0], "filename_or_obj": "a.png"}
    return MetaTensor(torch.tensor(image, dtype=torch.float32)[None, ..., None], meta=meta)


def framed(image, **settings):
    return FrameHeadd("image", (64, 64), **settings)({"image": volume(image)})["image"]


@pytest.mark.parametrize("angle", [0.0, 0.3, -0.2])
def test_a_head_is_found_wherever_it_lies(angle):
    head = find_head(head_mask(picture(angle=angle)))
    assert head.centre == pytest.approx((100, 80), abs=1)
    assert head.height == pytest.approx(90, abs=3) and head.angle == pytest.approx(angle, abs=0.03)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"height": 120.0},
        {"centre": (70.0, 95.0)},
        {"angle": 0.3},
        {"background": 0.2, "tissue": 0.55},
        {"size": (150, 300)},
        {"text": False},
        {"centre": (46.0, 80.0)},
    ],
    ids=lambda settings: str(settings),
)
def test_heads_look_alike_whatever_their_size_place_turn_and_window(settings):
    image = framed(picture(**settings))[0, ..., 0]
    plain = framed(picture())[0, ..., 0]
    assert image.shape == (64, 64)
    assert image[0, 0] == pytest.approx(0.098) and image[60].max() == pytest.approx(0.098)  # neither mark nor table
    assert image[40, 32] == pytest.approx(0.49, abs=0.02)
    mask = head_mask(image.numpy())
    assert find_head(mask).height == pytest.approx(45, abs=2)
    brain = torch.from_numpy(ndimage.binary_erosion(mask, iterations=6))
    spot = (image > 0.7) & brain
    middle = spot.nonzero().float().mean(dim=0)
    assert middle.tolist() == pytest.approx([31.5 - 0.25 * 45, 31.5], abs=1.5)
    assert (image - plain)[brain & ~spot].abs().median() < 0.02


def test_what_is_found_comes_back_to_its_place_and_grey_levels_to_their_unit():
    original = picture(angle=0.25)
    transform = FrameHeadd("image", (64, 64))
    image = transform({"image": volume(original)})["image"]
    spot = image.clone()
    spot[:] = (
        (image > 0.7).float() * (torch.arange(64)[None, :, None, None] < 30) * (torch.arange(64)[None, :, None, None] > 14)
    )
    back = transform.inverse({"image": spot})["image"]
    assert back.shape == (1, 200, 180, 1)
    middle = (back[0, ..., 0] > 0.5).nonzero().float().mean(dim=0)
    expected = (100 - 0.25 * 90 * np.cos(0.25), 80 - 0.25 * 90 * np.sin(0.25))
    assert middle.tolist() == pytest.approx(expected, abs=3)
    restored = RestoreIntensityd("image")(transform.inverse({"image": image}))["image"]
    assert restored[0, 2, 2, 0] == pytest.approx(255 * 0.05, abs=0.5), "beyond the frame it is the picture's background"
    assert restored[0, 110, 80, 0] == pytest.approx(255 * 0.3, abs=3)


def test_what_was_done_before_can_be_undone_too():
    transforms = Compose([Orientationd("image", "RAS", labels=None), FrameHeadd("image", (64, 64))])
    image = transforms({"image": volume(picture())})["image"]
    assert [operation["class"] for operation in image.applied_operations] == ["Orientation", "SpatialResample", "FrameHeadd"]
    assert transforms.inverse({"image": image})["image"].shape == (1, 200, 180, 1)


def test_all_slices_of_a_stack_are_moved_by_the_largest_head():
    stack = np.stack([picture(height=60.0), picture(height=90.0)], axis=-1)
    image = FrameHeadd("image", (64, 64))({"image": volume(stack)[..., 0]})["image"][0]
    assert find_head(head_mask(image[..., 1].numpy())).height == pytest.approx(45, abs=2)
    assert find_head(head_mask(image[..., 0].numpy())).height == pytest.approx(30, abs=2)


def test_pictures_of_the_networks_size_and_hounsfield_units_are_left_as_they_are():
    small = picture(height=40.0, centre=(32.0, 32.0), size=(64, 64))
    assert torch.equal(framed(small), volume(small))
    assert torch.equal(framed(picture(), height=0), volume(picture()))
    hounsfield = volume(picture(), units="hounsfield")
    transform = FrameHeadd("image", (64, 64))
    result = transform({"image": hounsfield})
    assert torch.equal(result["image"], hounsfield)
    assert torch.equal(transform.inverse(result)["image"], hounsfield)


def test_a_picture_without_a_head_is_left_as_it_is_and_named(caplog):
    with caplog.at_level(logging.WARNING):
        result = framed(np.full((80, 90), 0.3))
    assert result.shape == (1, 80, 90, 1) and "a.png: no head is found" in caplog.text
