"""What the models of healthy slices have in common: settings, a calibration, and the step from unlike places to a map.

Such a model learns from healthy slices alone. An anomaly is what it finds unlikely, and what changes when the unlikely
places are replaced by what the model would have expected there (Pinaya et al. 2022, arXiv 2206.03461).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from monai.networks.layers import GaussianFilter
from torch import Tensor, nn

from scripts.networks.slice_network import SliceNetwork
from scripts.precision import Amp
from scripts.transforms import has_foreground

__all__ = ["Calibration", "HealthyModel", "HealthySettings", "blur", "evenness", "map_by_healing", "reduced"]

NUM_QUANTILES = 2001  # of what held-out healthy slices give; 0.05 % apart
SCORE_PERCENTILE = 97.5  # of healthy slices, whose score makes an abnormality of 0.5
WINDOW = 3  # pixels, edge of the windows whose texture is measured

Mapper = Callable[[Tensor], tuple[Tensor, Tensor]]
Heal = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class HealthySettings:
    """Settings of a model of healthy slices that its weights do not depend on.

    Args:
        percentile: places that are more unlike than this percentage of the places of healthy slices are healed.
        smoothing: standard deviation in pixels of the Gaussian filter over the mask that multiplies the residual.
        healings: how often a slice is healed, each time with other noise; the residual is the mean of all (paper: 1).
        texture_offset: what is found counts less where the slice is uneven, see :func:`evenness`; 0 as in the paper.
        score: of a slice: ``max``, the most unlike place, or ``mean``, as in the paper.

    Raises:
        ValueError: for an unknown score, a percentile that is none, no healing, or a negative texture offset.
    """

    percentile: float = 97.5
    smoothing: float = 1.0
    healings: int = 1
    texture_offset: float = 0.0
    score: str = "max"
    measured: ClassVar[tuple[str, ...]] = ("texture_offset", "score")  # with others, a calibration has other quantiles

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            object.__setattr__(self, name, tuple(value) if isinstance(value, list) else value)  # a configuration's list
        if self.score not in ("max", "mean"):
            raise ValueError(f"unknown score '{self.score}': choose max or mean")
        if not 0 <= self.percentile <= 100:
            raise ValueError(f"percentile must lie in 0 ... 100, got {self.percentile}")
        if self.healings < 1:
            raise ValueError(f"healings must be 1 or more, got {self.healings}")
        if self.texture_offset < 0:
            raise ValueError(f"texture_offset must be 0 or more, got {self.texture_offset}")


@dataclass(frozen=True)
class Calibration:
    """What a model makes of held-out healthy slices: quantiles, and the settings that they were measured with.

    Args:
        places: quantiles of how unlike health places are, (``NUM_QUANTILES``,), rising.
        scores: the same of the scores of slices.
        settings: of the model that was measured.
    """

    places: Tensor
    scores: Tensor
    settings: HealthySettings

    def check(self, settings: HealthySettings) -> None:
        """Refuse other settings than the quantiles belong to.

        Raises:
            ValueError: if one of ``settings.measured`` differs.
        """
        pairs = [(name, getattr(self.settings, name), getattr(settings, name)) for name in settings.measured]
        if others := ", ".join(f"{name} {before}, not {now}" for name, before, now in pairs if before != now):
            raise ValueError(
                f"the quantiles of healthy slices were measured with {others}: leave such settings as they were, or measure "
                "anew (network.calibrate; in an evaluation with evaluate.json, --recalibrate True)"
            )

    def threshold(self, settings: HealthySettings) -> Tensor:
        """How unlike the place at ``settings.percentile`` is, a scalar; errors as :meth:`check`."""
        self.check(settings)
        return _quantile(self.places, settings.percentile)

    def abnormality(self, score: Tensor, settings: HealthySettings) -> Tensor:
        """Scores s, (B,), as s / (s + h), h being the 97.5th percentile of healthy slices; errors as :meth:`check`.

        So 0.5 means "as unlike as the most unlike 2.5 % of healthy slices".
        """
        self.check(settings)
        return score / (score + _quantile(self.scores, SCORE_PERCENTILE).clamp(min=1e-12))

    def of_case(self, abnormality: Tensor, percentile: float = SCORE_PERCENTILE) -> float:
        """Abnormality of a case from those of its slices, (N,), see :meth:`abnormality`; 0 stands for an empty slice.

        It is that of the most unlike slice, with h the percentile below which all slices of 97.5 % of healthy cases with as
        many slices lie, if slices were independent; as neighbours are alike, fewer healthy cases are above 0.5.
        ``percentile``: another one that the h of slices and cases is.
        """
        shown = abnormality[abnormality > 0].double().cpu()
        if not len(shown):
            return 0.0
        healthy, one = self.scores.double().cpu(), shown.max().clamp(max=1 - 1e-9)
        score = one / (1 - one) * _quantile(healthy, percentile).clamp(min=1e-12)
        among_many = _quantile(healthy, 100 * (percentile / 100) ** (1 / len(shown))).clamp(min=1e-12)
        return (score / (score + among_many)).item()


def _quantile(quantiles: Tensor, percentile: float) -> Tensor:
    return quantiles.float()[round(percentile / 100 * (NUM_QUANTILES - 1))]


class HealthyModel(SliceNetwork):
    """A model of healthy slices that is calibrated on held-out ones.

    A subclass has ``examine(image)``. The quantiles are buffers and lie among the weights.

    Args:
        in_channels: number of channels, C.
        spatial_size: height and width of a slice.
        min_foreground: slices with a smaller share of foreground are skipped and return zero.
        foreground_level: grey level in [0, 1] above which a pixel counts as foreground.
        seed: see :class:`scripts.networks.slice_network.SliceNetwork`.
        amp: see there.
        calibrated_for: those of the settings that the quantiles among the weights were measured with which may differ; None
            if the weights are to be measured with the settings here, or were.
        settings: those of ``settings_class``.
    """

    settings_class: ClassVar[type[HealthySettings]] = HealthySettings

    def __init__(
        self,
        in_channels: int = 1,
        spatial_size: Sequence[int] = (64, 64),
        min_foreground: float = 0.01,
        foreground_level: float = 0.15,
        seed: int = 0,
        amp: Amp = False,
        calibrated_for: Mapping[str, object] | None = None,
        **settings: object,
    ) -> None:
        super().__init__(in_channels, spatial_size, min_foreground, foreground_level, seed, amp)
        self.settings = self.settings_class(**settings)
        self.calibrated_for = replace(self.settings, **(calibrated_for or {}))
        self.register_buffer("healthy_places", torch.zeros(NUM_QUANTILES))
        self.register_buffer("healthy_scores", torch.zeros(NUM_QUANTILES))

    def examine(self, image: Tensor) -> tuple[Tensor, Tensor, Mapper]:
        """What the model makes of slices (B, C, H, W) in [0, 1].

        Returns:
            how unlike health each place is, (B, 1, h, w), 0 or more, on a grid that divides the slice's; the score of each
            slice, (B,); and a function that takes a threshold of what is unlike to the anomaly map (B, 1, H, W) and
            the healthy version of the slices, (B, C, H, W).
        """
        raise NotImplementedError

    @torch.no_grad()
    def measure(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """How unlike health places (B, 1, h, w) and slices (B,) are, see :meth:`examine`."""
        return self.examine(image)[:2]

    def analyse(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Anomaly map, healthy version and abnormality, see :class:`scripts.networks.slice_network.SliceNetwork`."""
        _, score, mapped = self.examine(image)
        anomaly, healthy = mapped(self.calibration.threshold(self.settings))
        return anomaly, healthy, self.calibration.abnormality(score, self.settings)

    @property
    def calibration(self) -> Calibration:
        """The quantiles, with the settings they were measured with."""
        return Calibration(self.healthy_places, self.healthy_scores, self.calibrated_for)

    def with_settings(self, **changes: object) -> HealthyModel:
        """A network with the same weights, which both share, a calibration of its own and other settings."""
        other = copy.deepcopy(self, memo={id(part): part for part in self.children()})
        other.settings = replace(self.settings, **changes)
        return other

    def load_weights(self, path: str | Path, batches: Iterable[dict] | None = None) -> HealthyModel:
        """Load ``model.pt``, every name of which must be this network's, and return the network, for inference.

        Args:
            path: file of the weights.
            batches: held-out healthy slices to calibrate with; None for the quantiles of the file.

        Raises:
            ValueError: if those belong to other settings.
        """
        self.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        if batches is None:
            self.calibration.check(self.settings)
        else:
            self.calibrate(batches)
        return self.eval()

    @torch.no_grad()
    def calibrate(self, batches: Iterable[dict]) -> None:
        """Measure the quantiles over held-out healthy slices.

        Args:
            batches: dictionaries with ``image``, (B, C, H, W) in [0, 1]; slices without foreground do not count.

        Raises:
            ValueError: if no slice shows any foreground.
        """
        found = []
        was_training = self.training
        self.eval()
        for batch in batches:
            image = batch["image"].to(self.healthy_places.device).float()
            image = image[has_foreground(image, self.foreground_level, self.min_foreground)]
            if len(image):
                found.append(self.measure(image))
        self.train(was_training)
        if not found:
            raise ValueError("no held-out healthy slice shows any foreground: there is nothing to calibrate with")
        steps = torch.linspace(0, 1, NUM_QUANTILES, dtype=torch.float64)
        for buffer, values in zip((self.healthy_places, self.healthy_scores), zip(*found, strict=True), strict=True):
            # torch.quantile takes 16 million values at most
            values = torch.cat([value.flatten() for value in values]).double().cpu().sort().values
            buffer.copy_(values[((len(values) - 1) * steps).round().long()])
        self.calibrated_for = self.settings


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


