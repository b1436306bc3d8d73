"""Finds scans and pictures in the layouts that data sets have."""

from __future__ import annotations

import csv
import functools
import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import itk
from monai.utils import ensure_tuple

from scripts.data.sections import SECTIONS, checked_section, section_by_order, take_section

__all__ = [
    "add_slice_labels",
    "find_cases",
    "folder_pair",
    "image_cases",
    "is_folder_pair",
    "labelled_section",
    "shortened",
    "training_cases",
    "visible",
]

logger = logging.getLogger(__name__)

NIFTI = (".nii.gz", ".nii")
VOLUMES = (*NIFTI, ".hdr", ".mha", ".mhd", ".nrrd", ".nhdr")
PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".dcm")
# other names that data sets have for a sequence: BraTS 2023, BIDS, UPENN-GBM
OTHER_NAMES = {"t1": ("t1n", "t1w"), "t1ce": ("t1c", "t1gd"), "t2": ("t2w",), "flair": ("t2f",)}
SEPARATORS = "_-. "
JUNK = ("thumbs.db", "desktop.ini", "dicomdir", "__macosx")  # of operating systems, and an index
NOTES = (".csv", ".tsv", ".txt", ".md", ".json", ".xml", ".pdf", ".html", ".cfg", ".bval", ".bvec")
MASKS = {word: "mask" for word in ("gt", "label", "labels", "lesion", "mask", "roi", "seg", "segmentation")}
DEPTH = 4  # of folders below a patient's: study, series and two to spare


def stem_of(path: Path) -> str:
    return next((path.name[: -len(ending)] for ending in NIFTI if path.name.lower().endswith(ending)), path.stem)


def nifti_of(folder: Path, stem: str) -> str | None:
    """The NIfTI file of this name, whichever its ending."""
    return next(iter(_niftis_of(folder, stem)), None)


def file_or_files(folder: Path, stem: str) -> str | list[str] | None:
    """The same; of several all, which reading a label map refuses."""
    found = _niftis_of(folder, stem)
    return found if len(found) > 1 else next(iter(found), None)


def _niftis_of(folder: Path, stem: str) -> list[str]:
    paths = (folder / f"{stem}{ending}" for name in NIFTI for ending in (name, name.upper()))
    return [str(path) for path in paths if path.is_file()]


def visible(folder: Path) -> list[Path]:
    """What lies in a folder, by name, without hidden files, macOS's ``._*`` beside each file among them, and the like.

    Names that are no text in the encoding of the locale are left out, with a warning: no table can hold them.
    """
    paths = [path for path in sorted(folder.iterdir()) if path.name[0] != "." and path.name.lower() not in JUNK]
    odd = [path for path in paths if not _is_text(path.name)]
    if odd:
        names = shortened(ascii(path.name) for path in odd)
        _warn_once(
            f"{folder}: passed over, as their names are not in the encoding of the locale: {names}; rename them, or set "
            "PYTHONUTF8=1"
        )
    return [path for path in paths if path not in odd]


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def shortened(names: Iterable[str], most: int = 5) -> str:
    """The first of some names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def others_in(paths: Sequence[Path], known: Sequence[str]) -> list[Path]:
    """Files with none of the known endings, which are neither notes nor the voxels of a header beside them."""
    described = {path.stem for path in paths if path.suffix.lower() in (".hdr", ".mhd", ".nhdr")}
    others = [path for path in paths if path.is_file() and not path.name.lower().endswith((*known, *NOTES))]
    return [path for path in others if path.name.split(".")[0] not in described]


def _is_volume(path: Path) -> bool:
    return path.name.lower().endswith(VOLUMES) and path.is_file()


def _is_dicom(path: Path) -> bool:
    """Whether a file is DICOM, by its ending or, as scanners like to give none, by its first bytes."""
    if not path.is_file():
        return False
    name = path.name.lower()
    if name.endswith(".dcm"):
        return True
    if name.endswith((*VOLUMES, *PICTURES)) or not os.access(path, os.R_OK):
        return False
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


def _words(sequences: Sequence[str], label: str) -> dict[str, str]:
    """Sequence or label that the end of a file's name stands for, in small letters.

    Several sequences are told from each other by any known name; one that is alone only by its own.
    """
    known = {**OTHER_NAMES, **{name: OTHER_NAMES.get(name, ()) for name in sequences}} if len(sequences) > 1 else {}
    words = {other.lower(): name for name, others in known.items() for other in (name, *others)}
    return {**words, **{name.lower(): name for name in (*sequences, label)}}


def _split(stem: str, words: Mapping[str, str]) -> tuple[str, str] | None:
    """Patient and sequence (or label) that a file's name says; the patient is empty if it names the sequence alone."""
    name = stem.lower()
    for word in sorted(words, key=len, reverse=True):
        if name == word:
            return "", words[word]
        if name.endswith(word) and name[-len(word) - 1] in SEPARATORS:
            return stem[: -len(word) - 1], words[word]
    return None


