"""Engines that train and run the methods, on MONAI's and Ignite's.

A network that trains here has ``losses(image, class_label, generator)``, which returns a dictionary of scalars; one that
trains in stages has such a method for each. What takes the place of the class, such as a mask, the engine's ``label_key``
says. ``amp`` is its arithmetic, see :mod:`scripts.precision`.
"""

from __future__ import annotations

import csv
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import ignite.distributed as idist
import numpy as np
import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from monai.engines import Evaluator, SupervisedEvaluator, SupervisedTrainer
from monai.utils import convert_to_tensor
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from scripts.data.cohort import root_cause, table_rows
from scripts.files import written_aside
from scripts.precision import arithmetic, hardware
from scripts.samplers import mean_of_processes

__all__ = ["CohortEvaluator", "DiffusionTrainer", "DiffusionValidator", "distributed", "ema_of"]

logger = logging.getLogger(__name__)

Objective = Callable[[Tensor, Tensor, torch.Generator], dict[str, Tensor]]


def _generator(*numbers: int) -> torch.Generator:
    """Source of random numbers, on the CPU (:func:`scripts.samplers.for_batch`), that depends on the given numbers alone."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


def _tell_arithmetic(engine: Engine) -> None:
    """A line about what the run computes on, and in which arithmetic."""
    # not idist.get_rank(), for which all processes have to meet: one without cases does not come here
    if not dist.is_initialized() or not dist.get_rank():
        device = engine.state.device
        logger.info(f"computing on {hardware(device)}, in {arithmetic(engine.network, device)}")


def ema_of(network: nn.Module, decay: float = 0.9995) -> AveragedModel:
    """Exponential moving average of a network's weights; after n updates the decay is at most (1 + n) / (10 + n)."""

    def average(averaged: list[Tensor], current: list[Tensor], num_averaged: Tensor) -> None:
        n = float(num_averaged)
        torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + n) / (10 + n)))

    return AveragedModel(network, multi_avg_fn=average)  # all at once: a GPU would have to be waited for at each tensor


