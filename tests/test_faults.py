"""What goes wrong in a clinic and on a cluster: processes that are killed, files that are damaged, weights that attack.

The numbers here are those of a short form; ``STRESS=1`` (``make stress``) takes the long one, which the README describes.
Downloads and zips that attack are in ``release/test_download``.
"""

from __future__ import annotations

import gzip
import io
import itertools
import os
import pickle
import shutil
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from conftest import (
    BRAIN,
    BUNDLES,
    FORKSERVER,
    HEAD_CT,
    files_below,
    make_ct_slice,
    make_head,
    rows_of,
    save_nifti,
    save_patient,
    start_forked,
)
from ignite.engine import Engine
from made_inputs import save_series
from monai.bundle import ConfigParser
from monai.handlers import CheckpointLoader
from monai.utils import ensure_tuple
from PIL import Image
from small_runs import FEW_LEVELS
from torch import nn

from scripts.bundle import build_network
from scripts.data.cohort import unfinished
from scripts.data.layouts import find_cases
from scripts.handlers import TrainingCheckpoint
from scripts.networks.latent_anomaly import LatentAnomalyNet

LONG = bool(os.environ.get("STRESS"))
COHORT_KILLS, TRAINING_KILLS, NUM_DAMAGED = (12, 6, 1000) if LONG else (2, 1, 60)
NUM_TOLD, NUM_TYPOS, NUM_FOLDERS = (60, 500, 500) if LONG else (6, 40, 40)
MEMORY = 6 * 2**30  # bytes that a run on damaged files may take

QUICK = {
    BRAIN: {"spatial_size": [32, 32], "pixdim": [8.0, 8.0, -1.0], "num_steps": 1, "guidance_steps": 1},
    HEAD_CT: {"spatial_size": [32, 32], "pixdim": 8.6, "num_steps": 1, **FEW_LEVELS},
}


@pytest.fixture(scope="module", autouse=True)
def forkserver() -> None:
    """Let the server import its libraries before the first run is timed."""
    process = FORKSERVER.Process(target=os.getpid)
    process.start()
    process.join()


def start(bundle: Path, config: str, log: Path, **settings: object) -> ForkServerProcess:
    """``monai.bundle run``, in a process of its own that prints to a file."""
    words = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    return start_forked(bundle, config, *words, out=log, err=log, memory=MEMORY)


def kill_and_resume(begin: Callable[[Path], ForkServerProcess], folder: Path, kills: int) -> tuple[Path, list[Path]]:
    """Kill runs by SIGKILL at random moments, and begin them again, until each has ended.

    A run that has ended before it could be killed is followed by another in a new folder.

    Args:
        begin: begins a run that writes to a folder, or goes on with what it finds there.
        folder: where the folders are made.
        kills: how often.

    Returns:
        the folder of a run that nobody disturbed, and those of the others.
    """
    begun, undisturbed = time.monotonic(), begin(folder / "undisturbed")
    undisturbed.join()
    assert undisturbed.exitcode == 0, "see the log"
    seconds = time.monotonic() - begun
    rng, folders = np.random.default_rng(0), [folder / "0"]
    while True:
        process = begin(folders[-1])
        process.join(rng.uniform(0, seconds) if kills else None)
        if process.is_alive():
            process.kill()
            process.join()
            kills -= 1
            continue
        assert process.exitcode == 0, "a run that was begun again failed, see the log"
        if not kills:
            return folder / "undisturbed", folders
        folders.append(folder / str(len(folders)))


def results_below(folder: Path) -> dict[str, object]:
    """Every file with its bytes; of ``results.csv``, the rows without the seconds, which no two runs share."""
    files = files_below(folder)
    rows = [{key: value for key, value in row.items() if key != "seconds"} for row in rows_of(folder / "results.csv")]
    return {**files, "results.csv": rows}


