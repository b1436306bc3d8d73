"""Writes generated images, each marked as such, and what a generative network draws during its training."""

from __future__ import annotations

import gzip
import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import nibabel as nib
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.networks.utils import eval_mode
from monai.transforms import LoadImage
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch.optim.swa_utils import AveragedModel

from scripts.data.reading import PICTURE_AFFINE
from scripts.files import locked, own_file, written_aside
from scripts.results import ResultSaver
from scripts.tasks.generation.figures import contact_sheet, schedule_figure
from scripts.tasks.generation.transforms import seeded_noise

__all__ = ["GeneratedSaver", "SampleSheet"]

logger = logging.getLogger(__name__)

SHEET, SHEET_SIZE = "contact_sheet.png", 100  # the contact sheet, and how many images it has
DESCRIPTION = "Generated (synthetic) image, shows no patient"
SHORT_DESCRIPTION = "Generated, shows no patient"  # there is little room in the header of a NIfTI file


class GeneratedSaver(ResultSaver):
    """Write images that a model has generated, each marked as such, as 8-bit PNG and as NIfTI.

    ``<case>.png`` and ``<case>.nii.gz`` (uint8, from ``pred``) hold the same pixels, lying as
    :class:`scripts.data.reading.LoadSequencesd` takes pictures to lie. The text chunks of the PNG and ``descrip`` of the
    NIfTI header say that the image is generated and shows no patient, by which version of which bundle, and with which seed.
    ``generated.csv`` gets a row an image, with ``copy_similarity``, ``redraws`` and ``copy`` of a filter against copies
    (:class:`scripts.inferers.RedrawingInferer`), empty without one; an image that is still a copy is told. At the end
    ``contact_sheet.png`` shows those of the lowest seeds, marked too.

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

    def start(self, engine: Engine) -> None:
        super().start(engine)
        shipped = self.meta.get("weights_sha256", "")[:12]
        filters = getattr(getattr(engine, "inferer", None), "copies", None) is not None
        if filters and self.weights_hash != shipped:
            logger.warning(
                f"{self.weights}: are not the weights that the copy filter was shipped for; if they were trained on other "
                "images, train a filter on those (configs/train_copy_filter.json) and give its file as --copy_weights"
            )

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
            **self._copy_columns(image),
            **self.origin(seconds),
        }

    def _copy_columns(self, image: Mapping[str, Any]) -> dict[str, str]:
        found = getattr(image["pred"], "meta", {})
        if "copy" not in found:
            return {"copy_similarity": "", "redraws": "", "copy": ""}
        similarity, redraws, copy = float(found["copy_similarity"]), int(found["redraws"]), bool(found["copy"])
        if copy:
            logger.warning(
                f"{image['case']}: looks like a copy of a training image still after {redraws} redraws (similarity "
                f"{similarity:.3f}); leave it out, or draw it again with more --copy_rounds"
            )
        return {"copy_similarity": f"{similarity:.4f}", "redraws": str(redraws), "copy": "yes" if copy else "no"}

    def foreign_files(self, name: str) -> list[Path]:
        paths = [self.output_dir / f"{name}{ending}" for ending in (".png", ".nii.gz")]
        return [path for path in [*paths, self.output_dir / SHEET] if os.path.lexists(path) and not _is_marked(path)]

    def mark(self, seed: object) -> dict[str, str]:
        """What says that an image is generated, by the keywords of a PNG's text chunks."""
        return {
            "Description": DESCRIPTION,
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
        description = f"{SHORT_DESCRIPTION}: {self.bundle} {self.version}, seed {seed}".encode()
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
        path = self.output_dir / SHEET
        with self.told_where(path), locked(path), written_aside(path) as aside:
            contact_sheet(
                aside,
                images,
                titles=[str(seed) for seed in seeds],
                heading=f"generated by {self.bundle} {self.version}, shows no patient",
                text=self.mark(f"{seeds[0]} to {seeds[-1]}"),
            )


def _is_marked(path: Path) -> bool:
    """Whether an image says that it is generated, so that it is the program's own."""
    try:
        if path.suffix == ".png":
            with Image.open(path) as image:
                return image.info.get("Description") == DESCRIPTION
        return nib.load(path).header["descrip"].item().startswith(SHORT_DESCRIPTION.encode())
    except (OSError, ValueError, EOFError, KeyError, SyntaxError, nib.filebasedimages.ImageFileError):
        return False


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
        with own_file(self.output_dir / f"samples_{epoch:04}.png") as aside:
            contact_sheet(aside, images, columns=8, heading=f"generated after epoch {epoch}")
        with own_file(self.output_dir / f"schedule_{epoch:04}.png") as aside:
            schedule_figure(aside, times, gammas)
