from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
from conftest import rows_of, save_nifti
from matplotlib.image import imread
from monai.bundle import ConfigWorkflow
from monai.data import MetaTensor
from monai.transforms import Orientation
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import nn

from scripts.metrics import dice
from scripts.tasks.anomaly import evaluation
from scripts.tasks.anomaly.evaluation import (
    GreyLevelMapd,
    healthy_images,
    paint_sprites,
    sprite_scores,
    sprite_table,
    worst_cases,
)

FIGURES = ["best_dice", "best_threshold", "auprc", "auroc", "image_auroc", "image_auprc", "seconds"]

Y, X = torch.meshgrid(torch.linspace(-1, 1, 32), torch.linspace(-1, 1, 32), indexing="ij")

HEAD = (Y / 0.8) ** 2 + (X / 0.9) ** 2 < 1


def make_slices(number=6):
    """Heads of flat grey with a little noise, in air."""
    noise = 0.02 * torch.randn(number, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    return torch.where(HEAD, 0.5 + noise, 0.05)


class Stub(nn.Module):
    """The map is what a slice differs by from flat heads, times ``gain``; the abnormality is its mean."""

    def __init__(self, gain=1.0):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))
        self.sizes = []

    def forward(self, image):
        assert not self.training
        self.sizes.append(len(image))
        healed = torch.where(HEAD, 0.5, 0.05).expand_as(image)
        anomaly = self.gain * (image - healed).abs().mean(dim=1, keepdim=True)
        score = anomaly.flatten(1).mean(dim=1).view(-1, 1, 1, 1).expand_as(anomaly)
        return torch.cat([anomaly, healed, score / (score + 0.01)], dim=1)


class Items:
    """What a SliceDataset is to ``healthy_images``."""

    def __init__(self, images, labels):
        self.slices = [{"image": x.half(), "class_label": c} for x, c in zip(images, labels, strict=True)]


def test_a_sprite_of_one_grey_level_is_painted_under_each_mask_and_nothing_else_changes():
    images = make_slices()
    before = images.clone()
    painted, masks = paint_sprites(images, seed=3)
    assert torch.equal(images, before)
    assert painted.shape == images.shape and masks.shape == (6, 1, 32, 32) and masks.dtype == torch.bool
    assert torch.equal(painted[~masks], images[~masks])
    for image, slice_, mask in zip(images, painted, masks, strict=True):
        assert mask.any() and slice_[mask].unique().numel() == 1
        assert abs(slice_[mask].mean() - image[mask].mean()) >= 0.2 - 1e-5


def test_what_lies_under_a_sprite_shows_through_if_asked():
    images = make_slices()
    even, masks = paint_sprites(images, seed=3)
    textured, same = paint_sprites(images, seed=3, texture=1.0)
    assert torch.equal(same, masks) and torch.equal(textured[~masks], images[~masks])
    for image, flat, slice_, mask in zip(images, even, textured, masks, strict=True):
        expected = (flat[mask] + image[mask] - image[mask].mean()).clamp(0, 1)
        torch.testing.assert_close(slice_[mask], expected, atol=1e-6, rtol=0)


def test_sprites_depend_on_the_seed_and_the_number_of_the_slice_alone():
    images = make_slices()
    painted, masks = paint_sprites(images, seed=1)
    assert torch.equal(paint_sprites(images, seed=1)[0], painted)
    assert torch.equal(paint_sprites(images[:2], seed=1)[1], masks[:2])
    assert not torch.equal(paint_sprites(images, seed=2)[1], masks)
    assert not torch.equal(masks[0], masks[1])


@pytest.mark.parametrize("bounds", [(0.05, 0.1), [0.3, 0.35], (0.5, 0.55)])
def test_the_contrast_of_sprites_lies_between_its_bounds(bounds):
    images = make_slices(12)
    painted, masks = paint_sprites(images, contrast=bounds)
    for image, slice_, mask in zip(images, painted, masks, strict=True):
        assert bounds[0] - 1e-5 <= abs(slice_[mask].mean() - image[mask].mean()) <= bounds[1] + 1e-5


def test_contrast_bounds_that_no_sprite_can_meet_are_refused(monkeypatch):
    monkeypatch.setattr(evaluation, "MAX_DRAWS", 20)
    with pytest.raises(ValueError, match="below the largest"):
        paint_sprites(make_slices(), contrast=(0.3, 0.3))
    with pytest.raises(ValueError, match="further apart"):
        paint_sprites(make_slices(1), contrast=(0.3, 0.3 + 1e-9))


