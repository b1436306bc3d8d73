"""A filter against copies of training images, after Packhäuser et al. 2022 (arXiv 2211.01323).

There a network that tells patients apart compares what was drawn with the nearest training image. That needs several images
of a patient with their names. This one knows no patients: it learns to tell an altered copy of an image from other images.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from monai.config import PathLike
from monai.networks.nets import Regressor
from torch import Tensor, nn

from scripts.bundle import with_weights
from scripts.corruptions import ALTERATIONS, altered_copies, moved, pose
from scripts.precision import Amp, autocast
from scripts.samplers import for_batch
from scripts.thresholds import rarely_exceeded

__all__ = ["CopyFilter", "grey_levels_and_ranks", "load_copy_filter"]


LEARNED = [kind for kind in ALTERATIONS if kind not in ("mirror", "quarter turn")]  # the others are tried one by one
SLACK = 0.1  # radians, logarithm of the scale and halves of the image, by which a copy in training lies beside its image
SHIFT = 0.15  # halves of the image between the views that an image is looked for in
TURN = 0.14  # radians
ENLARGED = 1.15
CANDIDATES = 3  # training images that an image is aligned with
STEPS, RATE = 15, 0.03  # of the alignment
COHORT = 1000  # training images that the others are compared with, see CopyFilter
COMMON = 0.1  # of a training image's similarity to others, which is taken off
FLAT = 0.02  # standard deviation of an image that counts as flat, in grey levels of [0, 1]
NUM_LEVELS = 256  # of grey


def _views() -> Tensor:
    """Poses (N, 3, 3) that an image is looked for in; the first eight are the orientations."""
    beside = [(0.0, 1.0, x, y) for x in (-SHIFT, 0.0, SHIFT) for y in (-SHIFT, 0.0, SHIFT) if x or y]
    beside += [(-TURN, 1.0, 0.0, 0.0), (TURN, 1.0, 0.0, 0.0), (0.0, ENLARGED, 0.0, 0.0)]
    table = [(k * math.pi / 2 + angle, *rest) for angle, *rest in [(0.0, 1.0, 0.0, 0.0), *beside] for k in range(4)]
    angle, scale, x, y = torch.tensor(table).repeat_interleave(2, dim=0).T
    return pose(angle, scale, torch.stack([x, y], dim=1), torch.arange(len(angle)) % 2 > 0)


VIEWS = _views()
ORIENTATIONS = 8


def grey_levels_and_ranks(image: Tensor) -> Tensor:
    """An image and, as a second channel, the share of its pixels that are darker, which no change of contrast changes.

    Args:
        image: (B, 1, H, W) in [0, 1].

    Returns:
        (B, 2, H, W) in [0, 1].
    """
    level = ((NUM_LEVELS - 1) * image).round().long().flatten(1)
    counts = torch.zeros(len(image), NUM_LEVELS, device=image.device)
    counts.scatter_add_(1, level, torch.ones_like(level, dtype=counts.dtype))
    ranks = (counts.cumsum(dim=1) - counts / 2).gather(1, level) / level.shape[1]
    return torch.cat([image, ranks.view_as(image)], dim=1)


class CopyFilter(nn.Module):
    """How alike an image is to the most similar training image, whatever was turned, mirrored or changed in contrast.

    A small convolutional network of MONAI's brings an image, its grey levels and their ranks
    (:func:`grey_levels_and_ranks`), each with the mean taken away and divided by the standard deviation, to a point on a
    sphere. An image is looked for in 96 views (:data:`VIEWS`): in all eight orientations, and in each a little shifted,
    turned and reduced. Then it is aligned with the three training images that are most alike in their best view, by gradient
    ascent of the similarity over angle, scale and shift. So the network need not be blind to the pose: it is trained by
    contrast (InfoNCE; Chen et al. 2020, arXiv 2002.05709) on altered copies that were brought back to about where they
    were. Each has to be nearer to its image than all others of the batch are.

    Some training images are alike to many others, such as one that lies upside down to all that are looked for upside down.
    So a tenth of the similarity to the most similar of other training images is taken off the similarity to each.

    Among the weights are the points of all training images (``index``; no pixels), how alike the most similar of the others
    is to each (``common``), and how alike held-out real images are to the most similar training image (``held_out``), by
    which a threshold has a known rate of false positives.

    Args:
        num_images: number of training images.
        num_held_out: number of held-out images.
        spatial_size: height and width of an image, which are the same, and a multiple of 16.
        size: coordinates of a point.
        channels: channels of the network's four levels.
        temperature: of the loss.
        amp: bfloat16 in training, see :func:`scripts.precision.autocast`; points to compare are computed in 32 bits.

    Raises:
        ValueError: for images that are not square.
    """

    def __init__(
        self,
        num_images: int,
        num_held_out: int,
        spatial_size: Sequence[int] = (64, 64),
        size: int = 128,
        channels: Sequence[int] = (16, 32, 64, 128),
        temperature: float = 0.15,
        amp: Amp = False,
    ) -> None:
        super().__init__()
        if len(set(spatial_size)) > 1:
            raise ValueError(f"a copy filter turns images, which have to be square, got {tuple(spatial_size)}")
        self.amp, self.temperature = amp, temperature
        self.encoder = Regressor(
            (2, *spatial_size),
            (size,),
            channels=channels,
            strides=[2] * len(channels),
            num_res_units=1,
            act="relu",
        )
        self.register_buffer("index", torch.zeros(num_images, size))
        self.register_buffer("common", torch.zeros(num_images))
        self.register_buffer("held_out", torch.zeros(num_held_out))
        self.register_buffer("spatial_size", torch.tensor(list(spatial_size)))

    def forward(self, levels: Tensor) -> Tensor:
        """What :func:`grey_levels_and_ranks` makes of images, (B, 2, H, H), to points (B, size) on the unit sphere."""
        std, mean = torch.std_mean(levels, dim=(2, 3), keepdim=True)
        with autocast(levels, self.amp if self.training else False):
            points = self.encoder((levels - mean) / (std + FLAT))
        return nn.functional.normalize(points.float(), dim=1)

    def losses(self, image: Tensor, class_label: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """What training minimises.

        Args:
            image: (B, 1, H, H) in [0, 1]; the others of a batch are what an image is told from.
            class_label: not used.
            generator: source of the alterations, see :func:`scripts.corruptions.altered_copies`.

        Returns:
            ``contrast``.
        """
        copies, poses = altered_copies(image, generator, LEARNED)
        u = for_batch(torch.rand, (len(image), 5), generator, image.device)
        beside = SLACK * u[:, :1] * (2 * u[:, 1:] - 1)  # most lie nearly where their images do
        back = torch.linalg.inv(poses) @ pose(beside[:, 0], beside[:, 1].exp(), beside[:, 2:])
        points = self(torch.cat([grey_levels_and_ranks(image), moved(grey_levels_and_ranks(copies), back)]))
        # MONAI's ContrastiveLoss is this, with a tensor of all pairs times all coordinates on the way
        likeness = (points @ points.T / self.temperature).fill_diagonal_(-math.inf)
        partner = torch.arange(len(points), device=points.device).roll(len(image))
        return {"contrast": nn.functional.cross_entropy(likeness, partner)}

    @torch.no_grad()
    def nearest(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """The most similar training image of each image.

        Args:
            image: (B, 1, H, H) in [0, 1].

        Returns:
            similarity, the cosine of the angle between the points, less a tenth of ``common``, (B,), and number of the
            training image, (B,).
        """
        self.eval()
        levels = grey_levels_and_ranks(image)
        similarity = image.new_full((len(image), len(self.index)), -math.inf)
        view = torch.zeros_like(similarity, dtype=torch.uint8)
        for number, likeness in enumerate(self._seen(levels, VIEWS)):
            likeness -= COMMON * self.common
            view = torch.where(likeness > similarity, number, view).byte()
            similarity = torch.maximum(similarity, likeness)
        numbers = similarity.topk(min(CANDIDATES, len(self.index)), dim=1).indices
        best = self._aligned(levels, numbers, view.gather(1, numbers).long()).max(dim=1)
        return best.values, numbers.gather(1, best.indices[:, None])[:, 0]

    def _seen(self, levels: Tensor, views: Tensor) -> Iterator[Tensor]:
        """Cosines (B, N) of the angles to all training images in each view (3, 3)."""
        for view in views.to(levels.device):
            yield self(moved(levels, view.expand(len(levels), 3, 3))) @ self.index.T

    def _aligned(self, levels: Tensor, numbers: Tensor, views: Tensor) -> Tensor:
        """Similarity of images to training images after an alignment that makes it as large as can be.

        Args:
            levels: of the images, (B, 2, H, H).
            numbers: of the training images, (B, K).
            views: numbers of the views that it begins from, (B, K).

        Returns:
            (B, K), not less than without alignment.
        """
        levels = levels.repeat_interleave(numbers.shape[1], dim=0)
        wanted, off = self.index[numbers.flatten()], COMMON * self.common[numbers.flatten()]
        begin, best = VIEWS.to(levels.device)[views.flatten()], torch.full_like(off, -math.inf)
        change = levels.new_zeros(len(levels), 4, requires_grad=True)  # angle, logarithm of the scale, shift
        optimizer = torch.optim.Adam([change])
        for step in range(STEPS + 1):
            with torch.enable_grad():
                poses = begin @ pose(change[:, 0], change[:, 1].exp(), change[:, 2:])
                similarity = (self(moved(levels, poses)) * wanted).sum(dim=1)
                best = torch.maximum(best, similarity.detach() - off)
                if step == STEPS:
                    break
                (change.grad,) = torch.autograd.grad(-similarity.sum(), change)
            optimizer.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
            optimizer.step()
        return best.view_as(numbers)

    @torch.no_grad()
    def points(self, image: Tensor) -> Tensor:
        """Any number of images (B, 1, H, H) in [0, 1] to their points, in evaluation mode."""
        self.eval()
        return torch.cat([self(grey_levels_and_ranks(part)) for part in image.split(256)])

    def limit(self, rate: float) -> float:
        """Similarity above which an image counts as a copy, which a share of held-out real images of ``rate`` exceeds.

        Raises:
            ValueError: for a rate that the held-out images can't tell, see :func:`scripts.thresholds.rarely_exceeded`.
        """
        return rarely_exceeded(self.held_out.tolist(), rate)

    @torch.no_grad()
    def calibrate(self, loaders: Sequence[Iterable[dict]]) -> None:
        """Set ``index``, ``common`` and ``held_out``.

        Args:
            loaders: batches of the training images, and of the held-out images, as they are, each with ``image``. The first
                gives the same images in the same order when it is read again.
        """
        device, (training, held_out) = self.index.device, loaders
        self.index.copy_(torch.cat([self.points(batch["image"].to(device)) for batch in training]))
        self.common.zero_()
        begin, apart = 0, max(1, len(self.index) // COHORT)
        for batch in training:
            numbers = torch.arange(begin, begin + len(batch["image"]))
            chosen, begin = numbers[numbers % apart == 0], begin + len(numbers)
            if len(chosen):
                own = nn.functional.one_hot(chosen, len(self.index)).bool().to(device)
                levels = grey_levels_and_ranks(batch["image"][chosen - numbers[0]].to(device))
                for likeness in self._seen(levels, VIEWS[:ORIENTATIONS]):
                    common = torch.maximum(self.common, likeness.masked_fill(own, 0).amax(dim=0))
                    self.common.copy_(common.half())  # as the file holds it
        similarity = torch.cat([self.nearest(batch["image"].to(device))[0] for batch in held_out])
        # rounded up to what half precision holds, so that the file's rounding raises no rate
        self.held_out.copy_((2048 * similarity).ceil() / 2048)


def load_copy_filter(
    path: PathLike, spatial_size: Sequence[int] = (64, 64), device: torch.device | str = "cpu"
) -> CopyFilter:
    """The filter of a file, whatever the number of images that it was made of.

    Args:
        path: file that the training of a :class:`CopyFilter` wrote.
        spatial_size: height and width of the images that it is wanted for.
        device: where it is wanted.

    Raises:
        ValueError: if there is no such file, or it is something else, or made for images of another size.
    """
    mend = "train one (configs/train_copy_filter.json) and give its file as --copy_weights, or give --copy_filter false"
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file; {mend}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        made_for = state["spatial_size"].tolist()
        network = CopyFilter(len(state["index"]), len(state["held_out"]), made_for, state["index"].shape[1])
        network = with_weights(network, path)
    except Exception as error:  # torch has many ways to refuse a file
        raise ValueError(f"{path}: not the weights of a copy filter; {mend}") from error
    if made_for != list(spatial_size):
        raise ValueError(f"{path}: was made for images of {' x '.join(map(str, made_for))} pixels; {mend}")
    return network.to(device)
