"""Readers for the layouts of public data sets, splits by patient, and the datasets that feed the engines.

A *case* is a dictionary with ``case`` (its name), ``image`` (a path, or a list of paths in the order of the sequences,
None for one that is missing) and, where there is one, ``label`` (path of the mask), ``slice_labels`` (0 or 1 for each
slice) or ``class_label`` (0 healthy, 1 diseased, for a 2-D image). The case of a cine has ``image`` (one 4-D file, or the
files of end-diastole and end-systole) and, where there is one, ``frames`` (numbers of these two in the file, from 0),
``label`` and ``target_label`` (label maps of the two).
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import logging
import os
from collections.abc import Callable, Iterator, Sequence, Sized
from pathlib import Path

import itk
import numpy as np
from monai.transforms import Randomizable
from monai.utils import ensure_tuple
from torch.utils.data import Dataset, Sampler
from tqdm import tqdm

__all__ = [
    "BalancedBatchSampler",
    "CohortDataset",
    "ShuffledBatchSampler",
    "SliceDataset",
    "add_slice_labels",
    "find_cases",
    "find_cines",
    "folder_pair",
    "generated_cases",
    "root_cause",
    "section_by_order",
    "section_of",
    "take_section",
    "training_cases",
    "unfinished",
]

logger = logging.getLogger(__name__)

NIFTI = (".nii.gz", ".nii")
PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".dcm")


def _stem(path: Path) -> str:
    return next((path.name[: -len(ending)] for ending in NIFTI if path.name.endswith(ending)), path.stem)


def _nifti(folder: Path, stem: str) -> str | None:
    return next((str(folder / (stem + e)) for e in NIFTI if (folder / (stem + e)).is_file()), None)


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
    images = [_nifti(folder, f"{folder.name}_{sequence}") for sequence in sequences]
    if any(images):
        case = {"case": folder.name, "image": images}
        mask = _nifti(folder, f"{folder.name}_{label}")
        return {**case, "label": mask} if mask else case
    if any(_is_dicom(path) for path in folder.iterdir()):
        return {"case": folder.name, "image": str(folder)}
    return None


def _pictures(folder: Path, label: str) -> list[dict]:
    """Cases of the pictures that lie directly in a folder; ``<stem>_<label>`` with any picture's ending is a mask."""
    paths = [p for p in sorted(folder.iterdir()) if p.suffix.lower() in PICTURES and p.name[0] != "." and p.is_file()]
    masks = {_stem(p): str(p) for p in paths if _stem(p).endswith(f"_{label}")}
    cases = [{"case": _stem(p), "image": str(p)} for p in paths if _stem(p) not in masks]
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
        return [{"case": _stem(root), "image": str(root)}]
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
        elif path.name.endswith(NIFTI) and not _stem(path).endswith(f"_{label}"):
            mask = _nifti(root, f"{_stem(path)}_{label}")
            volumes.append({"case": _stem(path), "image": str(path), **({"label": mask} if mask else {})})
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
    if (whole := _nifti(folder, f"{name}_4d")) and info.is_file():
        frames = _acdc_frames(info)
        labels = (_nifti(folder, f"{name}_frame{frame + 1:02}_gt") for frame in frames)
        return _with_labels({**case, "image": whole, "frames": frames}, *labels)
    if cropped := _nifti(folder, f"{name}_ed2es"):
        return _with_labels({**case, "image": cropped}, *(_nifti(folder, f"{name}_{end}_gt") for end in ("ed", "es")))
    stems = sorted(_stem(p)[: -len("_ed")] for p in folder.iterdir() if p.name.endswith(NIFTI) and _stem(p).endswith("_ed"))
    ends = [_nifti(folder, f"{stem}_{end}") for stem in stems[:1] for end in ("ed", "es")]
    if len(ends) == 2 and all(ends):
        return _with_labels({**case, "image": ends}, *(_nifti(folder, f"{stems[0]}_{end}_gt") for end in ("ed", "es")))
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
    paths = [p for p in sorted(folder.iterdir()) if p.name.endswith(NIFTI) and not _stem(p).endswith("_gt")]
    table = _frames_table(folder / "frames.csv") if (folder / "frames.csv").is_file() else None
    if table is not None and set(table) != (names := {p.name for p in paths}):
        raise ValueError(
            f"{folder / 'frames.csv'}: has no row or no file for {', '.join(sorted(names ^ set(table)))}; "
            "give one row for each file"
        )
    cases = []
    for path in paths:
        case = {"case": _stem(path), "patient": _stem(path), "image": str(path)}
        if table is not None:
            case["frames"] = table[path.name]
        cases.append(_with_labels(case, *(_nifti(folder, f"{_stem(path)}_{end}_gt") for end in ("ed", "es"))))
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
        return [{"case": _stem(root), "patient": _stem(root), "image": str(root)}]
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


