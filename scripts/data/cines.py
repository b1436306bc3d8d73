"""Finds and reads cines: the frames from end-diastole to end-systole."""

from __future__ import annotations

import codecs
import csv
import logging
import os
import re
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

from scripts.data.layouts import NIFTI, file_or_files, nifti_of, others_in, shortened, stem_of, visible
from scripts.data.phases import find_end_systole
from scripts.data.reading import LoadSequencesd, open_nifti
from scripts.data.sections import SECTIONS, checked_section, cine_section_of, take_section

__all__ = ["LoadCined", "assume_spacing", "find_cines", "lost_spacing", "slice_axis"]

logger = logging.getLogger(__name__)

THICK_MM = 5.0  # slices this far apart are of a stack, whose pixels are hardly 1 mm by chance
ENDS = (("ed", "es"), ("moving", "fixed"))  # of the names of two files
MIN_HEART_MM = 30.0  # no heart is shorter
HOW_TO_ASSUME = 'give the spacing in the plane and that of the slices by --assumed_spacing "[1.5,1.5,10]"'


def _acdc_frames(path: Path) -> tuple[int, int]:
    """Frames of end-diastole and end-systole in an ``Info.cfg`` of ACDC, which counts from 1, counted from 0."""
    text = path.read_bytes().removeprefix(codecs.BOM_UTF8).decode("latin-1")  # which all bytes are
    lines = (line.partition(":") for line in text.splitlines())
    numbers = {key.strip(): value.strip() for key, _, value in lines}
    if not all(numbers.get(key, "").isdecimal() and int(numbers[key]) for key in ("ED", "ES")):
        raise ValueError(f"{path}: needs the lines 'ED: <frame>' and 'ES: <frame>', counted from 1")
    return int(numbers["ED"]) - 1, int(numbers["ES"]) - 1


def _group(folder: Path) -> dict[str, str]:
    """Group of diseases that a patient of ACDC belongs to, by the ``Info.cfg`` or ``info.json`` in its folder."""
    for name, pattern in (("Info.cfg", r"^Group:\s*(\S+)"), ("info.json", r'"group"\s*:\s*"([^"]+)"')):
        path = folder / name
        if path.is_file() and (found := re.search(pattern, path.read_bytes().decode("latin-1"), re.MULTILINE)):
            return {"group": found[1]}
    return {}


def _with_labels(case: dict, label: str | None, target_label: str | None) -> dict:
    found = {"label": label, "target_label": target_label}
    return {**case, **{key: path for key, path in found.items() if path}}


def _cine(folder: Path) -> dict | None:
    """Case of a patient's folder in ACDC's layout, in that of cropped ACDC or with two 3-D files, if it is one.

    One whose ``Info.cfg`` is bad has a ``failure``, a line that says so.
    """
    name, info = folder.name, folder / "Info.cfg"
    case = {"case": name, "patient": name, **_group(folder)}
    if (whole := nifti_of(folder, f"{name}_4d")) and info.is_file():
        try:
            frames = _acdc_frames(info)
        except (OSError, ValueError) as error:
            return {**case, "image": whole, "failure": str(error)}
        labels = (file_or_files(folder, f"{name}_frame{frame + 1:02}_gt") for frame in frames)
        return _with_labels({**case, "image": whole, "frames": frames}, *labels)
    if cropped := nifti_of(folder, f"{name}_ed2es"):
        return _with_labels({**case, "image": cropped}, *(file_or_files(folder, f"{name}_{end}_gt") for end in ("ed", "es")))
    return _two_files(folder, case)


