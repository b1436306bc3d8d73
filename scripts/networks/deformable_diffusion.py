"""The frames of a cine between two of its phases, made by deforming the first one.

:class:`DeformableDiffusionNet` is the method of B. Kim and J. C. Ye, *Diffusion Deformable Model for 4D Temporal Medical
Image Generation*, MICCAI 2022, arXiv 2206.13295; :class:`VoxelMorphNet` is what it is compared with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from monai.losses import DiffusionLoss, LocalNormalizedCrossCorrelationLoss
from monai.networks.blocks import DVF2DDF, Convolution, Warp
from monai.networks.nets import DiffusionModelUNet, VoxelMorphUNet
from monai.networks.utils import pixelshuffle, pixelunshuffle
from torch import Tensor, nn
from torch.nn import functional

from scripts.losses import jacobian_determinant
from scripts.precision import Amp, autocast, check_amp
from scripts.samplers import alphas_cumprod_table, draw_noised, for_batch

__all__ = ["CineNet", "DeformableDiffusionNet", "VoxelMorphNet"]

REFINEMENT_RATE = 0.2  # voxels of the networks' grid a step
MULTIPLE = 8  # of every spatial size: three halvings in each network, where the blocks of voxels count as one


class LeanVoxelMorphUNet(VoxelMorphUNet):
    """MONAI's VoxelMorphUNet, the same weights and result with less than half of the work.

    Where MONAI convolves a skipped map and an upsampled one side by side, each is convolved by itself with its share of
    the kernel. Nearest upsampling followed by a convolution of 3 x 3 x 3 is one transposed convolution of 4 x 4 x 4 with
    stride 2, which has 8 factors a voxel in place of 27 and never makes the upsampled map.

    Args:
        lean: False for MONAI's own way.
        reduction: edge of the blocks of voxels that become one voxel with so many more channels, before everything else.
        kwargs: arguments of :class:`monai.networks.nets.VoxelMorphUNet`.
    """

    def __init__(self, lean: bool = True, reduction: int = 1, **kwargs: Any) -> None:
        super().__init__(in_channels=2 * reduction**3, **kwargs)
        self.lean, self.reduction = lean, reduction

    def forward(self, concatenated_pairs: Tensor) -> Tensor:
        """Pairs (B, 2, H, W, D), sizes being multiples of 8, to a field (B, 3, H, W, D), or smaller by the reduction."""
        pairs = pixelunshuffle(concatenated_pairs, 3, self.reduction)
        if not self.lean:
            return super().forward(pairs)
        return self._beyond_first(self.net[0][0](pairs.contiguous(memory_format=torch.channels_last_3d)))

    def prepare(self, still: Tensor, scaled: Tensor) -> tuple[Tensor, Tensor]:
        """What all pairs of one image and multiples of another have in common, for :meth:`along`; both (B, 1, H, W, D).

        It is the share of each in the first convolution, which is linear.
        """
        if not self.lean:
            return still, scaled
        conv = self.net[0][0].conv
        weight = torch.cat(conv.weight.chunk(2, dim=1)).contiguous()
        both = pixelunshuffle(torch.cat([still, scaled], dim=1), 3, self.reduction)
        both = both.contiguous(memory_format=torch.channels_last_3d)
        return functional.conv3d(both, weight, torch.cat([conv.bias, 0 * conv.bias]), padding=1, groups=2).chunk(2, dim=1)

    def along(self, prepared: tuple[Tensor, Tensor], factors: Sequence[float]) -> Tensor:
        """Fields (B, F, 3, ...) of the pairs (still, factor·scaled) that were prepared."""
        still, scaled = prepared
        if not self.lean:
            pairs = torch.stack([torch.cat([still, factor * scaled], dim=1) for factor in factors], dim=1)
            return self(pairs.flatten(0, 1)).unflatten(0, pairs.shape[:2])
        first = torch.stack([torch.add(still, scaled, alpha=factor) for factor in factors], dim=1)
        high = self.net[0][0].adn(first.flatten(0, 1).contiguous(memory_format=torch.channels_last_3d))
        return self._beyond_first(high).unflatten(0, first.shape[:2])

    def _beyond_first(self, high: Tensor) -> Tensor:
        """Field from what the first convolution and its activation give."""
        return self.net[1](self._beyond(self.net[0], high))

    def _beyond(self, block: nn.Sequential, high: Tensor) -> Tensor:
        """Result of a level, before it is upsampled, from that of its way down."""
        _, skip, up = block
        lower = skip.submodule
        low = lower[0](high)
        if len(lower) == 3:  # the lowest level has no further one
            low = self._beyond(lower, low)
        up = up if isinstance(up, Convolution) else up[0]
        return up.adn(self._convolve(up.conv, high, low))

    @staticmethod
    def _convolve(conv: nn.Conv3d, high: Tensor, low: Tensor) -> Tensor:
        of_high, of_low = conv.weight.split([high.shape[1], low.shape[1]], dim=1)
        kernel = of_low.flip(2, 3, 4).transpose(0, 1)
        for axis in (2, 3, 4):  # every low voxel stands for 2 x 2 x 2
            none = torch.zeros_like(kernel.narrow(axis, 0, 1))
            kernel = torch.cat([kernel, none], dim=axis) + torch.cat([none, kernel], dim=axis)
        upsampled = functional.conv_transpose3d(low, kernel, stride=2, padding=1)
        return functional.conv3d(high, of_high, conv.bias, padding=1).add_(upsampled)


class CineNet(nn.Module):
    """Frames between a source and a target volume, each the source deformed a part of the way.

    A method gives :meth:`motion`, what is found once for a pair, and :meth:`velocities`, the fields of its networks at
    fractions γ of the way; γ = 0 is the source itself, exactly.

    Args:
        num_frames: number of frames from source (γ = 0) to target (γ = 1), both counted, evenly spaced.
        gammas: the fractions themselves, in place of ``num_frames``.
        reduction: edge of the blocks of voxels that the networks take for one voxel with so many more channels, and of the
            grid on which they find the motion: none of the images is lost, with less work and two halvings of the grid in
            place of three; 1 in the paper.
        diffeomorphic: take what the network gives for a velocity, integrated by scaling and squaring (Dalca et al. 2019,
            arXiv 1903.03545), so that space hardly ever folds over; or for the displacement itself.
        integration_steps: number of squarings.
        similarity_weight: weight of similarity and smoothness in the training (λ of the paper).
        squared_error: weight, beside the similarity, of the mean squared error of the grey levels as a share of what it is
            without any motion, so that hearts that move little count as much as others; 0 in the paper.
        smoothness: weight of the smoothness beside the similarity.
        folding: weight, beside the similarity, of the mean by which the Jacobian determinant lies below 0 (Mok and Chung
            2020, arXiv 2003.09514); 0 in the paper.
        frames_weight: weight, beside the target's, of a frame between, where a cine has them; 0 is the paper's training,
            which sees source and target alone.
        refinement_steps: gradient steps by which ``forward`` improves the networks' field of a pair, see :meth:`refine`.
        window: edge in voxels of the window of the normalised cross-correlation.
        max_batch: number of frames that go through a network at once; a few, which the processor's memory keeps up with.
        amp: bfloat16 in the networks, see :func:`scripts.precision.autocast`.

    ``forward`` takes pairs (B, 2, H, W, D), source and target, in [-1, 1], of any size, and returns the frames
    (B, F, H, W, D). It keeps their fields as ``displacement`` (B, F, 3, H, W, D), in voxels along the three axes:
    frame(p) = source(p + displacement(p)).

    Raises:
        ValueError: by ``forward`` for another number of channels or axes; for fractions that are none.
    """

    def __init__(
        self,
        num_frames: int = 10,
        gammas: Sequence[float] | None = None,
        reduction: int = 1,
        diffeomorphic: bool = False,
        integration_steps: int = 5,
        similarity_weight: float = 20.0,
        squared_error: float = 0.0,
        smoothness: float = 1.0,
        folding: float = 0.0,
        frames_weight: float = 0.0,
        refinement_steps: int = 0,
        window: int = 9,
        max_batch: int = 2,
        amp: Amp = False,
    ) -> None:
        super().__init__()
        if gammas is None and num_frames < 2:
            raise ValueError(f"num_frames ({num_frames}) must be at least 2, source and target")
        self.gammas = [i / (num_frames - 1) for i in range(num_frames)] if gammas is None else list(gammas)
        if not self.gammas or min(self.gammas) < 0 or max(self.gammas) > 1:
            raise ValueError(f"gammas must lie in 0 ... 1, 0 being the source and 1 the target; got {self.gammas}")
        self.similarity_weight, self.frames_weight = similarity_weight, frames_weight
        self.squared_error, self.smoothness, self.folding = squared_error, smoothness, folding
        self.reduction, self.refinement_steps = reduction, refinement_steps
        self.max_batch, self.amp = max_batch, check_amp(amp)
        self.warp = Warp(padding_mode="border")
        self.integrator = DVF2DDF(integration_steps, padding_mode="border") if diffeomorphic else None
        self.similarity = LocalNormalizedCrossCorrelationLoss(kernel_size=window)
        self.roughness = DiffusionLoss()
        self.displacement: Tensor | None = None

    def _apply(self, *args: Any, **kwargs: Any) -> CineNet:
        for module in self.modules():
            if isinstance(module, Warp):
                module.ref_grid = None  # MONAI keeps the grid of the last call where it was, when the network moves
        return super()._apply(*args, **kwargs)

    def motion(self, source: Tensor, target: Tensor) -> Any:
        """What is found once for pairs (B, 1, H, W, D), sizes being multiples of 8."""
        raise NotImplementedError

    def velocities(self, motion: Any, gammas: Sequence[float]) -> Tensor:
        """Fields (B, F, 3, ...) at the fractions γ of the way, on the networks' grid, in its voxels.

        They are velocities if ``diffeomorphic``, or displacements.
        """
        raise NotImplementedError

    def fields(self, motion: Any, gammas: Sequence[float], refined: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Displacements (B, F, 3, H, W, D) in voxels at the fractions γ of the way.

        With what :meth:`refine` gives they lie on the way of the refined velocity, each as far along it as the networks'
        field at γ is along theirs at γ = 1.
        """
        velocities = self.velocities(motion, gammas)
        if refined is not None:
            whole, better = refined
            products = [(v * whole).flatten(2).sum(dim=2) for v in (velocities, whole)]
            share = products[0] / products[1].clamp(min=1e-12)
            velocities = share[..., None, None, None, None] * better
        return self._integrate(velocities)

    def refine(self, source: Tensor, target: Tensor, motion: Any) -> tuple[Tensor, Tensor]:
        """Fit the field of pairs (B, 1, H, W, D) to them, beginning with what the networks say.

        What the networks are trained by (similarity, squared error, smoothness, folding) is lowered for each pair by
        itself, by ``refinement_steps`` of Adam (Balakrishnan et al. 2019, arXiv 1809.05231, instance-specific
        optimization). No frame between is looked at.

        Returns:
            the networks' velocity at γ = 1 and the refined one, (B, 1, 3, ...).
        """
        with torch.no_grad():
            whole = self.velocities(motion, [1.0])
        with torch.inference_mode(False), torch.enable_grad():
            # no gradient passes a tensor that was made in inference mode, but its copy
            source, target, better = source.clone(), target.clone(), whole.clone().requires_grad_()
            optimizer = torch.optim.Adam([better], lr=REFINEMENT_RATE)
            for _ in range(self.refinement_steps):
                loss = sum(self._mismatch(source, self._integrate(better)[:, 0], target).values())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return whole, better.detach()

    def _integrate(self, fields: Tensor) -> Tensor:
        """Displacements (B, F, 3, H, W, D) of the networks' fields on their own grid, velocities if ``diffeomorphic``.

        Velocities are integrated at half the resolution of the images at most, with an eighth of the work.
        """
        flat = fields.flatten(0, 1)
        if self.integrator is not None:
            half = 0.5 if self.reduction == 1 else 1
            flat = _resized(self.integrator(_resized(flat, half)), 1 / half)
        return _resized(flat, self.reduction).unflatten(0, fields.shape[:2])

    @torch.no_grad()
    def displace(self, image: Tensor) -> Tensor:
        """Fields alone of pairs (B, 2, H, W, D), as ``forward`` keeps them: (B, F, 3, H, W, D)."""
        if image.ndim != 5 or image.shape[1] != 2:
            raise ValueError(f"image must be (B, 2, H, W, D), source and target; got {tuple(image.shape)}")
        size = image.shape[2:]
        padding = [p for n in reversed(size) for p in (0, -n % MULTIPLE)]
        pair = functional.pad(image.float(), padding, mode="replicate").split(1, dim=1)
        motion = self.motion(*pair)
        refined = self.refine(*pair, motion) if self.refinement_steps else None
        moved = [gamma for gamma in self.gammas if gamma]
        chunks = [moved[i : i + self.max_batch] for i in range(0, len(moved), self.max_batch)]
        fields = iter([f for chunk in chunks for f in self.fields(motion, chunk, refined).unbind(1)])
        still = image.new_zeros(len(image), 3, *size, dtype=torch.float32)
        return torch.stack(
            [next(fields)[..., : size[0], : size[1], : size[2]] if gamma else still for gamma in self.gammas], dim=1
        )

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        self.displacement = self.displace(image)
        first = image[:, :1].float()
        # interpolation rounds, and the source is to come back as it is
        frames = [
            self.warp(first, field) if gamma else first
            for gamma, field in zip(self.gammas, self.displacement.unbind(1), strict=True)
        ]
        return torch.cat(frames, dim=1)

    def _mismatch(self, source: Tensor, field: Tensor, frame: Tensor) -> dict[str, Tensor]:
        """Losses of a field that is to deform the source into a frame; similarity as 1 - mean squared correlation."""
        pred = self.warp(source, field)
        losses = {
            "similarity": 1 + self.similarity(pred, frame),
            "smoothness": self.smoothness * self.roughness(field),
        }
        if self.squared_error:
            left, before = ((image - frame).square().flatten(1).mean(dim=1) for image in (pred, source))
            losses["squared_error"] = self.squared_error * (left / before.clamp(min=1e-4)).mean()
        if self.folding:
            losses["folding"] = self.folding * functional.relu(-jacobian_determinant(field)).mean()
        return losses

    def _losses(self, cine: Tensor, motion: Any, generator: torch.Generator) -> dict[str, Tensor]:
        """Losses at the target and, with ``frames_weight``, at one of the frames before it."""
        source, target, last = cine[:, :1], cine[:, -1:], cine.shape[1] - 1
        losses = self._mismatch(source, self.fields(motion, [1.0])[:, 0], target)
        if self.frames_weight and last > 1:
            k = int(torch.rand((), generator=generator, device=generator.device) * last)  # the same in all processes
            field = self.fields(motion, [k / last])[:, 0]
            between = self._mismatch(source, field, cine[:, k : k + 1])
            losses = {name: loss + self.frames_weight * between[name] for name, loss in losses.items()}
        return {name: self.similarity_weight * loss for name, loss in losses.items()}


