"""Every bundle's inference and training in this process, as small as they can be, on any device."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from conftest import (
    BRAIN,
    CARDIAC,
    CHEST,
    COUNTERFACTUAL,
    HEAD_CT,
    ONE_STEP,
    REGISTRATION,
    SEGMENTATION,
    SIMPLEX,
    make_cine,
    make_ct_slice,
    make_head,
    save_nifti,
    save_patient,
)
from monai.bundle import ConfigParser, ConfigWorkflow
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from scripts.data.sections import section_of

VOXELS = np.diag([1.5, 1.5, 3.15, 1.0])

# quicker than what the quantiles were measured with, which changes what is found and not how
FEW_LEVELS = {"band_levels": 2, "calibrated_for#band_levels": 2}

# what is inferred: the bundle, other configurations beside inference.json, and settings
INFERENCES = {
    "brain": (BRAIN, ("evaluate",), {"num_steps": 1, "guidance_steps": 1, "section": "all"}),
    "brain by stochastic steps": (BRAIN, (), {"mode": "ddpm", "num_steps": 2, "guidance_steps": 0}),
    "brain in one step": (ONE_STEP, ("evaluate",), {"section": "all"}),
    "brain through octaves": (SIMPLEX, ("evaluate",), {"num_steps": 2, "num_repeats": 2, "section": "all"}),
    "brain through octaves by stochastic steps": (SIMPLEX, (), {"num_steps": 2, "solver": "ancestral"}),
    "brain, counterfactual": (COUNTERFACTUAL, ("evaluate",), {"num_steps": 1, "section": "all"}),
    "head CT": (HEAD_CT, (), {**FEW_LEVELS, "healings": 2}),
    "head CT by stochastic steps": (HEAD_CT, (), {**FEW_LEVELS, "variant": "c", "start_level": 5, "healings": 1}),
    "chest X-ray": (CHEST, (), {"number": 3, "num_steps": 3, "batch_size": 2}),
    "cardiac": (CARDIAC, ("evaluate",), {"refinement_steps": 2, "coarse_steps": 1, "section": "all"}),
    "registration": (REGISTRATION, ("evaluate",), {"refinement_steps": 2, "coarse_steps": 1, "section": "all"}),
    "segmentation": (SEGMENTATION, ("evaluate",), {"num_samples": 2, "num_steps": 2, "section": "all"}),
    "segmentation by stochastic steps": (SEGMENTATION, (), {"num_samples": 2, "num_steps": 2, "solver": "ancestral"}),
}
# what is trained: the bundle, other configurations beside train.json, and settings
CT = {"spatial_size": [32, 32], "network_def#autoencoder": {"channels": [8, 8], "num_embeddings": 32}}
CINE = {"spatial_size": [32, 32, 8]}
TRAININGS = {
    "brain": (
        BRAIN,
        (),
        {
            "spatial_size": [32, 32],
            "network_def#channels": [16, 32],
            "network_def#classifier_channels": [16, 32, 32],
            "augment": True,
        },
    ),
    "brain in one step": (ONE_STEP, (), {"spatial_size": [32, 32], "network_def#channels": [16, 32]}),
    "brain in one step, noise": (
        ONE_STEP,
        (),
        {"spatial_size": [32, 32], "network_def#channels": [16, 32], "corruption": "noise"},
    ),
    "brain through octaves": (SIMPLEX, (), {"spatial_size": [32, 32], "network_def#channels": [16, 32]}),
    "brain, counterfactual": (COUNTERFACTUAL, (), {"spatial_size": [32, 32], "network_def#channels": [16, 32]}),
    "segmentation": (SEGMENTATION, (), {"spatial_size": [32, 32], "network_def#channels": [16, 32]}),
    "segmentation, direct": (
        SEGMENTATION,
        ("train_direct",),
        {"spatial_size": [32, 32], "network_def#channels": [16, 32]},
    ),
    "head CT, VQ-VAE": (HEAD_CT, ("train_autoencoder",), {**CT, "network_def#unet_channels": [32, 32]}),
    "head CT, U-Net": (HEAD_CT, (), {**CT, "network_def#unet_channels": [32, 32]}),
    "head CT, transformer": (
        HEAD_CT,
        ("train_transformer",),
        {
            **CT,
            "network_def#attn_layers_dim": 16,
            "network_def#attn_layers_depth": 1,
            "network_def#attn_layers_heads": 2,
        },
    ),
    "head CT, VAE": (HEAD_CT, ("train_vae",), {"spatial_size": [32, 32], "network_def#channels": [8, 8]}),
    "chest X-ray": (CHEST, (), {"spatial_size": [16, 16], "network_def#channels": [32, 32], "network_def#num_steps": 2}),
    "chest X-ray, MedVDM": (
        CHEST,
        ("train_medvdm",),
        {
            "spatial_size": [16, 16],
            "network_def#hidden_size": 16,
            "network_def#latent_size": 4,
            "network_def#num_steps": 2,
            "network_def#num_classes": 2,
            "network_def#gradient_weight": 1.0,
        },
    ),
    "chest X-ray, copy filter": (
        CHEST,
        ("train_copy_filter",),
        {"spatial_size": [16, 16], "network_def#channels": [8, 8, 8, 8], "network_def#size": 8},
    ),
    "cardiac": (
        CARDIAC,
        (),
        {**CINE, "network_def#channels": [4, 4, 8], "network_def#deformation_out": 8, "clean_share": 0.0},
    ),
    "registration": (REGISTRATION, (), {**CINE, "channels": [4, 4, 8], "deformation_out": 8}),
    "registration, the paper's objective": (REGISTRATION, ("train_published",), {**CINE, "channels": [4, 4, 8]}),
    "cardiac, VoxelMorph": (CARDIAC, ("train_voxelmorph",), {**CINE, "network_def#out_channels": 8}),
}


# settings of a quick training of the chest X-ray bundle by model, as arguments of a command
TINY = {
    "image": ("--network_def#channels", "[32,32]", "--network_def#num_steps", 2),
    "medvdm": ("--network_def#hidden_size", 16, "--network_def#latent_size", 4, "--network_def#num_steps", 2),
}


def training_images(bundle: Path, dataset_dir: Path, **settings: object) -> torch.Tensor:
    """All slices that a bundle is trained on, (N, C, H, W), as they are."""
    config = ConfigParser.load_config_file(bundle / "configs" / "train.json")
    parser = ConfigParser({**config, "bundle_root": str(bundle), "dataset_dir": str(dataset_dir), **settings})
    return torch.stack([item["image"] for item in parser.get_parsed_content("train#dataset")])


def make_data(folder: Path) -> None:
    """Data for all bundles, ``<bundle>`` for the inference and ``<bundle>_training`` for the training, and a made VQ-VAE."""
    patients = [f"p{i}" for i in range(40)]
    chosen = [next(p for p in patients if section_of(p) == section) for section in ("training", "validation")]
    scan, mask = make_head(num_slices=2)
    for bundle in (BRAIN, ONE_STEP, COUNTERFACTUAL, SEGMENTATION, SIMPLEX):
        save_nifti(folder / bundle.name / "scan.nii.gz", scan)
        save_nifti(folder / bundle.name / "scan_seg.nii.gz", mask)
    cine, labels = make_cine(4)
    for number, name in enumerate(chosen):
        for bundle in (BRAIN, ONE_STEP, COUNTERFACTUAL, SEGMENTATION, SIMPLEX):
            save_patient(folder / f"{bundle.name}_training", name, seed=number, num_slices=4)
        for bundle in (CARDIAC, REGISTRATION):
            save_nifti(folder / f"{bundle.name}_training" / f"{name}.nii.gz", make_cine(4, number)[0], VOXELS)
    for bundle in (CARDIAC, REGISTRATION):
        save_nifti(folder / bundle.name / "cine.nii.gz", cine, VOXELS)
        save_nifti(folder / bundle.name / "cine_ed_gt.nii.gz", labels[..., 0], VOXELS)
        save_nifti(folder / bundle.name / "cine_es_gt.nii.gz", labels[..., -1], VOXELS)
    stack = np.stack([make_ct_slice(0), make_ct_slice(1)], axis=-1)
    stack[28:38, 34:42, 0] = 220
    save_nifti(folder / HEAD_CT.name / "scan.nii.gz", stack, np.diag([-1.0, -1.0, 5.0, 1.0]))
    (folder / CHEST.name).mkdir()  # it takes no scan
    for bundle in (HEAD_CT, CHEST):
        (folder / f"{bundle.name}_training").mkdir()
        for i in range(36):
            Image.fromarray(make_ct_slice(i)).save(folder / f"{bundle.name}_training" / f"{i:03}.png")
    train("head CT, VQ-VAE", folder, folder / "vqvae", "cpu")


@contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def run_workflow(bundle: Path, names: tuple[str, ...], device: str, settings: dict) -> ConfigWorkflow:
    """Run configurations of a bundle as ``monai.bundle run`` does, in 32 bits if nothing else is said."""
    with _inside(bundle):
        workflow = ConfigWorkflow(
            config_file=[f"configs/{name}.json" for name in names],
            logging_file=False,
            device=f"$torch.device('{device}')",
            **{"amp": False, **settings},
        )
        workflow.initialize()
        workflow.run()
        workflow.finalize()
    return workflow


def infer(name: str, data: Path, output: Path, device: str, **changes: object) -> dict[str, np.ndarray]:
    """One of :data:`INFERENCES`; the voxels of every NIfTI file that it writes, by the file's name."""
    bundle, names, settings = INFERENCES[name]
    settings = settings | {"dataset_dir": str(data / bundle.name), "output_dir": str(output)} | changes
    run_workflow(bundle, ("inference", *names), device, settings)
    return {path.name: nib.load(path).get_fdata() for path in sorted(output.rglob("*.nii.gz"))}


