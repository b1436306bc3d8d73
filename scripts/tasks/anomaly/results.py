"""Writes what an anomaly bundle makes of a case."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from scripts.results import FolderSaver, millilitres, write_nifti
from scripts.tasks.anomaly.figures import overview
from scripts.transforms import upright

__all__ = ["CaseSaver"]


class CaseSaver(FolderSaver):
    """Write what an anomaly bundle makes of each case, see :class:`FolderSaver`.

    ``<case>/<case>_seg.nii.gz`` (uint8, from ``pred``), ``_map.nii.gz`` (float32, from ``map``), ``_healthy.nii.gz`` (from
    ``healthy``, in the scan's own units, sequences in the last axis), ``_overview.png``, and a row in ``results.csv``:
    which sequences were there, if there can be several (``t1,flair,t1ce<-flair``: FLAIR stands in for T1ce), volume of the
    finding in ml, score (largest mean of the anomaly map over an axial slice, whatever axes the scan is stored with), and
    the largest probability of disease over the slices, or what the network has in its place; and, if the bundle has a
    fingerprint of its training, how unlike that the scan is (above 1: more than nearly all training cases) and in what.

    Of a case that was read from the folder of a DICOM series, also ``_seg.dcm``, see
    :func:`scripts.data.dicom.write_segmentation`. Where that can't be made (no geometry, several frames a file, …) a warning
    says why, and the case is kept without it: the NIfTI files hold all results.

    Args:
        output_dir: where to.
        meta: the bundle's metadata, for its name, version and labels.
        weights: the bundle's weights, for their hash.
        channel: sequence that the overview picture shows.
        slice_score: key, and column, of what the network says of a slice as a whole, in [0, 1]: ``probability`` of disease,
            or ``abnormality``.
        case_score: takes those of a case's slices, (D,), to that of the case; None for the largest.
        more_scores: further keys, and columns, of the same kind, each with what takes those of the slices to the case's.
        picture: whether to draw the overview picture.
        grey_range: see :func:`scripts.tasks.anomaly.figures.overview`, which is cut to the surroundings of ``organ``, if the
            case has one.
    """

    endings = ("seg.nii.gz", "map.nii.gz", "healthy.nii.gz", "seg.dcm", "overview.png")

    def __init__(
        self,
        output_dir: str | Path,
        meta: Mapping[str, Any],
        weights: str | Path,
        channel: int = 0,
        picture: bool = True,
        slice_score: str = "probability",
        case_score: Callable[[Tensor], float] | None = None,
        more_scores: Mapping[str, Callable[[Tensor], float]] | None = None,
        grey_range: Sequence[float] | None = None,
    ) -> None:
        super().__init__(output_dir, meta, weights, picture)
        self.channel, self.slice_score, self.grey_range = channel, slice_score, grey_range
        self.scores = {slice_score: case_score or (lambda slices: slices.max().item()), **(more_scores or {})}

    def write(self, folder: Path, name: str, case: Mapping[str, Any]) -> None:
        mask, anomaly = case["pred"], case["map"]
        write_nifti(folder / f"{name}_seg.nii.gz", mask, np.uint8)
        write_nifti(folder / f"{name}_map.nii.gz", anomaly, np.float32)
        write_nifti(folder / f"{name}_healthy.nii.gz", case["healthy"], np.float32)
        self.write_dicom(folder / f"{name}_seg.dcm", mask, case["image"])
        if self.picture:
            overview(  # draws axial slices
                folder / f"{name}_overview.png",
                image=upright(case["image"]),
                healthy=upright(case["healthy"]),
                anomaly_map=upright(anomaly),
                mask=upright(mask),
                label=upright(case["label"]) if case.get("label") is not None else None,
                title=name,
                channel=self.channel,
                region=upright(case["organ"]) if case.get("organ") is not None else None,
                grey_range=self.grey_range,
            )

    def figures(self, case: Mapping[str, Any]) -> dict[str, str]:
        meta = case["image"].meta
        slices = {key: upright(case[key])[0].flatten(0, 1).amax(dim=0) for key in self.scores}
        return {
            **{key: meta[key] for key in ("sequences",) if "," in meta.get(key, "")},
            "finding_ml": f"{millilitres(case['pred']):.3f}",
            "score": f"{upright(case['map'])[0].flatten(0, 1).mean(dim=0).max().item():.5f}",
            **{key: f"{of_case(slices[key]):.4f}" for key, of_case in self.scores.items()},
            **{key: meta[key] for key in ("unlike_training", "unlike_in") if key in meta},
        }

    def rows(self) -> list[dict[str, str]]:
        """Rows of the table; version 0.1.0 called the last column trust."""
        return [{self.slice_score if k == "trust" else k: v for k, v in row.items()} for row in super().rows()]
