from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from made_inputs import draw, has_color
from matplotlib.image import imread

from scripts.tasks.anomaly.figures import contrast_figure, guidance_table_figure, overview

pytestmark = pytest.mark.filterwarnings("error")

YELLOW, BLUE = (255, 212, 0), (0, 180, 255)


def make_head(shape=(32, 40, 12), num_channels=2):
    """Head with a bright blob: image, pseudo-healthy image, anomaly map, mask and label, (C, H, W, D)."""
    generator = np.random.default_rng(0)
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, size) for size in shape), indexing="ij")
    head = (x / 0.8) ** 2 + (y / 0.9) ** 2 + (z / 0.9) ** 2 < 1
    healthy = np.where(head, 0.4 + 0.05 * generator.normal(size=shape), 0)
    blob = (x - 0.3) ** 2 + (y - 0.2) ** 2 + (z - 0.2) ** 2 < 0.1
    image = np.where(blob, 0.95, healthy)
    anomaly = np.abs(image - healthy)
    stack = [np.stack([volume] * num_channels).astype(np.float32) for volume in (image, healthy)]
    mask = (x - 0.3) ** 2 + (y - 0.2) ** 2 + (z - 0.2) ** 2 < 0.06
    return *stack, anomaly[None].astype(np.float32), mask[None].astype(np.uint8), blob[None].astype(np.uint8)


def test_an_overview_is_a_readable_png_that_two_runs_give_alike(tmp_path):
    paths = [tmp_path / "first.png", tmp_path / "second.png"]
    for path in paths:
        overview(path, *make_head(), title="case 1")
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert b"Software" not in paths[0].read_bytes()
    height, width, _ = imread(paths[0]).shape
    assert 1200 <= height <= 1600 and 600 <= width <= 2400


def test_mask_and_label_are_outlined_in_two_colours():
    image, healthy, anomaly, mask, label = make_head()
    both, alone = draw(overview, image, healthy, anomaly, mask, label), draw(overview, image, healthy, anomaly, mask)
    assert has_color(both, YELLOW) and has_color(both, BLUE)
    assert has_color(alone, YELLOW) and not has_color(alone, BLUE)


def test_tensors_and_arrays_give_the_same_picture():
    volumes = make_head()
    np.testing.assert_array_equal(draw(overview, *volumes), draw(overview, *map(torch.from_numpy, volumes)))


