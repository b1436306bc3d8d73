from __future__ import annotations

import logging

import pytest
from made_inputs import read, table
from monai.data import DataLoader
from monai.transforms import Compose

from scripts.data.cohort import CohortDataset, generated_cases, root_cause, unfinished


def test_generated_cases_are_numbered_by_their_seeds_and_have_a_class_only_if_one_is_wanted():
    assert generated_cases(2, seed=9) == [{"case": "generated_9", "seed": 9}, {"case": "generated_10", "seed": 10}]
    assert generated_cases(1, label=0) == [{"case": "generated_0", "seed": 0, "class_label": 0}]


@pytest.mark.parametrize(("number", "seed", "mend"), [(0, 0, "--number"), (1, -1, "--seed"), (2, 2**32 - 1, "--seed")])
def test_a_number_or_seed_of_images_that_makes_no_sense_is_refused(number, seed, mend):
    with pytest.raises(ValueError, match=f"{mend} must be"):
        generated_cases(number, seed)


def test_finished_cases_are_looked_up_in_the_named_table(tmp_path):
    (tmp_path / "generated.csv").write_text("case,seed\ngenerated_1,1\n")
    cases = generated_cases(4)
    assert unfinished(cases, tmp_path, table="generated.csv") == [cases[0], *cases[2:]]
    assert unfinished(cases, tmp_path, rank=1, world_size=2, table="generated.csv") == [cases[3]]
    assert unfinished(cases, tmp_path) == cases


def test_cases_with_a_row_in_the_results_are_finished(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    cases = [{"case": name} for name in "abc"]
    assert unfinished(cases, tmp_path / "nothing") == cases
    table(tmp_path / "results.csv", ["case", "score"], ["b", 1], ["d", 1])
    assert unfinished(cases, tmp_path) == [{"case": "a"}, {"case": "c"}]
    assert "1 cases are finished already (--overwrite" in caplog.text
    assert unfinished(cases, tmp_path, overwrite=True) == cases


def test_the_root_cause_is_the_innermost_message_in_one_line():
    try:
        try:
            raise ValueError("a.nii.gz:\n  is broken")
        except ValueError as error:
            raise RuntimeError("applying transform") from error
    except RuntimeError as error:
        assert root_cause(error) == "a.nii.gz: is broken"


def test_an_error_without_words_is_told_by_its_type():
    assert root_cause(MemoryError()) == "MemoryError"


def test_an_error_that_names_no_file_is_told_with_the_first_of_the_case():
    def fail(data):
        raise ArithmeticError("no convergence")

    (item,) = CohortDataset([{"case": "a", "image": [None, "/scans/a_flair.nii.gz"]}], fail)
    assert item == {"case": "a", "failure": "/scans/a_flair.nii.gz: no convergence"}


def test_a_case_that_cannot_be_read_does_not_stop_the_others():
    cases = [{"case": "a", "image": "good"}, {"case": "b", "image": "bad"}, {"case": "c", "image": "good"}]
    first, bad, last = DataLoader(CohortDataset(cases, Compose([read])), batch_size=1)
    assert bad == {"case": ["b"], "failure": ["b: not a scan"]}
    assert first["image"].shape == last["image"].shape == (1, 1, 4, 4, 4) and "failure" not in first
    assert cases[0] == {"case": "a", "image": "good"}
