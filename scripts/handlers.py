"""Handlers that keep what the engines make: the results of a case, the state of a training, its progress on the screen.

Files appear whole or not at all: they are written aside and renamed.
"""

from __future__ import annotations

import csv
import gzip
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import nibabel as nib
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.data.utils import affine_to_spacing
from monai.engines.utils import IterationEvents
from monai.networks.utils import eval_mode
from monai.transforms import LoadImage, Orientation
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from scripts.cine_metrics import volume_curve
from scripts.cines import turn_vectors
from scripts.datasets import root_cause
from scripts.dicom import write_segmentation
from scripts.figures import cine_animation, cine_overview, contact_sheet, overview, schedule_figure
from scripts.files import locked, sha256_of, written_aside
from scripts.precision import arithmetic
from scripts.transforms import PICTURE_AFFINE, seeded_noise

__all__ = [
    "Calibration",
    "CaseSaver",
    "CineSaver",
    "FolderSaver",
    "GeneratedSaver",
    "ModelSaver",
    "ProgressBar",
    "ResultSaver",
    "SampleSheet",
    "TrainingCheckpoint",
]

logger = logging.getLogger(__name__)

SHEET_SIZE = 100  # images on the contact sheet


class ResultSaver:
    """What the savers share: a table with a row a case, and the output folder, which is tried before the first case.

    A subclass has ``table``, the file's name, and ``__call__(engine)``, called after postprocessing.

    Args:
        output_dir: where to.
        meta: the bundle's metadata, for its name and version.
        weights: the bundle's weights, for their hash.
    """

    table = "results.csv"

    def __init__(self, output_dir: str | Path, meta: Mapping[str, Any], weights: str | Path) -> None:
        self.output_dir, self.weights = Path(output_dir), Path(weights)
        self.bundle, self.version, self.meta = meta["name"], meta["version"], meta
        self.begun = time.perf_counter()

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.GET_BATCH_STARTED, self.begin)
        engine.add_event_handler(IterationEvents.MODEL_COMPLETED, self)

    def start(self, engine: Engine) -> None:
        """Find out before the first case whether the output folder can be written."""
        self.arithmetic = arithmetic(engine.network, engine.state.device)
        try:
            with written_aside(self.output_dir / "write_test") as aside:
                aside.touch()
            (self.output_dir / "write_test").unlink(missing_ok=True)  # by another process of the run
        except OSError as error:
            sys.exit(f"{self.output_dir}: can't write there ({error.strerror}); choose another --output_dir")
        self.weights_hash = sha256_of(self.weights)[:12] if self.weights.is_file() else "none"

    def begin(self) -> None:
        self.begun = time.perf_counter()

    def __call__(self, engine: Engine) -> None:
        raise NotImplementedError

    @contextmanager
    def told_where(self, what: Path) -> Iterator[None]:
        """Errors of writing name ``what`` and the mend."""
        try:
            yield
        except OSError as error:
            raise OSError(
                f"{what}: can't write the results ({error.strerror or error}); free some space or "
                "choose another --output_dir, and run again: finished cases are kept"
            ) from None

    def origin(self, seconds: float) -> dict[str, str]:
        """The columns that every table has: how long it took, in which arithmetic, and the version of bundle and weights."""
        return {
            "seconds": f"{seconds:.1f}",
            "arithmetic": self.arithmetic,
            "bundle": self.bundle,
            "version": self.version,
            "weights": self.weights_hash,
        }

    def add_rows(self, added: Sequence[Mapping[str, str]]) -> None:
        """Put the rows of cases into the table, in place of earlier ones.

        Raises:
            ValueError: if another bundle's results are there.
        """
        path, cases = self.output_dir / self.table, {row["case"] for row in added}
        with locked(path):  # other processes add theirs
            rows = [row for row in self.rows() if row["case"] not in cases]
            if any(not row.keys() <= added[0].keys() for row in rows):  # older versions had fewer columns
                raise ValueError(f"{path}: has the results of another kind of bundle; choose another --output_dir")
            with written_aside(path) as aside, open(aside, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(added[0]), restval="")
                writer.writeheader()
                writer.writerows([*rows, *added])

    def rows(self) -> list[dict[str, str]]:
        """Rows of the table, none if there is no table yet."""
        path = self.output_dir / self.table
        if not path.is_file():
            return []
        with open(path, newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))