def test_a_cohort_that_is_killed_at_random_moments_ends_with_the_same_files(tmp_path):
    for number in range(4):
        save_patient(tmp_path / "scans", f"p{number}", seed=number, num_slices=1)
    settings = {**QUICK[BRAIN], "dataset_dir": str(tmp_path / "scans")}

    def begin(folder: Path) -> ForkServerProcess:
        return start(BRAIN, "configs/inference.json", tmp_path / "log", output_dir=str(folder), **settings)

    undisturbed, killed = kill_and_resume(begin, tmp_path / "results", COHORT_KILLS)
    expected = results_below(undisturbed)
    assert len(expected) == 21
    assert all(results_below(folder) == expected for folder in killed)
    print(f"inference was killed {COHORT_KILLS} times in {len(killed)} runs over a cohort, all like an undisturbed one")


def test_a_training_that_is_killed_at_random_moments_ends_with_the_same_weights(tmp_path):
    for number in (0, 1, 7):  # two to train on and one to validate, by the hash of their names
        save_patient(tmp_path / "scans", f"p{number}", seed=number)
    settings = {
        **{"spatial_size": [32, 32], "pixdim": [4.0, 4.0, -1.0]},
        **{"network_def#channels": [16, 32], "network_def#classifier_channels": [16, 32, 32], "augment": True},
        **{"dataset_dir": str(tmp_path / "scans"), "batch_size": 4, "epochs": 3, "epoch_length": 4, "val_interval": 1},
        **{"checkpoint_minutes": 0, "output_dir": str(tmp_path / "tensorboard")},
    }

    def begin(folder: Path) -> ForkServerProcess:
        return start(BRAIN, "configs/train.json", tmp_path / "log", ckpt_dir=str(folder), **settings)

    undisturbed, killed = kill_and_resume(begin, tmp_path / "weights", TRAINING_KILLS)
    expected, *others = (list(files_below(folder).values()) for folder in (undisturbed, *killed))
    names = {"model.pt", "checkpoint.ckpt"}
    assert all({*files_below(f)} == {*names, f"{f.name}_files.csv"} for f in (undisturbed, *killed))
    assert all(sorted(found) == sorted(expected) for found in others)
    print(f"training was killed {TRAINING_KILLS} times in {len(killed)} trainings, all like an undisturbed one")


# values that no sound header has, or that a sound one has of another file
ODD_HEADERS = {
    "sizeof_hdr": [0, 347, 540, -1],
    "dim": [
        *([0] * 8, [8, 4, 4, 4, 1, 1, 1, 1], [-3, 4, 4, 4, 1, 1, 1, 1], [3, 0, 4, 4, 1, 1, 1, 1], [3, -4, 4, 4, 1, 1, 1, 1]),
        *([3, 32767, 32767, 32767, 1, 1, 1, 1], [3, 2000, 2000, 2000, 1, 1, 1, 1], [4, 128, 128, 2, 30000, 1, 1, 1]),
        *(
            [4, 128, 128, 2, 0, 1, 1, 1],
            [5, 128, 128, 2, 1, 3, 1, 1],
            [2, 128, 128, 1, 1, 1, 1, 1],
            [1, 128, 1, 1, 1, 1, 1, 1],
        ),
        *([3, 128, 128, 1, 1, 1, 1, 1], [3, 1, 1, 2, 1, 1, 1, 1], [7, *[32767] * 7], [3, 16, 16, 128, 1, 1, 1, 1]),
    ],
    "datatype": [0, 1, 3, 4, 8, 16, 32, 64, 128, 256, 511, 512, 768, 1024, 1280, 1536, 1792, 2048, 2304, 9999, -1],
    "bitpix": [0, 1, -8, 64],
    "pixdim": [[q, *[x] * 7] for q in (-1, 0, 1, np.nan) for x in (np.nan, 0, -1, np.inf, 1e30, 1e-30, 500, 1e6)],
    "vox_offset": [np.nan, -1, 0, 347, 1e9, np.inf, 352.5],
    "scl_slope": [np.nan, np.inf, 0, -1, 1e38, 1e-45],
    "scl_inter": [np.nan, np.inf, -1e38],
    "magic": [b"", b"n+2", b"abc", b"ni1"],
    "sform_code": [-1, 7, 32767],
    "qform_code": [-1, 7],
    "srow_x": [[x] * 4 for x in (np.nan, np.inf, 0, 1e30, 1e-30, 1)],
    "srow_z": [[x] * 4 for x in (np.nan, 0, 1e6, -1)],
    "quatern_b": [np.nan, 5, np.inf],
    "qoffset_x": [np.nan, 1e30],
    "xyzt_units": [255, 3, 1],
}


