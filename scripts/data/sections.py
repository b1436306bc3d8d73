"""Splits cases into training, validation and test."""

from __future__ import annotations

import hashlib
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

__all__ = ["SECTIONS", "checked_section", "cine_section_of", "section_by_order", "section_of", "take_section"]

logger = logging.getLogger(__name__)

SECTIONS = ("training", "validation", "test")
FRACTIONS = (0.15, 0.1)  # of test and validation
ACDC = re.compile(r"patient\d{3}")  # groups of twenty: 001 to 020 dilated, 021 to 040 hypertrophic cardiomyopathy, …
# the smallest seed that puts exactly four patients of each group into the test section, and none that was looked at before
ACDC_SEED, ACDC_FRACTIONS = 16371, (0.2, 0.1)
LOOKED_AT = {f"patient{number:03}" for number in (1, 2, 3, 6, 7, 8, 9, 10)}  # the former test section, all of one group


def section_of(patient: str, fractions: Sequence[float] = FRACTIONS, seed: int = 0) -> str:
    """Section of a patient, ``test``, ``validation`` or ``training``, by a hash of its name.

    The SHA-256 of ``<seed>:<patient>`` gives a number in [0, 1): below ``fractions[0]`` is test, the next
    ``fractions[1]`` validation. New patients never move old ones.
    """
    number = int(hashlib.sha256(f"{seed}:{patient}".encode()).hexdigest()[:8], 16) / 2**32
    test, validation = fractions
    return "test" if number < test else "validation" if number < test + validation else "training"


def cine_section_of(patient: str, fractions: Sequence[float] = (0.15, 0.1)) -> str:
    """Section of a patient of a cine, by :func:`section_of`; of ACDC (``patientNNN``) so that no group is left out.

    There, 20 % of the patients are test and 10 % validation, with the smallest seed that puts four of the twenty of each of
    the five groups into the test section, but none of the eight that earlier choices were made by. Those eight are
    validation. A group, or a patient, that is missing or added moves no other.
    """
    if not ACDC.fullmatch(patient):
        return section_of(patient, fractions)
    return "validation" if patient in LOOKED_AT else section_of(patient, ACDC_FRACTIONS, ACDC_SEED)


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


def take_section(
    cases: list[dict], section: str = "all", rule: Callable[..., str] = section_of, **split: object
) -> list[dict]:
    """Cases of one section, or all of them, by a rule such as :func:`section_of`.

    Raises:
        ValueError: for an unknown section.
    """
    if section not in (*SECTIONS, "all"):
        raise ValueError(f"section must be one of {', '.join(SECTIONS)}, all, got {section}")
    return [c for c in cases if section == "all" or rule(c.get("patient", c["case"]), **split) == section]


def checked_section(
    root: str | Path,
    section: str,
    parts: Mapping[str, list[dict]],
    what: str = "cases",
    fractions: Sequence[float] = FRACTIONS,
    by_order: bool = False,
    **_: object,
) -> list[dict]:
    """Cases of one of the sections, after a line that says how many patients there are in each.

    Args:
        root: folder of the cases.
        section: name of the section that is wanted.
        parts: cases by section.
        what: what the cases are called.
        fractions: shares of test and validation that the split was made with.
        by_order: whether it was made by :func:`section_by_order`.

    Raises:
        ValueError: for an unknown section.
        FileNotFoundError: if nothing is in the section, with what is in each, and how many patients it takes.
    """
    if section not in parts:
        raise ValueError(f"section must be one of {', '.join(parts)}, all, got {section}")
    counts = ", ".join(f"{name} {len({c.get('patient', c['case']) for c in part})}" for name, part in parts.items())
    if parts[section]:
        logger.info(f"{root}: {section} section, {len(parts[section])} {what}; patients in each: {counts}")
        return parts[section]
    test, validation = fractions
    share = {"training": 1 - test - validation, "validation": validation, "test": test}[section]
    if by_order:
        how = "the split is by the order of the names, and 18 pictures or more leave no section empty"
    else:
        how = f"the split is by a hash of the patient's name, by which {share:.0%} fall there"
        if 0 < share < 1:
            how += f": {math.ceil(math.log(0.05) / math.log(1 - share))} patients are enough in 19 of 20 cohorts"
    raise FileNotFoundError(
        f"{root}: none of the {sum(map(len, parts.values()))} {what} falls into the {section} section (patients in each: "
        f"{counts}); {how}; add patients, or take another section"
    )
