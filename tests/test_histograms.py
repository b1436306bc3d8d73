"""Grey levels of framed heads are brought nearer to a histogram, and back."""

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from scripts.histograms import MatchHistogramd, head_quantiles
from scripts.transforms import RestoreIntensityd

AIR = 0.1
REFERENCE = [AIR, 0.3, 0.45, 0.5, 0.6, 1.0]


def heads(contrast=1.0, slices=2, spot=False, **meta):
    """Framed discs (1, W, H, D) whose tissue rises from left to right around 0.5, in a ring of bone."""
    x, y = np.mgrid[:64, :64] - 31.5
    image = np.clip(0.5 + contrast * x / 100, AIR, 0.9)
    r = np.hypot(x, y)
    image[r > 20], image[r > 24] = 0.95, AIR
    if spot:
        image[np.hypot(x - 8, y) < 3] = 0.8
    meta = {"framed": True, "units": "grey", "intensity_scale": [255.0], "intensity_offset": [0.0], **meta}
    return MetaTensor(torch.tensor(image, dtype=torch.float32)[None, ..., None].repeat(1, 1, 1, slices), meta=meta)


def matched(image, share=1.0):
    return MatchHistogramd("image", REFERENCE, share)({"image": image})["image"]


def quantiles(image):
    return head_quantiles(image[0].numpy().transpose(2, 1, 0), len(REFERENCE))


@pytest.mark.parametrize("contrast", [0.2, 1.0])
def test_the_quantiles_of_heads_become_those_of_the_reference_as_far_as_the_share_says(contrast):
    image = heads(contrast)
    assert quantiles(matched(image))[1:-1] == pytest.approx(REFERENCE[1:-1], abs=0.01)
    halfway = (quantiles(image) + REFERENCE) / 2
    assert quantiles(matched(image, 0.5))[1:-1] == pytest.approx(halfway[1:-1], abs=0.01)


def test_air_stays_and_the_order_of_grey_levels_too():
    image = heads(0.3, spot=True)
    result = matched(image)
    assert (result[image == AIR] - AIR).abs().max() < 1e-4 and result.min() > AIR - 1e-4 and result.max() < 1 + 1e-4
    order = image.flatten().argsort()
    assert (result.flatten()[order].diff() > -1e-6).all()
    assert result[0, 40, 32, 0] > result[0, 50, 32, 0] > result[0, 20, 32, 0], "the spot is brighter than the tissue"


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_the_curve_is_the_way_back(share):
    image = heads(0.3, spot=True)
    restored = RestoreIntensityd("image")({"image": matched(image, share)})["image"]
    torch.testing.assert_close(restored.as_tensor(), 255 * image.as_tensor(), rtol=0, atol=0.02)


@pytest.mark.parametrize("meta", [{"framed": False}, {"units": "hounsfield"}])
def test_unframed_slices_and_hounsfield_units_stay(meta):
    image = heads(0.3, **meta)
    assert matched(image) is image


def test_no_share_and_no_head_change_nothing():
    image, empty = heads(0.3), heads() * 0 + AIR
    assert matched(image, 0.0) is image and torch.equal(matched(empty), empty)


@pytest.mark.parametrize(
    ("reference", "share", "told"),
    [(REFERENCE, 1.5, r"in \[0, 1\], got 1.5"), ([0.1, 0.5, 0.5, 1.0], 0.5, "must rise, got"), ([0.1], 0.5, "must rise")],
)
def test_a_wrong_share_or_reference_is_refused(reference, share, told):
    with pytest.raises(ValueError, match=told):
        MatchHistogramd("image", reference, share)
