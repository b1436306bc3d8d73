"""Work, speed and accuracy of the anomaly bundles against the published procedure, and over their settings."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.transforms import Compose
from torch import Tensor, nn

from scripts.bundle import build_network, configuration, with_weights
from scripts.data.layouts import find_cases
from scripts.data.slices import ExtractSlicesd
from scripts.files import own_file, sha256_of
from scripts.inferers import run_in_batches
from scripts.metrics import bootstrap_interval, dice
from scripts.speed import Trial, compare
from scripts.tables import markdown_table, mean_and_std
from scripts.tasks.anomaly.evaluation import healthy_images, paint_sprites
from scripts.tasks.anomaly.figures import guidance_table_figure
from scripts.tasks.anomaly.metrics import BinnedScores
from scripts.tasks.anomaly.transforms import RemoveSmallLesions
from scripts.transforms import MapToMask, upright

__all__ = [
    "anomaly_benchmark",
    "cases_without_diffusion",
    "compare_with_published",
    "drawn_slices",
    "grey_level_baseline",
    "healthy_slices",
    "kept_outputs",
    "labelled_slices",
    "spread_slices",
    "tune",
]

logger = logging.getLogger(__name__)


def labelled_slices(bundle: Path, dataset_dir: str, section: str) -> Iterator[list[dict]]:
    """Slices of one labelled case after the other, on the network's grid.

    Yields:
        a case's slices with enough foreground, each with ``image`` (C, H, W) in [0, 1], ``label`` (1, H, W) and
        ``class_label``.

    Raises:
        FileNotFoundError: if there are no labelled cases.
    """
    parser = configuration(bundle, "train")
    cases = [c for c in find_cases(dataset_dir, parser.get_parsed_content("sequences"), section=section) if "label" in c]
    if not cases:
        raise FileNotFoundError(f"{dataset_dir}: no case of the section '{section}' has a mask")
    preprocessing = parser.get_parsed_content("preprocessing").transforms[:-1]
    slices_of = Compose([*preprocessing, ExtractSlicesd(keys=["image", "label"])])
    for case in cases:
        yield slices_of(case)


def healthy_slices(bundle: Path, dataset_dir: str, section: str, number: int | None = None) -> Tensor:
    """Held-out healthy slices (N, C, H, W) in [0, 1], read as the bundle's training reads them.

    Args:
        bundle: folder of a bundle whose ``train.json`` has ``validate_section``.
        dataset_dir: folder of healthy scans.
        section: section of the cases.
        number: how many slices, evenly spaced over those with foreground; None for all.

    Raises:
        ValueError: if there are fewer than ``number``.
    """
    parser = configuration(bundle, "train")
    parser["dataset_dir"], parser["validate_section"] = str(dataset_dir), section
    return healthy_images(parser.get_parsed_content("validate#dataset"), number)


def drawn_slices(bundle: Path, dataset_dir: str, num_slices: int, section: str) -> tuple[Tensor, Tensor]:
    """Slices with lesion, then as many without, a fixed choice from the cases of a section.

    If the bundle's ``evaluate.json`` has ``sprites``, arguments of :func:`scripts.tasks.anomaly.evaluation.paint_sprites`,
    the lesions are painted into the first half of evenly spaced healthy slices.

    Returns:
        images (N, C, H, W) in [0, 1], and masks (N, 1, H, W), bool.
    """
    parser = configuration(bundle, "inference", "evaluate")
    if "sprites" in parser:
        images = healthy_slices(bundle, dataset_dir, section, num_slices)
        masks = torch.zeros_like(images[:, :1], dtype=torch.bool)
        half = num_slices // 2
        images[:half], masks[:half] = paint_sprites(images[:half], **parser.get_parsed_content("sprites"))
        return images, masks
    slices = [item for case in labelled_slices(bundle, dataset_dir, section) for item in case]
    rng = np.random.default_rng(0)
    chosen = []
    for label, number in ((1, num_slices // 2), (0, num_slices - num_slices // 2)):
        members = [i for i, item in enumerate(slices) if item["class_label"] == label]
        chosen += sorted(rng.permutation(members)[:number].tolist())
    images, masks = (torch.stack([slices[i][key] for i in chosen]) for key in ("image", "label"))
    return images, masks > 0


def spread_slices(bundle: Path, dataset_dir: str, section: str, number: int) -> list[dict]:
    """Slices spread over all patients of a section, as many of each; of a patient half with a lesion, both halves evenly.

    Returns:
        items of :func:`labelled_slices`: the first of each patient, then the second of each, and so on.

    Raises:
        ValueError: if there are fewer slices, or more patients, than ``number``.
    """
    cases = list(labelled_slices(bundle, dataset_dir, section))
    if not len(cases) <= number <= sum(map(len, cases)):
        raise ValueError(
            f"{number} slices can't be spread over {len(cases)} patients with {sum(map(len, cases))} slices; ask for others"
        )
    shares = [0] * len(cases)
    while sum(shares) < number:  # a patient with few slices gives all of them
        open_to = [i for i, case in enumerate(cases) if shares[i] < len(case)]
        shares[min(open_to, key=lambda i: shares[i])] += 1
    spread = []
    for case, share in zip(cases, shares, strict=True):
        healthy, diseased = ([item for item in case if item["class_label"] == label] for label in (0, 1))
        wanted = min(max((share + 1) // 2, share - len(healthy)), len(diseased))
        evenly = [_evenly(diseased, wanted), _evenly(healthy, share - wanted)]
        spread.append([item for pair in zip_longest(*evenly) for item in pair if item is not None])
    return [item for row in zip_longest(*spread) for item in row if item is not None]


def _evenly(items: Sequence[dict], number: int) -> list[dict]:
    return [items[int((i + 0.5) * len(items) / number)] for i in range(number)]


def _settings(bundle: Path, changed: Mapping[str, Any]) -> str:
    """The settings of the bundle's network, some of them changed, and the hash of its weights, as text."""
    parser = configuration(bundle, "inference")
    names = [name for name in parser["network_def"] if not name.startswith("_")]
    settings = {name: parser.get_parsed_content(f"network_def#{name}") for name in names}
    weights = sha256_of(bundle / "models" / "model.pt")
    return json.dumps({**settings, **changed, "weights": weights}, sort_keys=True, default=str)


