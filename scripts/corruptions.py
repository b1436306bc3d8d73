"""Made anomalies: what a network learns to undo, that has seen no lesion; and altered copies of images.

A slice x0 is corrupted by a soft mask m and foreign content x_fp: x_1 = (1 - m)·x0 + m·x_fp, as in DISYRE (Marimont et al.
2023, arXiv 2311.15453) and REFLECT (2025, arXiv 2508.02889).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from monai.networks.layers import AffineTransform
from torch import Tensor, nn

from scripts.noise import coarse_noise
from scripts.samplers import for_batch, from_batch

__all__ = ["ALTERATIONS", "altered_copies", "foreign_content", "inside_of_head", "moved", "pose", "random_blobs"]

NUM_BLOBS = 3
PRESENT = (0.85, 0.35, 0.25)  # how often the first, second and third blob is there; in 0.41 of the slices it is one alone
KINDS = (0.4, 0.7)  # below the first: the slice itself, changed; below the second: another slice; above: without detail
CHANGED = 0.75  # how often a channel is changed
ALTERATIONS = ("mirror", "quarter turn", "turn", "shift", "crop", "contrast", "noise", "blur")  # of a copy


def inside_of_head(image: Tensor, level: float = 0.1, window: int = 15) -> Tensor:
    """Where most of the surroundings are head, holes included: bool (B, 1, H, W) of slices (B, C, H, W) in [0, 1]."""
    shown = (image > level).any(dim=1, keepdim=True).to(image.dtype)
    return nn.functional.avg_pool2d(shown, window, stride=1, padding=window // 2) > 0.6


def random_blobs(inside: Tensor, generator: torch.Generator, radius: Sequence[float] = (2.0, 26.0)) -> Tensor:
    """Soft masks of random shape, none to three blobs a slice.

    A blob is an ellipse whose border is moved by coarse noise. Its size is drawn evenly in its logarithm, so that there are
    as many of a few pixels as there are of a quarter of a head.

    Args:
        inside: where their middles may be, bool (B, 1, H, W); outside of it a mask is 0.
        generator: source of all random numbers, see :func:`scripts.samplers.for_batch`.
        radius: least and largest radius in pixels.

    Returns:
        masks (B, 1, H, W) in [0, 1].
    """
    number, _, height, width = inside.shape
    device = inside.device
    drawn = for_batch(torch.rand, (number, NUM_BLOBS, 7), generator, device)
    present = drawn[..., 0] < torch.tensor(PRESENT, device=device)
    places = inside.flatten(1).cumsum(dim=1)
    middle = torch.searchsorted(places, (drawn[..., 1] * places[:, -1:]).ceil().clamp(min=1).long())
    middle = middle.clamp(max=height * width - 1)[..., None, None]  # a slice without any place
    low, high = (math.log(r) for r in radius)
    size, aspect, angle, softness, roughness = (drawn[..., i, None, None] for i in (2, 3, 4, 5, 6))
    size, aspect, angle = (low + (high - low) * size).exp(), 0.5 + aspect / 2, 2 * math.pi * angle
    rows, columns = (
        torch.arange(height, device=device)[:, None] - middle // width,
        torch.arange(width, device=device) - middle % width,
    )
    along, across = angle.cos() * columns + angle.sin() * rows, angle.cos() * rows - angle.sin() * columns
    distance = ((along / size) ** 2 + (across / (aspect * size)) ** 2).sqrt()  # 1 at the border
    border = 1 - distance + 0.6 * roughness * coarse_noise((number, NUM_BLOBS, height, width), 8, generator, device)
    blobs = (border / (0.05 + 0.6 * softness) + 0.5).clamp(0, 1) * (distance < 2) * present[..., None, None]
    return blobs.amax(dim=1, keepdim=True) * inside


def foreign_content(image: Tensor, generator: torch.Generator, shift: float = 0.6, texture: float = 0.1) -> Tensor:
    """What stands in the place of the slices in made anomalies.

    It is the slice itself, another slice of the batch (shifted, and mirrored in half of the batches), or the slice without
    detail; brighter or darker in each channel by itself, with a texture. A quarter of the channels stay as they are.

    Args:
        image: slices (B, C, H, W) in [0, 1].
        generator: source of all random numbers, see :func:`scripts.samplers.for_batch`.
        shift: largest change of a channel's grey level; half of that where the content is another slice's.
        texture: largest standard deviation of the texture.

    Returns:
        (B, C, H, W) in [0, 1].
    """
    number, channels, height, width = image.shape
    u = for_batch(torch.rand, (number, 2 + 2 * channels), generator, image.device)[..., None, None]
    kind, spread, chosen, level = u[:, :1], u[:, 1:2], u[:, 2 : 2 + channels], u[:, 2 + channels :]
    partner, down, right, mirrored, fine = torch.randint(1 << 20, (5,), generator=generator).tolist()
    other = from_batch(image, partner).roll((down % 41 - 20, right % 41 - 20), dims=(2, 3))
    other = other.flip(2) if mirrored % 2 else other
    flat = nn.functional.avg_pool2d(image, 32, stride=8, padding=12, count_include_pad=False)
    flat = nn.functional.interpolate(flat, scale_factor=8.0, mode="bilinear", align_corners=False)
    base = torch.where(kind < KINDS[0], image, torch.where(kind < KINDS[1], other, flat))
    change = shift * (2 * level - 1)
    change = change + 0.05 * change.sign()
    change = torch.where((kind >= KINDS[0]) & (kind < KINDS[1]), change / 2, change)
    noise = coarse_noise(image.shape, 2 ** (1 + fine % 3), generator, image.device)
    content = (base + change + texture * spread * noise).clamp(0, 1)
    return torch.where(chosen < CHANGED, content, image)


def pose(angle: Tensor, scale: Tensor, shift: Tensor, mirrored: Tensor | None = None) -> Tensor:
    """Where each place of an image comes from when it is mirrored left to right, turned, enlarged and shifted.

    Args:
        angle: (B,), in radians.
        scale: (B,); the image is enlarged by 1 / scale.
        shift: (B, 2), in halves of the image, along the last and the last but one axis.
        mirrored: bool (B,); None for not at all.

    Returns:
        (B, 3, 3), affine maps of coordinates from -1 to 1, those along the last axis first.
    """
    # the first spatial axis, along which X-rays are mirrored, comes last
    flip = 1.0 if mirrored is None else torch.where(mirrored, -1.0, 1.0)
    rows = (
        torch.stack([scale * angle.cos(), -scale * angle.sin() * flip, shift[:, 0]], dim=1),
        torch.stack([scale * angle.sin(), scale * angle.cos() * flip, shift[:, 1]], dim=1),
        torch.tensor([0.0, 0.0, 1.0], device=angle.device).expand(len(angle), 3),
    )
    return torch.stack(rows, dim=1)


def moved(image: Tensor, poses: Tensor, padding: str = "border") -> Tensor:
    """Images in other poses, by bilinear interpolation.

    Args:
        image: (B, C, H, W) in [0, 1].
        poses: (B, 3, 3), see :func:`pose`.
        padding: what comes in from outside: ``border`` or ``zeros``.

    Returns:
        (B, C, H, W) in [0, 1].
    """
    warp = AffineTransform(normalized=True, padding_mode=padding, align_corners=False, reverse_indexing=False)
    return warp(image, poses).clamp(0, 1)


def altered_copies(
    image: Tensor, generator: torch.Generator, kinds: Sequence[str] = ALTERATIONS, share: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Copies of images as somebody would hide that they are, or as a generative network blurs what it knows by heart.

    ``mirror``: left and right. ``quarter turn``: by one to three right angles. ``turn``: by up to 15 degrees. ``shift``: by
    up to an eighth of the image along both axes. ``crop``: the image enlarged by up to 4/3. ``contrast``: gamma from 0.55 to
    1.8, gain from 0.7 to 1.3, offset up to 0.15. ``noise``: normal, of a standard deviation up to 0.1. ``blur``: up to the
    mean over 3 x 3 pixels. What comes in from outside is black in half of the batches, else the border goes on.

    Args:
        image: (B, C, H, W) in [0, 1], H and W alike where quarter turns are asked for.
        generator: source of all random numbers, see :func:`scripts.samplers.for_batch`.
        kinds: which there may be, of :data:`ALTERATIONS`.
        share: how often an image gets each of them, by itself.

    Returns:
        copies (B, C, H, W) in [0, 1], and their poses (B, 3, 3), see :func:`pose`.

    Raises:
        ValueError: for an unknown kind.
    """
    if unknown := set(kinds) - set(ALTERATIONS):
        raise ValueError(f"unknown alteration '{min(unknown)}': choose of {', '.join(ALTERATIONS)}")
    u = for_batch(torch.rand, (len(image), 10), generator, image.device)
    chosen = for_batch(torch.rand, (len(image), len(ALTERATIONS)), generator, image.device) < share
    chosen &= torch.tensor([kind in kinds for kind in ALTERATIONS], device=image.device)
    mirror, quarter, turn, shift, crop, contrast, noise, blur = chosen.T
    black = torch.randint(2, (), generator=generator).item()

    poses = pose(
        angle=(math.pi / 12) * (2 * u[:, 0] - 1) * turn + (math.pi / 2) * (1 + 3 * u[:, 1]).floor() * quarter,
        scale=1 - 0.25 * u[:, 2] * crop,
        shift=0.25 * (2 * u[:, 3:5] - 1) * shift[:, None],
        mirrored=mirror,
    )
    copies = moved(image, poses, padding="zeros" if black else "border")

    def mixed(where: Tensor, changed: Tensor, amount: Tensor | float = 1.0) -> Tensor:
        return copies + (where * amount)[:, None, None, None] * (changed - copies)

    gamma, gain, offset = (1.2 * u[:, 5] - 0.6).exp(), 0.7 + 0.6 * u[:, 6], 0.15 * (2 * u[:, 7] - 1)
    gamma, gain, offset = (values[:, None, None, None] for values in (gamma, gain, offset))
    copies = mixed(contrast, gain * copies.clamp(min=1e-6) ** gamma + offset)
    copies = mixed(blur, nn.functional.avg_pool2d(copies, 3, stride=1, padding=1, count_include_pad=False), u[:, 8])
    copies = mixed(noise, copies + 0.1 * for_batch(torch.randn, copies.shape, generator, image.device), u[:, 9])
    return copies.clamp(0, 1), poses
