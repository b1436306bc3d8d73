"""The VQ-VAE (van den Oord et al. 2017, arXiv 1711.00937) on whose latents models of healthy slices work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from monai.networks.nets import VQVAE
from torch import Tensor

from scripts.losses import SpectralLoss
from scripts.precision import Amp, autocast

__all__ = ["SliceVQVAE"]


class SliceVQVAE(VQVAE):
    """MONAI's VQ-VAE of slices, in the arithmetic that is asked for, with the losses that train it.

    Args:
        in_channels: channels of a slice, C.
        channels: channels of the levels, each of which halves the resolution.
        num_res_layers: residual layers a level.
        num_embeddings: size of the codebook.
        embedding_dim: channels of the latents.
        spectral_weight: weight of the spectral loss (Dhariwal et al. 2020, arXiv 2005.00341, section 3.3).
        amp: bfloat16 in encoder and decoder, see :func:`scripts.precision.autocast`.
    """

    def __init__(
        self,
        in_channels: int = 1,
        channels: Sequence[int] = (64, 128),
        num_res_layers: int = 2,
        num_embeddings: int = 512,
        embedding_dim: int = 4,
        spectral_weight: float = 1.0,
        amp: Amp = False,
    ) -> None:
        super().__init__(
            spatial_dims=2,
            in_channels=in_channels,
            out_channels=in_channels,
            channels=tuple(channels),
            num_res_layers=num_res_layers,
            num_res_channels=tuple(channels),
            downsample_parameters=((2, 4, 1, 1),) * len(channels),
            upsample_parameters=((2, 4, 1, 1, 0),) * len(channels),
            num_embeddings=num_embeddings,
            embedding_dim=embedding_dim,
            decay=0.99,
        )
        self.to(memory_format=torch.channels_last)  # a quarter faster on a CPU
        self.spectral_loss = SpectralLoss(spatial_dims=2)
        self.factor, self.spectral_weight, self.amp = 2 ** len(channels), spectral_weight, amp

    def load_from(self, path: str | Path) -> None:
        """Take the VQ-VAE, and nothing else, from the weights of a model that has one (``model.pt``)."""
        state = torch.load(path, map_location="cpu", weights_only=True)
        prefix = "autoencoder."
        self.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})

    def latent_size(self, spatial_size: Sequence[int]) -> tuple[int, ...]:
        """Height and width (h, w) of the latents of slices of height and width (H, W)."""
        return tuple(edge // self.factor for edge in spatial_size)

    def encode(self, images: Tensor) -> Tensor:
        """Slices (B, C, H, W) in [0, 1] to latents (B, embedding_dim, h, w), before quantisation."""
        with autocast(images, self.amp):
            return super().encode(images).float()

    def decode(self, quantizations: Tensor) -> Tensor:
        """Quantised latents (B, embedding_dim, h, w) to slices (B, C, H, W)."""
        with autocast(quantizations, self.amp):
            return super().decode(quantizations).float()

    def tokens(self, latent: Tensor) -> Tensor:
        """Numbers (B, h, w), int64, of the entries of the codebook that are nearest to latents (B, embedding_dim, h, w).

        Unlike MONAI's ``index_quantize`` it leaves the codebook alone in training, too, and compares in full precision.
        """
        with autocast(latent, False):
            return self.quantizer.quantizer.quantize(latent)[2]

    def losses(self, image: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Losses whose sum the training minimises.

        Args:
            image: healthy slices (B, C, H, W) in [0, 1].
            generator: source of the entries that unused ones of the codebook are replaced by.

        Returns:
            ``reconstruction``: mean absolute error; ``spectral``: squared error of the Fourier amplitudes, times its
            weight; ``commitment``: of the encoder to its codebook.
        """
        latent = self.encode(image)
        if self.training:
            self._revive_entries(latent.detach(), generator)
        quantised, commitment = self.quantize(latent)
        restored = self.decode(quantised)
        return {
            "reconstruction": (restored - image).abs().mean(),
            "spectral": self.spectral_weight * self.spectral_loss(restored, image),
            "commitment": commitment,
        }

    def _revive_entries(self, latent: Tensor, generator: torch.Generator) -> None:
        """Move entries of the codebook that are hardly used to latents of this batch (Dhariwal et al. 2020, section 3.2).

        At the first iteration none has been used, so that the codebook begins with latents.
        """
        quantiser = self.quantizer.quantizer
        unused = (quantiser.ema_cluster_size < 0.05).nonzero()[:, 0]
        if len(unused):
            if dist.is_initialized():  # the codebook must stay the same in all processes
                shares = [torch.empty_like(latent) for _ in range(dist.get_world_size())]
                dist.all_gather(shares, latent.contiguous())
                latent = torch.stack(shares, dim=1).flatten(0, 1)
            places = latent.movedim(1, -1).flatten(0, -2)
            chosen = torch.randint(len(places), (len(unused),), generator=generator, device=generator.device)
            quantiser.embedding.weight.data[unused] = quantiser.ema_w[unused] = places[chosen.to(places.device)]
            quantiser.ema_cluster_size[unused] = 1.0