def kept_outputs(
    bundle: Path, items: Sequence[dict], folder: Path, changed: Mapping[str, Any], batch_size: int = 4
) -> Tensor:
    """What the bundle's network makes of slices, each kept in a file, so that a run that was stopped goes on.

    Args:
        bundle: folder of the bundle.
        items: see :func:`labelled_slices`.
        folder: where the files are; one that was made by other settings or weights is made again.
        changed: settings of the network in place of the bundle's.
        batch_size: slices in a call of the network.

    Returns:
        (N, C + 2, H, W), rounded to half precision.
    """
    settings = _settings(bundle, changed)
    paths = [folder / f"{item['case']}_{item['slice']}.pt" for item in items]
    kept = [torch.load(path, weights_only=True) if path.is_file() else {} for path in paths]
    missing = [i for i, entry in enumerate(kept) if entry.get("settings") != settings]
    network = build_network(bundle, **changed) if missing else None
    for begin in range(0, len(missing), batch_size):
        chosen = missing[begin : begin + batch_size]
        outputs, seconds = run_in_batches(network, torch.stack([items[i]["image"] for i in chosen]), batch_size)
        for i, output in zip(chosen, outputs.half(), strict=True):
            kept[i] = {"output": output.clone(), "settings": settings}
            with own_file(paths[i]) as aside:
                torch.save(kept[i], aside)
        logger.info(f"{folder.name}: {begin + len(chosen)} of {len(missing)} slices, {seconds:.1f} s each")
    return torch.stack([entry["output"] for entry in kept]).float()


