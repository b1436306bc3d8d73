"""Heads in pictures are brought to the training's frame, and results back to the picture's."""

import logging

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Orientationd
from scipy import ndimage

from scripts.grids import FitSlicesd
from scripts.heads import FrameHeadd, find_head, head_mask, mirrored
from scripts.transforms import RestoreIntensityd


def picture(height=90.0, centre=(100.0, 80.0), angle=0.0, size=(200, 180), background=0.05, tissue=0.3, text=True):
    """Rows and columns: a skull round a brain with a bright spot near its front, a table below it, and a burnt-in mark."""
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
    return MetaTensor(torch.tensor(image, dtype=torch.float32).transpose(0, 1)[None, ..., None], meta=meta)


def framed(image, **settings):
    """Rows and columns of the framed picture."""
    return rows(FrameHeadd("image", (64, 64), **settings)({"image": volume(image)})["image"])


def rows(image):
    """Rows and columns of the first slice (1, W, H, D)."""
    return image[0, ..., 0].T


def head_in(image):
    return find_head(head_mask(image), image)


@pytest.mark.parametrize("angle", [0.0, 0.3, -0.2])
def test_a_head_is_found_wherever_it_lies(angle):
    head = head_in(picture(angle=angle))
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
    image, plain = framed(picture(**settings)), framed(picture())
    assert image.shape == (64, 64)
    assert image[0, 0] == pytest.approx(0.098) and image[60].max() == pytest.approx(0.098)  # neither mark nor table
    assert image[40, 32] == pytest.approx(0.49, abs=0.02)
    mask = head_mask(image.numpy())
    assert find_head(mask, image.numpy()).height == pytest.approx(45, abs=2)
    brain = torch.from_numpy(ndimage.binary_erosion(mask, iterations=6))
    spot = (image > 0.7) & brain
    middle = spot.nonzero().float().mean(dim=0)
    assert middle.tolist() == pytest.approx([31.5 - 0.25 * 45, 31.5], abs=1.5)
    assert (image - plain)[brain & ~spot].abs().median() < 0.02


def test_what_is_found_comes_back_to_its_place_and_grey_levels_to_their_unit():
    original = picture(angle=0.25)
    transform = FrameHeadd("image", (64, 64))
    image = transform({"image": volume(original)})["image"]
    spot = (image > 0.7) * 1.0
    spot[:, :, :14] = spot[:, :, 30:] = 0
    back = transform.inverse({"image": spot})["image"]
    assert back.shape == (1, 180, 200, 1)
    middle = (rows(back) > 0.5).nonzero().float().mean(dim=0)
    expected = (100 - 0.25 * 90 * np.cos(0.25), 80 - 0.25 * 90 * np.sin(0.25))
    assert middle.tolist() == pytest.approx(expected, abs=3)
    restored = RestoreIntensityd("image")(transform.inverse({"image": image}))["image"]
    assert restored[0, 2, 2, 0] == pytest.approx(255 * 0.05, abs=0.5), "beyond the frame it is the picture's background"
    assert restored[0, 80, 110, 0] == pytest.approx(255 * 0.3, abs=3)


def test_what_was_done_before_can_be_undone_too():
    transforms = Compose([Orientationd("image", "RAS", labels=None), FrameHeadd("image", (64, 64))])
    image = transforms({"image": volume(picture())})["image"]
    assert [operation["class"] for operation in image.applied_operations] == ["Orientation", "SpatialResample", "FrameHeadd"]
    assert transforms.inverse({"image": image})["image"].shape == (1, 180, 200, 1)


@pytest.mark.parametrize("units", ["grey", "hounsfield"])
def test_all_slices_of_a_stack_are_moved_alike_by_its_largest_heads(units):
    heads = (picture(height=60.0), picture(height=88.0, angle=0.2), picture(height=90.0, angle=0.2))
    stack = volume(np.stack(heads, axis=-1), units)[..., 0]
    image = FrameHeadd("image", (64, 64))({"image": stack})["image"]
    assert image.shape == (1, 64, 64, 3) and image.meta["framed"]
    found = [head_in(image[0, ..., i].T.numpy()) for i in range(3)]
    assert [head.height for head in found] == pytest.approx([30, 44, 45], abs=2)
    assert [head.angle for head in found] == pytest.approx([-0.2, 0, 0], abs=0.04)


@pytest.mark.parametrize("angle", [0.35, -0.25])
def test_a_head_is_turned_by_its_symmetry_though_one_side_bleeds_and_its_outline_is_round(angle):
    image = picture(angle=0, height=90)
    image[80:110, 84:100] = 0.7
    turned = ndimage.rotate(np.maximum(image[50:150, 30:130], 0), np.rad2deg(angle), reshape=False, order=1, mode="nearest")
    assert head_in(turned).angle == pytest.approx(angle, abs=0.06)


def test_a_mirrored_slice_has_its_sides_exchanged():
    image = picture(angle=0.3, text=False)
    image[95:105, 90:100] = 0.9
    head = head_in(picture(angle=0.3))
    other = mirrored(image, head)
    assert ndimage.center_of_mass(other > 0.85) != pytest.approx(ndimage.center_of_mass(image > 0.85), abs=0.5)
    assert np.abs(mirrored(other, head) - image)[head_mask(image)].mean() < 0.03


def test_pictures_of_the_networks_size_are_left_as_they_are():
    small = picture(height=40.0, centre=(32.0, 32.0), size=(64, 64))
    assert torch.equal(framed(small), rows(volume(small)))
    assert torch.equal(framed(picture(), height=0), rows(volume(picture())))


def test_a_volume_in_the_frame_is_not_brought_to_millimetres_again():
    data = FrameHeadd("image", (64, 64))({"image": volume(picture(), units="hounsfield")})
    fit = FitSlicesd("image", (64, 64), pixdim=4.3)
    result = fit(data)
    assert torch.equal(result["image"], data["image"])
    assert torch.equal(fit.inverse(result)["image"], data["image"])


@pytest.mark.parametrize(("units", "told"), [("grey", "the whole picture"), ("hounsfield", "Hounsfield units?")])
def test_what_shows_no_head_is_left_as_it_is_and_named(caplog, units, told):
    empty = volume(np.full((80, 90), 0.3), units)
    with caplog.at_level(logging.WARNING):
        result = FrameHeadd("image", (64, 64))({"image": empty})["image"]
    assert torch.equal(result, empty) and "framed" not in result.meta
    assert "a.png: no head is found" in caplog.text and told in caplog.text
