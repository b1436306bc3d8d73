"""How much a scan is like the training's."""

import json

import pytest
import torch
from monai.data import MetaTensor
from torch.nn import functional

from scripts.fingerprint import CompareWithTrainingd, Fingerprint, figures_of


def heads(number: int, seed: int = 0, radius: float = 20.0, slices: int = 3) -> list[torch.Tensor]:
    """Cases (N, 2, 64, 64): ellipses, brighter at the top, of varying size and grey level, with noise."""
    g = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(64.0) - 32, torch.arange(64.0) - 32, indexing="ij")
    cases = []
    for _ in range(number):
        r = radius * (1 + 0.05 * torch.randn((), generator=g))
        inside = ((y / (1.3 * r)) ** 2 + (x / r) ** 2 < 1).float()
        level = 0.4 + 0.02 * torch.randn((), generator=g) - 0.004 * y
        noise = 0.03 * torch.randn(slices, 2, 64, 64, generator=g)
        cases.append((inside * (level + noise)).clamp(0, 1))
    return cases


@pytest.fixture(scope="module")
def fingerprint() -> Fingerprint:
    return Fingerprint.of(heads(60))


def flagged(fingerprint, slices) -> set[str]:
    return {name for name, ratio in fingerprint.compare(slices).items() if ratio > 1}


def test_scans_like_the_trainings_are_seldom_called_unlike_it(fingerprint):
    others = heads(100, seed=1)
    assert sum(bool(flagged(fingerprint, slices)) for slices in others) < 25  # four groups, each at 3 %


@pytest.mark.parametrize(
    ("change", "group"),
    [
        (lambda x: functional.interpolate(x, scale_factor=0.6), "size"),
        (lambda x: x**0.6, "grey levels"),
        (lambda x: torch.where(x > 0.1, 1 - x, x), "grey levels"),
        (lambda x: functional.avg_pool2d(x, 5, 1, 2), "sharpness"),
        (lambda x: x.flip(2), "layout"),
    ],
    ids=["another spacing", "another window", "inverted", "blurred", "upside down"],
)
def test_what_is_unlike_is_named(fingerprint, change, group):
    for slices in heads(5, seed=2):
        changed = change(slices)
        pad = (64 - changed.shape[-1]) // 2
        assert group in flagged(fingerprint, functional.pad(changed, (pad, 64 - changed.shape[-1] - pad) * 2))


def test_the_figures_are_those_of_a_disc_that_is_known():
    slices = torch.zeros(1, 1, 64, 64)
    slices[:, :, 16:48, 24:40] = 0.5
    figures = figures_of(slices)
    assert figures["size"].exp()[:3].tolist() == pytest.approx([0.5, 0.25, 0.125])
    assert figures["size"][3].item() == pytest.approx(1.0)
    assert figures["grey levels"].tolist() == pytest.approx([0.5] * 5 + [0])
    assert figures["sharpness"].exp().tolist() == pytest.approx([0.001] * 3)
    assert figures["layout"].tolist() == pytest.approx([1] * 16)


def test_a_file_keeps_what_it_says(fingerprint, tmp_path):
    fingerprint.save(tmp_path / "fingerprint.json")
    loaded, slices = Fingerprint.load(tmp_path / "fingerprint.json"), heads(1, seed=3)[0]
    assert loaded.num_cases == 60
    assert loaded.compare(slices) == pytest.approx(fingerprint.compare(slices), rel=1e-2)
    json.loads((tmp_path / "fingerprint.json").read_text(encoding="utf-8"))


def test_a_transform_says_it_with_the_image_and_nothing_without_a_file(fingerprint, tmp_path):
    fingerprint.save(tmp_path / "fingerprint.json")
    slices = heads(1, seed=3)[0]
    volume = MetaTensor(slices.movedim(0, -1))
    compare = CompareWithTrainingd("image", tmp_path / "fingerprint.json")
    said = compare({"image": volume})["image"].meta
    assert float(said["unlike_training"]) == pytest.approx(max(fingerprint.compare(slices).values()), abs=0.02)
    assert said["unlike_in"] == "" and float(compare({"image": MetaTensor(slices[0])})["image"].meta["unlike_training"]) < 2
    assert "grey levels" in compare({"image": volume**0.5})["image"].meta["unlike_in"]
    blank = compare({"image": 0 * volume})["image"].meta
    assert (blank["unlike_training"], blank["unlike_in"]) == ("", "")
    for path in (None, tmp_path / "none.json"):
        assert "unlike_training" not in CompareWithTrainingd("image", path)({"image": MetaTensor(slices[0])})["image"].meta


def test_nothing_is_said_of_a_scan_that_shows_nothing(fingerprint):
    assert fingerprint.compare(torch.zeros(2, 2, 64, 64)) == {}


def test_too_few_cases_are_refused():
    with pytest.raises(ValueError, match="19 cases are too few"):
        Fingerprint.of([*heads(19), torch.zeros(1, 2, 64, 64)])
