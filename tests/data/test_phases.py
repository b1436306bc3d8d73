from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import make_cine

from scripts.data.phases import find_end_systole


def beating(*shrunk, noise=5.0):
    """Frames (F, H, W, D) of a noisy beating heart, one for each share by which its cavity has shrunk."""
    cine = np.moveaxis(make_cine(21)[0], -1, 0)[[round(20 * share) for share in shrunk]]
    return torch.from_numpy(cine + np.random.default_rng(1).normal(0, noise, cine.shape)).float()


TO_END_SYSTOLE = (0, 0.1, 0.4, 0.7, 0.9, 1)
BACK = (0.8, 0.5, 0.3, 0.2, 0.2, 0.1, 0)


def test_of_a_whole_cycle_the_farthest_frame_is_end_systole():
    assert find_end_systole(beating(*TO_END_SYSTOLE, *BACK)) == (5, "the farthest from the first, as the frames come back")


def test_a_cycle_that_is_cut_off_before_it_closes_still_has_its_end_systole():
    assert find_end_systole(beating(*TO_END_SYSTOLE, *BACK[:4]))[0] == 5


def test_of_frames_from_end_diastole_to_end_systole_the_last_one_is_it():
    frame, reason = find_end_systole(beating(*TO_END_SYSTOLE))
    assert frame == 5 and reason.startswith("the last one")
    assert find_end_systole(beating(*TO_END_SYSTOLE, 0.9))[0] == 6  # an expert may call a little later frame so


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_the_unit_of_the_grey_levels_does_not_matter(scale):
    assert find_end_systole(scale * beating(*TO_END_SYSTOLE, *BACK) - 300)[0] == 5


def test_a_cycle_in_reverse_order_has_its_end_systole_where_it_comes_to_lie():
    assert find_end_systole(beating(*TO_END_SYSTOLE, *BACK).flip(0))[0] == len(BACK)


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        (beating(*[0.3] * 8), "by noise alone"),
        (beating(*[0.3] * 8, noise=0), "all frames are the same image"),
        (beating(*TO_END_SYSTOLE).flip(0), "more blood in frame 5, the farthest from frame 0"),
        (beating(*TO_END_SYSTOLE[::-1], *TO_END_SYSTOLE[1:]), "more blood in frame 5"),
        (beating(*TO_END_SYSTOLE, *BACK, *TO_END_SYSTOLE[1:], *BACK), "more than once, as in several heart beats"),
        (beating(0, 0.1, 0.3, 0.6, 1, 0.55), "as far as frame 4 and come back only in part"),
    ],
    ids=["still, with noise", "still", "from end-systole on", "a cycle from end-systole on", "two beats", "half of the way"],
)
def test_what_is_not_clear_is_refused_with_the_reason(frames, words):
    with pytest.raises(ValueError, match=words):
        find_end_systole(frames)
