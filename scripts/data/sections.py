"""Splits cases into training, validation and test."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence

__all__ = ["cine_section_of", "section_by_order", "section_of", "take_section"]

ACDC = re.compile(r"patient\d{3}")  # groups of twenty: 001 to 020 dilated, 021 to 040 hypertrophic cardiomyopathy, …
# the smallest seed that puts exactly four patients of each group into the test section, and none that was looked at before
ACDC_SEED, ACDC_FRACTIONS = 16371, (0.2, 0.1)
LOOKED_AT = {f"patient{number:03}" for number in (1, 2, 3, 6, 7, 8, 9, 10)}  # the former test section, all of one group


def section_of(patient: str, fractions: Sequence[float] = (0.15, 0.1), seed: int = 0) -> str:
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
    if section not in ("training", "validation", "test", "all"):
        raise ValueError(f"section must be one of training, validation, test, all, got {section}")
    return [c for c in cases if section == "all" or rule(c.get("patient", c["case"]), **split) == section]