def compare_with_published(
    bundle: Path, dataset_dir: str, output_dir: Path, number: int, section: str, batch_size: int = 4
) -> list[dict]:
    """Print how well the published procedure and the default find lesions, on slices spread over all patients.

    Each by the paper's map and mask, the plain sum of absolute differences cut by Otsu's threshold of the slice, and by the
    bundle's: weighted, smoothed, gated, and cut over all slices of the patient together. What the networks make of a slice
    is kept in ``output_dir``; the same command goes on with what is missing.

    Args:
        bundle: folder of a bundle with a :class:`scripts.networks.ddim_anomaly.DDIMAnomalyNet`.
        dataset_dir: folder of the cases.
        output_dir: folder of the kept outputs.
        number: number of slices.
        section: section of the cases.
        batch_size: slices in a call of the network.

    Returns:
        a row for each procedure and map: means over the patients, with bootstrap intervals (``_low``, ``_high``), of
        ``slice_dice`` over slices with a lesion and ``all_slices_dice``, and ``auroc`` over all pixels.
    """
    default = build_network(bundle)
    parser = configuration(bundle, "inference")
    cut = MapToMask(*(parser.get_parsed_content(key) for key in ("threshold", "min_threshold", "peak_shares")))
    items = spread_slices(bundle, dataset_dir, section, number)
    image, mask = torch.stack([item["image"] for item in items]), torch.stack([item["label"] for item in items])[:, 0] > 0
    patients: dict[str, list[int]] = {}
    for i, item in enumerate(items):
        patients.setdefault(item["case"], []).append(i)
    rows = []
    for procedure, changed in (("published", default.published), ("default", {})):
        outputs = kept_outputs(bundle, items, output_dir / procedure, changed, batch_size)
        healthy, probability = outputs[:, 1:-1], outputs[:, -1:]
        plain = (image - healthy).abs().sum(dim=1)
        own = outputs[:, 0] if not changed else (default.anomaly_map(image, healthy) * probability)[:, 0]
        by_slice = torch.stack([MapToMask("otsu")(one[None])[0] for one in plain])
        by_patient = torch.zeros_like(by_slice)
        for members in patients.values():
            apart = torch.stack([own[members], torch.zeros_like(own[members])], dim=1).flatten(0, 1)  # no neighbours
            by_patient[members] = cut(apart[None])[0, ::2]
        for name, anomaly, found in (("paper's map", plain, by_slice), ("bundle's map", own, by_patient)):
            rows.append({"method": f"{procedure}, {name}", **_by_patient(anomaly, found, mask, list(patients.values()))})
    columns = {"slice_dice": "Dice, lesion slices", "all_slices_dice": "Dice, all slices", "auroc": "AUROC"}
    logger.info(f"{len(items)} slices of {len(patients)} patients, {int(mask.flatten(1).any(dim=1).sum())} with a lesion")
    logger.info(markdown_table(mean_and_std(rows), columns))
    for row in rows:
        ends = ", ".join(f"{columns[key]} {row[f'{key}_low']:.3f} to {row[f'{key}_high']:.3f}" for key in list(columns)[:2])
        logger.info(f"{row['method']}: {ends}")
    return rows


def _by_patient(anomaly: Tensor, found: Tensor, mask: Tensor, patients: Sequence[Sequence[int]]) -> dict[str, float]:
    """Figures of slices (N, H, W), means over the patients, of whom each has some of the slices."""
    dices = np.array([dice(one, true) for one, true in zip(found, mask, strict=True)])
    lesion = mask.flatten(1).any(dim=1).numpy()
    chosen = {
        "slice_dice": [[i for i in members if lesion[i]] for members in patients],
        "all_slices_dice": patients,
    }
    figures = {}
    for key, groups in chosen.items():
        means = [float(dices[members].mean()) for members in groups if members]
        figures[key] = float(np.mean(means))
        figures[f"{key}_low"], figures[f"{key}_high"] = bootstrap_interval(means)
    scores = BinnedScores(value_range=(0.0, float(anomaly.max())))
    scores.add(anomaly, mask)
    return {**figures, "auroc": scores.auroc()}


def grey_level_baseline(bundle: Path, dataset_dir: str, channel: int) -> dict[str, float]:
    """Mean Dice over the test volumes of thresholds on one sequence, each the best one for the validation volumes.

    The plain threshold, on grey levels of the network's grid; and that of a bundle whose ``evaluate.json`` has a control, on
    its map (:class:`scripts.tasks.anomaly.evaluation.GreyLevelMapd`), without findings that are too small.

    Returns:
        Dice of the ``plain`` threshold and of the ``control``, and the latter's ``control_threshold``.
    """

    def plain(section: str) -> Iterator[tuple[Tensor, Tensor]]:
        for case in labelled_slices(bundle, dataset_dir, section):
            image, mask = (torch.stack([item[key] for item in case]) for key in ("image", "label"))
            yield image[:, channel], mask[:, 0]

    def control(section: str) -> Iterator[tuple[Tensor, Tensor]]:
        for case in cases_without_diffusion(bundle, dataset_dir, section):
            yield case["control_map"], upright(case["label"])

    def best(kind: Callable, thresholds: Sequence[float], remove: Callable) -> tuple[float, float]:
        def dices(section: str, thresholds: Sequence[float]) -> np.ndarray:
            return np.array([[dice(remove((x > t).byte()), y) for t in thresholds] for x, y in kind(section)]).mean(axis=0)

        threshold = thresholds[int(dices("validation", thresholds).argmax())]
        return threshold, float(dices("test", [threshold])[0])

    threshold, found = best(plain, np.linspace(0.3, 1.0, 36).tolist(), lambda mask: mask)
    logger.info(f"threshold {threshold:.2f} on channel {channel}: mean Dice {found:.3f} over the test volumes")
    result = {"plain": found}
    parser = configuration(bundle, "inference", "evaluate")
    if "control_threshold" in parser:
        remove = RemoveSmallLesions(parser.get_parsed_content("min_volume"))
        threshold, found = best(control, np.linspace(0.3, 0.9, 31).tolist(), remove)
        logger.info(f"threshold {threshold:.2f} on the map of the control: mean Dice {found:.3f} over the test volumes")
        result |= {"control": found, "control_threshold": threshold}
    return result


