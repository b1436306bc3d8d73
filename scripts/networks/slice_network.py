"""What the anomaly networks have in common: a method on slices, and an output that MONAI's tools take."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.networks.layers import GaussianFilter
from torch import Tensor, nn
from torch.nn.functional import max_pool2d

from scripts.precision import Amp, check_amp
from scripts.transforms import has_foreground

__all__ = ["SliceNetwork", "abnormality_of", "brightness_map", "weighted_difference"]

HEAD_MEDIAN = 0.4  # to which scripts.transforms.ScaleIntensityByForeground brings it
FOREGROUND = 0.1  # what is brighter is head


class SliceNetwork(nn.Module):
    """A network that makes an anomaly map and a healthy version of each slice that shows enough, and says how ill it looks.

    A subclass has ``analyse(image)``; one with another output has ``output(image)`` and ``out_channels`` in its place.

    Args:
        in_channels: number of channels, C.
        spatial_size: height and width of a slice.
        min_foreground: slices with a smaller share of foreground are skipped and return zero.
        foreground_level: grey level in [0, 1] above which a pixel counts as foreground.
        seed: seed of all noise; every slice gets the same noise, so that batches do not matter.
        amp: bfloat16 in the networks, see :func:`scripts.precision.autocast`.
    """

    def __init__(
        self,
        in_channels: int,
        spatial_size: Sequence[int],
        min_foreground: float,
        foreground_level: float,
        seed: int = 0,
        amp: Amp = False,
    ) -> None:
        super().__init__()
        self.in_channels, self.spatial_size = in_channels, tuple(spatial_size)
        self.min_foreground, self.foreground_level = min_foreground, foreground_level
        self.seed, self.amp = seed, check_amp(amp)

    def analyse(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Whole method on slices with foreground.

        Args:
            image: (B, C, H, W), grey levels in [0, 1], float32.

        Returns:
            anomaly map (B, 1, H, W), 0 or more; healthy version (B, C, H, W); probability of disease, or another
            score of the slice, (B,), in [0, 1].
        """
        raise NotImplementedError

    @property
    def out_channels(self) -> int:
        """Number of channels that :meth:`output` returns."""
        return self.in_channels + 2

    def output(self, image: Tensor) -> Tensor:
        """What :meth:`analyse` returns of slices (B, C, H, W), one after the other: (B, ``out_channels``, H, W)."""
        anomaly, healthy, probability = self.analyse(image)
        return torch.cat([anomaly, healthy, probability.view(-1, 1, 1, 1).expand_as(anomaly)], dim=1)

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        """Whole method on a batch of slices.

        Args:
            image: slices (B, C, H, W), grey levels in [0, 1]; or volumes (B, C, H, W, D), whose slices are taken as one
                batch (``SliceInferer`` bounds the memory).

        Returns:
            (B, C + 2, H, W[, D]): what :meth:`analyse` returns, one after the other, the score constant over a slice; or
            what else :meth:`output` returns. Slices with too little foreground are zero throughout.

        Raises:
            ValueError: if the number of channels or the size of the slices is not the network's.
        """
        if image.ndim == 5:
            slices = self(image.movedim(-1, 1).flatten(0, 1))
            return slices.unflatten(0, (len(image), -1)).movedim(1, -1)
        expected = (self.in_channels, *self.spatial_size)
        if image.shape[1:] != expected:
            raise ValueError(f"expected slices of shape {expected}, got {tuple(image.shape[1:])}")
        output = image.new_zeros(len(image), self.out_channels, *self.spatial_size)
        seen = has_foreground(image, self.foreground_level, self.min_foreground)
        if seen.any():
            # contiguous: the same rounding however the scan is stored
            output[seen] = self.output(image[seen].float().contiguous()).to(output.dtype)
        return output

    def _generator(self, stream: int = 0) -> torch.Generator:
        """Source of one of a method's two streams of random numbers, on the CPU (:func:`scripts.samplers.for_batch`)."""
        return torch.Generator().manual_seed(2 * self.seed + stream)

    def _draw(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """The same noise for each of the batch x."""
        return torch.randn(x.shape[1:], generator=generator, dtype=x.dtype).to(x.device).expand_as(x)


def weighted_difference(
    image: Tensor, healthy: Tensor | float, weights: Sequence[float], darker_weight: float, smoothing: float
) -> Tensor:
    """Anomaly map of slices and their healthy versions: the weighted sum of the absolute differences.

    Args:
        image: slices (B, C, H, W).
        healthy: their healthy versions, (B, C, H, W), or a grey level.
        weights: weight of each channel. One of negative weight counts against the others, unless it repeats one of positive
            weight, which stands in for it and would be cancelled.
        darker_weight: weight of what is darker than its healthy version, against what is brighter.
        smoothing: standard deviation in pixels of a Gaussian filter over the map; 0 for none.

    Returns:
        (B, 1, H, W), 0 or more.
    """
    difference = image - healthy
    difference = difference.clamp(min=0) + darker_weight * (-difference).clamp(min=0)
    for c in (c for c, weight in enumerate(weights) if weight < 0):
        difference[_stood_in_for(image, weights, c), c] = 0
    anomaly = torch.einsum("bchw,c->bhw", difference, difference.new_tensor(weights)).unsqueeze(1)
    anomaly = GaussianFilter(spatial_dims=2, sigma=smoothing).to(image.device)(anomaly) if smoothing > 0 else anomaly
    return anomaly.clamp(min=0)


def brightness_map(image: Tensor, weights: Sequence[float], smoothing: float) -> Tensor:
    """Map (B, 1, H, W), 0 or more, of what is brighter than the head's median in slices, without any network.

    It sees what a healed slice does not show, such as the middle of a large lesion. For lesions that are bright in one
    sequence and not in another. Fat is bright in all of them: where the other one is missing, half of what the other side
    of the head shows counts in its place.

    Args:
        image: slices (B, C, H, W), H running from one side of the head to the other.
        weights: see :func:`weighted_difference`.
        smoothing: see there.
    """
    bright = weighted_difference(image, HEAD_MEDIAN, weights, 0.0, smoothing)
    missing = image.new_zeros(len(image), dtype=torch.bool)
    for c in (c for c, weight in enumerate(weights) if weight < 0):
        missing |= _stood_in_for(image, weights, c)
    bright[missing] = (bright[missing] - _other_side(bright[missing], image[missing]) / 2).clamp(min=0)
    return bright


def _stood_in_for(image: Tensor, weights: Sequence[float], channel: int) -> Tensor:
    """Of which slices (B, C, H, W) a channel repeats one of positive weight, bool (B,)."""
    wanted = [c for c, weight in enumerate(weights) if weight > 0]
    return (image[:, wanted] == image[:, channel, None]).flatten(2).all(dim=2).any(dim=1)


def _other_side(bright: Tensor, image: Tensor, reach: int = 3) -> Tensor:
    """The most that a map (B, 1, H, W) shows within ``reach`` pixels of a pixel's mirror image about the head's middle."""
    place = torch.arange(image.shape[2], device=image.device)
    weight = (image > FOREGROUND).any(dim=1).sum(dim=2)
    middle = (weight * place).sum(dim=1) / weight.sum(dim=1).clamp(min=1)
    mirror = (2 * middle.unsqueeze(1) - place).round().long().clamp(0, image.shape[2] - 1)
    return max_pool2d(bright.gather(2, mirror[:, None, :, None].expand_as(bright)), 2 * reach + 1, 1, reach)


def abnormality_of(anomaly: Tensor, half_score: float) -> Tensor:
    """Abnormality (B,) in (0, 1) of slices, from the largest value of their anomaly maps (B, 1, H, W); 0.5 at half_score."""
    score = anomaly.flatten(1).amax(dim=1)
    return score.clamp(min=1e-6) / (score + half_score)  # 0 is for slices that are skipped
