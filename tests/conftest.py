"""Made scans, and the folders of the project, for tests that need more than one module."""

from __future__ import annotations

import csv
import multiprocessing
import os
import resource
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import ModuleType, SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage

# the tests' networks are too small to share out, here and in the processes that tests begin
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parent.parent
BRAIN, ONE_STEP, COUNTERFACTUAL, HEAD_CT, CARDIAC, CHEST, SEGMENTATION, REGISTRATION, SIMPLEX, PANCREAS = BUNDLES = [
    ROOT / "bundles" / name
    for name in (
        "brain_mri_anomaly_ddim",
        "brain_mri_anomaly_one_step",
        "brain_mri_anomaly_counterfactual",
        "head_ct_anomaly_ldm",
        "cardiac_mri_deformable_diffusion",
        "chest_xray_generative_vdm",
        "brain_mri_segmentation_ensemble",
        "cardiac_mri_registration_diffusemorph",
        "brain_mri_anomaly_simplex",
        "pancreas_ct_anomaly_ddim",
    )
]
LGG = ROOT.parent / "shared" / "data" / "lgg"
ACDC = ROOT.parent / "shared" / "data" / "acdc"
MEDNIST = ROOT.parent / "shared" / "data" / "mednist"
SCHEMA = ROOT.parent / "shared" / "schema" / "meta_schema_20240725.json"


def run_command(config: str, *args: object) -> list[str]:
    """Arguments of ``python`` for ``monai.bundle run``, in float32, which tests compare, unless ``args`` say otherwise."""
    return ["-m", "monai.bundle", "run", "--config_file", config, "--amp", "False", *map(str, args)]


def run(bundle: Path, config: str, *args: object, **kwargs: object) -> subprocess.CompletedProcess:
    """``monai.bundle run`` in the bundle's folder, as a user starts it."""
    command = [sys.executable, *run_command(config, *args)]
    return subprocess.run(command, cwd=bundle, capture_output=True, text=True, **kwargs)


def torchrun(bundle: Path, config: str, *args: object, processes: int = 2, **kwargs: object) -> subprocess.Popen:
    """Begin ``torchrun`` in the bundle's folder; what the processes print goes into pipes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, *run_command(config, *args)], cwd=bundle, **pipes, **kwargs)


def finished(process: subprocess.Popen) -> str:
    """What a process that ended well has printed."""
    out, err = process.communicate()
    assert process.returncode == 0, err[-3000:]
    return out


# forked from a process that has imported the libraries, a run begins at once
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(
    ["monai.bundle", "monai.engines", "monai.networks.nets", "itk", "highdicom", "sklearn.metrics", "pytest"]
)


def start_forked(
    bundle: Path, config: str, *args: object, out: Path, err: Path, memory: int | None = None
) -> ForkServerProcess:
    """Begin what ``run`` does in a forked process, which saves the seconds that importing the libraries takes.

    Args:
        bundle: folder of the bundle.
        config: the configuration, or a list of them.
        args: further arguments.
        out: file that the process appends what it prints to.
        err: file that it appends its standard error to, which may be the same.
        memory: bytes of data that it may have.
    """
    process = FORKSERVER.Process(target=_run_here, args=(bundle, run_command(config, *args), out, err, memory))
    process.start()
    return process


def _run_here(bundle: Path, command: list[str], out: Path, err: Path, memory: int | None) -> None:
    """What ``python`` does with the arguments of ``run_command``."""
    for stream, path in ((1, out), (2, err)):
        with open(path, "ab") as file:
            os.dup2(file.fileno(), stream)
    if memory:
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    os.chdir(bundle)
    # the bundle finds its code by itself, not what the tests find
    others = [path for path in sys.path if Path(path) != ROOT and not Path(path).is_relative_to(ROOT / "tests")]
    sys.path = [str(bundle), *others]
    sys.argv = command[1:]
    try:
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    except Exception:  # multiprocessing would print a traceback of its own
        sys.excepthook(*sys.exc_info())
        sys.exit(1)


def run_forked(bundle: Path, config: str, *args: object) -> subprocess.CompletedProcess:
    """The same as ``run``, in a forked process."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        process = start_forked(bundle, config, *args, out=out, err=err)
        process.join()
        return subprocess.CompletedProcess(args, process.exitcode, *(p.read_text(errors="replace") for p in (out, err)))


def rows_of(path: Path) -> list[dict[str, str]]:
    """Rows of a table."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def files_below(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def stand_in_engine(amp: bool | str = False) -> SimpleNamespace:
    """What a saver asks of the engine that it starts with."""
    return SimpleNamespace(network=SimpleNamespace(amp=amp), state=SimpleNamespace(device=torch.device("cpu")))


def make_head(num_slices: int = 3, num_sequences: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A made scan (128, 128, num_slices, num_sequences), and the mask of its bright lesion in every second slice."""
    rng = np.random.default_rng(seed)
    x, y = np.mgrid[-1:1:128j, -1:1:128j]
    head = ((x / 0.7) ** 2 + (y / 0.85) ** 2 < 1).astype(np.float32)
    scan = head[..., None, None] * rng.normal(90, 5, (128, 128, num_slices, num_sequences))
    mask = np.zeros((128, 128, num_slices), np.uint8)
    mask[70:85, 60:75, ::2] = 1
    scan[..., min(1, num_sequences - 1)] += 60 * mask
    return scan.clip(0, 255).astype(np.uint8), mask


