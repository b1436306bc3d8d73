from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import nn

from scripts.networks.ddim_anomaly import DDIMAnomalyNet
from scripts.release import demo


class Painter(nn.Module):
    """Draws flat heads, brighter from slice to slice."""

    def draw(self, number):
        slices = torch.full((number, 1, 64, 64), 0.05)
        slices[:, :, 8:56, 4:50] = 0.4 + 0.01 * torch.arange(number).view(-1, 1, 1, 1)
        return slices


def test_a_network_that_draws_gives_a_volume_with_one_sprite_in_its_middle_slice(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(demo, "build_network", lambda bundle, **settings: asked.append(settings) or Painter())
    demo.draw_scan(tmp_path, tmp_path / "scan.nii.gz", num_slices=5, seed=3)
    assert asked == [{"seed": 3, "amp": False}]
    scan = nib.load(tmp_path / "scan.nii.gz")
    data = np.asarray(scan.dataobj)
    assert data.shape == (64, 64, 5) and data.dtype == np.uint8
    assert nib.aff2axcodes(scan.affine) == ("L", "P", "S") and scan.header.get_zooms() == (4.5, 4.5, 5.0)
    changed = (data != (255 * Painter().draw(5)).round().byte()[:, 0].permute(1, 2, 0).numpy()).any(axis=(0, 1))
    assert changed.tolist() == [False, False, True, False, False]


def test_a_network_that_translates_gives_a_volume_with_all_sequences(tmp_path, monkeypatch):
    def build_network(bundle, **settings):
        torch.manual_seed(0)
        kwargs = {**settings, "num_steps": 2, "noise_level": 300}
        return DDIMAnomalyNet(
            in_channels=2, spatial_size=(32, 32), channels=(16, 32), classifier_channels=(32, 32), **kwargs
        )

    monkeypatch.setattr(demo, "build_network", build_network)
    demo.draw_scan(tmp_path, tmp_path / "scan.nii.gz", num_slices=4)
    scan = nib.load(tmp_path / "scan.nii.gz")
    assert scan.shape == (32, 32, 4, 2) and nib.aff2axcodes(scan.affine) == ("R", "P", "S")
    assert np.asarray(scan.dataobj).max() > 0 and scan.header.get_zooms()[:3] == pytest.approx((2, 2, 5))


def test_the_drawn_heart_ejects_nearly_half_of_its_blood(tmp_path):
    demo.draw_cine(tmp_path / "cine.nii.gz", num_slices=3, num_frames=5)
    file = nib.load(tmp_path / "cine.nii.gz")
    cine = np.asarray(file.dataobj)
    assert cine.shape == (96, 96, 3, 5) and file.header.get_zooms()[:3] == (1.5, 1.5, 10.0)
    middle = cine[48:66, 30:66, 0]  # half of the left ventricle, and nothing of the right one
    blood = [(middle[..., frame] > 145).sum() for frame in range(5)]
    assert blood == sorted(blood, reverse=True)
    assert blood[-1] / blood[0] == pytest.approx(0.56, abs=0.03)
