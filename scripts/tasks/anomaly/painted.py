"""How well tumours that were painted into pictures of healthy organs are found, over their contrast and size."""

from __future__ import annotations

import csv
import logging
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from monai.config import PathLike
from PIL import Image
from scipy import ndimage
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from scripts.data.layouts import PICTURES, folder_pair, stem_of, visible
from scripts.data.sections import section_of
from scripts.inferers import run_in_batches
from scripts.metrics import bootstrap_interval, dice
from scripts.organs import likely_organ
from scripts.tables import write_rows

__all__ = ["in_frame", "outside_check", "painted_table", "plain_darkness"]

logger = logging.getLogger(__name__)

CONTRASTS = (10, 20, 30, 45, 60)  # HU, ends of the rows
DIAMETERS = (5, 12, 20, 40)  # pixels
PEAK_SHARES = (0.0, 0.2, 0.35, 0.5)


def plain_darkness(images: Tensor, sigma: float = 2.0) -> tuple[Tensor, Tensor]:
    """The control without a network: how much darker a place is than the median of the organ, smoothed.

    Args:
        images: (N, 1, H, W) in [0, 1], 0 beyond the organ.
        sigma: of the Gaussian filter, in pixels.

    Returns:
        maps (N, 1, H, W), 0 at the rim of the organ and beyond, and their largest values (N,).
    """
    maps = torch.zeros_like(images)
    for image, out in zip(images[:, 0].numpy(), maps[:, 0], strict=True):
        organ = image > 0
        if organ.any():
            inner = ndimage.binary_erosion(ndimage.binary_closing(organ), iterations=3)  # its rim is darker by the blur
            darker = np.median(image[organ]) - ndimage.gaussian_filter(image, sigma)
            out += torch.from_numpy(np.where(inner, darker, 0).clip(0).astype(np.float32))
    return maps, maps.flatten(1).amax(dim=1)


def painted_table(
    network: nn.Module,
    dataset_dir: PathLike,
    output_dir: PathLike,
    section: str = "test",
    choose_on: str = "validation",
    batch_size: int = 32,
) -> list[dict]:
    """Measure a network on painted pictures, and simpler methods beside it, and write ``painted.csv``.

    Those are :func:`plain_darkness`, without a network; the same times the probability of disease; and, of a network whose
    classifier tells them (``place_map``), the probabilities of places, without any diffusion, and the darkness times those.
    The mask is what lies above a share of the largest value of the picture's map, and above a floor; both are chosen for
    each method, by the largest mean Dice of the section ``choose_on``.

    Args:
        network: takes slices (B, 1, H, W) in [0, 1] to (B, 3, H, W): map, healthy version, probability of disease.
        dataset_dir: what :func:`scripts.release.phantoms.paint_boxes` writes.
        output_dir: where to write to.
        section: section of the patients to measure on, by :func:`scripts.data.sections.section_of`.
        choose_on: section that share and floor are chosen on.
        batch_size: slices in a call.

    Returns:
        rows with ``method``, ``contrast`` and ``diameter`` (a range, or ``all``), ``pictures``, ``dice`` (mean over all
        painted pictures), and ``image_auroc`` of painted pictures against the healthy ones of the same patients; of all
        contrasts and diameters, and of those of 30 HU and more, also ``dice_lower`` and ``dice_upper``, the ends of 95 %
        intervals over patients.

    Raises:
        FileNotFoundError: if a section has no pictures of both kinds.
    """
    root = Path(dataset_dir)
    chosen, measured = (_pictures(root, name) for name in (choose_on, section))
    for_choice, painted, healthy = (
        _by_method(network, images, batch_size) for images in (chosen["images"], measured["images"], measured["healthy"])
    )
    rows = []
    for name, (maps, found) in painted.items():
        share, threshold = _chosen(for_choice[name][0], chosen["masks"])
        dices = _dices(maps, measured["masks"], share, threshold)
        for contrast, diameter, inside in _parts(measured):
            both = np.concatenate([found[torch.from_numpy(inside)].numpy(), healthy[name][1].numpy()])
            label = np.arange(len(both)) < inside.sum()
            row = {"method": name, "contrast": contrast, "diameter": diameter, "pictures": int(inside.sum())}
            row |= {"dice": float(dices[inside].mean()), "image_auroc": float(roc_auc_score(label, both))}
            if diameter == "all" and contrast in ("all", f"{30}-{CONTRASTS[-1]}"):
                patients = measured["patients"][inside]
                means = [dices[inside][patients == patient].mean() for patient in np.unique(patients)]
                row |= dict(zip(("dice_lower", "dice_upper"), bootstrap_interval(means), strict=True))
            rows.append({**row, "peak_share": share, "threshold": threshold})
    write_rows(Path(output_dir) / "painted.csv", rows)
    for row in rows:
        ends = f" ({row['dice_lower']:.3f} to {row['dice_upper']:.3f})" if "dice_lower" in row else ""
        logger.info(
            f"{row['method']:<24} {row['contrast']:>6} HU, {row['diameter']:>5} pixels, {row['pictures']:>4} pictures: "
            f"Dice {row['dice']:.3f}{ends}, image AUROC {row['image_auroc']:.3f}"
        )
    return rows


