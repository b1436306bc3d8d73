"""All bundles on a GPU against the CPU, and several processes on GPUs; skipped where there is none.

``DEVICE=cpu pytest tests/gpu`` runs the same tests on a CPU in the GPU's place, with convolutions of another implementation,
so that the tests and their tolerances are tried. They were tried in that way alone: not run on a GPU yet.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import finished, torchrun
from small_runs import CHEST, INFERENCES, TRAININGS, infer, losses, make_data, train, training

DEVICE = os.environ.get("DEVICE", "cuda")
pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(), reason="no CUDA device; DEVICE=cpu runs these tests on the CPU"
)
# the gradients of interpolation (grid_sample, trilinear) and of fused attention are sums in any order there
IN_ANY_ORDER = ("cardiac", "cardiac, VoxelMorph", "head CT, transformer")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_data(folder)
    return folder


@pytest.fixture(autouse=True)
def all_of_float32(monkeypatch):
    """No TF32, which PyTorch takes for convolutions by itself: it has 10 bits of fraction where float32 has 23."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")  # of other processes


@contextmanager
def other_rounding() -> Iterator[None]:
    """On the CPU in the GPU's place, convolutions that round otherwise."""
    with torch.backends.mkldnn.flags(enabled=DEVICE != "cpu"):
        yield


def gradients(parser) -> list[torch.Tensor]:
    """Those of the last step, of the parameters that had one."""
    return [p.grad.cpu() for p in parser.get_parsed_content("network").parameters() if p.grad is not None]


def weights(parser) -> torch.Tensor:
    return torch.cat([p.detach().cpu().flatten() for p in parser.get_parsed_content("network").parameters()])


def outputs(parser) -> dict[str, float]:
    """The losses of the last step."""
    return parser.get_parsed_content("train#trainer").state.output


@pytest.mark.parametrize("name", INFERENCES)
def test_inference_gives_what_the_cpu_gives(data, tmp_path, name):
    """But for one voxel of 200, within 1e-4 of the largest; an 8-bit value or a class may fall to the other side there."""
    expected = infer(name, data, tmp_path / "cpu", "cpu")
    with other_rounding():
        found = infer(name, data, tmp_path / "gpu", DEVICE)
    assert list(found) == list(expected)
    for file, voxels in expected.items():
        gap = np.abs(found[file] - voxels) / max(np.abs(voxels).max(), 1e-9)
        assert (gap > 1e-4).mean() < 0.005 and gap.mean() < 1e-4, file


@pytest.mark.parametrize("name", INFERENCES)
def test_inference_in_bfloat16_stays_near_it(data, tmp_path, name):
    """The mean difference is below 2 % of the largest value."""
    expected = infer(name, data, tmp_path / "cpu", "cpu")
    found = infer(name, data, tmp_path / "gpu", DEVICE, amp=True)
    for file, voxels in expected.items():
        assert np.abs(found[file] - voxels).mean() < 0.02 * max(np.abs(voxels).max(), 1e-9), file


@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_step_is_that_of_the_cpu(data, tmp_path, name):
    """Losses to 1e-4; gradients to 1e-3 of their norm, small ones to 1e-6 of that of all; steps of the weights to 5 %."""
    expected = train(name, data, tmp_path / "cpu", "cpu")
    with other_rounding():
        found = train(name, data, tmp_path / "gpu", DEVICE)
    assert outputs(found) == pytest.approx(outputs(expected), rel=1e-4, abs=1e-6)
    mine, true = gradients(found), gradients(expected)
    total = torch.stack([gradient.norm() for gradient in true]).norm()
    assert len(mine) == len(true) > 0
    for one, other in zip(mine, true, strict=True):
        assert (one - other).norm() <= 1e-3 * (other.norm() + 1e-3 * total)
    rate = expected.get_parsed_content("learning_rate")  # Adam's first step is one of this length, whatever the gradient
    assert (weights(found) - weights(expected)).abs().mean() < 0.05 * rate


@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_step_in_bfloat16_stays_near_it(data, tmp_path, name):
    """Losses to 1 %, gradients within 11 degrees."""
    expected = train(name, data, tmp_path / "cpu", "cpu")
    found = train(name, data, tmp_path / "gpu", DEVICE, amp=True)
    assert outputs(found) == pytest.approx(outputs(expected), rel=0.01, abs=1e-3)
    mine, true = (torch.cat([gradient.flatten() for gradient in gradients(parser)]) for parser in (found, expected))
    assert torch.cosine_similarity(mine, true, dim=0) > 0.98


@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_that_goes_on_ends_as_one_that_was_not_cut_off(data, tmp_path, name):
    """With the same bytes; to 1e-3 where a GPU sums gradients in any order."""
    train(name, data, tmp_path / "whole", DEVICE, iterations=3)
    train(name, data, tmp_path / "cut", DEVICE, iterations=2, **{"lr_scheduler#t_total": 3})
    train(name, data, tmp_path / "cut", DEVICE, iterations=3)
    states = []
    for folder in ("whole", "cut"):
        (path,) = (tmp_path / folder).glob("*.ckpt")
        states.append(torch.load(path, map_location="cpu", weights_only=True))
    assert states[0]["iteration"] == states[1]["iteration"] == 3
    near = {"rtol": 0, "atol": 1e-3} if DEVICE == "cuda" and name in IN_ANY_ORDER else {"rtol": 0, "atol": 0}
    for part in ("network", "ema") if near["atol"] else ("network", "ema", "optimizer"):
        torch.testing.assert_close(states[1][part], states[0][part], **near, equal_nan=True)


TWO = pytest.mark.skipif(DEVICE == "cuda" and torch.cuda.device_count() < 2, reason="fewer than two GPUs")
PROCESSES = pytest.mark.parametrize("processes", [1, pytest.param(2, marks=TWO)])


def arguments(settings: dict) -> list[str]:
    return [str(part) for key, value in settings.items() for part in (f"--{key}", value)]


@pytest.fixture
def on_device(monkeypatch):
    """Other processes see no GPU if the CPU takes its place."""
    if DEVICE == "cpu":
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@PROCESSES
def test_processes_train_together_as_one_does(data, tmp_path, on_device, processes):
    """NCCL: losses to 1e-3."""
    train("brain", data, tmp_path / "one", DEVICE, iterations=3, batch_size=2 * processes)
    bundle, names, settings = training("brain", data, tmp_path / "together", iterations=3)
    files = [f"configs/{name}.json" for name in (*names, "multi_gpu_train")]
    finished(torchrun(bundle, str(files), *arguments(settings | {"amp": False}), processes=processes))
    assert losses(tmp_path / "together" / "log") == pytest.approx(losses(tmp_path / "one" / "log"), rel=1e-3)
    one, together = (torch.load(tmp_path / name / "model.pt", weights_only=True) for name in ("one", "together"))
    for key, value in one.items():
        torch.testing.assert_close(together[key], value, rtol=0.02, atol=2e-3, msg=lambda m, key=key: f"{key}: {m}")


@PROCESSES
def test_processes_share_a_cohort(data, tmp_path, on_device, processes):
    expected = infer("chest X-ray", data, tmp_path / "one", DEVICE)
    settings = INFERENCES["chest X-ray"][2] | {"output_dir": tmp_path / "together", "amp": False}
    files = "['configs/inference.json','configs/multi_gpu_inference.json']"
    finished(torchrun(CHEST, files, *arguments(settings), processes=processes))
    for file, pixels in expected.items():
        found = np.asarray(nib.load(tmp_path / "together" / file).dataobj)
        assert np.abs(found - pixels).max() <= 1 and (found != pixels).mean() < 0.005, file
