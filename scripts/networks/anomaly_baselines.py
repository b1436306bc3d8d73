"""What the anomaly bundles are compared with, on the same rails: a VAE, a transformer, and no model at all.

The first two are baselines of Pinaya et al. 2022, arXiv 2206.03461. The controls at the end have the weights of the bundle
that they stand beside, and its settings, and use as much of it as they say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from monai.networks.nets import DecoderOnlyTransformer, VarAutoEncoder
from monai.utils.ordering import Ordering
from torch import Tensor, nn

from scripts.losses import gaussian_kl
from scripts.networks.ddim_anomaly import DDIMAnomalyNet
from scripts.networks.healthy_model import HealthyModel, Mapper, blur, evenness, map_by_healing, reduced
from scripts.networks.one_step import OneStepNet
from scripts.networks.simplex import SimplexNet
from scripts.networks.slice_network import brightness_map
from scripts.networks.vq_autoencoder import SliceVQVAE
from scripts.precision import Amp, autocast
from scripts.samplers import for_batch

__all__ = [
    "BrightNet",
    "DenseVAE",
    "DenseVAENet",
    "EvennessNet",
    "FlatNet",
    "SmoothNet",
    "TransformerAnomalyNet",
    "VAEOneStepNet",
]


class DenseVAE(VarAutoEncoder):
    """Variational autoencoder of slices with a dense latent (Baur et al. 2021, arXiv 2004.03271).

    Args:
        in_channels: number of channels of a slice, C.
        spatial_size: its height and width.
        latent_size: number of latent variables of a slice.
        channels: channels of the levels, each of which halves the resolution.
        kl_weight: weight of the divergence from the prior against the absolute error, summed over the pixels; in other
            words the scale, in grey levels of [0, 1], of the Laplace distribution of a pixel.
        amp: bfloat16, see :func:`scripts.precision.autocast`.
    """

    def __init__(
        self,
        in_channels: int,
        spatial_size: Sequence[int],
        latent_size: int = 128,
        channels: Sequence[int] = (32, 64, 128, 128),
        kl_weight: float = 1.0,
        amp: Amp = False,
    ) -> None:
        super().__init__(
            spatial_dims=2,
            in_shape=(in_channels, *spatial_size),
            out_channels=in_channels,
            latent_size=latent_size,
            channels=tuple(channels),
            strides=(2,) * len(channels),
            norm="batch",  # instance norm, the default, takes away the grey level
            use_mean_at_inference=True,
        )
        self.kl_weight, self.amp = kl_weight, amp

    def distribution(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance, (B, latent_size) each, of the latents of slices (B, C, H, W) in [0, 1]."""
        with autocast(image, self.amp):
            mean, log_variance = self.encode_forward(image)
        return mean.float(), log_variance.float()

    def decoded(self, latent: Tensor) -> Tensor:
        """Latents (B, latent_size) to slices (B, C, H, W) in [0, 1]."""
        with autocast(latent, self.amp):
            return self.decode_forward(latent).float()

    def restored(self, image: Tensor) -> Tensor:
        """Slices (B, C, H, W) in [0, 1] from the means of their latents."""
        return self.decoded(self.distribution(image)[0])

    def losses(self, image: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """The two terms of the variational bound (Kingma & Welling 2014, arXiv 1312.6114, eq. 3), for each pixel.

        Args:
            image: healthy slices (B, C, H, W) in [0, 1].
            generator: source of the latents' noise.

        Returns:
            ``reconstruction``: mean absolute error; ``kl``: divergence of the latents from the prior N(0, 1) in nats,
            times its weight, divided by the number of pixels and channels.
        """
        mean, log_variance = self.distribution(image)
        noise = for_batch(torch.randn, mean.shape, generator, mean.device)
        restored = self.decoded(mean + (log_variance / 2).exp() * noise)
        prior = torch.zeros_like(mean)  # its mean and its log variance
        divergence = gaussian_kl(mean, log_variance, prior, prior).sum() / image.numel()
        return {"reconstruction": (restored - image).abs().mean(), "kl": self.kl_weight * divergence}


class DenseVAENet(HealthyModel):
    """Find what a variational autoencoder with a dense latent can't restore (Baur et al. 2021, arXiv 2004.03271).

    The anomaly map is the absolute error of the restored slice, the mean over the channels; there is no mask.

    Args:
        latent_size: see :class:`DenseVAE`.
        channels: see there.
        kl_weight: see there.
        score: ``mean``, the mean error, or ``max``.
        kwargs: arguments of :class:`scripts.networks.healthy_model.HealthyModel`, of whose settings the texture offset
            counts.
    """

    def __init__(
        self,
        latent_size: int = 128,
        channels: Sequence[int] = (32, 64, 128, 128),
        kl_weight: float = 1.0,
        score: str = "mean",
        **kwargs: object,
    ) -> None:
        super().__init__(score=score, **kwargs)
        self.vae = DenseVAE(self.in_channels, self.spatial_size, latent_size, channels, kl_weight, self.amp)

    def examine(self, image: Tensor) -> tuple[Tensor, Tensor, Mapper]:
        """See :meth:`scripts.networks.healthy_model.HealthyModel.examine`; what is unlike is the map, of each pixel."""
        restored = self.vae.restored(image)
        error = (image - restored).abs().mean(dim=1, keepdim=True) * evenness(image, self.settings.texture_offset)
        return error, reduced(error, self.settings.score), lambda threshold: (error, restored)

    def losses(self, image: Tensor, class_label: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """See :meth:`DenseVAE.losses`; ``class_label`` is not used."""
        return self.vae.losses(image, generator)


class EvennessNet(HealthyModel):
    """Call foreground unlike health where it is even: a control that needs no training.

    Painted sprites of one grey level are more even than any tissue. What a model finds beyond this control, it finds by what
    it has learned.

    Args:
        kwargs: arguments of :class:`scripts.networks.healthy_model.HealthyModel`; ``texture_offset`` must be above 0.
    """

    def __init__(self, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.healthy_scores.fill_(0.5)  # never measured; of a score in [0, 1] any abnormality keeps the order

    def examine(self, image: Tensor) -> tuple[Tensor, Tensor, Mapper]:
        """See :meth:`scripts.networks.healthy_model.HealthyModel.examine`; unlike, and the map, is evenness in [0, 1]."""
        even = evenness(image, self.settings.texture_offset) * (image > self.foreground_level).any(dim=1, keepdim=True)
        return even, reduced(even, self.settings.score), lambda threshold: (even, image)


class TransformerAnomalyNet(HealthyModel):
    """Find the codebook entries that an autoregressive transformer calls unlikely, and draw others in their place.

    Pinaya et al. 2021 (arXiv 2102.11650): the entries of a slice, row by row, are a sequence of tokens; a transformer gives
    the probability of each from those before it. The VQ-VAE is trained before and stays as it is.

    Args:
        attn_layers_dim: width of the transformer, a multiple of ``attn_layers_heads``.
        attn_layers_depth: number of its layers.
        attn_layers_heads: number of attention heads of a layer.
        autoencoder: arguments of :class:`scripts.networks.vq_autoencoder.SliceVQVAE`.
        kwargs: arguments of :class:`scripts.networks.healthy_model.HealthyModel`.
    """

    def __init__(
        self,
        attn_layers_dim: int = 192,
        attn_layers_depth: int = 6,
        attn_layers_heads: int = 6,
        autoencoder: Mapping[str, object] | None = None,
        **kwargs: object,
    ) -> None:
        super().__init__(**kwargs)
        self.autoencoder = SliceVQVAE(self.in_channels, **(autoencoder or {}), amp=self.amp)
        self.num_embeddings = self.autoencoder.num_embeddings
        size = self.autoencoder.latent_size(self.spatial_size)
        self.ordering = Ordering("raster_scan", spatial_dims=2, dimensions=(1, *size))
        self.transformer = DecoderOnlyTransformer(
            num_tokens=self.num_embeddings + 1,  # the last one begins a sequence
            max_seq_len=size[0] * size[1],
            attn_layers_dim=attn_layers_dim,
            attn_layers_depth=attn_layers_depth,
            attn_layers_heads=attn_layers_heads,
            use_flash_attention=True,
        )

    def _sequence(self, tokens: Tensor) -> Tensor:
        """Tokens (B, h, w) in their order, after the one that begins a sequence: (B, 1 + h * w)."""
        tokens = tokens.flatten(1)[:, self.ordering.get_sequence_ordering()]
        return nn.functional.pad(tokens, (1, 0), value=self.num_embeddings)

    def _places(self, sequence: Tensor, like: Tensor) -> Tensor:
        """What a sequence (B, h * w) has for each place, (B, h, w), as tokens ``like`` have."""
        return sequence[:, self.ordering.get_revert_sequence_ordering()].view(like.shape)

    def surprise(self, tokens: Tensor) -> Tensor:
        """-log p(token | tokens before it), (B, h, w) in nats, of tokens (B, h, w)."""
        sequence = self._sequence(tokens)
        with autocast(tokens, self.amp):
            logits = self.transformer(sequence[:, :-1])
        # MONAI's get_likelihood takes the logarithm of a probability, which is -inf where that underflows
        found = nn.functional.cross_entropy(logits.float().transpose(1, 2), sequence[:, 1:], reduction="none")
        return self._places(found, tokens)

    def examine(self, image: Tensor) -> tuple[Tensor, Tensor, Mapper]:
        """See :meth:`scripts.networks.healthy_model.HealthyModel.examine`; unlike health is what surprises."""
        latent, settings = self.autoencoder.encode(image), self.settings
        tokens = self.autoencoder.tokens(latent)
        even = nn.functional.adaptive_avg_pool2d(evenness(image, settings.texture_offset), tokens.shape[1:])
        unlike = self.surprise(tokens)[:, None] * even

        def mapped(threshold: Tensor) -> tuple[Tensor, Tensor]:
            kept = self.autoencoder.decode_stage_2_outputs(latent)
            heal = partial(self.heal, generator=self._generator(1))
            return map_by_healing(image, kept, tokens, unlike > threshold, heal, settings)

        return unlike, reduced(unlike, settings.score), mapped

    def heal(self, tokens: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
        """Slices (B, C, H, W) of tokens (B, h, w), those inside ``mask`` (B, 1, h, w) drawn by the transformer.

        In the sequence's order, each given the tokens before it, those drawn already included.
        """
        sequence = self._sequence(tokens)
        mask = mask.flatten(1)[:, self.ordering.get_sequence_ordering()]
        # the largest of logits plus Gumbel noise is a draw from their distribution
        noise = -torch.empty(mask.shape[1], self.num_embeddings).exponential_(generator=generator).log().to(mask.device)
        for i in mask.any(dim=0).nonzero()[:, 0].tolist():
            drawn = mask[:, i]
            with autocast(tokens, self.amp):
                logits = self.transformer(sequence[drawn, : i + 1])[:, -1, : self.num_embeddings]
            sequence[drawn, i + 1] = (logits.float() + noise[i]).argmax(dim=1)
        return self.autoencoder.decode_samples(self._places(sequence[:, 1:], tokens))

    def losses(self, image: Tensor, class_label: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Loss of the transformer; the VQ-VAE gets no gradient.

        Args:
            image: healthy slices (B, C, H, W) in [0, 1].
            class_label: not used.
            generator: not used, nothing is drawn.

        Returns:
            ``likelihood``: mean negative log-likelihood of a token, in nats.
        """
        with torch.no_grad():
            tokens = self.autoencoder.tokens(self.autoencoder.encode(image))
        return {"likelihood": self.surprise(tokens).mean()}


class BrightNet(DDIMAnomalyNet):
    """Call bright what is anomalous, in slices that the classifier takes for diseased: no healing.

    The map is that of ``brightness_weights`` alone, times the slice's probability of disease (``gate``); nothing is healthy
    or changed.
    """

    def analyse(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map (B, 1, H, W), the slices themselves, and the probability of disease (B,)."""
        probability = self.probability(image)
        anomaly = brightness_map(image, self.brightness_weights, self.smoothing)
        return anomaly * (probability.view(-1, 1, 1, 1) if self.gate else 1), image, probability


class SmoothNet(OneStepNet):
    """Take the smoothed slice for the healthy one: what a network finds beyond this control, it has learned.

    Args:
        sigma: standard deviation in pixels of the Gaussian filter.
        kwargs: arguments of :class:`scripts.networks.one_step.OneStepNet`.
    """

    def __init__(self, sigma: float = 8.0, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.sigma = sigma

    def heal(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Smoothed slices (B, C, H, W), and that each place may be foreign (ones)."""
        return blur(image, self.sigma), torch.ones_like(image[:, :1])


class FlatNet(SimplexNet):
    """Take one grey level for the healthy slice: what a network finds beyond this control, it has learned.

    Args:
        level: the grey level; 0.4 is the head's median, see :class:`scripts.transforms.ScaleIntensityByForeground`.
        kwargs: arguments of :class:`scripts.networks.simplex.SimplexNet`, whose map it has.
    """

    def __init__(self, level: float = 0.4, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.level = level

    def heal(self, image: Tensor) -> Tensor:
        """That grey level everywhere, (B, C, H, W)."""
        return torch.full_like(image, self.level)


class VAEOneStepNet(OneStepNet):
    """Take what a variational autoencoder restores of a slice for the healthy one, dressed as the one-step method is.

    Args:
        latent_size: see :class:`DenseVAE`.
        kl_weight: see there.
        kwargs: arguments of :class:`scripts.networks.one_step.OneStepNet`.
    """

    def __init__(self, latent_size: int = 128, kl_weight: float = 1.0, **kwargs: object) -> None:
        super().__init__(**kwargs)
        del self.unet
        self.vae = DenseVAE(self.in_channels, self.spatial_size, latent_size, kl_weight=kl_weight, amp=self.amp)

    def heal(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Restored slices (B, C, H, W), and that each place may be foreign (ones)."""
        return self.vae.restored(image), torch.ones_like(image[:, :1])

    def losses(self, image: Tensor, class_label: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """See :meth:`DenseVAE.losses`; ``class_label`` is not used."""
        return self.vae.losses(image, generator)