def nifti_bytes(rng: np.random.Generator) -> bytes:
    """A made scan of one sequence or of three, not compressed."""
    scan, _ = make_head(num_slices=2, seed=int(rng.integers(9)))
    image = nib.Nifti1Image(scan[..., 0] if rng.integers(2) else scan, np.diag([2.0, 2.0, 5.0, 1.0]))
    return image.to_bytes()


def with_header(data: bytes, field: str, value: object) -> bytes:
    """NIfTI with a field of its header replaced; without sform and qform where the spacing is what counts."""
    header = np.frombuffer(data, nib.nifti1.header_dtype, count=1)[0].copy()
    if field in ("pixdim", "quatern_b", "qoffset_x"):
        header["sform_code"], header["qform_code"] = 0, 0 if field == "pixdim" else 1
    header[field] = value
    return header.tobytes() + data[header.nbytes :]


def flipped(data: bytes, rng: np.random.Generator, within: int | None = None) -> bytes:
    """One to sixteen random bytes changed, of the first ``within`` or of all."""
    changed = bytearray(data)
    for place in rng.integers(min(within or len(data), len(data)), size=rng.integers(1, 17)):
        changed[place] ^= int(rng.integers(1, 256))
    return bytes(changed)


def odd_header(rng, path):
    field = rng.choice(list(ODD_HEADERS))
    values = ODD_HEADERS[field]
    data = with_header(nifti_bytes(rng), field, values[rng.integers(len(values))])
    packed = rng.integers(2)
    path.with_name(path.name + (".nii.gz" if packed else ".nii")).write_bytes(gzip.compress(data, 1) if packed else data)


def flipped_header(rng, path):
    path.with_name(path.name + ".nii").write_bytes(flipped(nifti_bytes(rng), rng, within=348))


def flipped_nifti(rng, path):
    path.with_name(path.name + ".nii").write_bytes(flipped(nifti_bytes(rng), rng))


def flipped_archive(rng, path):
    path.with_name(path.name + ".nii.gz").write_bytes(flipped(gzip.compress(nifti_bytes(rng), 1), rng))


def cut_nifti(rng, path):
    data = nifti_bytes(rng)
    packed = rng.integers(2)
    data = gzip.compress(data, 1) if packed else data
    data = data[: rng.choice([0, 1, 10, 347, 348, 352, rng.integers(len(data))])]
    path.with_name(path.name + (".nii.gz" if packed else ".nii")).write_bytes(data)


def wrong_voxels(rng, path):
    scan = make_head(num_slices=2)[0][..., 0].astype(np.float32)
    kind = rng.integers(6)
    if kind == 0:
        scan[5, 6, 1] = rng.choice([np.nan, np.inf, -np.inf])
    elif kind == 1:
        scan[:] = rng.choice([0, 7, -1000])
    elif kind == 2:
        scan = scan.astype(np.complex64)
    elif kind == 3:
        scan = scan * rng.choice([1e-40, 1e30, 3e36, -1])
    elif kind == 4:
        scan = rng.normal(size=rng.choice([1, 5, 40], size=rng.integers(1, 7))).astype(np.float32)
    else:
        scan = np.stack([scan] * int(rng.choice([2, 4, 9])), axis=-1)
    save_nifti(path.with_name(path.name + ".nii.gz"), scan)


