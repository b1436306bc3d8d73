"""Finds pairs of volumes to register."""

from __future__ import annotations

from pathlib import Path

from scripts.data.cines import find_cines
from scripts.data.layouts import stem_of

__all__ = ["find_pairs"]


def find_pairs(
    dataset_dir: str | Path,
    section: str = "all",
    moving: str | Path | None = None,
    fixed: str | Path | None = None,
    moving_label: str | Path | None = None,
    fixed_label: str | Path | None = None,
    backward: bool = False,
) -> list[dict]:
    """Pairs of a moving and a fixed volume, as cases of :func:`scripts.data.cines.find_cines`.

    Args:
        dataset_dir: folder in one of the layouts of that function; of a cine, end-diastole moves and end-systole is fixed,
            of two files the one called ``moving``.
        section: section of the cases there.
        moving: one file, in place of a folder.
        fixed: the file that it is to be brought to.
        moving_label: label map of the former, if there is one.
        fixed_label: label map of the latter.
        backward: exchange moving and fixed in all cases, whose names then end in ``_backward``.

    Raises:
        ValueError: if there is but one of ``moving`` and ``fixed``, or a label map without them.
        FileNotFoundError: see :func:`scripts.data.cines.find_cines`.
    """
    labels = {"label": moving_label, "target_label": fixed_label}
    if moving and fixed:
        name = f"{stem_of(Path(moving))}_to_{stem_of(Path(fixed))}"
        given = {key: str(path) for key, path in labels.items() if path}
        cases = [{"case": name, "patient": name, "image": [str(moving), str(fixed)], **given}]
    elif moving or fixed or any(labels.values()):
        raise ValueError("--moving and --fixed go together, with --moving_label and --fixed_label if there are label maps")
    else:
        cases = find_cines(dataset_dir, section)
    return [_turned(case) for case in cases] if backward else cases


def _turned(case: dict) -> dict:
    """The case with moving and fixed exchanged; the frames of a 4-D file are when they are read."""
    turned = {**case, "case": f"{case['case']}_backward", "backward": True}
    if isinstance(case["image"], list):
        turned["image"] = case["image"][::-1]
    for key, other in (("label", "target_label"), ("target_label", "label")):
        turned.pop(key, None)
        if other in case:
            turned[key] = case[other]
    return turned