def folder_pair(dataset_dir: str | Path) -> list[dict]:
    """Cases of a folder with 2-D images in ``healthy/`` and ``diseased/``, as prepared from CheXpert in the DDIM paper.

    A file's patient is what its name has before the first ``_``, so that a patient's images stay in one section.
    """
    return [
        {"case": f"{name}/{_stem(path)}", "patient": _stem(path).split("_")[0], "image": str(path), "class_label": label}
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


def section_of(patient: str, fractions: Sequence[float] = (0.15, 0.1), seed: int = 0) -> str:
    """Section of a patient, ``test``, ``validation`` or ``training``, by a hash of its name.

    The SHA-256 of ``<seed>:<patient>`` gives a number in [0, 1): below ``fractions[0]`` is test, the next
    ``fractions[1]`` validation. New patients never move old ones.
    """
    number = int(hashlib.sha256(f"{seed}:{patient}".encode()).hexdigest()[:8], 16) / 2**32
    test, validation = fractions
    return "test" if number < test else "validation" if number < test + validation else "training"


def section_by_order(cases: list[dict], section: str = "all", fractions: Sequence[float] = (1 / 18, 1 / 18)) -> list[dict]:
    """Cases of one section, or all of them, cut out of their order by name: training, then validation, then test.

    For files that may come from one scan if they are neighbours, which a hash would mix. Of 9,000 cases, 8,000 are for
    training, 500 for validation and 500 for test.

    Args:
        cases: cases, in any order.
        section: ``training``, ``validation``, ``test`` or ``all``.
        fractions: shares of test and validation; both borders are rounded to the nearest whole case.

    Raises:
        ValueError: for an unknown section.
    """
    test, validation = fractions
    ordered = sorted(cases, key=lambda case: case["case"])
    count = len(cases)
    train, develop = round(count * (1 - test - validation)), round(count * (1 - test))
    bounds = {"training": (0, train), "validation": (train, develop), "test": (develop, count), "all": (0, count)}
    if section not in bounds:
        raise ValueError(f"section must be one of {', '.join(bounds)}, got {section}")
    return ordered[slice(*bounds[section])]


def take_section(cases: list[dict], section: str = "all", **split: object) -> list[dict]:
    """Cases of one section, or all of them, see :func:`section_of`."""
    return [c for c in cases if section == "all" or section_of(c.get("patient", c["case"]), **split) == section]


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


def generated_cases(number: int, seed: int = 0, label: int | None = None) -> list[dict]:
    """Cases of a generative network: ``generated_<seed>`` with ``seed``, and ``class_label`` if a class is wanted.

    Args:
        number: how many; their seeds follow each other.
        seed: seed of the first, 0 or more.
        label: class of all, for a network that was trained with classes.

    Raises:
        ValueError: if there is none to generate, or a seed does not lie in 0 ... 2^32 - 1.
    """
    if number < 1:
        raise ValueError(f"--number must be at least 1, got {number}")
    if not 0 <= seed <= 2**32 - number:
        raise ValueError(f"--seed must be 0 or more, and the last of {number} below 2^32, got {seed}")
    chosen = {} if label is None else {"class_label": label}
    return [{"case": f"generated_{s}", "seed": s, **chosen} for s in range(seed, seed + number)]


def unfinished(
    cases: list[dict],
    output_dir: str | Path,
    overwrite: bool = False,
    rank: int = 0,
    world_size: int = 1,
    table: str = "results.csv",
) -> list[dict]:
    """Cases that have no row yet in ``output_dir/<table>``, or all of them with ``overwrite``.

    Of several processes each takes every ``world_size``-th case, beginning with number ``rank``; what is finished is left
    out only then, so that a case stays with its process when another one was faster.
    """
    cases = cases[rank::world_size]
    results = Path(output_dir) / table
    if overwrite or not results.is_file():
        return cases
    with open(results, newline="", encoding="utf-8") as file:
        finished = {row["case"] for row in csv.DictReader(file)}
    left = [case for case in cases if case["case"] not in finished]
    if len(left) < len(cases):
        logger.info(f"{len(cases) - len(left)} cases are finished already (--overwrite true does them again)")
    return left


def root_cause(error: BaseException) -> str:
    """One line that says what went wrong, from below the layers that MONAI's ``Compose`` wraps around an error."""
    while str(error).startswith("applying transform") and error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__


class CohortDataset(Dataset):
    """Dataset of cases in which one that can't be read does not stop the others.

    Such a case comes as ``{"case": name, "failure": one line}``, which
    :class:`scripts.engines.CohortEvaluator` reports and leaves out.

    Args:
        data: cases.
        transform: preprocessing.
    """

    def __init__(self, data: Sequence[dict], transform: Callable) -> None:
        self.data, self.transform = data, transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict:
        case = self.data[index]
        try:
            return self.transform(dict(case))
        except Exception as error:
            reason, paths = root_cause(error), [path for path in ensure_tuple(case.get("image")) if path]
            if paths and case["case"] not in reason:  # not every error names its file
                reason = f"{paths[0]}: {reason}"
            return {"case": case["case"], "failure": reason}


class SliceDataset(Dataset):
    """Labelled slices of a list of cases, held in memory in half precision (1 MB for 10 slices of 3 x 128 x 128).

    Args:
        data: cases, with ``label``, ``slice_labels`` or ``class_label``.
        transform: preprocessing that ends with :class:`scripts.transforms.ExtractSlicesd`; without it a case is trained on
            as a whole, as if it were one slice of class 0.
        augmentation: random transforms of a slice, or None.
        classes: the classes that the slices must have, all of them and no other; (0,) for healthy slices alone.

    Raises:
        ValueError: naming every case that can't be read, before any training, or if a class has no slice, or if there
            are slices of another class.
    """

    def __init__(
        self,
        data: Sequence[dict],
        transform: Callable,
        augmentation: Callable | None = None,
        classes: Sequence[int] = (0, 1),
    ) -> None:
        self.augmentation = augmentation
        self.slices: list[dict] = []
        failures = []
        for case in tqdm(data, desc="reading cases", disable=None):
            # MONAI Label's cases are {"image", "label"} without a name
            name = case.get("case") or Path(next(filter(None, ensure_tuple(case["image"])))).name
            try:
                slices = transform({**case, "case": name})
            except Exception as error:
                failures.append(f"{name}: {root_cause(error)}")
                continue
            slices = slices if isinstance(slices, list) else [{"class_label": 0, "position": 0.0, **slices}]
            self.slices += [{**s, "image": s["image"].half()} for s in slices]
        if failures:
            raise ValueError(f"{len(failures)} of {len(data)} cases can't be used for training:\n" + "\n".join(failures))
        self.class_labels = np.array([s["class_label"] for s in self.slices])
        self.positions = np.array([s["position"] for s in self.slices])
        found = sorted(set(self.class_labels.tolist()))
        if found != sorted(classes):
            wanted = " and ".join(f"{('healthy', 'diseased')[label]} ({label})" for label in sorted(classes))
            raise ValueError(
                f"training needs {wanted} slices{' alone' if len(classes) == 1 else ''}, "
                f"found the classes {found} in {len(data)} cases"
            )

    def __len__(self) -> int:
        return len(self.slices)

    def __getitem__(self, key: int | tuple[int, int]) -> dict:
        """Slice ``index``, or ``(index, seed)`` with the seed of its augmentation."""
        index, seed = key if isinstance(key, tuple) else (key, None)
        item = {"image": self.slices[index]["image"].float(), "class_label": self.slices[index]["class_label"]}
        if self.augmentation is None or seed is None:
            return item
        if isinstance(self.augmentation, Randomizable):
            self.augmentation.set_random_state(seed=seed)
        return self.augmentation(item)


class BalancedBatchSampler(Sampler):
    """Endless batches, half healthy and half diseased, each a function of the seed and its number alone.

    So training that is cut off resumes with exactly the batches that were to come: set ``start`` and iterate. Healthy
    slices are drawn mostly from where in the volume diseased ones lie; otherwise the classifier learns the height of a
    slice in the head in place of the lesion.

    Args:
        dataset: has ``class_labels`` and ``positions`` (0 ... 1), one for each slice.
        batch_size: slices in a batch of this process.
        matched: share of the healthy slices that is drawn by the positions of the diseased; the rest evenly.
        seed: seed of all batches.
        rank: number of this process: of batches of ``world_size * batch_size`` slices, which one process would take, it gets
            every ``world_size``-th slice, beginning with this one.
        world_size: number of processes.
    """

    def __init__(
        self,
        dataset: SliceDataset,
        batch_size: int,
        matched: float = 0.7,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.batch_size, self.seed, self.start = batch_size, seed, 0
        self.rank, self.world_size = rank, world_size
        self.healthy, self.diseased = (np.flatnonzero(dataset.class_labels == label) for label in (0, 1))
        bins = np.minimum((dataset.positions * 10).astype(int), 9)
        counts = [np.bincount(bins[part], minlength=10) for part in (self.healthy, self.diseased)]
        weight = (counts[1] / np.maximum(counts[0], 1))[bins[self.healthy]]
        evenly = np.full(len(self.healthy), 1 / len(self.healthy))
        self.weight = matched * weight / weight.sum() + (1 - matched) * evenly if weight.sum() else evenly

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for iteration in itertools.count(self.start):
            rng = np.random.default_rng([self.seed, iteration])
            size = self.batch_size * self.world_size
            num_diseased = size // 2
            chosen = np.concatenate(
                [
                    rng.choice(self.diseased, num_diseased),
                    rng.choice(self.healthy, size - num_diseased, p=self.weight),
                ]
            )
            seeds = rng.integers(2**31, size=size)
            yield list(zip(chosen.tolist(), seeds.tolist(), strict=True))[self.rank :: self.world_size]


class ShuffledBatchSampler(Sampler):
    """Endless batches that go through all slices, in a new order each pass, each a function of the seed and its number.

    As :class:`BalancedBatchSampler`, training resumes exactly if ``start`` is set. The passes lie end to end: a batch
    may end one and begin the next, and so a dataset may be smaller than a batch.

    Args:
        dataset: the slices; only their number counts.
        batch_size: slices in a batch of this process.
        seed: seed of all batches.
        rank: number of this process: of batches of ``world_size * batch_size`` slices, which one process would take, it gets
            every ``world_size``-th slice, beginning with this one.
        world_size: number of processes.
    """

    def __init__(self, dataset: Sized, batch_size: int, seed: int = 0, rank: int = 0, world_size: int = 1) -> None:
        self.length, self.batch_size, self.seed, self.start = len(dataset), batch_size, seed, 0
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for iteration in itertools.count(self.start):
            size = self.batch_size * self.world_size
            places = range(iteration * size, (iteration + 1) * size)
            orders = {p: self._order(p) for p in {place // self.length for place in places}}
            chosen = [int(orders[place // self.length][place % self.length]) for place in places]
            seeds = np.random.default_rng([self.seed, 1, iteration]).integers(2**31, size=size)
            yield list(zip(chosen, seeds.tolist(), strict=True))[self.rank :: self.world_size]

    def _order(self, number: int) -> np.ndarray:
        """Order of the slices in a pass."""
        return np.random.default_rng([self.seed, 0, number]).permutation(self.length)
