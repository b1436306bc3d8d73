from __future__ import annotations

import io

import numpy as np
from PIL import Image

from scripts.tasks.segmentation.figures import LABEL_COLOR, MASK_COLOR, SAMPLE_COLOR, overview, reliability_figure


def colours(buffer: io.BytesIO) -> set[tuple[int, ...]]:
    return set(map(tuple, np.unique(np.asarray(Image.open(buffer).convert("RGB")).reshape(-1, 3), axis=0).tolist()))


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


def test_the_overview_outlines_mask_label_and_every_sample():
    image = np.random.default_rng(0).uniform(0, 1, (3, 40, 30, 4))
    mask = np.zeros((1, 40, 30, 4))
    mask[:, 10:20, 10:20, 1:3] = 1
    label = np.roll(mask, 4, axis=1)
    samples = np.concatenate([mask, np.roll(mask, -5, axis=2)])
    buffer = io.BytesIO()
    overview(buffer, image, mask, samples, mask * 0.5, label, title="case")
    assert {rgb(colour) for colour in (MASK_COLOR, LABEL_COLOR, SAMPLE_COLOR)} <= colours(buffer)


def test_the_overview_of_a_case_without_a_finding_is_drawn():
    empty = np.zeros((1, 40, 30, 4))
    buffer = io.BytesIO()
    overview(buffer, np.random.default_rng(0).uniform(0, 1, (1, 40, 30, 4)), empty, empty, empty)
    assert Image.open(buffer).size[0] > 500


def test_the_reliability_diagram_has_a_line_for_each_method():
    buffers = []
    for methods in ({"a": [[10, 1, 0], [0, 0, 0], [10, 9, 10]]}, {}):
        buffers.append(io.BytesIO())
        reliability_figure(buffers[-1], methods | {"b": [[10, 1, 5], [5, 2, 1]]})
    assert buffers[0].getvalue() != buffers[1].getvalue()