def _volumes(folder: Path, sequences: Sequence[str], label: str, flat: bool) -> tuple[list[dict], list[Path]]:
    """Cases of the volumes that lie directly in a folder, named by their files, and the volumes that belong to none.

    Files that differ in the sequence alone are one patient. Every other volume is a case of its own, unless it has a
    patient's name before its own, lies in the folder of one whose sequences are there, or is another one's mask by its name.

    Args:
        folder: the folder.
        sequences: see :func:`find_cases`.
        label: see :func:`find_cases`.
        flat: the folder holds any number of patients, and is no patient's own.
    """
    words = _words(sequences, label) if len(sequences) > 1 or not flat else {label.lower(): label}
    patients: dict[str, dict[str, list[Path]]] = {}
    masks: dict[str, list[Path]] = {}
    loose = []
    for path in filter(_is_volume, visible(folder)):
        patient, word = _split(stem_of(path), words) or (None, None)
        if patient is None:
            loose.append(path)
        elif word == label:
            masks.setdefault(patient, []).append(path)
        else:
            patients.setdefault(patient, {}).setdefault(word, []).append(path)
    known = {name: files for name, files in patients.items() if any(sequence in files for sequence in sequences)}
    unused = [path for name in patients.keys() - known.keys() for files in patients[name].values() for path in files]
    cases = []
    for name, files in sorted(known.items()):
        case = {"case": name or folder.name, "image": [str(files[s][0]) if s in files else None for s in sequences]}
        if twice := [names for s, names in files.items() if s in sequences and len(names) > 1]:
            case["failure"] = f"{' and '.join(map(str, twice[0]))}: two files of one sequence; remove one of them"
        cases.append(_with_mask(case, masks.get(name)))
    owners = {*known, *map(stem_of, loose)}
    unused += [mask for name, files in masks.items() if name not in owners for mask in files]
    for path in loose:
        of_patient = any(stem_of(path).startswith(tuple(name + mark for mark in SEPARATORS)) for name in known)
        is_mask = (_split(stem_of(path), MASKS) or (None,))[0] in owners
        if is_mask or (known and not flat) or of_patient:
            unused.append(path)
        else:
            cases.append(_with_mask({"case": stem_of(path), "image": str(path)}, masks.get(stem_of(path))))
    return sorted(cases, key=lambda case: case["case"]), unused


def _with_mask(case: dict, masks: Sequence[Path] | None) -> dict:
    """The case with its mask, or with all of several, which reading them refuses."""
    if not masks:
        return case
    return {**case, "label": str(masks[0]) if len(masks) == 1 else list(map(str, masks))}


def _folder_cases(folder: Path, sequences: Sequence[str], label: str, unused: list[Path], depth: int = DEPTH) -> list[dict]:
    """Cases of a folder, or of the folders below if it has none itself, named by their path from this folder on."""
    if (folder / f"{folder.name}_files.csv").is_file():  # results, which may lie beside the scans
        return []
    cases, left = _volumes(folder, sequences, label, flat=False)
    unused += left
    if not cases and any(map(_is_dicom, visible(folder))):
        cases = [{"case": folder.name, "image": str(folder)}]
    if len(cases) == 1:
        return [{**cases[0], "case": folder.name}]
    if not cases and depth:
        below = [_folder_cases(p, sequences, label, unused, depth - 1) for p in visible(folder) if p.is_dir()]
        cases = [case for found in below for case in found]
        if len(cases) == 1:
            return [{**cases[0], "case": folder.name}]
    return [{**case, "case": f"{folder.name}_{case['case']}"} for case in cases]


