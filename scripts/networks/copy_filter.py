"""A filter against copies of training images, after Packhäuser et al. 2022 (arXiv 2211.01323).

There a network that tells patients apart compares what was drawn with the nearest training image. That needs several images
of a patient with their names. This one knows no patients: it learns to tell an altered copy of an image from other images.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from monai.config import PathLike
from monai.losses import ContrastiveLoss
from monai.networks.nets import ResNet
from torch import Tensor, nn

from scripts.bundle import with_weights
from scripts.corruptions import altered_copies
from scripts.precision import Amp, autocast
from scripts.thresholds import rarely_exceeded

__all__ = ["CopyFilter", "load_copy_filter"]


class CopyFilter(nn.Module):
    """How alike an image is to the most similar training image, whatever was turned, mirrored or changed in contrast.

    A small ResNet of MONAI's brings an image to a point on a sphere. It is trained by contrast (InfoNCE; Chen et al. 2020,
    arXiv 2002.05709): an altered copy has to be nearer to its image than all others of the batch are. Among the weights
    are the points of all training images (``index``; no pixels), and how alike held-out real images are to the most
    similar training image (``held_out``), by which a threshold has a known rate of false positives.

    Args:
        num_images: number of training images.
        num_held_out: number of held-out images.
        spatial_size: height and width of an image.
        size: coordinates of a point.
        channels: channels of the ResNet's four levels, multiples of 8.
        temperature: of the loss.
        amp: bfloat16 in training, see :func:`scripts.precision.autocast`; points to compare are computed in 32 bits.
    """

    def __init__(
        self,
        num_images: int,
        num_held_out: int,
        spatial_size: Sequence[int] = (64, 64),
        size: int = 128,
        channels: Sequence[int] = (32, 64, 128, 256),
        temperature: float = 0.1,
        amp: Amp = False,
    ) -> None:
        super().__init__()
        self.amp = amp
        self.encoder = ResNet(
            "basic",
            [1, 1, 1, 1],
            list(channels),
            spatial_dims=2,
            n_input_channels=1,
            conv1_t_size=7,
            conv1_t_stride=2,
            num_classes=size,
            norm=("group", {"num_groups": 8}),
        )
        self.contrast = ContrastiveLoss(temperature)
        self.register_buffer("index", torch.zeros(num_images, size))
        self.register_buffer("held_out", torch.zeros(num_held_out))
        self.register_buffer("spatial_size", torch.tensor(list(spatial_size)))

    def forward(self, image: Tensor) -> Tensor:
        """Images (B, 1, H, W) in [0, 1] to points (B, size) on the unit sphere."""
        with autocast(image, self.amp if self.training else False):
            points = self.encoder(2 * image - 1)
        return nn.functional.normalize(points.float(), dim=1)

    def losses(self, image: Tensor, class_label: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """What training minimises.

        Args:
            image: (B, 1, H, W) in [0, 1]; the others of a batch are what an image is told from.
            class_label: not used.
            generator: source of the alterations, see :func:`scripts.corruptions.altered_copies`.

        Returns:
            ``contrast``.
        """
        copies = altered_copies(image, generator)
        return {"contrast": self.contrast(*self(torch.cat([image, copies])).chunk(2))}

    @torch.no_grad()
    def nearest(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """The most similar training image of each image.

        Args:
            image: (B, 1, H, W) in [0, 1].

        Returns:
            similarity, the cosine of the angle between the points, (B,) in [-1, 1], and number of the training image, (B,).
        """
        return (self.points(image) @ self.index.T).max(dim=1)

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
        """Set ``index`` and ``held_out``.

        Args:
            loaders: batches of the training images, and of the held-out images, as they are, each with ``image``.
        """
        training, held_out = (
            torch.cat([self.points(batch["image"].to(self.index.device)) for batch in loader]) for loader in loaders
        )
        self.index.copy_(training)
        self.held_out.copy_((held_out @ self.index.T).amax(dim=1))


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
        network = CopyFilter(len(state["index"]), len(state["held_out"]), size=state["index"].shape[1])
        network = with_weights(network, path)
    except Exception as error:  # torch has many ways to refuse a file
        raise ValueError(f"{path}: not the weights of a copy filter; {mend}") from error
    made_for = network.spatial_size.tolist()
    if made_for != list(spatial_size):
        raise ValueError(f"{path}: was made for images of {' x '.join(map(str, made_for))} pixels; {mend}")
    return network.to(device)
