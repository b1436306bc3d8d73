"""Finds and reads cines: the frames from end-diastole to end-systole."""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.data.utils import is_supported_format
from monai.utils import ensure_tuple

from scripts.data.layouts import NIFTI, file_or_files, nifti_of, stem_of
from scripts.data.reading import LoadSequencesd
from scripts.data.sections import take_section

__all__ = ["LoadCined", "assume_spacing", "find_cines"]

logger = logging.getLogger(__name__)

THICK_MM = 5.0  # slices this far apart are of a stack, whose pixels are hardly 1 mm by chance
MIN_HEART_MM = 30.0  # no heart is shorter


def _acdc_frames(path: Path) -> tuple[int, int]:
    """Frames of end-diastole and end-systole in an ``Info.cfg`` of ACDC, which counts from 1, counted from 0."""
    lines = (line.partition(":") for line in path.read_text(encoding="utf-8").splitlines())
    numbers = {key.strip(): value.strip() for key, _, value in lines}
    if not all(numbers.get(key, "").isdecimal() and int(numbers[key]) for key in ("ED", "ES")):
        raise ValueError(f"{path}: needs the lines 'ED: <frame>' and 'ES: <frame>', counted from 1")
    return int(numbers["ED"]) - 1, int(numbers["ES"]) - 1


def _with_labels(case: dict, label: str | None, target_label: str | None) -> dict:
    found = {"label": label, "target_label": target_label}
    return {**case, **{key: path for key, path in found.items() if path}}


def _cine(folder: Path) -> dict | None:
    """Case of a patient's folder in ACDC's layout, in that of cropped ACDC or with two 3-D files, if it is one."""
    name, info = folder.name, folder / "Info.cfg"
    case = {"case": name, "patient": name}
    if (whole := nifti_of(folder, f"{name}_4d")) and info.is_file():
        frames = _acdc_frames(info)
        labels = (file_or_files(folder, f"{name}_frame{frame + 1:02}_gt") for frame in frames)
        return _with_labels({**case, "image": whole, "frames": frames}, *labels)
    if cropped := nifti_of(folder, f"{name}_ed2es"):
        return _with_labels({**case, "image": cropped}, *(file_or_files(folder, f"{name}_{end}_gt") for end in ("ed", "es")))
    names = [stem_of(path) for path in folder.iterdir() if path.name.endswith(NIFTI)]
    stems = sorted(name.removesuffix("_ed") for name in names if name.endswith("_ed"))
    ends = [nifti_of(folder, f"{stem}_{end}") for stem in stems[:1] for end in ("ed", "es")]
    if len(ends) == 2 and all(ends):
        return _with_labels(
            {**case, "image": ends}, *(file_or_files(folder, f"{stems[0]}_{end}_gt") for end in ("ed", "es"))
        )
    return None


