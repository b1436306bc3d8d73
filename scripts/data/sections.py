"""Splits cases into training, validation and test."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

__all__ = ["section_by_order", "section_of", "take_section"]


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
    """Cases of one section, or all of them, see :func:`section_of`.

    Raises:
        ValueError: for an unknown section.
    """
    if section not in ("training", "validation", "test", "all"):
        raise ValueError(f"section must be one of training, validation, test, all, got {section}")
    return [c for c in cases if section == "all" or section_of(c.get("patient", c["case"]), **split) == section]
