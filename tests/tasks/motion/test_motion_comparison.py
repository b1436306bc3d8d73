from __future__ import annotations

import logging

import pytest
from conftest import rows_of

from scripts.tables import write_rows
from scripts.tasks.motion.comparison import COLUMNS, compare_cines

MEASURED = {column for columns, _ in COLUMNS.values() for column in columns}


def evaluation(folder, **gains):
    """What an evaluation writes of patients with these gains, named after their group and number, such as NOR1."""
    cases = []
    for case, gain in gains.items():
        figures = dict.fromkeys(MEASURED, 0.5) | {"psnr_gain": gain, "ejection_fraction_error": -gain, "dice_after": 0.75}
        cases.append({"case": case, "group": case.rstrip("0123456789"), **figures})
    write_rows(folder / "metrics.csv", [*cases, {"case": "mean", "group": ""}])
    write_rows(folder / "results.csv", [{"case": case["case"], "seconds": 2} for case in cases])
    return folder


def test_methods_are_compared_over_all_patients_and_in_each_group(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    folders = {
        "default": evaluation(tmp_path / "a", NOR1=1, NOR2=3, DCM1=5),
        "other": evaluation(tmp_path / "b", NOR1=0.5, NOR2=2.5, DCM1=4.5),
    }
    compare_cines(folders, tmp_path)
    rows = {(row["method"], row["group"]): row for row in rows_of(tmp_path / "comparison.csv")}
    assert list(rows) == [(method, group) for group in ("all", "DCM", "NOR") for method in folders]
    gains = {key: float(row["psnr_gain"]) for key, row in rows.items()}
    assert gains["default", "all"] == 3 and gains["default", "NOR"] == 2 and gains["other", "DCM"] == 4.5
    whole = rows["other", "all"]
    assert 0.5 <= float(whole["psnr_gain_low"]) < 2.5 < float(whole["psnr_gain_high"]) <= 4.5
    ends = [float(whole[f"less_psnr_gain{end}"]) for end in ("", "_low", "_high")]
    assert ends == pytest.approx([-0.5, -0.5, -0.5]), "patient by patient there is no doubt"
    assert float(whole["gap_closed"]) == 0.5 and float(whole["less_gap_closed"]) == 0
    assert float(whole["ejection_fraction_abs_error"]) == 2.5 and float(whole["seconds"]) == 2
    assert "all, 3 patients" in caplog.text and "| other | +2.50 (" in caplog.text


def test_methods_evaluated_on_other_patients_are_not_compared(tmp_path):
    folders = {"default": evaluation(tmp_path / "a", NOR1=1), "other": evaluation(tmp_path / "b", NOR2=1)}
    with pytest.raises(ValueError, match=f"{tmp_path / 'b'}: other patients than in {tmp_path / 'a'}"):
        compare_cines(folders, tmp_path)
    assert not (tmp_path / "comparison.csv").exists()


def test_a_figure_that_no_patient_has_is_not_known(tmp_path):
    folders = {"default": evaluation(tmp_path / "a", NOR1=float("nan"), NOR2=float("nan"))}
    (row,) = [row for row in compare_cines(folders, tmp_path) if row["group"] == "all"]
    assert row["psnr_gain"] != row["psnr_gain"] and row["dice_after"] == 0.75