def test_the_first_axis_runs_to_the_right_and_the_second_upwards():
    image = np.zeros((1, 30, 20, 1), np.float32)
    image[:, 20:, 15:] = 1
    pixels = draw(overview, image, image, 0 * image, 0 * image)
    first_panel = pixels[100:400, : pixels.shape[1] // 5].min(axis=-1)  # without headings
    first_panel[:, :40] = 0  # without the number of the slice
    rows, columns = np.nonzero(first_panel > 250)
    panel_centre = (pixels.shape[1] - 150) / 8
    assert columns.mean() > panel_centre
    assert rows.mean() < pixels.shape[0] / 2


def test_only_the_chosen_channel_of_the_image_is_shown():
    image, healthy, *rest = make_head()
    changed = image.copy()
    changed[1] = 1 - changed[1]
    np.testing.assert_array_equal(draw(overview, changed, healthy, *rest), draw(overview, image, healthy, *rest))
    assert (draw(overview, changed, healthy, *rest, channel=1) != draw(overview, image, healthy, *rest)).any()


def test_the_slices_with_most_mask_pixels_are_shown():
    image, healthy, anomaly, mask, label = make_head()
    largest = np.argsort(-(mask[0] > 0).sum(axis=(0, 1)), kind="stable")[:2]
    chosen = np.isin(np.arange(mask.shape[-1]), largest)
    expected = draw(overview, image, healthy, anomaly, mask, label, num_rows=2)
    np.testing.assert_array_equal(draw(overview, image, healthy, anomaly * chosen, mask, label, num_rows=2), expected)
    assert (draw(overview, image, healthy, anomaly * ~chosen, mask, label, num_rows=2) != expected).any()


def test_slices_spread_over_the_object_are_shown_where_the_mask_is_empty():
    image, healthy, anomaly, mask, _ = make_head()
    image[..., :4] = 0  # empty slices are not shown, whatever their map
    changed = anomaly.copy()
    changed[..., :4] = 0.3
    args = 0 * mask, None
    pixels = draw(overview, image, healthy, anomaly, *args, vmax=1.0)
    np.testing.assert_array_equal(draw(overview, image, healthy, changed, *args, vmax=1.0), pixels)
    assert 1200 <= pixels.shape[0] <= 1600


def test_given_slices_are_shown_in_their_order_whatever_the_mask():
    image, healthy, anomaly, mask, label = make_head()
    changed = anomaly.copy()
    changed[..., 9] = 0.5
    expected = draw(overview, image, healthy, anomaly, mask, label, vmax=1.0, slices=[9, 2])
    differs = (draw(overview, image, healthy, changed, mask, label, vmax=1.0, slices=[9, 2]) != expected).any(axis=(1, 2))
    assert differs[: len(differs) // 2].any() and not differs[len(differs) // 2 :].any()


@pytest.mark.parametrize("slice_dim", [0, 1, 2])
def test_voxels_that_are_not_cubes_are_shown_in_their_true_proportions(slice_dim):
    volumes = make_head((16, 16, 16))
    spacing = [3.0 if axis == slice_dim else 1.0 for axis in range(3)]
    square = draw(overview, *volumes, slice_dim=slice_dim)
    np.testing.assert_array_equal(draw(overview, *volumes, slice_dim=slice_dim, spacing=spacing), square)
    wide = [2.0 if axis == (1 if slice_dim == 0 else 0) else 1.0 for axis in range(3)]  # the axis to the right
    assert draw(overview, *volumes, slice_dim=slice_dim, spacing=wide).shape[1] > 1.5 * square.shape[1]


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_volume_that_is_one_value_throughout_is_drawn_without_a_warning(value):
    volume = np.full((1, 16, 16, 3), value, np.float32)
    assert draw(overview, volume, volume, volume, volume, volume).size


def test_a_single_slice_makes_a_single_row():
    assert draw(overview, *(volume[..., 6:7] for volume in make_head())).shape[0] < 800


def test_many_rows_make_a_longer_picture_and_not_smaller_cells():
    few, many = (draw(overview, *make_head(), slices=range(2, 2 + number)) for number in (5, 10))
    assert abs(many.shape[1] - few.shape[1]) < 40 and many.shape[0] > 1.8 * few.shape[0]


def test_the_guidance_table_has_a_line_for_each_noise_level():
    levels, scales = (250, 500, 750), (100, 10, 30, 300)
    rows = [
        {"noise_level": level, "gradient_scale": scale, "dice": scale / 600 + level / 2000, "auroc": 0.9}
        for level in levels
        for scale in scales
    ]
    pixels = draw(guidance_table_figure, rows)
    assert all(has_color(pixels, color) for color in [(31, 119, 180), (255, 127, 14), (44, 160, 44)])
    np.testing.assert_array_equal(draw(guidance_table_figure, rows[::-1]), pixels)  # the order does not matter


def test_a_gradient_scale_of_zero_is_refused():
    with pytest.raises(ValueError, match="above 0"):
        guidance_table_figure(io.BytesIO(), [{"noise_level": 1, "gradient_scale": 0, "dice": 0, "auroc": 0}])


def test_the_contrast_figure_has_a_line_for_each_method_in_any_order_of_the_contrasts():
    rows = [
        {"method": method, "contrast": contrast, "best_dice": contrast + gain}
        for method, gain in (("one", 0.1), ("another", 0.4))
        for contrast in (0.3, 0.1, 0.5)
    ]
    pixels = draw(contrast_figure, rows)
    assert has_color(pixels, (31, 119, 180)) and has_color(pixels, (255, 127, 14))
    np.testing.assert_array_equal(draw(contrast_figure, [rows[i] for i in (1, 2, 0, 4, 3, 5)]), pixels)