def wrong_ending(rng, path):
    data = nifti_bytes(rng)
    picture = io.BytesIO()
    Image.fromarray(make_ct_slice()).save(picture, "png")
    ending, content = [
        (".nii.gz", data),
        (".nii", gzip.compress(data, 1)),
        (".nii", picture.getvalue()),
        (".nii.gz", b"see the other folder\n"),
        (".nii", bytes(10_000)),
        (".nii.gz", gzip.compress(gzip.compress(data, 1), 1)),
        (".nii.gz", gzip.compress(data, 1) + b"rubbish"),
    ][rng.integers(7)]
    path.with_name(path.name + ending).write_bytes(content)


def bomb(rng, path):
    """Zeros that gzip packs a thousandfold: 50 million voxels."""
    header = with_header(nifti_bytes(rng), "dim", [3, 500, 500, 200, 1, 1, 1, 1])[:352]
    path.with_name(path.name + ".nii.gz").write_bytes(gzip.compress(header + bytes(50_000_000), 1))


def hollow_bomb(rng, path):
    """The header of a volume that no memory holds, and a megabyte after it."""
    header = with_header(nifti_bytes(rng), "dim", [3, 2000, 2000, int(rng.choice([200, 2000])), 1, 1, 1, 1])[:352]
    path.with_name(path.name + ".nii.gz").write_bytes(gzip.compress(header + rng.bytes(10**6), 1))


def odd_series(rng, path):
    """A DICOM series of three slices, of which one is damaged, or all lack or change an attribute."""
    voxels = make_head(num_slices=3)[0][::2, ::2, :, 0].astype(np.int16)
    save_series(path, voxels, axes=np.eye(3), series=path.name)
    chosen = path / sorted(os.listdir(path))[rng.integers(3)]
    kind = rng.integers(4)
    if kind == 0:
        chosen.write_bytes(flipped(chosen.read_bytes(), rng, within=1500))
    elif kind == 1:
        data = chosen.read_bytes()
        chosen.write_bytes(data[: rng.integers(len(data))])
    else:
        keyword = rng.choice(DICOM_ATTRIBUTES)
        for file in sorted(path.iterdir()) if kind == 2 else [chosen]:
            header = pydicom.dcmread(file)
            del header[keyword]
            header.save_as(file)


DICOM_ATTRIBUTES = [
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness", "Rows", "Columns", "PixelData"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PhotometricInterpretation", "SamplesPerPixel"),
    *("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID", "Modality"),
    *("RescaleSlope", "RescaleIntercept", "PatientID", "StudyDate"),
]


def odd_picture(rng, path):
    kind = str(rng.choice(["png", "jpeg", "tiff", "bmp"]))
    packed = io.BytesIO()
    Image.fromarray(make_ct_slice(int(rng.integers(9)))).save(packed, kind)
    data = packed.getvalue()
    data = flipped(data, rng, within=rng.choice([64, 10**6])) if rng.integers(2) else data[: rng.integers(len(data))]
    path.with_name(f"{path.name}.{kind}").write_bytes(data)


def odd_mask(rng, path):
    """A sound scan with a mask that is of another place, of no whole numbers, or there twice."""
    scan, mask = make_head(num_slices=2)
    save_nifti(path.with_name(path.name + ".nii.gz"), scan[..., 0])
    elsewhere = np.diag([2.0, 2.0, 5.0, 1.0])
    elsewhere[rng.integers(3), 3] = rng.choice([-1, 1]) * 10.0 ** rng.integers(1, 4)
    kind = rng.integers(4)
    save_nifti(
        path.with_name(f"{path.name}_seg.nii.gz"),
        mask * rng.uniform(0.1, 0.9) if kind == 0 else mask[: rng.choice([20, 64, 128])],
        elsewhere if kind == 1 else np.eye(4) if kind == 2 else None,
    )
    if kind == 3:
        save_nifti(path.with_name(f"{path.name}_seg.nii"), mask)


