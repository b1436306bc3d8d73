"""The dense networks of MedVDM: an autoencoder and the score of its latents (Rguibi et al. 2023, J. Imaging 9:171)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from monai.networks.nets.diffusion_model_unet import get_timestep_embedding
from torch import Tensor, nn
from torch.nn import functional

from scripts.losses import discretised_logistic

__all__ = ["DenseCodec", "DenseScore"]

FIRST_STD = 0.05  # of a code's numbers at the training's begin: small ones take fewer bits


class FiLMBlock(nn.Module):
    """Residual block of dense layers, scaled and shifted by a condition (FiLM, Perez et al. 2018, arXiv 1709.07871)."""

    def __init__(self, size: int, condition_size: int) -> None:
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(size), nn.Linear(size, size), nn.Linear(size, size)
        self.film = nn.Linear(condition_size, 2 * size)
        for layer in (self.film, self.second):  # so that the block begins as the identity
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.film(condition).chunk(2, dim=-1)
        hidden = self.first(functional.silu(self.norm(x)))
        return x + self.second(functional.silu((1 + scale) * hidden + shift))


class DenseResNet(nn.Module):
    """Dense layer, residual blocks with FiLM, dense layer."""

    def __init__(self, in_size: int, hidden_size: int, out_size: int, num_blocks: int, condition_size: int) -> None:
        super().__init__()
        self.first = nn.Linear(in_size, hidden_size)
        self.blocks = nn.ModuleList(FiLMBlock(hidden_size, condition_size) for _ in range(num_blocks))
        self.last = nn.Linear(hidden_size, out_size)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """(B, in_size) and the condition (B, condition_size) to (B, out_size)."""
        x = self.first(x)
        for block in self.blocks:
            x = block(x, condition)
        return self.last(x)


class Condition(nn.Module):
    """Embedding of time, as gamma, and of content, the image's class; two dense layers with swish.

    Args:
        size: of the embedding of time; the result has four times as many numbers.
        gamma_range: gamma that is embedded as step 0 and as step 1000.
        num_classes: number of classes; the number itself stands for an image without one.
    """

    def __init__(self, size: int, gamma_range: Sequence[float], num_classes: int | None) -> None:
        super().__init__()
        self.size, self.gamma_range = size, tuple(gamma_range)
        self.content = nn.Embedding(num_classes + 1, size) if num_classes else None
        self.layers = nn.Sequential(
            nn.Linear(size * (2 if num_classes else 1), 4 * size), nn.SiLU(), nn.Linear(4 * size, 4 * size), nn.SiLU()
        )

    def forward(self, gamma: Tensor, label: Tensor | None) -> Tensor:
        """Gamma (B,) and classes (B,), or None, to (B, 4 * size)."""
        low, high = self.gamma_range
        embedding = get_timestep_embedding(1000 * (gamma - low) / (high - low), self.size)
        if self.content is not None:
            embedding = torch.cat([embedding, self.content(label)], dim=-1)
        return self.layers(embedding)


class DenseCodec(nn.Module):
    """Encoder and decoder, dense residual networks of the same size, with a Bernoulli likelihood of each pixel.

    Args:
        spatial_size: height and width of an image.
        latent_size: number of latent variables.
        hidden_size: width of the residual networks.
        num_blocks: residual blocks of each.
        gamma_range: see :class:`Condition`.
        num_classes: see :class:`Condition`.

    Raises:
        ValueError: for fewer than ``latent_size`` numbers in ``hidden_size``.
    """

    def __init__(
        self,
        spatial_size: Sequence[int],
        latent_size: int,
        hidden_size: int,
        num_blocks: int,
        gamma_range: Sequence[float],
        num_classes: int | None,
    ) -> None:
        super().__init__()
        if hidden_size < latent_size:
            raise ValueError(f"hidden_size ({hidden_size}) must be at least latent_size ({latent_size})")
        self.spatial_size, self.latent_shape = tuple(spatial_size), (latent_size,)
        pixels, condition = math.prod(spatial_size), 128
        self.condition = Condition(condition, gamma_range, num_classes)
        self.encoder = DenseResNet(pixels, hidden_size, latent_size, num_blocks, 4 * condition)
        self.decoder = DenseResNet(latent_size, hidden_size, pixels, num_blocks, 4 * condition)
        self.register_buffer("grey_scale", torch.tensor(0.05))

    @torch.no_grad()
    def begin_linear(self, image: Tensor) -> None:
        """Set encoder and decoder to the principal components of images, for the training to begin with.

        Args:
            image: (B, 1, H, W) in [0, 1].

        Raises:
            ValueError: for fewer images than latent variables.
        """
        # in 64 bits, since LAPACK's last bits differ from process to process, and a training is to be repeatable; and on the
        # CPU, where the solution by least squares bears images that are alike
        image, size = image.double().cpu(), math.prod(self.latent_shape)
        x = 2 * image.flatten(1) - 1
        if len(x) < size:
            raise ValueError(
                f"{len(x)} images for the training are fewer than the {size} latent variables: "
                "give it more images, or a smaller --network_def#latent_size"
            )
        mean = x.mean(dim=0)
        _, singular, axes = torch.pca_lowrank(x - mean, size, center=False, niter=4)
        to_code = axes.T / (singular / len(x) ** 0.5)[:, None]  # of unit variance
        code = functional.pad((x - mean) @ to_code.T, (0, 1), value=1.0)
        log_odds = torch.logit(image.flatten(1), eps=0.02)
        weights = torch.linalg.lstsq(code, log_odds).solution

        encoder, decoder, one = self.encoder, self.decoder, torch.eye(size)
        for layer in (encoder.last, decoder.last):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        encoder.first.weight[:size], encoder.first.bias[:size] = to_code, -to_code @ mean
        encoder.last.weight[:, :size] = FIRST_STD * one
        decoder.first.weight[:size], decoder.first.bias[:size] = one / FIRST_STD, 0
        decoder.last.weight[:, :size] = weights[:-1].T
        decoder.last.bias.copy_(weights[-1])

    def encode(self, image: Tensor, gamma_0: Tensor, label: Tensor | None) -> Tensor:
        """Images (B, 1, H, W) in [0, 1] to f(x), (B, latent_size); ``gamma_0`` is gamma at time 0."""
        return self.encoder(2 * image.flatten(1) - 1, self.condition(gamma_0.expand(len(image)), label))

    def logits(self, z: Tensor, gamma_0: Tensor, label: Tensor | None) -> Tensor:
        """Latents z_0 / sqrt(1 - var_0), (B, latent_size), to the log odds of each pixel, (B, 1, H, W)."""
        return self.decoder(z, self.condition(gamma_0.expand(len(z)), label)).view(-1, 1, *self.spatial_size)

    def decode(self, z: Tensor, gamma_0: Tensor, label: Tensor | None) -> Tensor:
        """Latents z_0 / sqrt(1 - var_0) to the mean of the pixels, images (B, 1, H, W) in [0, 1]."""
        return torch.sigmoid(self.logits(z, gamma_0, label))

    def negative_log_likelihood(
        self, image: Tensor, z: Tensor, gamma_0: Tensor, label: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Of images (B, 1, H, W) in [0, 1] given z_0 / sqrt(1 - var_0), (B,), in nats.

        Returns:
            with grey levels as Bernoulli's probabilities, as in the paper; and ``recon_8bit``, with 8-bit values by a
            logistic distribution of one scale for all pixels around the same mean, which another model of the grey levels
            can be compared with.
        """
        logits = self.logits(z, gamma_0, label)
        bernoulli = functional.binary_cross_entropy_with_logits(logits, image, reduction="none")
        grey = -discretised_logistic(image, torch.sigmoid(logits), self.grey_scale)
        return bernoulli.flatten(1).sum(dim=1), {"recon_8bit": grey.flatten(1).sum(dim=1)}


class DenseScore(nn.Module):
    """Estimate of the noise in the latents: a dense residual network whose output is added to its input.

    Args:
        latent_size: number of latent variables.
        embedding_size: of time, and width of the network.
        num_blocks: residual blocks.
        gamma_range: see :class:`Condition`.
        num_classes: see :class:`Condition`.
    """

    def __init__(
        self, latent_size: int, embedding_size: int, num_blocks: int, gamma_range: Sequence[float], num_classes: int | None
    ) -> None:
        super().__init__()
        self.condition = Condition(embedding_size, gamma_range, num_classes)
        self.network = DenseResNet(latent_size, embedding_size, latent_size, num_blocks, 4 * embedding_size)

    def forward(self, z: Tensor, gamma: Tensor, label: Tensor | None = None) -> Tensor:
        """Noised latents (B, latent_size) at gamma (B,) to the estimated noise, in the shape of z."""
        return z + self.network(z, self.condition(gamma, label))
