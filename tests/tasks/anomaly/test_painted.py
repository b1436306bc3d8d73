from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import rows_of
from PIL import Image

from scripts.data.sections import section_of
from scripts.release.phantoms import paint_boxes
from scripts.tasks.anomaly.painted import in_frame, outside_check, painted_table, plain_darkness


class Knowing(torch.nn.Module):
    """Finds what is darker than the tissue of the made boxes."""

    def __init__(self):
        super().__init__()
        self.register_buffer("level", torch.tensor(0.55))

    def forward(self, image):
        inside = (image > 0.35).float()
        means = [torch.nn.functional.avg_pool2d(x, 5, 1, 2, count_include_pad=False) for x in (image * inside, inside)]
        anomaly = (self.level - means[0] / means[1].clamp(min=0.2)).clamp(min=0) * inside
        return torch.cat([anomaly, image, anomaly.amax(dim=(2, 3), keepdim=True).expand_as(image)], dim=1)

    def probability(self, image):
        return self(image)[:, 2, 0, 0]


@pytest.fixture(scope="module")
def painted(tmp_path_factory):
    """Painted boxes of six patients of the validation and six of the test section."""
    folder = tmp_path_factory.mktemp("painted")
    (folder / "boxes").mkdir()
    names = [f"patient{i}" for i in range(200)]
    for section in ("validation", "test"):
        for number, name in enumerate([n for n in names if section_of(n) == section][:6]):
            grey = 0.6 + np.random.default_rng(number).normal(0, 0.01, (64, 64))
            Image.fromarray((255 * grey).astype(np.uint8)).save(folder / "boxes" / f"{name}_1.png")
    paint_boxes(folder / "boxes", folder / "painted", copies=4, size=64)
    return folder / "painted"


def test_a_method_is_measured_over_contrast_and_size_beside_a_plain_threshold(painted, tmp_path):
    painted_table(Knowing(), painted, tmp_path)
    rows = {(row["method"], row["contrast"], row["diameter"]): row for row in rows_of(tmp_path / "painted.csv")}
    assert {key[0] for key in rows} == {"bundle", "plain threshold", "plain threshold, gated"}
    whole, strong = rows["bundle", "all", "all"], rows["bundle", "30-60", "all"]
    assert int(whole["pictures"]) > int(strong["pictures"]) > 5
    assert float(strong["dice"]) > 0.5 and float(strong["image_auroc"]) == 1
    assert float(strong["dice"]) > float(rows["bundle", "10-20", "all"]["dice"])
    assert float(whole["dice_lower"]) <= float(whole["dice"]) <= float(whole["dice_upper"])
    assert rows["bundle", "10-20", "all"]["dice_lower"] == ""


def test_a_section_without_pictures_is_told(painted, tmp_path):
    with pytest.raises(FileNotFoundError, match="no painted and healthy pictures of the training section"):
        painted_table(Knowing(), painted, tmp_path, section="training")
    assert not (tmp_path / "painted.csv").exists()


def test_plain_darkness_is_how_far_a_place_lies_below_the_tissue_round_it():
    image = torch.full((2, 1, 64, 64), 0.6)
    image[0, 0, 28:36, 28:36] = 0.5
    image[1] = 0  # air
    maps, scores = plain_darkness(image, sigma=1.0)
    assert maps[0, 0, 32, 32] == pytest.approx(0.1, abs=0.01) and maps[0, 0, 10, 10] < 1e-4 and not maps[1].any()
    assert torch.equal(scores, maps.flatten(1).amax(dim=1))


def test_boxes_of_two_sources_are_compared_in_windows_of_one_size(tmp_path):
    rng = np.random.default_rng(0)
    test = [n for n in (f"patient{i}" for i in range(200)) if section_of(n) == "test"][:8]
    for folder, size, names, level in (("healthy", 60, test, 0.6), ("tumour", 20, test, 0.5)):
        (tmp_path / folder).mkdir()
        for name in names:
            pixels = level + rng.normal(0, 0.01, (size, size + int(rng.integers(5))))
            Image.fromarray((255 * pixels).astype(np.uint8)).save(tmp_path / folder / f"{name}_1.png")
    network = Knowing()
    network.spatial_size = (64, 64)
    found = outside_check(network, tmp_path / "healthy", tmp_path / "tumour")
    assert found["size"] == found["windows"] == found["darkness"] == 1, found
    assert 0.2 < found["noise"] < 0.8
    with pytest.raises(FileNotFoundError, match="no pictures"):
        outside_check(network, tmp_path / "healthy", tmp_path)


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (5, 5), (2, 3), (12, 12)])
def test_a_frame_keeps_the_middle(shape):
    picture = np.zeros(shape)
    picture[shape[0] // 2, shape[1] // 2] = 1
    frame = in_frame(picture, 5, 5)
    assert frame.shape == (5, 5) and frame.sum() == 1 and frame[1:4, 1:4].sum() == 1
