"""Writes what a segmentation bundle makes of a case."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from scripts.results import FolderSaver, write_nifti
from scripts.tasks.segmentation.figures import overview
from scripts.transforms import upright

__all__ = ["CaseSaver"]


class CaseSaver(FolderSaver):
    """Write what a segmentation bundle makes of each case, see :class:`scripts.results.FolderSaver`.

    ``<case>/<case>_seg.nii.gz`` (uint8, from ``pred``), ``_uncertainty.nii.gz`` (float32, from ``entropy``, in bits),
    ``_overview.png``, of a DICOM series ``_seg.dcm`` (:meth:`scripts.results.FolderSaver.write_dicom`), and a row in
    ``results.csv``: which sequences were there, if there can be several; the volume of the mask in ml with the two ends of
    its interval, how well the samples agree with it, and ``yes`` for a case that wants a look (all from ``result``, see
    :class:`scripts.tasks.segmentation.transforms.MeasureVolumed`); and how unlike the training's the scan is.

    Args:
        output_dir: where to.
        meta: the bundle's metadata, for its name, version and labels.
        weights: the bundle's weights, for their hash.
        channel: sequence that the overview picture shows.
        picture: whether to draw the overview picture.
    """

    endings = ("seg.nii.gz", "uncertainty.nii.gz", "seg.dcm", "overview.png")

    def __init__(
        self,
        output_dir: str | Path,
        meta: Mapping[str, Any],
        weights: str | Path,
        channel: int = 0,
        picture: bool = True,
    ) -> None:
        super().__init__(output_dir, meta, weights, picture)
        self.channel = channel

    def write(self, folder: Path, name: str, case: Mapping[str, Any]) -> None:
        write_nifti(folder / f"{name}_seg.nii.gz", case["pred"], np.uint8)
        write_nifti(folder / f"{name}_uncertainty.nii.gz", case["entropy"], np.float32)
        self.write_dicom(folder / f"{name}_seg.dcm", case["pred"], case["image"])
        if self.picture:
            overview(  # draws axial slices
                folder / f"{name}_overview.png",
                image=upright(case["image"]),
                mask=upright(case["pred"]),
                samples=upright(case["samples"]),
                uncertainty=upright(case["entropy"]),
                label=upright(case["label"]) if case.get("label") is not None else None,
                title=name,
                channel=self.channel,
            )

    def figures(self, case: Mapping[str, Any]) -> dict[str, str]:
        meta, volume = case["image"].meta, case["result"]
        return {
            **{key: meta[key] for key in ("sequences",) if "," in meta.get(key, "")},
            "finding_ml": f"{volume['ml']:.3f}",
            "finding_low_ml": f"{volume['low_ml']:.3f}",
            "finding_high_ml": f"{volume['high_ml']:.3f}",
            "agreement": f"{volume['agreement']:.4f}",
            "look": "yes" if volume["look"] else "no",
            **{key: meta[key] for key in ("unlike_training", "unlike_in") if key in meta},
        }