def cases_without_diffusion(bundle: Path, dataset_dir: str, section: str) -> Iterator[dict]:
    """Labelled cases as an evaluation has them, but with every slice left as it is: the classifier alone is called."""
    parser = configuration(bundle, "inference", "evaluate")
    parser.update({"dataset_dir": dataset_dir, "section": section, "network_def#skip_below": 2.0})  # of probabilities
    network = with_weights(parser.get_parsed_content("network"), bundle / "models" / "model.pt")
    preprocessing, postprocessing, inferer = map(parser.get_parsed_content, ("preprocessing", "postprocessing", "inferer"))
    for case in parser.get_parsed_content("dataset#data#cases"):
        if "label" in case:
            item = preprocessing(case)
            with torch.no_grad():
                item["pred"] = inferer(item["image"][None].to(next(network.parameters()).device), network)[0].cpu()
            yield postprocessing(item)


def _quality(outputs: Tensor, masks: Tensor) -> dict[str, float]:
    """How well the anomaly maps, the first channel of outputs (N, C + 2, H, W), fit the masks (N, 1, H, W)."""
    maps = outputs[:, :1]
    scores = BinnedScores(value_range=(0.0, float(outputs.shape[1] - 2)))
    scores.add(maps, masks)
    lesion = masks.flatten(1).any(dim=1)
    otsu = [dice(MapToMask()(anomaly), mask) for anomaly, mask in zip(maps[lesion], masks[lesion], strict=True)]
    return {
        "dice": float(np.mean(otsu)),
        "best_dice": scores.best_dice()[0],
        "auroc": scores.auroc(),
        "healthy_ratio": (maps[~lesion].mean() / maps[masks].mean()).item(),
    }


def anomaly_benchmark(
    bundle: Path, networks: Mapping[str, nn.Module], dataset_dir: str, number: int, section: str
) -> list[dict]:
    """Work, speed and accuracy on slices, see :func:`scripts.speed.compare`.

    Everything but the procedure, such as the weights of the sequences in the map, is alike in both, so that the samplers
    are compared; a model of healthy slices is calibrated anew for the published procedure, on validation slices.

    Args:
        bundle: folder of an anomaly bundle.
        networks: see :func:`scripts.speed.compare`.
        dataset_dir: folder of the cases.
        number: number of slices, half of them with a lesion.
        section: section of the cases.
    """
    images, masks = drawn_slices(bundle, dataset_dir, number, section)
    default = networks["default"]
    if hasattr(default, "as_published"):
        healthy = healthy_slices(bundle, dataset_dir, "validation")
        published = default.as_published([{"image": batch} for batch in healthy.split(50)])
        networks = {**networks, "published": published.with_settings(max_batch=default.published["max_batch"])}
    trial = Trial(
        images.split(1),
        "slice",
        configuration(bundle, "inference")["batch_size"],
        judge=lambda outputs: _quality(torch.cat(outputs), masks),
        columns={"dice": "Dice (Otsu)", "best_dice": "largest Dice", "auroc": "AUROC", "healthy_ratio": "healthy / lesion"},
    )
    return compare(networks, trial, next(default.parameters()).device)


def tune(
    bundle: Path,
    dataset_dir: str,
    noise_levels: Sequence[int],
    gradient_scales: Sequence[float],
    num_slices: int,
    section: str,
    figure: str | None,
    settings: Mapping[str, Any],
) -> list[dict[str, float]]:
    """Print, as a Markdown table, Dice and AUROC of every noise level and gradient scale; draw them if asked to.

    The bundle's network is a :class:`scripts.networks.ddim_anomaly.DDIMAnomalyNet`.
    """
    images, masks = drawn_slices(bundle, dataset_dir, num_slices, section)
    logger.info("| L | s | Dice (Otsu) | best Dice | AUROC | healthy / lesion | s a slice |\n|---|---|---|---|---|---|---|")
    rows = []
    for noise_level in noise_levels:
        for gradient_scale in gradient_scales:
            network = build_network(bundle, **settings, noise_level=noise_level, gradient_scale=float(gradient_scale))
            outputs, seconds = run_in_batches(network, images, batch_size=8)
            row = {**_quality(outputs, masks), "seconds": seconds}
            rows.append({"noise_level": noise_level, "gradient_scale": gradient_scale, **row})
            logger.info(
                f"| {noise_level} | {gradient_scale:g} | {row['dice']:.3f} | {row['best_dice']:.3f} | {row['auroc']:.3f} "
                f"| {row['healthy_ratio']:.3f} | {row['seconds']:.2f} |"
            )
    if figure:
        guidance_table_figure(figure, rows)
    return rows