DAMAGES = {
    BRAIN: [odd_header, wrong_voxels, flipped_header, odd_series] * 2
    + [odd_header, flipped_nifti, flipped_archive, cut_nifti, wrong_ending, odd_mask, odd_header],
    HEAD_CT: [odd_picture, odd_header, odd_picture, wrong_voxels, odd_series, odd_picture, cut_nifti, wrong_ending],
}


def damaged_scans(bundle: Path, folder: Path, number: int) -> list[str]:
    """Write so many damaged scans, two bombs among them; returns the names of the cases."""
    folder.mkdir()
    kinds = [bomb, hollow_bomb, *itertools.islice(itertools.cycle(DAMAGES[bundle]), number - 2)]
    for i, kind in enumerate(kinds):
        kind(np.random.default_rng(i), folder / f"{i:04}")
    return [f"{i:04}" for i in range(number)]


@pytest.mark.parametrize("bundle", [BRAIN, HEAD_CT], ids=lambda bundle: bundle.name)
def test_every_damaged_scan_of_a_cohort_gives_a_result_or_one_line_that_names_it(tmp_path, bundle):
    names = damaged_scans(bundle, tmp_path / "scans", NUM_DAMAGED // 2)
    output, log = tmp_path / "results", tmp_path / "log"
    folders = {"dataset_dir": str(tmp_path / "scans"), "output_dir": str(output)}
    process = start(bundle, "configs/inference.json", log, **QUICK[bundle], **folders, **{"handlers#0#picture": False})
    process.join()
    text = log.read_text(errors="replace")
    assert process.exitcode == 1 and "Traceback" not in text, text[-5000:]

    finished = [row["case"] for row in rows_of(output / "results.csv")]
    reasons = {row["case"]: row["reason"] for row in rows_of(output / "failures.csv")}
    assert sorted([*finished, *reasons]) == names and finished and reasons
    for case, reason in reasons.items():
        assert f"{tmp_path / 'scans' / case}" in reason and "\n" not in reason and "MemoryError" not in reason
        assert f"{case}: {reason}" in text
    assert {path.name for path in output.iterdir()} == {*finished, "results.csv", "failures.csv"}
    for case in finished:
        found = {path.name for path in (output / case).iterdir()} - {f"{case}_seg.dcm", f"{case}_files.csv"}
        assert found == {f"{case}_{ending}.nii.gz" for ending in ("seg", "map", "healthy")}
        assert not [name for name in found if not np.isfinite(nib.load(output / case / name).get_fdata()).all()]
    print(f"{bundle.name}: {len(names)} damaged scans, {len(finished)} results, {len(reasons)} refused")


# --- mistakes of users: what is told otherwise is the same, or refused


def stored_otherwise(rng, image):
    """With other axes, and the affine that says so."""
    axes = rng.permutation(3)
    codes = [("LR", "PA", "IS")[axis][rng.integers(2)] for axis in axes]
    turn = nib.orientations.ornt_transform(nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(codes))
    return image.as_reoriented(turn)


def in_another_unit(rng, image):
    """In metres or microns, and the header that says so."""
    unit, factor = [("meter", 1e-3), ("micron", 1e3)][rng.integers(2)]
    told = nib.Nifti1Image(np.asarray(image.dataobj), np.diag([factor, factor, factor, 1]) @ image.affine)
    told.header.set_xyzt_units(unit)
    return told


def with_a_bad_sform(rng, image):
    """With an sform of another spacing than the qform and the voxels have."""
    told = nib.Nifti1Image(np.asarray(image.dataobj), image.affine)
    told.set_qform(image.affine, code=1)
    told.set_sform(image.affine @ np.diag([*rng.uniform(1.5, 3, 3), 1]), code=2, update_affine=False)
    return told


def with_a_bad_pixdim(rng, image):
    """With a spacing beside the sform that is not its own."""
    told = nib.Nifti1Image(np.asarray(image.dataobj), image.affine)
    told.header["pixdim"][1:4] = rng.uniform(0.5, 3, 3)
    return told


def in_rounded_numbers(rng, image):
    """Whole numbers that a file of floating-point ones has rounded."""
    voxels = np.asarray(image.dataobj).astype(np.float32)
    return nib.Nifti1Image(voxels - np.float32(1e-6) * (voxels > 0), image.affine)


def test_what_is_only_told_otherwise_gives_the_same_figures(tmp_path):
    """Scans and masks in other axes, units and numbers have the Dice, the volumes and the scores of sound ones."""
    scans = (stored_otherwise, in_another_unit, with_a_bad_sform, with_a_bad_pixdim)
    masks = (stored_otherwise, in_another_unit, in_rounded_numbers)
    for number in range(NUM_TOLD):
        rng = np.random.default_rng(number)
        voxels, mask = make_head(num_slices=2, num_sequences=1, seed=number % 3)
        for kind, told in (("sound", False), ("told", True)):
            for ending, array, ways in (("", voxels[..., 0], scans), ("_seg", mask, masks)):
                image = nib.Nifti1Image(array, np.diag([2.0, 2.0, 5.0, 1.0]))
                image = ways[(number + bool(ending)) % len(ways)](rng, image) if told else image
                path = tmp_path / kind / f"{number:04}{ending}.nii.gz"
                path.parent.mkdir(exist_ok=True)
                nib.save(image, path)
    tables = {}
    for kind in ("sound", "told"):
        paths = {"dataset_dir": str(tmp_path / kind), "output_dir": str(tmp_path / f"{kind}_out"), "section": "all"}
        found = {"gate": False, "skip_below": 0, "threshold": 0.02, "min_volume": 0, "handlers#0#picture": False}
        config = "['configs/inference.json','configs/evaluate.json']"
        process = start(BRAIN, config, tmp_path / "log", **{**QUICK[BRAIN], **paths, **found})
        process.join()
        assert process.exitcode == 0, (tmp_path / "log").read_text()[-5000:]
        tables[kind] = [rows_of(tmp_path / f"{kind}_out" / name) for name in ("results.csv", "metrics.csv")]
    assert all(float(row["finding_ml"]) > 0 for row in tables["sound"][0]), "there is something to compare"
    for sound, told in zip(*tables.values(), strict=True):
        assert len(sound) == len(told) >= NUM_TOLD and "nan" not in sound[0].values()
        for one, other in zip(sound, told, strict=True):
            words = ("sequences", "unlike_in", "arithmetic", "bundle", "version", "weights")
            assert all(other.get(key) == one.get(key) for key in words)
            for key in one.keys() - {"case", "seconds", *words}:
                assert float(other[key]) == pytest.approx(float(one[key]), rel=2e-3, abs=5e-5), (one["case"], key)
    print(f"{NUM_TOLD} scans and masks that were told otherwise have the figures of sound ones")


def test_every_misspelt_setting_is_refused_with_the_name_that_was_meant_or_none(monkeypatch):
    """A letter lost, doubled, swapped or changed in the name of any setting of any bundle."""
    monkeypatch.chdir(BRAIN)
    rng, refused, meant = np.random.default_rng(0), 0, 0
    for number in range(NUM_TYPOS):
        bundle = BUNDLES[number % len(BUNDLES)]
        parser = ConfigParser()
        parser.read_config(bundle / "configs" / "inference.json")
        names = [name for name, value in parser.config.items() if isinstance(value, (int, float)) and len(name) > 4]
        name = names[rng.integers(len(names))]
        place, letter = int(rng.integers(1, len(name) - 1)), chr(rng.integers(97, 123))
        typo = [
            name[:place] + name[place + 1 :],
            name[:place] + name[place] + name[place:],
            name[:place] + name[place + 1] + name[place] + name[place + 2 :],
            name[:place] + letter + name[place + 1 :],
        ][rng.integers(4)]
        if typo in parser.config:
            continue
        parser.config |= {typo: 1, "bundle_root": str(bundle), "checked": {"_target_": "scripts.settings.check"}}
        with pytest.raises(RuntimeError) as error:
            parser.get_parsed_content("checked")
        reason = str(error.value.__cause__ or error.value)
        assert f"--{typo}: no such setting" in reason and "\n" not in reason
        refused, meant = refused + 1, meant + (f"is --{name} meant?" in reason)
    assert refused >= meant > 0.9 * NUM_TYPOS
    print(f"{refused} misspelt settings were refused, {meant} with the name that was meant")


def test_no_output_folder_around_an_input_or_in_one_is_ever_taken(tmp_path):
    """Random trees of scans, and output folders among, above, below and beside them."""
    taken = 0
    for number in range(NUM_FOLDERS):
        rng = np.random.default_rng(number)
        root = tmp_path / str(number)
        names = [f"p{i}" for i in range(rng.integers(1, 4))]
        layout = rng.integers(3)
        for name in names:
            paths = [f"{name}/{name}_flair.nii.gz", f"{name}.nii.gz", f"{name}/1.dcm"]
            (root / "data" / paths[layout]).parent.mkdir(parents=True, exist_ok=True)
            (root / "data" / paths[layout]).touch()
        places = ["data", "data/..", "data/p0", "data/p0/..", "data/p0/out", "data/out", "out", ".", "data/p0/p0"]
        output = root / places[rng.integers(len(places))]
        cases = find_cases(root / "data", ("t1", "flair", "t1ce"))
        inputs = [path.resolve() for case in cases for path in ensure_tuple(case["image"]) if path for path in [Path(path)]]
        folders = [(output / case["case"]).resolve() for case in cases]
        mixed = any(
            folder in (path, *path.parents) or (path.is_dir() and path in folder.parents)
            for folder in folders
            for path in inputs
        )
        if mixed:
            with pytest.raises(ValueError, match="is an input"):
                unfinished(cases, output, overwrite=True)
        else:
            assert len(unfinished(cases, output, overwrite=True)) == len(cases)
            taken += 1
    assert 0 < taken < NUM_FOLDERS
    print(f"of {NUM_FOLDERS} output folders {taken} were apart from all inputs and taken, the others refused")


class Attack:
    """Touches a file as soon as it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def in_a_bundle(weights: Path) -> nn.Module:
    """The network of a bundle with these weights, as ``verify`` and ``benchmark`` make it."""
    bundle = shutil.copytree(HEAD_CT, weights.parent / HEAD_CT.name, ignore=shutil.ignore_patterns("model.pt", "scripts"))
    (Path(bundle) / "scripts").symlink_to(HEAD_CT / "scripts")
    shutil.copy(weights, Path(bundle) / "models" / "model.pt")
    return build_network(Path(bundle))


def resume(path: Path) -> None:
    engine = Engine(lambda *_: None)
    engine.state.device = "cpu"
    TrainingCheckpoint(path, {}, None).resume(engine)


LOADERS = {
    "inference": lambda path: CheckpointLoader(str(path), {"model": nn.Linear(1, 1)})(Engine(lambda *_: None)),
    "verify": in_a_bundle,
    "initial weights": lambda path: LatentAnomalyNet().load_weights(path),
    "autoencoder": lambda path: LatentAnomalyNet().autoencoder.load_from(path),
    "resumed training": resume,
}


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS.keys())
def test_weights_that_would_run_code_are_refused_and_run_none(tmp_path, load, kind):
    weights, touched = tmp_path / "model.pt", tmp_path / "touched"
    content = {"weight": torch.ones(1, 1), "attack": Attack(touched)}
    if kind == "pickle":
        weights.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, weights, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(pickle.UnpicklingError):
        load(weights)
    assert not touched.exists()
    torch.load(weights, weights_only=False) if kind != "pickle" else pickle.loads(weights.read_bytes())
    assert touched.exists(), "the attack works where it is let in"
