"""DiffuseMorph: registration of two volumes by the latent feature of a conditional diffusion model.

B. Kim, I. Han and J. C. Ye, *DiffuseMorph: Unsupervised Deformable Image Registration Using Diffusion Model*, ECCV 2022,
arXiv 2112.05149.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from scripts.networks.cine_network import as_factors
from scripts.networks.deformable_diffusion import DeformableDiffusionNet
from scripts.networks.registration import warp
from scripts.samplers import ddpm, for_batch, level_grid, noise_image

__all__ = ["DiffuseMorphNet"]

WAYS = ("time", "score")


class DiffuseMorphNet(DeformableDiffusionNet):
    """DiffuseMorph: a field that brings a moving volume m to a fixed one f.

    A diffusion module G estimates the noise in the noised fixed volume x_t from m, f and x_t. A deformation module M makes
    the field from m and that estimate. To register, nothing is noised: the field is M(m, ε), ε = G(m, f, f, 0). Both modules
    are those of :class:`scripts.networks.deformable_diffusion.DeformableDiffusionNet`, by the same authors, and are trained
    alike; here the volumes may be any two, in either order.

    Args:
        gammas: fractions η of the way from m (0) to its best match of f (1) that ``forward`` returns.
        along: how a fraction η of the way is gone. ``score``, as in the paper: M(m, η·ε). ``time``: η·M(m, ε), which, being
            a velocity (``diffeomorphic``), is integrated up to η; so the way is a flow, whose halves make up the whole.
        kwargs: arguments of :class:`scripts.networks.deformable_diffusion.DeformableDiffusionNet`.

    Raises:
        ValueError: for another way.
    """

    def __init__(self, gammas: Sequence[float] = (1.0,), along: str = "time", **kwargs: Any) -> None:
        super().__init__(gammas=gammas, **kwargs)
        if along not in WAYS:
            raise ValueError(f"along must be one of {', '.join(WAYS)}, got {along}")
        self.along = along

    @property
    def published(self) -> dict[str, object]:
        """Settings of the paper's inference."""
        return super().published | {"along": "score"}

    def motion(self, source: Tensor, target: Tensor) -> Any:
        """Of pairs (B, 1, H, W, D): the field of the whole way, or with ``score`` what the deformation module takes."""
        return self.trained_motion(source, self.code_of(source, target))

    def trained_motion(self, source: Tensor, code: Tensor) -> Any:
        prepared = self._prepare(source, code)
        return prepared if self.along == "score" else self._deform(prepared, [1.0])

    def velocities(self, motion: Any, gammas: Sequence[float]) -> Tensor:
        if self.along == "score":
            return self._deform(motion, gammas)
        return as_factors(gammas, motion) * motion

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        """Of pairs (B, 2, H, W, D), moving and fixed, in [-1, 1]: (B, 4 F, H, W, D).

        First the moving volume warped to each fraction of the way, then the displacements, x, y, z of one fraction after
        the other, in voxels: warped(p) = moving(p + displacement(p)).
        """
        fields = self.displace(image)
        warped = [warp(image[:, :1].float(), field) for field in fields.unbind(1)]
        return torch.cat([*warped, fields.flatten(1, 2)], dim=1)

    @torch.no_grad()
    def synthesise(self, image: Tensor, num_steps: int, generator: torch.Generator) -> Tensor:
        """Make a volume by the diffusion module alone, beginning with the noised moving one (algorithm 2 of the paper).

        Steps are ancestral, as in the paper: what they draw makes up for errors of the first ones, which deterministic steps
        carry to the end. What a step takes for the clean volume is clipped to [-1, 1], as in the published code.

        Args:
            image: pairs (B, 2, H, W, D), moving and fixed, in [-1, 1], sizes being multiples of 8.
            num_steps: steps from the last level to none.
            generator: source of the noise.

        Returns:
            (B, 1, H, W, D), in [-1, 1].
        """
        moving, fixed = image.float().split(1, dim=1)
        levels = level_grid(len(self.alphas_cumprod) - 1, num_steps)
        draw = partial(for_batch, torch.randn, moving.shape, generator, moving.device)
        noised = noise_image(moving, draw(), self.alphas_cumprod[-1].to(moving))

        def model(x: Tensor, t: int) -> Tensor:
            a = self.alphas_cumprod[t].to(x)
            noise = self.noise(moving, fixed, x, torch.full((len(x),), t, device=x.device))
            clean = ((x - (1 - a).sqrt() * noise) / a.sqrt()).clamp(-1, 1)
            return (x - a.sqrt() * clean) / (1 - a).sqrt()

        return ddpm(model, noised, levels[::-1], self.alphas_cumprod, draw_noise=lambda _: draw())