class DeformableDiffusionNet(CineNet):
    """Diffusion deformable model (DDM).

    A diffusion module G estimates the noise in the noised target from source, target and noised target; its estimate is
    the latent code c = G(S, T, T, 0). A deformation module M makes the field from the source and the scaled code,
    M(S, γ·c), which is a geodesic path from source to target.

    Two additions to the paper: G is the difference of noised target and source, plus what a U-Net adds to it, so that M
    sees from the first step of the training on where both differ; and what M says without a code fades out along the way,
    φ_γ = M(S, γ·c) - (1 - γ)·M(S, 0), so that it begins at the source and ends with the target's field M(S, c).

    Args:
        channels: of the diffusion module, level by level.
        deformation_channels: of the deformation module, down and up in pairs, level by level.
        deformation_out: channels of the deformation module before its last convolutions.
        final_channels: of the last convolutions but one.
        num_levels: noise levels.
        lean: make the networks' work less, see :class:`LeanVoxelMorphUNet`.
        clean_share: share of the training's batches whose code comes from the target without noise, as at inference; 0 in
            the paper.
        kwargs: arguments of :class:`CineNet`.
    """

    def __init__(
        self,
        channels: Sequence[int] = (8, 16, 32, 32),
        deformation_channels: Sequence[int] = (16, 32, 32, 32, 32, 32),
        deformation_out: int = 16,
        final_channels: Sequence[int] = (8,),
        num_levels: int = 2000,
        lean: bool = True,
        clean_share: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.clean_share = clean_share
        self.diffusion = DiffusionModelUNet(
            spatial_dims=3,
            in_channels=3 * self.reduction**3,
            out_channels=self.reduction**3,
            num_res_blocks=1,
            channels=channels,
            attention_levels=[False] * len(channels),
            norm_num_groups=min(8, channels[0]),
        )
        if lean:
            self.diffusion.to(memory_format=torch.channels_last_3d)
        self.deformation = _unet_of_pairs(deformation_channels, deformation_out, final_channels, self.reduction, lean)
        table = alphas_cumprod_table("linear", num_levels, 1e-6, 1e-2)
        self.register_buffer("alphas_cumprod", table, persistent=False)

    @property
    def published(self) -> dict[str, object]:
        """Settings of the paper's inference: each frame by itself, through the deformation module as it is."""
        return {"lean": False, "max_batch": 1, "refinement_steps": 0}

    def noise(self, source: Tensor, target: Tensor, noised: Tensor, t: Tensor) -> Tensor:
        """Estimated noise G(S, T, x_t, t), which is the latent code; all (B, 1, H, W, D), levels (B,)."""
        with autocast(target, self.amp):
            images = pixelunshuffle(torch.cat([source, target, noised], dim=1), 3, self.reduction)
            added = pixelshuffle(self.diffusion(images, t).float(), 3, self.reduction)
        signal = self.alphas_cumprod[t.long()].to(noised).sqrt().view(-1, 1, 1, 1, 1)
        return noised - signal * source + added

    def motion(self, source: Tensor, target: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Source and latent code, prepared for the deformation module, and the fields (B, 1, 3, ...) without a code."""
        code = self.noise(source, target, target, torch.zeros(len(source), device=source.device))
        prepared = self._prepare(source, code)
        return prepared, self._deform(prepared, [0.0])

    def _prepare(self, source: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
        with autocast(source, self.amp):
            return self.deformation.prepare(source, code)

    def _deform(self, prepared: tuple[Tensor, Tensor], gammas: Sequence[float]) -> Tensor:
        with autocast(self.alphas_cumprod, self.amp):
            return self.deformation.along(prepared, gammas).float()

    def velocities(self, motion: tuple[tuple[Tensor, Tensor], Tensor | float], gammas: Sequence[float]) -> Tensor:
        prepared, without = motion
        fields = self._deform(prepared, gammas)
        return fields - (1 - _along(gammas, fields)) * without

    def losses(self, image: Tensor, class_label: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Losses of both modules (eq. 5 to 7 of the paper).

        Args:
            image: cines (B, F, H, W, D) in [-1, 1], first frame source, last one target, sizes being multiples of 8.
            class_label: not used.
            generator: source of levels, noise and frame.

        Returns:
            ``noise``: mean squared error of the estimated noise; ``similarity``, ``smoothness`` and ``folding``, with
            their weights.
        """
        source, target = image[:, :1], image[:, -1:]
        clean = for_batch(torch.rand, (len(image),), generator, image.device) < self.clean_share
        noised, t, noise = draw_noised(target, self.alphas_cumprod, generator)
        noised = torch.where(clean.view(-1, 1, 1, 1, 1), target, noised)
        code = self.noise(source, target, noised, t.masked_fill(clean, 0))
        error = (code - noise).square().flatten(1).mean(dim=1).masked_fill(clean, 0).mean()
        return {"noise": error, **self._losses(image, (self._prepare(source, code), 0.0), generator)}


class VoxelMorphNet(CineNet):
    """VoxelMorph (Balakrishnan et al. 2019, arXiv 1809.05231), its field scaled by γ or, diffeomorphic, integrated up to γ.

    Args:
        channels: down and up in pairs, level by level.
        out_channels: channels before the last convolutions.
        final_channels: of the last convolutions but one.
        kwargs: arguments of :class:`CineNet`.
    """

    def __init__(
        self,
        channels: Sequence[int] = (16, 32, 32, 32, 32, 32),
        out_channels: int = 16,
        final_channels: Sequence[int] = (8,),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.registration = _unet_of_pairs(channels, out_channels, final_channels, self.reduction)

    def motion(self, source: Tensor, target: Tensor) -> Tensor:
        """Displacement or velocity (B, 3, ...) on the network's own grid, in its voxels."""
        with autocast(source, self.amp):
            return self.registration(torch.cat([source, target], dim=1)).float()

    def velocities(self, motion: Tensor, gammas: Sequence[float]) -> Tensor:
        return _along(gammas, motion) * motion[:, None]

    def losses(self, image: Tensor, class_label: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """As above, but for the noise."""
        return self._losses(image, self.motion(image[:, :1], image[:, -1:]), generator)


def _along(gammas: Sequence[float], fields: Tensor) -> Tensor:
    """Fractions of the way as factors of fields (B, F, 3, H, W, D)."""
    return torch.tensor(gammas).to(fields).view(-1, 1, 1, 1, 1)


def _resized(field: Tensor, factor: float) -> Tensor:
    """Field (B, 3, H, W, D) on a grid so many times finer, in its voxels."""
    return field if factor == 1 else factor * functional.interpolate(field, scale_factor=factor, mode="trilinear")


def _unet_of_pairs(
    channels: Sequence[int],
    out_channels: int,
    final_channels: Sequence[int],
    reduction: int,
    lean: bool = True,
) -> LeanVoxelMorphUNet:
    """From two volumes, as two channels, to a field."""
    network = LeanVoxelMorphUNet(
        lean,
        reduction,
        spatial_dims=3,
        unet_out_channels=out_channels,
        channels=channels,
        final_conv_channels=final_channels,
    )
    return network.to(memory_format=torch.channels_last_3d) if lean else network
