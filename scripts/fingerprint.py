"""How much a scan is like those that a network was trained on, and in what it is not.

A fingerprint is a few dozen plain figures of a case, as the network sees it, in groups that a person understands: how large
the head is, its grey levels, its sharpness, how brightness is spread over it. The training cases give their mean and spread
(the Mahalanobis distance of Lee et al. 2018, arXiv 1807.03888, on figures that can be named, in place of a network's
features), and the distances of training cases that were left out say what is usual. No network is asked, so that it says
something of scans on which a network is not to be asked.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection, PathLike
from monai.transforms import MapTransform
from torch import Tensor
from torch.nn import functional

from scripts.files import written_aside
from scripts.transforms import has_foreground

__all__ = ["CompareWithTrainingd", "Fingerprint", "figures_of"]

SHRINKAGE = 0.3  # of the covariances towards their diagonal: there are few patients
TOLERANCE = 0.01  # of a figure, a grey level or a hundredth of a size; what differs less does not count
KEPT = 0.9  # share of the training cases, the innermost, that mean and covariance are taken of


def figures_of(slices: Tensor, foreground: float = 0.1) -> dict[str, Tensor]:
    """Figures of a case by their group, each the mean over its slices.

    Args:
        slices: those with enough foreground, (N, C, H, W), grey levels in [0, 1].
        foreground: grey level above which a pixel is foreground, where any channel is.

    Returns:
        ``size``: logarithms of height, width and area of the foreground, as shares of the slice's, and how much of its box
        it fills; ``grey levels``: five percentiles of the foreground and the mean of the rest, for each channel;
        ``sharpness``: logarithms of the mean differences of pixels 1, 2 and 4 apart, inside the foreground, for each
        channel; ``layout``: mean brightness of the 4 x 4 parts of the foreground's box as shares of the whole.
    """
    slices = slices.float()
    mask = (slices > foreground).any(dim=1)
    boxes = [[slice(int(where.min()), int(where.max()) + 1) for where in m.nonzero(as_tuple=True)] for m in mask]
    figures = {
        "size": torch.stack([_size(m, box) for m, box in zip(mask, boxes, strict=True)]),
        "grey levels": torch.stack([_grey_levels(image, m) for image, m in zip(slices, mask, strict=True)]),
        "sharpness": _sharpness(slices, mask),
        "layout": torch.stack([_layout(image[(slice(None), *box)]) for image, box in zip(slices, boxes, strict=True)]),
    }
    return {name: values.double().mean(dim=0) for name, values in figures.items()}


def _size(mask: Tensor, box: Sequence[slice]) -> Tensor:
    height, width = ((edge.stop - edge.start) / n for edge, n in zip(box, mask.shape, strict=True))
    area = mask.float().mean().item()
    return torch.tensor([np.log(height), np.log(width), np.log(area), area / (height * width)])


def _grey_levels(image: Tensor, mask: Tensor) -> Tensor:
    levels = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])
    inside = torch.quantile(image[:, mask], levels, dim=1)
    outside = image[:, ~mask].mean(dim=1).nan_to_num(0.0)  # a slice without air has none
    return torch.cat([inside.flatten(), outside])


def _sharpness(slices: Tensor, mask: Tensor) -> Tensor:
    inner = -functional.max_pool2d(-mask[:, None].float(), 7, stride=1, padding=3)  # the skin's edge is always sharp
    figures = []
    for lag in (1, 2, 4):
        total = 0.0
        for axis in (2, 3):
            n = slices.shape[axis] - lag
            pairs = [(x.narrow(axis, 0, n), x.narrow(axis, lag, n)) for x in (slices, inner)]
            (one, other), (seen, also_seen) = pairs
            both = seen * also_seen
            total = total + ((one - other).abs() * both).sum(dim=(2, 3)) / both.sum(dim=(2, 3)).clamp(min=1)
        figures.append((total + 1e-3).log())
    return torch.cat(figures, dim=1)


def _layout(box: Tensor) -> Tensor:
    parts = functional.adaptive_avg_pool2d(box.mean(dim=0, keepdim=True), 4).flatten()
    return parts / parts.mean()


@dataclass(frozen=True)
class Group:
    """What is usual of a group of figures.

    Args:
        mean: of the training cases.
        precision: inverse of their covariance.
        limit: distance that a share of the training cases, left out when mean and covariance were taken, lies below.
    """

    mean: list[float]
    precision: list[list[float]]
    limit: float = 1.0

    @classmethod
    def of(cls, figures: Tensor) -> Group:
        """Mean and covariance of cases (N, K), without the outermost."""
        kept = figures
        for _ in range(3):
            mean, centred = kept.mean(dim=0), kept - kept.mean(dim=0)
            covariance = centred.T @ centred / len(kept)
            diagonal = torch.diag(covariance.diagonal())
            covariance = (1 - SHRINKAGE) * covariance + SHRINKAGE * diagonal + TOLERANCE**2 * torch.eye(len(diagonal))
            group = cls(mean.tolist(), torch.linalg.inv(covariance).tolist())
            distances = group.distance(figures)
            kept = figures[distances <= distances.quantile(KEPT)]
        return group

    def distance(self, figures: Tensor) -> Tensor:
        """Mahalanobis distance of cases (N, K), divided by the root of K."""
        away = figures - torch.tensor(self.mean, dtype=torch.float64)
        precision = torch.tensor(self.precision, dtype=torch.float64)
        return ((away @ precision * away).sum(dim=1) / figures.shape[1]).clamp(min=0).sqrt()


@dataclass(frozen=True)
class Fingerprint:
    """What is usual of the training cases, group by group.

    Args:
        groups: by name.
        num_cases: number of training cases.
        foreground: grey level above which a pixel is foreground, above the noise of the air.
    """

    groups: Mapping[str, Group]
    num_cases: int
    foreground: float = 0.1

    @classmethod
    def of(cls, cases: Iterable[Tensor], foreground: float = 0.1, share: float = 0.95, folds: int = 5) -> Fingerprint:
        """Measure training cases.

        Args:
            cases: the slices of each, (N, C, H, W), in [0, 1].
            foreground: grey level above which a pixel is foreground.
            share: share of the training cases, each left out in its turn, that lies within a group's limit.
            folds: number of parts that are left out, one after the other.

        Raises:
            ValueError: if there are fewer than 20 cases with foreground.
        """
        shown = [slices for slices in (s[has_foreground(s, foreground)] for s in cases) if len(slices)]
        if len(shown) < 20:
            raise ValueError(f"{len(shown)} cases are too few to say what is usual; give 20 or more.")
        figures = [figures_of(slices, foreground) for slices in shown]
        groups = {}
        for name in figures[0]:
            values = torch.stack([of_case[name] for of_case in figures])
            fold = torch.arange(len(values)) % folds
            left_out = [Group.of(values[fold != k]).distance(values[fold == k]) for k in range(folds)]
            group = Group.of(values)
            limit = max(torch.cat(left_out).quantile(share).item(), 1.0)
            groups[name] = Group(group.mean, group.precision, limit)
        return cls(groups, len(shown), foreground)

    def compare(self, slices: Tensor) -> dict[str, float]:
        """How unlike a case is, group by group: above 1 more than nearly all training cases; empty if it shows nothing.

        Args:
            slices: (N, C, H, W), in [0, 1], of the channels and size of the training's.
        """
        slices = slices[has_foreground(slices, self.foreground)]
        if not len(slices):
            return {}
        figures = figures_of(slices, self.foreground)
        return {name: group.distance(figures[name][None]).item() / group.limit for name, group in self.groups.items()}

    def save(self, path: PathLike) -> None:
        """Write it as JSON, with six digits."""
        with written_aside(Path(path)) as aside:
            rounded = json.loads(json.dumps(asdict(self)), parse_float=lambda text: float(f"{float(text):.6g}"))
            aside.write_text(json.dumps(rounded) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: PathLike) -> Fingerprint:
        """Read what :meth:`save` has written."""
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        return cls(**content | {"groups": {name: Group(**group) for name, group in content["groups"].items()}})


class CompareWithTrainingd(MapTransform):
    """Say in the meta data of a preprocessed image how unlike the training it is, see :meth:`Fingerprint.compare`.

    ``meta["unlike_training"]`` is the largest of the groups' figures, ``meta["unlike_in"]`` names those above 1; both are
    text, since a batch keeps that as it is, and empty of an image that shows nothing.

    Args:
        keys: keys of the images (C, H, W[, D]), as the network sees them, with slices along the last axis.
        path: file of the fingerprint; without one, nothing is said.
        allow_missing_keys: don't raise an error if a key is missing.
    """

    def __init__(self, keys: KeysCollection, path: PathLike | None, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.fingerprint = Fingerprint.load(path) if path is not None and Path(path).is_file() else None

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            if self.fingerprint is not None:
                image = d[key].as_tensor()
                slices = image[None] if image.ndim == 3 else image.movedim(-1, 0)
                ratios = self.fingerprint.compare(slices)
                d[key].meta["unlike_training"] = f"{max(ratios.values()):.2f}" if ratios else ""
                d[key].meta["unlike_in"] = ", ".join(name for name, ratio in ratios.items() if ratio > 1)
        return d