def outside_check(
    network: nn.Module,
    healthy_dir: PathLike,
    tumour_dir: PathLike,
    section: str = "test",
    seed: int = 0,
    batch_size: int = 32,
) -> dict[str, float]:
    """What the probability of disease tells of real tumours, in pictures that two sources have cut in different ways.

    Boxes cut round an organ and boxes cut round a tumour are told from each other by their size. So windows of the tumour
    boxes' sizes are cut out of the tissue of the healthy boxes. What else differs between the sources, such as scanners,
    noise and the phase of the contrast agent, stays, so that no figure here is of tumours alone.

    Args:
        network: has ``probability``, of slices (B, 1, H, W) in [0, 1], and ``spatial_size``, that of the frames.
        healthy_dir: boxes round healthy organs, ``<patient>_<anything>.png``.
        tumour_dir: boxes round tumours, likewise, at the same magnification.
        section: section of the healthy patients, see :func:`scripts.data.sections.section_of`; all tumours are taken.
        seed: of the windows.
        batch_size: slices in a call.

    Returns:
        AUROC, tumours against healthy ones, of ``size`` (the boxes' area, smaller for tumours), ``boxes`` (the probability
        of whole boxes), and of the windows: ``windows`` (the probability), ``darkness`` (the mean grey level, lower for
        tumours) and ``noise`` (the standard deviation of the finest details).

    Raises:
        FileNotFoundError: if a folder has no pictures.
    """
    device = next(chain(network.eval().parameters(), network.buffers())).device
    healthy = [path for path in _boxes(healthy_dir) if section_of(path.stem.split("_")[0]) == section]
    read = [[np.asarray(Image.open(path).convert("L")) for path in paths] for paths in (healthy, _boxes(tumour_dir))]
    rng = np.random.default_rng(seed)
    sizes = [box.shape for box in read[1]]
    windows = [_window(box, sizes[rng.integers(len(sizes))], rng) for box in read[0]]

    def auroc(of_healthy: Sequence[float], of_tumours: Sequence[float]) -> float:
        label = [0] * len(of_healthy) + [1] * len(of_tumours)
        return float(roc_auc_score(label, [*of_healthy, *of_tumours]))

    def probability(boxes: Sequence[np.ndarray]) -> list[float]:
        frames = np.stack([in_frame(box, *network.spatial_size) for box in boxes])
        images = (torch.from_numpy(frames).float()[:, None] / 255).split(batch_size)
        with torch.no_grad():
            return torch.cat([network.probability(batch.to(device)) for batch in images]).tolist()

    of_tumours = probability(read[1])
    return {
        "size": auroc(*([-box.size for box in boxes] for boxes in read)),
        "boxes": auroc(probability(read[0]), of_tumours),
        "windows": auroc(probability(windows), of_tumours),
        "darkness": auroc(*([-box.mean() for box in boxes] for boxes in (windows, read[1]))),
        "noise": auroc(*([ndimage.laplace(box.astype(float)).std() for box in boxes] for boxes in (windows, read[1]))),
    }


def _boxes(folder: PathLike) -> list[Path]:
    paths = [path for path in visible(Path(folder)) if path.suffix.lower() in PICTURES]
    if not paths:
        raise FileNotFoundError(f"{folder}: no pictures; give a folder of boxes, <patient>_<anything>.png")
    return paths


