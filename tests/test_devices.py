"""All bundles on a GPU that is pretended, see :mod:`pretended_gpu`, where tensors of different devices do not mix.

This is how far the path over a GPU can be checked on a CPU; it was not run on a GPU yet, which ``tests/gpu`` is for.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ROOT
from monai.bundle import ConfigParser
from pretended_gpu import PretendedGPU
from small_runs import INFERENCES, TRAININGS, infer, make_data, train
from torch import nn

from scripts.engines import ema_of
from scripts.handlers import ModelSaver
from scripts.inferers import ConfiguredSliceInferer


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_data(folder)
    return folder


@pytest.fixture
def gpu() -> Iterator[PretendedGPU]:
    with PretendedGPU() as gpu:
        yield gpu


# --- the pretended GPU


def test_what_is_made_of_tensors_on_the_gpu_is_there_until_it_is_brought_back(gpu):
    x = torch.ones(3, device="cuda")
    layer = nn.Linear(3, 2).to("cuda")
    layer(x).sum().backward()
    here = [x, x + 1, x[:2], torch.zeros_like(x), torch.zeros(3).to(x), layer.weight, layer.weight.grad]
    assert all(y.device == gpu.device for y in here)
    there = [x.cpu(), torch.zeros(3), layer.cpu().weight, x.to("cpu", torch.float64)]
    assert all(y.device == torch.device("cpu") for y in there)
    assert x.cpu().numpy().tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "mix",
    [
        lambda x: x + torch.zeros(3),
        lambda x: torch.stack([x[0], torch.tensor(0.0)]),
        lambda x: torch.zeros(3)[x.long()],
        lambda x: nn.functional.mse_loss(x, torch.zeros(3)),
        lambda x: nn.Linear(3, 3)(x),
        lambda x: torch.randn(3, generator=torch.Generator(), device=x.device),
        lambda x: x.numpy(),
        lambda x: np.asarray(x),
    ],
)
def test_what_a_gpu_refuses_is_refused(gpu, mix):
    with pytest.raises((RuntimeError, TypeError), match="on the GPU|another device"):
        mix(torch.ones(3, device="cuda"))


def test_numbers_and_places_from_the_cpu_are_taken(gpu):
    x = torch.ones(3, device="cuda")
    x[torch.tensor([0])] = 2
    assert (x * torch.tensor(2.0))[torch.tensor([0, 1])].tolist() == [4, 2]


# --- the bundles


@pytest.mark.parametrize("name", INFERENCES)
def test_inference_runs_on_a_gpu(data, tmp_path, gpu, name):
    assert infer(name, data, tmp_path, "cuda", **{"checkpointloader#map_location": "cpu"})


@pytest.mark.parametrize("name", TRAININGS)
def test_training_runs_on_a_gpu(data, tmp_path, gpu, name):
    parser = train(name, data, tmp_path, "cuda")
    places = {p.device.type for p in parser.get_parsed_content("network").parameters()}
    assert places == {"cuda"} and len(list(tmp_path.glob("*.pt"))) == 1


def test_training_goes_on_on_a_gpu(data, tmp_path, gpu):
    train("brain", data, tmp_path, "cuda")
    parser = train("brain", data, tmp_path, "cuda", iterations=2)
    state = parser.get_parsed_content("optimizer").state_dict()["state"][0]
    assert parser.get_parsed_content("train#trainer").state.iteration == 2
    # a count on the GPU would have to be waited for
    assert state["exp_avg"].device == gpu.device and state["step"].device.type == "cpu"


def test_the_weights_that_a_training_writes_need_no_gpu(tmp_path, gpu):
    network = nn.Linear(2, 2).to("cuda")
    written = {}
    with mock.patch("torch.save", lambda state, path: written.update(state) or Path(path).touch()):
        ModelSaver(tmp_path / "model.pt", ema_of(network))(SimpleNamespace())
    assert list(written) == list(network.state_dict()) and not any(map(gpu.holds, written.values()))


def test_a_volume_may_stay_on_the_cpu_while_its_slices_go_to_the_network(gpu):
    configured, network = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1).to("cuda")
    inferer = ConfiguredSliceInferer(configured, roi_size=(4, 4), spatial_dim=2, sw_device="cuda", device="cpu")
    with torch.no_grad():
        output = inferer(torch.rand(1, 1, 4, 4, 3), network)
    assert output.device.type == "cpu" and configured.weight.device == gpu.device


# --- several GPUs


@pytest.mark.parametrize("kind", ["train", "inference"])
@pytest.mark.parametrize("bundle", [path.name for path in sorted((ROOT / "bundles").iterdir())])
def test_every_process_takes_its_gpu_before_it_meets_the_others(monkeypatch, bundle, kind):
    calls = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.set_device", calls.append)
    monkeypatch.setattr("torch.distributed.init_process_group", calls.append)
    for name, number in (("LOCAL_RANK", "1"), ("RANK", "3"), ("WORLD_SIZE", "4")):
        monkeypatch.setenv(name, number)
    parser = ConfigParser()
    parser.read_config([ROOT / "bundles" / bundle / "configs" / f"{name}.json" for name in (kind, f"multi_gpu_{kind}")])
    count = len(parser["initialize"])
    for number in (count - 2, count - 1):
        parser.get_parsed_content(f"initialize#{number}")
    assert calls == [torch.device("cuda", 1), "nccl"]
    assert parser.get_parsed_content("device") == calls[0]
