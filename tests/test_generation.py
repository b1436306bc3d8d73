from __future__ import annotations

import json
import logging
import math

import pytest
import torch
from conftest import rows_of
from matplotlib.image import imread
from monai.transforms import Compose, ScaleIntensityRanged
from PIL import Image
from stand_in import StandInNet
from torch import nn

from scripts.bundle import with_weights
from scripts.data.reading import LoadSequencesd
from scripts.data.slices import ExtractSlicesd
from scripts.networks.orientation import OrientationNet
from scripts.tasks.generation.benchmark import benchmark_sampling
from scripts.tasks.generation.evaluation import draw_samples, generation_table, real_images
from scripts.tasks.generation.metrics import (
    bound_terms,
    feature_network,
    fourier_features,
    image_scores,
    nearest,
    pair_similarity,
)
from scripts.tasks.generation.transforms import seeded_noise

SHAPE = (1, 64, 64)


def images_of(number: int, seed: int = 0) -> torch.Tensor:
    """Images with squares at random places."""
    return draw_samples(StandInNet(), number, SHAPE, seed)[0]


class FewFeatures(nn.Module):
    """Features that are four pixels of the image."""

    def features(self, image):
        return image[:, 0, 20, [5, 15, 25, 35]]


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


def test_weights_must_be_the_networks(tmp_path):
    source = StandInNet()
    source.gain.data.fill_(0.5)
    torch.save(source.state_dict(), tmp_path / "model.pt")
    network = with_weights(StandInNet(), tmp_path / "model.pt")
    assert network.gain == 0.5 and not network.training
    with pytest.raises(RuntimeError, match="Missing key"):
        with_weights(OrientationNet(), tmp_path / "model.pt")


# --- the bound


def test_the_bound_is_the_mean_over_all_images_and_the_sum_of_its_terms():
    images = images_of(5)
    terms = bound_terms(StandInNet(), images, batch_size=2)
    assert list(terms) == ["recon", "latent", "diffusion", "bits"]
    assert terms["recon"] == pytest.approx(images.mean().item() + 2) and terms["latent"] == 0.25
    assert terms["bits"] == pytest.approx(terms["recon"] + terms["latent"] + terms["diffusion"])
    assert bound_terms(StandInNet(), images, seed=0, batch_size=2) == terms
    assert bound_terms(StandInNet(), images, seed=1)["diffusion"] != terms["diffusion"]


def test_a_bernoulli_bound_has_its_floor_beside_it_and_is_compared_by_its_eight_bit_likelihood():
    terms = bound_terms(StandInNet(model="medvdm"), images_of(3))
    assert terms["floor"] == 0.5
    assert terms["recon_8bit"] == pytest.approx(terms["recon"] + 3)
    assert terms["bits"] == pytest.approx(terms["recon_8bit"] + terms["latent"] + terms["diffusion"])
    assert terms["total"] == pytest.approx(terms["bits"] - 3)


# --- the feature network


def test_the_feature_network_is_trained_once_and_then_read(tmp_path, caplog):
    training, held_out = images_of(16), images_of(4, seed=100)
    path = tmp_path / "out" / "feature_network.pt"
    with caplog.at_level(logging.INFO, logger="scripts.tasks.generation.metrics"):
        first = feature_network(path, training, held_out, iterations=2)
    assert f"{float(first.accuracy):.1%} of the orientations" in caplog.text
    before = path.read_bytes()
    second = feature_network(path, training[:0], held_out[:0])
    assert path.read_bytes() == before and torch.equal(second.features(held_out), first.features(held_out))


def test_a_file_with_other_weights_is_refused_with_its_name_and_the_mend(tmp_path):
    torch.save(StandInNet().state_dict(), tmp_path / "feature_network.pt")
    with pytest.raises(ValueError, match="feature_network.pt: not the weights .* delete it"):
        feature_network(tmp_path / "feature_network.pt", images_of(2), images_of(2))


# --- distances between sets of images


def test_inner_products_of_fourier_features_are_the_gaussian_kernel():
    images = images_of(12)
    features = fourier_features(images, number=20_000)(images)
    distances = torch.cdist(images.flatten(1), images.flatten(1))
    width = torch.pdist(images.flatten(1)).median()
    torch.testing.assert_close(features @ features.T, (-(distances**2) / (2 * width**2)).exp(), rtol=0, atol=0.03)


