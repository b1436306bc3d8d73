from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import BRAIN, BUNDLES, ONE_STEP, rows_of, save_patient
from PIL import Image
from torch import nn

from scripts import speed
from scripts.data.sections import section_of
from scripts.networks.latent_anomaly import LatentAnomalyNet
from scripts.tasks.anomaly import benchmark
from scripts.tasks.anomaly.benchmark import Method, compare_methods, methods_of


class Stub(nn.Module):
    """The map is what a slice differs by from grey 0.5 inside the head."""

    published = {"num_steps": 7}

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))
        self.sizes = []

    @torch.no_grad()
    def forward(self, image):
        self.sizes.append(len(image))
        healed = torch.where(image > 0.15, 0.5, image)
        anomaly = self.gain * (image - healed).abs().mean(dim=1, keepdim=True)
        return torch.cat([anomaly, healed, anomaly.flatten(1).mean(dim=1).view(-1, 1, 1, 1).expand_as(anomaly)], dim=1)


@pytest.fixture
def picture_bundle(tmp_path):
    """A bundle that reads pictures, of which there are 36, and is measured on sprites."""
    (tmp_path / "HeadCT").mkdir()
    y, x = np.mgrid[-1:1:64j, -1:1:64j]
    for i in range(36):
        head = np.where((x / 0.7) ** 2 + (y / 0.8) ** 2 < 1, 120 + i, 20).astype(np.uint8)
        Image.fromarray(head).save(tmp_path / "HeadCT" / f"{i:06}.png")
    train = {
        "dataset_dir": "nowhere",
        "validate_section": "validation",
        "validate": {
            "dataset": {
                "_target_": "scripts.data.slices.SliceDataset",
                "data": {
                    "_target_": "scripts.data.layouts.find_cases",
                    "dataset_dir": "@dataset_dir",
                    "sequences": ["ct"],
                    "section": "@validate_section",
                    "pictures": True,
                },
                "transform": {
                    "_target_": "Compose",
                    "transforms": [
                        {
                            "_target_": "scripts.data.reading.LoadSequencesd",
                            "keys": "image",
                            "sequences": ["ct"],
                            "min_ndim": 2,
                        },
                        {
                            "_target_": "ScaleIntensityRanged",
                            "keys": "image",
                            "a_min": 0,
                            "a_max": 255,
                            "b_min": 0,
                            "b_max": 1,
                        },
                        {"_target_": "scripts.data.slices.ExtractSlicesd", "labelled": False},
                    ],
                },
                "classes": [0],
            }
        },
    }
    evaluate = {
        "benchmark": "scripts.tasks.anomaly.benchmark.anomaly_benchmark",
        "sprites": {"radius": [4, 6], "contrast": 0.25},
    }
    bundle = tmp_path / "bundle"
    (bundle / "configs").mkdir(parents=True)
    (bundle / "configs" / "train.json").write_text(json.dumps(train))
    (bundle / "configs" / "inference.json").write_text(json.dumps({"batch_size": 8}))
    (bundle / "configs" / "evaluate.json").write_text(json.dumps(evaluate))
    return SimpleNamespace(path=bundle, data=str(tmp_path / "HeadCT"))


@pytest.fixture
def built(monkeypatch):
    """What networks were asked for: their settings, and themselves."""
    networks = []

    def build_network(bundle, **settings):
        networks.append((settings, Stub().eval()))
        return networks[-1][1]

    monkeypatch.setattr(speed, "build_network", build_network)
    return networks


def test_healthy_slices_are_those_of_the_section_that_the_bundle_reads(picture_bundle):
    validation = benchmark.healthy_slices(picture_bundle.path, picture_bundle.data, "validation")
    greys = (255 * validation.amax(dim=(1, 2, 3))).round().int() - 120
    assert validation.shape == (2, 1, 64, 64) and sorted(greys.tolist()) == [32, 33]
    everything = benchmark.healthy_slices(picture_bundle.path, picture_bundle.data, "all", 8)
    greys = (255 * everything.amax(dim=(1, 2, 3))).round().int() - 120
    assert greys.tolist() == [0, 5, 10, 15, 20, 25, 30, 35]


def test_slices_of_a_bundle_without_labels_are_half_painted_and_half_healthy(picture_bundle):
    images, masks = benchmark.drawn_slices(picture_bundle.path, picture_bundle.data, 7, "all")
    healthy = benchmark.healthy_slices(picture_bundle.path, picture_bundle.data, "all", 7)
    assert images.shape == (7, 1, 64, 64) and masks.shape == (7, 1, 64, 64)
    assert masks.flatten(1).any(dim=1).tolist() == [True] * 3 + [False] * 4
    assert torch.equal(images[~masks], healthy[~masks]) and (images[masks] != healthy[masks]).all()
    again = benchmark.drawn_slices(picture_bundle.path, picture_bundle.data, 7, "all")
    assert torch.equal(again[0], images) and torch.equal(again[1], masks)


