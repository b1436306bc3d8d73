"""A small classifier whose features compare sets of images: it tells how an image was turned and mirrored.

The task needs no labels (Gidaris et al. 2018, arXiv 1803.07728, who turn images only).
"""

from __future__ import annotations

import torch
from monai.networks.nets import DenseNet
from torch import Tensor, nn
from tqdm import trange

__all__ = ["OrientationNet", "turn"]


NUM_ORIENTATIONS = 8  # four rotations, each mirrored or not


def turn(images: Tensor, orientation: int) -> Tensor:
    """Square images (B, C, H, H) turned by ``orientation % 4`` right angles, and mirrored first from 4 on."""
    return torch.rot90(images.flip(2) if orientation >= 4 else images, orientation % 4, (2, 3))


class OrientationNet(nn.Module):
    """Tell the eight orientations of square images apart, by a small DenseNet of MONAI's.

    The share of held-out images told rightly, ``accuracy``, lies among the weights.
    """

    def __init__(self) -> None:
        super().__init__()
        self.densenet = DenseNet(
            spatial_dims=2,
            in_channels=1,
            out_channels=NUM_ORIENTATIONS,
            init_features=16,
            growth_rate=12,
            block_config=(2, 4, 4),
        )
        self.register_buffer("accuracy", torch.zeros(()))

    def forward(self, image: Tensor) -> Tensor:
        """Images (B, 1, H, H) in [0, 1] to a logit for each orientation, (B, 8)."""
        return self.densenet(2 * image - 1)

    @torch.no_grad()
    def features(self, image: Tensor) -> Tensor:
        """Images (B, 1, H, H) in [0, 1] to what the last layer sees, (B, 82), averaged over the places."""
        self.eval()
        maps = torch.cat([self.densenet.features(2 * batch - 1).relu() for batch in image.split(256)])
        return maps.flatten(2).mean(dim=2)

    def fit(self, images: Tensor, iterations: int = 1000, batch_size: int = 64, lr: float = 3e-3, seed: int = 0) -> None:
        """Train from new weights.

        Args:
            images: upright (N, 1, H, H) in [0, 1].
            iterations: number of steps, along which the learning rate falls to 0 by a cosine.
            batch_size: images in a batch, each in one of the orientations.
            lr: learning rate of Adam.
            seed: seed of weights, batches and orientations.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.load_state_dict(type(self)().state_dict())
        generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.Adam(self.parameters(), lr)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
        self.train()
        for _ in trange(iterations, desc="feature network", disable=None):
            batch = images[torch.randint(len(images), (batch_size,), generator=generator)]
            target = torch.randint(NUM_ORIENTATIONS, (batch_size,), generator=generator)
            turned = torch.stack([turn(image[None], int(k))[0] for image, k in zip(batch, target, strict=True)])
            loss = nn.functional.cross_entropy(self(turned), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()

    @torch.no_grad()
    def measure(self, images: Tensor) -> float:
        """Set ``accuracy``, over all orientations of upright images (N, 1, H, H) in [0, 1], and return it."""
        self.eval()
        batches = images.split(256)
        found = [self(turn(batch, k)).argmax(dim=1) == k for k in range(NUM_ORIENTATIONS) for batch in batches]
        self.accuracy.fill_(torch.cat(found).float().mean())
        return float(self.accuracy)
