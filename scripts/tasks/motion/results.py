"""Writes what a motion bundle makes of a case."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.data.utils import affine_to_spacing

from scripts.results import FolderSaver, millilitres, write_nifti
from scripts.tasks.motion.figures import cine_animation, cine_overview, registration_overview
from scripts.tasks.motion.metrics import pumping, volume_curve
from scripts.tasks.motion.transforms import turn_vectors
from scripts.transforms import upright

__all__ = ["CineSaver", "RegistrationSaver"]


class CineSaver(FolderSaver):
    """Write what a motion bundle makes of each case, see :class:`FolderSaver`.

    All images lie on the scan's own grid, with the affine of its file:

    - ``<case>/<case>_cine.nii.gz``: generated frames (H, W, D, F), float32, in the scan's own units; the time between two
      frames is in the header where the scan's file has one;
    - ``_displacement.nii.gz``: (H, W, D, F, 3), float32, NIfTI intent ``DISPVECT``: vectors in mm towards the right, the
      front and the head (RAS) by the affine of the file; a voxel of a frame took the source at its place plus the vector;
    - ``_labels.nii.gz``: label map of every frame (H, W, D, F), uint8, if one of the source was given;
    - ``_seg.nii.gz``: (H, W, D), uint8, from ``pred``: 1 where tissue moves;
    - ``_overview.png`` and ``_cine.gif``, see :mod:`scripts.tasks.motion.figures`.

    A row in ``results.csv`` has the number of frames; which frames of the file source and target were, from 0, and by what
    they are known, see :class:`scripts.data.cines.LoadCined` (empty of two files); the volume of what moves in ml; those of
    the left ventricle in the first and the last frame, its ejection fraction and the thickening of its wall in percent, see
    :func:`scripts.tasks.motion.metrics.pumping` (empty without labels); the largest displacement in mm; and the share of
    voxels in percent that the displacement folds, in the frame with most of them. Where a spacing is assumed in place of the
    header's, mm and ml of the row are by that.

    Args:
        output_dir: where to.
        meta: the bundle's metadata, for its name and version.
        weights: the bundle's weights, for their hash.
        gammas: fractions of the way from source to target that the frames stand for; None for evenly spaced ones.
        picture: whether to draw the pictures.
    """

    endings = ("cine.nii.gz", "displacement.nii.gz", "labels.nii.gz", "seg.nii.gz", "overview.png", "cine.gif")

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
        frames, cine = case["frames"], case["cine"]
        affine = np.asarray(cine.meta["original_affine"])
        seconds = 0.0 if self.gammas else float(cine.meta["time_step"]) * (len(cine) - 1) / (len(frames) - 1)
        write_nifti(folder / f"{name}_{self.endings[0]}", frames, np.float32, affine, seconds)
        if "labels" in case:
            write_nifti(folder / f"{name}_labels.nii.gz", case["labels"], np.uint8, affine, seconds)
        write_nifti(folder / f"{name}_seg.nii.gz", case["pred"], np.uint8, affine)
        _write_displacement(folder / f"{name}_displacement.nii.gz", case["displacement"], affine)
        if self.picture:
            self.draw(folder, name, case)

    def draw(self, folder: Path, name: str, case: Mapping[str, Any]) -> None:
        """Write the pictures of a case into a folder."""
        frames, displacement, cine = (upright(case[key].cpu()) for key in ("frames", "displacement", "cine"))
        spacing = affine_to_spacing(frames.affine).tolist()
        cine_overview(
            folder / f"{name}_overview.png",
            frames,
            _along_axes(displacement),
            real=cine,
            labels=upright(case["labels"].cpu()) if "labels" in case else None,
            title=", ".join([name, *self._told(case)]),
            fractions=self.gammas,
            spacing=spacing,
        )
        cine_animation(folder / f"{name}_cine.gif", frames, cine, spacing)

    def _pumping(self, case: Mapping[str, Any]) -> dict[str, float]:
        """Figures of the carried labels, NaN without them or if the frames don't go on to the target."""
        arrives = "labels" in case and (self.gammas is None or self.gammas[-1] == 1)
        return pumping(case.get("label"), case["labels"][-1:] if arrives else None, case["cine"].affine)

    def _told(self, case: Mapping[str, Any]) -> list[str]:
        """The same in words, with the figures of the true labels where there are any."""
        true = pumping(case.get("label"), case.get("target_label"), case["cine"].affine)
        return [
            f"{name.replace('_', ' ')} {value:.0f} %" + ("" if math.isnan(true[name]) else f" (labels: {true[name]:.0f} %)")
            for name, value in self._pumping(case).items()
            if not math.isnan(value)
        ]

    def figures(self, case: Mapping[str, Any]) -> dict[str, str]:
        volumes = volume_curve(case["labels"].cpu(), case["cine"].affine) if "labels" in case else []
        return {
            "frames": str(len(case["frames"])),
            **{name: str(case["cine"].meta.get(name, "")) for name in ("source_frame", "target_frame", "frames_by")},
            "moving_ml": f"{millilitres(case['pred']):.1f}",
            "lv_first_ml": f"{volumes[0]:.1f}" if volumes else "",
            "lv_last_ml": f"{volumes[-1]:.1f}" if volumes else "",
            **{f"{name}_percent": "" if math.isnan(v) else f"{v:.1f}" for name, v in self._pumping(case).items()},
            "max_displacement_mm": f"{case['motion'].max().item():.2f}",
            "folding_percent": f"{100 * case['folding']:.4f}",
        }


