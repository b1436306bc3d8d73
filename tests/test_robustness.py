"""Scores of slices are compared with those of the same slices as changed pictures."""

import csv

import pytest
import torch
from torch import nn

from scripts.robustness import changes_table

CHANGES = {"as it is": lambda item: item, "inverted": lambda item: {"image": 1 - item["image"]}}


class Same(nn.Module):
    """A network that gives back what it sees."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, image):
        return image


def to_frame(item):
    """Every fourth pixel, which the picture was enlarged by."""
    image = item["image"]
    assert image.shape == (1, 32, 32, 1) and image.meta["units"] == "grey"
    image = image[:, 1::4, 1::4]
    image.meta["unlike_training"] = "2.00" if image.mean() > 0.5 else "0.50"
    return {"image": image}


def test_each_change_has_a_row_with_what_is_flagged_and_how_well_painted_slices_are_told(tmp_path, capsys):
    healthy, painted = torch.full((3, 1, 8, 8), 0.2), torch.full((3, 1, 8, 8), 0.2)
    healthy[0], painted[:, :, 2:4, 2:4] = 0.3, 0.9
    path, scores = tmp_path / "t.csv", {"seen": "what is seen"}
    rows = changes_table(Same(), healthy, painted, CHANGES, to_frame, lambda item: {"seen": item["pred"]}, scores, path)
    plain, inverted = rows
    assert plain == {"method": "as it is", "flagged_seen": 0.0, "auroc_seen": 1.0, "unlike_training": 0.0}
    assert inverted["flagged_seen"] == 1.0 and inverted["unlike_training"] == 1.0
    assert inverted["auroc_seen"] == pytest.approx(2 / 3, abs=0.01), "of equal slices, half"
    with open(path, encoding="utf-8") as table:
        assert [row["method"] for row in csv.DictReader(table)] == list(CHANGES)
    assert "| inverted | 100% |" in capsys.readouterr().out
