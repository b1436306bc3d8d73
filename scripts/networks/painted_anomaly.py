"""DDIM with classifier guidance whose classifier has a logit for each place, and learns from painted anomalies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.networks.layers import GaussianFilter
from torch import Tensor, nn

from scripts.networks.ddim_anomaly import DDIMAnomalyNet
from scripts.samplers import draw_noised, for_batch

__all__ = ["PaintedAnomalyNet", "PlaceLogits"]

RIM = (0.5, 1.0, 1.5)  # pixels, softness of a painted rim
COVERED = 0.2  # share of a place that is painted, above which it counts as diseased
LEAST_AREA = 9  # pixels; what is smaller is no anomaly


class PlaceLogits(nn.Module):
    """A logit of disease for each place of a feature map.

    Args:
        in_channels: channels of the feature map.
        bias: logit before any training; rare, so that a slice of many places is no sure case at once.
    """

    def __init__(self, in_channels: int, bias: float = -4.0) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, in_channels)
        self.out = nn.Linear(in_channels, 1)
        nn.init.constant_(self.out.bias, bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, N) to (B, N)."""
        return self.out(nn.functional.silu(self.norm(x)).transpose(1, 2))[..., 0]


class PaintedAnomalyNet(DDIMAnomalyNet):
    """:class:`DDIMAnomalyNet` for anomalies that are small and hardly darker than the tissue, and so hard to learn.

    A classifier that pools first has to find by itself which of many dark places tells the classes apart. Here each place of
    its lowest feature map has a logit, and a slice is healthy if all of its places are, p(healthy) = product of
    (1 - p_i): the "noisy or" of multiple instance learning (Zhang et al. 2005, Multiple Instance Boosting). It is
    trained as the other is, from slices and their classes (``losses``), or from healthy slices alone, into which anomalies
    are painted (``painted_losses``): each slice comes with its painted twin, with the same noise, and each place is told
    whether it is painted.

    Args:
        places: whether there are any; False for the classifier of :class:`DDIMAnomalyNet`, which pools.
        classifier_channels: see there; None for fewer levels than there, which makes more places.
        contrast: least and largest contrast of what is painted, darker, as grey levels in [0, 1].
        place_weight: weight of the places' cross-entropy in ``painted_losses``; 0 to train by the class alone.
        place_gate: multiply the anomaly map by the probabilities of the places, see :meth:`place_map`.
        kwargs: arguments of :class:`DDIMAnomalyNet`; with ``classifier_alone``, training is a third of the work.

    Raises:
        ValueError: as there, and for a gate of places without any.
    """

    def __init__(
        self,
        places: bool = True,
        classifier_channels: Sequence[int] | None = None,
        contrast: Sequence[float] = (0.025, 0.15),
        place_weight: float = 1.0,
        place_gate: bool = False,
        **kwargs: object,
    ) -> None:
        if place_gate and not places:
            raise ValueError("place_gate needs places: set it to False, or places to True")
        channels = tuple(classifier_channels or ((48, 96, 128) if places else (48, 96, 128, 128)))
        super().__init__(classifier_channels=channels, classifier_attention=-1 if places else -2, **kwargs)
        self.contrast, self.place_weight, self.place_gate = tuple(contrast), place_weight, place_gate
        self.places, self.place_size = places, self.fold.downscale_factor * 2 ** len(channels)
        if places:
            self.classifier.out = nn.Sequential(nn.Unflatten(1, (channels[-1], -1)), PlaceLogits(channels[-1]))

    def classify(self, x: Tensor, t: Tensor | int) -> Tensor:
        """See :meth:`DDIMAnomalyNet.classify`; log probabilities, here."""
        return self._of_slice(self._run(self.classifier, x, t))

    def _of_slice(self, places: Tensor) -> Tensor:
        """Logits of places (B, N), or of classes (B, 2), to log probabilities (B, 2) of the slices' classes."""
        if not self.places:
            return places.log_softmax(dim=1)
        healthy = -nn.functional.softplus(places).sum(dim=1)
        return torch.stack([healthy, torch.log(-torch.expm1(healthy.clamp(max=-1e-6)))], dim=1)

    def analyse(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See :meth:`DDIMAnomalyNet.analyse`."""
        anomaly, healthy, probability = super().analyse(image)
        return anomaly * self.place_map(image) if self.place_gate else anomaly, healthy, probability

    def place_map(self, image: Tensor) -> Tensor:
        """Probability (B, 1, H, W) of disease of each place of slices (B, C, H, W) in [0, 1], without any diffusion."""
        with torch.no_grad():
            places = self._run(self.classifier, 2 * image - 1, 0).sigmoid()
        rows = image.shape[2] // self.place_size
        places = places.view(len(image), 1, rows, -1)
        return nn.functional.interpolate(places, size=image.shape[2:], mode="bilinear", align_corners=False)

    def paint(self, image: Tensor, mask: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Make slices darker in a mask, as far as it lies in what is shown, with a soft rim; the texture stays.

        Args:
            image: slices (B, C, H, W) in [0, 1]; what is 0 is blanked.
            mask: (B, 1, H, W), 0 or 1.
            generator: source of contrast and softness.

        Returns:
            the painted slices, and the mask as far as it is painted; where less than 9 pixels would be, nothing is.
        """
        low, high = self.contrast
        shown = mask * (image > 0).any(dim=1, keepdim=True)
        enough = shown.flatten(1).sum(dim=1).view(-1, 1, 1, 1) >= LEAST_AREA
        mask, shown = mask * enough, shown * enough
        rim = GaussianFilter(2, RIM[int(torch.randint(len(RIM), (), generator=generator))]).to(image.device)
        contrast = low + (high - low) * for_batch(torch.rand, (len(image),), generator, image.device)
        soft = rim(mask.to(image.dtype)) * (image > 0)
        return (image - contrast.view(-1, 1, 1, 1) * soft).clamp(0, 1), shown

    def painted_losses(self, image: Tensor, mask: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Losses on healthy slices and their painted twins, at the same level and with the same noise.

        Args:
            image: healthy slices (B, C, H, W) in [0, 1].
            mask: where to paint, (B, 1, H, W), 0 or 1; a slice without any stays healthy.
            generator: source of levels, noise, contrast and softness.

        Returns:
            ``noise`` and ``variance`` of the U-Net, see :meth:`DDIMAnomalyNet.losses`, on every second slice and the twins
            of the others, unless ``classifier_alone``; ``classifier``: cross-entropy of all of them; ``places``: that of the
            places, times its weight.
        """
        painted, mask = self.paint(image, mask, generator)
        x, t, noise = draw_noised(2 * image - 1, self.alphas_cumprod, generator, self.level_power)
        twin = x + 2 * self._alpha(t).sqrt() * (painted - image)
        found = mask.flatten(1).any(dim=1).long()
        diseased = torch.cat([torch.zeros_like(found), found])
        places = self._run(self.classifier, torch.cat([x, twin]), torch.cat([t, t]))
        losses = {"classifier": nn.functional.nll_loss(self._of_slice(places), diseased)}
        if self.places and self.place_weight:
            losses["places"] = self.place_weight * self._place_loss(places, torch.cat([torch.zeros_like(mask), mask]))
        if not self.classifier_alone:
            every_second = torch.arange(len(x), device=x.device).view(-1, 1, 1, 1) % 2 > 0
            losses |= self._noise_losses(torch.where(every_second, twin, x), t, noise)
        return losses

    def _place_loss(self, places: Tensor, mask: Tensor) -> Tensor:
        """Cross-entropy of the places' logits (B, N), leaving out those that are painted a little.

        What is diseased counts twice, as it is rare.
        """
        covered = nn.functional.avg_pool2d(mask.float(), self.place_size).flatten(1)
        target = (covered > (covered.amax(dim=1, keepdim=True) / 2).clamp(max=COVERED)).float()
        known = ((covered == 0) | (target > 0)).float()
        weight = torch.full_like(places[:1, :1], 2.0)
        each = nn.functional.binary_cross_entropy_with_logits(places, target, reduction="none", pos_weight=weight)
        return (each * known).mean()
