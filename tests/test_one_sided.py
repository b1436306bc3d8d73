"""The score of what is bright on one side of a head alone."""

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from scipy import ndimage

from scripts.one_sided import OneSided, OneSidedd

USUAL = {"50": 0.02, "90": 0.2, "100": 0.4}


def slice_with(*spots, turn=0.0, level=0.8):
    """A slice (columns, rows): skull, brain, and bright discs at these columns and rows."""
    x, y = np.mgrid[:64, :64].astype(np.float32) - 31.5
    r = np.hypot(x / 18, y / 22)
    image = np.full((64, 64), 0.098, np.float32)
    image[r < 1], image[r < 0.88] = 1.0, 0.49
    for column, row in spots:
        image[np.hypot(x - column + 31.5, y - row + 31.5) < 3] = level
    return ndimage.rotate(image, turn, reshape=False, order=1, cval=0.098)


@pytest.mark.parametrize("turn", [0, 15])
def test_a_spot_on_one_side_counts_and_one_on_each_side_does_not(turn):
    plain, one, both = (slice_with(*spots, turn=turn) for spots in ((), [(25, 30)], [(25, 30), (38, 30)]))
    score = OneSided(USUAL).score
    assert score(one, plain) == pytest.approx(0.31, abs=0.04)
    assert score(both, plain) < 0.1 and score(plain, plain) < 0.03


def test_what_is_not_healed_is_dark_or_at_the_rim_does_not_count():
    score, plain, spot = OneSided(USUAL).score, slice_with(), slice_with((25, 30))
    assert score(spot, spot) < 0.03
    assert score(slice_with((25, 30), level=0.2), plain) < 0.05
    at_rim = slice_with((18, 31))
    assert score(at_rim, plain) < 0.05 and OneSided(USUAL, rim=3).score(at_rim, plain) > 0.1


def test_slices_without_a_head_or_a_healed_version_get_zero():
    spot, nothing = slice_with((25, 30)), np.zeros((64, 64), np.float32)
    assert OneSided(USUAL)(nothing, nothing) == OneSided(USUAL)(spot, nothing) == 0


def test_the_scale_is_that_of_healthy_slices_and_a_case_allows_for_their_number():
    one_sided = OneSided(USUAL)
    spot = slice_with((25, 30))
    score = one_sided.score(spot, slice_with())
    assert one_sided(spot, slice_with()) == pytest.approx(score / (score + 0.2))
    assert one_sided.of_case(torch.tensor([0.5])) == pytest.approx(0.5, abs=1e-6)
    assert one_sided.of_case(torch.tensor([0.5] + [0.1] * 30)) < 0.4


@pytest.mark.parametrize("usual", [{"50": 0.0}, {"50": 0.3, "97.5": 0.2}])
def test_a_scale_that_is_none_is_refused(usual):
    with pytest.raises(ValueError, match="must rise"):
        OneSided(usual)


def test_each_slice_of_a_volume_gets_its_own_score():
    image, healthy = (
        np.stack(slices, axis=-1)[None] for slices in ((slice_with(), slice_with((25, 30))), [slice_with()] * 2)
    )
    affine = np.diag([2.0, 2.0, 5.0, 1.0])
    data = {"image": MetaTensor(image, affine=affine), "healthy": MetaTensor(healthy, affine=affine)}
    result = OneSidedd("image", OneSided(USUAL))(data)["one_sided"]
    assert result.shape == (1, 64, 64, 2) and np.allclose(result.affine, affine)
    assert result[..., 1].min() == result[..., 1].max() > 0.5 > 0.2 > result[..., 0].max()