def _frames_table(path: Path) -> dict[str, tuple[int, int]]:
    """Frames by file name from a CSV file with the columns ``file``, ``ed`` and ``es``, counted from 0."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        if not {"file", "ed", "es"} <= set(rows.fieldnames or ()):
            raise ValueError(f"{path}: needs the columns file, ed and es, has {rows.fieldnames}")
        table = {}
        for row in rows:
            if not all((row[key] or "").isdecimal() for key in ("ed", "es")):
                raise ValueError(f"{path}: line {rows.line_num} needs two frame numbers, from 0")
            table[row["file"]] = (int(row["ed"]), int(row["es"]))
    return table


def _cine_files(folder: Path) -> list[dict]:
    """Cases of the 4-D files that lie directly in a folder, with the frames of its ``frames.csv`` if there is one."""
    paths = [p for p in sorted(folder.iterdir()) if p.name.endswith(NIFTI) and not stem_of(p).endswith("_gt")]
    table = _frames_table(folder / "frames.csv") if (folder / "frames.csv").is_file() else None
    if table is not None and set(table) != (names := {p.name for p in paths}):
        raise ValueError(
            f"{folder / 'frames.csv'}: has no row or no file for {', '.join(sorted(names ^ set(table)))}; "
            "give one row for each file"
        )
    cases = []
    for path in paths:
        case = {"case": stem_of(path), "patient": stem_of(path), "image": str(path)}
        if table is not None:
            case["frames"] = table[path.name]
        cases.append(_with_labels(case, *(file_or_files(folder, f"{stem_of(path)}_{end}_gt") for end in ("ed", "es"))))
    return cases


def find_cines(dataset_dir: str | Path, section: str = "all", fractions: Sequence[float] = (0.15, 0.1)) -> list[dict]:
    """Cases of cardiac cines, sorted by name.

    ``dataset_dir`` is one 4-D NIfTI file, one patient's folder, or a folder of

    - patients of ACDC: ``<patient>/<patient>_4d.nii.gz`` with ``Info.cfg`` (lines ``ED:`` and ``ES:``, which count frames
      from 1), labels ``<patient>_frameNN_gt.nii.gz``;
    - patients of cropped ACDC: ``<patient>/<patient>_ed2es.nii.gz``, from end-diastole to end-systole, labels
      ``<patient>_ed_gt.nii.gz`` and ``<patient>_es_gt.nii.gz``;
    - pairs: ``<case>/<any>_ed.nii.gz`` and ``<case>/<any>_es.nii.gz``, 3-D, labels ``<any>_ed_gt.nii.gz``, …;
    - 4-D NIfTI files, whose first and last frames are taken unless ``frames.csv`` (columns ``file``, ``ed``, ``es``, which
      counts frames from 0) says which; labels ``<stem>_ed_gt.nii.gz``, ….

    Patients are split by a hash of their name (:func:`section_of`), but for cropped ACDC with labels: there the labelled
    patients are the test section, as the Dice needs labels, and of the others ``fractions[1]`` are for validation.

    Args:
        dataset_dir: see above.
        section: ``training``, ``validation`` or ``test``, or ``all``.
        fractions: shares of test and validation.

    Raises:
        FileNotFoundError: if there is no such folder, nothing in it, or nothing in the section.
        ValueError: naming an ``Info.cfg`` or a ``frames.csv`` without the frames.
    """
    root = Path(dataset_dir).absolute()  # "." has no name
    if root.is_file():
        return [{"case": stem_of(root), "patient": stem_of(root), "image": str(root)}]
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; give the folder of the cines by --dataset_dir")
    if own := _cine(root):
        return [own]
    folders = [path for path in sorted(root.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    found = {folder: _cine(folder) for folder in folders}
    cases = [case for case in found.values() if case] + _cine_files(root)
    if not cases:
        raise FileNotFoundError(
            f"{root}: no cine found; expected <patient>/<patient>_4d.nii.gz with Info.cfg (ACDC), "
            "<patient>/<patient>_ed2es.nii.gz, <case>/<any>_ed.nii.gz with <case>/<any>_es.nii.gz, or 4-D NIfTI files, "
            "with a frames.csv (file, ed, es) or without"
        )
    for folder, case in found.items():
        if not case:
            logger.warning(f"{folder}: left out, it has none of the layouts of a cine")
    held_back = [c for c in cases if str(c["image"]).removesuffix(".gz").endswith("_ed2es.nii") and "label" in c]
    if not held_back:
        chosen = take_section(cases, section, fractions=fractions)
    elif section == "test":
        chosen = held_back
    else:
        others = [case for case in cases if case not in held_back]
        chosen = cases if section == "all" else take_section(others, section, fractions=(0.0, fractions[1]))
    if not chosen:
        raise FileNotFoundError(f"{root}: none of the {len(cases)} cines falls into the {section} section; add patients")
    return sorted(chosen, key=lambda case: case["case"])


def assume_spacing(affine: np.ndarray, shape: Sequence[int], assumed: Sequence[float]) -> np.ndarray:
    """Affine with a spacing where the header has lost it.

    The axis with the fewest voxels (of several, the last) counts the slices. Lost is a spacing of 0, which takes the
    directions of all axes with it; exactly 1 mm in the plane of slices that are 5 mm or more apart; and exactly 1 mm along
    all axes if no heart fits between the first and the last slice. Converters that know of no spacing write such.

    Args:
        affine: (4, 4), in mm.
        shape: number of voxels along the three axes.
        assumed: two spacings in the plane and that of the slices, in mm.

    Returns:
        (4, 4); equal to ``affine`` where nothing is lost.
    """
    affine = np.array(affine, dtype=float)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    through = 2 - int(np.argmin(shape[::-1]))
    axes = [axis for axis in range(3) if axis != through] + [through]
    is_one = abs(spacing - 1) < 1e-4
    lost = spacing == 0
    if is_one.all():
        lost |= shape[through] < MIN_HEART_MM
    elif spacing[through] >= THICK_MM:
        lost |= is_one
    wanted = spacing.copy()
    wanted[axes] = assumed
    wanted = np.where(lost, wanted, spacing)
    affine[:3, :3] = np.diag(wanted) if (spacing == 0).any() else affine[:3, :3] * (wanted / spacing)
    return affine


class LoadCined(LoadSequencesd):
    """Read a cine, or the two ends of one, on the scan's own grid, float32, in the file's own unit.

    ``data[key]`` is the path of one 4-D NIfTI file (frames along its last axis), or a list with two paths of 3-D files,
    source and target. ``data[frames_key]``, if it is there, has the numbers of source and target in the 4-D file, counted
    from 0; else they are ``ends``, or the first and the last frame. A cine is one cycle: if the target comes before the
    source, the frames between go on at the start of the file.

    The result is ``data[key]``, (2, H, W, D) with source and target or, with ``frames="all"``, (F, H, W, D); and in the
    former case ``data[cine_key]``, (F, H, W, D), all frames from source to target (two of two files). Their meta data have
    ``num_frames`` (F) and ``time_step`` (seconds between two frames; 0 if unknown).

    Where the header has lost the spacing (:func:`assume_spacing`), ``affine`` has the assumed one, and a warning says so;
    ``meta["original_affine"]`` stays that of the file, in which results are to be written.

    Args:
        keys: key of the paths.
        frames: ``ends`` or ``all``.
        ends: numbers of source and target in 4-D files of which ``data`` has none, in place of the first and last frame.
        frames_key: key of the numbers of source and target.
        cine_key: key of all frames.
        assumed_spacing: two spacings in the plane and that of the slices, in mm, for a header that has lost them.
        allow_missing_keys: don't raise an error if a key is missing.

    Raises:
        ValueError: in one line with the file's name and the mend, for everything that :class:`LoadSequencesd` refuses, two
            files on different grids among it; a single frame; numbers out of range; source and target that are the same.
    """

    def __init__(
        self,
        keys: KeysCollection,
        frames: str = "ends",
        ends: Sequence[int] | None = None,
        frames_key: str = "frames",
        cine_key: str = "cine",
        assumed_spacing: Sequence[float] = (1.5, 1.5, 10.0),
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, ("source", "target"), allow_missing_keys=allow_missing_keys)
        if frames not in ("ends", "all"):
            raise ValueError(f"frames must be ends or all, got {frames}.")
        if len(assumed_spacing) != 3 or min(assumed_spacing) <= 0:
            raise ValueError(f"assumed_spacing must be three lengths above 0, in mm, got {assumed_spacing}.")
        self.frames, self.ends, self.frames_key, self.cine_key = frames, ends, frames_key, cine_key
        self.assumed_spacing = tuple(map(float, assumed_spacing))

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            paths = ensure_tuple(d[key])
            cine = (
                self._load_frames(paths[0], d.get(self.frames_key, self.ends)) if len(paths) == 1 else self._load_list(paths)
            )
            if torch.equal(cine[0].as_tensor(), cine[-1].as_tensor()):
                raise ValueError(f"{paths[0]}: source and target are the same image; give two different frames.")
            self._describe(cine, paths[0])
            if self.frames == "ends":
                d[self.cine_key] = cine
                cine = cine[[0, -1]]
            d[key] = cine
        return d

    def _check_geometry(self, path: str | os.PathLike, affine: np.ndarray, shape: Sequence[int]) -> None:
        if not np.isfinite(affine).all() or np.linalg.norm(affine[:3, :3], axis=0).all():
            super()._check_geometry(path, affine, shape)  # where a spacing is 0, another one is assumed

    def _load_frames(self, path: str | os.PathLike, ends: Sequence[int] | None) -> MetaTensor:
        """The frames of a 4-D file from source to target."""
        cine = self._read(path)
        count = len(cine)
        if count < 2:
            raise ValueError(
                f"{path}: a single frame, no motion; give a 4-D file with the frames along its last axis, or two 3-D files, "
                "end-diastole and end-systole."
            )
        first, last = (0, count - 1) if ends is None else map(int, ends)
        if not (0 <= first < count and 0 <= last < count):
            raise ValueError(f"{path}: frames {first} and {last} wanted, it has 0 to {count - 1}; correct their numbers.")
        if first == last:
            raise ValueError(f"{path}: source and target are both frame {first}; give two different frames.")
        between = range(first, last + 1) if first < last else [*range(first, count), *range(last + 1)]
        return cine[list(between)]

    def _describe(self, cine: MetaTensor, path: str | os.PathLike) -> None:
        """Give a cine the spacing that it lacks, and what the results need to know of its time."""
        affine = cine.affine.numpy()
        mended = assume_spacing(affine, cine.shape[1:], self.assumed_spacing)
        if not np.allclose(mended, affine):
            spacings = (" x ".join(f"{s:g}" for s in np.linalg.norm(a[:3, :3], axis=0).round(4)) for a in (affine, mended))
            logger.warning("{}: lost spacing, {} mm in the header; {} mm is assumed".format(path, *spacings))
            if np.linalg.det(affine[:3, :3]) == 0:
                cine.meta["original_affine"] = mended  # no other program could place results on a grid without extent
            cine.affine = torch.as_tensor(mended)
        # MONAI's reader overwrites the time in the header that it keeps
        header = nib.load(path).header if is_supported_format(path, ("nii", "nii.gz")) else nib.Nifti1Header()
        unit = {"msec": 1e-3, "usec": 1e-6}.get(header.get_xyzt_units()[1], 1.0)
        cine.meta["time_step"] = unit * float(header["pixdim"][4]) if header["dim"][0] > 3 else 0.0
        cine.meta["num_frames"] = len(cine)
