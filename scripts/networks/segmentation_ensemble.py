"""Segmentation as an ensemble of diffusion samples (Wolleb et al. 2022, arXiv 2112.03145)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from monai.losses import DiceCELoss
from torch import Tensor, nn

from scripts.messages import check_known
from scripts.networks.segmentation_network import MaskUNet, SegmentationNetwork
from scripts.samplers import SOLVERS, STOCHASTIC, alphas_cumprod_table, draw_noised, level_grid, noise_from_v

__all__ = ["SegmentationEnsembleNet"]

PREDICTION_TYPES = ("sample", "epsilon", "v_prediction")
# Heun's rule asks for the noise at level 0, where there is none
DETERMINISTIC = {name: solver for name, solver in SOLVERS.items() if name != "heun"}


class SegmentationEnsembleNet(SegmentationNetwork):
    """Draw masks of a slice from a diffusion model that sees the slice without noise beside the noised mask.

    Masks are -1 and 1 under the noise, so that their mean is not far from that of the noise.

    Args:
        in_channels: number of sequences, C.
        spatial_size: height and width of a slice; multiples of ``fold`` x 2^(number of levels - 1).
        fold: edge of the pixel block that is folded into channels.
        channels: channels of the U-Net's levels, see :class:`scripts.networks.segmentation_network.MaskUNet`.
        num_res_blocks: residual blocks a level.
        schedule: noise schedule, see :func:`scripts.samplers.alphas_cumprod_table`.
        prediction_type: what the U-Net returns: ``sample``, the logit of each pixel of the clean mask; ``epsilon``, the
            noise, as in the paper; or ``v_prediction``.
        num_levels: number of noising steps T.
        level_power: training levels are drawn as T·u^level_power, u uniform; below 1 the higher levels come more often, at
            which the noised mask says little, so that the image has to be looked at.
        dice_weight: weight of the Dice loss beside the cross-entropy of ``sample``; with 0 the estimate is the mean of the
            clean mask, as the solvers take it to be, but learns more slowly.
        num_steps: number of steps from noise to mask.
        solver: ``ddim``, ``multistep``, ``dpmpp_2m``, or, stochastic, ``ancestral`` (as in the paper) and
            ``dpmpp_2m_sde``.
        kwargs: arguments of :class:`scripts.networks.segmentation_network.SegmentationNetwork`.

    Raises:
        ValueError: for an unknown solver or prediction type, or a size that can't be halved often enough.
    """

    def __init__(
        self,
        in_channels: int = 3,
        spatial_size: Sequence[int] = (128, 128),
        fold: int = 4,
        channels: Sequence[int] = (64, 96, 128),
        num_res_blocks: int = 1,
        schedule: str = "linear",
        prediction_type: str = "sample",
        num_levels: int = 1000,
        level_power: float = 0.25,
        dice_weight: float = 1.0,
        num_steps: int = 2,
        solver: str = "ddim",
        **kwargs: object,
    ) -> None:
        super().__init__(in_channels, spatial_size, **kwargs)
        check_known("solver", solver, (*DETERMINISTIC, *STOCHASTIC))
        check_known("prediction_type", prediction_type, PREDICTION_TYPES)
        multiple = fold * 2 ** (len(channels) - 1)
        if any(size % multiple for size in spatial_size):
            raise ValueError(f"spatial_size must be multiples of {multiple}, got {tuple(spatial_size)}")
        self.prediction_type, self.num_levels, self.level_power = prediction_type, num_levels, level_power
        self.num_steps, self.solver = num_steps, solver
        self.loss = DiceCELoss(sigmoid=True, batch=True, lambda_dice=dice_weight)
        self.unet = MaskUNet(in_channels + 1, fold, channels, num_res_blocks, amp=self.amp)
        self.register_buffer("alphas_cumprod", alphas_cumprod_table(schedule, num_levels), persistent=False)

    @property
    def published(self) -> dict[str, object]:
        """Settings of the published procedure: five samples of T stochastic steps each."""
        return {"num_samples": 5, "num_steps": self.num_levels, "solver": "ancestral"}

    def _alpha(self, t: Tensor | int) -> Tensor:
        """Entry of the table for levels t, shaped to broadcast over (B, 1, H, W)."""
        return self.alphas_cumprod[t].float().reshape(-1, 1, 1, 1)

    def raw(self, x: Tensor, image: Tensor, t: Tensor | int) -> Tensor:
        """What the U-Net returns, (B, 1, H, W), for the noised mask x, (B, 1, H, W), at level t, and the slices."""
        step = torch.as_tensor(t, device=x.device).sub(1).clamp(min=0)  # level t is the network's step t - 1
        return self.unet(torch.cat([2 * image - 1, x], dim=1), step)

    def clean(self, x: Tensor, image: Tensor, t: Tensor | int) -> Tensor:
        """Estimate of the clean mask, its mean given x and the image, in [-1, 1].

        Args:
            x: noised mask (B, 1, H, W).
            image: slices (B, C, H, W) in [0, 1].
            t: level, one or one for each slice.

        Returns:
            (B, 1, H, W).
        """
        a, raw = self._alpha(t), self.raw(x, image, t)
        if self.prediction_type == "sample":
            return torch.tanh(raw / 2)  # 2·sigmoid - 1
        if self.prediction_type == "v_prediction":
            raw = noise_from_v(x, raw, a)
        return ((x - (1 - a).sqrt() * raw) / a.sqrt()).clamp(-1, 1)

    def noise(self, x: Tensor, t: int, image: Tensor) -> Tensor:
        """Estimate of the noise in x, (B, 1, H, W), which the solvers of :mod:`scripts.samplers` go by."""
        a = self._alpha(t)
        return (x - a.sqrt() * self.clean(x, image, t)) / (1 - a).sqrt().clamp(min=1e-4)

    def sample(self, image: Tensor, numbers: Sequence[int]) -> Tensor:
        """See :meth:`scripts.networks.segmentation_network.SegmentationNetwork.sample`."""
        generators = [self._stream(number) for number in numbers]
        shape = (1, *image.shape[2:])

        def draw(_: Tensor | None = None) -> Tensor:
            """Noise (n·B, 1, H, W), the same of all slices of a sample."""
            noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
            return noise.to(image).repeat_interleave(len(image), dim=0)

        estimate = partial(self.noise, image=image.repeat(len(numbers), 1, 1, 1))
        levels = level_grid(self.num_levels, self.num_steps)[::-1]
        if self.solver in STOCHASTIC:
            mask = STOCHASTIC[self.solver](estimate, draw(), levels, self.alphas_cumprod, draw_noise=draw)
        else:
            mask = DETERMINISTIC[self.solver](estimate, draw(), levels, self.alphas_cumprod)
        return ((mask + 1) / 2).unflatten(0, (len(numbers), -1))

    def losses(self, image: Tensor, label: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Loss of the U-Net.

        Args:
            image: slices (B, C, H, W) in [0, 1].
            label: masks (B, 1, H, W), lesion where above 0.
            generator: source of the levels and of the noise.

        Returns:
            ``dice_ce``: Dice loss of the batch plus cross-entropy of the clean mask, in nats; or ``noise``: mean
            squared error of the noise, or of v.
        """
        mask = (label > 0).to(image.dtype)
        x, t, noise = draw_noised(2 * mask - 1, self.alphas_cumprod, generator, self.level_power)
        raw = self.raw(x, image, t)
        if self.prediction_type == "sample":
            return {"dice_ce": self.loss(raw, mask)}
        a = self._alpha(t)
        target = noise if self.prediction_type == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * (2 * mask - 1)
        return {"noise": nn.functional.mse_loss(raw, target)}
