from __future__ import annotations

import pytest
import torch
from conftest import ROOT
from stand_in import StandInNet

from scripts.bundle import with_weights
from scripts.networks.orientation import OrientationNet


def test_weights_must_be_the_networks(tmp_path):
    source = StandInNet()
    source.gain.data.fill_(0.5)
    torch.save(source.state_dict(), tmp_path / "model.pt")
    network = with_weights(StandInNet(), tmp_path / "model.pt")
    assert network.gain == 0.5 and not network.training
    with pytest.raises(RuntimeError, match="Missing key"):
        with_weights(OrientationNet(), tmp_path / "model.pt")


def test_the_configurations_are_ascii_since_monai_reads_them_as_the_locale_has_it():
    for path in ROOT.glob("bundles/*/configs/*.json"):
        assert path.read_bytes().isascii(), f"{path}: write other characters as \\u00fc"
