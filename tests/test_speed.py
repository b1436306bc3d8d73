from __future__ import annotations

import json
import logging

import pytest
import torch
from torch import nn

from scripts import speed
from scripts.speed import Trial, calls_counted, compare, gflop_of, peak_gflops

CPU = torch.device("cpu")


class Net(nn.Module):
    """Convolves its input some times, the last time with a layer of its own."""

    def __init__(self, steps: int = 3, amp: bool = False) -> None:
        super().__init__()
        self.steps, self.amp, self.sizes = steps, amp, []
        self.unet = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.SiLU(), nn.Conv2d(2, 2, 3, padding=1))
        self.head = nn.Conv2d(2, 1, 1)
        self.fold = nn.PixelUnshuffle(2)  # has no weights, and is no sub-network

    @torch.no_grad()
    def forward(self, image):
        self.sizes.append(len(image))
        for _ in range(self.steps):
            image = self.unet(image)
        return self.head(image)


GFLOP = {"unet": 2 * 2 * 9 * 2 * 2 * 8 * 8 / 1e9, "head": 2 * 2 * 8 * 8 / 1e9}  # of one evaluation on 8 x 8 pixels


def inputs(number):
    return torch.randn(number, 2, 8, 8, generator=torch.Generator().manual_seed(0)).split(1)


def test_the_work_of_convolutions_is_counted_as_two_operations_for_a_product_and_its_sum():
    assert gflop_of(Net(3), inputs(2), CPU) == pytest.approx(2 * (3 * GFLOP["unet"] + GFLOP["head"]))


def test_the_gradient_of_a_network_counts_as_work_too():
    class Guided(Net):
        def forward(self, image):
            with torch.enable_grad():
                image = image.clone().requires_grad_()
                return torch.autograd.grad(self.unet(image).sum(), image)[0]

    assert gflop_of(Guided(), inputs(1), CPU) >= 2 * GFLOP["unet"]


def test_an_evaluation_of_a_batch_counts_for_each_of_it_and_the_hooks_are_taken_off_again():
    network = Net(3)
    with calls_counted(network) as calls:
        network(torch.cat(inputs(4)))
    assert dict(calls) == {"unet": 12, "head": 4}
    network(torch.cat(inputs(4)))
    assert dict(calls) == {"unet": 12, "head": 4}


def test_the_peak_is_that_of_a_convolution_which_no_other_layer_exceeds_by_much():
    assert 0.5 < peak_gflops(CPU, repeats=2) < 1e5


@pytest.fixture
def made_peaks(monkeypatch):
    monkeypatch.setattr(speed, "peak_gflops", lambda device, dtype=torch.float32: 200 if dtype == torch.float32 else 400)


def test_the_comparison_tells_work_batches_and_bfloat16_apart(made_peaks, caplog):
    networks = {"published": Net(20), "default": Net(5), "default, bfloat16": Net(5, amp=True)}
    trial = Trial(inputs(6), "slice", 4, judge=lambda outputs: {"number": len(outputs)}, columns={"number": ("n", ".0f")})
    with caplog.at_level(logging.INFO, logger="scripts.speed"):
        rows = compare(networks, trial, CPU)
    assert [(row["method"], row["batch"]) for row in rows] == [
        ("published", 1),
        ("default", 1),
        ("default, batches of 4", 4),
        ("default, bfloat16", 4),
    ]
    for row, steps, peak in zip(rows, (20, 5, 5, 5), (200, 200, 200, 400), strict=True):
        assert (row["unet calls"], row["head calls"], row["number"]) == (steps, 1, 6)
        assert row["gflop"] == pytest.approx(steps * GFLOP["unet"] + GFLOP["head"])
        assert row["share"] == pytest.approx(100 * row["gflop"] / row["seconds"] / peak)
        assert row["times"] == pytest.approx(rows[0]["seconds"] / row["seconds"])
    work = rows[0]["gflop"] / rows[1]["gflop"]
    told = caplog.text
    assert f"work: {work:.1f} times less" in told and "200 GFLOP/s in float32, 400 GFLOP/s in bfloat16" in told
    assert f"time, in float32, one at a time: {rows[1]['times']:.1f} times less" in told
    assert f"batches of 4: {rows[1]['seconds'] / rows[2]['seconds']:.2f} times faster" in told
    assert f"bfloat16: {rows[2]['seconds'] / rows[3]['seconds']:.2f} times faster" in told
    assert "| default, batches of 4 | 5 | 1 |" in told


def test_the_published_procedure_gets_one_input_at_a_time_and_no_warm_up(made_peaks):
    networks = {"published": Net(1), "default": Net(1)}
    compare(networks, Trial(inputs(6), "slice", 4), CPU)
    one_at_a_time, batches = [1, *[1] * 6, *[1] * 6], [4, 4, 2, 4, 2]  # warmed up, timed, and then counted
    assert networks["published"].sizes == [1] * 12 and networks["default"].sizes == one_at_a_time + batches


def test_a_bundle_without_batches_and_hardware_without_bfloat16_have_no_rows_for_them(made_peaks, caplog):
    shapes = [torch.randn(1, 2, size, 8) for size in (8, 12)]  # which no batch could hold
    with caplog.at_level(logging.INFO, logger="scripts.speed"):
        rows = compare({"published": Net(2), "default": Net(1)}, Trial(shapes, "cine", others={"half way": Net(1)}), CPU)
    assert [row["method"] for row in rows] == ["published", "half way", "default"]
    assert "bfloat16: not native here" in caplog.text and "batches" not in caplog.text


def test_a_bundle_is_measured_by_the_function_that_its_evaluation_names(tmp_path, monkeypatch):
    class Published(Net):
        published = {"steps": 7}

    asked, built = [], []

    def build_network(bundle, **settings):
        built.append(Published(**settings))
        return built[-1]

    monkeypatch.setattr(speed, "build_network", build_network)
    monkeypatch.setattr(speed, "has_bfloat16", lambda device_type: False)
    monkeypatch.setattr("scripts.tasks.generation.benchmark.benchmark_sampling", lambda *args: asked.append(args) or "rows")
    name = {"benchmark": "scripts.tasks.generation.benchmark.benchmark_sampling"}
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "inference.json").write_text("{}")
    (tmp_path / "configs" / "evaluate.json").write_text(json.dumps(name))
    assert speed.benchmark(tmp_path, "data", 12, "test") == "rows"
    ((bundle, networks, *rest),) = asked
    assert bundle == tmp_path and rest == ["data", 12, "test"]
    assert list(networks) == ["published", "default"]
    assert networks["default"] is built[0] and networks["published"] is built[1] and built[1].steps == 7
