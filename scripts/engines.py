"""Engines that train and run the methods, on MONAI's and Ignite's.

A network that trains here has ``losses(image, class_label, generator)``, which returns a dictionary of scalars.
"""

from __future__ import annotations

import logging
import sys

import numpy as np
import torch
from monai.engines import Evaluator, SupervisedEvaluator, SupervisedTrainer
from monai.utils import convert_to_tensor
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from scripts.datasets import root_cause

__all__ = ["CohortEvaluator", "DiffusionTrainer", "DiffusionValidator", "ema_of"]

logger = logging.getLogger(__name__)


def _generator(device: torch.device, *numbers: int) -> torch.Generator:
    """Source of random numbers that depends on the given numbers alone."""
    return torch.Generator(device).manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


def ema_of(network: nn.Module, decay: float = 0.9995) -> AveragedModel:
    """Exponential moving average of a network's weights; after n updates the decay is at most (1 + n) / (10 + n)."""

    def average(averaged: Tensor, current: Tensor, num_averaged: Tensor) -> Tensor:
        n = float(num_averaged)
        return torch.lerp(averaged, current.to(averaged.dtype), 1 - min(decay, (1 + n) / (10 + n)))

    return AveragedModel(network, avg_fn=average)


class DiffusionTrainer(SupervisedTrainer):
    """Trainer of all networks of a method on the same noised batch, by the sum of the losses that it returns.

    Every random draw of iteration n comes from a generator seeded with (seed, n), so that training that was cut off
    resumes exactly. ``engine.state.output`` is a dictionary with the losses and their sum ``loss``.

    Args:
        ema: moving average that follows the weights, see :func:`ema_of`.
        seed: seed of the levels and of the noise.
        max_norm: bound of the gradient's norm, for each sub-network (direct child) by itself.
        kwargs: arguments of :class:`monai.engines.SupervisedTrainer`.

    Raises:
        FloatingPointError: as soon as a loss is not finite.
    """

    def __init__(self, *, ema: AveragedModel, seed: int = 0, max_norm: float = 1.0, **kwargs: object) -> None:
        super().__init__(loss_function=None, decollate=False, **kwargs)
        self.ema, self.seed, self.max_norm = ema, seed, max_norm

    def _iteration(self, engine: DiffusionTrainer, batchdata: dict) -> dict[str, float]:
        device, iteration = engine.state.device, engine.state.iteration
        image, class_label = (convert_to_tensor(batchdata[k], device=device) for k in ("image", "class_label"))
        generator = _generator(device, engine.seed, iteration, engine.state.rank)

        engine.network.train()
        losses = engine.network.losses(image, class_label, generator)
        loss = torch.stack(list(losses.values())).sum()
        if not loss.isfinite():
            values = ", ".join(f"{name} {value.item():.3g}" for name, value in losses.items())
            raise FloatingPointError(
                f"the loss is no longer finite at iteration {iteration} ({values}): "
                "lower the learning rate and resume from the last checkpoint"
            )
        engine.optimizer.zero_grad()
        loss.backward()
        for part in engine.network.children():
            nn.utils.clip_grad_norm_(list(part.parameters()), engine.max_norm)
        engine.optimizer.step()
        engine.ema.update_parameters(engine.network)
        return {"loss": loss.item(), **{name: value.item() for name, value in losses.items()}}


class DiffusionValidator(Evaluator):
    """Validation without a single sampling step: the losses on held-out slices, always with the same noise.

    ``engine.state.output`` holds the losses of the batch, and ``class_label`` and ``score`` (log-odds of disease at level
    0), for ROC AUC by :class:`monai.handlers.ROCAUC`.

    Args:
        network: the network with averaged weights.
        seed: seed of the levels and of the noise.
        kwargs: arguments of :class:`monai.engines.Evaluator`.
    """

    def __init__(self, *, network: nn.Module, seed: int = 0, **kwargs: object) -> None:
        super().__init__(decollate=False, **kwargs)
        self.network, self.seed = network, seed

    def _iteration(self, engine: DiffusionValidator, batchdata: dict) -> dict:
        device = engine.state.device
        image, class_label = (convert_to_tensor(batchdata[k], device=device) for k in ("image", "class_label"))
        generator = _generator(device, engine.seed, engine.state.iteration)
        with engine.mode(engine.network):
            losses = engine.network.losses(image, class_label, generator)
            score = engine.network.probability(image)
        return {**{k: v.item() for k, v in losses.items()}, "score": score, "class_label": class_label}


class CohortEvaluator(SupervisedEvaluator):
    """SupervisedEvaluator that goes on to the next case when one fails.

    Reading, network, postprocessing and handlers of a case (events up to ``MODEL_COMPLETED``) may all fail; the case and
    one line go to ``engine.failures``, and ``engine.state.output`` is an empty list.
    """

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.failures: dict[str, str] = {}

    def _iteration(self, engine: CohortEvaluator, batchdata: dict) -> dict | list:
        case, failure = batchdata["case"][0], batchdata.get("failure")
        if failure is None:
            try:
                return super()._iteration(engine, batchdata)
            except (KeyboardInterrupt, SystemExit):
                raise
            except Exception as error:
                failure = [root_cause(error)]
        engine.failures[case] = failure[0]
        logger.error(f"{case}: {failure[0]}")
        return []

    def report_failures(self) -> None:
        """List the cases that failed, and end the program with exit status 1 if there is any."""
        if self.failures:
            lines = [f"{case}: {failure}" for case, failure in self.failures.items()]
            sys.exit("\n".join([f"{len(lines)} case(s) failed:", *lines]))
