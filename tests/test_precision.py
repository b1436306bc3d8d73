from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch

from scripts import precision
from scripts.precision import arithmetic, autocast, check_amp, hardware, has_bfloat16

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def forget_what_was_found():
    precision._uses_bfloat16.cache_clear()
    yield
    precision._uses_bfloat16.cache_clear()


def pretend(monkeypatch, units=(), used="AVX512", cuda=None):
    """A processor with the given units, of which PyTorch uses some; a GPU, or none, that has bfloat16, or not."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": "Made Up 7", **dict.fromkeys(units, True)})
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: used)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda is not None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: cuda or including_emulation)


def network(amp):
    return SimpleNamespace(amp=amp)


@pytest.mark.parametrize(
    ("units", "used", "native"),
    [
        (("avx2", "avx512_f", "avx512_bf16"), "AVX512", True),
        (("avx2", "avx512_f", "amx_bf16"), "AVX512", True),
        (("avx2", "avx512_f"), "AVX512", False),
        (("avx2",), "AVX2", False),
        ((), "DEFAULT", False),
        (("avx2", "avx512_f", "avx512_bf16"), "AVX2", False),  # by ATEN_CPU_CAPABILITY=avx2
    ],
)
def test_a_processor_computes_in_bfloat16_only_with_units_for_it_that_are_used(monkeypatch, units, used, native):
    pretend(monkeypatch, units, used)
    assert has_bfloat16("cpu") is native
    assert arithmetic(network("auto"), CPU) == ("bfloat16" if native else "float32")
    assert autocast(torch.zeros(1), "auto")._enabled is native


@pytest.mark.parametrize(("cuda", "native"), [(None, False), (False, False), (True, True)])
def test_a_gpu_computes_in_bfloat16_only_where_that_is_no_emulation(monkeypatch, cuda, native):
    pretend(monkeypatch, ("avx512_bf16",), cuda=cuda)
    assert has_bfloat16("cuda") is native
    assert arithmetic(network("auto"), torch.device("cuda")) == ("bfloat16" if native else "float32")


def test_other_devices_compute_in_float32():
    assert not has_bfloat16("mps") and arithmetic(network("auto"), torch.device("meta")) == "float32"


def test_true_and_false_force_the_arithmetic_whatever_the_hardware(monkeypatch):
    pretend(monkeypatch, ("avx512_bf16",))
    assert arithmetic(network(False), CPU) == "float32" and arithmetic(network(True), CPU) == "bfloat16"
    pretend(monkeypatch)
    precision._uses_bfloat16.cache_clear()
    assert arithmetic(network(False), CPU) == "float32" and arithmetic(network(True), CPU) == "bfloat16"


def test_forcing_bfloat16_on_hardware_without_it_warns_once_in_one_line(monkeypatch, caplog):
    pretend(monkeypatch, ("avx2",), "AVX2")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert autocast(torch.zeros(1), True)._enabled
    (record,) = caplog.records
    assert "bfloat16 is forced" in record.message and "\n" not in record.message


def test_nothing_warns_where_bfloat16_is_native_or_not_asked_for(monkeypatch, caplog):
    pretend(monkeypatch, ("avx512_bf16",))
    autocast(torch.zeros(1), True)
    pretend(monkeypatch)
    autocast(torch.zeros(1), "auto"), autocast(torch.zeros(1), False)
    assert not caplog.records


def test_a_network_computes_in_what_its_setting_resolves_to(monkeypatch):
    layer, x = torch.nn.Linear(2, 2), torch.ones(1, 2)
    for units, expected in ((("avx512_bf16",), torch.bfloat16), ((), torch.float32)):
        pretend(monkeypatch, units)
        precision._uses_bfloat16.cache_clear()
        with autocast(x, "auto"):
            assert layer(x).dtype == expected


def test_a_network_without_the_setting_computes_in_float32():
    assert arithmetic(torch.nn.Linear(1, 1), CPU) == "float32"


@pytest.mark.parametrize("amp", ["Auto", "true", "no", 1, 0, None, 0.5])
def test_other_settings_are_refused(amp):
    with pytest.raises(ValueError, match="amp must be auto, true or false; got"):
        check_amp(amp)
    with pytest.raises(ValueError, match="amp must be auto, true or false; got"):
        autocast(torch.zeros(1), amp)


def test_the_hardware_has_a_name(monkeypatch):
    pretend(monkeypatch)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert hardware(CPU) == "Made Up 7, 2 threads with AVX512"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Accelerator 9")
    assert hardware(torch.device("cuda")) == "Accelerator 9"
