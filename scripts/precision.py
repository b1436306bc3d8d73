"""The arithmetic of the networks: bfloat16 where the hardware has it, else float32. Decided here and nowhere else."""

from __future__ import annotations

import logging
from functools import lru_cache

import torch
from torch import Tensor, nn

__all__ = ["Amp", "arithmetic", "autocast", "check_amp", "hardware", "has_bfloat16"]

logger = logging.getLogger(__name__)

Amp = bool | str  # True, False or "auto"


def has_bfloat16(device_type: str) -> bool:
    """Whether devices of a type, ``cpu`` or ``cuda``, compute in bfloat16 natively.

    A processor without AMX or AVX512-BF16 can do it too, but takes a hundred times as long as in float32.
    """
    if device_type == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type == "cpu":
        units = torch.cpu.get_capabilities()
        # ATEN_CPU_CAPABILITY can tell PyTorch not to use what the processor has
        is_used = "AVX512" in torch.backends.cpu.get_cpu_capability()
        return is_used and any(units.get(name, False) for name in ("amx_bf16", "avx512_bf16"))
    return False


def check_amp(amp: Amp) -> Amp:
    """The setting itself.

    Raises:
        ValueError: if it is none of True, False and ``auto``.
    """
    if amp is not True and amp is not False and amp != "auto":
        raise ValueError(f"amp must be auto, true or false; got {amp!r}")
    return amp


@lru_cache  # which also makes the warning come once
def _uses_bfloat16(amp: Amp, device_type: str) -> bool:
    if check_amp(amp) == "auto":
        return has_bfloat16(device_type)
    if amp and not has_bfloat16(device_type):
        logger.warning(f"bfloat16 is forced (amp), which this {device_type} device lacks: it may take 100 times as long")
    return bool(amp)


def autocast(x: Tensor, amp: Amp) -> torch.autocast:
    """Context in which networks compute on the device of x in bfloat16, or in float32.

    Args:
        x: any tensor on that device.
        amp: ``auto`` for bfloat16 where it is native; True and False force it, or float32.

    Raises:
        ValueError: for another ``amp``.
    """
    return torch.autocast(x.device.type, torch.bfloat16, enabled=_uses_bfloat16(amp, x.device.type))


def arithmetic(network: nn.Module, device: torch.device) -> str:
    """``bfloat16`` or ``float32``, as the network's ``amp`` has it on the device; without such an attribute ``float32``."""
    return "bfloat16" if _uses_bfloat16(getattr(network, "amp", False), device.type) else "float32"


def hardware(device: torch.device) -> str:
    """Name of the processor with the number of threads in use, or of the GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        name = torch.cpu.get_capabilities().get("cpu_name", "processor")
        threads = torch.get_num_threads()
        return f"{name}, {threads} thread{'s' if threads > 1 else ''} with {torch.backends.cpu.get_cpu_capability()}"
    return device.type
