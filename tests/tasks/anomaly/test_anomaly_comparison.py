from __future__ import annotations

import logging

import numpy as np
import pytest
from conftest import BRAIN, BUNDLES, ONE_STEP, rows_of, save_patient
from PIL import Image

from scripts.data.sections import section_of
from scripts.tasks.anomaly.comparison import Method, compare_methods, methods_of


def test_bundles_of_brain_mri_and_their_controls_are_found_and_no_other():
    methods = methods_of(BUNDLES)
    assert {BRAIN.name, ONE_STEP.name, "flair", "smooth"} <= methods.keys()
    assert {method.bundle.name[:9] for method in methods.values()} == {"brain_mri"}
    assert all(method.seen != "not said" for method in methods.values())


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    """A control, the one-step bundle, and the same in other settings, compared on made patients."""
    folder = tmp_path_factory.mktemp("comparison")
    for section, number in (("validation", 1), ("test", 2)):
        for name in [f"p{i}" for i in range(60) if section_of(f"p{i}") == section][:number]:
            save_patient(folder / "scans", name, seed=len(section), num_slices=3)
    found = methods_of([ONE_STEP])
    methods = {**found, "twice": Method(ONE_STEP, settings={"map_weights": [0, 2, 0], "half_score": 0.5})}
    rows = compare_methods(methods, str(folder / "scans"), str(folder / "out"), most_false_ml=5.0, cap_ml=6.0)
    return folder, methods, rows


def test_every_method_gets_a_row_by_one_rule_over_all_slices(comparison):
    folder, methods, rows = comparison
    assert [row["method"] for row in rows] == list(methods) == [ONE_STEP.name, "smooth", "twice"]
    table = rows_of(folder / "out" / "comparison.csv")
    assert [row["seen"] for row in table] == [method.seen for method in methods.values()]
    for row in rows:
        assert 0 <= row["dice_low"] <= row["dice"] <= row["dice_high"] <= 1
        assert 0 < row["auprc"] <= 1 and 0 < row["best_dice"] <= 1 and row["false_ml"] < 20
        assert np.isnan(row["recall below 1 ml"])  # there is none
        assert row["gflop"] > 0 or row["method"] == "smooth"
    assert rows[0]["best_dice"] > 0.5 and rows[0]["dice"] > 0.3
    assert len(rows_of(folder / "out" / "comparison_cases.csv")) == 6  # two test patients
    text = (folder / "out" / "comparison.md").read_text(encoding="utf-8")
    assert text.startswith("2 patients, 6 slices (test); at most 5 ml expected") and f"- {ONE_STEP.name} has seen: " in text
    assert Image.open(folder / "out" / "comparison.png").size[0] > 100


def test_a_second_comparison_does_no_case_again(comparison, caplog):
    folder, methods, rows = comparison
    with caplog.at_level(logging.INFO):
        again = compare_methods({"smooth": methods["smooth"]}, str(folder / "scans"), str(folder / "out"), cap_ml=5.0)
    told = ("1 cases are finished already", "2 cases are finished already")
    assert [caplog.text.count(line) for line in told] == [1, 1]
    assert again[0]["auprc"] == rows[1]["auprc"]


def test_a_section_without_labels_is_refused(tmp_path):
    name = next(f"p{i}" for i in range(40) if section_of(f"p{i}") == "validation")
    (save_patient(tmp_path / "scans", name) / f"{name}_seg.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match="no case of the section 'validation' has a mask"):
        compare_methods(methods_of([ONE_STEP]), str(tmp_path / "scans"), str(tmp_path / "out"), section="validation")