def save_nifti(path: Path, data: np.ndarray, affine: np.ndarray | None = None) -> Path:
    """Write an array as NIfTI, on a grid of 2 x 2 x 5 mm if no other is given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data, np.diag([2.0, 2.0, 5.0, 1.0]) if affine is None else affine), path)
    return path


def save_patient(folder: Path, name: str, seed: int = 0, num_slices: int = 3) -> Path:
    """Write a made patient in the layout of BraTS, with its mask."""
    scan, mask = make_head(num_slices, seed=seed)
    for channel, sequence in enumerate(("t1", "flair", "t1ce")):
        save_nifti(folder / name / f"{name}_{sequence}.nii.gz", scan[..., channel])
    save_nifti(folder / name / f"{name}_seg.nii.gz", mask)
    return folder / name


def make_whole_head() -> tuple[np.ndarray, np.ndarray]:
    """A slice of MRI (3, 128, 128) with scalp, skull and brain, and where the brain is, (128, 128)."""
    x, y = np.mgrid[-1:1:128j, -1:1:128j]
    radius = np.hypot(x / 0.65, y / 0.8)
    image = np.select([radius < 0.8, radius < 0.9, radius < 1], [0.4, 0.05, 0.7], 0.0).astype(np.float32)
    image[60:70, 60:70] += 0.3
    return np.stack([image] * 3), radius < 0.8


def make_ct_slice(seed: int = 0) -> np.ndarray:
    """A made axial slice of a head CT (64, 64), x to the patient's left and y to the back: air 25, brain, skull 255."""
    rng = np.random.default_rng(seed)
    x, y = np.mgrid[-1:1:64j, -1:1:64j]
    radius = np.hypot(x / 0.55, (y - 0.1) / 0.68)
    head = np.full((64, 64), 25.0)
    head[radius < 1] = 255
    head[radius < 0.85] = 110
    return (head + rng.normal(0, 4, head.shape) * (radius < 0.85)).clip(0, 255).astype(np.uint8)


def make_cine(num_frames: int = 5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A made beating heart (32, 28, 6, num_frames), int16, and its labels: 1 right ventricle, 2 wall, 3 left ventricle."""
    x, y, z = np.mgrid[-16:16, -14:14, -3:3].astype(float)
    texture = ndimage.gaussian_filter(np.random.default_rng(seed).normal(0, 1, x.shape), 1.5) * 150
    cine, labels = [], []
    for shrunk in np.linspace(1, 0.7, num_frames):
        radius = np.sqrt((x - 3) ** 2 + y**2 + (0.5 * z) ** 2)
        label = np.zeros(x.shape, np.uint8)
        label[(x + 8) ** 2 + y**2 < 16] = 1
        label[radius < 8] = 2
        label[radius < 6 * shrunk] = 3
        labels.append(label)
        cine.append(np.array([80, 300, 120, 300])[label] + texture)
    return np.stack(cine, axis=-1).round().astype(np.int16), np.stack(labels, axis=-1)


def save_turned(folder: Path, cine: np.ndarray, affine: np.ndarray) -> list[Path]:
    """Write a cine as it is (``ras.nii.gz``, as its affine has to be) and stored with other axes (``asl.nii.gz``)."""
    ras = nib.Nifti1Image(cine, affine)
    turn = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt("ASL"))
    images = {"ras": ras, "asl": ras.as_reoriented(turn)}
    return [save_nifti(folder / f"{name}.nii.gz", np.asarray(i.dataobj), i.affine) for name, i in images.items()]


@pytest.fixture(scope="session")
def bundle() -> Path:
    return BRAIN


def code_of(*parts: object) -> set[Path]:
    """The folders of the packages ``scripts`` that objects were made by, whatever has been imported since."""
    files = [Path(type(part).__init__.__code__.co_filename).resolve() for part in parts]
    return {next(folder for folder in file.parents if folder.name == "scripts") for file in files}


def forget_code() -> dict[str, ModuleType]:
    """Let Python forget the package ``scripts``; gives what it had loaded of it, by name."""
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "scripts"}


@pytest.fixture
def own_imports() -> Iterator[None]:
    """Lets a test import another package ``scripts``, and puts back what was there."""
    path, before = list(sys.path), forget_code()
    yield
    sys.path[:] = path
    forget_code()
    sys.modules.update(before)


def infer_made_heads(bundle: Path, folder: Path) -> tuple[Path, subprocess.CompletedProcess]:
    """A bundle's inference of a patient, a 4-D file, FLAIR alone and a file that is bad: the output folder, the process."""
    scan, _ = make_head()
    save_patient(folder / "scans", "good_patient")
    save_nifti(folder / "scans" / "good_4d.nii.gz", scan)
    save_nifti(folder / "scans" / "good_flair_only.nii.gz", scan[..., 1])
    save_nifti(folder / "scans" / "bad_two_sequences.nii.gz", scan[..., :2])
    args = ("--dataset_dir", folder / "scans", "--output_dir", folder / "output")
    return folder / "output", run_forked(bundle, "configs/inference.json", *args)


def check_made_heads(output: Path, done: subprocess.CompletedProcess) -> None:
    """The good ones of :func:`infer_made_heads` are finished, and the bad one is named last."""
    assert done.returncode == 1 and "bad_two_sequences" in done.stderr.strip().splitlines()[-1]
    rows = rows_of(output / "results.csv")
    assert sorted(row["case"] for row in rows) == ["good_4d", "good_flair_only", "good_patient"]
    assert all(0 < float(row["abnormality"]) < 1 for row in rows)
    endings = ("files.csv", "healthy.nii.gz", "map.nii.gz", "overview.png", "seg.nii.gz")
    for row in rows:
        assert sorted(p.name for p in (output / row["case"]).iterdir()) == [f"{row['case']}_{e}" for e in endings]
