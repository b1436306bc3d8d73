from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import save_patient
from monai.data import MetaTensor
from PIL import Image
from torch import nn

from scripts import speed
from scripts.networks.ddim_anomaly import DDIMAnomalyNet
from scripts.networks.latent_anomaly import LatentAnomalyNet
from scripts.tasks.anomaly import benchmark


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


# --- the published procedure beside the default


@pytest.fixture
def labelled(monkeypatch):
    """Cases a and b of ten slices, the lesion in the middle four (of a) or two (of b), in place of what a bundle reads."""
    cases = []
    for name, diseased in (("a", range(3, 7)), ("b", range(4, 6))):
        case = []
        for i in range(10):
            label = torch.zeros(1, 16, 16)
            if i in diseased:
                label[:, 4:10, 4:10] = 1
            image = torch.full((1, 16, 16), 0.5) + 0.3 * label
            case.append({"case": name, "slice": i, "class_label": int(i in diseased), "image": image, "label": label})
        cases.append(case)
    monkeypatch.setattr(benchmark, "labelled_slices", lambda *args: iter(cases))


def test_slices_are_spread_over_patients_and_halves_of_each(labelled):
    items = benchmark.spread_slices(None, "", "test", 8)
    assert [item["case"] for item in items] == ["a", "b"] * 4
    of = {name: [(i["slice"], i["class_label"]) for i in items if i["case"] == name] for name in "ab"}
    assert of["a"] == [(4, 1), (1, 0), (6, 1), (8, 0)] and of["b"] == [(4, 1), (2, 0), (5, 1), (8, 0)]
    many = benchmark.spread_slices(None, "", "test", 18)  # more than half of them are healthy
    assert len({(i["case"], i["slice"]) for i in many}) == 18 and sum(i["class_label"] for i in many) == 6
    for number in (1, 21):
        with pytest.raises(ValueError, match=f"{number} slices can't be spread over 2 patients with 20 slices"):
            benchmark.spread_slices(None, "", "test", number)


class Healer(nn.Module):
    """Heals what is brighter than 0.7, and half of the difference to 0.5 if it is the published procedure."""

    published = {"half": True}

    def __init__(self, half=False):
        super().__init__()
        self.half, self.bias, self.seen = half, nn.Parameter(torch.zeros(())), 0

    def anomaly_map(self, image, healthy):
        return (image - healthy).clamp(min=0).sum(dim=1, keepdim=True)

    @torch.no_grad()
    def forward(self, image):
        self.seen += len(image)
        healthy = torch.where(image > 0.7, 0.65 if self.half else 0.5, image)
        return torch.cat([self.anomaly_map(image, healthy), healthy, torch.ones_like(image)], dim=1)


def test_what_was_kept_of_the_comparison_is_not_computed_again_unless_the_settings_changed(
    labelled, bundle, tmp_path, monkeypatch
):
    networks = []
    monkeypatch.setattr(benchmark, "build_network", lambda bundle, **kw: networks.append(Healer(**kw)) or networks[-1])
    rows = benchmark.compare_with_published(bundle, "", tmp_path, 8, "test")
    methods = [f"{one}, {other}" for one in ("published", "default") for other in ("paper's map", "bundle's map")]
    assert [row["method"] for row in rows] == methods
    assert all(row["auroc"] == 1 for row in rows)
    assert all(row["slice_dice"] == row["all_slices_dice"] == row["slice_dice_low"] == 1 for row in rows[1::2])
    assert [network.seen for network in networks] == [0, 8, 8]
    assert len(list((tmp_path / "published").glob("*.pt"))) == 8

    (tmp_path / "default" / "a_4.pt").unlink()
    assert benchmark.compare_with_published(bundle, "", tmp_path, 8, "test") == rows
    assert [network.seen for network in networks[3:]] == [0, 1]
    items = benchmark.spread_slices(None, "", "test", 8)
    outputs = benchmark.kept_outputs(bundle, items, tmp_path / "published", {"half": False})
    assert networks[-1].seen == 8 and outputs.shape == (8, 3, 16, 16)


def test_the_baseline_dresses_grey_levels_as_the_map_and_calls_the_classifier_alone(bundle, tmp_path, monkeypatch):
    save_patient(tmp_path, "p1", num_slices=3)
    unet_calls = []
    monkeypatch.setattr(DDIMAnomalyNet, "encode", lambda *args: unet_calls.append(args))
    (case,) = benchmark.cases_without_diffusion(bundle, str(tmp_path), "all")
    assert not unet_calls and not case["map"].any()
    assert case["control_map"].shape == case["label"].shape == case["probability"].shape
    assert case["control"].dtype == torch.uint8


def test_both_thresholds_on_grey_levels_are_chosen_on_validation_and_used_on_test(labelled, bundle, monkeypatch):
    def dressed(bundle, dataset_dir, section):
        label = MetaTensor(torch.zeros(1, 16, 16, 8), affine=torch.diag(torch.tensor([2.0, 2, 5, 1], dtype=torch.float64)))
        label[:, 4:10, 4:10, 2:4] = 1
        grey = 0.2 + 0.5 * label
        grey[:, 12, 12, 2] = 0.8  # too small to be a finding
        grey[:, 10:14, 10:14, 6:] = 0.6 if section == "validation" else 0.4
        yield {"control_map": grey, "label": label}

    monkeypatch.setattr(benchmark, "cases_without_diffusion", dressed)
    found = benchmark.grey_level_baseline(bundle, "", 0)
    assert found["plain"] == pytest.approx(1) and found["control"] == pytest.approx(1)
    assert 0.6 <= found["control_threshold"] < 0.7