def test_a_model_of_healthy_slices_is_calibrated_anew_for_the_published_procedure(picture_bundle, monkeypatch):
    compared, batches, calibrate = [], [], LatentAnomalyNet.calibrate
    monkeypatch.setattr(benchmark, "compare", lambda networks, trial, device: compared.append(networks))
    monkeypatch.setattr(
        LatentAnomalyNet,
        "calibrate",
        lambda self, loader: batches.append(self.settings.max_batch) or calibrate(self, loader),
    )
    autoencoder = {"channels": (8, 16), "num_embeddings": 16}
    default = LatentAnomalyNet(autoencoder=autoencoder, unet_channels=(32, 32), band_levels=2).eval()
    published = default.with_settings(**default.published)
    benchmark.anomaly_benchmark(
        picture_bundle.path, {"default": default, "published": published}, picture_bundle.data, 4, "all"
    )
    (networks,) = compared
    validation = benchmark.healthy_slices(picture_bundle.path, picture_bundle.data, "validation")
    expected = networks["published"].measure(validation)[0].max().item()
    assert networks["published"].healthy_places[-1].item() == pytest.approx(expected, rel=1e-4)
    assert networks["published"].settings == published.settings and networks["published"].unet is default.unet
    assert networks["default"] is default and not default.healthy_places.any()
    assert batches == [256]  # as it changes nothing but the time


def test_slices_of_a_bundle_with_labels_are_half_diseased_and_half_healthy(bundle, tmp_path):
    save_patient(tmp_path, "p1", num_slices=6)
    images, masks = benchmark.drawn_slices(bundle, str(tmp_path), 4, "all")
    assert images.shape == (4, 3, 128, 128)
    assert masks.flatten(1).any(dim=1).tolist() == [True, True, False, False]


@pytest.mark.parametrize("native", [False, True])
def test_the_benchmark_sets_the_published_settings_of_the_network_against_the_default(
    picture_bundle, built, caplog, monkeypatch, native
):
    monkeypatch.setattr(speed, "has_bfloat16", lambda device_type: native)
    with caplog.at_level(logging.INFO):
        rows = speed.benchmark(picture_bundle.path, picture_bundle.data, 12, "all")
    settings = [{"amp": False}, {"amp": False, "num_steps": 7}, {"amp": True}]
    assert [asked for asked, _ in built] == settings[: 3 if native else 2]
    methods = ["published", "default", "default, batches of 8", "default, bfloat16"]
    assert [row["method"] for row in rows] == methods[: 4 if native else 3]
    assert built[1][1].sizes[:12] == [1] * 12
    assert len({row["best_dice"] for row in rows}) == 1 and rows[0]["best_dice"] > 0.5
    assert all(text in caplog.text for text in ("published: num_steps 7", "12 slice(s)", "Dice (Otsu)"))


def test_bundles_of_brain_mri_and_their_controls_are_found_and_no_other():
    methods = methods_of(BUNDLES)
    assert {BRAIN.name, ONE_STEP.name, "flair", "smooth"} <= methods.keys()
    assert {method.bundle.name[:9] for method in methods.values()} == {"brain_mri"}
    assert all(method.seen != "not said" for method in methods.values())


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    """A control, the one-step bundle, and the same in other settings, compared on two made patients."""
    folder = tmp_path_factory.mktemp("comparison")
    for section in ("validation", "test"):
        name = next(f"p{i}" for i in range(40) if section_of(f"p{i}") == section)
        save_patient(folder / "scans", name, seed=len(section), num_slices=3)
    found = methods_of([ONE_STEP])
    methods = {**found, "twice": Method(ONE_STEP, settings={"map_weights": [0, 2, 0], "half_score": 0.5})}
    rows = compare_methods(methods, str(folder / "scans"), str(folder / "out"), most_false_ml=2.0)
    return folder, methods, rows


def test_every_method_gets_a_row_by_one_rule_over_all_slices(comparison):
    folder, methods, rows = comparison
    assert [row["method"] for row in rows] == list(methods) == [ONE_STEP.name, "smooth", "twice"]
    table = rows_of(folder / "out" / "comparison.csv")
    assert [row["seen"] for row in table] == [method.seen for method in methods.values()]
    for row in rows:
        assert 0 <= row["dice_from"] <= row["dice"] <= row["dice_to"] <= 1
        assert 0 < row["auprc"] <= 1 and 0 < row["best_dice"] <= 1 and row["false_ml"] < 20
        assert np.isnan(row["recall below 1 ml"])  # there is none
        assert row["gflop"] > 0 or row["method"] == "smooth"
    assert rows[0]["best_dice"] > 0.5 and rows[0]["dice"] > 0.3
    assert len(rows_of(folder / "out" / "comparison_cases.csv")) == 3  # one test patient
    text = (folder / "out" / "comparison.md").read_text(encoding="utf-8")
    assert text.startswith("1 patients, 3 slices (test); 2 ml a volume") and f"- {ONE_STEP.name} has seen: " in text
    assert Image.open(folder / "out" / "comparison.png").size[0] > 100


def test_a_second_comparison_does_no_case_again(comparison, caplog):
    folder, methods, rows = comparison
    with caplog.at_level(logging.INFO):
        again = compare_methods({"smooth": methods["smooth"]}, str(folder / "scans"), str(folder / "out"))
    assert caplog.text.count("1 cases are finished already") == 2
    assert again[0]["auprc"] == rows[1]["auprc"]


def test_a_section_without_labels_is_refused(tmp_path):
    name = next(f"p{i}" for i in range(40) if section_of(f"p{i}") == "validation")
    (save_patient(tmp_path / "scans", name) / f"{name}_seg.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match="no case of the section 'validation' has a mask"):
        compare_methods(methods_of([ONE_STEP]), str(tmp_path / "scans"), str(tmp_path / "out"), section="validation")
