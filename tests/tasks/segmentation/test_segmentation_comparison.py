from __future__ import annotations

import logging

import pytest
from conftest import rows_of

from scripts.tables import write_rows
from scripts.tasks.segmentation.comparison import COLUMNS, compare_segmentations


def evaluation(folder, **dice):
    """What an evaluation writes of patients with these Dice coefficients."""
    cases = [{"case": case, **dict.fromkeys(COLUMNS, 0.5), "dice": value} for case, value in dice.items()]
    write_rows(folder / "metrics.csv", [*cases, {"case": "mean"}, {"case": "std"}])
    write_rows(folder / "reliability.csv", [{"voxels": 100, "probability": p, "lesion": p} for p in (0.1, 0.9)])
    return folder


def test_methods_are_compared_patient_by_patient(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    folders = {"good": evaluation(tmp_path / "a", x=1.0, y=0.9), "bad": evaluation(tmp_path / "b", x=0.8, y=0.7)}
    compare_segmentations(folders, tmp_path)
    rows = {row["method"]: row for row in rows_of(tmp_path / "comparison.csv")}
    assert list(rows) == ["good", "bad", "good minus bad"]
    assert float(rows["good"]["dice"]) == pytest.approx(0.95) and float(rows["bad"]["dice_low"]) == pytest.approx(0.7)
    ends = [float(rows["good minus bad"][f"dice{end}"]) for end in ("", "_low", "_high")]
    assert ends == pytest.approx([0.2, 0.2, 0.2]), "patient by patient there is no doubt"
    assert "2 patients" in caplog.text and "| good minus bad | +0.200 (+0.200 to +0.200)" in caplog.text
    assert (tmp_path / "comparison.png").is_file()


def test_methods_evaluated_on_other_patients_are_not_compared(tmp_path):
    folders = {"good": evaluation(tmp_path / "a", x=1.0), "other": evaluation(tmp_path / "b", z=1.0)}
    with pytest.raises(ValueError, match=f"{tmp_path / 'b'}: other patients than in {tmp_path / 'a'}"):
        compare_segmentations(folders, tmp_path)
    assert not (tmp_path / "comparison.csv").exists()
