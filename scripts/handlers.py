"""Handlers that keep what the engines make: the results of a case, the state of a training, its progress on the screen.

Files appear whole or not at all: they are written aside and renamed.
"""

from __future__ import annotations

import csv
import logging
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import nibabel as nib
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents
from monai.transforms import Orientation
from torch import nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from scripts.datasets import root_cause
from scripts.dicom import write_segmentation
from scripts.figures import overview
from scripts.files import locked, sha256_of, written_aside

__all__ = ["Calibration", "CaseSaver", "ModelSaver", "ProgressBar", "TrainingCheckpoint"]

logger = logging.getLogger(__name__)

RESULT_COLUMNS = ("case", "finding_ml", "score", "trust", "seconds", "bundle", "version", "weights")


class CaseSaver:
    """Write the results of each case after the evaluator's postprocessing.

    ``<case>/<case>_seg.nii.gz`` (uint8, from ``pred``), ``_map.nii.gz`` (float32, from ``map``), ``_healthy.nii.gz`` (from
    ``healthy``, in the scan's own units, sequences in the last axis), ``_overview.png``, and a row in ``results.csv``:
    volume of the finding in ml, score (largest mean of the anomaly map over a slice), trust (largest of the classifier's
    probabilities of disease over the slices), seconds, and the version of bundle and weights.

    Of a case that was read from the folder of a DICOM series, also ``_seg.dcm``, see
    :func:`scripts.dicom.write_segmentation`. Where that can't be made (no geometry, several frames a file, …) a warning
    says why, and the case is kept without it: the NIfTI files hold all results.

    Args:
        output_dir: where to.
        meta: the bundle's metadata, for its name, version and labels.
        weights: the bundle's weights, for their hash.
        channel: sequence that the overview picture shows.
        picture: whether to draw the overview picture.
    """

    def __init__(
        self, output_dir: str | Path, meta: Mapping[str, Any], weights: str | Path, channel: int = 0, picture: bool = True
    ) -> None:
        self.output_dir, self.weights = Path(output_dir), Path(weights)
        self.bundle, self.version, self.meta = meta["name"], meta["version"], meta
        self.channel, self.picture = channel, picture
        self.begun = time.perf_counter()

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.GET_BATCH_STARTED, self.begin)
        engine.add_event_handler(IterationEvents.MODEL_COMPLETED, self)

    def start(self) -> None:
        """Find out before the first case whether the output folder can be written."""
        try:
            with written_aside(self.output_dir / "write_test") as aside:
                aside.touch()
            (self.output_dir / "write_test").unlink()
        except OSError as error:
            sys.exit(f"{self.output_dir}: can't write there ({error.strerror}); choose another --output_dir")
        self.weights_hash = sha256_of(self.weights)[:12] if self.weights.is_file() else "none"

    def begin(self) -> None:
        self.begun = time.perf_counter()

    def __call__(self, engine: Engine) -> None:
        for batch, output in zip(engine.state.batch, engine.state.output, strict=True):
            self.save({**batch, **output})

    def save(self, case: Mapping[str, Any]) -> None:
        """Write one case.

        Raises:
            OSError: naming the folder, if it can't be written.
        """
        name, mask, anomaly = case["case"], case["pred"], case["map"]
        try:
            with written_aside(self.output_dir / name) as folder:
                folder.mkdir()
                _write_nifti(folder / f"{name}_seg.nii.gz", mask, np.uint8)
                _write_nifti(folder / f"{name}_map.nii.gz", anomaly, np.float32)
                _write_nifti(folder / f"{name}_healthy.nii.gz", case["healthy"], np.float32)
                source = case["image"].meta.get("filename_or_obj")
                if source and Path(source).is_dir():
                    self._write_dicom(folder / f"{name}_seg.dcm", source, mask)
                if self.picture:
                    upright = Orientation(axcodes="RAS", labels=None)  # as overview draws axial slices
                    overview(
                        folder / f"{name}_overview.png",
                        image=upright(case["image"]),
                        healthy=upright(case["healthy"]),
                        anomaly_map=upright(anomaly),
                        mask=upright(mask),
                        label=upright(case["label"]) if case.get("label") is not None else None,
                        title=name,
                        channel=self.channel,
                    )
            voxel_ml = abs(np.linalg.det(np.asarray(mask.affine)[:3, :3])) / 1000
            row = {
                "case": name,
                "finding_ml": f"{int(mask.sum()) * voxel_ml:.3f}",
                "score": f"{anomaly[0].flatten(0, 1).mean(dim=0).max().item():.5f}",
                "trust": f"{case['probability'].max().item():.4f}",
                "seconds": f"{time.perf_counter() - self.begun:.1f}",
                "bundle": self.bundle,
                "version": self.version,
                "weights": self.weights_hash,
            }
            self.add_row(row)
        except OSError as error:
            raise OSError(
                f"{self.output_dir / name}: can't write the results ({error.strerror or error}); free some space or "
                "choose another --output_dir, and run again: finished cases are kept"
            ) from None
        logger.info(f"{name}: finding {row['finding_ml']} ml, trust {row['trust']}, {row['seconds']} s")

    def _write_dicom(self, path: Path, series_dir: str, mask: Any) -> None:
        """Write the mask as DICOM, or a line that says why not; only a disk that can't be written fails the case."""
        try:
            labels = self.meta["network_data_format"]["outputs"]["pred"]["channel_def"]
            names = [labels[number] for number in sorted(labels, key=int) if number != "0"]
            write_segmentation(path, series_dir, mask, names, self.bundle, self.version, self.weights_hash)
        except OSError:
            raise
        except Exception as error:  # the library has many ways to refuse a header
            logger.warning(f"no {path.name}, the NIfTI files hold the results: {root_cause(error)}")

    def add_row(self, row: Mapping[str, str]) -> None:
        """Put a case's row into ``results.csv``, in place of an earlier one."""
        path = self.output_dir / "results.csv"
        with locked(path):  # other processes add theirs
            rows = []
            if path.is_file():
                with open(path, newline="") as file:
                    rows = [r for r in csv.DictReader(file) if r["case"] != row["case"]]
            with written_aside(path) as aside, open(aside, "w", newline="") as file:
                writer = csv.DictWriter(file, RESULT_COLUMNS)
                writer.writeheader()
                writer.writerows([*rows, row])


