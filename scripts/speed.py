"""How fast a network is, and why: the work that it does, the arithmetic and batches that it does it in, the machine's peak.

Less work is a gain of the method; batches and bfloat16 are what a machine adds, and are told apart from it.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from pydoc import locate
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from tqdm import tqdm

from scripts.bundle import build_network, configuration
from scripts.precision import arithmetic, hardware, has_bfloat16
from scripts.tables import markdown_table, mean_and_std

__all__ = ["Trial", "benchmark", "calls_counted", "compare", "gflop_of", "peak_gflops"]

logger = logging.getLogger(__name__)

PUBLISHED, DEFAULT, HALF = "published", "default", "default, bfloat16"


@dataclass(frozen=True)
class Trial:
    """What networks are compared on.

    Args:
        inputs: what they get, each a batch of one, (1, ...).
        unit: what one of them is called, such as ``slice``.
        batch_size: that of the bundle's inference; 1 for a bundle that takes no batches.
        judge: figures of quality of the outputs of all inputs, each (1, ...), by column.
        columns: heading of each of these figures, or heading and format.
        others: further networks, one at a time in 32 bits.
    """

    inputs: Sequence[Tensor]
    unit: str
    batch_size: int = 1
    judge: Callable[[list[Tensor]], Mapping[str, float]] = field(default=lambda outputs: {})
    columns: Mapping[str, str | tuple[str, str]] = field(default_factory=dict)
    others: Mapping[str, nn.Module] = field(default_factory=dict)


def peak_gflops(device: torch.device, dtype: torch.dtype = torch.float32, repeats: int = 8) -> float:
    """Billions of operations a second of one large convolution, the most that a network of convolutions could reach."""
    with torch.inference_mode():
        x = torch.randn(8, 128, 64, 64, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
        conv = nn.Conv2d(128, 128, 3, padding=1, device=device, dtype=dtype).to(memory_format=torch.channels_last)
        conv(x)
        seconds = min(_timed(lambda: conv(x)[0, 0, 0, 0].item())[1] for _ in range(repeats))
    return 2 * 9 * 128 * x.numel() / seconds / 1e9


def _timed(call: Callable[[], object]) -> tuple[object, float]:
    begun = time.perf_counter()
    result = call()
    return result, time.perf_counter() - begun


@contextmanager
def calls_counted(network: nn.Module) -> Iterator[Counter]:
    """Count how often each sub-network (direct child) is evaluated, a batch of n as n times.

    What counts is its last layer with weights, since some sub-networks are not called as a whole.
    """
    calls: Counter = Counter()
    handles = []
    for name, child in network.named_children():
        layers = [m for m in child.modules() if any(True for _ in m.parameters(recurse=False))]
        if layers:

            def count(layer: nn.Module, inputs: tuple, output: Tensor, name: str = name) -> None:
                calls[name] += len(output)

            handles.append(layers[-1].register_forward_hook(count))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _run(network: nn.Module, batches: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Outputs of all batches, on the CPU, one for each input."""
    return [part for batch in tqdm(batches, leave=False, disable=None) for part in network(batch.to(device)).cpu().split(1)]


