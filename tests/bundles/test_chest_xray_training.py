"""Training of the chest X-ray bundle as a user starts it: processes of their own, made pictures."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run_forked
from monai.bundle import ConfigParser
from PIL import Image
from small_runs import TINY, training_images

from scripts.networks.copy_filter import load_copy_filter
from scripts.networks.noise_schedules import SCHEDULES
from scripts.networks.variational_diffusion import VariationalDiffusionNet

BUNDLE = ROOT / "bundles" / "chest_xray_generative_vdm"
CONFIGS = {"image": "configs/train.json", "medvdm": "['configs/train.json','configs/train_medvdm.json']"}
FILTER = "['configs/train.json','configs/train_copy_filter.json']"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """A folder in MedNIST's layout: 36 X-rays of 16 x 16, the last four for validation and test, and another class."""
    folder, rng = tmp_path_factory.mktemp("MedNIST"), np.random.default_rng(0)
    for name, count in (("CXR", 36), ("HeadCT", 2)):
        (folder / name).mkdir()
        for i in range(count):
            pixels = rng.integers(60, 200) + rng.normal(0, 10, (16, 16))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name / f"{i:06}.jpeg")
    return folder


def train(model: str, pictures: Path, output: Path, *args: object) -> subprocess.CompletedProcess:
    args = ("--dataset_dir", pictures, "--ckpt_dir", output, "--output_dir", output / "log", *args)
    args += ("--spatial_size", "[16,16]", "--epoch_length", 1, "--batch_size", 2, "--val_interval", 1)
    done = run_forked(BUNDLE, CONFIGS.get(model, FILTER), *args, *TINY.get(model, ()))
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("model", CONFIGS)
def test_training_that_was_cut_off_ends_with_the_weights_of_one_that_was_not(pictures, tmp_path, model):
    train(model, pictures, tmp_path / "whole", "--epochs", 2)
    # the schedule of the learning rate is that of two epochs, of which this run makes the first
    train(model, pictures, tmp_path / "cut", "--epochs", 1, "--lr_scheduler#t_total", 2)
    done = train(model, pictures, tmp_path / "cut", "--epochs", 2)
    assert "going on from iteration 1" in done.stdout and "val_diffusion" in done.stdout
    whole, cut = (torch.load(tmp_path / name / "model.pt", weights_only=True) for name in ("whole", "cut"))
    assert list(whole) == list(cut) and all(torch.equal(whole[name], cut[name]) for name in whole)
    sheets = [path.name for path in sorted((tmp_path / "cut" / "log").glob("*.png"))]
    assert sheets == ["samples_0001.png", "samples_0002.png", "schedule_0001.png", "schedule_0002.png"]
    if model == "medvdm":
        assert whole["codec.grey_scale"] != 0.05, "the 8-bit likelihood was not calibrated"
    else:
        net = VariationalDiffusionNet(spatial_size=(16, 16), channels=(32, 32))
        net.standardise([{"image": training_images(BUNDLE, pictures, spatial_size=[16, 16])}])
        assert all(torch.equal(whole[f"score.{name}"], getattr(net.score, name).half()) for name in ("mean", "std"))


def test_a_copy_filter_whose_training_was_cut_off_ends_as_one_that_was_not_and_holds_all_training_images(pictures, tmp_path):
    train("filter", pictures, tmp_path / "whole", "--epochs", 2)
    train("filter", pictures, tmp_path / "cut", "--epochs", 1, "--lr_scheduler#t_total", 2)
    done = train("filter", pictures, tmp_path / "cut", "--epochs", 2)
    assert "going on from iteration 1" in done.stdout and not (tmp_path / "cut" / "model.pt").exists()
    whole, cut = (torch.load(tmp_path / name / "copy_filter.pt", weights_only=True) for name in ("whole", "cut"))
    assert list(whole) == list(cut) and all(torch.equal(whole[name], cut[name]) for name in whole)
    network = load_copy_filter(tmp_path / "whole" / "copy_filter.pt", (16, 16))
    images = training_images(BUNDLE, pictures, spatial_size=[16, 16])
    assert network.index.shape == (32, 128) and network.held_out.shape == (2,)
    similarity, numbers = network.nearest(images)
    assert (similarity + network.common[numbers] / 4).min() > 0.99
    assert (numbers == torch.arange(32)).float().mean() > 0.9


@pytest.mark.parametrize("model", CONFIGS)
def test_the_configured_network_is_small_enough_to_ship(model):
    parser = ConfigParser()
    parser.read_config(
        [BUNDLE / "configs" / "train.json", *([BUNDLE / "configs" / "train_medvdm.json"][: model != "image"])]
    )
    network = parser.get_parsed_content("network_def")
    assert network.weighting == ("mixed" if model == "image" else "bound")
    assert 2 * sum(p.numel() for p in network.parameters()) < 20e6
    assert network.spatial_size == (64, 64)


def test_the_unadapted_training_departs_from_the_paper_in_none_of_the_three_ways():
    parser = ConfigParser()
    parser.read_config([BUNDLE / "configs" / f"{n}.json" for n in ("train", "train_medvdm", "train_medvdm_unadapted")])
    network = parser.get_parsed_content("network_def")
    assert (network.diffusion_weight, network.weighting) == (1, "bound")
    assert parser["augmentation#transforms"] == [] and not any("standardise" in step for step in parser["run"])


def test_inference_and_evaluation_take_the_weights_that_training_the_papers_model_gives():
    networks = []
    for names, wanted in (
        (("train", "train_medvdm"), "network_def"),
        (("train", "train_medvdm", "train_medvdm_unadapted"), "network_def"),
        (("inference", "inference_medvdm"), "network_def"),
        (("inference", "evaluate"), "medvdm"),
    ):
        parser = ConfigParser()
        parser.read_config([BUNDLE / "configs" / f"{name}.json" for name in names])
        networks.append(parser.get_parsed_content(wanted))
    trained, *others = networks
    for network in others:
        network.load_state_dict(trained.state_dict())
        assert type(network.schedule) is type(trained.schedule) is SCHEDULES["monotonic"]
