"""Inferers that MONAI has not."""

from __future__ import annotations

from monai.inferers import SliceInferer
from torch import Tensor, nn

__all__ = ["ConfiguredSliceInferer"]


class ConfiguredSliceInferer(SliceInferer):
    """MONAI's SliceInferer, which runs the network that the configuration describes at this moment.

    MONAI Label makes the network once, when it starts, and the inferer for every request. Without this class the settings
    of a request (``displayable_configs``) would not reach the network.

    Args:
        network_def: the network with the settings wanted; it takes over the weights of the one it is called with.
        kwargs: arguments of :class:`monai.inferers.SliceInferer`.
    """

    def __init__(self, network_def: nn.Module, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.network_def = network_def

    def __call__(self, inputs: Tensor, network: nn.Module, *args: object, **kwargs: object) -> Tensor:
        """Arguments and result as in MONAI."""
        if network is not self.network_def:
            self.network_def.to(inputs.device).train(network.training)
            self.network_def.load_state_dict(network.state_dict())
        return super().__call__(inputs, self.network_def, *args, **kwargs)
