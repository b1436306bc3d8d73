"""Inferers that MONAI has not."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
from monai.data import MetaTensor
from monai.inferers import Inferer, SimpleInferer, SliceInferer
from torch import Tensor, nn
from tqdm import tqdm

from scripts.noise import stream_of

__all__ = ["ConfiguredSliceInferer", "DisplacementInferer", "RedrawingInferer", "Redrawn", "redraw", "run_in_batches"]


def _device_of(network: nn.Module) -> torch.device:
    return next(chain(network.parameters(), network.buffers())).device  # a control has no parameters


@torch.no_grad()
def run_in_batches(network: nn.Module, images: Tensor, batch_size: int) -> tuple[Tensor, float]:
    """A network in evaluation mode over more images than one batch holds.

    Args:
        network: takes (B, ...) to (B, ...).
        images: its inputs (N, ...), which go to its device batch by batch.
        batch_size: images in a call.

    Returns:
        the outputs (N, ...), float32 on the CPU, and the seconds an image.
    """
    network.eval()  # in training mode a codebook would go on learning
    device = _device_of(network)
    begun = time.perf_counter()
    batches = tqdm(images.split(batch_size), desc="images", leave=False, disable=None)
    output = torch.cat([network(batch.to(device)).float().cpu() for batch in batches])
    return output, (time.perf_counter() - begun) / len(images)


def _configured(network_def: nn.Module, network: nn.Module) -> nn.Module:
    """The network with the settings that the configuration has at this moment, and the weights of another.

    MONAI Label makes the network once, when it starts, and the inferer for every request. Without this the settings of a
    request (``displayable_configs``) would not reach the network.
    """
    if network is not network_def:
        network_def.to(_device_of(network)).train(network.training)
        network_def.load_state_dict(network.state_dict())
    return network_def


class ConfiguredSliceInferer(SliceInferer):
    """MONAI's SliceInferer, which runs the network that the configuration describes at this moment.

    Args:
        network_def: the network with the settings wanted; it takes over the weights of the one it is called with.
        kwargs: arguments of :class:`monai.inferers.SliceInferer`.
    """

    def __init__(self, network_def: nn.Module, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.network_def = network_def

    def __call__(self, inputs: Tensor, network: nn.Module, *args: object, **kwargs: object) -> Tensor:
        """Arguments and result as in MONAI."""
        return super().__call__(inputs, _configured(self.network_def, network), *args, **kwargs)


class DisplacementInferer(Inferer):
    """Displacements of all frames of a motion, by the network that the configuration describes at this moment.

    The network makes no frames: the displacement warps the scan itself, on its own grid, later on.

    Args:
        network_def: the network with the settings wanted, whose ``displace(image, gammas)`` gives the fields at fractions
            of the way, (B, F, 3, H, W, D); it takes over the weights of the one it is called with.
        num_frames: number of frames, evenly spaced from the source to the target; 0 for as many as the cine has
            (``meta["num_frames"]`` of the input), or ``default_frames`` where there are no frames between.
        gammas: fractions of the way in place of evenly spaced ones.
        default_frames: see ``num_frames``.
        inverse: find the field of the way back as well, from the target to the source.

    Raises:
        ValueError: for a single frame.
    """

    def __init__(
        self,
        network_def: nn.Module,
        num_frames: int = 0,
        gammas: Sequence[float] | None = None,
        default_frames: int = 10,
        inverse: bool = False,
    ) -> None:
        super().__init__()
        if num_frames != 0 and num_frames < 2:
            raise ValueError(f"num_frames must be 2 at least, source and target, or 0; got {num_frames}.")
        self.network_def, self.num_frames, self.default_frames = network_def, num_frames, default_frames
        self.gammas = None if gammas is None else [float(gamma) for gamma in gammas]
        self.inverse = inverse

    def __call__(self, inputs: Tensor, network: nn.Module, *args: object, **kwargs: object) -> Tensor:
        """
        Args:
            inputs: source and target (1, 2, H, W, D), in [-1, 1].
            network: network whose weights are taken.

        Returns:
            (1, 3 F, H, W, D), in voxels, the components x, y, z of one frame after the other; with ``inverse`` three more
            channels, those of the way back.
        """
        network = _configured(self.network_def, network)
        fields = [network.displace(inputs, self.gammas or self._evenly(inputs))]
        if self.inverse:
            fields.append(network.displace(inputs.flip(1), [1.0]))
        return torch.cat(fields, dim=1).flatten(1, 2).float()

    def _evenly(self, inputs: Tensor) -> list[float]:
        in_cine = int(getattr(inputs, "meta", {}).get("num_frames", 0))
        count = self.num_frames or (in_cine if in_cine > 2 else self.default_frames)
        return [i / (count - 1) for i in range(count)]


class Redrawn(NamedTuple):
    """Images, and what a filter against copies found, (N,) each."""

    images: Tensor
    """(N, 1, H, W) in [0, 1]."""
    similarity: Tensor
    """of each to the most similar training image."""
    redraws: Tensor
    """how often it was drawn again."""
    copy: Tensor
    """whether it still counts as a copy."""


@torch.no_grad()
def redraw(
    network: nn.Module, noise: Tensor, images: Tensor, copies: nn.Module, rate: float, rounds: int, **given: Tensor
) -> Redrawn:
    """Draw images again that are too much like a training image.

    The noise of round n depends on n and on the noise that the image began with, so that an image still comes from its seed
    alone. Where no round helps, the least similar image stays.

    Args:
        network: takes noise (B, 1, H, W) to images in [0, 1].
        noise: what the images were drawn from, (N, 1, H, W).
        images: (N, 1, H, W).
        copies: a :class:`scripts.networks.copy_filter.CopyFilter`.
        rate: share of held-out real images that would count as copies.
        rounds: how often an image is drawn again at most.
        given: what else the network was given, (N, ...) each, such as classes.
    """
    network.eval()
    device, limit = images.device, copies.limit(rate)
    similarity = copies.nearest(images)[0].to(device)
    redraws, images = torch.zeros(len(images), dtype=torch.int64), images.clone()
    for i in (similarity > limit).nonzero().flatten().tolist():
        while similarity[i] > limit and redraws[i] < rounds:
            redraws[i] += 1
            again = torch.randn(noise[i].shape, generator=stream_of(noise[i], f"redraw {redraws[i]}"))
            # by itself, whatever is drawn beside it
            image = network(again[None].to(noise.device), **{name: value[i : i + 1] for name, value in given.items()})
            value = copies.nearest(image)[0][0].to(device)
            if value < similarity[i]:
                images[i], similarity[i] = image[0].to(device), value
    return Redrawn(images, similarity.cpu(), redraws, (similarity > limit).cpu())


class RedrawingInferer(SimpleInferer):
    """MONAI's SimpleInferer, with a filter against copies of training images, see :func:`redraw`.

    Args:
        copies: a :class:`scripts.networks.copy_filter.CopyFilter`; None for no filter.
        rate: see :func:`redraw`.
        rounds: see :func:`redraw`.

    Raises:
        ValueError: for a rate that the filter can't tell, or fewer than 0 rounds.
    """

    def __init__(self, copies: nn.Module | None = None, rate: float = 0.01, rounds: int = 10) -> None:
        super().__init__()
        if copies is not None:
            copies.limit(rate)
            if rounds < 0:
                raise ValueError(f"--copy_rounds must be 0 or more, got {rounds}")
        self.copies, self.rate, self.rounds = copies, rate, rounds

    def __call__(self, inputs: Tensor, network: nn.Module, **kwargs: Tensor) -> Tensor:
        """
        Args:
            inputs: noise (B, 1, H, W).
            network: takes noise to images in [0, 1].
            kwargs: what else it takes, such as classes, (B, ...) each.

        Returns:
            images (B, 1, H, W); with a filter their ``meta`` has ``copy_similarity``, ``redraws`` and ``copy``, (B,).
        """
        images = super().__call__(inputs, network, **kwargs)
        if self.copies is None:
            return images
        images, similarity, redraws, copy = redraw(network, inputs, images, self.copies, self.rate, self.rounds, **kwargs)
        found = MetaTensor(images, meta={"copy_similarity": similarity, "redraws": redraws, "copy": copy})
        found.is_batch = True
        return found
