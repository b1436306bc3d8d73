"""What all savers of results share: a table with a row a case, folders that appear whole or not at all, NIfTI files."""

from __future__ import annotations

import csv
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.engines.utils import IterationEvents

from scripts.data.cohort import root_cause, table_rows
from scripts.data.dicom import write_segmentation
from scripts.files import files_written_aside, locked, recorded_files, sha256_of, written_aside
from scripts.precision import arithmetic

__all__ = ["FolderSaver", "ResultSaver", "millilitres", "write_nifti"]

logger = logging.getLogger(__name__)


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
        """Find out before the first case whether the output folder can be written, without losing what is in it.

        Raises:
            ValueError: if files that the program did not write have the names of those to be written.
        """
        self.arithmetic = arithmetic(engine.network, engine.state.device)
        try:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.output_dir):
                pass
        except OSError as error:
            sys.exit(f"{self.output_dir}: can't write there ({error.strerror}); choose another --output_dir")
        self.rows()
        dataset = getattr(getattr(engine.state, "dataloader", None), "dataset", None)
        if foreign := [path for case in getattr(dataset, "data", ()) for path in self.foreign_files(case["case"])]:
            raise ValueError(
                f"{foreign[0]}: would be replaced, but this program has no record of writing it"
                + (f" ({len(foreign)} such files)" if len(foreign) > 1 else "")
                + "; move it elsewhere, or choose another --output_dir"
            )
        self.weights_hash = sha256_of(self.weights)[:12] if self.weights.is_file() else "none"

    def foreign_files(self, name: str) -> list[Path]:
        """Files that have the names of a case's results, but were not written by the program."""
        raise NotImplementedError

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
        """Rows of the table, none if there is no table yet, see :func:`scripts.data.cohort.table_rows`."""
        return table_rows(self.output_dir / self.table)


class FolderSaver(ResultSaver):
    """Write a folder of files for each case, ``<output_dir>/<case>``, and a row in ``results.csv``.

    A subclass says what files there are (``write``; ``<case>_<ending>`` for some of its ``endings``) and what the row has
    (``figures``) beside the case's name, the seconds, and the version of bundle and weights. ``<case>_files.csv`` in the
    folder lists its files, see :func:`scripts.files.files_written_aside`: no other file is ever replaced or removed.

    Args:
        output_dir: where to.
        meta: the bundle's metadata, for its name, version and labels.
        weights: the bundle's weights, for their hash.
        picture: whether to draw pictures.
    """

    endings: tuple[str, ...] = ()

    def __init__(self, output_dir: str | Path, meta: Mapping[str, Any], weights: str | Path, picture: bool = True) -> None:
        super().__init__(output_dir, meta, weights)
        self.picture = picture

    def __call__(self, engine: Engine) -> None:
        for batch, output in zip(engine.state.batch, engine.state.output, strict=True):
            self.save({**batch, **output})

    def foreign_files(self, name: str) -> list[Path]:
        folder = self.output_dir / name
        if not folder.is_dir():
            return []
        recorded = {file for file, _ in recorded_files(folder)}
        paths = [folder / f"{name}_{ending}" for ending in self.endings]
        return [path for path in paths if os.path.lexists(path) and path.name not in recorded]

    def write(self, folder: Path, name: str, case: Mapping[str, Any]) -> None:
        """Write the files of a case into a folder."""
        raise NotImplementedError

    def figures(self, case: Mapping[str, Any]) -> dict[str, str]:
        """Columns of the case's row."""
        raise NotImplementedError

    def write_dicom(self, path: Path, mask: MetaTensor, image: MetaTensor) -> None:
        """Write the mask of a case that was read from the folder of a DICOM series as DICOM, or a line that says why not.

        Only a disk that can't be written fails the case. Of another case nothing is written.
        """
        series = image.meta.get("filename_or_obj")
        if not series or not Path(series).is_dir():
            return
        try:
            labels = self.meta["network_data_format"]["outputs"]["pred"]["channel_def"]
            names = [labels[number] for number in sorted(labels, key=int) if number != "0"]
            write_segmentation(path, series, mask, names, self.bundle, self.version, self.weights_hash)
        except OSError:
            raise
        except Exception as error:  # the library has many ways to refuse a header
            logger.warning(f"no {path.name}, the NIfTI files hold the results: {root_cause(error)}")

    def save(self, case: Mapping[str, Any]) -> None:
        """Write one case.

        Raises:
            OSError: naming the folder, if it can't be written.
            ValueError: naming a file that would be replaced, but is not as the program wrote it.
        """
        name = case["case"]
        with self.told_where(self.output_dir / name):
            with files_written_aside(self.output_dir / name) as folder:
                self.write(folder, name, case)
            figures, origin = self.figures(case), self.origin(time.perf_counter() - self.begun)
            self.add_rows([{"case": name, **figures, **origin}])
        told = ", ".join(f"{column} {value}" for column, value in figures.items())
        logger.info(f"{name}: {told}, {origin['seconds']} s")


def millilitres(mask: MetaTensor) -> float:
    """Volume of a mask of 0 and 1."""
    return int(mask.sum()) * abs(np.linalg.det(np.asarray(mask.affine)[:3, :3])) / 1000


def write_nifti(path: Path, image: MetaTensor, dtype: type, affine: np.ndarray | None = None, seconds: float = 0.0) -> None:
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