def _two_files(folder: Path, case: dict) -> dict | None:
    """The case with its source and target, two 3-D files whose names end in one of :data:`ENDS`."""
    names = [stem_of(path) for path in visible(folder) if path.name.lower().endswith(NIFTI)]
    for ends in ENDS:
        for name in names:
            if f"_{name}".endswith(f"_{ends[0]}"):
                stem = name.removesuffix(ends[0])
                paths = [nifti_of(folder, stem + end) for end in ends]
                if all(paths):
                    return _with_labels(
                        {**case, "image": paths}, *(file_or_files(folder, f"{stem}{end}_gt") for end in ends)
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
    paths = [p for p in visible(folder) if p.name.lower().endswith(NIFTI) and not stem_of(p).endswith("_gt")]
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


def _cine_of_file(path: Path) -> dict:
    """Case of one 4-D file, with the frames and labels that an ``Info.cfg`` or a ``frames.csv`` beside it names."""
    case = {"case": stem_of(path), "patient": stem_of(path), "image": str(path)}
    whole = _cine(path.parent)
    if whole and whole["image"] == case["image"]:
        return {**whole, "case": case["case"]}
    table = path.with_name("frames.csv")
    frames = _frames_table(table).get(path.name) if table.is_file() else None
    return {**case, "frames": frames} if frames else case


def find_cines(dataset_dir: str | Path, section: str = "all", fractions: Sequence[float] = (0.15, 0.1)) -> list[dict]:
    """Cases of cardiac cines, sorted by name.

    ``dataset_dir`` is one 4-D NIfTI file, one patient's folder, or a folder of

    - patients of ACDC: ``<patient>/<patient>_4d.nii.gz`` with ``Info.cfg`` (lines ``ED:`` and ``ES:``, which count frames
      from 1), labels ``<patient>_frameNN_gt.nii.gz``;
    - patients of cropped ACDC: ``<patient>/<patient>_ed2es.nii.gz``, from end-diastole to end-systole, labels
      ``<patient>_ed_gt.nii.gz`` and ``<patient>_es_gt.nii.gz``;
    - pairs: ``<case>/<any>_ed.nii.gz`` and ``<case>/<any>_es.nii.gz``, 3-D, labels ``<any>_ed_gt.nii.gz``, …; or the same
      with ``moving`` and ``fixed``;
    - 4-D NIfTI files, whose frames are found (:class:`LoadCined`) unless ``frames.csv`` (columns ``file``, ``ed``, ``es``,
      which counts frames from 0) says which; labels ``<stem>_ed_gt.nii.gz``, ….

    A patient of ACDC has its ``group`` (``DCM``, ``HCM``, ``MINF``, ``NOR``, ``RV``) too, if ``Info.cfg`` or ``info.json``
    names one. Patients are split by a hash of their name, see :func:`scripts.data.sections.cine_section_of`. A patient
    with a bad ``Info.cfg`` comes with a ``failure``, a line that says what is wrong, as long as there are others.

    Args:
        dataset_dir: see above.
        section: ``training``, ``validation`` or ``test``, or ``all``.
        fractions: shares of test and validation, but for ACDC's own patients, whose sections are fixed.

    Raises:
        FileNotFoundError: if there is no such folder, nothing in it, or nothing in the section.
        ValueError: for an unknown section, naming a ``frames.csv`` without the frames, or an ``Info.cfg`` if every cine has
            a bad one; else a patient with a bad one is a case with a ``failure`` that says so.
    """
    root = Path(dataset_dir).absolute()  # "." has no name
    if root.is_file():
        return _usable([_cine_of_file(root)])
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; give the folder of the cines by --dataset_dir")
    if own := _cine(root):
        return _usable([own])
    folders = [path for path in visible(root) if path.is_dir()]
    found = {folder: _cine(folder) for folder in folders}
    cases = [case for case in found.values() if case] + _cine_files(root)
    if not cases:
        raise FileNotFoundError(
            f"{root}: no cine found; expected <patient>/<patient>_4d.nii.gz with Info.cfg (ACDC), "
            "<patient>/<patient>_ed2es.nii.gz, <case>/<any>_ed.nii.gz with <case>/<any>_es.nii.gz (or moving and fixed), or "
            "4-D NIfTI files, with a frames.csv (file, ed, es) or without"
        )
    left = [path for path, case in found.items() if not case] + others_in(visible(root), NIFTI)
    if left:
        logger.warning(f"{root}: left out, as they have none of the layouts of a cine: {shortened(p.name for p in left)}")
    parts = {name: take_section(cases, name, cine_section_of, fractions=fractions) for name in SECTIONS}
    chosen = cases if section == "all" else checked_section(root, section, parts, "cines", fractions)
    return _usable(sorted(chosen, key=lambda case: case["case"]))


def _usable(cases: list[dict]) -> list[dict]:
    """The cases, if not every one of them has a ``failure``."""
    if all("failure" in case for case in cases):
        raise ValueError(cases[0]["failure"])
    return cases


def slice_axis(shape: Sequence[int]) -> int:
    """The axis along which a stack's slices lie: that with the fewest voxels, of several the last."""
    return 2 - int(np.argmin(tuple(shape)[::-1]))


def lost_spacing(affine: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Along which of the three axes the spacing looks lost: 1 mm is what converters that know of no spacing write.

    It looks so where it is 0; exactly 1 mm in the plane of slices that are 5 mm or more apart; and exactly 1 mm along all
    axes if no heart fits between the first and the last slice. Only the 0 is sure: a scan may have pixels of 1 mm.

    Args:
        affine: (4, 4), in mm.
        shape: number of voxels along the three axes, the fewest of which count the slices.
    """
    spacing, through = np.linalg.norm(affine[:3, :3], axis=0), slice_axis(shape)
    is_one = abs(spacing - 1) < 1e-4
    lost = spacing == 0
    if is_one.all():
        lost |= shape[through] < MIN_HEART_MM
    elif spacing[through] >= THICK_MM:
        lost |= is_one
    return lost


def assume_spacing(affine: np.ndarray, shape: Sequence[int], assumed: Sequence[float]) -> np.ndarray:
    """Affine with a spacing where the header seems to have lost it, see :func:`lost_spacing`.

    A spacing of 0 takes the directions of all axes with it.

    Args:
        affine: (4, 4), in mm.
        shape: number of voxels along the three axes.
        assumed: two spacings in the plane and that of the slices, in mm.

    Returns:
        (4, 4); equal to ``affine`` where nothing is lost.
    """
    affine = np.array(affine, dtype=float)
    spacing, through = np.linalg.norm(affine[:3, :3], axis=0), slice_axis(shape)
    axes = [axis for axis in range(3) if axis != through] + [through]
    wanted = spacing.copy()
    wanted[axes] = assumed
    wanted = np.where(lost_spacing(affine, shape), wanted, spacing)
    affine[:3, :3] = np.diag(wanted) if (spacing == 0).any() else affine[:3, :3] * (wanted / spacing)
    return affine


def _millimetres(affine: np.ndarray) -> str:
    return " x ".join(f"{size:g}" for size in np.linalg.norm(affine[:3, :3], axis=0).round(4)) + " mm"


class LoadCined(LoadSequencesd):
    """Read a cine, or the two ends of one, on the scan's own grid, float32, in the file's own unit.

    ``data[key]`` is the path of one 4-D NIfTI file (frames along its last axis), or a list with two paths of 3-D files,
    source and target. Source and target of a 4-D file are

    - the frames ``data[frames_key]``, counted from 0, or else ``ends``;
    - the first and the last frame of two, and of a file that says so by its name, ``*_ed2es.nii.gz``;
    - else the first frame and the one that :func:`scripts.data.phases.find_end_systole` finds, which a warning tells.

    Where ``data["backward"]`` is true, a 4-D file's go from target to source.
    A cine is one cycle: if the target comes before the source, the frames between go on at the start of the file.

    The result is ``data[key]``, (2, H, W, D) with source and target or, with ``frames="all"``, (F, H, W, D); and in the
    former case ``data[cine_key]``, (F, H, W, D), all frames from source to target (two of two files). Their meta data have
    ``num_frames`` (F), ``time_step`` (seconds between two frames; 0 if unknown) and, of a 4-D file, ``source_frame``,
    ``target_frame`` and ``frames_by`` (``given``, ``file``, or ``found``).

    The header's spacing is taken as it is unless ``assumed_spacing`` is given: then, where the header seems to have lost
    its own (:func:`lost_spacing`), ``affine`` has the assumed one, and a warning says so; ``meta["original_affine"]`` stays
    that of the file, in which results are to be written.

    Args:
        keys: key of the paths.
        frames: ``ends`` or ``all``.
        ends: numbers of source and target in 4-D files of which ``data`` has none.
        frames_key: key of the numbers of source and target.
        cine_key: key of all frames.
        assumed_spacing: two spacings in the plane and that of the slices, in mm, for headers that have lost them.
        grid: of two files, whose grid the other is brought to, that of ``source`` or of ``target``.
        allow_missing_keys: don't raise an error if a key is missing.

    Raises:
        ValueError: in one line with the file's name and the mend, for everything that :class:`LoadSequencesd` refuses, two
            files on different grids among it; the ``failure`` that a case comes with; a single frame; numbers out of range;
            source and target that are the same; an end-systole that can't be told; a spacing of 0 without
            ``assumed_spacing``.
    """

    def __init__(
        self,
        keys: KeysCollection,
        frames: str = "ends",
        ends: Sequence[int] | None = None,
        frames_key: str = "frames",
        cine_key: str = "cine",
        assumed_spacing: Sequence[float] | None = None,
        grid: str = "source",
        allow_missing_keys: bool = False,
    ) -> None:
        if grid not in ("source", "target"):
            raise ValueError(f"grid must be source or target, got {grid}.")
        self.turned = grid == "target"  # the file that is read first keeps its grid
        names = ("source", "target")
        super().__init__(keys, names[::-1] if self.turned else names, allow_missing_keys=allow_missing_keys)
        if frames not in ("ends", "all"):
            raise ValueError(f"frames must be ends or all, got {frames}.")
        if assumed_spacing is not None and (len(assumed_spacing) != 3 or min(assumed_spacing) <= 0):
            raise ValueError(f"assumed_spacing must be three lengths above 0, in mm, got {assumed_spacing}.")
        self.frames, self.ends, self.frames_key, self.cine_key = frames, ends, frames_key, cine_key
        self.assumed_spacing = None if assumed_spacing is None else tuple(map(float, assumed_spacing))

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        if "failure" in d:
            raise ValueError(d["failure"])
        for key in self.key_iterator(d):
            paths = ensure_tuple(d[key])
            if len(paths) == 1:
                cine = self._load_frames(paths[0], d.get(self.frames_key, self.ends))
                if d.get("backward"):
                    cine = _backward(cine)
            elif self.turned:
                paths = paths[::-1]
                cine = self._load_list(paths).flip(0)
            else:
                cine = self._load_list(paths)
            if torch.equal(cine[0].as_tensor(), cine[-1].as_tensor()):
                raise ValueError(f"{paths[0]}: source and target are the same image; give two different frames.")
            self._describe(cine, paths[0])
            if self.frames == "ends":
                d[self.cine_key] = cine
                cine = cine[[0, -1]]
            d[key] = cine
        return d

    def _check_geometry(self, path: str | os.PathLike, affine: np.ndarray, shape: Sequence[int]) -> None:
        without_extent = np.isfinite(affine).all() and not np.linalg.norm(affine[:3, :3], axis=0).all()
        if not without_extent:
            super()._check_geometry(path, affine, shape)
        elif self.assumed_spacing is None:
            raise ValueError(f"{path}: a spacing of 0 mm in the header; {HOW_TO_ASSUME}.")

    def _load_frames(self, path: str | os.PathLike, ends: Sequence[int] | None) -> MetaTensor:
        """The frames of a 4-D file from source to target."""
        cine = self._read(path)
        count = len(cine)
        if count < 2:
            raise ValueError(
                f"{path}: a single frame, no motion; give a 4-D file with the frames along its last axis, or two 3-D files, "
                "end-diastole and end-systole."
            )
        first, last, found_by = self._choose(cine, path, ends)
        if not (0 <= first < count and 0 <= last < count):
            raise ValueError(f"{path}: frames {first} and {last} wanted, it has 0 to {count - 1}; correct their numbers.")
        if first == last:
            raise ValueError(f"{path}: source and target are both frame {first}; give two different frames.")
        between = range(first, last + 1) if first < last else [*range(first, count), *range(last + 1)]
        cine = cine[list(between)]
        cine.meta |= {"source_frame": first, "target_frame": last, "frames_by": found_by}
        return cine

    @staticmethod
    def _choose(cine: MetaTensor, path: str | os.PathLike, ends: Sequence[int] | None) -> tuple[int, int, str]:
        """Numbers of source and target in a 4-D file, and what they are known by."""
        if ends is not None:
            return *map(int, ends), "given"
        if len(cine) == 2 or stem_of(Path(path)).endswith("_ed2es"):
            return 0, len(cine) - 1, "file"
        try:
            last, reason = find_end_systole(cine.as_tensor())
        except ValueError as error:
            raise ValueError(
                f"{path}: it can't be told which frame is end-systole, {error}; give the numbers of end-diastole and "
                'end-systole, from 0, by --ends "[0,9]", or for each file in a frames.csv beside it (file, ed, es).'
            ) from None
        logger.warning(
            f"{path}: frame 0 of {len(cine)} is taken as end-diastole and frame {last} as end-systole, {reason}; "
            "--ends or a frames.csv names others"
        )
        return 0, last, "found"

    def _describe(self, cine: MetaTensor, path: str | os.PathLike) -> None:
        """Give a cine the spacing that it lacks, if one is to be assumed, and what the results need to know of its time."""
        affine = cine.affine.numpy()
        spacing = _millimetres(affine)
        if self.assumed_spacing is None:
            if lost_spacing(affine, cine.shape[1:]).any():
                logger.warning(f"{path}: {spacing} in the header is taken as it is; if it was lost, {HOW_TO_ASSUME}")
        elif not np.allclose(mended := assume_spacing(affine, cine.shape[1:], self.assumed_spacing), affine):
            logger.warning(f"{path}: lost spacing, {spacing} in the header; {_millimetres(mended)} is assumed")
            if np.linalg.det(affine[:3, :3]) == 0:
                cine.meta["original_affine"] = mended  # no other program could place results on a grid without extent
            cine.affine = torch.as_tensor(mended)
        # MONAI's reader overwrites the time in the header that it keeps
        header = open_nifti(path).header if is_supported_format(path, ("nii", "nii.gz")) else nib.Nifti1Header()
        unit = {"msec": 1e-3, "usec": 1e-6}.get(header.get_xyzt_units()[1], 1.0)
        cine.meta["time_step"] = unit * float(header["pixdim"][4]) if header["dim"][0] > 3 else 0.0
        cine.meta["num_frames"] = len(cine)


def _backward(cine: MetaTensor) -> MetaTensor:
    """The frames from target to source."""
    first, last = (cine.meta[name] for name in ("source_frame", "target_frame"))
    cine = cine.flip(0)
    cine.meta |= {"source_frame": last, "target_frame": first}
    return cine