class _Losses(nn.Module):
    """A network whose forward is one of its methods that return losses."""

    def __init__(self, network: nn.Module, method: str) -> None:
        super().__init__()
        self.network, self.method = network, method

    def forward(self, image: Tensor, class_label: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        return getattr(self.network, self.method)(image, class_label, generator)


def distributed(network: nn.Module, method: str = "losses") -> DistributedDataParallel:
    """The objective of a network in one of several processes, which averages the gradient over all of them.

    Args:
        network: the network, on this process's device.
        method: name of the method that returns the losses.

    Returns:
        a callable with the method's arguments, for :class:`DiffusionTrainer`.
    """
    # a stage of a training leaves the other stages' weights alone
    return DistributedDataParallel(_Losses(network, method), find_unused_parameters=True)


class DiffusionTrainer(SupervisedTrainer):
    """Trainer of all networks of a method on the same noised batch, by the sum of the losses that it returns.

    Every random draw of iteration n comes from a generator seeded with (seed, n), so that training that was cut off
    resumes exactly; several processes share the draws of one (:func:`scripts.samplers.for_batch`).
    ``engine.state.output`` is a dictionary with the losses, of all processes together, and their sum ``loss``.

    Args:
        ema: moving average that follows the weights, see :func:`ema_of`.
        seed: seed of the levels and of the noise.
        max_norm: bound of the gradient's norm, for each sub-network (direct child) by itself.
        objective: method of the network that returns the losses; None for ``network.losses``.
        label_key: key of what it gets beside the image, such as ``label`` for masks.
        kwargs: arguments of :class:`monai.engines.SupervisedTrainer`.

    Raises:
        FloatingPointError: as soon as a loss or its gradient is not finite, before it spoils the weights.
    """

    def __init__(
        self,
        *,
        ema: AveragedModel,
        seed: int = 0,
        max_norm: float = 1.0,
        objective: Objective | None = None,
        label_key: str = "class_label",
        **kwargs: object,
    ) -> None:
        super().__init__(loss_function=None, decollate=False, **kwargs)
        self.ema, self.seed, self.max_norm, self.label_key = ema, seed, max_norm, label_key
        self.objective = objective or self.network.losses
        self.add_event_handler(Events.STARTED, _tell_arithmetic)

    def leave_group(self) -> None:
        """End the work with other processes.

        What DistributedDataParallel keeps would hold the group, and its threads, until the interpreter is gone; the process
        then aborts once in a while, its work done.
        """
        if isinstance(self.objective, DistributedDataParallel):
            for name in ("reducer", "logger", "process_group"):
                delattr(self.objective, name)
        dist.destroy_process_group()

    def _iteration(self, engine: DiffusionTrainer, batchdata: dict) -> dict[str, float]:
        device, iteration = engine.state.device, engine.state.iteration
        image, label = (convert_to_tensor(batchdata[k], device=device) for k in ("image", engine.label_key))
        generator = _generator(engine.seed, iteration)

        engine.network.train()
        losses = engine.objective(image, label, generator)
        loss = torch.stack(list(losses.values())).sum()
        engine.optimizer.zero_grad()
        loss.backward()
        norms = [nn.utils.clip_grad_norm_(list(part.parameters()), engine.max_norm) for part in engine.network.children()]
        # of a part without any gradient it is a 0 on the CPU
        if not torch.stack([loss.detach(), *(norm.to(loss.device) for norm in norms)]).isfinite().all():
            values = ", ".join(f"{name} {value.item():.3g}" for name, value in losses.items())
            raise FloatingPointError(
                f"the loss or its gradient is no longer finite at iteration {iteration} ({values}): "
                "lower the learning rate and resume from the last checkpoint"
            )
        engine.optimizer.step()
        engine.ema.update_parameters(engine.network)
        values = mean_of_processes(torch.stack([loss, *losses.values()]))
        return dict(zip(["loss", *losses], values.tolist(), strict=True))


class DiffusionValidator(Evaluator):
    """Validation without a single sampling step: the losses on held-out slices, always with the same noise.

    ``engine.state.output`` holds the losses of the batch and, if the network has a classifier (``probability(image)``),
    ``class_label`` and ``score``, for ROC AUC by :class:`monai.handlers.ROCAUC`.

    Args:
        network: the network with averaged weights.
        seed: seed of the levels and of the noise.
        objective: method of the network that returns the losses; None for ``network.losses``.
        label_key: key of what it gets beside the image, see :class:`DiffusionTrainer`.
        kwargs: arguments of :class:`monai.engines.Evaluator`.
    """

    def __init__(
        self,
        *,
        network: nn.Module,
        seed: int = 0,
        objective: Objective | None = None,
        label_key: str = "class_label",
        **kwargs: object,
    ) -> None:
        super().__init__(decollate=False, **kwargs)
        self.network, self.seed, self.objective = network, seed, objective or network.losses
        self.label_key = label_key

    def _iteration(self, engine: DiffusionValidator, batchdata: dict) -> dict:
        device = engine.state.device
        image, label = (convert_to_tensor(batchdata[k], device=device) for k in ("image", engine.label_key))
        generator = _generator(engine.seed, engine.state.iteration)
        with engine.mode(engine.network):
            losses = {k: v.item() for k, v in engine.objective(image, label, generator).items()}
            if not hasattr(engine.network, "probability"):
                return losses
            return {**losses, "score": engine.network.probability(image), "class_label": label}


class CohortEvaluator(SupervisedEvaluator):
    """SupervisedEvaluator that goes on to the next batch, of one case mostly, when one fails.

    Reading, network, postprocessing and handlers of a batch (events up to ``MODEL_COMPLETED``) may all fail; its cases and
    one line go to ``engine.failures``, and ``engine.state.output`` is an empty list.
    """

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.failures: dict[str, str] = {}
        self.add_event_handler(Events.STARTED, _tell_arithmetic)

    def _iteration(self, engine: CohortEvaluator, batchdata: dict) -> dict | list:
        failure = batchdata.get("failure")
        if failure is None:
            try:
                return super()._iteration(engine, batchdata)
            except (KeyboardInterrupt, SystemExit):
                raise
            except Exception as error:
                failure = [root_cause(error)]
        for case in batchdata["case"]:
            engine.failures[case] = failure[0]
            logger.error(f"{case}: {failure[0]}")
        return []

    def report_failures(self, output_dir: str | Path | None = None) -> None:
        """List the cases that failed, and end the program with exit status 1 if there is any.

        Args:
            output_dir: folder to keep them in, as ``failures.csv`` (case, reason), which goes if there is none; None to
                keep nothing. Several processes keep the failures of all, and end alike.
        """
        failures = self.failures
        if dist.is_initialized():
            shares = [{} for _ in range(dist.get_world_size())]
            dist.all_gather_object(shares, failures)
            failures = {case: failure for share in shares for case, failure in share.items()}
        if output_dir is not None and not idist.get_rank():
            path = Path(output_dir) / "failures.csv"
            try:
                table_rows(path, ("case", "reason"))
                if failures:
                    with written_aside(path) as aside, open(aside, "w", newline="", encoding="utf-8") as file:
                        csv.writer(file).writerows([("case", "reason"), *failures.items()])
                else:
                    path.unlink(missing_ok=True)
            except OSError as error:  # a full disk may be why cases failed: they still have to be listed
                logger.error(f"{path}: can't be written ({error.strerror or error})")
            except ValueError as error:  # somebody's own file
                logger.error(error)
        if failures:
            lines = [f"{case}: {failure}" for case, failure in failures.items()]
            sys.exit("\n".join([f"{len(lines)} case(s) failed:", *lines]))
