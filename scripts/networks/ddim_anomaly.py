"""Weakly supervised anomaly segmentation: DDIM with classifier guidance (Wolleb et al. 2022, arXiv 2203.04306)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from monai.networks.nets.diffusion_model_unet import DiffusionModelEncoder
from torch import Tensor, nn

from scripts.losses import variational_bound
from scripts.messages import check_known
from scripts.networks.denoising import DenoisingSliceNetwork
from scripts.networks.slice_network import brightness_map
from scripts.samplers import SOLVERS, ddpm, draw_noised, noise_image

__all__ = ["DISEASED", "HEALTHY", "AttentionPool", "DDIMAnomalyNet"]

# the classes of the classifier, named here and nowhere else: guidance runs towards HEALTHY
HEALTHY, DISEASED = 0, 1


class AttentionPool(nn.Module):
    """Pool a feature map into class logits by a learned weighting of its places.

    Attention pooling as in the classifier of Dhariwal & Nichol 2021 (arXiv 2105.05233), here with a learned score for
    each head and place (Ilse et al. 2018, arXiv 1802.04712).

    Args:
        in_channels: channels of the feature map.
        out_channels: number of classes.
        num_heads: number of weightings.
    """

    def __init__(self, in_channels: int, out_channels: int, num_heads: int = 4) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, in_channels)
        self.score = nn.Linear(in_channels, num_heads)
        self.out = nn.Linear(in_channels * num_heads, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, out_channels)."""
        x = nn.functional.silu(self.norm(x)).flatten(2).transpose(1, 2)
        weight = self.score(x).softmax(dim=1)
        return self.out(torch.einsum("bnh,bnc->bhc", weight, x).flatten(1))


