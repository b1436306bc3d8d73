"""Slices of scans to train on, and the batches that they come in."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, Randomizable
from monai.transforms.traits import MultiSampleTrait
from monai.utils import convert_to_tensor, ensure_tuple
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from tqdm import tqdm

from scripts.data.cohort import root_cause
from scripts.transforms import has_foreground

__all__ = ["BalancedBatchSampler", "ExtractSlicesd", "ShuffledBatchSampler", "SliceDataset"]

logger = logging.getLogger(__name__)


class ExtractSlicesd(MapTransform, MultiSampleTrait):
    """Cut a preprocessed volume into a list of labelled slices for training.

    Each slice is a dictionary with the image (C, H, W) as a plain float32 tensor, ``class_key`` (0 healthy, 1
    diseased), ``slice`` (index), ``position`` (index / (n - 1), in [0, 1]; 0 for a volume of one slice), and all other
    entries of the volume's dictionary that are no arrays. Slices that show too little of the body are left out.

    The classes come from the mask ``data[label_key]`` (1, H, W, D) if there is one, else from
    ``data[slice_labels_key]``, 0 or 1 for each slice. With a mask, slices with 1 to ``min_lesion_area - 1`` positive
    pixels are ambiguous and left out. A 2-D image (C, H, W) has its class in ``data[class_key]`` and gives one slice,
    whatever it shows. With ``labelled=False``, for training on healthy scans only, every slice has class 0.

    Args:
        keys: keys of the images; the first one decides what is foreground.
        label_key: key of the mask.
        class_key: key of the class, in the result and for 2-D images in the input.
        slice_labels_key: key of the classes of all slices.
        spatial_dim: the spatial axis to cut along.
        foreground_level: grey level above which a pixel is foreground, see :func:`has_foreground`.
        min_foreground: least share of foreground pixels in a slice, in [0, 1]; 0 keeps every slice.
        min_lesion_area: least number of positive pixels in a diseased slice.
        labelled: look for labels; if not, every slice is healthy, and a mask is ignored.
        only: class of the slices to keep; None for all.
        allow_missing_keys: don't raise an error if a key is missing.

    Raises:
        ValueError: with the case's name, if there are no labels, or not as many as slices.
    """

    def __init__(
        self,
        keys: KeysCollection = ("image",),
        label_key: str = "label",
        class_key: str = "class_label",
        slice_labels_key: str = "slice_labels",
        spatial_dim: int = 2,
        foreground_level: float = 0.1,
        min_foreground: float = 0.05,
        min_lesion_area: int = 20,
        labelled: bool = True,
        only: int | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.label_key = label_key
        self.class_key = class_key
        self.slice_labels_key = slice_labels_key
        self.spatial_dim = spatial_dim
        self.foreground_level = foreground_level
        self.min_foreground = min_foreground
        self.min_lesion_area = min_lesion_area
        self.labelled = labelled
        self.kept = (0, 1) if only is None else (only,)

    def __call__(self, data: Mapping[Hashable, Any]) -> list[dict[Hashable, Any]]:
        images = {
            key: convert_to_tensor(data[key], dtype=torch.float32, track_meta=False) for key in self.key_iterator(data)
        }
        used = {*images, self.label_key, self.class_key, self.slice_labels_key}
        rest = {k: v for k, v in data.items() if k not in used and not isinstance(v, (np.ndarray, Tensor))}
        first_key = self.first_key(data)
        case = getattr(data[first_key], "meta", {}).get("filename_or_obj", rest or first_key)

        if images[first_key].ndim == 3:
            if self.labelled and self.class_key not in data:
                raise ValueError(f"{case}: a 2-D image without a class; add its class (0 or 1) as {self.class_key}.")
            label = int(data[self.class_key]) if self.labelled else 0
            return [{**rest, **images, self.class_key: label, "slice": 0, "position": 0.0}]

        stacks = {key: image.movedim(self.spatial_dim + 1, 0) for key, image in images.items()}
        shown = has_foreground(stacks[first_key], self.foreground_level, self.min_foreground)
        classes = self._classes(data, case, len(shown))
        return [
            {
                **rest,
                # a view would keep the whole volume in memory and in every pickle
                **{key: stack[i].clone(memory_format=torch.contiguous_format) for key, stack in stacks.items()},
                self.class_key: classes[i],
                "slice": i,
                "position": i / max(len(shown) - 1, 1),
            }
            for i in range(len(shown))
            if shown[i] and classes[i] in self.kept
        ]

    def _classes(self, data: Mapping[Hashable, Any], case: Any, num_slices: int) -> list[int | None]:
        """0 or 1 for each slice, or None where that is ambiguous."""
        if not self.labelled:
            return [0] * num_slices
        if self.label_key in data:
            mask = convert_to_tensor(data[self.label_key], track_meta=False)
            areas = (mask > 0).movedim(self.spatial_dim + 1, 0).flatten(1).sum(dim=1).tolist()
            labels = [0 if area == 0 else 1 if area >= self.min_lesion_area else None for area in areas]
        elif self.slice_labels_key in data:
            labels = [int(label) for label in data[self.slice_labels_key]]
        else:
            raise ValueError(
                f"{case}: no labels; add a mask as {self.label_key}, or 0 or 1 for each slice as {self.slice_labels_key}."
            )
        if len(labels) != num_slices:
            raise ValueError(f"{case}: {len(labels)} slice labels for {num_slices} slices; give one for each slice.")
        return labels


class SliceDataset(Dataset):
    """Labelled slices of a list of cases, held in memory in half precision (1 MB for 10 slices of 3 x 128 x 128).

    Args:
        data: cases, with ``label``, ``slice_labels`` or ``class_label``.
        transform: preprocessing that ends with :class:`scripts.data.slices.ExtractSlicesd`; without it a case is trained on
            as a whole, as if it were one slice of class 0.
        augmentation: random transforms of a slice, or None.
        classes: the classes that the slices must have, all of them and no other; (0,) for healthy slices alone.
        masks: keep the ``label`` (1, H, W) of each slice, which the preprocessing cuts with the image, 1 where above 0.

    Raises:
        ValueError: naming every case that can't be read, before any training, or if a class has no slice, or if there
            are slices of another class.
    """

    def __init__(
        self,
        data: Sequence[dict],
        transform: Callable,
        augmentation: Callable | None = None,
        classes: Sequence[int] = (0, 1),
        masks: bool = False,
    ) -> None:
        self.augmentation, self.masks = augmentation, masks
        self.slices: list[dict] = []
        failures = []
        for case in tqdm(data, desc="reading cases", disable=None):
            # MONAI Label's cases are {"image", "label"} without a name
            name = case.get("case") or Path(next(filter(None, ensure_tuple(case["image"])))).name
            if "failure" in case:
                failures.append(f"{name}: {case['failure']}")
                continue
            try:
                if "failure" in case:
                    raise ValueError(case["failure"])
                slices = transform({**case, "case": name})
            except Exception as error:
                failures.append(f"{name}: {root_cause(error)}")
                continue
            slices = slices if isinstance(slices, list) else [{"class_label": 0, "position": 0.0, **slices}]
            self.slices += [{"case": name, **s, "image": s["image"].half(), **self._mask(s)} for s in slices]
        if failures:
            raise ValueError(f"{len(failures)} of {len(data)} cases can't be used for training:\n" + "\n".join(failures))
        self.class_labels = np.array([s["class_label"] for s in self.slices])
        self.positions = np.array([s["position"] for s in self.slices])
        self.cases = np.array([s.get("patient", s["case"]) for s in self.slices])
        found = sorted(set(self.class_labels.tolist()))
        if found != sorted(classes):
            wanted = " and ".join(f"{('healthy', 'diseased')[label]} ({label})" for label in sorted(classes))
            raise ValueError(
                f"training needs {wanted} slices{' alone' if len(classes) == 1 else ''}, "
                f"found the classes {found} in {len(data)} cases"
            )
        counts = ", ".join(f"{(self.class_labels == label).sum()} of class {label}" for label in found)
        logger.info(f"{len(data)} cases with {len(self.slices)} slices: {counts}")

    def _mask(self, item: Mapping[Hashable, Any]) -> dict[str, Tensor]:
        """The mask of a slice, if masks are kept, a byte a pixel."""
        return {"label": (item["label"] > 0).to(torch.uint8)} if self.masks else {}

    def __len__(self) -> int:
        return len(self.slices)

    def __getitem__(self, key: int | tuple[int, int]) -> dict:
        """Slice ``index``, or ``(index, seed)`` with the seed of its augmentation."""
        index, seed = key if isinstance(key, tuple) else (key, None)
        item = {"image": self.slices[index]["image"].float(), "class_label": self.slices[index]["class_label"]}
        if self.masks:
            item["label"] = self.slices[index]["label"].float()
        if self.augmentation is None or seed is None:
            return item
        if isinstance(self.augmentation, Randomizable):
            self.augmentation.set_random_state(seed=seed)
        return self.augmentation(item)

    def slices_by_case(self) -> list[Tensor]:
        """The slices of each case, (N, C, H, W)."""
        found: dict[str, list[Tensor]] = {}
        for item in self.slices:
            found.setdefault(item["case"], []).append(item["image"].float())
        return [torch.stack(slices) for slices in found.values()]


class BalancedBatchSampler(Sampler):
    """Endless batches, half healthy and half diseased, each a function of the seed and its number alone.

    So training that is cut off resumes with exactly the batches that were to come: set ``start`` and iterate. Healthy
    slices are drawn mostly from where in the volume diseased ones lie; otherwise the classifier learns the height of a
    slice in the head in place of the lesion.

    Args:
        dataset: has ``class_labels``, ``positions`` (0 ... 1) and, for ``by_case``, ``cases``, one for each slice.
        batch_size: slices in a batch of this process.
        matched: share of the healthy slices that is drawn by the positions of the diseased; the rest evenly.
        by_case: draw the cases evenly, however many slices of a class they have; if not, the slices.
        seed: seed of all batches.
        rank: number of this process: of batches of ``world_size * batch_size`` slices, which one process would take, it gets
            every ``world_size``-th slice, beginning with this one.
        world_size: number of processes.
    """

    def __init__(
        self,
        dataset: SliceDataset,
        batch_size: int,
        matched: float = 0.7,
        by_case: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.batch_size, self.seed, self.start = batch_size, seed, 0
        self.rank, self.world_size = rank, world_size
        self.healthy, self.diseased = (np.flatnonzero(dataset.class_labels == label) for label in (0, 1))
        bins = np.minimum((dataset.positions * 10).astype(int), 9)
        counts = [np.bincount(bins[part], minlength=10) for part in (self.healthy, self.diseased)]
        weight = (counts[1] / np.maximum(counts[0], 1))[bins[self.healthy]]
        evenly = np.full(len(self.healthy), 1 / len(self.healthy))
        self.weight = matched * weight / weight.sum() + (1 - matched) * evenly if weight.sum() else evenly
        self.diseased_weight = None
        if by_case:
            self.weight, self.diseased_weight = (
                self._share_by_case(dataset.cases[part], weight)
                for part, weight in ((self.healthy, self.weight), (self.diseased, np.ones(len(self.diseased))))
            )

    @staticmethod
    def _share_by_case(cases: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """Weights that keep their proportions within each case, and whose sum is the same for all cases, 1 together."""
        _, case = np.unique(cases, return_inverse=True)
        share = weight / np.maximum(np.bincount(case, weights=weight)[case], 1e-12)  # none where a case has no weight
        return share / share.sum()

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for iteration in itertools.count(self.start):
            rng = np.random.default_rng([self.seed, iteration])
            size = self.batch_size * self.world_size
            num_diseased = size // 2
            chosen = np.concatenate(
                [
                    rng.choice(self.diseased, num_diseased, p=self.diseased_weight),
                    rng.choice(self.healthy, size - num_diseased, p=self.weight),
                ]
            )
            seeds = rng.integers(2**31, size=size)
            yield list(zip(chosen.tolist(), seeds.tolist(), strict=True))[self.rank :: self.world_size]


class ShuffledBatchSampler(Sampler):
    """Endless batches that go through all slices, in a new order each pass, each a function of the seed and its number.

    As :class:`BalancedBatchSampler`, training resumes exactly if ``start`` is set. The passes lie end to end: a batch
    may end one and begin the next, and so a dataset may be smaller than a batch.

    Args:
        dataset: the slices; only their number counts.
        batch_size: slices in a batch of this process.
        seed: seed of all batches.
        rank: number of this process: of batches of ``world_size * batch_size`` slices, which one process would take, it gets
            every ``world_size``-th slice, beginning with this one.
        world_size: number of processes.
    """

    def __init__(self, dataset: Sized, batch_size: int, seed: int = 0, rank: int = 0, world_size: int = 1) -> None:
        self.length, self.batch_size, self.seed, self.start = len(dataset), batch_size, seed, 0
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for iteration in itertools.count(self.start):
            size = self.batch_size * self.world_size
            places = range(iteration * size, (iteration + 1) * size)
            orders = {p: self._order(p) for p in {place // self.length for place in places}}
            chosen = [int(orders[place // self.length][place % self.length]) for place in places]
            seeds = np.random.default_rng([self.seed, 1, iteration]).integers(2**31, size=size)
            yield list(zip(chosen, seeds.tolist(), strict=True))[self.rank :: self.world_size]

    def _order(self, number: int) -> np.ndarray:
        """Order of the slices in a pass."""
        return np.random.default_rng([self.seed, 0, number]).permutation(self.length)
