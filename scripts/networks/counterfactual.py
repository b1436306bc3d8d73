"""Counterfactual healthy slices by guidance without a classifier (Sanchez et al. 2022, arXiv 2207.12268)."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from scripts.corruptions import foreign_content, inside_of_head, random_blobs
from scripts.messages import check_known
from scripts.networks.ddim_anomaly import HEALTHY
from scripts.networks.denoising import DenoisingSliceNetwork
from scripts.networks.slice_network import abnormality_of
from scripts.samplers import SOLVERS, draw_noised, for_batch

__all__ = ["NONE", "CounterfactualNet"]

NONE = 2  # the class of slices of which nothing is said, beside HEALTHY and DISEASED


class CounterfactualNet(DenoisingSliceNetwork):
    """Encode a slice into noise without a class, decode it as a healthy one, and take the difference.

    One U-Net estimates the noise of slices of a class, healthy or diseased, or, being told neither, of any. Guidance is the
    difference of two of its estimates (Ho & Salimans 2022, arXiv 2207.12598), without classifier and gradient.

    Args:
        label_dropout: share of the training slices whose class is withheld.
        made_share: share of the healthy training slices that get made anomalies (:mod:`scripts.corruptions`); as healthy
            ones they are to come back without these, without a class with them. 0 as in the paper, where the U-Net never has
            to take for healthy what is not, which is what the decoding asks of it.
        guidance_scale: guidance w; 3 in the paper. 0 decodes without a class, which returns the input up to the solver's
            error, 1 decodes as the U-Net knows healthy slices, and more exaggerates that.
        dynamic_normalisation: while decoding, divide each estimate of the clean slice by the 99 % quantile of its absolute
            grey levels, if that is above 1, and clip it, for each sequence; True, as in the paper.
        solver: ``ddim`` (first order, as in the paper), ``heun``, ``multistep`` or ``dpmpp_2m``.
        half_score: a slice's largest value of the map that makes its abnormality 0.5, to be taken from lesion-free slices.
        kwargs: arguments of :class:`scripts.networks.denoising.DenoisingSliceNetwork`: ``noise_level`` is the level L up to
            which a slice is encoded, 750 in the paper; ``seed`` is not used by the inference, which draws nothing.

    Raises:
        ValueError: for an unknown solver or prediction type, a level beyond ``num_levels``, weights that are not one for
            each sequence, or a size that can't be halved often enough.
    """

    def __init__(
        self,
        level_power: float = 1.0,
        label_dropout: float = 0.35,
        made_share: float = 0.5,
        guidance_scale: float = 3.0,
        dynamic_normalisation: bool = True,
        solver: str = "multistep",
        half_score: float = 0.1,
        **kwargs: object,
    ) -> None:
        super().__init__(level_power=level_power, num_classes=3, **kwargs)
        check_known("solver", solver, SOLVERS)
        self.label_dropout, self.made_share, self.guidance_scale = label_dropout, made_share, guidance_scale
        self.dynamic_normalisation, self.solver, self.half_score = dynamic_normalisation, solver, half_score
        nn.init.zeros_(self.unet.class_embedding.weight)  # the classes begin alike

    @property
    def published(self) -> dict[str, object]:
        """Settings of the published procedure: 100 first-order steps each way, to three quarters of the levels."""
        return {
            "noise_level": 3 * self.num_levels // 4,
            "guidance_scale": 3.0,
            "dynamic_normalisation": True,
            "num_steps": 100,
            "solver": "ddim",
            "map_weights": None,
            "darker_weight": 1.0,
            "smoothing": 0.0,
        }

    def start_from(self, path: str | Path) -> None:
        """Take the weights of another network's U-Net with the same levels, such as those of ``brain_mri_anomaly_ddim``.

        If it knows no classes, these begin alike; if it returns more images than the noise, they are left out. What it
        estimates without a class is then what the other one does.

        Raises:
            ValueError: naming the file, if it has no such U-Net.
        """
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name, own in self.unet.state_dict().items():
            other = state.get(f"unet.{name}", torch.zeros_like(own) if name == "class_embedding.weight" else None)
            if other is not None and name.startswith("out."):
                other = other[: len(own)]
            if other is None or other.shape != own.shape:
                raise ValueError(f"{path}: has no U-Net of these channels (unet.{name}); give other --start_weights")
            own.copy_(other)

    def estimate(self, x: Tensor, t: Tensor | int, label: Tensor) -> Tensor:
        """Noise (B, C, H, W) in slices x at level t, one or (B,), of the classes ``label`` (B,)."""
        out = self.unfold(self._run(self.unet, x, t, class_labels=label))
        return self._as_noise(x, out, t)

    def noise(self, x: Tensor, t: int, target: int | None = None) -> Tensor:
        """Noise in x (B, C, H, W) at level t: without a class, or guided to one (paper, algorithm 1).

        Both evaluations of the guidance are one batch, and so is the dynamic normalisation of the guided estimate.
        """
        nothing = torch.full((len(x),), NONE, device=x.device)
        if target is None:
            return self.estimate(x, t, nothing)
        label = torch.cat([nothing, torch.full_like(nothing, target)])
        without, towards = self.estimate(x.repeat(2, 1, 1, 1), t, label).chunk(2)
        noise = without + self.guidance_scale * (towards - without)
        return self._normalised(x, noise, t) if self.dynamic_normalisation else noise

    def _normalised(self, x: Tensor, noise: Tensor, t: int) -> Tensor:
        """The noise after dynamic normalisation of the clean slice that it implies (paper, section 3.3)."""
        a = self._alpha(t)
        if a == 1:  # Heun's rule asks at the clean image
            return noise
        clean = (x - (1 - a).sqrt() * noise) / a.sqrt()
        bound = clean.abs().flatten(2).quantile(0.99, dim=2).clamp(min=1)[..., None, None]
        return (x - a.sqrt() * clean.clamp(-bound, bound) / bound) / (1 - a).sqrt()

    def encode(self, image: Tensor) -> Tensor:
        """Slices (B, C, H, W) in [0, 1] to noised images at level ``noise_level``, without a class."""
        return SOLVERS[self.solver](self.noise, 2 * image - 1, self._levels(), self.alphas_cumprod)

    def decode(self, x: Tensor, target: int | None = HEALTHY) -> Tensor:
        """Noised images at level ``noise_level`` to slices (B, C, H, W), guided to a class; None for no guidance."""
        towards = partial(self.noise, target=target if self.guidance_scale else None)
        return (SOLVERS[self.solver](towards, x, self._levels()[::-1], self.alphas_cumprod) + 1) / 2

    def analyse(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Anomaly map (B, 1, H, W), counterfactual slices (B, C, H, W) and abnormality (B,) in [0, 1].

        Args:
            image: slices (B, C, H, W), grey levels in [0, 1].
        """
        healthy = self.decode(self.encode(image))
        anomaly = self.anomaly_map(image, healthy)
        return anomaly, healthy, abnormality_of(anomaly, self.half_score)

    def losses(self, image: Tensor, class_label: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Error of the noise estimate, some of the slices being given without their class.

        Args:
            image: slices (B, C, H, W) in [0, 1].
            class_label: (B,), ``HEALTHY`` or ``DISEASED``.
            generator: source of the levels, of the noise and of the classes that are withheld.

        Returns:
            ``noise``: mean squared error of the U-Net's estimate (Ho et al. 2020, eq. 14).
        """
        healthy = class_label == HEALTHY
        made = healthy & (for_batch(torch.rand, (len(image),), generator, image.device) < self.made_share)
        shown = self._with_anomalies(image, made, generator) if self.made_share else image
        x, t, noise = draw_noised(2 * shown - 1, self.alphas_cumprod, generator, self.level_power)
        withheld = for_batch(torch.rand, (len(x),), generator, x.device) < self.label_dropout
        label = torch.where(withheld, torch.full_like(class_label, NONE), class_label)
        # what is foreign to a healthy slice is noise; by its error in the clean slice, as that in the noise has no bound
        signal, scale = self._alpha(t).sqrt(), (1 - self._alpha(t)).sqrt()
        foreign = 2 * (shown - image) * (made & ~withheld).view(-1, 1, 1, 1)
        weight = torch.where((made & ~withheld).view(-1, 1, 1, 1), (scale / signal).clamp(max=1), 1)
        target = noise + signal / scale * foreign
        return {"noise": self._noise_error(weight * self.estimate(x, t, label), weight * target, t)}

    def _with_anomalies(self, image: Tensor, made: Tensor, generator: torch.Generator) -> Tensor:
        """Slices (B, C, H, W), those of ``made`` (B,) with foreign content behind soft masks."""
        mask = random_blobs(inside_of_head(image, self.foreground_level), generator) * made.view(-1, 1, 1, 1)
        return image.lerp(foreign_content(image, generator), mask.expand_as(image))
