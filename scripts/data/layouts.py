"""Finds scans and pictures in the layouts that data sets have."""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import itk
from monai.utils import ensure_tuple

from scripts.data.sections import section_by_order, take_section

__all__ = ["add_slice_labels", "find_cases", "folder_pair", "training_cases"]

logger = logging.getLogger(__name__)

NIFTI = (".nii.gz", ".nii")
PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".dcm")


def stem_of(path: Path) -> str:
    return next((path.name[: -len(ending)] for ending in NIFTI if path.name.endswith(ending)), path.stem)


def nifti_of(folder: Path, stem: str) -> str | None:
    return next((str(folder / (stem + e)) for e in NIFTI if (folder / (stem + e)).is_file()), None)


def file_or_files(folder: Path, stem: str) -> str | list[str] | None:
    """The NIfTI file of this name; of two (``.nii`` and ``.nii.gz``) both, which reading a mask refuses."""
    found = [str(folder / (stem + ending)) for ending in NIFTI if (folder / (stem + ending)).is_file()]
    return found if len(found) > 1 else next(iter(found), None)


def _is_dicom(path: Path) -> bool:
    """Whether a file is DICOM, by its ending or, as scanners like to give none, by its first bytes."""
    if path.name.startswith(".") or path.name == "DICOMDIR" or not path.is_file():
        return False
    if path.suffix.lower() == ".dcm":
        return True
    if path.name.endswith((*NIFTI, *PICTURES)) or not os.access(path, os.R_OK):
        return False
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


def _patient(folder: Path, sequences: Sequence[str], label: str) -> dict | None:
    """Case of a folder ``<patient>/<patient>_<sequence>.nii.gz`` or of a folder with one DICOM series, if it is one."""
    images = [nifti_of(folder, f"{folder.name}_{sequence}") for sequence in sequences]
    if any(images):
        case = {"case": folder.name, "image": images}
        if twins := next(
            (two for s in sequences if isinstance(two := file_or_files(folder, f"{folder.name}_{s}"), list)), None
        ):
            case["failure"] = f"{' and '.join(twins)}: two files of one sequence; remove or rename one"
        mask = file_or_files(folder, f"{folder.name}_{label}")
        return {**case, "label": mask} if mask else case
    if any(_is_dicom(path) for path in folder.iterdir()):
        return {"case": folder.name, "image": str(folder)}
    return None


def _pictures(folder: Path, label: str) -> list[dict]:
    """Cases of the pictures that lie directly in a folder; ``<stem>_<label>`` with any picture's ending is a mask."""
    paths = [p for p in sorted(folder.iterdir()) if p.suffix.lower() in PICTURES and p.name[0] != "." and p.is_file()]
    masks: dict[str, str | list[str]] = {}
    for path in (p for p in paths if stem_of(p).endswith(f"_{label}")):
        twin = masks.get(stem_of(path))
        masks[stem_of(path)] = [*ensure_tuple(twin), str(path)] if twin else str(path)
    cases = [{"case": stem_of(p), "image": str(p)} for p in paths if stem_of(p) not in masks]
    return [{**c, "label": masks[f"{c['case']}_{label}"]} if f"{c['case']}_{label}" in masks else c for c in cases]


def _has_several_series(folder: Path) -> bool:
    names = itk.GDCMSeriesFileNames.New()
    names.SetUseSeriesDetails(False)  # a head CT with thin and thick slices is one series
    names.SetDirectory(str(folder))
    return len(names.GetSeriesUIDs()) > 1


