"""How well models of healthy slices find anomalies where no labels exist; a control without a model; the floor of masks.

The first by sprites painted into held-out healthy slices. Pinaya et al. 2022 (arXiv 2206.03461, section 3.1) measure on
such slices; the figures here have the names of their table.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection, PathLike
from monai.data.utils import affine_to_spacing
from monai.transforms import Compose, GaussianSmooth, MapTransform
from monai.transforms.utils import get_largest_connected_component_mask
from scipy import ndimage
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor, nn

from scripts.bundle import configuration
from scripts.data.labels import LoadLabelsd
from scripts.data.layouts import find_cases
from scripts.data.reading import LoadSequencesd
from scripts.data.slices import SliceDataset
from scripts.files import check_own, own_file
from scripts.inferers import run_in_batches
from scripts.metrics import dice
from scripts.tables import markdown_table, mean_and_std, write_rows
from scripts.tasks.anomaly.figures import contrast_figure, overview
from scripts.tasks.anomaly.metrics import BinnedScores
from scripts.tasks.anomaly.transforms import RandSprited, RemoveSmallLesions
from scripts.thresholds import risk_controlled
from scripts.transforms import MapToMask, has_foreground, upright, with_meta

__all__ = [
    "GreyLevelMapd",
    "choose_floor",
    "healthy_images",
    "paint_sprites",
    "sprite_scores",
    "sprite_table",
    "worst_cases",
]

logger = logging.getLogger(__name__)

FLOORS = np.round(np.linspace(0.01, 0.2, 39), 4).tolist()  # of masks, on trial
FOREGROUND_LEVEL = 0.15  # air in MedNIST's head CT is 0.1
MAX_DRAWS = 10_000
COLUMNS = {
    "best_dice": "⌈DICE⌉",
    "auprc": "AUPRC",
    "auroc": "AUROC",
    "image_auroc": "image AUROC",
    "image_auprc": "image AUPRC",
    "seconds": "s a slice",
}


def healthy_images(dataset: SliceDataset, number: int | None = None) -> Tensor:
    """Healthy slices of a data set that show something, evenly spaced over it.

    Args:
        dataset: slices in memory; those of class 0 are taken.
        number: how many; None for all.

    Returns:
        (N, C, H, W), float32 in [0, 1]; at least 5 % of a slice's pixels are foreground.

    Raises:
        ValueError: if there are fewer than ``number``.
    """
    images = torch.stack([item["image"].float() for item in dataset.slices if item["class_label"] == 0])
    images = images[has_foreground(images, FOREGROUND_LEVEL, share=0.05)]
    if number is None:
        return images
    if number > len(images):
        raise ValueError(f"{number} healthy slices are wanted, the data set has {len(images)}: ask for fewer")
    return images[torch.linspace(0, len(images) - 1, number).round().long()]


def paint_sprites(
    images: Tensor,
    seed: int = 0,
    radius: Sequence[float] = (3, 9),
    contrast: float | Sequence[float] = 0.2,
    texture: float = 0.0,
    level: float = FOREGROUND_LEVEL,
) -> tuple[Tensor, Tensor]:
    """Paint one sprite into the head of each slice, see :class:`scripts.tasks.anomaly.transforms.RandSprited`.

    The head is the largest connected foreground: beside it, CT shows the holder that the head lies in.

    Args:
        images: slices (N, C, H, W) in [0, 1]; one without foreground stays as it is.
        seed: the sprite of a slice depends on it and on the slice's number alone.
        radius: least and largest radius in pixels.
        contrast: least difference between the sprite's grey level and the mean of what it covers, in [0, 0.5]; or the
            least and the largest, between which sprites are drawn again until theirs lies.
        texture: share of what lies there that shows through, in [0, 1].
        level: grey level above which a pixel is foreground.

    Returns:
        painted slices (N, C, H, W), float32, and the sprites' masks (N, 1, H, W), bool.

    Raises:
        ValueError: if the least contrast is not below the largest, or none of many sprites lies between them.
    """
    low, high = contrast if isinstance(contrast, Sequence) else (contrast, 1.0)
    if not low < high:
        raise ValueError(f"the least contrast must be below the largest, got {low} and {high}")
    sprite = RandSprited(["head", "image"], "label", radius=tuple(radius), contrast=low, texture=texture, level=level)
    images = images.float()
    painted, masks = torch.empty_like(images), torch.empty_like(images[:, :1], dtype=torch.bool)
    for i, image in enumerate(images):
        sprite.set_random_state(seed=int(np.random.SeedSequence((seed, i)).generate_state(1)[0]))
        head = image * get_largest_connected_component_mask((image > level).any(dim=0))
        for _ in range(MAX_DRAWS):
            item = sprite({"head": head, "image": image})
            painted[i], masks[i] = item["image"], item["label"] > 0
            change = (painted[i] - image)[:, masks[i, 0]]
            if not change.numel() or change.mean(dim=1).abs().max() <= high:
                break
        else:
            raise ValueError(f"no sprite of {MAX_DRAWS} has a contrast between {low} and {high}: set them further apart")
    return painted, masks


def _pooled(maps: Tensor, masks: Tensor) -> BinnedScores:
    scores = BinnedScores(value_range=(0.0, 1.0))
    scores.add(maps, masks)
    return scores


def sprite_scores(
    network: nn.Module, healthy: Tensor, painted: Tensor, masks: Tensor, batch_size: int = 8
) -> dict[str, float]:
    """How well a network finds painted sprites, and tells painted slices from healthy ones.

    Args:
        network: takes slices (B, C, H, W) in [0, 1] to (B, C + 2, H, W): the map, the healed slice and the abnormality.
        healthy: slices (M, C, H, W) without sprites, of other images than the painted.
        painted: slices (N, C, H, W) with a sprite each.
        masks: the sprites (N, 1, H, W).
        batch_size: slices in a call of the network.

    Returns:
        of the map, over all pixels of the painted slices together, ``best_dice`` (largest Dice of all thresholds, ⌈DICE⌉ in
        the paper), ``best_threshold``, ``auprc`` and ``auroc``; of the abnormality, painted against healthy slices,
        ``image_auroc`` and ``image_auprc``; and ``seconds`` a painted slice, without the network's set-up.

    Raises:
        ValueError: if there is no healthy or no painted slice.
    """
    if not len(healthy) or not len(painted):
        raise ValueError(f"healthy and painted slices are needed, got {len(healthy)} and {len(painted)}")
    run_in_batches(network, painted[:1], batch_size)  # the first call pays for set-up
    output, seconds = run_in_batches(network, painted, batch_size)
    pixels = _pooled(output[:, :1], masks)
    best_dice, best_threshold = pixels.best_dice()

    abnormality = torch.cat([output, run_in_batches(network, healthy, batch_size)[0]])[:, -1].flatten(1).amax(dim=1)
    is_painted = torch.arange(len(abnormality)) < len(painted)
    return {
        "best_dice": best_dice,
        "best_threshold": best_threshold,
        "auprc": pixels.auprc(),
        "auroc": pixels.auroc(),
        "image_auroc": float(roc_auc_score(is_painted, abnormality)),
        "image_auprc": float(average_precision_score(is_painted, abnormality)),
        "seconds": seconds,
    }


def sprite_table(
    networks: Mapping[str, nn.Module],
    images: Tensor,
    output_dir: PathLike,
    seeds: Sequence[int] = (0, 1, 2),
    radius: Sequence[float] = (3, 9),
    contrast: float | Sequence[float] = 0.2,
    texture: float = 0.0,
    batch_size: int = 8,
    contrasts: Sequence[float] | None = None,
    contrast_width: float = 0.05,
    curve_of: Sequence[str] | None = None,
    worst_of: str | None = None,
    num_worst: int = 5,
) -> list[dict]:
    """Compare networks on the same sprites: print a Markdown table, and write the figures it is made of.

    The first half of the slices is painted, the second half stays healthy. Files of ``output_dir``:

    - ``metrics.csv``: a row a network and seed, with the figures of :func:`sprite_scores`;
    - ``metrics_summary.json``: network, figure, ``mean`` and ``std`` over the seeds;
    - ``contrast.csv``, ``contrast.png``: ⌈DICE⌉ over the contrast of the sprites, if ``contrasts`` are given;
    - ``worst_cases.png``: see :func:`worst_cases`, if ``worst_of`` is given.

    Args:
        networks: names and networks, see :func:`sprite_scores`.
        images: healthy slices (N, C, H, W) in [0, 1], see :func:`healthy_images`; those without foreground are left out.
        output_dir: folder of the files, made if it is missing.
        seeds: seeds of the sprites.
        radius: see :func:`paint_sprites`.
        contrast: see there.
        texture: see there.
        batch_size: slices in a call of a network.
        contrasts: least contrasts of the curve, in [0, 0.5].
        contrast_width: the largest contrast of each of its points is this much larger than the least.
        curve_of: names of the networks with a curve; None for all. Curves and worst cases are of the first seed.
        worst_of: name of the network whose worst cases are drawn.
        num_worst: how many.

    Returns:
        the rows of ``metrics.csv``.

    Raises:
        ValueError: for a file of somebody else's in the way, the name of an unknown network, or fewer than two slices with
            foreground.
    """
    curve_of = list(networks) if curve_of is None else curve_of
    for name in (*curve_of, *([worst_of] if worst_of else [])):
        if name not in networks:
            raise ValueError(f"unknown network '{name}': choose among {', '.join(networks)}")
    images = images[has_foreground(images, FOREGROUND_LEVEL, share=0.01)]
    half = len(images) // 2
    to_paint, healthy = images[:half], images[half:]
    folder = Path(output_dir)
    names = ("metrics.csv", "metrics_summary.json", "contrast.csv", "contrast.png", "worst_cases.png")
    check_own(*(folder / name for name in names))

    sprites = {seed: paint_sprites(to_paint, seed, radius, contrast, texture) for seed in seeds}
    rows = []
    for name, network in networks.items():
        for seed, (painted, masks) in sprites.items():
            scores = sprite_scores(network, healthy, painted, masks, batch_size)
            rows.append({"method": name, "seed": seed, **scores})
            logger.info(f"{name}, sprites {seed}: ⌈DICE⌉ {scores['best_dice']:.3f}, {scores['seconds']:.2f} s a slice")
    write_rows(folder / "metrics.csv", rows)

    summary = mean_and_std(rows)
    with own_file(folder / "metrics_summary.json") as aside:
        aside.write_text(json.dumps(summary, indent=4) + "\n", encoding="utf-8")
    table = markdown_table(summary, COLUMNS)
    logger.info(f"{half} painted and {len(healthy)} healthy slices, {len(seeds)} set(s) of sprites\n{table}")

    if contrasts:
        points = []
        for least in contrasts:
            painted, masks = paint_sprites(to_paint, seeds[0], radius, (least, least + contrast_width), texture)
            for name in curve_of:
                maps = run_in_batches(networks[name], painted, batch_size)[0][:, :1]
                points.append({"method": name, "contrast": least, "best_dice": _pooled(maps, masks).best_dice()[0]})
        write_rows(folder / "contrast.csv", points)
        with own_file(folder / "contrast.png") as aside:
            contrast_figure(aside, points)
    if worst_of:
        with own_file(folder / "worst_cases.png") as aside:
            worst_cases(aside, networks[worst_of], *sprites[seeds[0]], num_worst, batch_size)
    return rows


def worst_cases(
    path: PathLike, network: nn.Module, painted: Tensor, masks: Tensor, number: int = 5, batch_size: int = 8
) -> list[int]:
    """Draw the painted slices of lowest Dice as PNG, the worst at the top: input, healed slice, map, mask and sprite.

    Args:
        path: file to write.
        network: see :func:`sprite_scores`.
        painted: slices (N, C, H, W), whose axes run to the patient's left and back, as in MedNIST.
        masks: the sprites (N, 1, H, W).
        number: largest number of slices.
        batch_size: slices in a call of the network.

    Returns:
        the slices' numbers, in the order of the rows.
    """
    output, _ = run_in_batches(network, painted, batch_size)
    _, threshold = _pooled(output[:, :1], masks).best_dice()
    found = output[:, :1] > threshold
    dices = [dice(pred, mask) for pred, mask in zip(found, masks, strict=True)]
    worst = np.argsort(dices, kind="stable")[:number].tolist()
    # the slices as those of a volume, whose second axis overview draws upwards
    volumes = [x.float().movedim(0, -1).flip(2) for x in (painted, output[:, 1:-1], output[:, :1], found, masks)]
    overview(path, *volumes, columns=("input", "healed", "anomaly map", "mask"), slices=worst)
    return worst


class GreyLevelMapd(MapTransform):
    """The map that a control without a diffusion model has: how bright a sequence is, dressed as the network's map is.

    Grey levels, as the network sees them, are smoothed, multiplied by the slice's probability of disease, and set to zero
    near the rim of the head, where scalp and fat are bright. The result lies upright (RAS); its
    voxels are the scan's.

    Args:
        keys: key of the scan (C, H, W, D), in its own unit, with ``meta["intensity_scale"]``.
        output_key: key of the map (1, H, W, D).
        channel: the sequence.
        sigma: standard deviation of the smoothing in mm: in the plane of a slice, and across slices.
        rim: width of what is set to zero, in mm.
        probability_key: key of the probability (1, H, W, D).
        level: grey level, as the network sees it, above which a voxel of any sequence is head.
    """

    def __init__(
        self,
        keys: KeysCollection = "image",
        output_key: str = "control_map",
        channel: int = 0,
        sigma: Sequence[float] = (2.0, 5.0),
        rim: float = 10.0,
        probability_key: str = "probability",
        level: float = 0.1,
    ) -> None:
        super().__init__(keys)
        self.output_key, self.channel, self.sigma, self.rim = output_key, channel, tuple(sigma), rim
        self.probability_key, self.level = probability_key, level

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            scan, probability = upright(d[key]), upright(d[self.probability_key])
            scales = torch.tensor(d[key].meta["intensity_scale"]).view(-1, 1, 1, 1)
            grey = (scan.as_tensor().cpu() / scales).clamp(0, 1)
            spacing = affine_to_spacing(scan.affine, 3).tolist()
            widths = [self.sigma[axis == 2] / size for axis, size in enumerate(spacing)]
            bright = GaussianSmooth(widths)(grey[self.channel : self.channel + 1])
            heads = [ndimage.binary_fill_holes(head) for head in (grey > self.level).any(dim=0).numpy().transpose(2, 0, 1)]
            inside = np.stack([ndimage.distance_transform_edt(head, sampling=spacing[:2]) > self.rim for head in heads], -1)
            gated = bright * probability.as_tensor().cpu() * torch.from_numpy(inside)
            d[self.output_key] = with_meta(torch.as_tensor(gated), like=scan)
        return d


def choose_floor(
    bundle: Path, results: Path, dataset_dir: str, most_ml: float = 1.0, cap_ml: float = 10.0, section: str = "validation"
) -> float:
    """The floor of a mask's threshold (``min_threshold``) that bounds what is found in slices without a lesion.

    By conformal risk control (:func:`scripts.thresholds.risk_controlled`): the loss of a patient is the volume found in
    lesion-free slices, at most ``cap_ml``. If these patients and the next one are exchangeable, and nothing else was chosen
    by these, the expected loss of the next one is at most ``most_ml``.

    Args:
        bundle: folder of the bundle, whose ``threshold``, ``peak_shares`` and ``min_volume`` are taken.
        results: folder of the maps of an evaluation of that section.
        dataset_dir: folder of the cases.
        most_ml: the largest expected loss, in ml a volume.
        cap_ml: the largest loss of a patient, in ml.
        section: section of the cases.

    Raises:
        FileNotFoundError: naming the file, if a case has no map.
        ValueError: if no floor bounds it so far.
    """
    parser = configuration(bundle, "inference")
    threshold, shares, least = (parser.get_parsed_content(key) for key in ("threshold", "peak_shares", "min_volume"))
    read = Compose([LoadSequencesd("image", ["map"], allow_empty=True), LoadLabelsd()])
    remove = RemoveSmallLesions(least)
    dices, volumes = [], []
    for case in find_cases(dataset_dir, parser.get_parsed_content("sequences"), section=section):
        if "label" not in case:
            continue
        path = results / case["case"] / f"{case['case']}_map.nii.gz"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; make it by an evaluation with --section {section}")
        item = read({"image": str(path), "label": case["label"]})
        label = upright(item["label"])[0] > 0
        masks = [upright(remove(MapToMask(threshold, floor, shares)(item["image"])))[0] > 0 for floor in FLOORS]
        healthy = ~label.flatten(0, 1).any(dim=0)
        voxel_ml = abs(float(torch.linalg.det(item["image"].affine[:3, :3]))) / 1000
        dices.append([dice(mask, label) for mask in masks])
        volumes.append([float(mask[..., healthy].sum()) * voxel_ml for mask in masks])
    figures = np.mean(dices, axis=0), np.mean(volumes, axis=0)
    logger.info(f"{len(dices)} patients\n| floor | Dice | ml found in lesion-free slices |\n|---|---|---|")
    logger.info(
        "\n".join(f"| {floor:.3f} | {one:.3f} | {ml:.2f} |" for floor, one, ml in zip(FLOORS, *figures, strict=True))
    )
    floor = risk_controlled(np.minimum(volumes, cap_ml), FLOORS, most_ml, bound=cap_ml)
    logger.info(f"min_threshold {floor:g}: an expected {most_ml:g} ml at most, of each patient {cap_ml:g} ml at most")
    return floor
