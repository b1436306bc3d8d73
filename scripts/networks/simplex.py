"""Anomalies as what noise with a spectrum wipes out and a model of lesion-free slices does not put back (AnoDDPM)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from scripts.networks.denoising import DenoisingSliceNetwork
from scripts.networks.slice_network import abnormality_of
from scripts.noise import NOISES
from scripts.precision import Amp
from scripts.samplers import SOLVERS, STOCHASTIC, draw_noised, noise_image

__all__ = ["SimplexNet"]


class SimplexNet(DenoisingSliceNetwork):
    """Noise a slice in one jump, take the noise out, several times over, and compare the slice with the mean.

    Wyatt et al., *AnoDDPM: Anomaly Detection with Denoising Diffusion Probabilistic Models using Simplex Noise*, CVPR
    Workshops 2022. The U-Net has learned from lesion-free slices alone. White noise hides fine detail first, so that a
    lesion, which is large, shows through it; noise that is strong at low frequencies hides the lesion as well.

    All that a level and a solver do to an image is linear, and so the formulas hold for noise of any covariance C in place
    of the unit matrix, if it is the same at all levels: they are the usual ones of the image times C^(-1/2). Stochastic
    solvers therefore draw the noise of their steps with that spectrum, too. Frequencies that the noise does not have, the
    mean among them, are left as they are.

    The mean of stochastic ways down is, for a perfect network, the mean of the clean slices that belong to the noised one,
    and so is a single step of ``ddim``. As the repeats are averaged anyhow, a repeat needs no more than one call.

    Args:
        in_channels: number of sequences, C.
        spatial_size: height and width of a slice; multiples of ``fold`` x 2^(number of levels - 1).
        fold: edge of the pixel block that is folded into channels.
        channels: channels of the U-Net's levels, multiples of 16; the lowest has attention and is a multiple of 32.
        noise: kind of the noise, one of :data:`scripts.noise.NOISES`; the one that the U-Net has learned with.
        schedule: noise schedule, see :func:`scripts.samplers.alphas_cumprod_table`.
        prediction_type: what the U-Net is trained to return, ``epsilon`` (as in the paper) or ``v_prediction``.
        num_levels: number of noising steps T.
        level_power: training levels are drawn as T·u^level_power, u uniform.
        noise_level: level up to which a slice is noised. The paper's 250 is of noise with half the standard deviation.
        num_steps: number of steps down.
        solver: ``ancestral`` (as in the paper) or ``dpmpp_2m_sde``, which draw noise in each step; or ``ddim``, ``heun``,
            ``multistep``, ``dpmpp_2m``, which draw none after the first.
        num_repeats: number of healthy versions, each with noise of its own, of which the mean is taken.
        squared: take the square of each difference, as in the paper.
        map_weights: weight of each sequence in the anomaly map, negative to count against the others; None for 1 each.
        darker_weight: weight of what is darker than its healthy version, against what is brighter.
        smoothing: standard deviation in pixels of the Gaussian filter over the anomaly map; 0 for none.
        half_score: a slice's largest value of the map that makes its abnormality 0.5, to be taken from lesion-free slices.
        min_foreground: slices with a smaller share of foreground are skipped and return zero.
        foreground_level: grey level in [0, 1] above which a pixel counts as foreground.
        seed: seed of all noise; every slice gets the same noise, so that batches do not matter.
        amp: bfloat16 in the network, see :func:`scripts.precision.autocast`.

    Raises:
        ValueError: for an unknown noise, solver or prediction type, no repeat, a level beyond ``num_levels``, weights that
            are not one for each sequence, or a size that can't be halved often enough.
    """

    def __init__(
        self,
        in_channels: int = 3,
        spatial_size: Sequence[int] = (128, 128),
        fold: int = 2,
        channels: Sequence[int] = (32, 64, 96, 128),
        noise: str = "octaves",
        schedule: str = "linear",
        prediction_type: str = "v_prediction",
        num_levels: int = 1000,
        level_power: float = 1.5,
        noise_level: int = 250,
        num_steps: int = 1,
        solver: str = "ddim",
        num_repeats: int = 8,
        squared: bool = False,
        map_weights: Sequence[float] | None = None,
        darker_weight: float = 1.0,
        smoothing: float = 0.0,
        half_score: float = 0.1,
        min_foreground: float = 0.05,
        foreground_level: float = 0.1,
        seed: int = 0,
        amp: Amp = False,
    ) -> None:
        super().__init__(
            in_channels,
            spatial_size,
            fold,
            channels,
            schedule,
            prediction_type,
            num_levels,
            level_power,
            noise_level,
            num_steps,
            map_weights,
            darker_weight,
            smoothing,
            min_foreground=min_foreground,
            foreground_level=foreground_level,
            seed=seed,
            amp=amp,
        )
        for name, value, known in (("noise", noise, NOISES), ("solver", solver, [*STOCHASTIC, *SOLVERS])):
            if value not in known:
                raise ValueError(f"unknown {name} '{value}': choose one of {', '.join(known)}")
        if num_repeats < 1:
            raise ValueError(f"num_repeats must be 1 or more, got {num_repeats}")
        self.colour, self.solver, self.num_repeats = NOISES[noise], solver, num_repeats
        self.squared, self.half_score = squared, half_score

    @property
    def published(self) -> dict[str, object]:
        """Settings of the published procedure: 250 single ancestral steps, five times, and the plain squared difference."""
        return {
            "noise_level": 250,
            "num_steps": 250,
            "solver": "ancestral",
            "num_repeats": 5,
            "squared": True,
            "map_weights": None,
            "darker_weight": 1.0,
            "smoothing": 0.0,
        }

    def estimate(self, x: Tensor, t: Tensor | int) -> Tensor:
        """The noise in slices x (B, C, H, W) at level t, one or one for each; grey levels in [-1, 1] under the noise."""
        return self._as_noise(x, self.unfold(self._run(self.unet, x, t)), t)

    def heal(self, image: Tensor) -> Tensor:
        """Healthy version (B, C, H, W) of slices in [0, 1], the mean of ``num_repeats``.

        The noise of a repeat is the same for all slices, whatever their batch.
        """
        draw = self._repeats(self._generator(), len(image))
        x = (2 * image - 1).repeat(self.num_repeats, 1, 1, 1)
        x = noise_image(x, draw(x), self._alpha(self.noise_level))
        levels = self._levels()[::-1]
        if self.solver in STOCHASTIC:
            x = STOCHASTIC[self.solver](self.estimate, x, levels, self.alphas_cumprod, draw_noise=draw)
        else:
            x = SOLVERS[self.solver](self.estimate, x, levels, self.alphas_cumprod)
        return (x.unflatten(0, (self.num_repeats, len(image))).mean(dim=0) + 1) / 2

    def _repeats(self, generator: torch.Generator, number: int) -> Callable[[Tensor], Tensor]:
        """A function that draws noise for x (repeats · number, C, H, W), one for each repeat and the same for its slices."""

        def draw(x: Tensor) -> Tensor:
            white = torch.randn(self.num_repeats, *x.shape[1:], generator=generator, dtype=x.dtype)
            return self.colour(white).to(x.device).repeat_interleave(number, dim=0)

        return draw

    def anomaly_map(self, image: Tensor, healthy: Tensor) -> Tensor:
        """Map (B, 1, H, W), 0 or more, of slices and their healthy versions (B, C, H, W).

        The weighted sum of the differences, or of their squares if ``squared``. A sequence of negative weight counts
        against the others, unless it repeats one of positive weight, which stands in for it and would be cancelled.
        """
        difference = image - healthy
        for c, weight in enumerate(self.map_weights):
            if weight < 0:
                wanted = [other for other, positive in enumerate(self.map_weights) if positive > 0]
                repeats = (image[:, wanted] == image[:, c, None]).flatten(2).all(dim=2).any(dim=1)
                difference[repeats, c] = 0
        difference = difference * difference.abs() if self.squared else difference
        return super().anomaly_map(difference, torch.zeros_like(difference)).clamp(min=0)

    def analyse(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Anomaly map (B, 1, H, W), healthy version (B, C, H, W) and abnormality (B,) in [0, 1] of slices (B, C, H, W)."""
        healthy = self.heal(image)
        anomaly = self.anomaly_map(image, healthy)
        return anomaly, healthy, abnormality_of(anomaly, self.half_score)

    def losses(self, image: Tensor, class_label: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Error of the noise estimate, slices being noised to levels of their own.

        Args:
            image: lesion-free slices (B, C, H, W) in [0, 1].
            class_label: not used.
            generator: source of the levels and of the noise.

        Returns:
            ``noise``: mean squared error of what the U-Net is trained to return (Ho et al. 2020, eq. 14).
        """
        x, t, noise = draw_noised(2 * image - 1, self.alphas_cumprod, generator, self.level_power, self.colour)
        return {"noise": self._noise_error(self.estimate(x, t), noise, t)}
