from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from made_inputs import draw
from PIL import Image

from scripts.tasks.generation.figures import contact_sheet, schedule_figure

pytestmark = pytest.mark.filterwarnings("error")


def test_a_contact_sheet_shows_every_image_upright_and_carries_its_text():
    images = np.zeros((5, 1, 8, 16), np.float32)  # the first axis runs to the right: 8 wide, 16 high
    images[4, 0, :4, :8] = 1.0
    buffer = io.BytesIO()
    contact_sheet(buffer, images, titles=None, columns=3, text={"Description": "made"})
    buffer.seek(0)
    picture = Image.open(buffer)
    assert picture.text == {"Description": "made"}
    white = np.argwhere(np.asarray(picture.convert("L")) > 250)
    (top, left), (bottom, right) = white.min(axis=0), white.max(axis=0) + 1
    assert (bottom - top) / (right - left) == pytest.approx(2, rel=0.1)  # 8 high, 4 wide, in the second row and column
    assert 0.4 < top / picture.height < 0.8 and 0.3 < left / picture.width < 0.6


def test_titles_and_heading_of_a_contact_sheet_are_drawn_beside_the_images():
    images = np.zeros((3, 1, 32, 32), np.float32)
    bare, named = draw(contact_sheet, images), draw(contact_sheet, images, titles=["1", "2", "3"], heading="made")
    assert bare.max() == 0 and (named > 200).any()


def test_the_schedule_figure_shows_how_far_a_schedule_is_from_a_straight_line():
    times = np.linspace(0, 1, 50)
    straight, bent = (draw(schedule_figure, times, 18 * times**power - 13) for power in (1, 3))
    assert straight.shape == bent.shape and (straight != bent).any()
    assert np.array_equal(bent, draw(schedule_figure, torch.from_numpy(times), torch.from_numpy(18 * times**3 - 13)))