def find_cases(
    dataset_dir: str | Path,
    sequences: Sequence[str],
    label: str = "seg",
    section: str = "all",
    pictures: bool = False,
    class_folder: str | None = None,
) -> list[dict]:
    """Cases of a folder, sorted by name.

    With ``pictures``, PNG, JPEG, TIFF, BMP and single DICOM files of the folder are cases too, one each, and
    ``<case>_<label>.<ending>`` beside one is its mask. DICOM files directly in the folder are single pictures if they
    belong to several series, else they are one scan. If the folder has no case of its own but one sub-folder with
    pictures (``HeadCT`` of MedNIST), those are taken. A section of pictures is drawn by :func:`section_by_order`, as
    neighbouring files may come from one scan; everything else, NIfTI files included, by :func:`section_of`.

    Args:
        dataset_dir: a folder of patients in the layout of BraTS (``<patient>/<patient>_<sequence>.nii.gz``, mask
            ``<patient>_<label>.nii.gz``), of DICOM series (a folder each, files of any name) or of NIfTI files (one a
            case, mask ``<case>_<label>.nii.gz``); one such patient's folder, or one file.
        sequences: file suffixes of the sequences, in the order of the network's channels.
        label: file suffix of the masks.
        section: ``training``, ``validation`` or ``test``, or ``all``.
        pictures: take pictures as well.
        class_folder: name of a sub-folder to take in place of the folder if there is one, such as ``CXR`` of MedNIST, whose
            folder has one for each class.

    Raises:
        FileNotFoundError: if there is no such folder, or nothing in it; with ``pictures``, also if the section is empty.
        ValueError: for an unknown section of pictures.
    """
    root = Path(dataset_dir).absolute()  # "." has no name
    if class_folder and (root / class_folder).is_dir():
        root = root / class_folder
    if root.is_file():
        return [{"case": stem_of(root), "image": str(root)}]
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; give the folder of the scans by --dataset_dir")
    own = _patient(root, sequences, label)
    if own and not (pictures and own["image"] == str(root) and _has_several_series(root)):
        return [own]
    volumes, others = [], []
    for path in sorted(root.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            case = _patient(path, sequences, label)
            (volumes if case else others).append(case or path)
        elif path.name.endswith(NIFTI) and not stem_of(path).endswith(f"_{label}"):
            mask = file_or_files(root, f"{stem_of(path)}_{label}")
            volumes.append({"case": stem_of(path), "image": str(path), **({"label": mask} if mask else {})})
    flat = _pictures(root, label) if pictures else []
    if pictures and not volumes and not flat:
        inner = [found for found in (_pictures(folder, label) for folder in others) if found]
        flat, others = (inner[0], []) if len(inner) == 1 else ([], others)
    for path in others:
        logger.warning(f"{path}: left out, it has neither {path.name}_{sequences[0]}.nii.gz nor DICOM files")
    if not volumes and not flat:
        raise FileNotFoundError(
            f"{root}: no scan found; expected <patient>/<patient>_{sequences[0]}.nii.gz, one NIfTI file a case, "
            "or one folder a DICOM series"
            + (", or pictures (PNG, JPEG, TIFF, BMP, DICOM) in it or in its only sub-folder with any" if pictures else "")
        )
    if not pictures:
        return take_section(volumes, section)
    chosen = take_section(volumes, section) + section_by_order(flat, section)
    if not chosen:
        raise FileNotFoundError(
            f"{root}: none of the {len(volumes) + len(flat)} cases falls into the {section} section; add scans"
        )
    return sorted(chosen, key=lambda case: case["case"])


def folder_pair(dataset_dir: str | Path) -> list[dict]:
    """Cases of a folder with 2-D images in ``healthy/`` and ``diseased/``, as prepared from CheXpert in the DDIM paper.

    A file's patient is what its name has before the first ``_``, so that a patient's images stay in one section.
    """
    return [
        {"case": f"{name}/{stem_of(path)}", "patient": stem_of(path).split("_")[0], "image": str(path), "class_label": label}
        for label, name in enumerate(("healthy", "diseased"))
        for path in sorted((Path(dataset_dir) / name).iterdir())
        if path.name.lower().endswith((*PICTURES, *NIFTI)) and not path.name.startswith(".")
    ]


def add_slice_labels(cases: list[dict], path: str | Path) -> list[dict]:
    """Give cases ``slice_labels`` from a CSV file with the columns ``case``, ``slice`` (from 0) and ``label`` (0 or 1).

    Raises:
        ValueError: if a column is missing, or a case's slices are not all there.
    """
    labels: dict[str, dict[int, int]] = {}
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        if not {"case", "slice", "label"} <= set(rows.fieldnames or ()):
            raise ValueError(f"{path}: needs the columns case, slice and label, has {rows.fieldnames}")
        for row in rows:
            if not (row["slice"] or "").isdecimal() or row["label"] not in ("0", "1"):
                raise ValueError(f"{path}: line {rows.line_num} needs a slice number, from 0, and a label, 0 or 1")
            labels.setdefault(row["case"], {})[int(row["slice"])] = int(row["label"])
    for case, slices in labels.items():
        if sorted(slices) != list(range(len(slices))):
            raise ValueError(f"{path}: case {case} needs one row for every slice, numbered from 0")
    return [
        {**case, "slice_labels": [labels[case["case"]][i] for i in range(len(labels[case["case"]]))]}
        for case in cases
        if case["case"] in labels
    ]


def training_cases(
    dataset_dir: str | Path, sequences: Sequence[str], section: str, slice_labels: str | None = None, **split: object
) -> list[dict]:
    """Cases to train on: a folder pair of 2-D images, volumes with masks, or volumes with a CSV of slice labels.

    Raises:
        FileNotFoundError: if no case of the folder has a label.
    """
    if (Path(dataset_dir) / "healthy").is_dir() and (Path(dataset_dir) / "diseased").is_dir():
        cases = folder_pair(dataset_dir)
    else:
        cases = find_cases(dataset_dir, sequences)
        cases = add_slice_labels(cases, slice_labels) if slice_labels else [c for c in cases if "label" in c]
    if not cases:
        raise FileNotFoundError(
            f"{dataset_dir}: no labelled case; training needs masks (<patient>_seg.nii.gz), "
            "--slice_labels <a CSV file>, or the folders healthy/ and diseased/"
        )
    chosen = take_section(cases, section, **split)
    if not chosen:
        raise FileNotFoundError(
            f"{dataset_dir}: none of the {len(cases)} labelled cases falls into the {section} section; add patients"
        )
    return chosen