class _Work(TorchDispatchMode):
    """Operations, by PyTorch's own formulas, whose own counter takes no gradient by the input of a module."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        aten = torch.ops.aten
        on_cpu = {aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention]}
        self.formulas = {**flop_registry, **on_cpu}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = self.formulas.get(func._overloadpacket)
        if formula is not None:
            self.operations += formula(*args, **(kwargs or {}), out_val=out)
        return out


def gflop_of(network: nn.Module, batches: Sequence[Tensor], device: torch.device) -> float:
    """Billions of operations, two for a product and its sum, of convolutions, matrix products and attention."""
    with _Work() as work:
        _run(network, batches, device)
    return work.operations / 1e9


def compare(networks: Mapping[str, nn.Module], trial: Trial, device: torch.device) -> list[dict]:
    """Print work, time and quality of networks with the same weights as a Markdown table, and what each part brings.

    Args:
        networks: ``published`` and ``default``, in 32 bits; ``default, bfloat16`` where the hardware has that.
        trial: what on.
        device: where the networks are.

    Returns:
        a row a network and batch size: ``method``, ``batch``; for one input ``gflop``, calls of each sub-network and
        ``seconds``; ``times`` faster than the published procedure, ``share`` of the machine's peak in percent, and the
        trial's figures.
    """
    peaks = {"float32": peak_gflops(device)}
    if HALF in networks:
        peaks["bfloat16"] = peak_gflops(device, torch.bfloat16)
    told = ", ".join(f"{peak:.0f} GFLOP/s in {name}" for name, peak in peaks.items())
    logger.info(
        f"{len(trial.inputs)} {trial.unit}(s) on {hardware(device)}, figures for one; a large convolution reaches {told}"
    )

    runs = [(PUBLISHED, networks[PUBLISHED], 1), *((name, other, 1) for name, other in trial.others.items())]
    runs.append((DEFAULT, networks[DEFAULT], 1))
    if trial.batch_size > 1:
        runs.append((f"{DEFAULT}, batches of {trial.batch_size}", networks[DEFAULT], trial.batch_size))
    if HALF in networks:
        runs.append((HALF, networks[HALF], trial.batch_size))
    rows = []
    for name, network, size in runs:
        batches = torch.cat(list(trial.inputs)).split(size) if size > 1 else trial.inputs
        if name != PUBLISHED:  # whose time does not show what the first call pays for set-up
            _run(network, batches[:1], device)
        with calls_counted(network) as calls:
            outputs, seconds = _timed(lambda run=network, of=batches: _run(run, of, device))
        number = len(trial.inputs)
        gflop = gflop_of(network, batches, device) / number
        seconds /= number
        rows.append(
            {
                "method": name,
                "batch": size,
                **{f"{child} calls": count / number for child, count in calls.items()},
                "gflop": gflop,
                "seconds": seconds,
                "times": rows[0]["seconds"] / seconds if rows else 1.0,
                "share": 100 * gflop / seconds / peaks[arithmetic(network, device)],
                **trial.judge(outputs),
            }
        )
    columns = {key: (key, ".0f") for key in rows[0] if key.endswith(" calls")}
    columns |= {
        "gflop": ("GFLOP", ".1f"),
        "seconds": "seconds",
        "times": ("times faster", ".1f"),
        "share": ("% of peak", ".0f"),
    }
    columns |= trial.columns
    logger.info(markdown_table(mean_and_std(rows), columns))
    logger.info("\n".join(_lines(rows)))
    return rows


def _lines(rows: Sequence[Mapping[str, float]]) -> list[str]:
    """What the gain consists of, a line each."""
    published, default = (next(row for row in rows if row["method"] == name) for name in (PUBLISHED, DEFAULT))
    lines = [
        f"work: {published['gflop'] / max(default['gflop'], 1e-12):.1f} times less",
        f"time, in float32, one at a time: {default['times']:.1f} times less",
    ]
    batched = [row for row in rows if row["batch"] > 1 and row["method"] != HALF]
    base = batched[0] if batched else default
    if batched:
        lines.append(f"batches of {base['batch']}: {default['seconds'] / base['seconds']:.2f} times faster")
    half = [row for row in rows if row["method"] == HALF]
    if half:
        lines.append(f"bfloat16: {base['seconds'] / half[0]['seconds']:.2f} times faster")
    else:
        lines.append("bfloat16: not native here")
    return lines


def benchmark(bundle: Path, dataset_dir: str, number: int, section: str) -> Any:
    """Print a table of the published procedure and of the bundle's default, on the same data with the same weights.

    What the published procedure is, the network says (``published``, settings of its own). What is measured, and on what,
    is up to the function that ``benchmark`` in the bundle's ``evaluate.json`` names, which gets bundle, networks and the
    other arguments.
    """
    default = build_network(bundle, amp=False)
    device = next(default.parameters()).device
    networks = {PUBLISHED: build_network(bundle, amp=False, **default.published), DEFAULT: default}
    if has_bfloat16(device.type):
        networks[HALF] = build_network(bundle, amp=True)
    settings = ", ".join(f"{key} {value}" for key, value in default.published.items())
    logger.info(f"{bundle.name} on {dataset_dir} ({section}); published: {settings}")
    measure = locate(configuration(bundle, "inference", "evaluate")["benchmark"])
    return measure(bundle, networks, dataset_dir, number, section)