class FolderSaver(ResultSaver):
    """Write a folder of files for each case, ``<output_dir>/<case>``, and a row in ``results.csv``.

    A subclass says what files there are (``write``) and what the row has (``figures``) beside the case's name, the seconds,
    and the version of bundle and weights.

    Args:
        output_dir: where to.
        meta: the bundle's metadata, for its name, version and labels.
        weights: the bundle's weights, for their hash.
        picture: whether to draw pictures.
    """

    def __init__(self, output_dir: str | Path, meta: Mapping[str, Any], weights: str | Path, picture: bool = True) -> None:
        super().__init__(output_dir, meta, weights)
        self.picture = picture

    def __call__(self, engine: Engine) -> None:
        for batch, output in zip(engine.state.batch, engine.state.output, strict=True):
            self.save({**batch, **output})

    def write(self, folder: Path, name: str, case: Mapping[str, Any]) -> None:
        """Write the files of a case into a folder."""
        raise NotImplementedError

    def figures(self, case: Mapping[str, Any]) -> dict[str, str]:
        """Columns of the case's row."""
        raise NotImplementedError

    def save(self, case: Mapping[str, Any]) -> None:
        """Write one case.

        Raises:
            OSError: naming the folder, if it can't be written.
        """
        name = case["case"]
        with self.told_where(self.output_dir / name):
            with written_aside(self.output_dir / name) as folder:
                folder.mkdir()
                self.write(folder, name, case)
            figures, origin = self.figures(case), self.origin(time.perf_counter() - self.begun)
            self.add_rows([{"case": name, **figures, **origin}])
        told = ", ".join(f"{column} {value}" for column, value in figures.items())
        logger.info(f"{name}: {told}, {origin['seconds']} s")


