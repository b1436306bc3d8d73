"""One protocol for all bundles that find anomalies in brain MRI, and the controls beside them."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigWorkflow
from monai.data import MetaTensor
from monai.transforms import Invertd, LoadImage
from torch import Tensor, nn

from scripts.brains import brain_masks
from scripts.bundle import configuration, with_weights
from scripts.data.layouts import find_cases
from scripts.files import check_own, own_file
from scripts.inferers import run_in_batches
from scripts.results import millilitres
from scripts.speed import gflop_of
from scripts.tables import markdown_table, mean_and_std, write_rows
from scripts.tasks.anomaly.figures import methods_figure
from scripts.tasks.anomaly.metrics import SIZES, cohort_figures
from scripts.thresholds import at_false_positives
from scripts.transforms import has_foreground, upright

__all__ = ["Method", "compare_methods", "methods_of"]

logger = logging.getLogger(__name__)

COMPARED = {
    "dice": "Dice",
    "dice_low": "from",
    "dice_high": "to",
    "own_dice": "Dice of its own mask",
    "own_dice_low": "from",
    "own_dice_high": "to",
    "best_dice": "largest Dice",
    "auprc": "AUPRC",
    "slice_auroc": "slice AUROC",
    **{f"recall {size}": f"recall {size}" for size in SIZES},
    "false_ml": ("false ml", ".1f"),
    "own_false_ml": ("false ml of its own mask", ".1f"),
    "gflop": ("GFLOP a slice", ".1f"),
    "seconds": ("s a slice", ".2f"),
}


@dataclass(frozen=True)
class Method:
    """One that is compared: a bundle, a control beside it, or other weights or settings of it.

    Args:
        bundle: the bundle's folder.
        configs: names of configurations over its ``inference.json``.
        settings: further settings of its inference.
    """

    bundle: Path
    configs: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def seen(self) -> str:
        """Whom it has learned from, as its configurations say (``seen``)."""
        return configuration(self.bundle, "inference", "evaluate", *self.configs).get("seen", "not said")

    def infer(self, dataset_dir: str, section: str, output_dir: Path) -> None:
        """Run the inference as a user does; cases that are finished already are left out.

        Raises:
            SystemExit: if cases fail, with their names.
        """
        files = [str(self.bundle / "configs" / f"{name}.json") for name in ("inference", *self.configs)]
        places = {"bundle_root": str(self.bundle), "dataset_dir": dataset_dir, "output_dir": str(output_dir)}
        workflow = ConfigWorkflow(
            files, workflow_type="infer", logging_file=False, section=section, **places, **self.settings
        )
        workflow.initialize()
        workflow.run()
        workflow.finalize()

    def network(self) -> nn.Module:
        """The network with its weights, in float32."""
        parser = configuration(self.bundle, "inference", *self.configs)
        parser.update({**self.settings, "amp": False})
        return with_weights(parser.get_parsed_content("network"), parser.get_parsed_content("checkpointloader#load_path"))


def methods_of(bundles: Sequence[Path]) -> dict[str, Method]:
    """Those of the bundles that find anomalies in MRI, and the controls beside them, ``configs/control_<name>.json``."""
    methods = {}
    for bundle in (bundle for bundle in bundles if (bundle / "configs" / "evaluate.json").is_file()):
        meta = json.loads((bundle / "configs" / "metadata.json").read_text(encoding="utf-8"))
        kind = configuration(bundle, "inference", "evaluate").get("benchmark", "")
        modality = meta["network_data_format"]["inputs"]["image"].get("modality")
        if kind == "scripts.tasks.anomaly.benchmark.anomaly_benchmark" and modality == "MR":
            controls = [path.stem for path in sorted((bundle / "configs").glob("control_*.json"))]
            methods |= {bundle.name: Method(bundle)}
            methods |= {name.removeprefix("control_").replace("_", " "): Method(bundle, (name,)) for name in controls}
    return methods


@dataclass(frozen=True)
class _Case:
    """A labelled case on its own grid, axial slices last: grey levels, true mask and brain, (H, W, D) each."""

    name: str
    image: np.ndarray
    label: np.ndarray
    brain: np.ndarray
    voxel_ml: float

    def read(self, folder: Path, ending: str) -> np.ndarray:
        """A method's result of this case, (H, W, D)."""
        path = folder / self.name / f"{self.name}_{ending}.nii.gz"
        return upright(LoadImage(image_only=True, ensure_channel_first=True)(path)).numpy()[0]

    @property
    def free(self) -> np.ndarray:
        """Which slices show no lesion, bool (D,)."""
        return ~self.label.any(axis=(0, 1))


