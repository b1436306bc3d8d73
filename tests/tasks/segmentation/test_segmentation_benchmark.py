from __future__ import annotations

import pytest
import torch
from conftest import SEGMENTATION, save_patient

from scripts.data.sections import section_of
from scripts.networks.segmentation_ensemble import SegmentationEnsembleNet
from scripts.tasks.segmentation.benchmark import labelled_slices, segmentation_benchmark


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scans")
    save_patient(folder, next(n for n in map(str, range(99)) if section_of(n) == "validation"), num_slices=6)
    return folder


def test_the_slices_are_half_with_a_lesion_and_half_without(scans):
    images, masks = labelled_slices(SEGMENTATION, scans, 4, "validation")
    assert images.shape == (4, 3, 128, 128) and masks.shape == (4, 1, 128, 128)
    assert masks.flatten(1).any(dim=1).tolist() == [True, True, False, False]


def test_the_work_of_the_published_procedure_is_that_of_its_calls(scans):
    torch.manual_seed(0)
    settings = {"channels": (16, 32), "num_levels": 20}
    networks = {
        "published": SegmentationEnsembleNet(**settings, num_samples=5, num_steps=20, solver="ancestral").eval(),
        "default": SegmentationEnsembleNet(**settings, num_samples=2, num_steps=2).eval(),
    }
    rows = segmentation_benchmark(SEGMENTATION, networks, str(scans), 2, "validation")
    published, default = rows[0], rows[1]
    assert published["unet calls"] == 100 and default["unet calls"] == 4
    assert published["gflop"] / default["gflop"] == pytest.approx(25, rel=1e-3)
    assert 0 <= default["pooled_dice"] <= 1
