"""Unsupervised anomaly segmentation with a latent diffusion model (Pinaya et al. 2022, arXiv 2206.03461)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from monai.networks.nets.diffusion_model_unet import DiffusionModelUNet
from torch import Tensor, nn

from scripts.losses import gaussian_kl
from scripts.messages import check_known
from scripts.networks.healthy_model import HealthyModel, HealthySettings, Mapper, blur, evenness, map_by_healing, reduced
from scripts.networks.vq_autoencoder import SliceVQVAE
from scripts.precision import autocast
from scripts.samplers import SOLVERS, alphas_cumprod_table, ddpm, draw_noised, level_grid, noise_image, posterior

__all__ = ["LatentAnomalyNet", "LatentSettings", "divergence", "heal"]

VARIANTS = ("a", "b", "c", "d")

Model = Callable[[Tensor, Tensor | int], Tensor]
Draw = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LatentSettings(HealthySettings):
    """Settings of a :class:`LatentAnomalyNet` that its weights do not depend on.

    Args:
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
        num_levels: number of noising steps T that the U-Net is trained for.

    Raises:
        ValueError: for an unknown variant or solver, or levels outside 1 ... ``num_levels``.
    """

    variant: str = "d"
    band: Sequence[int] = (400, 600)
    band_levels: int = 50
    divergence_smoothing: float = 0.0
    score_band: Sequence[int] | None = None
    start_level: int = 500
    num_steps: int = 50
    solver: str = "ddim"
    max_batch: int = 256
    num_levels: int = 1000
    measured: ClassVar = (*HealthySettings.measured, "band", "band_levels", "divergence_smoothing", "score_band")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_known("variant", self.variant, VARIANTS)
        check_known("solver", self.solver, SOLVERS)
        levels = (*self.band, *(self.score_band or ()), self.start_level)
        if not all(1 <= level <= self.num_levels for level in levels):
            raise ValueError(f"band, score_band and start_level must lie in 1 ... {self.num_levels}")


def levels_of(band: Sequence[int], number: int) -> list[int]:
    """Levels, evenly spaced from the first to the last of a band; the posterior has no width at level 1."""
    return torch.linspace(max(band[0], 2), max(band[1], 2), number).round().int().tolist()


def divergence(
    model: Model, z0: Tensor, levels: Sequence[int], alphas_cumprod: Tensor, generator: torch.Generator, max_batch: int = 256
) -> Tensor:
    """Sum over levels t of KL( q(z_{t-1} | z_t, z_0) || p(z_{t-1} | z_t) ), in nats (paper, section 2.3).

    Both are Gaussians with the variance of q, so that only their means differ.

    Args:
        model: as in :func:`scripts.samplers.ddim`, but with a level for each latent.
        z0: latents (B, embedding_dim, h, w).
        levels: levels t, 1 or more.
        alphas_cumprod: table with one entry a level, entry 0 being 1.
        generator: source of the noise, which is another at every level and the same for each of the batch.
        max_batch: largest number of latents in a call of the model, but all of z0 at one level at least.

    Returns:
        (B, 1, h, w), summed over the channels of a place, too.
    """
    noise = torch.randn(len(levels), *z0.shape[1:], generator=generator).to(z0.device)
    total = torch.zeros_like(z0[:, :1])
    at_once = max(1, max_batch // len(z0))
    for t, eps in zip(torch.as_tensor(levels, device=z0.device).split(at_once), noise.split(at_once), strict=True):
        z = z0.repeat(len(t), 1, 1, 1)
        eps, t = eps.repeat_interleave(len(z0), 0), t.repeat_interleave(len(z0))
        a_t, a_s = (alphas_cumprod[level].float().view(-1, 1, 1, 1) for level in (t, t - 1))
        x = noise_image(z, eps, a_t)
        estimate = (x - (1 - a_t).sqrt() * model(x, t)) / a_t.sqrt()
        mean, variance = posterior(x, z, a_t, a_s)
        kl = gaussian_kl(mean, variance.log(), posterior(x, estimate, a_t, a_s)[0], variance.log())
        total += kl.sum(dim=1, keepdim=True).unflatten(0, (-1, len(z0))).sum(dim=0)
    return total


def heal(
    model: Model, z0: Tensor, mask: Tensor, levels: Sequence[int], alphas_cumprod: Tensor, draw: Draw, solver: str | None
) -> Tensor:
    """Latents whose places inside a mask are drawn by the model (paper, section 2.3).

    Outside the mask every step puts the noised original back: deterministic steps always with the same noise, stochastic
    ones with new.

    Args:
        model: as in :func:`scripts.samplers.ddim`.
        z0: latents (B, embedding_dim, h, w).
        mask: (B, 1, h, w), bool.
        levels: falling grid of levels, from that which the latents are noised to.
        alphas_cumprod: table with one entry a level, entry 0 being 1.
        draw: returns standard normal noise in the shape of its argument.
        solver: one of :data:`scripts.samplers.SOLVERS`; None for stochastic steps.
    """
    first = draw(z0)

    def keep(x: Tensor, t: int, s: int) -> Tensor:
        return torch.where(mask, x, noise_image(z0, first if solver else draw(z0), alphas_cumprod[s].float()))

    x = noise_image(z0, first, alphas_cumprod[levels[0]].float())
    steps = SOLVERS[solver] if solver else partial(ddpm, draw_noise=draw)
    return steps(model, x, levels, alphas_cumprod, correct=keep)


class LatentAnomalyNet(HealthyModel):
    """Find what a latent diffusion model of healthy slices calls unlikely, let it heal that, and take the difference.

    One module holds the VQ-VAE, the U-Net that estimates the noise in noised latents, the mean and standard deviation of
    the latents, and the quantiles of healthy slices. The latents are those before quantisation, standardised.

    Args:
        unet_channels: channels of the U-Net's levels, multiples of 32; the lower two have attention.
        num_res_blocks: residual blocks a level.
        schedule: noise schedule, see :func:`scripts.samplers.alphas_cumprod_table`.
        level_power: training levels are drawn as T·u^level_power, u uniform; above 1 the lower ones come more often.
        autoencoder: arguments of :class:`scripts.networks.vq_autoencoder.SliceVQVAE`.
        kwargs: arguments of :class:`scripts.networks.healthy_model.HealthyModel` and of :class:`LatentSettings`.
    """

    settings_class = LatentSettings

    # the published procedure: 50 levels of the band one after the other, then 500 stochastic steps
    published: ClassVar[Mapping[str, object]] = {
        "variant": "c",
        "band": (400, 600),
        "band_levels": 50,
        "divergence_smoothing": 0.0,
        "texture_offset": 0.0,
        "healings": 1,
        "percentile": 97.5,
        "max_batch": 1,
    }

    def __init__(
        self,
        unet_channels: Sequence[int] = (96, 128, 160),
        num_res_blocks: int = 1,
        schedule: str = "linear",
        level_power: float = 1.5,
        autoencoder: Mapping[str, object] | None = None,
        **kwargs: object,
    ) -> None:
        super().__init__(**kwargs)
        self.level_power = level_power
        self.autoencoder = SliceVQVAE(self.in_channels, **(autoencoder or {}), amp=self.amp)
        embedding_dim = self.autoencoder.embedding_dim
        self.unet = DiffusionModelUNet(
            spatial_dims=2,
            in_channels=embedding_dim,
            out_channels=embedding_dim,
            channels=tuple(unet_channels),
            attention_levels=[level > 0 for level in range(len(unet_channels))],
            num_res_blocks=num_res_blocks,
            num_head_channels=32,
            norm_num_groups=32,
        ).to(memory_format=torch.channels_last)
        self.register_buffer("latent_mean", torch.zeros(1, embedding_dim, 1, 1))
        self.register_buffer("latent_std", torch.ones(1, embedding_dim, 1, 1))
        table = alphas_cumprod_table(schedule, self.settings.num_levels)
        self.register_buffer("alphas_cumprod", table, persistent=False)

    def as_published(self, batches: Iterable[dict]) -> LatentAnomalyNet:
        """A network with these weights, which both share, that follows the published procedure.

        It is calibrated on ``batches``, see :meth:`calibrate`, and takes as many latents at once as this one, which
        changes the speed alone.
        """
        other = self.with_settings(**self.published | {"max_batch": self.settings.max_batch})
        other.calibrate(batches)
        return other

    def variants(self, names: Sequence[str], batches: Iterable[dict]) -> dict[str, LatentAnomalyNet]:
        """Networks for a table, which all share these weights.

        Args:
            names: ``a`` to ``d``, the paper's variants with this network's other settings; ``published``, see
                :meth:`as_published`.
            batches: held-out healthy slices for that.
        """
        return {
            name: self.as_published(batches) if name == "published" else self.with_settings(variant=name) for name in names
        }

    def encode(self, image: Tensor) -> Tensor:
        """Slices (B, C, H, W) in [0, 1] to latents (B, embedding_dim, h, w) with mean 0 and standard deviation 1."""
        return (self.autoencoder.encode(image) - self.latent_mean) / self.latent_std

    def decode(self, latent: Tensor) -> Tensor:
        """Standardised latents (B, embedding_dim, h, w), quantised here, to slices (B, C, H, W)."""
        return self.autoencoder.decode_stage_2_outputs(latent * self.latent_std + self.latent_mean)

    def noise(self, x: Tensor, t: Tensor | int) -> Tensor:
        """The U-Net's estimate of the noise in latents x, (B, embedding_dim, h, w), at level t (one, or one for each)."""
        step = torch.as_tensor(t, device=x.device).sub(1).expand(len(x))  # the network counts from 0
        with autocast(x, self.amp):
            return self.unet(x, step).float()

    def examine(self, image: Tensor) -> tuple[Tensor, Tensor, Mapper]:
        """See :meth:`scripts.networks.healthy_model.HealthyModel.examine`; unlike health is what has a large divergence."""
        latent, settings = self.encode(image), self.settings
        even = nn.functional.adaptive_avg_pool2d(evenness(image, settings.texture_offset), latent.shape[2:])

        def over(band: Sequence[int]) -> Tensor:
            levels = levels_of(band, settings.band_levels)
            total = divergence(self.noise, latent, levels, self.alphas_cumprod, self._generator(0), settings.max_batch)
            return blur(total * even, settings.divergence_smoothing) / len(levels)

        def mapped(threshold: Tensor) -> tuple[Tensor, Tensor]:
            heal = partial(self.heal, generator=self._generator(1))
            kept, mask, variant = self.decode(latent), unlike > threshold, settings.variant
            return map_by_healing(image, kept, latent, mask, heal, settings, variant == "a", variant in "cd")

        unlike = over(settings.band)
        scored = over(settings.score_band) if settings.score_band else unlike
        return unlike, reduced(scored, settings.score), mapped

    def heal(self, latent: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
        """Slices (B, C, H, W) of latents (B, embedding_dim, h, w) that are healed inside ``mask`` (B, 1, h, w)."""
        s = self.settings
        solver, num_steps = (s.solver, s.num_steps) if s.variant == "d" else (None, s.start_level)
        levels = level_grid(s.start_level, num_steps)[::-1]
        draw = partial(self._draw, generator=generator)
        return self.decode(heal(self.noise, latent, mask, levels, self.alphas_cumprod, draw, solver))

    @torch.no_grad()
    def draw(self, number: int, num_steps: int = 100) -> Tensor:
        """Slices (number, C, H, W) in [0, 1] that the model makes from noise alone."""
        shape = (number, self.latent_mean.shape[1], *self.autoencoder.latent_size(self.spatial_size))
        noise = torch.randn(shape, generator=self._generator(0)).to(self.latent_mean.device)
        levels = level_grid(self.settings.num_levels, num_steps)[::-1]
        return self.decode(SOLVERS["multistep"](self.noise, noise, levels, self.alphas_cumprod)).clamp(0, 1)

    @torch.no_grad()
    def standardise(self, batches: Iterable[dict]) -> None:
        """Measure mean and standard deviation of each channel of the latents, before the U-Net's training.

        Args:
            batches: dictionaries with ``image``, the slices (B, C, H, W) in [0, 1] of the training, as they are.
        """
        latents = torch.cat([self.autoencoder.encode(batch["image"].to(self.latent_mean.device)) for batch in batches])
        self.latent_mean.copy_(latents.mean(dim=(0, 2, 3), keepdim=True))
        self.latent_std.copy_(latents.std(dim=(0, 2, 3), keepdim=True))

    def autoencoder_losses(self, image: Tensor, class_label: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Losses of the VQ-VAE, see :meth:`scripts.networks.vq_autoencoder.SliceVQVAE.losses`; no class is needed."""
        return self.autoencoder.losses(image, generator)

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
