"""Networks with the interface of a bundle's, whose results are known, for tests of what is around them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class StandInNet(nn.Module):
    """Images are a bright square whose corner and grey level come from the noise; class 1 is dark."""

    published = {"sampler": "ancestral", "num_steps": 40}

    def __init__(
        self,
        spatial_size=(64, 64),
        model="image",
        sampler="dpmpp_2m_sde",
        num_steps=4,
        seed=0,
        amp=True,
        num_classes=None,
        **other,
    ):
        super().__init__()
        if sampler not in ("ancestral", "dpmpp_2m_sde"):
            raise ValueError(f"unknown sampler '{sampler}': choose ancestral or dpmpp_2m_sde")
        self.spatial_size, self.model, self.num_steps = tuple(spatial_size), model, num_steps
        self.gain = nn.Parameter(torch.ones(()))
        self.sizes = []

    @torch.no_grad()
    def forward(self, noise: Tensor, label: Tensor | None = None) -> Tensor:
        self.sizes.append(len(noise))
        images = torch.full_like(noise, 0.2)
        for image, one in zip(images, noise, strict=True):
            left, top = (int(8 + 4 * one[0, 0, k].clamp(-2, 2)) for k in (0, 1))
            image[:, left : left + 24, top : top + 30] = 0.6 + 0.1 * one[0, 0, 2].clamp(-2, 2)
        images = (images * self.gain).clamp(0, 1)
        return images if label is None else images * (1 - 0.5 * label.view(-1, 1, 1, 1))

    def bound(self, image: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        noise = 0.01 * torch.rand(len(image), generator=generator)
        terms = {
            "recon": image.flatten(1).mean(dim=1).cpu() + 2,
            "latent": 0.25 * torch.ones(len(image)),
            "diffusion": noise,
        }
        return terms | ({"recon_8bit": terms["recon"] + 3} if self.model == "medvdm" else {})

    def floor(self, image: Tensor) -> Tensor:
        return torch.full((len(image),), 0.5)


def squares(number: int, section: str) -> Tensor:
    """Images of the stand-in, which depend on the section, (number, 1, 64, 64)."""
    noise = torch.randn(number, 1, 64, 64, generator=torch.Generator().manual_seed(len(section)))
    return StandInNet()(noise)


class Shrinking(nn.Module):
    """Shrinks the source towards the middle of the volume: displacement(p) = gamma · rate · (p - middle)."""

    def __init__(
        self, num_frames: int = 10, gammas: Sequence[float] | None = None, rate: float = 0.2, **settings: object
    ) -> None:
        super().__init__()
        self.gammas = gammas or torch.linspace(0, 1, num_frames).tolist()
        self.rate = nn.Parameter(torch.tensor(rate))

    def displace(self, image: Tensor, gammas: Sequence[float] | None = None) -> Tensor:
        axes = [torch.arange(n, dtype=torch.float32) - (n - 1) / 2 for n in image.shape[2:]]
        offset = torch.stack(torch.meshgrid(*axes, indexing="ij"))[None]
        return torch.stack([gamma * self.rate * offset for gamma in gammas or self.gammas], dim=1).detach()

    def forward(self, image: Tensor) -> Tensor:
        return image[:, :1].expand(-1, len(self.gammas), -1, -1, -1)


class FewFeatures(nn.Module):
    """Features that are four pixels of the image."""

    def features(self, image):
        return image[:, 0, 20, [5, 15, 25, 35]]


class BrightAreCopies(nn.Module):
    """A filter against copies to which an image is as similar as it is bright."""

    def __init__(self, limit: float = 0.5) -> None:
        super().__init__()
        self.register_buffer("index", torch.eye(2))
        self.the_limit = limit

    def points(self, image: Tensor) -> Tensor:
        return image.flatten(1)

    def nearest(self, image: Tensor) -> tuple[Tensor, Tensor]:
        return image.flatten(1).mean(dim=1), torch.zeros(len(image), dtype=torch.int64)

    def limit(self, rate: float) -> float:
        if rate <= 0:
            raise ValueError(f"a rate of {rate:g} can't be told")
        return self.the_limit