class RegistrationSaver(CineSaver):
    """Write what a registration makes of each pair, see :class:`FolderSaver`; all images lie on the fixed volume's grid.

    - ``<case>/<case>_warped.nii.gz``: the moving volume, warped, (H, W, D), float32, in its own units; of several fractions
      of the way (H, W, D, F);
    - ``_displacement.nii.gz``: as :class:`CineSaver`'s, (H, W, D, F, 3): a voxel of the warped volume took the moving one
      at its place plus the vector; ``_inverse.nii.gz``: that of the way back, (H, W, D, 1, 3), if it was found;
    - ``_labels.nii.gz``: the moving volume's label map, warped likewise, uint8, if it was given;
    - ``_seg.nii.gz``: (H, W, D), uint8, from ``pred``: 1 where tissue moves;
    - ``_overview.png``, see :func:`scripts.tasks.motion.figures.registration_overview`.

    The row in ``results.csv`` has the columns of :class:`CineSaver`; further ``correlation_before`` and
    ``correlation_after``, that of the grey levels of the fixed volume with the moving and with the warped one; and
    ``inverse_consistency_mm``, see :class:`scripts.tasks.motion.transforms.MeasureInverseConsistencyd`.
    """

    endings = ("warped.nii.gz", "displacement.nii.gz", "inverse.nii.gz", "labels.nii.gz", "seg.nii.gz", "overview.png")

    def write(self, folder: Path, name: str, case: Mapping[str, Any]) -> None:
        super().write(folder, name, case)
        if "inverse" in case:
            affine = np.asarray(case["cine"].meta["original_affine"])
            _write_displacement(folder / f"{name}_inverse.nii.gz", case["inverse"], affine)

    def draw(self, folder: Path, name: str, case: Mapping[str, Any]) -> None:
        cine, displacement = upright(case["cine"].cpu()), upright(case["displacement"][-3:].cpu())
        labels = {
            heading: upright(case[key][-1:].cpu())
            for heading, key in (("label of the fixed volume", "target_label"), ("label, warped", "labels"))
            if case.get(key) is not None
        }
        registration_overview(
            folder / f"{name}_overview.png",
            cine[[0, -1]],
            upright(case["frames"][-1:].cpu()),
            _along_axes(displacement),
            labels,
            ", ".join([name, *self._told(case)]),
            affine_to_spacing(cine.affine).tolist(),
        )

    def figures(self, case: Mapping[str, Any]) -> dict[str, str]:
        moving, fixed, warped = (volume.flatten().double().cpu() for volume in (*case["cine"][[0, -1]], case["frames"][-1]))
        alike = {
            f"correlation_{when}": f"{torch.corrcoef(torch.stack([volume, fixed]))[0, 1]:.4f}"
            for when, volume in (("before", moving), ("after", warped))
        }
        figures = super().figures(case) | alike
        if case.get("label") is not None:  # whatever fractions of the way there are
            figures["lv_first_ml"] = f"{volume_curve(case['label'], case['cine'].affine)[0]:.1f}"
        consistency = f"{case['inverse_consistency']:.3f}" if "inverse" in case else ""
        return {**figures, "inverse_consistency_mm": consistency}


def _along_axes(displacement: MetaTensor) -> torch.Tensor:
    """Displacements (3 F, H, W, D), in mm of the world, in mm along the axes of their image."""
    directions = displacement.affine[:3, :3] / torch.tensor(affine_to_spacing(displacement.affine).tolist())
    return turn_vectors(displacement.as_tensor(), directions.inverse())


def _write_displacement(path: Path, displacement: MetaTensor, affine: np.ndarray) -> None:
    """Write displacements (3 F, H, W, D), in mm by their own affine, as vectors (H, W, D, F, 3), in mm by another affine."""
    matrix = torch.as_tensor(affine)[:3, :3].double() @ displacement.affine[:3, :3].double().inverse()
    vectors = turn_vectors(displacement.as_tensor().cpu(), matrix)
    vectors = vectors.reshape(-1, 3, *vectors.shape[1:]).permute(2, 3, 4, 0, 1)
    file = nib.Nifti1Image(vectors.numpy().astype(np.float32), affine)
    file.header.set_intent("displacement vector")
    nib.save(file, path)
