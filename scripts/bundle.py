"""What a bundle's configurations describe, for use outside of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.config import PathLike
from torch import nn

__all__ = ["build_network", "configuration", "with_weights"]


def configuration(bundle: Path, *names: str) -> ConfigParser:
    """The bundle's configurations of these names, the later ones overriding the earlier ones."""
    parser = ConfigParser()
    parser.read_config([bundle / "configs" / f"{name}.json" for name in names])
    parser["bundle_root"] = str(bundle)
    return parser


def build_network(bundle: Path, **settings: Any) -> nn.Module:
    """The bundle's network with its weights, in evaluation mode; ``settings`` replace arguments of ``network_def``."""
    parser = configuration(bundle, "inference")
    for name, value in settings.items():
        parser[f"network_def#{name}"] = value
    network = parser.get_parsed_content("network_def").to(parser.get_parsed_content("device"))
    return with_weights(network, bundle / "models" / "model.pt")


def with_weights(network: nn.Module, path: PathLike) -> nn.Module:
    """The network in evaluation mode with the weights of ``path``, every name of which must be the network's."""
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network.eval()
