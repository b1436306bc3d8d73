"""Anomalies as what a network undoes in one step that has learned to undo made ones (as DISYRE and REFLECT do)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.networks.nets.diffusion_model_unet import DiffusionModelUNet
from torch import Tensor, nn

from scripts.corruptions import foreign_content, inside_of_head, random_blobs
from scripts.messages import check_known
from scripts.networks.slice_network import SliceNetwork, abnormality_of, brightness_map, weighted_difference
from scripts.noise import coarse_noise
from scripts.precision import Amp, autocast
from scripts.samplers import for_batch, mean_of_processes

__all__ = ["OneStepNet"]

CORRUPTIONS = ("made", "noise")
NUM_LEVELS = 1000  # by which MONAI's network counts the time


class OneStepNet(SliceNetwork):
    """Take a slice for a corrupted one, and follow the flow from corrupted to clean, in one step or few.

    Between a clean slice x_0 and a corrupted one x_1 lies x_t = x_0 + t·(x_1 - x_0), so that the flow has the velocity
    v = x_1 - x_0 = (x_t - x_0) / t (rectified flow, Liu et al. 2023, arXiv 2209.03003). The network estimates v. It learns
    from lesion-free slices alone, and how these are corrupted is a setting of the training:

    - ``made``: x_1 = (1 - m)·x_0 + m·x_fp, foreign content behind a soft mask, see :mod:`scripts.corruptions` (DISYRE,
      arXiv 2311.15453; REFLECT, arXiv 2508.02889). The network also says where it sees such content.
    - ``noise``: x_1 = x_0 + coarse noise on what is not air, see :func:`scripts.noise.coarse_noise`: a denoising
      autoencoder (Kascenas et al. 2022).

    The slice is rearranged exactly, with ``fold`` x ``fold`` pixels as channels.

    Args:
        in_channels: number of sequences, C.
        spatial_size: height and width of a slice; multiples of ``fold`` x 2^(number of levels - 1).
        fold: edge of the pixel block that is folded into channels.
        channels: channels of the U-Net's levels, multiples of 16; the lowest has attention and is a multiple of 32.
        corruption: ``made`` or ``noise``.
        noise_std: standard deviation of the coarse noise, in grey levels of [0, 1]; 0.14 as in the paper.
        noise_factor: pixels along the edge of one of its coarse pixels; 8 as in the paper.
        outside_weight: weight of the error outside of made anomalies against that inside.
        num_steps: steps of the flow from the slice (t = 1) to its healthy version (t = 0).
        map_weights: weight of each sequence in the anomaly map; None for 1 each.
        darker_weight: weight of what is darker than its healthy version, against what is brighter.
        smoothing: standard deviation in pixels of the Gaussian filter over the anomaly map; 0 for none.
        brightness_weights: weight of each sequence in a second map, which is added to the first, see
            :func:`scripts.networks.slice_network.brightness_map`; None for none.
        gate: multiply the first map by the probability that the place was made, as the network sees it; needs ``made``.
        half_score: a slice's largest value of the map that makes its abnormality 0.5, to be taken from lesion-free slices.
        min_foreground: slices with a smaller share of foreground are skipped and return zero.
        foreground_level: grey level in [0, 1] above which a pixel counts as foreground.
        seed: not used by the inference, which draws nothing.
        amp: bfloat16 in the network, see :func:`scripts.precision.autocast`.

    Raises:
        ValueError: for an unknown corruption, a gate without ``made``, no step, weights that are not one for each sequence,
            or a size that can't be halved often enough.
    """

    def __init__(
        self,
        in_channels: int = 3,
        spatial_size: Sequence[int] = (128, 128),
        fold: int = 2,
        channels: Sequence[int] = (32, 64, 96, 128),
        corruption: str = "made",
        noise_std: float = 0.14,
        noise_factor: int = 8,
        outside_weight: float = 4.0,
        num_steps: int = 1,
        map_weights: Sequence[float] | None = None,
        darker_weight: float = 1.0,
        smoothing: float = 0.0,
        brightness_weights: Sequence[float] | None = None,
        gate: bool = False,
        half_score: float = 0.1,
        min_foreground: float = 0.05,
        foreground_level: float = 0.1,
        seed: int = 0,
        amp: Amp = False,
    ) -> None:
        super().__init__(in_channels, spatial_size, min_foreground, foreground_level, seed, amp)
        check_known("corruption", corruption, CORRUPTIONS)
        if gate and corruption != "made":
            raise ValueError(f"a network that learned from '{corruption}' does not say where: set gate to false")
        if num_steps < 1:
            raise ValueError(f"num_steps must be 1 or more, got {num_steps}")
        multiple = fold * 2 ** (len(channels) - 1)
        if any(size % multiple for size in spatial_size):
            raise ValueError(f"spatial_size must be multiples of {multiple}, got {tuple(spatial_size)}")
        self.map_weights = tuple(map_weights or [1.0] * in_channels)
        self.brightness_weights = tuple(brightness_weights or ())
        for name, weights in (("map_weights", self.map_weights), ("brightness_weights", self.brightness_weights)):
            if weights and len(weights) != in_channels:
                raise ValueError(f"{name} must be {in_channels} numbers, one for each sequence, got {weights}")
        self.corruption, self.noise_std, self.noise_factor = corruption, noise_std, noise_factor
        self.outside_weight, self.num_steps = outside_weight, num_steps
        self.darker_weight, self.smoothing, self.gate, self.half_score = darker_weight, smoothing, gate, half_score
        self.fold, self.unfold = nn.PixelUnshuffle(fold), nn.PixelShuffle(fold)
        self.unet = DiffusionModelUNet(
            spatial_dims=2,
            in_channels=in_channels * fold**2,
            out_channels=(in_channels + 1) * fold**2,  # the velocity, and where
            channels=channels,
            attention_levels=[level == len(channels) - 1 for level in range(len(channels))],
            num_res_blocks=1,
            num_head_channels=32,
            norm_num_groups=16,
        )

    @property
    def published(self) -> dict[str, object]:
        """Settings nearest to the published procedures: many steps (DISYRE takes 100), and the plain difference as map."""
        return {"num_steps": 100, "map_weights": None, "darker_weight": 1.0, "smoothing": 0.0, "gate": False}

    def estimate(self, x: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """What the network makes of slices (B, C, H, W) at times t in (0, 1], one or (B,).

        Returns:
            velocity (B, C, H, W), and logits (B, 1, H, W) of how much of a place is foreign.
        """
        time = NUM_LEVELS * torch.as_tensor(t, dtype=x.dtype, device=x.device).expand(len(x))
        with autocast(x, self.amp):
            out = self.unet(self.fold(2 * x - 1), time)
        return self.unfold(out.float()).split([self.in_channels, 1], dim=1)

    def heal(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Healthy version (B, C, H, W) of slices in [0, 1], and how likely each place is foreign, (B, 1, H, W) in [0, 1]."""
        x, foreign = image, None
        for step in range(self.num_steps, 0, -1):
            velocity, where = self.estimate(x, step / self.num_steps)
            x = x - velocity / self.num_steps
            foreign = where.sigmoid() if foreign is None else foreign
        return x, foreign

    def analyse(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Anomaly map (B, 1, H, W), healthy version (B, C, H, W) and abnormality (B,) in [0, 1] of slices (B, C, H, W)."""
        healthy, foreign = self.heal(image)
        difference = image.lerp(healthy, foreign) if self.gate else healthy
        anomaly = weighted_difference(image, difference, self.map_weights, self.darker_weight, self.smoothing)
        abnormality = abnormality_of(anomaly, self.half_score)
        if self.brightness_weights:
            anomaly = anomaly + brightness_map(image, self.brightness_weights, self.smoothing)
        return anomaly, healthy, abnormality

    def corrupt(self, image: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Corrupted slices x_1, (B, C, H, W), and where they are, (B, 1, H, W) in [0, 1]; arguments as :meth:`losses`."""
        if self.corruption == "noise":
            head = (image > self.foreground_level).any(dim=1, keepdim=True).to(image.dtype)
            noise = coarse_noise(image.shape, self.noise_factor, generator, image.device)
            return image + self.noise_std * head * noise, head
        mask = random_blobs(inside_of_head(image, self.foreground_level), generator)
        return image.lerp(foreign_content(image, generator), mask.expand_as(image)), mask

    def losses(self, image: Tensor, class_label: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Errors of the healthy version, as one step from x_t makes it; half of the slices are at t = 1.

        Args:
            image: lesion-free slices (B, C, H, W) in [0, 1].
            class_label: not used.
            generator: source of the corruptions and of the times.

        Returns:
            ``inside``: mean absolute error where the slices are corrupted; ``outside``: that elsewhere, over all places,
            times its weight; with ``made``, ``where``: cross-entropy of the mask.
        """
        corrupted, mask = self.corrupt(image, generator)
        t = (2 * for_batch(torch.rand, (len(image),), generator, image.device)).clamp(1e-3, 1)
        velocity, where = self.estimate(image.lerp(corrupted, t.view(-1, 1, 1, 1)), t)
        error = (t.view(-1, 1, 1, 1) * (corrupted - image - velocity)).abs().mean(dim=1, keepdim=True)
        size = mean_of_processes(mask.sum()).clamp(min=1)  # several processes share the slices of one batch
        losses = {
            "inside": (error * mask).sum() / size,
            "outside": self.outside_weight * (error * (1 - mask)).mean(),
        }
        if self.corruption == "made":
            losses["where"] = nn.functional.binary_cross_entropy_with_logits(where, mask * t.view(-1, 1, 1, 1))
        return losses
