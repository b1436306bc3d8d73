"""Checks that a bundle is whole and works, before anybody downloads it."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from monai.bundle import ConfigParser, verify_metadata, verify_net_in_out
from monai.bundle.properties import InferProperties, TrainProperties
from monai.utils import BundleProperty, BundlePropertyConfig
from PIL import Image

from scripts.bundle import build_network
from scripts.files import sha256_of

__all__ = ["run_inference", "verify"]

REQUIRED_FILES = (
    "LICENSE",
    "configs/metadata.json",
    "configs/inference.json",
    "configs/evaluate.json",
    "configs/train.json",
    "configs/logging.conf",
    "docs/README.md",
    "docs/data_license.txt",
    "models/model.pt",
)
REQUIRED_KEYS = (
    "schema",
    "version",
    "changelog",
    "monai_version",
    "pytorch_version",
    "numpy_version",
    "required_packages_version",
    "name",
    "task",
    "description",
    "authors",
    "copyright",
    "intended_use",
    "weights_sha256",
    "network_data_format",
)
MAX_WEIGHTS = 20 * 2**20  # bytes


def run_inference(
    bundle: Path, dataset_dir: Path, output_dir: Path, configs: Sequence[str] = (), **settings: object
) -> None:
    """Run the bundle's inference as a user does, in its folder, by ``monai.bundle run``.

    Args:
        bundle: folder of the bundle.
        dataset_dir: folder of the cases.
        output_dir: folder of the results.
        configs: further configurations, such as ``evaluate``, each overriding what is before it.
        settings: other settings.

    Raises:
        RuntimeError: with the end of what it printed, if it fails.
    """
    files = str([f"configs/{name}.json" for name in ("inference", *configs)])
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", files]
    for name, value in {"dataset_dir": dataset_dir, "output_dir": output_dir, **settings}.items():
        command += [f"--{name}", str(value)]
    done = subprocess.run(command, cwd=bundle, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError("\n".join((done.stderr or done.stdout).strip().splitlines()[-3:]))


def verify(bundle: Path, schema: str | None = None) -> list[str]:
    """Faults of a bundle, one line each; none for a sound one.

    Checked are the files, the metadata (against MONAI's schema, if a file with it is given), MONAI's properties of the
    configurations, the weights (size, SHA-256, tensors only, every name the network's), the network's input and output as
    the metadata describe them, and a run: on a small generated scan whose axes are not RAS or, if noise goes into the
    network, one that generates two images, whose files, seeds and marks are looked at.

    Args:
        bundle: folder of the bundle.
        schema: file with MONAI's schema; nothing is downloaded.
    """
    faults = [f"{name} is missing" for name in REQUIRED_FILES if not (bundle / name).is_file()]
    if faults:
        return faults
    meta = json.loads((bundle / "configs" / "metadata.json").read_text(encoding="utf-8"))
    for check in (_metadata_faults, _property_faults, _weight_faults, _network_faults, _run_faults):
        try:
            faults += check(bundle, meta, schema) if check is _metadata_faults else check(bundle, meta)
        except (Exception, SystemExit) as error:  # a check that can't be made is a fault of its own
            faults.append(f"{check.__name__[1:-7]}: {type(error).__name__}: {' '.join(str(error).split())[:500]}")
    return faults


def _metadata_faults(bundle: Path, meta: dict, schema: str | None = None) -> Iterator[str]:
    yield from (f"metadata.json has no '{key}'" for key in REQUIRED_KEYS if key not in meta)
    if meta.get("name") != bundle.name:
        yield f"metadata.json is named {meta.get('name')}, the folder {bundle.name}"
    if meta.get("version") not in meta.get("changelog", {}):
        yield f"version {meta.get('version')} is not in the changelog"
    if schema:
        if not Path(schema).is_file():  # MONAI would fetch it from the address in the metadata
            raise FileNotFoundError(f"{schema}: no such file; give MONAI's schema of the metadata by --schema")
        verify_metadata(
            meta_file=str(bundle / "configs" / "metadata.json"),
            filepath=schema,
            hash_val=sha256_of(schema),
            hash_type="sha256",
        )
    for word in ("detection", "classification"):
        if word in bundle.name:
            yield f"a name with '{word}' makes MONAI Label's inference fail"


def _property_faults(bundle: Path, meta: dict) -> Iterator[str]:
    for kind, properties in (("inference", InferProperties), ("train", TrainProperties)):
        parser = ConfigParser()
        parser.read_config(bundle / "configs" / f"{kind}.json")
        parser.read_meta(bundle / "configs" / "metadata.json")
        for name, about in properties.items():
            if about[BundleProperty.REQUIRED] and about[BundlePropertyConfig.ID] not in parser:
                yield f"{kind}.json has no '{name}' ({about[BundlePropertyConfig.ID]})"


def _weight_faults(bundle: Path, meta: dict) -> Iterator[str]:
    stated = {"model.pt": meta["weights_sha256"], **meta.get("other_weights_sha256", {})}
    paths = {path.name: path for path in sorted((bundle / "models").glob("*.pt"))}
    size = sum(path.stat().st_size for path in paths.values())
    if size > MAX_WEIGHTS:
        yield f"{' and '.join(paths)}: {size} bytes, more than {MAX_WEIGHTS}"
    yield from (f"{name} is missing, metadata.json states its SHA-256" for name in stated.keys() - paths)
    for name, path in paths.items():
        if sha256_of(path) != stated.get(name):
            yield f"{name} has the SHA-256 {sha256_of(path)}, metadata.json says {stated.get(name)}"
        state = torch.load(path, map_location="cpu", weights_only=True)
        yield from (f"{name}: {k} is no tensor" for k, value in state.items() if not isinstance(value, torch.Tensor))
    build_network(bundle)  # loads them strictly


def _network_faults(bundle: Path, meta: dict) -> Iterator[str]:
    verify_net_in_out(
        net_id="network_def",
        meta_file=str(bundle / "configs" / "metadata.json"),
        config_file=str(bundle / "configs" / "inference.json"),
        device="cpu",
        bundle_root=str(bundle),
    )
    yield from ()


def _run_faults(bundle: Path, meta: dict) -> Iterator[str]:
    generates = meta["network_data_format"]["inputs"]["image"]["type"] == "noise"
    yield from (_generation_faults if generates else _orientation_faults)(bundle, meta)


def _orientation_faults(bundle: Path, meta: dict) -> Iterator[str]:
    """The same scan stored with other axes must give the same result, voxel by voxel."""
    flips = nib.orientations.axcodes2ornt("ASL")  # no axis stays where it was
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "scans").mkdir()
        for path in (bundle / "docs").glob("demo*.nii.gz"):  # the scan, and masks that belong to it
            scan = nib.load(path)
            slices = slice(scan.shape[2] // 2 - 1, scan.shape[2] // 2 + 1)
            plain = nib.Nifti1Image(np.asarray(scan.dataobj)[:, :, slices], scan.affine)
            turned = plain.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(scan.affine), flips))
            for name, stored in (("plain", plain), ("turned", turned)):
                nib.save(stored, root / "scans" / path.name.replace("demo", name, 1))
        run_inference(bundle, root / "scans", root / "out")
        for ending in sorted(p.name.removeprefix("plain_")[:-7] for p in (root / "out" / "plain").glob("*.nii.gz")):
            plain, other = (nib.load(root / "out" / name / f"{name}_{ending}.nii.gz") for name in ("plain", "turned"))
            if other.shape[:3] != turned.shape[:3] or not np.allclose(other.affine, turned.affine):
                yield f"the {ending} of a scan stored as ASL lies on another grid than the scan"
                continue
            back = nib.as_closest_canonical(other).get_fdata()
            if not np.allclose(back, nib.as_closest_canonical(plain).get_fdata(), atol=1e-2):
                yield f"the {ending} of a scan stored as ASL differs from that of the same scan stored as it is"


def _generation_faults(bundle: Path, meta: dict) -> Iterator[str]:
    """Every image must say that it is generated, be no flat grey, and come from its seed alone."""
    with tempfile.TemporaryDirectory() as folder:
        both, alone = Path(folder) / "both", Path(folder) / "alone"
        run_inference(bundle, bundle, both, number=2, seed=5, batch_size=1)
        run_inference(bundle, bundle, alone, number=1, seed=6)
        with open(both / "generated.csv", newline="", encoding="utf-8") as file:
            seeds = [row["seed"] for row in csv.DictReader(file)]
        if seeds != ["5", "6"]:
            yield f"generated.csv has the seeds {', '.join(seeds)} where 5, 6 were asked for"
        if not (both / "contact_sheet.png").is_file():
            yield "there is no contact_sheet.png"
        for seed in (5, 6):
            path = both / f"generated_{seed}"
            picture, nifti = Image.open(f"{path}.png"), nib.load(f"{path}.nii.gz")
            pixels = np.asarray(picture)
            if pixels.min() == pixels.max():
                yield f"the image of seed {seed} is one grey level throughout"
            if not np.array_equal(pixels.T, np.asarray(nifti.dataobj)[..., 0]):
                yield f"PNG and NIfTI of seed {seed} differ"
            for kind, mark in (("PNG", " ".join(picture.text.values())), ("NIfTI", str(nifti.header["descrip"]))):
                missing = [word for word in ("Generated", meta["name"], meta["version"], str(seed)) if word not in mark]
                if missing:
                    yield f"the {kind} of seed {seed} does not say {', '.join(missing)}"
        if (both / "generated_6.png").read_bytes() != (alone / "generated_6.png").read_bytes():
            yield "the image of seed 6 depends on what is generated beside it"
