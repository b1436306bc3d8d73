from __future__ import annotations

import json

import pytest
import torch
from conftest import rows_of
from made_inputs import SHAPE, images_of
from matplotlib.image import imread
from monai.transforms import Compose, ScaleIntensityRanged
from PIL import Image
from stand_in import BrightAreCopies, FewFeatures, StandInNet

from scripts.data.reading import LoadSequencesd
from scripts.data.slices import ExtractSlicesd
from scripts.tasks.generation.evaluation import draw_samples, generation_table, real_images
from scripts.tasks.generation.metrics import image_scores, pair_similarity
from scripts.tasks.generation.transforms import seeded_noise


class Copies(StandInNet):
    """A network that gives training images back."""

    def __init__(self, images):
        super().__init__()
        self.images = images

    def forward(self, noise):
        return self.images[: len(noise)]


# --- images


def test_real_images_are_the_eight_bit_values_of_their_section(tmp_path):
    (tmp_path / "CXR").mkdir()
    (tmp_path / "Hand").mkdir()
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (36, 16, 16), generator=generator, dtype=torch.uint8)
    for i, one in enumerate(pixels):
        for folder in ("CXR", "Hand"):
            Image.fromarray(one.T.numpy()).save(tmp_path / folder / f"{i:03}.png")
    transform = Compose(
        [
            LoadSequencesd("image", ["xray"], min_ndim=2),
            ScaleIntensityRanged("image", 0, 255, 0, 1),
            ExtractSlicesd(labelled=False),
        ]
    )
    images = real_images(tmp_path, ["xray"], "test", transform, class_folder="CXR")
    assert torch.equal(images, pixels[34:, None] / 255)


def test_samples_are_those_of_their_seeds_in_eight_bits_whatever_the_batch():
    network = StandInNet()
    samples, seconds = draw_samples(network, 5, SHAPE, seed=3, batch_size=2)
    assert network.sizes == [2, 2, 1] and seconds > 0
    image = network(seeded_noise(6, SHAPE)[None])
    assert torch.equal(samples[3:4], (255 * image).round() / 255)
    assert torch.equal(draw_samples(network, 2, SHAPE, seed=6)[0], samples[3:])


# --- the table


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Folder, rows and log of a table of three networks: a fair one, one that copies, one of Bernoulli pixels."""
    folder = tmp_path_factory.mktemp("table")
    training, validation, test = images_of(60), images_of(20, seed=200), images_of(20, seed=300)
    networks = {"fair": StandInNet(), "copies": Copies(training), "bernoulli": StandInNet(model="medvdm")}
    rows = generation_table(
        networks, training, validation, test, FewFeaturesWithAccuracy(), folder, number=12, seeds=[40, 41], num_nearest=3
    )
    return folder, rows


class FewFeaturesWithAccuracy(FewFeatures):
    accuracy = torch.tensor(0.75)


def test_the_table_has_a_row_for_each_network_and_set_and_one_of_real_images(table):
    folder, rows = table
    written = rows_of(folder / "metrics.csv")
    methods = [(row["method"], row["seed"]) for row in written]
    assert methods[0] == ("real (validation)", "0") and written[0]["bits"] == ""
    assert methods[1:] == [(name, seed) for name in ("fair", "copies", "bernoulli") for seed in ("40", "41")]
    assert [float(row["mmd"]) for row in written] == [row["mmd"] for row in rows]
    expected, _ = draw_samples(StandInNet(), 12, SHAPE, seed=40 * 12)
    assert rows[1]["ms_ssim"] == pytest.approx(pair_similarity(expected))


def test_copies_of_training_images_are_nearer_than_real_images(table):
    rows = {row["method"]: row for row in table[1]}
    assert rows["copies"]["nearer_than_real"] == 1 and rows["copies"]["nearest"] < 1e-5
    assert rows["fair"]["nearer_than_real"] < 0.3 and rows["fair"]["nearest"] > 0.01


def test_real_images_are_as_many_as_the_samples(table):
    folder, rows = table
    real = image_scores(images_of(20, seed=200)[:12], images_of(20, seed=300)[:12], FewFeatures())
    assert {key: rows[0][key] for key in real} == pytest.approx(real)
    about = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["about"]
    assert (about["num_samples"], about["num_validation"], about["num_test"]) == (12, 12, 12)


def test_with_a_filter_each_set_has_a_row_of_the_images_after_it(tmp_path):
    training, validation, test = images_of(20), images_of(10, seed=200), images_of(10, seed=300)
    network, copies = StandInNet(), BrightAreCopies()
    samples, _ = draw_samples(network, 10, SHAPE)
    copies.the_limit = copies.nearest(samples)[0].sort().values[7].item()  # two of ten are above it
    rows = generation_table(
        {"fair": network}, training, validation, test, FewFeaturesWithAccuracy(), tmp_path, 10, (0,), copies=copies
    )
    assert [row["method"] for row in rows] == ["real (validation)", "fair", "fair, filtered"]
    before, after = rows[1:]
    assert before["copies"] == pytest.approx(0.2) and after["copies"] == 0 and after["redraws"] >= 0.2
    assert before["frechet"] != after["frechet"] and "copies" in rows[0]
    assert "| fair, filtered |" in (tmp_path / "metrics.md").read_text(encoding="utf-8")


def test_the_summary_and_the_markdown_hold_the_means_and_what_they_are_made_of(table):
    folder, rows = table
    summary = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    about = summary.pop("about")
    assert list(summary) == ["real (validation)", "fair", "copies", "bernoulli"]
    values = [row["mmd"] for row in rows if row["method"] == "fair"]
    assert summary["fair"]["mmd"]["mean"] == pytest.approx(sum(values) / 2)
    assert about["accuracy_of_features"] == 0.75 and about["num_samples"] == 12 and 0 < about["nearer_than_real_below"] < 0.2
    lines = (folder / "metrics.md").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("| method | bits a pixel (8 bit) | reconstruction | its floor |")
    assert "| 100.0% ± 0.0% |" in next(line for line in lines if line.startswith("| copies"))
    assert next(line for line in lines if line.startswith("| real")).count(" – ") == 7


def test_samples_and_their_nearest_training_images_are_drawn(table):
    folder, _ = table
    for name in ("fair", "copies", "bernoulli"):
        assert imread(folder / f"nearest_{name}.png").ndim == 3
        assert "generated" in Image.open(folder / f"contact_sheet_{name}.png").text["Description"]


def test_a_table_without_samples_is_refused(tmp_path):
    images = images_of(2)
    for settings in ({"number": 1}, {"seeds": []}):
        with pytest.raises(ValueError, match="--number must be at least 2 and --seeds not empty"):
            generation_table({}, images, images, images, FewFeatures(), tmp_path, **settings)