def test_scores_of_a_set_against_itself_shifted_are_known_exactly():
    real = 0.8 * images_of(40)
    scores = image_scores(real + 0.1, real, FewFeatures())
    assert scores["frechet"] == pytest.approx(4 * 0.01, abs=1e-6)  # equal covariances: the squared shift of the means
    flat = real.flatten(1)
    own = (flat @ flat.T - torch.diag(flat.square().sum(dim=1))).sum() / (40 * 39)
    unbiased = own - flat.mean(dim=0).square().sum()  # the same for both sets, beside the squared shift of 4,096 pixels
    shifted = flat + 0.1
    other = (shifted @ shifted.T - torch.diag(shifted.square().sum(dim=1))).sum() / (40 * 39)
    other_unbiased = other - shifted.mean(dim=0).square().sum()
    assert scores["mmd_mean"] == pytest.approx((4096 * 0.01 + unbiased + other_unbiased).item(), rel=1e-3)


def test_another_distribution_is_farther_by_every_measure_than_another_draw_of_the_same():
    real, fresh = images_of(60), images_of(60, seed=1000)
    same, other = image_scores(fresh, real, FewFeatures()), image_scores(fresh.flip(3) * 0.5, real, FewFeatures())
    assert same["mmd"] < other["mmd"] and same["frechet"] < other["frechet"] and same["mmd_mean"] < other["mmd_mean"]
    assert abs(same["mmd"]) < 0.1


def test_sets_of_different_size_are_cut_and_too_few_images_have_no_frechet_distance():
    scores = image_scores(images_of(9), images_of(4), FewFeatures())
    assert "frechet" not in scores and "ms_ssim" in scores
    assert scores["mmd"] == image_scores(images_of(4), images_of(4), FewFeatures())["mmd"]


def test_pairs_of_one_image_are_alike_and_pairs_of_many_are_not():
    images = images_of(10)
    alike = pair_similarity(images[:1].expand(5, -1, -1, -1), num_pairs=20)
    assert alike == pytest.approx(1, abs=1e-5)
    different = pair_similarity(images, num_pairs=20)
    assert different < 0.9 and different == pair_similarity(images, num_pairs=20)


def test_the_nearest_training_image_of_a_copy_is_the_original_at_no_distance():
    training = images_of(20)
    distances, numbers = nearest(torch.cat([training[7:8], training[3:4] + 0.05]), training)
    assert numbers.tolist() == [7, 3]
    assert distances.tolist() == pytest.approx([0, 0.05], abs=1e-5)


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


def test_copies_of_training_images_are_told_as_memorised(table):
    rows = {row["method"]: row for row in table[1]}
    assert rows["copies"]["memorised"] == 1 and rows["copies"]["nearest"] < 1e-5
    assert rows["fair"]["memorised"] < 0.3 and rows["fair"]["nearest"] > 0.01


def test_the_summary_and_the_markdown_hold_the_means_and_what_they_are_made_of(table):
    folder, rows = table
    summary = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    about = summary.pop("about")
    assert list(summary) == ["real (validation)", "fair", "copies", "bernoulli"]
    values = [row["mmd"] for row in rows if row["method"] == "fair"]
    assert summary["fair"]["mmd"]["mean"] == pytest.approx(sum(values) / 2)
    assert about["accuracy_of_features"] == 0.75 and about["num_samples"] == 12 and 0 < about["memorised_below"] < 0.2
    lines = (folder / "metrics.md").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("| method | bits a pixel (8 bit) | reconstruction | its floor |")
    assert "| 100.0% ± 0.0% |" in next(line for line in lines if line.startswith("| copies"))
    assert next(line for line in lines if line.startswith("| real")).count(" – ") == 6


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


def test_the_benchmark_times_both_samplings_from_the_same_noise(tmp_path, monkeypatch, caplog):
    configs = tmp_path / "configs"
    configs.mkdir()
    images = {"_target_": "stand_in.squares", "number": 20, "section": "validation"}
    evaluate = {"validation": images, "features": {"_target_": "test_generation.FewFeatures"}, "batch_size": 4}
    (configs / "inference.json").write_text("{}")
    (configs / "evaluate.json").write_text(json.dumps(evaluate))
    networks = {"default": StandInNet(), "published": StandInNet(**StandInNet.published)}
    with caplog.at_level(logging.INFO):
        rows = benchmark_sampling(tmp_path, networks, "nowhere", 6, "test")
    assert [row["method"] for row in rows] == ["published", "default", "default, batches of 4"]
    assert len({row["mmd"] for row in rows}) == 1 and math.isfinite(rows[0]["frechet"])
    assert "6 image(s)" in caplog.text and "Fréchet distance" in caplog.text
