"""What the anomaly networks that noise a slice and take the noise out have in common: a U-Net, its levels, the map."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.networks.nets.diffusion_model_unet import DiffusionModelUNet
from torch import Tensor, nn

from scripts.messages import check_known
from scripts.networks.slice_network import SliceNetwork, weighted_difference
from scripts.precision import Amp, arithmetic, autocast
from scripts.samplers import alphas_cumprod_table, level_grid, noise_from_v

__all__ = ["DenoisingSliceNetwork"]


class DenoisingSliceNetwork(SliceNetwork):
    """A U-Net that estimates the noise in noised slices, and the anomaly map of what comes out without it.

    It sees the slice with ``fold`` x ``fold`` pixels rearranged into channels, which is exact and makes it four times
    cheaper (fold 2). A subclass has ``analyse`` and ``losses``.

    Args:
        in_channels: number of sequences, C.
        spatial_size: height and width of a slice; multiples of ``fold`` x 2^(number of levels - 1).
        fold: edge of the pixel block that is folded into channels.
        channels: channels of the U-Net's levels, multiples of 16; the lowest has attention and is a multiple of 32.
        schedule: noise schedule, see :func:`scripts.samplers.alphas_cumprod_table`.
        prediction_type: what the U-Net is trained to return, ``epsilon`` or ``v_prediction``.
        num_levels: number of noising steps T.
        level_power: training levels are drawn as T·u^level_power, u uniform; above 1 the lower levels, which are the ones
            that inference uses, come more often.
        noise_level: level up to which a slice is noised.
        num_steps: number of steps of a way up or down.
        map_weights: weight of each sequence in the anomaly map, negative to count against the others; None for 1 each.
        darker_weight: weight of what is darker than its healthy version, against what is brighter.
        smoothing: standard deviation in pixels of the Gaussian filter over the anomaly map; 0 for none.
        num_classes: number of classes, if the U-Net is told one with each slice; None if not.
        outputs: images that the U-Net returns one after the other, the first being the noise or v.
        min_foreground: slices with a smaller share of foreground are skipped and return zero.
        foreground_level: grey level in [0, 1] above which a pixel counts as foreground.
        seed: seed of all noise; every slice gets the same noise, so that batches do not matter.
        amp: bfloat16 in the networks, see :func:`scripts.precision.autocast`.

    Raises:
        ValueError: for an unknown prediction type, a level beyond ``num_levels``, weights that are not one for each
            sequence, or a size that can't be halved often enough.
    """

    def __init__(
        self,
        in_channels: int = 3,
        spatial_size: Sequence[int] = (128, 128),
        fold: int = 2,
        channels: Sequence[int] = (64, 96, 128),
        schedule: str = "linear",
        prediction_type: str = "epsilon",
        num_levels: int = 1000,
        level_power: float = 1.5,
        noise_level: int = 500,
        num_steps: int = 10,
        map_weights: Sequence[float] | None = None,
        darker_weight: float = 1.0,
        smoothing: float = 0.0,
        num_classes: int | None = None,
        outputs: int = 1,
        min_foreground: float = 0.05,
        foreground_level: float = 0.1,
        seed: int = 0,
        amp: Amp = False,
    ) -> None:
        super().__init__(in_channels, spatial_size, min_foreground, foreground_level, seed, amp)
        check_known("prediction_type", prediction_type, ("epsilon", "v_prediction"))
        if not 1 <= noise_level <= num_levels:
            raise ValueError(f"noise_level must lie in 1 ... {num_levels}, got {noise_level}")
        self._check_size(fold * 2 ** (len(channels) - 1))
        self.prediction_type, self.num_levels, self.level_power = prediction_type, num_levels, level_power
        self.noise_level, self.num_steps = noise_level, num_steps
        self.map_weights = tuple(map_weights or [1.0] * in_channels)
        self.darker_weight, self.smoothing = darker_weight, smoothing
        self._check_weights("map_weights", self.map_weights)
        # fused attention and channels_last are a tenth faster on a CPU, but their gradients in bfloat16 a third slower
        self.in_float32 = arithmetic(self, torch.device("cpu")) == "float32"
        self.folded_channels = in_channels * fold**2
        self.fold, self.unfold = nn.PixelUnshuffle(fold), nn.PixelShuffle(fold)
        self.unet = DiffusionModelUNet(
            spatial_dims=2,
            in_channels=self.folded_channels,
            out_channels=outputs * self.folded_channels,
            channels=channels,
            attention_levels=[level == len(channels) - 1 for level in range(len(channels))],
            num_res_blocks=1,
            num_head_channels=32,
            norm_num_groups=16,
            num_class_embeds=num_classes,
            use_flash_attention=self.in_float32,
        )
        if self.in_float32:
            self.to(memory_format=torch.channels_last)
        self.register_buffer("alphas_cumprod", alphas_cumprod_table(schedule, num_levels), persistent=False)

    def _check_size(self, multiple: int) -> None:
        if any(size % multiple for size in self.spatial_size):
            raise ValueError(f"spatial_size must be multiples of {multiple}, got {self.spatial_size}")

    def _check_weights(self, name: str, weights: Sequence[float]) -> None:
        if len(weights) != self.in_channels:
            raise ValueError(f"{name} must be {self.in_channels} numbers, one for each sequence, got {weights}")

    def _run(self, network: nn.Module, x: Tensor, t: Tensor | int, **more: Tensor) -> Tensor:
        """Call a sub-network on the folded x; level t is the networks' step t - 1, counted from 0."""
        step = torch.as_tensor(t, device=x.device).sub(1).clamp(min=0).expand(len(x))
        with autocast(x, self.amp):
            return network(self.fold(x), step, **more).float()

    def _as_noise(self, x: Tensor, out: Tensor, t: Tensor | int) -> Tensor:
        """The noise, from what the U-Net returns of x at level t, (B, C, H, W)."""
        return noise_from_v(x, out, self._alpha(t)) if self.prediction_type == "v_prediction" else out

    def _noise_error(self, pred: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Mean squared error of noise estimates in what the U-Net is trained to return (Ho et al. 2020, eq. 14)."""
        error = pred - noise
        return ((error if self.prediction_type == "epsilon" else error / self._alpha(t).sqrt()) ** 2).mean()

    def _alpha(self, t: Tensor | int) -> Tensor:
        """Entry of the table for levels t, shaped to broadcast over (B, C, H, W)."""
        return self.alphas_cumprod[t].float().reshape(-1, 1, 1, 1)

    def _levels(self, num_steps: int | None = None) -> list[int]:
        return level_grid(self.noise_level, num_steps or self.num_steps)

    def anomaly_map(self, image: Tensor, healthy: Tensor) -> Tensor:
        """Weighted sum of the differences (B, 1, H, W) between slices and their healthy versions, both (B, C, H, W)."""
        return weighted_difference(image, healthy, self.map_weights, self.darker_weight, self.smoothing)