def _window(box: np.ndarray, size: Sequence[int], rng: np.random.Generator) -> np.ndarray:
    """A window of this size, or smaller, about a place in the tissue of a box."""
    places = np.argwhere(likely_organ(box / 255))
    centre = places[rng.integers(len(places))] if len(places) else np.array(box.shape) // 2
    cut = []
    for place, edge, wanted in zip(centre, box.shape, size, strict=True):
        low = min(max(place - wanted // 2, 0), max(edge - wanted, 0))
        cut.append(slice(low, low + wanted))
    return box[tuple(cut)]


def in_frame(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """A picture (H, W) cut or padded with 0 about its middle to (height, width)."""
    frame = np.zeros((height, width), picture.dtype)
    source, target = [], []
    for n, wanted in zip(picture.shape, frame.shape, strict=True):
        kept = min(n, wanted)
        source.append(slice(max((n - wanted) // 2, 0), max((n - wanted) // 2, 0) + kept))
        target.append(slice(max((wanted - n) // 2, 0), max((wanted - n) // 2, 0) + kept))
    frame[tuple(target)] = picture[tuple(source)]
    return frame


def _dices(maps: Tensor, masks: Tensor, share: float, floor: float) -> np.ndarray:
    """Dice of each picture, maps and masks (N, 1, H, W), by a share of its own peak and a floor."""
    bounds = (share * maps.flatten(1).amax(dim=1)).clamp(min=floor)
    return np.array([dice(m > bound, mask) for m, bound, mask in zip(maps, bounds, masks, strict=True)])


def _chosen(maps: Tensor, masks: Tensor) -> tuple[float, float]:
    """Share of the peak and floor with the largest mean Dice."""
    above = maps[maps > 0].numpy()
    floors = [0.0, *np.quantile(above, np.linspace(0.05, 0.99, 20))] if above.size else [0.0]
    pairs = [(share, float(floor)) for share in PEAK_SHARES for floor in floors]
    return max(pairs, key=lambda pair: _dices(maps, masks, *pair).mean())


def _by_method(network: nn.Module, images: Tensor, batch_size: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Maps (N, 1, H, W) and scores (N,) of pictures, by the name of the method."""
    maps, probability = _of_network(network, images, batch_size)
    darkness, darkest = plain_darkness(images)
    methods = {"bundle": (maps, probability), "plain threshold": (darkness, darkest)}
    gates = {"gated": probability.view(-1, 1, 1, 1)}
    if hasattr(network, "place_map"):
        device = next(network.parameters()).device
        gates["gated by places"] = torch.cat(
            [network.place_map(batch.to(device)).cpu() for batch in images.split(batch_size)]
        )
        methods["places alone"] = (gates["gated by places"], probability)
    for name, gate in gates.items():
        gated = darkness * gate
        methods[f"plain threshold, {name}"] = (gated, gated.flatten(1).amax(dim=1))
    return methods


def _of_network(network: nn.Module, images: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    output, _ = run_in_batches(network, images, batch_size)
    return output[:, :1], output[:, -1].flatten(1).amax(dim=1)


def _read(paths: Sequence[PathLike]) -> Tensor:
    """Pictures (N, 1, H, W) in [0, 1]."""
    return torch.stack([torch.from_numpy(np.asarray(Image.open(path).convert("L")) / 255).float()[None] for path in paths])


def _pictures(root: Path, section: str) -> dict:
    """Painted pictures of a section with their masks and what was painted, and the healthy ones of the same patients."""
    with open(root / "tumours.csv", newline="", encoding="utf-8") as file:
        drawn = {stem_of(Path(row["file"])): row for row in csv.DictReader(file)}
    cases = [case for case in folder_pair(root) if section_of(case["patient"]) == section]
    painted, healthy = ([Path(case["image"]) for case in cases if case["class_label"] == label] for label in (1, 0))
    if not painted or not healthy:
        raise FileNotFoundError(f"{root}: no painted and healthy pictures of the {section} section; paint more patients")
    rows = [drawn[stem_of(path)] for path in painted]
    return {
        "images": _read(painted),
        "masks": _read([root / "masks" / path.name for path in painted]) > 0.5,
        "healthy": _read(healthy),
        "patients": np.array([stem_of(path).split("_")[0] for path in painted]),
        **{key: np.array([float(row[key]) for row in rows]) for key in ("contrast", "diameter")},
    }


def _parts(measured: dict) -> list[tuple[str, str, np.ndarray]]:
    """Ranges of contrast and diameter with the pictures that lie in them: all, those of 30 HU and more, and each alone."""
    whole = {"contrast": (CONTRASTS[0], CONTRASTS[-1]), "diameter": (DIAMETERS[0], DIAMETERS[-1])}
    wanted = [{}, {"contrast": (30, CONTRASTS[-1])}]
    wanted += [{"contrast": ends} for ends in zip(CONTRASTS, CONTRASTS[1:], strict=False)]
    wanted += [{"diameter": ends} for ends in zip(DIAMETERS, DIAMETERS[1:], strict=False)]
    parts = []
    for ends in wanted:
        inside = np.ones(len(measured["images"]), bool)
        for key, (low, high) in (whole | ends).items():
            inside &= (measured[key] >= low) & (measured[key] <= high)
        if inside.any():
            names = [f"{ends[key][0]}-{ends[key][1]}" if key in ends else "all" for key in ("contrast", "diameter")]
            parts.append((*names, inside))
    return parts