def test_the_air_around_a_head_gets_no_sprite_and_neither_does_an_empty_slice():
    images = make_slices()
    images[2] = 0.1  # the air of MedNIST's head CT
    painted, masks = paint_sprites(images)
    assert torch.equal(painted[2], images[2]) and not masks[2].any()
    assert (images[masks] > 0.15).all()


def test_sprites_lie_in_the_head_and_not_in_the_holder_beside_it():
    images = make_slices(40)
    images[:, :, 30] = 0.6
    painted, masks = paint_sprites(images)
    assert masks.flatten(1).any(dim=1).all() and not (masks & ~HEAD).any()
    assert torch.equal(painted[:, :, 30], images[:, :, 30])


def test_healthy_images_are_evenly_spaced_and_show_something():
    images = make_slices(12)
    images[0] = 0.1
    dataset = Items(images, [0] * 11 + [1])
    assert torch.equal(healthy_images(dataset), images[1:11].half().float())
    assert torch.equal(healthy_images(dataset, 4), images[[1, 4, 7, 10]].half().float())
    with pytest.raises(ValueError, match="11 healthy slices are wanted, the data set has 10"):
        healthy_images(dataset, 11)


def test_scores_are_those_of_all_pixels_and_of_all_slices():
    images = make_slices(10)
    painted, masks = paint_sprites(images[:4], seed=0, contrast=(0.02, 0.1))
    scores = sprite_scores(Stub(), images[4:], painted, masks, batch_size=3)
    assert list(scores) == FIGURES

    output = Stub().eval()(torch.cat([painted, images[4:]])).detach()
    label, anomaly = masks.flatten().numpy(), output[:4, 0].flatten().numpy()
    assert scores["auroc"] == pytest.approx(roc_auc_score(label, anomaly), abs=1e-3)
    assert scores["auprc"] == pytest.approx(average_precision_score(label, anomaly), abs=1e-2)
    assert scores["best_dice"] == pytest.approx(
        max(dice(anomaly > threshold, label) for threshold in np.linspace(0, 0.2, 500)), abs=1e-2
    )
    assert dice(anomaly > scores["best_threshold"], label) == pytest.approx(scores["best_dice"], abs=1e-6)
    is_painted, abnormality = [1] * 4 + [0] * 6, output[:, 2, 0, 0]
    assert scores["image_auroc"] == pytest.approx(roc_auc_score(is_painted, abnormality))
    assert scores["image_auprc"] == pytest.approx(average_precision_score(is_painted, abnormality))
    assert scores["seconds"] > 0


def test_slices_come_in_batches_to_a_network_in_evaluation_mode():
    images, network = make_slices(7), Stub().train()
    sprite_scores(network, images[4:], *paint_sprites(images[:4]), batch_size=3)
    assert network.sizes == [1, 3, 1, 3]  # the first call pays for set-up


def test_healthy_and_painted_slices_are_both_needed():
    images = make_slices(2)
    with pytest.raises(ValueError, match="got 0 and 2"):
        sprite_scores(Stub(), images[:0], *paint_sprites(images))


def test_the_table_has_a_row_for_each_network_and_seed(tmp_path, caplog):
    networks = {"good": Stub(), "blind": Stub(0.0)}
    with caplog.at_level(logging.INFO, logger="scripts.tasks.anomaly.evaluation"):
        rows = sprite_table(networks, make_slices(8), tmp_path / "out", seeds=[0, 5])
    assert sorted(path.name for path in (tmp_path / "out").glob("m*")) == ["metrics.csv", "metrics_summary.json"]
    written = rows_of(tmp_path / "out" / "metrics.csv")
    assert list(written[0]) == ["method", "seed", *FIGURES]
    assert [(row["method"], row["seed"]) for row in written] == [
        ("good", "0"),
        ("good", "5"),
        ("blind", "0"),
        ("blind", "5"),
    ]
    assert [float(row["auprc"]) for row in written] == [row["auprc"] for row in rows]
    assert rows[0]["best_dice"] > 0.99 and rows[0]["auroc"] > 0.99 and rows[2]["auroc"] == 0.5

    summary = json.loads((tmp_path / "out" / "metrics_summary.json").read_text(encoding="utf-8"))
    values = [row["best_dice"] for row in rows if row["method"] == "blind"]
    assert summary["blind"]["best_dice"] == pytest.approx({"mean": np.mean(values), "std": np.std(values)})
    assert "4 painted and 4 healthy slices, 2 set(s) of sprites" in caplog.text
    assert f"| blind | {np.mean(values):.3f} ± {np.std(values):.3f} | " in caplog.text


