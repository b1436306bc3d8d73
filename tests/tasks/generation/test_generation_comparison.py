from __future__ import annotations

import os

import pytest
import torch
from conftest import rows_of
from made_inputs import images_of
from stand_in import StandInNet

from scripts.corruptions import ALTERATIONS
from scripts.networks.copy_filter import CopyFilter
from scripts.tasks.generation.comparison import copy_tables


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """Folder and rows of tables of an untrained filter, with made images."""
    folder = tmp_path_factory.mktemp("copies")
    training, validation, test = images_of(40), images_of(20, seed=200), images_of(20, seed=300)
    torch.manual_seed(0)
    copies = CopyFilter(40, 20, size=8, channels=(8, 8, 8, 8))
    copies.calibrate([[{"image": training}], [{"image": validation}]])
    settings = {"num_planted": 12, "num_samples": 6, "num_members": 10, "num_times": 4, "batch_size": 3}
    return folder, *copy_tables(StandInNet(), copies, training, validation, test, folder, 0.1, **settings)


def test_every_way_to_find_copies_has_a_row_with_its_false_positives_and_every_kind_of_copy(tables):
    folder, found, _ = tables
    written = rows_of(folder / "copies.csv")
    assert [row["method"] for row in written] == ["copy filter", "pixels", "pixels, nearest of ten versions"]
    for row, line in zip(found, written, strict=True):
        for name in ("false positives", *ALTERATIONS, "all"):
            assert 0 <= row[f"{name}_low"] <= row[name] <= row[f"{name}_high"] <= 1
            assert float(line[name]) == row[name]


def test_mirrored_copies_are_found_by_the_ten_versions_and_not_by_plain_pixels(tables):
    rows = {row["method"]: row for row in tables[1]}
    assert rows["pixels"]["mirror"] < 0.5 and rows["pixels, nearest of ten versions"]["mirror"] == 1


def test_every_attack_on_the_membership_has_its_interval(tables):
    folder, _, told = tables
    assert [row["method"] for row in rows_of(folder / "membership.csv")] == [
        "likelihood",
        "distance to generated images, pixels",
        "distance to generated images, copy filter",
    ]
    assert all(0 <= row["auroc_low"] <= row["auroc"] <= row["auroc_high"] <= 1 for row in told)


def test_the_tables_are_written_and_what_is_most_alike_is_drawn(tables):
    folder, found, _ = tables
    names = {"copies.csv", "copies.md", "membership.csv", "nearest_real.png", "nearest_generated.png"}
    assert names <= set(os.listdir(folder))
    text = (folder / "copies.md").read_text(encoding="utf-8")
    assert f"| copy filter | {found[0]['false positives']:.1%} (" in text and "| likelihood | 0." in text


def test_a_file_of_somebody_else_stays_and_nothing_is_measured(tmp_path):
    (tmp_path / "copies.md").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match=r"copies.md: is not replaced"):
        copy_tables(StandInNet(), CopyFilter(2, 2), *[images_of(2)] * 3, tmp_path)
