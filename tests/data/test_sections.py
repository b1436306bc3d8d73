from __future__ import annotations

from collections import Counter

import pytest
from made_inputs import SECTIONS

from scripts.data.sections import checked_section, cine_section_of, section_by_order, section_of, take_section

# --- section_by_order


def test_of_9000_pictures_the_last_1000_are_for_validation_and_test():
    cases = [{"case": f"{i:06}"} for i in range(9000)]
    bounds = [(part[0]["case"], part[-1]["case"]) for part in (section_by_order(cases, s) for s in (*SECTIONS, "all"))]
    assert bounds == [("000000", "007999"), ("008000", "008499"), ("008500", "008999"), ("000000", "008999")]


@pytest.mark.parametrize("fractions", [(1 / 18, 1 / 18), (0.5, 0.5), (0.0, 0.3), (1.0, 0.0)])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 50])
def test_sections_by_order_lie_end_to_end(count, fractions):
    cases = [{"case": f"{i:02}"} for i in range(count)]
    parts = [section_by_order(cases[::-1], section, fractions) for section in SECTIONS]
    assert sum(parts, []) == cases
    assert all(abs(len(part) - count * f) <= 1 for part, f in zip(parts[:0:-1], fractions, strict=True))


def test_an_unknown_section_is_refused():
    with pytest.raises(ValueError, match="training, validation, test, all, got tests"):
        section_by_order([], "tests")


# --- section_of, take_section


NAMES = [f"patient{i}" for i in range(2000)]


def test_a_patients_section_never_changes():
    """Another rule would mix old test patients into training: the literal values below hold for good."""
    assert Counter(map(section_of, NAMES)) == {"training": 1519, "test": 310, "validation": 171}
    assert [section_of(name) for name in ("patient0", "patient1", "patient10")] == ["test", "training", "validation"]


@pytest.mark.parametrize("fractions", [(0.15, 0.1), (0.5, 0.25), (0.0, 0.0)])
def test_sections_have_about_the_sizes_that_were_asked_for(fractions):
    counts = Counter(section_of(name, fractions) for name in NAMES)
    assert counts["test"] / 2000 == pytest.approx(fractions[0], abs=0.03)
    assert counts["validation"] / 2000 == pytest.approx(fractions[1], abs=0.03)


def test_new_patients_move_none_of_the_old():
    few, many = ([{"case": name} for name in names] for names in (NAMES[::7], NAMES))
    for section in SECTIONS:
        old = take_section(few, section)
        assert old == [case for case in take_section(many, section) if case in few]


def test_another_seed_gives_another_split():
    assert sum(section_of(name) != section_of(name, seed=1) for name in NAMES) > 400


def test_the_sections_are_disjoint_and_cover_all():
    cases = [{"case": name} for name in NAMES]
    parts = [{c["case"] for c in take_section(cases, section)} for section in SECTIONS]
    assert sum(map(len, parts)) == 2000 and set.union(*parts) == set(NAMES)
    assert take_section(cases) == cases


# --- checked_section


def test_an_empty_section_is_an_error_that_counts_patients_not_their_images():
    parts = {"training": [{"case": f"a{i}", "patient": "a"} for i in range(3)], "validation": [], "test": [{"case": "b"}]}
    assert checked_section("scans", "training", parts) == parts["training"]
    with pytest.raises(FileNotFoundError) as error:
        checked_section("scans", "validation", parts, "labelled cases", fractions=(0.15, 0.2))
    assert "none of the 4 labelled cases falls into the validation section" in str(error.value)
    assert "training 1, validation 0, test 1" in str(error.value) and "20% fall there: 14 patients" in str(error.value)
    with pytest.raises(FileNotFoundError, match="by the order of the names, and 18 pictures or more leave no"):
        checked_section("scans", "validation", parts, by_order=True)
    with pytest.raises(ValueError, match="training, validation, test, all, got tests"):
        checked_section("scans", "tests", parts)


@pytest.mark.parametrize("count", range(18, 60))
def test_18_pictures_leave_no_section_empty(count):
    cases = [{"case": f"{i:02}"} for i in range(count)]
    assert all(section_by_order(cases, section) for section in SECTIONS)


def test_29_patients_are_enough_in_19_of_20_cohorts():
    cohorts = [[{"case": f"{cohort}-{i}"} for i in range(29)] for cohort in range(400)]
    assert sum(not take_section(cases, "validation") for cases in cohorts) / 400 == pytest.approx(0.05, abs=0.02)


# --- cine_section_of


ACDC = [f"patient{number:03}" for number in range(1, 101)]  # twenty of each group, one after the other


def test_of_each_group_of_acdc_four_patients_are_test_and_none_that_was_looked_at_before():
    groups = [ACDC[first : first + 20] for first in range(0, 100, 20)]
    test = [[name[-3:] for name in group if cine_section_of(name) == "test"] for group in groups]
    assert [len(names) for names in test] == [4] * 5
    assert test[1] == ["021", "026", "031", "035"], "for good, as weights have been trained on the others"
    assert Counter(map(cine_section_of, ACDC)) == {"training": 63, "test": 20, "validation": 17}
    former = [f"patient{number:03}" for number in (1, 2, 3, 6, 7, 8, 9, 10)]
    assert {cine_section_of(name) for name in former} == {"validation"}


def test_other_patients_of_cines_are_split_by_the_hash_alone():
    assert all(cine_section_of(name) == section_of(name) for name in NAMES if len(name) != len("patient000"))
    assert Counter(cine_section_of(f"heart{i}") for i in range(1000)) == Counter(
        section_of(f"heart{i}") for i in range(1000)
    )