class CaseSaver(FolderSaver):
    """Write what an anomaly bundle makes of each case, see :class:`FolderSaver`.

    ``<case>/<case>_seg.nii.gz`` (uint8, from ``pred``), ``_map.nii.gz`` (float32, from ``map``), ``_healthy.nii.gz`` (from
    ``healthy``, in the scan's own units, sequences in the last axis), ``_overview.png``, and a row in ``results.csv``:
    volume of the finding in ml, score (largest mean of the anomaly map over a slice), trust (largest of the classifier's
    probabilities of disease over the slices).

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
        super().__init__(output_dir, meta, weights, picture)
        self.channel = channel

    def write(self, folder: Path, name: str, case: Mapping[str, Any]) -> None:
        mask, anomaly = case["pred"], case["map"]
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

    def figures(self, case: Mapping[str, Any]) -> dict[str, str]:
        return {
            "finding_ml": f"{_millilitres(case['pred']):.3f}",
            "score": f"{case['map'][0].flatten(0, 1).mean(dim=0).max().item():.5f}",
            "trust": f"{case['probability'].max().item():.4f}",
        }

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


class CineSaver(FolderSaver):
    """Write what a motion bundle makes of each case, see :class:`FolderSaver`.

    All images lie on the scan's own grid, with the affine of its file:

    - ``<case>/<case>_cine.nii.gz``: generated frames (H, W, D, F), float32, in the scan's own units; the time between two
      frames is in the header where the scan's file has one;
    - ``_displacement.nii.gz``: (H, W, D, F, 3), float32, NIfTI intent ``DISPVECT``: vectors in mm towards the right, the
      front and the head (RAS) by the affine of the file; a voxel of a frame took the source at its place plus the vector;
    - ``_labels.nii.gz``: label map of every frame (H, W, D, F), uint8, if one of the source was given;
    - ``_seg.nii.gz``: (H, W, D), uint8, from ``pred``: 1 where tissue moves;
    - ``_overview.png`` and ``_cine.gif``, see :mod:`scripts.figures`.

    A row in ``results.csv`` has the number of frames, the volume of what moves in ml, volumes of the left ventricle in the
    first and the last frame (empty without labels), the largest displacement in mm, and the share of voxels in percent
    that the displacement folds, in the frame with most of them. Where the header had lost its spacing, mm and ml of the row
    are by the spacing that was assumed in its place.

    Args:
        output_dir: where to.
        meta: the bundle's metadata, for its name and version.
        weights: the bundle's weights, for their hash.
        gammas: fractions of the way from source to target that the frames stand for; None for evenly spaced ones.
        picture: whether to draw the pictures.
    """

    def __init__(
        self,
        output_dir: str | Path,
        meta: Mapping[str, Any],
        weights: str | Path,
        gammas: Sequence[float] | None = None,
        picture: bool = True,
    ) -> None:
        super().__init__(output_dir, meta, weights, picture)
        self.gammas = gammas

    def write(self, folder: Path, name: str, case: Mapping[str, Any]) -> None:
        frames, displacement, cine = case["frames"], case["displacement"], case["cine"]
        affine = np.asarray(cine.meta["original_affine"])
        seconds = 0.0 if self.gammas else float(cine.meta["time_step"]) * (len(cine) - 1) / (len(frames) - 1)
        _write_nifti(folder / f"{name}_cine.nii.gz", frames, np.float32, affine, seconds)
        if "labels" in case:
            _write_nifti(folder / f"{name}_labels.nii.gz", case["labels"], np.uint8, affine, seconds)
        _write_nifti(folder / f"{name}_seg.nii.gz", case["pred"], np.uint8, affine)
        _write_displacement(folder / f"{name}_displacement.nii.gz", displacement, affine)
        if self.picture:
            upright = Orientation(axcodes="RAS", labels=None)
            frames, displacement, cine = (upright(item.cpu()) for item in (frames, displacement, cine))
            spacing = affine_to_spacing(frames.affine).tolist()
            directions = frames.affine[:3, :3] / torch.tensor(spacing)
            cine_overview(
                folder / f"{name}_overview.png",
                frames,
                turn_vectors(displacement.as_tensor(), directions.inverse()),
                real=cine,
                labels=upright(case["labels"].cpu()) if "labels" in case else None,
                title=name,
                fractions=self.gammas,
                spacing=spacing,
            )
            cine_animation(folder / f"{name}_cine.gif", frames, cine, spacing)

    def figures(self, case: Mapping[str, Any]) -> dict[str, str]:
        volumes = volume_curve(case["labels"].cpu(), case["cine"].affine) if "labels" in case else []
        return {
            "frames": str(len(case["frames"])),
            "moving_ml": f"{_millilitres(case['pred']):.1f}",
            "lv_first_ml": f"{volumes[0]:.1f}" if volumes else "",
            "lv_last_ml": f"{volumes[-1]:.1f}" if volumes else "",
            "max_displacement_mm": f"{case['motion'].max().item():.2f}",
            "folding_percent": f"{100 * case['folding']:.4f}",
        }


def _millilitres(mask: MetaTensor) -> float:
    """Volume of a mask of 0 and 1."""
    return int(mask.sum()) * abs(np.linalg.det(np.asarray(mask.affine)[:3, :3])) / 1000


def _write_nifti(path: Path, image: MetaTensor, dtype: type, affine: np.ndarray | None = None, seconds: float = 0.0) -> None:
    """Write a channel-first image (C, H, W, D), with its affine if no other is given; one channel gives a 3-D file.

    With ``seconds``, the channels are frames with this time between them.
    """
    array = image.cpu().numpy().astype(dtype)
    array = array[0] if len(array) == 1 else np.moveaxis(array, 0, -1)
    file = nib.Nifti1Image(array, image.affine.numpy() if affine is None else affine)
    if seconds:
        file.header.set_zooms((*file.header.get_zooms()[:3], seconds))
        file.header.set_xyzt_units("mm", "sec")
    nib.save(file, path)


def _write_displacement(path: Path, displacement: MetaTensor, affine: np.ndarray) -> None:
    """Write displacements (3 F, H, W, D), in mm by their own affine, as vectors (H, W, D, F, 3), in mm by another affine."""
    matrix = torch.as_tensor(affine)[:3, :3].double() @ displacement.affine[:3, :3].double().inverse()
    vectors = turn_vectors(displacement.as_tensor().cpu(), matrix)
    vectors = vectors.reshape(-1, 3, *vectors.shape[1:]).permute(2, 3, 4, 0, 1)
    file = nib.Nifti1Image(vectors.numpy().astype(np.float32), affine)
    file.header.set_intent("displacement vector")
    nib.save(file, path)


class GeneratedSaver(ResultSaver):
    """Write images that a model has generated, each marked as such, as 8-bit PNG and as NIfTI.

    ``<case>.png`` and ``<case>.nii.gz`` (uint8, from ``pred``) hold the same pixels, lying as
    :class:`scripts.transforms.LoadSequencesd` takes pictures to lie. The text chunks of the PNG and ``descrip`` of the NIfTI
    header say that the image is generated and shows no patient, by which version of which bundle, and with which seed.
    ``generated.csv`` gets a row an image; at the end ``contact_sheet.png`` shows those of the lowest seeds, marked too.

    Args:
        output_dir: where to.
        meta: the bundle's metadata, for its name and version.
        weights: the bundle's weights, for their hash.
        sampler: name of the sampler, for the table.
        steps: number of its steps, for the table.
    """

    table = "generated.csv"

    def __init__(
        self, output_dir: str | Path, meta: Mapping[str, Any], weights: str | Path, sampler: str, steps: int
    ) -> None:
        super().__init__(output_dir, meta, weights)
        self.sampler, self.steps = sampler, steps

    def attach(self, engine: Engine) -> None:
        super().attach(engine)
        engine.add_event_handler(Events.COMPLETED, self.draw_contact_sheet)

    def __call__(self, engine: Engine) -> None:
        self.save([{**batch, **output} for batch, output in zip(engine.state.batch, engine.state.output, strict=True)])

    def save(self, images: Sequence[Mapping[str, Any]]) -> None:
        """Write a batch of images.

        Args:
            images: each with ``case``, ``seed``, ``pred`` (1, H, W), 0 to 255, and ``class_label`` if it was made for one.

        Raises:
            OSError: naming the file, if it can't be written; none of the batch is in the table then.
        """
        for image in images:
            pixels = image["pred"][0].cpu().numpy().astype(np.uint8)
            path = self.output_dir / image["case"]
            with self.told_where(path):
                self._write_marked_png(path.with_name(f"{path.name}.png"), pixels, int(image["seed"]))
                self._write_marked_nifti(path.with_name(f"{path.name}.nii.gz"), pixels, int(image["seed"]))
        seconds = (time.perf_counter() - self.begun) / len(images)
        with self.told_where(self.output_dir / self.table):
            self.add_rows([self._row(image, seconds) for image in images])
        logger.info(f"{images[0]['case']} to {images[-1]['case']}: {seconds:.2f} s an image")

    def _row(self, image: Mapping[str, Any], seconds: float) -> dict[str, str]:
        label = image.get("class_label")
        return {
            "case": image["case"],
            "seed": str(int(image["seed"])),
            "label": "" if label is None else str(int(label)),
            "sampler": self.sampler,
            "steps": str(self.steps),
            **self.origin(seconds),
        }

    def mark(self, seed: object) -> dict[str, str]:
        """What says that an image is generated, by the keywords of a PNG's text chunks."""
        return {
            "Description": "Generated (synthetic) image, shows no patient",
            "Software": self.bundle,
            "Version": self.version,
            "Seed": str(seed),
        }

    def _write_marked_png(self, path: Path, pixels: np.ndarray, seed: int) -> None:
        text = PngInfo()
        for keyword, value in self.mark(seed).items():
            text.add_text(keyword, value)
        with written_aside(path) as aside:
            Image.fromarray(pixels.T).save(aside, format="PNG", pnginfo=text)  # its rows run down, along the second axis

    def _write_marked_nifti(self, path: Path, pixels: np.ndarray, seed: int) -> None:
        image = nib.Nifti1Image(pixels[..., None], PICTURE_AFFINE)
        description = f"Generated, shows no patient: {self.bundle} {self.version}, seed {seed}".encode()
        if len(description) > 80:
            raise ValueError(f"the name of the bundle, {self.bundle}, is too long for the header of a NIfTI file")
        image.header["descrip"] = description
        with written_aside(path) as aside:
            aside.write_bytes(gzip.compress(image.to_bytes(), mtime=0))

    def draw_contact_sheet(self) -> None:
        """Draw ``contact_sheet.png`` from the files that the table names; of several processes the last has them all."""
        paths = {int(row["seed"]): self.output_dir / f"{row['case']}.png" for row in self.rows()}
        seeds = sorted(seed for seed, path in paths.items() if path.is_file())[:SHEET_SIZE]
        if not seeds:
            return
        load = LoadImage(image_only=True, ensure_channel_first=True)
        images = torch.stack([load(paths[seed]).as_tensor() / 255 for seed in seeds])
        path = self.output_dir / "contact_sheet.png"
        with self.told_where(path), locked(path), written_aside(path) as aside:
            contact_sheet(
                aside,
                images,
                titles=[str(seed) for seed in seeds],
                heading=f"generated by {self.bundle} {self.version}, shows no patient",
                text=self.mark(f"{seeds[0]} to {seeds[-1]}"),
            )


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
            ValueError: if the epochs have another length than when the state was saved.
        """
        if not self.path.is_file():
            return
        # every state goes from the CPU to where it belongs; the optimizer's counts stay there
        state = torch.load(self.path, map_location="cpu", weights_only=True)
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
        state = {k: (v.half() if v.is_floating_point() else v).cpu() for k, v in network.state_dict().items()}
        with written_aside(self.path) as aside:
            torch.save(state, aside)


class SampleSheet:
    """Draw what a generative network makes every few epochs, always from the same noise, and its noise schedule.

    ``samples_<epoch>.png`` and ``schedule_<epoch>.png``.

    Args:
        output_dir: where to.
        ema: the averaged network, a :class:`scripts.networks.variational_diffusion.VariationalDiffusionNet`.
        number: number of images.
        interval: epochs between two sheets; the last epoch always ends with one.
        seed: seed of the noise.
    """

    def __init__(
        self, output_dir: str | Path, ema: AveragedModel, number: int = 16, interval: int = 1, seed: int = 0
    ) -> None:
        self.output_dir, self.ema, self.number, self.interval, self.seed = Path(output_dir), ema, number, interval, seed

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        epoch = engine.state.epoch
        if idist.get_rank() or (epoch % self.interval and epoch != engine.state.max_epochs):
            return
        network, device = self.ema.module, engine.state.device
        noise = seeded_noise(self.seed, (self.number, 1, *network.spatial_size)).to(device)
        times = torch.linspace(0, 1, 101, device=device)
        with eval_mode(network):  # which turns gradients off too
            images, gammas = network(noise), network.schedule(times)
        with written_aside(self.output_dir / f"samples_{epoch:04}.png") as aside:
            contact_sheet(aside, images, columns=8, heading=f"generated after epoch {epoch}")
        with written_aside(self.output_dir / f"schedule_{epoch:04}.png") as aside:
            schedule_figure(aside, times, gammas)


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
