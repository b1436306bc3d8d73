"""Anomalies as what noise with a spectrum wipes out and a model of lesion-free slices does not put back (AnoDDPM)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from scripts.messages import check_known
from scripts.networks.denoising import DenoisingSliceNetwork
from scripts.networks.slice_network import abnormality_of
from scripts.noise import NOISES
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
        noise: kind of the noise, one of :data:`scripts.noise.NOISES`; the one that the U-Net has learned with.
        solver: ``ancestral`` (as in the paper) or ``dpmpp_2m_sde``, which draw noise in each step; or ``ddim``, ``heun``,
            ``multistep``, ``dpmpp_2m``, which draw none after the first.
        num_repeats: number of healthy versions, each with noise of its own, of which the mean is taken.
        squared: take the square of each difference, as in the paper.
        half_score: a slice's largest value of the map that makes its abnormality 0.5, to be taken from lesion-free slices.
        kwargs: arguments of :class:`scripts.networks.denoising.DenoisingSliceNetwork`. The paper's ``noise_level`` of 250 is
            of noise with half the standard deviation, its ``prediction_type`` is ``epsilon``.

    Raises:
        ValueError: for an unknown noise, solver or prediction type, no repeat, a level beyond ``num_levels``, weights that
            are not one for each sequence, or a size that can't be halved often enough.
    """

    def __init__(
        self,
        channels: Sequence[int] = (32, 64, 96, 128),
        noise: str = "octaves",
        prediction_type: str = "v_prediction",
        solver: str = "ddim",
        num_repeats: int = 8,
        squared: bool = False,
        half_score: float = 0.1,
        **kwargs: object,
    ) -> None:
        super().__init__(channels=channels, prediction_type=prediction_type, **kwargs)
        check_known("noise", noise, NOISES)
        check_known("solver", solver, [*STOCHASTIC, *SOLVERS])
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
        """That of all denoising networks; of the squares of the differences, with their signs, if ``squared``."""
        difference = image - healthy
        return super().anomaly_map(image, image - difference * difference.abs() if self.squared else healthy)

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