def evenness(image: Tensor, offset: float) -> Tensor:
    """Factor that what is found in a slice counts by: o / (o + texture), see :func:`local_texture`.

    Models call complex texture unlikely and even regions likely, whatever they show, so that a likelihood must be compared
    with the complexity (Serrà et al. 2020, arXiv 1909.11480).

    Args:
        image: (B, C, H, W) in [0, 1].
        offset: the grey level o; 0 for a factor of 1 everywhere.

    Returns:
        (B, 1, H, W), in (0, 1].
    """
    return offset / (offset + local_texture(image)) if offset else torch.ones_like(image[:, :1])


def blur(x: Tensor, sigma: float) -> Tensor:
    """x, (B, C, H, W), after a Gaussian filter with the standard deviation ``sigma`` in pixels; 0 for none."""
    return GaussianFilter(spatial_dims=2, sigma=sigma).to(x.device)(x) if sigma > 0 else x


def reduced(unlike: Tensor, score: str) -> Tensor:
    """Score (B,) of slices from how unlike their places are, (B, 1, h, w): ``max`` or ``mean``."""
    return unlike.flatten(1).amax(dim=1) if score == "max" else unlike.flatten(1).mean(dim=1)


def map_by_healing(
    image: Tensor,
    kept: Tensor,
    code: Tensor,
    mask: Tensor,
    heal: Heal,
    settings: HealthySettings,
    heal_all: bool = False,
    masked: bool = True,
) -> tuple[Tensor, Tensor]:
    """What changes when the unlike places of slices are replaced by healthy ones (Pinaya et al. 2022, section 2.3).

    Args:
        image: slices (B, C, H, W) in [0, 1].
        kept: the same as the model keeps them where nothing is healed.
        code: what they are healed in, such as latents, (B, ...).
        mask: the unlike places (B, 1, h, w), bool.
        heal: takes ``code`` and a mask of some of the slices to the healed ones, with new noise at every call.
        settings: of the model.
        heal_all: heal the whole slices, not only what is unlike.
        masked: multiply what changes with the smoothed mask.

    Returns:
        anomaly map (B, 1, H, W), 0 or more, and healed slices (B, C, H, W), the first of ``healings``.
    """
    to_heal = torch.ones_like(mask) if heal_all else mask
    healed, residual = kept.clone(), (image - kept).abs()
    ill = to_heal.flatten(1).any(dim=1)  # healing leaves the others as they are
    if ill.any():
        draws = [heal(code[ill], to_heal[ill]) for _ in range(settings.healings)]
        healed[ill] = draws[0]
        residual[ill] = sum((image[ill] - draw).abs() for draw in draws) / len(draws)
    anomaly = residual.mean(dim=1, keepdim=True) * evenness(image, settings.texture_offset)
    if masked:
        anomaly = anomaly * blur(nn.functional.interpolate(mask.float(), image.shape[2:]), settings.smoothing)
    return anomaly, healed