def _pictures(folder: Path, label: str) -> list[dict]:
    """Cases of the pictures that lie directly in a folder; ``<stem>_<label>`` with any picture's ending is a mask."""
    paths = [p for p in visible(folder) if p.suffix.lower() in PICTURES and p.is_file()]
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
            ``<patient>_<label>.nii.gz``), of the same files without folders, of DICOM series (a folder each, files of any
            name) or of volumes (one a case, mask ``<case>_<label>.nii.gz``); one such patient's folder, or one file. Of
            several sequences other names are known (:data:`OTHER_NAMES`), and ``-``, ``.`` and a space before them. A
            patient's folder may have any name, and scans lie up to four folders deeper (study, series): a case is named
            after the patient's folder, and where that holds several, by the whole path, joined by ``_``.
        sequences: file suffixes of the sequences, in the order of the network's channels.
        label: file suffix of the masks.
        section: ``training``, ``validation`` or ``test``, or ``all``.
        pictures: take pictures as well.
        class_folder: name of a sub-folder to take in place of the folder if there is one, such as ``CXR`` of MedNIST, whose
            folder has one for each class.

    Raises:
        FileNotFoundError: if there is no such folder, nothing in it, or nothing in the section.
        ValueError: for an unknown section.
    """
    root = Path(dataset_dir).absolute()  # "." has no name
    if class_folder and (root / class_folder).is_dir():
        root = root / class_folder
    if root.is_file():
        return [{"case": stem_of(root), "image": str(root)}]
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; give the folder of the scans by --dataset_dir")
    own, unused = _volumes(root, sequences, label, flat=False)
    if len(own) == 1 and own[0]["case"] == root.name and isinstance(own[0]["image"], list):
        _tell_left_out(root, own, sequences, unused, [])
        return own  # a patient's folder
    volumes, unused = _volumes(root, sequences, label, flat=True)
    paths = visible(root)
    if not volumes and any(map(_is_dicom, paths)) and not (pictures and _has_several_series(root)):
        return [{"case": root.name, "image": str(root)}]
    empty = []
    for path in filter(Path.is_dir, paths):
        found = _folder_cases(path, sequences, label, unused)
        volumes += found if len(found) == 1 else [{**case, "patient": path.name} for case in found]
        if not found:
            empty.append(path)
    flat = _pictures(root, label) if pictures else []
    if pictures and not volumes and not flat:
        inner = [found for found in (_pictures(folder, label) for folder in empty) if found]
        flat, empty = (inner[0], []) if len(inner) == 1 else ([], empty)
    if not volumes and not flat:
        raise FileNotFoundError(
            f"{root}: {_contents(paths)}, no scan found; expected <patient>/<patient>_{sequences[0]}.nii.gz, one NIfTI "
            "file a case, or one folder a DICOM series"
            + (", or pictures (PNG, JPEG, TIFF, BMP, DICOM) in it or in its only sub-folder with any" if pictures else "")
        )
    unused += others_in(paths, (*VOLUMES, *(PICTURES if pictures else ())))
    _tell_left_out(root, volumes + flat, sequences, unused, empty)
    cases = sorted(volumes + flat, key=lambda case: case["case"])
    if section == "all":
        return cases
    parts = {name: take_section(volumes, name) + section_by_order(flat, name) for name in SECTIONS}
    return sorted(checked_section(root, section, parts, by_order=not volumes), key=lambda case: case["case"])


def _contents(paths: Sequence[Path]) -> str:
    """What lies in a folder, in a few words."""
    folders = [path.name for path in paths if path.is_dir()]
    endings = Counter(path.suffix or path.name for path in paths if path.is_file())
    found = [f"folders ({shortened(folders, 3)})"] if folders else []
    found += [f"files ({shortened((f'{count} {ending}' for ending, count in endings.most_common()), 3)})"] if endings else []
    return f"it has {' and '.join(found)}" if found else "it is empty"


def _tell_left_out(
    root: Path, cases: Sequence[dict], sequences: Sequence[str], unused: Sequence[Path], empty: Sequence[Path]
) -> None:
    """Say in a line each which files and folders are passed over, and which patients have several series."""
    if unused:
        names = shortened(str(path.relative_to(root)) for path in sorted(unused))
        logger.warning(f"{root}: passed over, as no scans that are asked for: {names}")
    if empty:
        logger.warning(f"{root}: left out, as no scans were found in them: {shortened(path.name for path in empty)}")
    series = Counter(case["patient"] for case in cases if "patient" in case and Path(str(case["image"])).is_dir())
    if series and len(sequences) > 1:
        logger.warning(
            f"{root}: several DICOM series of one patient are each taken as a scan of its own ({shortened(series)}); keep "
            "only those of a sequence that the bundle takes alone"
        )


def is_folder_pair(dataset_dir: str | Path) -> bool:
    """Whether a folder has the layout of :func:`folder_pair`."""
    return all((Path(dataset_dir) / name).is_dir() for name in ("healthy", "diseased"))


def folder_pair(dataset_dir: str | Path) -> list[dict]:
    """Cases of a folder with 2-D images in ``healthy/`` and ``diseased/``, as prepared from CheXpert in the DDIM paper.

    A file's patient is what its name has before the first ``_``, so that a patient's images stay in one section.
    """
    return [
        {"case": f"{name}/{stem_of(path)}", "patient": stem_of(path).split("_")[0], "image": str(path), "class_label": label}
        for label, name in enumerate(("healthy", "diseased"))
        for path in visible(Path(dataset_dir) / name)
        if path.name.lower().endswith((*PICTURES, *VOLUMES))
    ]


def image_cases(dataset_dir: str | Path, sequences: Sequence[str], section: str = "all") -> list[dict]:
    """Cases of 2-D images: of a :func:`folder_pair`, named ``<folder>_<file>``, or pictures and volumes of one folder.

    Args:
        dataset_dir: the folder, see :func:`find_cases`.
        sequences: see there.
        section: ``training``, ``validation`` or ``test``, or ``all``; of a pair as in its training.

    Raises:
        FileNotFoundError: if there is nothing in it, or nothing in the section.
        ValueError: for an unknown section.
    """
    pair = folder_pair(dataset_dir) if is_folder_pair(dataset_dir) else []
    if not pair:
        return find_cases(dataset_dir, sequences, section=section, pictures=True)
    cases = [{**case, "case": case["case"].replace("/", "_")} for case in pair]
    if section == "all":
        return cases
    return checked_section(dataset_dir, section, {name: take_section(cases, name) for name in SECTIONS})


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
        FileNotFoundError: if no case of the folder has a label, or none is in the section.
    """
    if is_folder_pair(dataset_dir):
        return labelled_section(dataset_dir, folder_pair(dataset_dir), section, **split)
    return labelled_section(dataset_dir, find_cases(dataset_dir, sequences), section, slice_labels, **split)


def labelled_section(
    dataset_dir: str | Path, cases: list[dict], section: str, slice_labels: str | None = None, **split: object
) -> list[dict]:
    """Those of the cases that have a label, a class, or a row for each slice in ``slice_labels``, in one section.

    Raises:
        FileNotFoundError: if there is none.
    """
    if slice_labels:
        cases = add_slice_labels(cases, slice_labels)
    else:
        cases = [case for case in cases if "label" in case or "class_label" in case]
    if not cases:
        raise FileNotFoundError(
            f"{dataset_dir}: no labelled case; training needs masks (<patient>_seg.nii.gz), "
            "--slice_labels <a CSV file>, or the folders healthy/ and diseased/"
        )
    if section == "all":
        return cases
    return checked_section(
        dataset_dir, section, {name: take_section(cases, name, **split) for name in SECTIONS}, "labelled cases", **split
    )
