from __future__ import annotations

import numpy as np
import pytest
from conftest import make_whole_head
from scipy import ndimage

from scripts.brains import brain_mask, brain_masks


def overlap(found, true):
    return 2 * (found & true).sum() / (found.sum() + true.sum())


def test_the_brain_of_a_head_is_found():
    image, brain = make_whole_head()
    assert overlap(brain_mask(image), brain) > 0.97


def test_a_part_of_the_brain_is_found_by_the_brain_above_it_and_one_beside_it_is_not():
    image, brain = make_whole_head()
    bone = np.zeros_like(brain)
    bone[:, 40:56] = brain[:, 40:56]
    apart = np.where(bone, 0.05, image)
    parts = brain & ~bone
    assert overlap(brain_mask(apart), parts) < 0.9, "the larger part alone"
    found = brain_masks(np.stack([apart, image], axis=-1))
    assert overlap(found[..., 0], brain) > 0.95, "both parts and what lies between them"
    assert overlap(found[..., 1], brain) > 0.97
    smaller = np.where(np.arange(128) < 56, 0.05, image)  # nothing on that side in the slice above
    assert not brain_masks(np.stack([apart, smaller], axis=-1))[:, :40, 0].any()


def test_a_lesion_that_is_bright_in_every_sequence_and_a_cavity_at_the_surface_are_brain():
    image, brain = make_whole_head()
    lesion, cavity = image.copy(), image.copy()
    lesion[:, 50:75, 50:75] = 0.95
    assert overlap(brain_mask(lesion), brain) > 0.97
    cavity[:, 55:75, 20:45][:, brain[55:75, 20:45]] = 0.05
    assert overlap(brain_masks(cavity[..., None])[..., 0], brain) > 0.95 > overlap(brain_mask(cavity), brain)


def test_neck_and_vertex_that_no_skull_parts_are_no_brain_beyond_that_of_the_next_slices():
    image, brain = make_whole_head()
    unparted = np.where(image.any(axis=0), 0.5, 0.0)[None].repeat(3, axis=0)
    assert brain_masks(unparted[..., None]).sum() > 1.1 * brain.sum(), "taken for itself, nearly the whole head"
    found = brain_masks(np.stack([unparted, image, image, image, image, unparted], axis=-1))
    grown = ndimage.binary_dilation(brain, iterations=4)
    assert all(0.95 * brain.sum() < found[..., k].sum() and not (found[..., k] & ~grown).any() for k in range(6))


@pytest.mark.parametrize("shown", [[0], [7], [0, 7], [3]])
def test_a_brain_is_found_wherever_in_the_volume_it_is_shown(shown):
    image, brain = make_whole_head()
    found = brain_masks(np.stack([image if k in shown else np.zeros_like(image) for k in range(8)], axis=-1))
    assert [overlap(found[..., k], brain) > 0.97 for k in range(8)] == [k in shown for k in range(8)]


@pytest.mark.parametrize("num_sequences", [1, 3])
def test_of_a_scan_whose_skull_was_stripped_all_is_brain(num_sequences):
    image, brain = make_whole_head()
    stripped = np.where(brain, image, 0)[:num_sequences]
    found = brain_masks(np.stack([stripped] * 4, axis=-1))
    assert overlap(found, np.stack([brain] * 4, axis=-1)) > 0.98
    assert overlap(brain_masks(np.stack([image] * 4, axis=-1))[..., 0], brain) > 0.97


def test_where_nothing_is_there_is_no_brain():
    assert not brain_masks(np.zeros((3, 64, 64, 2))).any()