class DDIMAnomalyNet(DenoisingSliceNetwork):
    """Encode a slice into noise by DDIM, decode it guided towards health, and take the difference.

    One module holds the U-Net, which estimates the noise, and the classifier p(class | x_t, t). Both see the slice with
    ``fold`` x ``fold`` pixels rearranged into channels, which is exact and makes them four times cheaper (fold 2).

    Args:
        classifier_channels: channels of the classifier's levels, multiples of 16.
        classifier_attention: level of the classifier that has attention, counted from the end, such as -2.
        gradient_scale: guidance scale s; 0 returns the input up to the solver's error.
        guidance_steps: 0 puts the guidance into the noise estimate, as in the paper. That needs many steps: a long one goes
            too far along one gradient, and bright and dark blobs appear where nothing was. k > 0 takes the guidance out of
            the solver: after each of its steps come k short ones along the classifier's gradient, renewed each time. As
            the classifier is far cheaper than the U-Net, few steps of the solver are then enough (operator splitting).
        solver: ``ddim`` (first order, as in the paper), ``heun``, ``multistep`` or ``dpmpp_2m``.
        mode: ``ddim``, or ``ddpm`` for the paper's comparison: noised in one jump, decoded by stochastic sampling.
        brightness_weights: weight of each sequence in a second map, which is added to the first, see
            :func:`scripts.networks.slice_network.brightness_map`; None for none, as in the paper.
        gate: multiply a slice's anomaly map by its probability of disease, so that what changed in a slice that looks
            healthy counts little; False, as in the paper.
        skip_below: slices with a smaller probability of disease come back as they are, with a map of zero, and cost one call
            of the classifier; 0 for none, as in the paper.
        reference_steps: k > 0 takes from the map what the slice's way through the noise changes without guidance, decoded in
            k steps: what the networks can't restore anyway is no lesion. 0 for none, as in the paper.
        classifier_alone: train the classifier alone; the U-Net stays as it is, and costs nothing.
        kwargs: arguments of :class:`scripts.networks.denoising.DenoisingSliceNetwork`: ``noise_level`` is the level L up to
            which a slice is encoded, ``spatial_size`` are multiples of ``fold`` x 2^(number of the classifier's levels),
            ``seed`` is that of ``ddpm`` mode. The paper's map has weights of 1 and no smoothing.

    Raises:
        ValueError: for an unknown solver, mode or prediction type, a level beyond ``num_levels``, or a size that can't be
            halved often enough.
    """

    def __init__(
        self,
        classifier_channels: Sequence[int] = (48, 96, 128, 128),
        classifier_attention: int = -2,
        gradient_scale: float = 100.0,
        guidance_steps: int = 4,
        solver: str = "multistep",
        mode: str = "ddim",
        brightness_weights: Sequence[float] | None = None,
        gate: bool = False,
        skip_below: float = 0.0,
        reference_steps: int = 0,
        classifier_alone: bool = False,
        **kwargs: object,
    ) -> None:
        super().__init__(**kwargs, outputs=2)  # noise (or v), and the place of the log variance between its bounds
        check_known("solver", solver, SOLVERS)
        check_known("mode", mode, ("ddim", "ddpm"))
        depth = len(classifier_channels)
        self._check_weights("brightness_weights", brightness_weights or self.map_weights)
        self._check_size(self.fold.downscale_factor * 2**depth)
        self.gradient_scale, self.guidance_steps, self.solver, self.mode = gradient_scale, guidance_steps, solver, mode
        self.brightness_weights, self.classifier_alone = brightness_weights, classifier_alone
        self.gate, self.skip_below, self.reference_steps = gate, skip_below, reference_steps
        self.unet.requires_grad_(not classifier_alone)
        size = [edge // self.fold.downscale_factor for edge in self.spatial_size]
        self.classifier = DiffusionModelEncoder(
            spatial_dims=2,
            in_channels=self.folded_channels,
            out_channels=2,
            input_shape=size,
            channels=classifier_channels,
            attention_levels=[level == depth + classifier_attention for level in range(depth)],
            num_res_blocks=1,
            num_head_channels=32,
            norm_num_groups=16,
            use_flash_attention=self.in_float32,
        )
        # MONAI's dense head knows every place by heart; pooling by attention needs few patients
        lowest = [edge // 2**depth for edge in size]
        self.classifier.out = nn.Sequential(
            nn.Unflatten(1, (classifier_channels[-1], *lowest)), AttentionPool(classifier_channels[-1], 2)
        )
        if self.in_float32:
            self.to(memory_format=torch.channels_last)

    @property
    def published(self) -> dict[str, object]:
        """Settings of the published procedure (paper, algorithm 1): L single first-order steps up, L guided ones down."""
        return {
            "num_steps": self.noise_level,
            "guidance_steps": 0,
            "solver": "ddim",
            "mode": "ddim",
            "smoothing": 0.0,
            "brightness_weights": None,
            "skip_below": 0.0,
            "reference_steps": 0,
        }

    def estimate(self, x: Tensor, t: Tensor | int, target: int | None = None) -> tuple[Tensor, Tensor]:
        """What the U-Net makes of x at level t.

        Args:
            x: noised slices (B, C, H, W), grey levels in [-1, 1] under the noise.
            t: level, one or one for each slice.
            target: class that the noise estimate steers to: noise - s·sqrt(1 - a)·gradient (paper, algorithm 1); None for
                no guidance.

        Returns:
            the noise, and the place of the log variance between its bounds (0 and 1); both with the shape of x.
        """
        noise, raw = self.unfold(self._run(self.unet, x, t)).chunk(2, dim=1)
        noise = self._as_noise(x, noise, t)
        if target is not None:
            noise = noise - self.gradient_scale * (1 - self._alpha(t)).sqrt() * self.gradient(x, t, target)
        return noise, (raw + 1) / 2

    def noise(self, x: Tensor, t: int, target: int | None = None) -> Tensor:
        """First part of :meth:`estimate`."""
        return self.estimate(x, t, target)[0]

    def classify(self, x: Tensor, t: Tensor | int) -> Tensor:
        """Logits (B, 2) of the classes, ``HEALTHY`` and ``DISEASED``, of noised slices at level t."""
        return self._run(self.classifier, x, t)

    def gradient(self, x: Tensor, t: int, target: int = HEALTHY) -> Tensor:
        """Gradient of log p(target | x, t) by x, (B, C, H, W)."""
        with torch.inference_mode(False), torch.enable_grad():
            x = x.detach().clone().requires_grad_()
            log_p = self.classify(x, t).log_softmax(dim=1)[:, target].sum()
            return torch.autograd.grad(log_p, x)[0]

    def guide(self, x: Tensor, t: int, s: int, target: int = HEALTHY) -> Tensor:
        """The guidance's part of a step from level t down to s, in ``guidance_steps`` short steps at level s.

        With the guided noise in the ODE dx / dangle = v (see :mod:`scripts.samplers`), its part is
        dx / dangle = -s·tan(angle)·gradient; in the stochastic equation of ``ddpm`` mode the gradient of the density, to
        which this adds, has twice the weight (Song et al. 2021, arXiv 2011.13456, eq. 6 and 13).
        """
        start, end = (torch.atan2((1 - a).sqrt(), a.sqrt()) for a in self.alphas_cumprod[[t, s]])
        scale = self.gradient_scale * (2 if self.mode == "ddpm" else 1)
        step = (scale * (start - end) * torch.tan((start + end) / 2) / self.guidance_steps).item()
        for _ in range(self.guidance_steps):
            x = x + step * self.gradient(x, s, target)
        return x

    def probability(self, image: Tensor) -> Tensor:
        """Probability (B,) that a slice (B, C, H, W) in [0, 1] is diseased, of the slice without noise."""
        with torch.no_grad():
            return self.classify(2 * image - 1, 0).softmax(dim=1)[:, DISEASED]

    def encode(self, image: Tensor) -> Tensor:
        """Slices (B, C, H, W) in [0, 1] to noised images at level ``noise_level``, without guidance."""
        x = 2 * image - 1
        if self.mode == "ddpm":
            return noise_image(x, self._draw(x, self._generator()), self._alpha(self.noise_level))
        return SOLVERS[self.solver](self.noise, x, self._levels(), self.alphas_cumprod)

    def decode(self, x: Tensor, target: int | None = HEALTHY, num_steps: int | None = None) -> Tensor:
        """Noised images at level ``noise_level`` to slices (B, C, H, W), guided towards the target class.

        Args:
            x: noised images (B, C, H, W).
            target: the class, or None for no guidance.
            num_steps: steps down, in place of the network's.
        """
        levels = self._levels(num_steps)[::-1]
        target = target if self.gradient_scale else None
        inside = None if self.guidance_steps else target
        outside = {} if target is None or not self.guidance_steps else {"correct": partial(self.guide, target=target)}
        if self.mode == "ddpm":
            draw = partial(self._draw, generator=self._generator(stream=1))
            x = ddpm(partial(self.estimate, target=inside), x, levels, self.alphas_cumprod, draw_noise=draw, **outside)
        else:
            x = SOLVERS[self.solver](partial(self.noise, target=inside), x, levels, self.alphas_cumprod, **outside)
        return (x + 1) / 2

    def anomaly_map(self, image: Tensor, healthy: Tensor, restored: Tensor | None = None) -> Tensor:
        """Map (B, 1, H, W), 0 or more, of slices and their healthy versions (B, C, H, W).

        Less what is not guided changes as well, if it is given (``restored``), and with what is bright, if that has weights.
        """
        anomaly = super().anomaly_map(image, healthy)
        if restored is not None:
            anomaly = (anomaly - super().anomaly_map(image, restored)).clamp(min=0)
        if self.brightness_weights:
            anomaly = anomaly + brightness_map(image, self.brightness_weights, self.smoothing)
        return anomaly

    def analyse(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Anomaly map (B, 1, H, W), pseudo-healthy slices (B, C, H, W) and probability of disease (B,).

        Args:
            image: slices (B, C, H, W), grey levels in [0, 1].
        """
        probability = self.probability(image)
        anomaly, healthy = torch.zeros_like(image[:, :1]), image.clone()
        chosen = probability >= self.skip_below
        if chosen.any():
            noised = self.encode(image[chosen])
            healthy[chosen] = self.decode(noised)
            steps = self.reference_steps
            restored = self.decode(noised, target=None, num_steps=steps) if steps else None
            anomaly[chosen] = self.anomaly_map(image[chosen], healthy[chosen], restored)
        if self.gate:
            anomaly = anomaly * probability.view(-1, 1, 1, 1)
        return anomaly, healthy, probability

    def losses(self, image: Tensor, class_label: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Losses of U-Net and classifier on the same noised batch; their sum is what training minimises.

        Args:
            image: slices (B, C, H, W) in [0, 1].
            class_label: (B,), ``HEALTHY`` or ``DISEASED``.
            generator: source of the levels and of the noise.

        Returns:
            ``noise``: mean squared error of the U-Net's estimate (Ho et al. 2020, eq. 14); ``variance``: the bound's
            term for the learned variance, in bits (together Nichol & Dhariwal's hybrid objective, whose weight 0.001 times
            T = 1000 terms is 1); ``classifier``: cross-entropy. Only this one where the classifier trains alone.
        """
        x0 = 2 * image - 1
        x, t, noise = draw_noised(x0, self.alphas_cumprod, generator, self.level_power)
        losses = {"classifier": nn.functional.cross_entropy(self.classify(x, t), class_label)}
        return losses if self.classifier_alone and self.training else {**self._noise_losses(x, t, noise), **losses}

    def _noise_losses(self, x: Tensor, t: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Losses of the U-Net, see :meth:`losses`."""
        pred, fraction = self.estimate(x, t)
        return {
            "noise": self._noise_error(pred, noise, t),
            "variance": variational_bound(pred, fraction, noise, t, self.alphas_cumprod),
        }
