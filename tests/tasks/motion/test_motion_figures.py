from __future__ import annotations

import io

import numpy as np
import pytest
from conftest import make_cine
from made_inputs import draw, has_color
from PIL import Image

from scripts.tasks.motion.figures import cine_animation, cine_overview, registration_overview, volume_curves

pytestmark = pytest.mark.filterwarnings("error")


def frames(num_frames=4):
    """A made cine and its labels, (F, H, W, D)."""
    return [np.moveaxis(array, -1, 0) for array in make_cine(num_frames)]


def moving(num_frames=4):
    """Displacements (3 F, H, W, D) that grow with the frames, in the last slice alone."""
    field = np.zeros((num_frames, 3, 32, 28, 6), np.float32)
    field[:, 0, 8:24, 8:20, 5] = np.arange(num_frames).reshape(-1, 1, 1)
    return field.reshape(-1, 32, 28, 6)


def test_the_overview_of_a_cine_has_a_row_more_with_real_frames_and_two_runs_give_it_alike():
    cine, labels = frames()
    bare = draw(cine_overview, cine, moving())
    full = draw(cine_overview, cine, moving(), real=cine, labels=labels, title="case 1", spacing=(1.4, 1.4, 10))
    assert len(full) > 1.2 * len(bare)
    for color in ((0, 180, 255), (87, 209, 75), (255, 80, 80)):
        assert has_color(full, color) and not has_color(bare, color)
    again = draw(cine_overview, cine, moving(), real=cine, labels=labels, title="case 1", spacing=(1.4, 1.4, 10))
    assert np.array_equal(full, again)


def test_of_another_number_of_real_frames_both_ends_are_shown():
    cine, _ = frames(4)
    black = [(draw(cine_overview, cine, moving(4), real=frames(count)[0]).max(axis=-1) == 0).mean() for count in (4, 7)]
    assert black[1] > black[0] + 0.05  # the places of the frames between stay empty


@pytest.mark.parametrize("slice_dim", [0, 1, 2])
def test_a_cine_may_have_its_slices_along_any_axis(slice_dim):
    cine, labels = (np.moveaxis(array, -1, slice_dim + 1) for array in frames())
    displacement = np.moveaxis(moving(), -1, slice_dim + 1)
    order = np.argsort([axis for axis in (0, 1, 2) if axis != slice_dim] + [slice_dim])
    spacing = np.array([1.4, 1.4, 10])[order]
    assert draw(cine_overview, cine, displacement, labels=labels, spacing=spacing).std() > 10
    with Image.open(gif_of(cine, spacing=spacing)) as gif:
        assert gif.size[1] == 240


def gif_of(*args, **kwargs):
    buffer = io.BytesIO()
    cine_animation(buffer, *args, **kwargs)
    buffer.seek(0)
    return buffer


def test_the_moving_picture_runs_there_and_back_with_the_real_frames_below():
    cine, _ = frames(4)
    with (
        Image.open(gif_of(cine)) as bare,
        Image.open(gif_of(cine, cine)) as both,
        Image.open(gif_of(cine, cine[:3])) as other,
    ):
        assert bare.n_frames == both.n_frames == 6 and both.size == (bare.width, 2 * bare.height) and other.size == bare.size
        shown = []
        for k in range(6):
            both.seek(k)
            shown.append(np.asarray(both.convert("L")))
    assert np.array_equal(shown[1], shown[5]) and not np.array_equal(shown[1], shown[2])
    assert np.array_equal(shown[2][:240], shown[2][240:])
    assert gif_of(cine).getvalue() == gif_of(cine).getvalue()


def test_volumes_of_each_case_are_a_line():
    few = draw(volume_curves, {"a": [120, 100, 80]})
    more = draw(volume_curves, {"a": [120, 100, 80], "b": [90.0, 70.0]})
    assert few.shape == more.shape and not np.array_equal(few, more)


@pytest.mark.parametrize("slice_dim", [0, 2])
def test_a_registration_shows_both_label_maps_where_they_are(slice_dim):
    cine, labels = (np.moveaxis(array, -1, slice_dim + 1) for array in frames())
    field = np.moveaxis(moving(), -1, slice_dim + 1)[-3:]
    maps = {"label of the fixed volume": labels[-1:], "label, warped": labels[:1]}
    bare = draw(registration_overview, cine[[0, -1]], cine[:1], field, {})
    full = draw(registration_overview, cine[[0, -1]], cine[:1], field, maps, "case 1")
    for color in ((255, 212, 0), (0, 180, 255)):
        assert has_color(full, color) and not has_color(bare, color)


def test_a_registration_without_any_motion_is_drawn():
    cine, _ = frames()
    assert draw(registration_overview, cine[[0, -1]], cine[:1], np.zeros((3, 32, 28, 6), np.float32), {}).std() > 10


def test_a_registration_shows_volumes_of_different_grey_levels_alike():
    cine, _ = frames()
    pair, field = cine[[0, -1]].astype(np.float32), moving()[-3:]
    other = np.stack([pair[0], 100 + 7 * pair[1]])
    drawn = [draw(registration_overview, volumes, pair[:1], field, {}) for volumes in (pair, other)]
    assert np.abs(drawn[0] - drawn[1]).max() <= 2
