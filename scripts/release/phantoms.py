"""Made patients with tumours in the pancreas: whole abdomens, and tumours painted into pictures of real healthy ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image
from scipy import ndimage

from scripts.data.layouts import PICTURES, stem_of, visible
from scripts.organs import likely_organ
from scripts.tasks.anomaly.painted import in_frame

__all__ = ["draw_abdomen", "draw_abdomens", "paint_boxes", "paint_tumour"]

AIR, FAT, MUSCLE, LIVER, KIDNEY, BLOOD, BONE, PANCREAS = -1000, -100, 55, 105, 170, 150, 350, 95  # HU, portal venous phase
LABELS = {"0": "background", "1": "pancreas", "2": "cancer"}  # as the Decathlon names them


def _blob(shape: Sequence[int], rng: np.random.Generator, centre: Sequence[float], radii: Sequence[float]) -> np.ndarray:
    """Signed distance from the rim of a lumpy ellipsoid, in units of its mean radius; negative inside."""
    axes = np.indices(shape, dtype=np.float32)
    away = sum(((axis - c) / r) ** 2 for axis, c, r in zip(axes, centre, radii, strict=True)) ** 0.5
    lumps = ndimage.gaussian_filter(rng.standard_normal(shape).astype(np.float32), np.maximum(np.array(radii) / 2, 0.5))
    return away - 1 - 0.15 * lumps / max(float(lumps.std()), 1e-6)


def _texture(shape: Sequence[int], rng: np.random.Generator, sigma: Sequence[float], size: float) -> np.ndarray:
    """Correlated noise with the standard deviation ``size``."""
    noise = ndimage.gaussian_filter(rng.standard_normal(shape).astype(np.float32), sigma)
    return size * noise / noise.std()


def _abdomen(rng: np.random.Generator, contrast: float | None, shape: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """A CT in HU and its label map; x towards the left, y towards the back, z towards the head, about 0.9 x 0.9 x 3 mm.

    Args:
        rng: source of all that differs from patient to patient.
        contrast: by how many HU the tumour is darker; None for a healthy one.
        shape: voxels, (W, H, D).
    """
    width, height, depth = shape
    x, y, z = (axis.astype(np.float32) for axis in np.indices(shape))
    u, v, w = 2 * x / width - 1, 2 * y / height - 1, 2 * z / max(depth - 1, 1) - 1
    ct = np.full(shape, AIR, np.float32)
    ct[(u / 0.92) ** 2 + (v / 0.8) ** 2 < 1] = FAT
    ct[(u / 0.84) ** 2 + (v / 0.7) ** 2 < 1] = MUSCLE
    ct[(u / 0.76) ** 2 + ((v + 0.04) / 0.58) ** 2 < 1] = FAT
    organs = (
        (LIVER, (-0.45, -0.2, 0.3), (0.34, 0.34, 1.2)),
        (KIDNEY, (-0.42, 0.33, -0.3), (0.13, 0.14, 0.9)),
        (KIDNEY, (0.42, 0.33, -0.1), (0.13, 0.14, 0.9)),
        (BLOOD, (0.06, 0.22, 0.0), (0.06, 0.07, 9.0)),
        (BLOOD, (-0.1, 0.2, 0.0), (0.08, 0.07, 9.0)),
        (BONE, (0.0, 0.43, 0.0), (0.14, 0.14, 9.0)),
    )
    for level, centre, radii in organs:
        shift = rng.normal(0, 0.02, 3)
        inside = sum(((a - c - s) / r) ** 2 for a, c, s, r in zip((u, v, w), centre, shift, radii, strict=True)) < 1
        ct[inside] = level
    # the pancreas: a lumpy tube from the head, at the right, up and back to the tail
    way = np.linspace(0, 1, 40)
    bend, tilt = rng.uniform(0.8, 1.2), rng.uniform(0.5, 0.9)
    line = np.stack([-0.26 + 0.62 * way, 0.05 - 0.16 * bend * np.sin(np.pi * way) + 0.06 * way, tilt * (way - 0.5)])
    radius = rng.uniform(0.9, 1.1) * (0.105 - 0.06 * way + 0.02 * way**2)
    distance = np.full(shape, np.inf, np.float32)
    for place, r in zip(line.T, radius, strict=True):
        away = ((u - place[0]) / r) ** 2 + ((v - place[1]) / (0.85 * r)) ** 2 + ((w - place[2]) / 0.45) ** 2
        distance = np.minimum(distance, away)
    lobes = _texture(shape, rng, (2.5, 2.5, 0.7), 0.18)
    labels = (distance + lobes < 1).astype(np.uint8)
    ct = np.where(labels > 0, PANCREAS + rng.normal(0, 6) + _texture(shape, rng, (1.2, 1.2, 0.5), 7), ct)
    if contrast is not None:
        k = int(rng.integers(4, 30))
        centre = (line[:, k] + 1) / 2 * np.array([width, height, depth - 1])
        mm = rng.uniform(6, 14)
        rim = _blob(shape, rng, centre, (mm / 0.9, mm / 0.9, max(mm / 3, 1.0)))
        share = ndimage.gaussian_filter((rim < 0).astype(np.float32), (1, 1, 0.4))
        labels[(share > 0.5) & (distance + lobes < 1.6)] = 2  # it grows a little beyond the organ
        ct = np.where(labels == 2, PANCREAS + _texture(shape, rng, (1.2, 1.2, 0.5), 7), ct) - contrast * share * (labels > 0)
    ct = ndimage.gaussian_filter(ct, (0.6, 0.6, 0.3)) + _texture(shape, rng, (0.7, 0.7, 0.3), 12)
    return ct.round().clip(-1024, 3000).astype(np.int16), labels


def draw_abdomens(
    folder: Path,
    number: int = 12,
    contrast: float = 60.0,
    seed: int = 0,
    shape: Sequence[int] = (384, 288, 24),
    spacing: Sequence[float] = (0.9, 0.9, 3.0),
) -> None:
    """Write made CTs of the abdomen in the layout of the Medical Segmentation Decathlon's pancreas data set.

    They are phantoms of ellipses, a lumpy tube and noise, for tests and demonstrations; they show no patient, and say
    nothing of how well tumours are found in real ones. Two of three have a tumour, of 12 to 28 mm.

    Args:
        folder: folder to write ``dataset.json``, ``imagesTr`` and ``labelsTr`` to; it must not be there yet.
        number: number of patients, ``pancreas_001`` and on.
        contrast: by how many HU a tumour is darker than the organ, on average.
        seed: seed of all patients.
        shape: voxels along the axes of the files, which go to the left, to the back and to the head.
        spacing: of the voxels in mm.

    Raises:
        FileExistsError: if the folder is there.
    """
    folder.mkdir(parents=True)
    pairs = []
    for k in range(number):
        rng = np.random.default_rng((seed, k))
        ct, labels = _abdomen(rng, None if k % 3 == 2 else contrast * rng.uniform(0.7, 1.3), shape)
        pairs.append({part: f"./{part}sTr/pancreas_{k + 1:03}.nii.gz" for part in ("image", "label")})
        for (_, name), voxels in zip(pairs[-1].items(), (ct, labels), strict=True):
            (folder / name).parent.mkdir(exist_ok=True)
            nib.save(nib.Nifti1Image(voxels, np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])), folder / name)
    described = {"name": "Pancreas", "modality": {"0": "CT"}, "labels": LABELS, "numTraining": number, "training": pairs}
    (folder / "dataset.json").write_text(json.dumps({**described, "numTest": 0, "test": []}, indent=1), encoding="utf-8")


def draw_abdomen(path: Path, num_slices: int = 8, seed: int = 0, contrast: float = 60.0) -> None:
    """Draw one made CT with a tumour, for a demonstration, and beside it the mask of its pancreas, tumour and all.

    Args:
        path: file to write, ``.nii.gz``; the mask becomes ``<stem>_pancreas.nii.gz``.
        num_slices: number of slices, 4 mm apart, of 192 x 144 pixels of 1.8 mm.
        seed: seed of the patient.
        contrast: by how many HU the tumour is darker.
    """
    ct, labels = _abdomen(np.random.default_rng(seed), contrast, (192, 144, num_slices))
    for voxels, name in ((ct, path.name), ((labels > 0).astype(np.uint8), f"{stem_of(path)}_pancreas.nii.gz")):
        nib.save(nib.Nifti1Image(voxels, np.diag([-1.8, -1.8, 4.0, 1.0])), path.with_name(name))


def paint_tumour(
    image: np.ndarray,
    rng: np.random.Generator,
    contrast: Sequence[float] = (10, 60),
    diameter: Sequence[float] = (5, 40),
    window: float = 400.0,
) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    """Paint a tumour into an organ: a lumpy region with a soft rim, darker, whose texture stays.

    Args:
        image: slice (H, W) in [0, 1], a CT window, 0 beyond the organ.
        rng: source of place, shape, size and contrast.
        contrast: least and largest number of HU by which it is darker.
        diameter: least and largest diameter in pixels; small ones come as often as large ones.
        window: width of the CT window in HU.

    Returns:
        the painted slice; the mask, bool (H, W), where more than half of the contrast is; and ``contrast`` in HU and
        ``diameter`` in pixels. Without an organ the slice stays as it is, and the mask is empty.
    """
    organ = ndimage.binary_closing(image > 0)
    rows, columns = np.indices(image.shape)
    places = np.argwhere(ndimage.binary_erosion(organ, iterations=3))
    if not len(places):
        return image, np.zeros(image.shape, bool), {"contrast": 0.0, "diameter": 0.0}
    row, column = places[rng.integers(len(places))]
    size, darker = rng.uniform(*diameter), rng.uniform(*contrast)
    angle = np.arctan2(rows - row, columns - column)
    rim = 1.0
    for k in (2, 3, 4, 5):
        rim = rim + rng.normal(0, 0.25 / k) * np.cos(k * angle + rng.uniform(0, 2 * np.pi))
    inside = size / 2 * np.clip(rim, 0.4, None) - np.hypot(rows - row, columns - column)  # pixels to the rim
    share = organ / (1 + np.exp(-inside / rng.uniform(0.5, 1.5)))
    painted = np.clip(image - darker / window * share, 0, 1)
    return painted, share > 0.5, {"contrast": darker, "diameter": size}


def paint_boxes(
    boxes: Path,
    folder: Path,
    copies: int = 2,
    size: int = 128,
    contrast: Sequence[float] = (10, 60),
    diameter: Sequence[float] = (5, 40),
    seed: int = 0,
) -> int:
    """Make pictures to train and measure on: boxes of healthy organs, and the same boxes with painted tumours.

    What lies beyond the organ (:func:`scripts.organs.likely_organ`) is blanked, as a mask blanks it in a CT.

    Args:
        boxes: folder of pictures ``<patient>_<anything>.png`` cut round healthy organs, all at one magnification.
        folder: folder to write ``healthy/``, ``diseased/`` (see :func:`scripts.data.layouts.folder_pair`) and ``masks/`` to,
            with ``tumours.csv``, the size in pixels and the contrast in HU of each; it must not be there yet.
        copies: how many tumours, one a copy, are painted into each.
        size: height and width of the pictures; boxes are cut or padded with black about their middle.
        contrast: see :func:`paint_tumour`.
        diameter: see there.
        seed: seed of all tumours; those of a box depend on it and on the box's place among the names alone.

    Returns:
        the number of pictures with a tumour.

    Raises:
        FileExistsError: if the folder is there.
        FileNotFoundError: if there are no pictures.
    """
    paths = [path for path in visible(boxes) if path.suffix.lower() in PICTURES] if boxes.is_dir() else []
    if not paths:
        raise FileNotFoundError(f"{boxes}: no pictures; give a folder of boxes, <patient>_<anything>.png")
    for name in ("healthy", "diseased", "masks"):
        (folder / name).mkdir(parents=True)
    rows = ["file,contrast,diameter"]
    for number, path in enumerate(paths):
        box = in_frame(np.asarray(Image.open(path).convert("L")), size, size)
        healthy = box * likely_organ(box / 255).astype(np.uint8)
        Image.fromarray(healthy).save(folder / "healthy" / f"{path.stem}.png")
        for copy in range(copies):
            rng = np.random.default_rng((seed, number, copy))
            painted, mask, drawn = paint_tumour(healthy / 255, rng, contrast, diameter)
            if mask.sum() < 9:  # no place for it
                continue
            name = f"{path.stem}_{copy}.png"
            Image.fromarray((255 * painted).round().astype(np.uint8)).save(folder / "diseased" / name)
            Image.fromarray(255 * mask.astype(np.uint8)).save(folder / "masks" / name)
            rows.append(f"{name},{drawn['contrast']:.1f},{drawn['diameter']:.1f}")
    (folder / "tumours.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return len(rows) - 1