def test_the_first_half_is_painted_and_slices_without_foreground_count_in_neither(tmp_path, caplog):
    images = make_slices(7)
    images[1] = 0.1
    network = Stub()
    with caplog.at_level(logging.INFO, logger="scripts.tasks.anomaly.evaluation"):
        rows = sprite_table({"net": network}, images, tmp_path, seeds=[2])
    assert "3 painted and 3 healthy slices" in caplog.text
    kept = images[[0, 2, 3, 4, 5, 6]]
    expected = sprite_scores(network, kept[3:], *paint_sprites(kept[:3], seed=2))
    assert {k: v for k, v in rows[0].items() if k not in ("method", "seed", "seconds")} == {
        k: v for k, v in expected.items() if k != "seconds"
    }


def test_the_curve_rises_with_the_contrast_and_is_drawn_for_the_named_networks(tmp_path):
    networks = {"good": Stub(), "blind": Stub(0.0)}
    sprite_table(networks, make_slices(12), tmp_path, seeds=[0], contrasts=[0.0, 0.1, 0.3], curve_of=["good"])
    points = rows_of(tmp_path / "contrast.csv")
    assert [(row["method"], row["contrast"]) for row in points] == [("good", c) for c in ("0.0", "0.1", "0.3")]
    dices = [float(row["best_dice"]) for row in points]
    assert dices == sorted(dices) and dices[0] < 0.9 < dices[2]
    assert imread(tmp_path / "contrast.png").shape[:2] == (500, 700)


@pytest.mark.parametrize("settings", [{"curve_of": ["other"], "contrasts": [0.2]}, {"worst_of": "other"}])
def test_the_name_of_an_unknown_network_is_refused_before_anything_runs(tmp_path, settings):
    network = Stub()
    with pytest.raises(ValueError, match="unknown network 'other': choose among net"):
        sprite_table({"net": network}, make_slices(), tmp_path, **settings)
    assert not network.sizes


def test_the_worst_cases_are_the_slices_of_lowest_dice_in_this_order(tmp_path):
    images = make_slices(4)
    masks = torch.zeros(4, 1, 32, 32, dtype=torch.bool)
    masks[:, :, 10:16, 10:16] = True
    painted = torch.where(masks, 0.9, images)
    masks[2] = masks[2].roll(12, dims=-1)  # nothing of it is found
    masks[1] = masks[1].roll(3, dims=-1)  # half of it
    assert worst_cases(tmp_path / "worst.png", Stub(), painted, masks, number=2) == [2, 1]
    assert imread(tmp_path / "worst.png").ndim == 3
    assert len(worst_cases(tmp_path / "all.png", Stub(), painted, masks, number=9)) == 4


def test_a_configuration_runs_the_whole_table(tmp_path):
    config = {
        "network": {"_target_": "test_anomaly_evaluation.Stub"},
        "dataset": {
            "_target_": "test_anomaly_evaluation.Items",
            "images": "$__import__('test_anomaly_evaluation').make_slices(8)",
            "labels": [0] * 8,
        },
        "sprites": {"radius": [3, 6], "contrast": 0.2},
        "table": {
            "_target_": "scripts.tasks.anomaly.evaluation.sprite_table",
            "networks": {"default": "@network"},
            "images": {"_target_": "scripts.tasks.anomaly.evaluation.healthy_images", "dataset": "@dataset", "number": 6},
            "output_dir": str(tmp_path / "out"),
            "seeds": [0],
            "radius": "@sprites#radius",
            "contrast": "@sprites#contrast",
            "contrasts": [0.1, 0.2],
            "worst_of": "default",
        },
        "initialize": [],
        "run": ["$@table"],
    }
    (tmp_path / "evaluate.json").write_text(json.dumps(config))
    workflow = ConfigWorkflow(str(tmp_path / "evaluate.json"), logging_file=False, workflow_type="infer")
    workflow.initialize()
    workflow.run()
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.name != "out_files.csv") == [
        "contrast.csv",
        "contrast.png",
        "metrics.csv",
        "metrics_summary.json",
        "worst_cases.png",
    ]


# --- GreyLevelMapd