def training(name: str, data: Path, output: Path, iterations: int = 1) -> tuple[Path, tuple[str, ...], dict]:
    """Bundle, configurations and settings of one of :data:`TRAININGS`, one iteration an epoch, validated at its end."""
    bundle, names, settings = TRAININGS[name]
    settings = settings | {
        "dataset_dir": str(data / f"{bundle.name}_training"),
        "ckpt_dir": str(output),
        "output_dir": str(output / "log"),
        "batch_size": 2 if bundle is not CARDIAC else 1,
        "epochs": iterations,
        "epoch_length": 1,
        "val_interval": 100,  # and after the last one
        "warmup_steps": 0,  # else the first step changes nothing
        **({"initial_weights": str(data / "vqvae" / "model.pt")} if bundle is HEAD_CT else {}),
    }
    return bundle, ("train", *names), settings


def train(name: str, data: Path, output: Path, device: str, iterations: int = 1, **changes: object) -> ConfigParser:
    """Run one of :data:`TRAININGS`; the configuration with all its parts, as they are at the end."""
    bundle, names, settings = training(name, data, output, iterations)
    return run_workflow(bundle, names, device, settings | changes).parser


def losses(folder: Path) -> list[float]:
    """The loss of every iteration, from TensorBoard's files, of which one process wrote one for training."""
    found = []
    for path in folder.glob("events*"):
        events = EventAccumulator(str(path))
        events.Reload()
        if "loss" in events.Tags()["scalars"]:
            found.append([event.value for event in events.Scalars("loss")])
    assert len(found) == 1
    return found[0]
