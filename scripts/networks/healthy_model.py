"""What the models of healthy slices have in common: from an estimate of how unlike health each place is to a map.

Such a model learns from healthy slices alone. An anomaly is what it finds unlikely, and what changes when the unlikely
places are replaced by what the model would have expected there (Pinaya et al. 2022, arXiv 2206.03461).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from monai.networks.layers import GaussianFilter
from monai.networks.nets import VQVAE
from torch import Tensor, nn

from scripts.losses import SpectralLoss
from scripts.networks.slice_network import SliceNetwork
from scripts.precision import autocast
from scripts.transforms import has_foreground

__all__ = ["HealthyModel", "QuantisedModel", "local_texture"]

NUM_QUANTILES = 2001  # of what held-out healthy slices give; 0.05 % apart
SCORE_PERCENTILE = 97.5  # of healthy slices, whose score makes an abnormality of 0.5
WINDOW = 3  # pixels, edge of the windows whose texture is measured


def local_texture(image: Tensor) -> Tensor:
    """How uneven slices are around each pixel.

    A window of 3 x 3 pixels is as uneven as the mean absolute difference of its neighbours along one axis, plus that along
    the other. A pixel gets the least of all windows that it lies in, so that the edge of an even region is as even as its
    inside.

    Args:
        image: (B, C, H, W).

    Returns:
        (B, 1, H, W), in the unit of the image, 0 or more; the mean over the channels.
    """
    down = nn.functional.avg_pool2d(image.diff(dim=2).abs(), (WINDOW - 1, WINDOW), stride=1)
    across = nn.functional.avg_pool2d(image.diff(dim=3).abs(), (WINDOW, WINDOW - 1), stride=1)
    windows = nn.functional.pad((down + across).mean(dim=1, keepdim=True), (WINDOW - 1,) * 4, value=torch.inf)
    return -nn.functional.max_pool2d(-windows, WINDOW, stride=1)


class HealthyModel(SliceNetwork):
    """A model of healthy slices that makes an anomaly map, a healed slice and a score.

    A subclass has ``unlikeness(image)``, a map (B, 1, h, w), 0 or more, on a grid that divides the slice's, and
    ``heal(image, mask, generator)``, which returns the slice (B, C, H, W) with the places of ``mask``, (B, 1, h, w) bool,
    replaced by what the model expects there. The quantiles of ``unlikeness`` and of ``score`` over held-out healthy slices
    are buffers and lie among the weights; :meth:`calibrate` measures them after training.

    Args:
        in_channels: number of channels, C.
        spatial_size: height and width of a slice.
        percentile: places that are more unlike than this percentage of the places of healthy slices are healed.
        smoothing: standard deviation in pixels of the Gaussian filter over the mask that multiplies the residual.
        masked_map: multiply the residual with the smoothed mask.
        heal_all: replace the whole slice, not only what is unlike.
        healings: how often a slice is healed, each time with other noise; the residual is the mean of all (paper: 1).
        texture_offset: what is found counts less where the slice is uneven, by the factor o / (o + texture), o being this
            grey level and the texture that of :func:`local_texture`; 0 for no such factor, as in the paper. Models call
            complex texture unlikely and even regions likely, whatever they show, so that a likelihood must be compared
            with the complexity (Serrà et al. 2020, arXiv 1909.11480).
        score: ``max``, the most unlike place, or ``mean``, as in the paper.
        min_foreground: slices with a smaller share of foreground are skipped and return zero.
        foreground_level: grey level in [0, 1] above which a pixel counts as foreground.
        kwargs: ``seed`` and ``amp``, see :class:`scripts.networks.slice_network.SliceNetwork`.

    Raises:
        ValueError: for an unknown score, a percentile that is none, no healing, or a negative texture offset.
    """

    def __init__(
        self,
        in_channels: int = 1,
        spatial_size: Sequence[int] = (64, 64),
        percentile: float = 97.5,
        smoothing: float = 1.0,
        masked_map: bool = True,
        heal_all: bool = False,
        healings: int = 1,
        texture_offset: float = 0.0,
        score: str = "max",
        min_foreground: float = 0.01,
        foreground_level: float = 0.15,
        **kwargs: object,
    ) -> None:
        super().__init__(in_channels, spatial_size, min_foreground, foreground_level, **kwargs)
        if score not in ("max", "mean"):
            raise ValueError(f"unknown score '{score}': choose max or mean")
        if not 0 <= percentile <= 100:
            raise ValueError(f"percentile must lie in 0 ... 100, got {percentile}")
        if healings < 1:
            raise ValueError(f"healings must be 1 or more, got {healings}")
        if texture_offset < 0:
            raise ValueError(f"texture_offset must be 0 or more, got {texture_offset}")
        self.percentile, self.smoothing, self.healings, self.texture_offset = percentile, smoothing, healings, texture_offset
        self.masked_map, self.heal_all, self.reduction = masked_map, heal_all, score
        self.register_buffer("healthy_places", torch.zeros(NUM_QUANTILES))
        self.register_buffer("healthy_scores", torch.zeros(NUM_QUANTILES))

    def load_weights(self, path: str | Path) -> HealthyModel:
        """Load ``model.pt``, every name of which must be this network's, and return the network, for inference."""
        self.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        return self.eval()

    def unlikeness(self, image: Tensor) -> Tensor:
        """How unlike health each place of slices (B, C, H, W) in [0, 1] is: (B, 1, h, w), 0 or more."""
        raise NotImplementedError

    def heal(self, image: Tensor, mask: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Slices (B, C, H, W) in [0, 1] with the places of ``mask`` (B, 1, h, w) replaced by healthy ones.

        ``generator`` is the source of the noise; None for one that the seed gives.
        """
        raise NotImplementedError

    def restore(self, image: Tensor) -> Tensor:
        """Slices (B, C, H, W) in [0, 1] as the model keeps them when nothing is healed."""
        return image

    def shared(self, image: Tensor) -> dict[str, Tensor]:
        """Arguments by name that ``unlikeness``, ``heal``, ``restore`` and ``score`` all take, to be computed once."""
        return {}

    def evenness(self, image: Tensor) -> Tensor:
        """Factor (B, 1, H, W), in (0, 1], that what is found in slices (B, C, H, W) counts by, see ``texture_offset``."""
        if not self.texture_offset:
            return torch.ones_like(image[:, :1])
        return self.texture_offset / (self.texture_offset + local_texture(image))

    def _reduce(self, unlike: Tensor) -> Tensor:
        return unlike.flatten(1).amax(dim=1) if self.reduction == "max" else unlike.flatten(1).mean(dim=1)

    @torch.no_grad()
    def score(self, image: Tensor, unlike: Tensor | None = None) -> Tensor:
        """Score (B,) of slices (B, C, H, W) in [0, 1]: the larger, the less the slice looks healthy.

        ``unlike`` is ``unlikeness(image)``, to be given if it is known already.
        """
        return self._reduce(self.unlikeness(image.float()) if unlike is None else unlike)

    def quantile(self, buffer: str, percentile: float) -> Tensor:
        """Percentile of ``healthy_places`` or ``healthy_scores``, a scalar."""
        return getattr(self, buffer).float()[round(percentile / 100 * (NUM_QUANTILES - 1))]

    def examine(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Anomaly map (B, 1, H, W), healed slices (B, C, H, W) and scores (B,) of slices (B, C, H, W) in [0, 1]."""
        shared = self.shared(image)
        unlike = self.unlikeness(image, **shared)
        mask = unlike > self.quantile("healthy_places", self.percentile)
        to_heal = torch.ones_like(mask) if self.heal_all else mask
        healed = self.restore(image, **shared).clone()
        difference = (image - healed).abs()
        ill = to_heal.flatten(1).any(dim=1)  # healing leaves the others as they are
        if ill.any():
            generator, shared_of_ill = self._generator(1), {name: value[ill] for name, value in shared.items()}
            draws = [self.heal(image[ill], to_heal[ill], generator, **shared_of_ill) for _ in range(self.healings)]
            healed[ill] = draws[0]
            difference[ill] = sum((image[ill] - draw).abs() for draw in draws) / len(draws)
        anomaly = difference.mean(dim=1, keepdim=True) * self.evenness(image)
        if self.masked_map:
            anomaly = anomaly * self.smooth(mask)
        return anomaly, healed, self.score(image, unlike, **shared)

    def smooth(self, mask: Tensor) -> Tensor:
        """A mask (B, 1, h, w) on the slice's grid, (B, 1, H, W), its border smoothed outwards and inwards, in [0, 1]."""
        mask = nn.functional.interpolate(mask.float(), self.spatial_size, mode="nearest")
        return GaussianFilter(spatial_dims=2, sigma=self.smoothing).to(mask.device)(mask) if self.smoothing > 0 else mask

    @torch.no_grad()
    def calibrate(self, batches: Iterable[dict]) -> None:
        """Measure the quantiles of the unlikeness and of the score over held-out healthy slices.

        Args:
            batches: dictionaries with ``image``, (B, C, H, W) in [0, 1]; slices without foreground do not count.

        Raises:
            ValueError: if no slice shows any foreground.
        """
        places, scores = [], []
        was_training = self.training
        self.eval()
        for batch in batches:
            image = batch["image"].to(self.healthy_places.device).float()
            image = image[has_foreground(image, self.foreground_level, self.min_foreground)]
            if len(image):
                shared = self.shared(image)
                unlike = self.unlikeness(image, **shared)
                places.append(unlike.flatten())
                scores.append(self.score(image, unlike, **shared))
        self.train(was_training)
        if not places:
            raise ValueError("no held-out healthy slice shows any foreground: there is nothing to calibrate with")
        steps = torch.linspace(0, 1, NUM_QUANTILES, dtype=torch.float64)
        for buffer, values in ((self.healthy_places, places), (self.healthy_scores, scores)):
            values = torch.cat(values).double().cpu().sort().values  # torch.quantile takes 16 million values at most
            buffer.copy_(values[((len(values) - 1) * steps).round().long()])

    def analyse(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Anomaly map (B, 1, H, W), healed slices (B, C, H, W) and abnormality (B,) of slices (B, C, H, W) in [0, 1].

        The abnormality is score / (score + h) with the 97.5th percentile h of the scores of healthy slices, so that 0.5
        means "as unlike as the most unlike 2.5 % of healthy slices".
        """
        anomaly, healed, score = self.examine(image)
        healthy = self.quantile("healthy_scores", SCORE_PERCENTILE).clamp(min=1e-12)
        return anomaly, healed, score / (score + healthy)


class QuantisedModel(HealthyModel):
    """A model of healthy slices that works on the latents of a VQ-VAE (van den Oord et al. 2017, arXiv 1711.00937).

    Args:
        channels: channels of the VQ-VAE's levels, each of which halves the resolution.
        num_res_layers: residual layers a level.
        num_embeddings: size of the codebook.
        embedding_dim: channels of the latents.
        spectral_weight: weight of the spectral loss (Dhariwal et al. 2020, arXiv 2005.00341, section 3.3).
        kwargs: arguments of :class:`HealthyModel`.
    """

    def __init__(
        self,
        channels: Sequence[int] = (64, 128),
        num_res_layers: int = 2,
        num_embeddings: int = 512,
        embedding_dim: int = 4,
        spectral_weight: float = 1.0,
        **kwargs: object,
    ) -> None:
        super().__init__(**kwargs)
        self.autoencoder = VQVAE(
            spatial_dims=2,
            in_channels=self.in_channels,
            out_channels=self.in_channels,
            channels=tuple(channels),
            num_res_layers=num_res_layers,
            num_res_channels=tuple(channels),
            downsample_parameters=((2, 4, 1, 1),) * len(channels),
            upsample_parameters=((2, 4, 1, 1, 0),) * len(channels),
            num_embeddings=num_embeddings,
            embedding_dim=embedding_dim,
            decay=0.99,
        ).to(memory_format=torch.channels_last)  # a quarter faster on a CPU
        self.spectral_loss = SpectralLoss(spatial_dims=2)
        self.spectral_weight = spectral_weight
        self.latent_size = tuple(edge // 2 ** len(channels) for edge in self.spatial_size)

    def load_autoencoder(self, path: str | Path) -> None:
        """Take the VQ-VAE, and nothing else, from the weights of such a model (``model.pt``)."""
        state = torch.load(path, map_location="cpu", weights_only=True)
        prefix = "autoencoder."
        self.autoencoder.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})

    def encode(self, image: Tensor) -> Tensor:
        """Slices (B, C, H, W) in [0, 1] to latents (B, embedding_dim, h, w), before quantisation."""
        with autocast(image, self.amp):
            return self.autoencoder.encode(image).float()

    def decode(self, latent: Tensor) -> Tensor:
        """Latents (B, embedding_dim, h, w), quantised here, to slices (B, C, H, W)."""
        quantised, _ = self.autoencoder.quantize(latent)
        with autocast(latent, self.amp):
            return self.autoencoder.decode(quantised).float()

    def _places(self, pixels: Tensor) -> Tensor:
        """Mean over the pixels of each place of the latents: (B, 1, H, W) to (B, 1, h, w)."""
        return nn.functional.adaptive_avg_pool2d(pixels, self.latent_size)

    def restore(self, image: Tensor) -> Tensor:
        """Slices (B, C, H, W) in [0, 1] after encoding, quantisation and decoding."""
        return self.decode(self.encode(image))

    def autoencoder_losses(self, image: Tensor, class_label: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Losses of the VQ-VAE, whose sum its training minimises.

        Args:
            image: healthy slices (B, C, H, W) in [0, 1].
            class_label: not used.
            generator: source of the entries that unused ones of the codebook are replaced by.

        Returns:
            ``reconstruction``: mean absolute error; ``spectral``: squared error of the Fourier amplitudes, times its
            weight; ``commitment``: of the encoder to its codebook.
        """
        latent = self.encode(image)
        if self.training:
            self._revive_entries(latent.detach(), generator)
        quantised, commitment = self.autoencoder.quantize(latent)
        with autocast(image, self.amp):
            restored = self.autoencoder.decode(quantised).float()
        return {
            "reconstruction": (restored - image).abs().mean(),
            "spectral": self.spectral_weight * self.spectral_loss(restored, image),
            "commitment": commitment,
        }

    def _revive_entries(self, latent: Tensor, generator: torch.Generator) -> None:
        """Move entries of the codebook that are hardly used to latents of this batch (Dhariwal et al. 2020, section 3.2).

        At the first iteration none has been used, so that the codebook begins with latents.
        """
        quantiser = self.autoencoder.quantizer.quantizer
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
