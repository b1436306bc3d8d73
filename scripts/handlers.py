"""Handlers that keep the state of a training, and show its progress.

Files appear whole or not at all: they are written aside and renamed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from scripts.files import own_file, written_aside

__all__ = ["Calibration", "ModelSaver", "ProgressBar", "TrainingCheckpoint"]

logger = logging.getLogger(__name__)


class TrainingCheckpoint:
    """Save a training's whole state every few minutes and at its end, and go on from it when there is one.

    Together with a sampler and a trainer whose random draws depend on the iteration's number alone, a training that was
    cut off ends with the same weights, byte for byte, as one that was not. Its length (``t_total`` of MONAI's schedules) is
    what it is told now, so that a training may be ended sooner, or later, than it was begun with.

    Args:
        path: file of the state; loaded at the start if it is there.
        objects: what to save, by name: anything with ``state_dict`` and ``load_state_dict``.
        sampler: batch sampler, whose ``start`` is set to the iteration.
        minutes: time between two checkpoints.
    """

    def __init__(self, path: str | Path, objects: Mapping[str, Any], sampler: Any, minutes: float = 5.0) -> None:
        self.path, self.objects, self.sampler, self.seconds = Path(path), dict(objects), sampler, 60 * minutes
        self.saved = time.monotonic()

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.resume)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
        engine.add_event_handler(Events.COMPLETED, self.save)

    def resume(self, engine: Engine) -> None:
        """Load the state, if there is one.

        Raises:
            ValueError: if the file is something else, or the epochs have another length than when the state was saved.
        """
        if not self.path.is_file():
            return
        # every state goes from the CPU to where it belongs; the optimizer's counts stay there
        state = torch.load(self.path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not {"epoch_length", "iteration", *self.objects} <= state.keys():
            raise ValueError(f"{self.path}: is no state of such a training; move it elsewhere, or choose another --ckpt_dir")
        if state["epoch_length"] != engine.state.epoch_length:
            raise ValueError(
                f"{self.path} was saved with {state['epoch_length']} iterations an epoch, this training has "
                f"{engine.state.epoch_length}: use the same settings, or another --ckpt_dir"
            )
        for name, item in self.objects.items():
            length = {"t_total": item.t_total} if hasattr(item, "t_total") else {}
            item.load_state_dict(state[name] | length)
        engine.state.iteration = self.sampler.start = state["iteration"]
        engine.state.epoch = state["iteration"] // engine.state.epoch_length
        logger.info(f"going on from iteration {engine.state.iteration} ({self.path})")

    def __call__(self, engine: Engine) -> None:
        if time.monotonic() - self.saved > self.seconds:
            self.save(engine)

    def save(self, engine: Engine) -> None:
        if idist.get_rank():  # all processes have the same state, one writes it
            return
        state = {name: item.state_dict() for name, item in self.objects.items()}
        state |= {"iteration": engine.state.iteration, "epoch_length": engine.state.epoch_length}
        with written_aside(self.path) as aside:
            torch.save(state, aside)
        self.saved = time.monotonic()


class Calibration:
    """Measure what the averaged model of healthy slices makes of held-out ones, so that the weights carry its thresholds.

    To be put before :class:`ModelSaver`.

    Args:
        ema: the averaged network, a :class:`scripts.networks.healthy_model.HealthyModel`.
        network: the network in training, which gets the same thresholds, since the average copies its buffers.
        loader: batches of held-out healthy slices.
        interval: epochs between two measurements; the last epoch always ends with one.
    """

    def __init__(self, ema: AveragedModel, network: nn.Module, loader: Iterable[dict], interval: int = 1) -> None:
        self.ema, self.network, self.loader, self.interval = ema, network, loader, interval

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        if engine.state.epoch % self.interval and engine.state.epoch != engine.state.max_epochs:
            return
        self.ema.module.calibrate(self.loader)
        for mine, measured in zip(self.network.buffers(), self.ema.module.buffers(), strict=True):
            mine.copy_(measured)


class ModelSaver:
    """Write the averaged weights as the bundle's ``model.pt``: a plain state dict, CPU tensors only, in half precision.

    A tensor that half precision can't hold stays as it is, such as the counts of a codebook, which may exceed 65,504. A file
    of that name that no training wrote, such as the bundle's shipped weights, is kept as ``model.pt.<hash>``, the first 12
    digits of its SHA-256, by which ``results.csv`` calls weights; see :func:`scripts.files.own_file`.

    Args:
        path: the file.
        ema: the averaged network.

    Raises:
        FloatingPointError: if a tensor is not finite; the file stays as it was.
    """

    def __init__(self, path: str | Path, ema: AveragedModel) -> None:
        self.path, self.ema = Path(path), ema

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        if idist.get_rank():
            return
        network: nn.Module = self.ema.module
        state = {name: _in_half_precision(value).cpu() for name, value in network.state_dict().items()}
        if faulty := [name for name, value in state.items() if not value.isfinite().all()]:
            raise FloatingPointError(
                f"{self.path} is not written: {', '.join(faulty)} would hold values that are not finite; "
                "train with a smaller --learning_rate"
            )
        with own_file(self.path, keep=True) as aside:
            torch.save(state, aside)


def _in_half_precision(value: Tensor) -> Tensor:
    half = value.half() if value.is_floating_point() else value
    return half if half.isfinite().all() else value


class ProgressBar:
    """Bar over all iterations of a training, with the losses (averaged over the last hundred or so) and the time left."""

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
        engine.add_event_handler(Events.COMPLETED, lambda: self.bar.close())

    def start(self, engine: Engine) -> None:
        total = engine.state.max_epochs * engine.state.epoch_length
        self.mean: dict[str, float] = {}
        self.bar = tqdm(
            total=total,
            initial=engine.state.iteration,
            desc="training",
            mininterval=1,
            disable=bool(idist.get_rank()) or None,
        )

    def __call__(self, engine: Engine) -> None:
        for name, value in engine.state.output.items():
            self.mean[name] = 0.99 * self.mean.get(name, value) + 0.01 * value
        self.bar.set_postfix({name: f"{value:.4f}" for name, value in self.mean.items()}, refresh=False)
        self.bar.update()
