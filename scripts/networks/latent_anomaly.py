"""Unsupervised anomaly segmentation with a latent diffusion model (Pinaya et al. 2022, arXiv 2206.03461)."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from functools import partial

import torch
from monai.networks.layers import GaussianFilter
from monai.networks.nets.diffusion_model_unet import DiffusionModelUNet
from torch import Tensor, nn

from scripts.losses import gaussian_kl
from scripts.networks.healthy_model import QuantisedModel
from scripts.precision import autocast
from scripts.samplers import SOLVERS, alphas_cumprod_table, ddpm, draw_noised, level_grid, noise_image, posterior

__all__ = ["LatentAnomalyNet"]

VARIANTS = ("a", "b", "c", "d")


class LatentAnomalyNet(QuantisedModel):
    """Find what a latent diffusion model of healthy slices calls unlikely, let it heal that, and take the difference.

    One module holds the VQ-VAE, the U-Net that estimates the noise in noised latents, the mean and standard deviation of
    the latents, and the quantiles of healthy slices. The latents are those before quantisation, standardised.

    Args:
        unet_channels: channels of the U-Net's levels, multiples of 32; the lower two have attention.
        num_res_blocks: residual blocks a level.
        schedule: noise schedule, see :func:`scripts.samplers.alphas_cumprod_table`.
        num_levels: number of noising steps T.
        level_power: training levels are drawn as T·u^level_power, u uniform; above 1 the lower ones come more often.
        variant: the paper's names. ``a``: heal the whole latent, map = residual; ``b``: heal within the mask; ``c``: as b,
            and multiply the residual with the smoothed mask; all three by ``start_level`` stochastic steps. ``d``: as c,
            with ``num_steps`` deterministic steps.
        band: first and last level of the divergence map.
        band_levels: how many levels, evenly spaced in the band, its mean is taken over (paper: 50).
        divergence_smoothing: standard deviation of a Gaussian filter over the divergence map, in places of the latents; 0 as
            in the paper.
        score_band: band of the image's score; None for that of the map, whose values are then used again; [1, 1000] for
            the whole chain, as in the paper.
        start_level: level that the latents are noised to before healing.
        num_steps: steps of variant d (paper: 50 of ``ddim``).
        solver: of variant d: ``ddim`` (as in the paper), ``heun``, ``multistep`` or ``dpmpp_2m``.
        max_batch: largest number of latents in one call of the U-Net, which bounds the memory; all levels of the band
            are one call where it allows.
        kwargs: arguments of :class:`scripts.networks.healthy_model.QuantisedModel`.

    Raises:
        ValueError: for an unknown variant or solver, or levels outside 1 ... ``num_levels``.
    """

    def __init__(
        self,
        unet_channels: Sequence[int] = (96, 128, 160),
        num_res_blocks: int = 1,
        schedule: str = "linear",
        num_levels: int = 1000,
        level_power: float = 1.5,
        variant: str = "d",
        band: Sequence[int] = (400, 600),
        band_levels: int = 50,
        divergence_smoothing: float = 0.0,
        score_band: Sequence[int] | None = None,
        start_level: int = 500,
        num_steps: int = 50,
        solver: str = "ddim",
        max_batch: int = 256,
        **kwargs: object,
    ) -> None:
        if variant not in VARIANTS:
            raise ValueError(f"unknown variant '{variant}': choose one of {', '.join(VARIANTS)}")
        if solver not in SOLVERS:
            raise ValueError(f"unknown solver '{solver}': choose one of {', '.join(SOLVERS)}")
        if not all(1 <= level <= num_levels for level in (*band, *(score_band or ()), start_level)):
            raise ValueError(f"band, score_band and start_level must lie in 1 ... {num_levels}")
        super().__init__(**kwargs)
        self.choose(variant)
        self.num_levels, self.level_power = num_levels, level_power
        self.band, self.band_levels, self.score_band = tuple(band), band_levels, score_band
        self.divergence_smoothing = divergence_smoothing
        self.start_level, self.num_steps, self.solver = start_level, num_steps, solver
        self.max_batch = max_batch

        latent_channels = self.autoencoder.embedding_dim
        self.unet = DiffusionModelUNet(
            spatial_dims=2,
            in_channels=latent_channels,
            out_channels=latent_channels,
            channels=tuple(unet_channels),
            attention_levels=[level > 0 for level in range(len(unet_channels))],
            num_res_blocks=num_res_blocks,
            num_head_channels=32,
            norm_num_groups=32,
        ).to(memory_format=torch.channels_last)
        self.register_buffer("latent_mean", torch.zeros(1, latent_channels, 1, 1))
        self.register_buffer("latent_std", torch.ones(1, latent_channels, 1, 1))
        self.register_buffer("alphas_cumprod", alphas_cumprod_table(schedule, num_levels), persistent=False)

    def choose(self, variant: str) -> None:
        """Set the variant, and what follows from it."""
        self.variant, self.masked_map, self.heal_all = variant, variant in "cd", variant == "a"

    def variants(self, names: Sequence[str], batches: Iterable[dict]) -> dict[str, LatentAnomalyNet]:
        """Networks for a table, which all share these weights.

        Args:
            names: ``a`` to ``d``, the paper's variants with this network's other settings; ``published``, see there.
            batches: held-out healthy slices for :meth:`calibrate`, since another band has another divergence.
        """
        found = {name: copy.copy(self) for name in names}
        for name, network in found.items():
            if name == "published":
                settings = {**self.published, "max_batch": self.max_batch}  # which changes the speed alone
                network.choose(settings.pop("variant"))
                for setting, value in settings.items():
                    setattr(network, setting, value)
                network._buffers = {key: value.clone() for key, value in self._buffers.items()}
                network.calibrate(batches)
            else:
                network.choose(name)
        return found

    @property
    def published(self) -> dict[str, object]:
        """Settings of the published procedure: 50 levels of the band one after the other, then 500 stochastic steps."""
        return {
            "variant": "c",
            "band": (400, 600),
            "band_levels": 50,
            "divergence_smoothing": 0.0,
            "texture_offset": 0.0,
            "healings": 1,
            "percentile": 97.5,
            "max_batch": 1,
        }

    def encode(self, image: Tensor) -> Tensor:
        """Slices (B, C, H, W) in [0, 1] to latents (B, embedding_dim, h, w) with mean 0 and standard deviation 1."""
        return (super().encode(image) - self.latent_mean) / self.latent_std

    def decode(self, latent: Tensor) -> Tensor:
        """Standardised latents (B, embedding_dim, h, w), quantised here, to slices (B, C, H, W)."""
        return super().decode(latent * self.latent_std + self.latent_mean)

    def noise(self, x: Tensor, t: Tensor | int) -> Tensor:
        """The U-Net's estimate of the noise in latents x, (B, embedding_dim, h, w), at level t (one, or one for each)."""
        step = torch.as_tensor(t, device=x.device).sub(1).expand(len(x))  # the network counts from 0
        with autocast(x, self.amp):
            return self.unet(x, step).float()

    def divergence(self, latent: Tensor, levels: Sequence[int], weight: Tensor | None = None) -> Tensor:
        """Mean over levels t of KL( q(z_{t-1} | z_t, z_0) || p(z_{t-1} | z_t) ), in nats (paper, section 2.3).

        Both are Gaussians with the variance of q, so that only their means differ.

        Args:
            latent: z_0, (B, embedding_dim, h, w).
            levels: levels t, 1 or more.
            weight: factor of each place, (B, 1, h, w); None for 1.

        Returns:
            (B, 1, h, w), summed over the channels of a place, and smoothed.
        """
        noise = torch.randn(len(levels), *latent.shape[1:], generator=self._generator(0)).to(latent.device)
        levels = torch.as_tensor(levels, device=latent.device)
        total = torch.zeros_like(latent[:, :1])
        at_once = max(1, self.max_batch // len(latent))
        for t, eps in zip(levels.split(at_once), noise.split(at_once), strict=True):
            z0 = latent.repeat(len(t), 1, 1, 1)
            eps, t = eps.repeat_interleave(len(latent), 0), t.repeat_interleave(len(latent))
            a_t, a_s = (self.alphas_cumprod[level].float().view(-1, 1, 1, 1) for level in (t, t - 1))
            x = noise_image(z0, eps, a_t)
            estimate = (x - (1 - a_t).sqrt() * self.noise(x, t)) / a_t.sqrt()
            mean, variance = posterior(x, z0, a_t, a_s)
            kl = gaussian_kl(mean, variance.log(), posterior(x, estimate, a_t, a_s)[0], variance.log())
            total += kl.sum(dim=1, keepdim=True).unflatten(0, (-1, len(latent))).sum(dim=0)
        if weight is not None:
            total = total * weight
        if self.divergence_smoothing > 0:
            total = GaussianFilter(spatial_dims=2, sigma=self.divergence_smoothing).to(total.device)(total)
        return total / len(levels)

    def _levels(self, band: Sequence[int]) -> list[int]:
        """``band_levels`` levels, evenly spaced in a band; the posterior has no width at level 1."""
        return torch.linspace(max(band[0], 2), max(band[1], 2), self.band_levels).round().int().tolist()

    def shared(self, image: Tensor) -> dict[str, Tensor]:
        """The latents of slices (B, C, H, W) in [0, 1], as ``latent``."""
        return {"latent": self.encode(image)}

    def unlikeness(self, image: Tensor, latent: Tensor | None = None) -> Tensor:
        """Divergence map (B, 1, h, w) of slices (B, C, H, W) in [0, 1], the mean over the band; see ``texture_offset``."""
        return self._unlikeness(image, latent, self.band)

    def _unlikeness(self, image: Tensor, latent: Tensor | None, band: Sequence[int]) -> Tensor:
        latent = self.encode(image) if latent is None else latent
        return self.divergence(latent, self._levels(band), self._places(self.evenness(image)))

    def restore(self, image: Tensor, latent: Tensor | None = None) -> Tensor:
        """Slices (B, C, H, W) in [0, 1] after encoding, quantisation and decoding."""
        return self.decode(self.encode(image) if latent is None else latent)

    @torch.no_grad()
    def score(self, image: Tensor, unlike: Tensor | None = None, latent: Tensor | None = None) -> Tensor:
        """Score (B,) of slices (B, C, H, W) in [0, 1]: of the divergence over ``score_band``."""
        if self.score_band is None:
            return super().score(image, unlike)
        return self._reduce(self._unlikeness(image.float(), latent, self.score_band))

    def heal(
        self,
        image: Tensor,
        mask: Tensor,
        generator: torch.Generator | None = None,
        latent: Tensor | None = None,
    ) -> Tensor:
        """Slices (B, C, H, W) in [0, 1] with the latents inside ``mask`` (B, 1, h, w) drawn by the model (paper, 2.3).

        Outside the mask every step puts the noised original back: in variant d always with the same noise, since its
        steps are deterministic; in the others with new one.
        """
        z0 = self.encode(image) if latent is None else latent
        generator = self._generator(1) if generator is None else generator
        draw = partial(self._draw, generator=generator)
        first = draw(z0)

        def keep(x: Tensor, t: int, s: int) -> Tensor:
            noise = first if self.variant == "d" else draw(z0)
            return torch.where(mask, x, noise_image(z0, noise, self.alphas_cumprod[s].float()))

        x = noise_image(z0, first, self.alphas_cumprod[self.start_level].float())
        if self.variant == "d":
            levels = level_grid(self.start_level, self.num_steps)[::-1]
            x = SOLVERS[self.solver](self.noise, x, levels, self.alphas_cumprod, correct=keep)
        else:
            levels = level_grid(self.start_level, self.start_level)[::-1]
            x = ddpm(self.noise, x, levels, self.alphas_cumprod, correct=keep, draw_noise=draw)
        return self.decode(x)

    @torch.no_grad()
    def draw(self, number: int, num_steps: int = 100) -> Tensor:
        """Slices (number, C, H, W) in [0, 1] that the model makes from noise alone."""
        shape = (number, self.autoencoder.embedding_dim, *self.latent_size)
        noise = torch.randn(shape, generator=self._generator(0)).to(self.latent_mean.device)
        levels = level_grid(self.num_levels, num_steps)[::-1]
        return self.decode(SOLVERS["multistep"](self.noise, noise, levels, self.alphas_cumprod)).clamp(0, 1)

    @torch.no_grad()
    def standardise(self, batches: Iterable[dict]) -> None:
        """Measure mean and standard deviation of each channel of the latents, before the U-Net's training.

        Args:
            batches: dictionaries with ``image``, healthy slices (B, C, H, W) in [0, 1].
        """
        latents = torch.cat([super(LatentAnomalyNet, self).encode(b["image"].to(self.latent_mean.device)) for b in batches])
        self.latent_mean.copy_(latents.mean(dim=(0, 2, 3), keepdim=True))
        self.latent_std.copy_(latents.std(dim=(0, 2, 3), keepdim=True))

    def losses(self, image: Tensor, class_label: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Loss of the U-Net.

        Args:
            image: healthy slices (B, C, H, W) in [0, 1].
            class_label: not used.
            generator: source of the levels and of the noise.

        Returns:
            ``noise``: mean squared error of the estimated noise (Ho et al. 2020, arXiv 2006.11239, eq. 14).
        """
        with torch.no_grad():
            z0 = self.encode(image)
        x, t, noise = draw_noised(z0, self.alphas_cumprod, generator, self.level_power)
        return {"noise": nn.functional.mse_loss(self.noise(x, t), noise)}
