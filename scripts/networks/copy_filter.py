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
from scripts.corruptions import ALTERATIONS, altered_copies, moved
from scripts.precision import Amp, autocast
from scripts.thresholds import rarely_exceeded

__all__ = ["CopyFilter", "load_copy_filter"]


LEARNED = [kind for kind in ALTERATIONS if kind not in ("mirror", "quarter turn")]  # the others are tried one by one
# what an image is looked for as: angle in radians, scale, shift along both axes in halves of the image; each mirrored too
VIEWS = [(k * math.pi / 2, 1.0, 0.0, 0.0) for k in range(4)]
VIEWS += [(0.0, 1.0, x, y) for x in (-0.15, 0.0, 0.15) for y in (-0.15, 0.0, 0.15) if x or y]
VIEWS += [(-0.14, 1.0, 0.0, 0.0), (0.14, 1.0, 0.0, 0.0), (0.0, 1.15, 0.0, 0.0)]
COHORT = 1000  # training images that the others are compared with, see CopyFilter
COMMON = 0.25  # of a training image's similarity to others, which is taken off
FLAT = 0.02  # standard deviation of an image that counts as flat, in grey levels of [0, 1]


class CopyFilter(nn.Module):
    """How alike an image is to the most similar training image, whatever was turned, mirrored or changed in contrast.

    A small convolutional network of MONAI's brings an image, with its mean taken away and divided by its standard deviation,
    to a point on a sphere. It is trained by contrast (InfoNCE; Chen et al. 2020, arXiv 2002.05709): an altered copy has to
    be nearer to its image than all others of the batch are. An image is looked for in thirty views (:data:`VIEWS`): in all
    eight orientations, which need not be learned then, and a little shifted, turned and reduced, upright and mirrored.

    Some training images are alike to many others, such as one that lies upside down to all that are looked for upside down.
    So a quarter of the similarity to the most similar of other training images is taken off the similarity to each.

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
        temperature: float = 0.05,
        amp: Amp = False,
    ) -> None:
        super().__init__()
        if len(set(spatial_size)) > 1:
            raise ValueError(f"a copy filter turns images, which have to be square, got {tuple(spatial_size)}")
        self.amp, self.temperature = amp, temperature
        self.encoder = Regressor(
            (1, *spatial_size),
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

    def forward(self, image: Tensor) -> Tensor:
        """Images (B, 1, H, H) in [0, 1] to points (B, size) on the unit sphere."""
        std, mean = torch.std_mean(image, dim=(2, 3), keepdim=True)
        with autocast(image, self.amp if self.training else False):
            points = self.encoder((image - mean) / (std + FLAT))
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
        points = self(torch.cat([image, altered_copies(image, generator, LEARNED)]))
        # MONAI's ContrastiveLoss is this, with a tensor of all pairs times all coordinates on the way
        likeness = (points @ points.T / self.temperature).fill_diagonal_(-torch.inf)
        partner = torch.arange(len(points), device=points.device).roll(len(image))
        return {"contrast": nn.functional.cross_entropy(likeness, partner)}

    @torch.no_grad()
    def nearest(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """The most similar training image of each image.

        Args:
            image: (B, 1, H, H) in [0, 1].

        Returns:
            similarity, the cosine of the angle between the points, less a quarter of ``common``, (B,), and number of the
            training image, (B,).
        """
        similarity = image.new_full((len(image),), -math.inf)
        number = torch.zeros(len(image), dtype=torch.int64, device=image.device)
        for likeness in self._seen(image, VIEWS):
            found = (likeness - COMMON * self.common).max(dim=1)
            number = torch.where(found.values > similarity, found.indices, number)
            similarity = torch.maximum(similarity, found.values)
        return similarity, number

    def _seen(self, image: Tensor, views: Sequence[tuple[float, float, float, float]]) -> Iterator[Tensor]:
        """Cosines (B, N) of the angles to all training images in each view, and in each mirrored."""
        one = image.new_ones(len(image))
        for mirrored in (False, True):
            for angle, scale, x, y in views:
                shift = torch.stack([x * one, y * one], dim=1)
                view = moved(image, (one > 0) == mirrored, angle * one, scale * one, shift)
                yield self.points(view) @ self.index.T

    @torch.no_grad()
    def points(self, image: Tensor) -> Tensor:
        """Any number of images to their points, as the forward pass gives them in evaluation mode."""
        self.eval()
        return torch.cat([self(part) for part in image.split(256)])

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
                for likeness in self._seen(batch["image"][chosen - numbers[0]].to(device), VIEWS[:4]):
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