def control_item(axcodes="RAS"):
    """A head of 40 x 40 voxels (2 x 2 x 5 mm, grey 0.4 of 1000) with a bright spot inside and one at the rim."""
    scan = torch.zeros(2, 48, 48, 3)
    scan[:, 4:44, 4:44] = 400
    scan[1, 22:26, 22:26] = scan[1, 4:8, 22:26] = 900
    meta = {"intensity_scale": [1000.0, 1000.0]}
    affine = torch.diag(torch.tensor([2.0, 2, 5, 1], dtype=torch.float64))
    image = Orientation(axcodes=axcodes, labels=None)(MetaTensor(scan, affine=affine, meta=meta))
    probability = torch.zeros(1, 48, 48, 3)
    probability[..., 1] = 1.0
    return {"image": image, "probability": Orientation(axcodes=axcodes, labels=None)(MetaTensor(probability, affine=affine))}


@pytest.mark.parametrize("axcodes", ["RAS", "LPI", "ASL"])
def test_the_controls_map_is_the_grey_level_inside_the_rim_where_the_classifier_sees_disease(axcodes):
    control = GreyLevelMapd("image", channel=1, sigma=(0.0, 0.0), rim=10.0)(control_item(axcodes))["control_map"]
    assert control.shape == (1, 48, 48, 3) and not control[..., [0, 2]].any()
    assert control[0, 22:26, 22:26, 1].unique().tolist() == pytest.approx([0.9])
    inside = torch.zeros(48, 48, dtype=torch.bool)
    inside[9:39, 9:39] = True  # 10 mm are 5 voxels, and the rim ends at the middle of the last
    assert torch.equal(control[0, ..., 1] > 0, inside)


def test_the_controls_map_is_smoothed_in_millimetres():
    control = GreyLevelMapd("image", channel=1, sigma=(4.0, 0.0), rim=0.0)(control_item())["control_map"]
    assert 0.4 < control[0, 24, 24, 1] < 0.8
    across = GreyLevelMapd("image", channel=1, sigma=(0.0, 5.0), rim=0.0)(control_item())["control_map"]
    assert across[0, 24, 24, 1] == pytest.approx(0.9 * 0.8664, rel=1e-3)  # of a Gaussian, within 1.5 standard deviations


# --- choose_floor


def made_results(folder, peaks):
    """Maps of patients with a lesion of height 1 in slice 0 and a false finding, of 0.8 ml and given height, in slice 4."""
    for i, peak in enumerate(peaks):
        shape, name = (16, 16, 6), f"p{i}"
        anomaly, label = np.zeros(shape, np.float32), np.zeros(shape, np.uint8)
        label[2:8, 2:8, 0] = 1
        anomaly[2:8, 2:8, 0] = 0.3
        anomaly[4:10, 4:10, 4] = peak  # 36 voxels of 20 mm³
        for sequence in ("t1", "flair", "t1ce"):
            save_nifti(folder / "scans" / name / f"{name}_{sequence}.nii.gz", np.full(shape, 90, np.uint8))
        save_nifti(folder / "scans" / name / f"{name}_seg.nii.gz", label)
        save_nifti(folder / "results" / name / f"{name}_map.nii.gz", anomaly)
    return folder / "results", str(folder / "scans")


def test_the_floor_is_the_smallest_that_bounds_what_is_found_in_healthy_slices(bundle, tmp_path):
    peaks = [0.02, 0.05, 0.09, 0.12, 0.19, 0.0, 0.0, 0.0, 0.0]
    paths = made_results(tmp_path, peaks)
    # the false findings are above a quarter of the peak, but not joined to what is above half of it but for the fifth's
    found = evaluation.choose_floor(bundle, *paths, most_ml=0.2, cap_ml=1.0, section="all")
    assert found == pytest.approx(0.01)  # (0.72 + 1) / 10
    assert evaluation.choose_floor(bundle, *paths, most_ml=0.15, cap_ml=1.0, section="all") == pytest.approx(0.19)
    with pytest.raises(ValueError, match="9 patients allow 0.1 at least"):
        evaluation.choose_floor(bundle, *paths, most_ml=0.05, cap_ml=1.0, section="all")


def test_a_case_without_a_map_is_named_with_the_mend(bundle, tmp_path):
    results, scans = made_results(tmp_path, [0.1])
    (results / "p0" / "p0_map.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match="p0_map.nii.gz.*evaluation with --section all"):
        evaluation.choose_floor(bundle, results, scans, section="all")