def _labelled_cases(method: Method, dataset_dir: str, section: str) -> tuple[list[_Case], Tensor]:
    """The labelled cases of a section, and up to eight slices (N, C, H, W) of the first, as a network sees them."""
    parser = configuration(method.bundle, "inference")
    preprocessing, sequences = (parser.get_parsed_content(key) for key in ("preprocessing", "sequences"))
    shown = sequences.index(parser.get_parsed_content("stand_in"))
    back = Invertd(["brain", "image"], preprocessing, orig_keys="image", nearest_interp=[True, False])
    cases, slices = [], None
    for case in find_cases(dataset_dir, sequences, section=section):
        if "label" not in case:
            continue
        item = preprocessing(case)
        image = item["image"]
        if slices is None:
            slices = image.as_tensor().movedim(-1, 0)
            slices = slices[has_foreground(slices)]
            slices = slices[torch.linspace(0, len(slices) - 1, min(8, len(slices))).round().long()]
        brain = torch.from_numpy(brain_masks(image.numpy()))[None].float()
        item = back({**item, "brain": MetaTensor(brain, meta=image.meta)})
        size = millilitres(torch.ones_like(item["label"])) / item["label"].numel()
        volumes = (upright(item[key]).numpy() for key in ("image", "label", "brain"))
        image, label, brain = (next(volumes)[shown], next(volumes)[0] > 0, next(volumes)[0] > 0.5)
        cases.append(_Case(case["case"], image, label, brain, size))
    if not cases:
        raise FileNotFoundError(f"{dataset_dir}: no case of the section '{section}' has a mask")
    return cases, slices


def compare_methods(
    methods: Mapping[str, Method],
    dataset_dir: str,
    output_dir: str,
    most_false_ml: float = 5.0,
    cap_ml: float = 20.0,
    section: str = "test",
) -> list[dict]:
    """Compare methods that find anomalies on the same patients, grid and brain, by one rule, and print a Markdown table.

    Every method runs as its bundle's inference does, into ``<output_dir>/<section>/<method>``; what is finished is not done
    again. Its map, 0 outside of the brain (by :func:`scripts.brains.brain_masks`), is cut at one threshold for all patients:
    the lowest with which no more than ``most_false_ml`` are expected to be found in the lesion-free slices of a volume, by
    those of the validation patients (:func:`scripts.thresholds.at_false_positives`). Beside that stand the figures of the
    bundle's own mask. Every slice counts.

    Written are ``comparison.csv`` (a row a method), ``comparison_cases.csv``, ``comparison.md`` and ``comparison.png``: the
    slice with the largest lesion of up to six patients. The picture shows patients.

    Args:
        methods: by their names.
        dataset_dir: folder of labelled cases.
        output_dir: folder to write to.
        most_false_ml: millilitres a volume that are expected to be found falsely, at most.
        cap_ml: as so much counts what is found falsely in a volume and is more.
        section: section to measure on.

    Returns:
        the rows of ``comparison.csv``.
    """
    folder = Path(output_dir)
    check_own(*(folder / f"comparison{ending}" for ending in (".csv", "_cases.csv", ".md", ".png")))
    first = next(iter(methods.values()))
    sections = {name: _labelled_cases(first, dataset_dir, name) for name in dict.fromkeys(("validation", section))}
    cases, slices = sections[section]
    shown = [(case, int(case.label.sum(axis=(0, 1)).argmax())) for case in cases[:: max(1, len(cases) // 6)][:6]]
    rows, by_case, pictures = [], [], {}
    for name, method in methods.items():
        maps = {}
        for part, (members, _) in sections.items():
            method.infer(dataset_dir, part, folder / part / name)
            maps[part] = [case.read(folder / part / name, "map") * case.brain for case in members]
        validation = sections["validation"][0]
        threshold = at_false_positives(
            [anomaly[..., case.free] for anomaly, case in zip(maps["validation"], validation, strict=True)],
            [case.voxel_ml for case in validation],
            most_false_ml,
            cap_ml,
        )
        masks = [anomaly > threshold for anomaly in maps[section]]
        own = [case.read(folder / section / name, "seg") > 0 for case in cases]
        figures = cohort_figures(maps[section], masks, own, [(c.label, c.voxel_ml) for c in cases])
        by_case += [{"method": name, "case": c.name, **row} for c, row in zip(cases, figures.pop("cases"), strict=True)]
        network = method.network()
        run_in_batches(network, slices[:1], 1)  # the first call pays for set-up
        seconds = run_in_batches(network, slices, 1)[1]
        gflop = gflop_of(network, slices.split(1), next(network.parameters()).device) / len(slices)
        rows.append({"method": name, **figures, "threshold": threshold, "gflop": gflop, "seconds": seconds})
        numbers = {case.name: i for i, case in enumerate(cases)}
        pictures[name] = [(maps[section][i][..., k], masks[i][..., k]) for i, k in ((numbers[c.name], k) for c, k in shown)]
    known = [{key: x for key, x in row.items() if isinstance(x, str) or not np.isnan(x)} for row in rows]
    table = markdown_table(mean_and_std(known), COMPARED)
    lines = [f"- {name} has seen: {method.seen}" for name, method in methods.items()]
    text = (
        f"{len(cases)} patients, {sum(len(case.free) for case in cases)} slices ({section}); at most "
        f"{most_false_ml:g} ml expected in the lesion-free slices of a volume, of which {cap_ml:g} ml count at most"
    )
    text = f"{text}\n\n{table}\n\n" + "\n".join(lines) + "\n"
    logger.info(text)
    write_rows(folder / "comparison.csv", [{**row, "seen": methods[row["method"]].seen} for row in rows])
    write_rows(folder / "comparison_cases.csv", by_case)
    with own_file(folder / "comparison.md") as aside:
        aside.write_text(text, encoding="utf-8")
    with own_file(folder / "comparison.png") as aside:
        methods_figure(aside, [(case.name, case.image[..., k], case.label[..., k]) for case, k in shown], pictures)
    return rows
