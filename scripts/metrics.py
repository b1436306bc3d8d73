"""What the evaluations of all kinds of bundles share."""

from __future__ import annotations

import csv
import io
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.config import NdarrayOrTensor, PathLike
from monai.engines.utils import IterationEvents
from monai.metrics import compute_dice

from scripts.files import check_own, own_file

__all__ = ["CohortMetrics", "bootstrap_interval", "dice"]

logger = logging.getLogger(__name__)


def dice(pred: NdarrayOrTensor, label: NdarrayOrTensor) -> float:
    """Dice overlap of two masks.

    Args:
        pred: mask of any shape, set where it is above 0.
        label: true mask of the same shape, set where it is above 0.

    Returns:
        overlap in [0, 1]; 1 where both masks are empty.

    Raises:
        ValueError: when the shapes differ.
    """
    masks = [torch.as_tensor(mask) > 0 for mask in (pred, label)]
    if masks[0].shape != masks[1].shape:
        raise ValueError(f"Masks of one shape are needed, got {tuple(masks[0].shape)} and {tuple(masks[1].shape)}.")
    return compute_dice(*(mask[None, None] for mask in masks), ignore_empty=False).item()


def bootstrap_interval(
    values: Sequence[float], share: float = 0.95, draws: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Interval of the mean over patients, by drawing them with replacement (percentile bootstrap, Efron 1979).

    Args:
        values: a figure of each patient; NaN where one has none, who is left out.
        share: of the means of the draws that lie in the interval.
        draws: how often as many patients are drawn as there are.
        seed: of the draws.

    Returns:
        lower and upper end; NaN without a patient.
    """
    known = np.array([value for value in values if not math.isnan(value)])
    if not known.size:
        return math.nan, math.nan
    means = known[np.random.default_rng(seed).integers(known.size, size=(draws, known.size))].mean(axis=1)
    low, high = np.quantile(means, [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)


class CohortMetrics:
    """Ignite handler that writes an evaluation: a row a case, and the figures of the cohort.

    It reads ``engine.state.batch`` and ``engine.state.output`` after the evaluator's postprocessing, lists with one dict a
    case. A subclass says what a case's row (``_evaluate``) and what the cohort's figures (``_summarise``) are.

    Args:
        output_dir: folder of the two files, made if it is missing.
        filename: name of the table, whose last rows are ``mean`` and ``std``, over the cases that have the figure; the
            figures of the cohort are in ``<its stem>_summary.json`` and in ``engine.state.metrics``.
    """

    def __init__(self, output_dir: PathLike, filename: str = "metrics.csv") -> None:
        self.table_path = Path(output_dir) / filename
        self.summary_path = self.table_path.with_name(f"{self.table_path.stem}_summary.json")
        self.paths = [self.table_path, self.summary_path]
        self._reset()

    def attach(self, engine: Engine) -> None:
        """Attach to a MONAI evaluator.

        Args:
            engine: evaluator whose postprocessing yields the dicts that the subclass describes; as it starts, a ValueError
                names a file that would be replaced and is somebody else's.
        """
        engine.add_event_handler(Events.STARTED, self._check_own)
        engine.add_event_handler(Events.EPOCH_STARTED, self._reset)
        engine.add_event_handler(IterationEvents.MODEL_COMPLETED, self._update)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._finish)

    def _check_own(self) -> None:
        """Refuse before the first case to replace somebody else's file."""
        check_own(*self.paths)

    def _reset(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def _update(self, engine: Engine) -> None:
        for batch, output in zip(engine.state.batch, engine.state.output, strict=True):
            self.rows.append(self._evaluate({**batch, **output}))

    def _evaluate(self, case: Mapping[str, Any]) -> dict[str, Any]:
        raise NotImplementedError

    def _summarise(self, mean: Mapping[str, float], std: Mapping[str, float]) -> dict[str, float]:
        raise NotImplementedError

    def _finish(self, engine: Engine) -> None:
        if not self.rows:
            logger.warning("No case was evaluated, no metrics are written.")
            return
        statistics = [{"case": "mean"}, {"case": "std"}]
        for key in list(self.rows[0])[1:]:
            values = np.array([row[key] for row in self.rows], dtype=float)
            values = values[~np.isnan(values)]
            for row, statistic in zip(statistics, (np.mean, np.std), strict=True):
                row[key] = float(statistic(values)) if values.size else math.nan
        summary = self._summarise(*statistics)
        engine.state.metrics.update(summary)

        table = io.StringIO()
        writer = csv.DictWriter(table, fieldnames=list(self.rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows + statistics)
        finite = {key: value if math.isfinite(value) else None for key, value in summary.items()}  # JSON has no NaN
        for path, text in ((self.table_path, table.getvalue()), (self.summary_path, json.dumps(finite, indent=4) + "\n")):
            with own_file(path) as aside:
                aside.write_text(text, encoding="utf-8")
        figures = "\n".join(f"  {key:<24} {value:.4g}" for key, value in summary.items())
        logger.info(f"Evaluation of {len(self.rows)} case(s), by case in {self.table_path}:\n{figures}")
