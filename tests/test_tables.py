from __future__ import annotations

import pytest
from conftest import rows_of

from scripts.tables import markdown_table, mean_and_std, write_rows

ROWS = [
    {"method": "real", "seed": 0, "mmd": 0.5},
    {"method": "net", "seed": 0, "mmd": 1.0, "bits": 3.0},
    {"method": "net", "seed": 7, "mmd": 2.0, "bits": 5.0},
]


def test_rows_with_different_columns_share_a_table_with_empty_fields(tmp_path):
    write_rows(tmp_path / "deep" / "a.csv", ROWS)
    rows = rows_of(tmp_path / "deep" / "a.csv")
    assert list(rows[0]) == ["method", "seed", "mmd", "bits"]
    assert [row["bits"] for row in rows] == ["", "3.0", "5.0"]


def test_the_mean_is_over_the_seeds_of_a_method_and_one_seed_has_no_spread():
    summary = mean_and_std(ROWS)
    assert summary == {
        "real": {"mmd": {"mean": 0.5}},
        "net": {"mmd": pytest.approx({"mean": 1.5, "std": 0.5})} | {"bits": pytest.approx({"mean": 4.0, "std": 1.0})},
    }
    assert list(summary["net"]) == ["mmd", "bits"]


def test_a_markdown_table_shows_means_spreads_and_dashes_in_their_formats():
    table = markdown_table(mean_and_std(ROWS), {"bits": "bits a pixel", "mmd": ("MMD", ".1f")})
    assert table.splitlines() == [
        "| method | bits a pixel | MMD |",
        "|---|---|---|",
        "| real | – | 0.5 |",
        "| net | 4.000 ± 1.000 | 1.5 ± 0.5 |",
    ]