def _write_nifti(path: Path, image: Any, dtype: type) -> None:
    """Write a channel-first MetaTensor (C, H, W, D) with its affine; one channel gives a 3-D file, also of one slice."""
    array = image.cpu().numpy().astype(dtype)
    array = array[0] if len(array) == 1 else np.moveaxis(array, 0, -1)
    nib.save(nib.Nifti1Image(array, image.affine.numpy()), path)


class TrainingCheckpoint:
    """Save a training's whole state every few minutes and at its end, and go on from it when there is one.

    Together with a sampler and a trainer whose random draws depend on the iteration's number alone, a training that was
    cut off ends with the same weights, byte for byte, as one that was not.

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
            ValueError: if the epochs have another length than when the state was saved.
        """
        if not self.path.is_file():
            return
        state = torch.load(self.path, map_location=engine.state.device, weights_only=True)
        if state["epoch_length"] != engine.state.epoch_length:
            raise ValueError(
                f"{self.path} was saved with {state['epoch_length']} iterations an epoch, this training has "
                f"{engine.state.epoch_length}: use the same settings, or another --ckpt_dir"
            )
        for name, item in self.objects.items():
            item.load_state_dict(state[name])
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
    """Write the averaged weights as the bundle's ``model.pt``: a plain state dict, tensors only, in half precision.

    Args:
        path: the file.
        ema: the averaged network.
    """

    def __init__(self, path: str | Path, ema: AveragedModel) -> None:
        self.path, self.ema = Path(path), ema

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        if idist.get_rank():
            return
        network: nn.Module = self.ema.module
        state = {k: v.half() if v.is_floating_point() else v for k, v in network.state_dict().items()}
        with written_aside(self.path) as aside:
            torch.save(state, aside)


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
