"""Finds CTs with the mask of an organ: the Medical Segmentation Decathlon's layout, or masks beside the scans."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

from monai.config import KeysCollection
from monai.transforms import MapTransform

from scripts.data.layouts import (
    SEPARATORS,
    find_cases,
    folder_pair,
    is_folder_pair,
    labelled_section,
    nifti_of,
    stem_of,
    visible,
)
from scripts.data.sections import SECTIONS, checked_section, take_section

__all__ = ["FindOrgand", "find_organ_cases", "organ_training_cases", "painted_cases"]

logger = logging.getLogger(__name__)

TUMOURS = ("cancer", "tumor", "tumour", "lesion")  # what data sets call them
MULTI_LABEL = ("total", "segmentations", "organs")  # names of a file with all organs of TotalSegmentator
TOTAL_SEGMENTATOR = {"pancreas": 7, "liver": 5, "spleen": 1, "stomach": 6}  # its task `total`, version 2


def find_organ_cases(
    dataset_dir: str | Path, organ: str = "pancreas", section: str = "all", label: str = "seg"
) -> list[dict]:
    """Cases of CTs with the mask of an organ, sorted by name.

    ``dataset_dir`` is

    - a data set of the Medical Segmentation Decathlon, with ``dataset.json``: the pairs of its ``training``, whose
      ``labels`` name the organ and, with one of :data:`TUMOURS` in its name, what is looked for in it;
    - or any folder that :func:`scripts.data.layouts.find_cases` reads, with the mask of each CT beside it:
      ``<case>_<organ>.nii.gz``, or ``<organ>.nii.gz`` in the case's own folder or in ``segmentations`` there, as
      TotalSegmentator writes it; or its file with all organs, ``total.nii.gz``, ``segmentations.nii.gz`` or
      ``<case>_total.nii.gz``. ``<case>_<label>.nii.gz`` is the mask of what is looked for, if that is known.

    Args:
        dataset_dir: see above.
        organ: its name in the files and in ``dataset.json``.
        section: ``training``, ``validation`` or ``test``, drawn by :func:`scripts.data.sections.section_of`, or ``all``.
        label: file suffix of the masks of what is looked for.

    Returns:
        dicts with ``case``, ``image``, ``organ`` and ``organ_values`` (numbers in that file that are the organ; none for all
        above 0), and ``label`` and ``label_values`` if what is looked for is known. A CT without a mask of the organ has a
        ``failure``, a line with the command that makes one.

    Raises:
        FileNotFoundError: if there is no such folder, nothing in it, or nothing in the section.
        ValueError: naming a ``dataset.json`` that can't be read, or without the organ.
    """
    root = Path(dataset_dir).absolute()
    if (root / "dataset.json").is_file():
        cases = _decathlon(root, organ)
    else:
        cases = _beside(root, organ, label)
    if section == "all":
        return cases
    return checked_section(root, section, {name: take_section(cases, name) for name in SECTIONS})


def organ_training_cases(
    dataset_dir: str | Path, section: str, organ: str = "pancreas", slice_labels: str | None = None
) -> list[dict]:
    """Cases to train on: those of :func:`find_organ_cases` of which it is known which slices show what is looked for.

    Or 2-D images in ``healthy/`` and ``diseased/``, see :func:`scripts.data.layouts.folder_pair`.

    Args:
        dataset_dir: see there.
        section: see there.
        organ: see there.
        slice_labels: CSV file with the columns ``case``, ``slice`` (from 0) and ``label``, in place of masks.

    Raises:
        FileNotFoundError: as there, and if no case is labelled.
        ValueError: as there, and for what :func:`scripts.data.layouts.add_slice_labels` refuses.
    """
    if is_folder_pair(dataset_dir):
        return labelled_section(dataset_dir, folder_pair(dataset_dir), section)
    return labelled_section(dataset_dir, find_organ_cases(dataset_dir, organ), section, slice_labels)


def painted_cases(dataset_dir: str | Path, section: str) -> list[dict]:
    """Healthy pictures of a folder that ``python -m scripts paint`` has written, once for each mask of what was painted.

    Args:
        dataset_dir: has ``healthy/<stem>.png`` and ``masks/<stem>_<copy>.png``.
        section: see :func:`find_organ_cases`.

    Returns:
        dicts with ``case``, ``patient``, ``image`` and ``label``.

    Raises:
        FileNotFoundError: if there is no such folder, or nothing in the section.
    """
    root = Path(dataset_dir).absolute()
    if not (root / "masks").is_dir():
        raise FileNotFoundError(f"{root}: no folder masks; make painted pictures by: python -m scripts paint BOXES {root}")
    cases = [
        {
            "case": stem_of(path),
            "patient": stem_of(path).split("_")[0],
            "image": str(root / "healthy" / f"{stem_of(path).rpartition('_')[0]}.png"),
            "label": str(path),
        }
        for path in visible(root / "masks")
    ]
    return checked_section(root, section, {name: take_section(cases, name) for name in SECTIONS})


class FindOrgand(MapTransform):
    """Give a scan that comes without the mask of an organ the one that lies beside it, as :func:`find_organ_cases` does.

    Args:
        keys: key of the scan's path.
        organ: name of the organ.

    Raises:
        ValueError: with the command that makes a mask, if there is none.
    """

    def __init__(self, keys: KeysCollection, organ: str = "pancreas") -> None:
        super().__init__(keys)
        self.organ = organ

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        if "organ" not in d and "failure" not in d:
            d |= _masks({"image": _path(d[self.first_key(d)])}, self.organ, is_alone=False)
        if "failure" in d:
            raise ValueError(d["failure"])
        return d


def _decathlon(root: Path, organ: str) -> list[dict]:
    """Pairs of a ``dataset.json``, whose paths count from its folder."""
    path = root / "dataset.json"
    try:
        described = json.loads(path.read_text(encoding="utf-8-sig"))
        labels, pairs = _numbers_by_name(described["labels"]), described["training"]
        files = [(root / pair["image"], root / pair["label"]) for pair in pairs]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: needs 'labels' and, in 'training', pairs of 'image' and 'label' ({error}); unpack the data set again"
        ) from None
    sought = [number for name, number in labels.items() if any(word in name for word in TUMOURS)]
    own = [number for name, number in labels.items() if organ in name and number not in sought]
    if not own:
        raise ValueError(f"{path}: no '{organ}' among its labels ({', '.join(labels)}); give the name by --organ")
    cases = []
    for image, label in sorted(files):
        case = {"case": stem_of(image), "patient": stem_of(image), "image": str(image)}
        missing = [str(file) for file in (image, label) if not file.is_file()]
        if missing:
            case["failure"] = f"{' and '.join(missing)}: named in dataset.json, but not there; unpack the data set again"
        case |= {"organ": str(label), "organ_values": own + sought}
        cases.append({**case, "label": str(label), "label_values": sought} if sought else case)
    return cases


def _numbers_by_name(labels: Mapping[str, object]) -> dict[str, int]:
    """Numbers of the labels by their names in small letters; data sets write either of both first."""
    named = {}
    for key, value in labels.items():
        number, name = (key, value) if str(key).isdecimal() else (value, key)
        named[str(name).lower()] = int(number)
    return named


def _beside(root: Path, organ: str, label: str) -> list[dict]:
    """CTs whose masks lie beside them."""
    found = find_cases(root, ("ct",), label)
    is_mask = re.compile(rf"(.*[{re.escape(SEPARATORS)}])?({organ}|{'|'.join(MULTI_LABEL)})", re.IGNORECASE)
    scans = [case for case in found if not is_mask.fullmatch(stem_of(Path(_path(case["image"]))))]
    if not scans:
        raise FileNotFoundError(f"{root}: masks, but no CT that they belong to; put each CT beside its mask")
    scans = [{**case, "image": _path(case["image"])} for case in scans]
    number = Counter(Path(case["image"]).parent for case in scans)
    patients = Counter(case.get("patient") for case in scans)
    cases = []
    for case in scans:
        name = case["patient"] if patients[case.get("patient")] == 1 and "patient" in case else case["case"]
        masks = _masks(case, organ, number[Path(case["image"]).parent] == 1)
        cases.append({**case, "case": name, "patient": case.get("patient", name), **masks})
    return cases


def _path(image: str | list[str]) -> str:
    return image if isinstance(image, str) else image[0]


def _masks(case: Mapping, organ: str, is_alone: bool) -> dict:
    """The mask of the organ in a CT, or what is to be done if there is none, and the values of the mask of what is sought.

    Args:
        case: with ``image``, a file or a folder of DICOM files.
        organ: name of the organ.
        is_alone: it is the only CT in its folder, so that masks there which name no case are its own.
    """
    image = Path(case["image"])
    folder, stem = image.parent, image.name if image.is_dir() else stem_of(image)
    own = [folder] * is_alone + [image] * image.is_dir()
    one = [(folder, f"{stem}{mark}{organ}") for mark in SEPARATORS]
    one += [(place, organ) for base in own for place in (base, base / "segmentations")]
    several = [(folder, f"{stem}{mark}{name}") for mark in SEPARATORS for name in MULTI_LABEL]
    several += [(base, name) for base in own for name in MULTI_LABEL]
    values = {"label_values": []} if "label" in case else {}
    for places, numbers in ((one, []), (several, [TOTAL_SEGMENTATOR[organ]] if organ in TOTAL_SEGMENTATOR else None)):
        path = next(filter(None, (nifti_of(*place) for place in places)), None)
        if path and numbers is not None:
            return {**values, "organ": path, "organ_values": numbers}
    out = folder / f"{stem}_segmentations"
    return {
        **values,
        "failure": f"{image}: no mask of the {organ} beside it; make one by: TotalSegmentator -i {image} -o {out} "
        f"--roi_subset {organ} && cp {out / organ}.nii.gz {folder / f'{stem}_{organ}.nii.gz'}",
    }
