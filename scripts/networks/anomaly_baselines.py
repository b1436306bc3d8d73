"""What latent diffusion is compared with, on the same rails: a VAE, a transformer, and no model at all.

The first two are baselines of Pinaya et al. 2022, arXiv 2206.03461.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.inferers import VQVAETransformerInferer
from monai.networks.nets import DecoderOnlyTransformer, VarAutoEncoder
from monai.utils.ordering import Ordering
from torch import Tensor, nn

from scripts.losses import gaussian_kl
from scripts.networks.healthy_model import HealthyModel, QuantisedModel
from scripts.precision import autocast
from scripts.samplers import for_batch

__all__ = ["DenseVAENet", "EvennessNet", "TransformerAnomalyNet"]

INFERER = VQVAETransformerInferer()  # not an attribute: MONAI's class never initialises the module that it is


class DenseVAENet(HealthyModel):
    """Find what a variational autoencoder with a dense latent can't restore (Baur et al. 2021, arXiv 2004.03271).

    The anomaly map is the absolute error of the restored slice, the mean over the channels; there is no mask.

    Args:
        latent_size: number of latent variables of a slice.
        channels: channels of the levels, each of which halves the resolution.
        kl_weight: weight of the divergence from the prior against the absolute error, summed over the pixels; in other
            words the scale, in grey levels of [0, 1], of the Laplace distribution of a pixel.
        score: ``mean``, the mean error, or ``max``.
        kwargs: arguments of :class:`scripts.networks.healthy_model.HealthyModel`.
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
        self.kl_weight = kl_weight
        self.vae = VarAutoEncoder(
            spatial_dims=2,
            in_shape=(self.in_channels, *self.spatial_size),
            out_channels=self.in_channels,
            latent_size=latent_size,
            channels=tuple(channels),
            strides=(2,) * len(channels),
            norm="batch",  # instance norm, the default, takes away the grey level
            use_mean_at_inference=True,
        )

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance, (B, latent_size) each, of the latents of slices (B, C, H, W) in [0, 1]."""
        with autocast(image, self.amp):
            mean, log_variance = self.vae.encode_forward(image)
        return mean.float(), log_variance.float()

    def decode(self, latent: Tensor) -> Tensor:
        """Latents (B, latent_size) to slices (B, C, H, W) in [0, 1]."""
        with autocast(latent, self.amp):
            return self.vae.decode_forward(latent).float()

    def heal(self, image: Tensor, mask: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Slices (B, C, H, W) in [0, 1] with the pixels of ``mask`` (B, 1, H, W) replaced by the restored ones."""
        return torch.where(mask, self.decode(self.encode(image)[0]), image)

    def unlikeness(self, image: Tensor) -> Tensor:
        """Absolute error (B, 1, H, W) of the restored slices, the mean over the channels of (B, C, H, W) in [0, 1]."""
        return self.examine(image)[0]

    def examine(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Error map (B, 1, H, W), restored slices (B, C, H, W) and scores (B,) of slices (B, C, H, W) in [0, 1]."""
        restored = self.decode(self.encode(image)[0])
        error = (image - restored).abs().mean(dim=1, keepdim=True) * self.evenness(image)
        return error, restored, self._reduce(error)

    def losses(self, image: Tensor, class_label: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """The two terms of the variational bound (Kingma & Welling 2014, arXiv 1312.6114, eq. 3), for each pixel.

        Args:
            image: healthy slices (B, C, H, W) in [0, 1].
            class_label: not used.
            generator: source of the latents' noise.

        Returns:
            ``reconstruction``: mean absolute error; ``kl``: divergence of the latents from the prior N(0, 1) in nats,
            times its weight, divided by the number of pixels and channels.
        """
        mean, log_variance = self.encode(image)
        noise = for_batch(torch.randn, mean.shape, generator, mean.device)
        restored = self.decode(mean + (log_variance / 2).exp() * noise)
        prior = torch.zeros_like(mean)  # its mean and its log variance
        divergence = gaussian_kl(mean, log_variance, prior, prior).sum() / image.numel()
        return {"reconstruction": (restored - image).abs().mean(), "kl": self.kl_weight * divergence}


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

    def unlikeness(self, image: Tensor) -> Tensor:
        """Evenness (B, 1, H, W), in [0, 1], of slices (B, C, H, W) in [0, 1]; 0 in the background."""
        return self.evenness(image) * (image > self.foreground_level).any(dim=1, keepdim=True)

    def examine(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Evenness (B, 1, H, W), the slices (B, C, H, W) themselves and scores (B,) of slices (B, C, H, W) in [0, 1]."""
        unlike = self.unlikeness(image)
        return unlike, image, self._reduce(unlike)


class TransformerAnomalyNet(QuantisedModel):
    """Find the codebook entries that an autoregressive transformer calls unlikely, and draw others in their place.

    Pinaya et al. 2021 (arXiv 2102.11650): the entries of a slice, row by row, are a sequence of tokens; a transformer gives
    the probability of each from those before it. The VQ-VAE is trained before and stays as it is.

    Args:
        attn_layers_dim: width of the transformer, a multiple of ``attn_layers_heads``.
        attn_layers_depth: number of its layers.
        attn_layers_heads: number of attention heads of a layer.
        kwargs: arguments of :class:`scripts.networks.healthy_model.QuantisedModel`.
    """

    def __init__(
        self,
        attn_layers_dim: int = 192,
        attn_layers_depth: int = 6,
        attn_layers_heads: int = 6,
        **kwargs: object,
    ) -> None:
        super().__init__(**kwargs)
        self.num_embeddings = self.autoencoder.num_embeddings
        self.ordering = Ordering("raster_scan", spatial_dims=2, dimensions=(1, *self.latent_size))
        self.transformer = DecoderOnlyTransformer(
            num_tokens=self.num_embeddings + 1,  # the last one begins a sequence
            max_seq_len=self.latent_size[0] * self.latent_size[1],
            attn_layers_dim=attn_layers_dim,
            attn_layers_depth=attn_layers_depth,
            attn_layers_heads=attn_layers_heads,
            use_flash_attention=True,
        )

    def index_quantize(self, image: Tensor) -> Tensor:
        """Tokens (B, h, w), int64, of slices (B, C, H, W) in [0, 1].

        Unlike MONAI's method of this name it leaves the codebook alone in training, too, and finds the nearest entries in
        full precision.
        """
        latent = self.encode(image)
        with autocast(image, False):
            return self.autoencoder.quantizer.quantizer.quantize(latent)[2]

    def _surprise(self, image: Tensor) -> Tensor:
        """-log p(token | tokens before it), (B, h * w) in the sequence's order, in nats."""
        with autocast(image, self.amp):
            logits, tokens, _ = INFERER(image, self, self.transformer, self.ordering, return_latent=True)
        # MONAI's get_likelihood takes the logarithm of a probability, which is -inf where that underflows
        return nn.functional.cross_entropy(logits.float().transpose(1, 2), tokens, reduction="none")

    def unlikeness(self, image: Tensor) -> Tensor:
        """Negative log-likelihood (B, 1, h, w), in nats, of each token of slices (B, C, H, W) in [0, 1].

        See ``texture_offset``, too.
        """
        found = self._surprise(image)[:, self.ordering.get_revert_sequence_ordering()].unflatten(1, (1, *self.latent_size))
        return found * self._places(self.evenness(image))

    def heal(self, image: Tensor, mask: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Slices (B, C, H, W) in [0, 1] with the tokens inside ``mask`` (B, 1, h, w) drawn by the transformer.

        In the sequence's order, each given the tokens before it, those drawn already included.
        """
        order, back = self.ordering.get_sequence_ordering(), self.ordering.get_revert_sequence_ordering()
        tokens = self.index_quantize(image).flatten(1)[:, order]
        mask = mask.flatten(1)[:, order]
        sequence = nn.functional.pad(tokens, (1, 0), value=self.num_embeddings)
        generator = self._generator(1) if generator is None else generator
        # the largest of logits plus Gumbel noise is a draw from their distribution
        noise = -torch.empty(mask.shape[1], self.num_embeddings).exponential_(generator=generator).log().to(image.device)
        for i in mask.any(dim=0).nonzero()[:, 0].tolist():
            drawn = mask[:, i]
            with autocast(image, self.amp):
                logits = self.transformer(sequence[drawn, : i + 1])[:, -1, : self.num_embeddings]
            sequence[drawn, i + 1] = (logits.float() + noise[i]).argmax(dim=1)
        tokens = sequence[:, 1:][:, back].unflatten(1, self.latent_size)
        with autocast(image, self.amp):
            return self.autoencoder.decode_samples(tokens).float()

    def losses(self, image: Tensor, class_label: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Loss of the transformer; the VQ-VAE gets no gradient.

        Args:
            image: healthy slices (B, C, H, W) in [0, 1].
            class_label: not used.
            generator: not used, nothing is drawn.

        Returns:
            ``likelihood``: mean negative log-likelihood of a token, in nats.
        """
        return {"likelihood": self._surprise(image).mean()}
