"""Variational diffusion models that generate images.

Kingma et al. 2021, arXiv 2107.00630, and for medical images Rguibi et al. 2023, J. Imaging 9:171.

Time runs from 0, where the image is clean but for a trace of noise, to 1, where hardly anything of it is left. Noised
latents are z = sqrt(sigmoid(-gamma))·f(x) + sqrt(sigmoid(gamma))·noise, with gamma rising with time
(:mod:`scripts.networks.noise_schedules`). The model has two parts besides the schedule: a *codec* says what f(x) is and how
likely an image is given z_0, and a *score* network estimates the noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from scripts.losses import binary_entropy, gaussian_kl, gradient_difference
from scripts.messages import check_known
from scripts.networks.grey_levels import ConvolutionalScore, GreyLevels
from scripts.networks.med_vdm import DenseCodec, DenseScore
from scripts.networks.noise_schedules import SCHEDULES, with_slope
from scripts.noise import stream_of
from scripts.precision import Amp
from scripts.samplers import SOLVERS, STOCHASTIC, antithetic_times, for_batch, noise_to_gamma

__all__ = ["VariationalDiffusionNet"]

GAMMA_RANGES = {"image": (-13.3, 9.0), "medvdm": (-13.3, 5.0)}
SAMPLERS = (*STOCHASTIC, *SOLVERS)
DETAILS = ("lattice", "fourier", "none")
WEIGHTINGS = ("bound", "mixed")
UNLABELLED_SHARE = 0.1  # of the training images of a network with classes, so that it draws without a class too


class VariationalDiffusionNet(nn.Module):
    """Generate images from noise, and tell how well the model fits an image, as a bound of its likelihood.

    One module holds the noise schedule, the codec and the score network. ``image``, the default: f(x) are the grey levels
    themselves, with a convolutional score. ``medvdm``, the paper's model: f(x) are 64 numbers of a dense autoencoder.

    Args:
        spatial_size: height and width of an image.
        model: ``image`` or ``medvdm``.
        schedule: ``linear``, ``learned_linear`` or ``monotonic``, see :mod:`scripts.networks.noise_schedules`; None for
            ``linear`` of ``image`` and ``monotonic`` of ``medvdm``.
        gamma_range: gamma at times 0 and 1, of a learned line before its training; None for (-13.3, 9) of ``image`` and
            (-13.3, 5) of ``medvdm``.
        num_timesteps: number T of steps of the bound; None for its limit, continuous time.
        weighting: what is minimised. ``bound``: the variational bound. ``mixed``, for ``image`` only: the mean squared
            error of the velocity at noise levels that are drawn for the look of samples, a share of them evenly as in
            the bound.
        bound_share: that share, in [0, 1].
        diffusion_weight: weight of the diffusion and latent terms in the training of ``medvdm``; less than 1, which is
            the bound, buys a sharper reconstruction with more bits.
        gradient_weight: weight of the gradient difference between image and reconstruction, of ``medvdm``.
        channels: channels of the U-Net's levels, multiples of 32; the lowest has attention (``image``).
        num_res_blocks: residual blocks a level (``image``).
        detail: how the score tells the 256 grey levels apart where noise is finer than they (``image``): ``lattice``, by
            adding the noise that they explain exactly, see :func:`scripts.networks.grey_levels.lattice_noise`;
            ``fourier``, learned from Fourier features, as in arXiv 2107.00630, appendix C; ``none``.
        latent_size: number of latent variables (``medvdm``).
        hidden_size: width of encoder and decoder (``medvdm``).
        num_blocks: residual blocks of encoder and decoder (``medvdm``).
        score_size: width of the score network (``medvdm``).
        score_blocks: residual blocks of the score network (``medvdm``).
        sampler: stochastic, ``ancestral`` or ``dpmpp_2m_sde``, or a solver of the diffusion ODE: ``ddim``, ``heun``,
            ``multistep`` or ``dpmpp_2m``.
        num_steps: steps from time 1 to time 0, each one network call, of ``heun`` two.
        seed: seed of the noise of stochastic steps, which depends on it and on the noise that an image begins with, and
            not on the batch.
        amp: bfloat16 in the U-Net, see :func:`scripts.precision.autocast`.
        num_classes: number of classes of images, of which one may then be asked for; None for images without class.

    Raises:
        ValueError: for an unknown model, schedule, weighting, detail or sampler, or a number out of its range.
    """

    def __init__(
        self,
        spatial_size: Sequence[int] = (64, 64),
        model: str = "image",
        schedule: str | None = None,
        gamma_range: Sequence[float] | None = None,
        num_timesteps: int | None = None,
        weighting: str = "bound",
        bound_share: float = 0.25,
        diffusion_weight: float = 1.0,
        gradient_weight: float = 0.0,
        channels: Sequence[int] = (64, 96, 128),
        num_res_blocks: int = 1,
        detail: str = "lattice",
        latent_size: int = 64,
        hidden_size: int = 256,
        num_blocks: int = 6,
        score_size: int = 128,
        score_blocks: int = 10,
        sampler: str = "dpmpp_2m_sde",
        num_steps: int = 50,
        seed: int = 0,
        amp: Amp = False,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        schedule = schedule or ("monotonic" if model == "medvdm" else "linear")
        check_known("model", model, GAMMA_RANGES)
        check_known("schedule", schedule, SCHEDULES)
        check_known("weighting", weighting, WEIGHTINGS)
        check_known("detail", detail, DETAILS)
        check_known("sampler", sampler, SAMPLERS)
        if num_steps < 1 or (num_timesteps is not None and num_timesteps < 1):
            raise ValueError(f"num_steps ({num_steps}) and num_timesteps ({num_timesteps}) must be at least 1")
        if weighting == "mixed" and model != "image":
            raise ValueError("weighting 'mixed' trains the score alone: give model 'medvdm' weighting 'bound'")
        gamma_range = tuple(gamma_range or GAMMA_RANGES[model])
        if not gamma_range[0] < gamma_range[1]:
            raise ValueError(f"gamma_range must be two numbers, the lower one first, got {gamma_range}")
        if model == "image" and any(size % 2 ** len(channels) for size in spatial_size):
            raise ValueError(f"spatial_size must be a multiple of {2 ** len(channels)}, got {tuple(spatial_size)}")
        if model == "medvdm" and latent_size > math.prod(spatial_size):
            raise ValueError(
                f"latent_size must be at most the number of pixels, {math.prod(spatial_size)}, got {latent_size}"
            )
        self.spatial_size, self.num_timesteps, self.num_classes = tuple(spatial_size), num_timesteps, num_classes
        self.weighting, self.bound_share = weighting, bound_share
        self.diffusion_weight, self.gradient_weight = diffusion_weight, gradient_weight
        self.sampler, self.num_steps, self.seed = sampler, num_steps, seed

        self.schedule = SCHEDULES[schedule](*gamma_range)
        if model == "image":
            self.codec = GreyLevels(spatial_size)
            self.score = ConvolutionalScore(spatial_size, channels, num_res_blocks, gamma_range, detail, num_classes, amp)
        else:
            self.codec = DenseCodec(spatial_size, latent_size, hidden_size, num_blocks, gamma_range, num_classes)
            self.score = DenseScore(latent_size, score_size, score_blocks, gamma_range, num_classes)

    @property
    def amp(self) -> Amp:
        """As the score network has it; the dense one of ``medvdm`` computes in 32 bits."""
        return getattr(self.score, "amp", False)

    @property
    def published(self) -> dict[str, object]:
        """Settings of the paper's sampling."""
        return {"sampler": "ancestral", "num_steps": 20_000}

    @torch.no_grad()
    def forward(self, noise: Tensor, label: Tensor | None = None) -> Tensor:
        """Images from noise.

        Args:
            noise: standard normal (B, 1, H, W); ``medvdm`` uses the first ``latent_size`` numbers of each.
            label: classes (B,), or None for any; not used without ``num_classes``.

        Returns:
            (B, 1, H, W) in [0, 1]; of ``image`` 8-bit values divided by 255.
        """
        label = self._label(label, noise)
        shape = self.codec.latent_shape
        z = noise.float().flatten(1)[:, : math.prod(shape)].unflatten(1, shape)
        gammas = self.schedule(torch.linspace(0, 1, self.num_steps + 1, dtype=torch.float64, device=noise.device)).cpu()

        def estimate(z: Tensor, step: int) -> Tensor:
            return self.score(z, gammas[step].float().to(z.device).expand(len(z)), label)

        levels, table = range(self.num_steps, -1, -1), torch.sigmoid(-gammas)  # a level is the number of steps to time 0
        if self.sampler in STOCHASTIC:
            z = STOCHASTIC[self.sampler](estimate, z, levels, table, draw_noise=self._noise_of_each(noise))
        else:
            z = SOLVERS[self.sampler](estimate, z, levels, table)
        return self.codec.decode(z / table[0].item() ** 0.5, gammas[0].float().to(z.device), label)

    def _noise_of_each(self, noise: Tensor) -> Callable[[Tensor], Tensor]:
        """Source of noise for the steps: a stream for each image, from the seed and the noise that it begins with."""
        generators = [stream_of(image, self.seed) for image in noise]

        def draw(z: Tensor) -> Tensor:
            return torch.stack([torch.randn(z.shape[1:], generator=g) for g in generators]).to(z.device)

        return draw

    def bound(self, image: Tensor, generator: torch.Generator, label: Tensor | None = None) -> dict[str, Tensor]:
        """Terms of the variational bound of the negative log likelihood (arXiv 2107.00630, equations 11, 13 and 17).

        The diffusion term is estimated at one time for each image, the times being spread over the batch.

        Args:
            image: (B, 1, H, W) in [0, 1].
            generator: source of times and noise, see :func:`scripts.samplers.for_batch`.
            label: classes (B,), or None; not used without ``num_classes``.

        Returns:
            (B,) each, in bits per pixel: ``recon``, ``latent``, ``diffusion``, whose sum is the bound. Of ``image`` it is
            one of 8-bit values. Of ``medvdm`` the pixels are Bernoulli's, and ``recon_8bit`` takes the place of ``recon``
            in a bound of 8-bit values.
        """
        return self._bound(image, generator, label)[0]

    def _bound(self, image: Tensor, generator: torch.Generator, label: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
        """Terms of the bound, and z_0 / sqrt(1 - var_0), (B, *latent_shape)."""
        label = self._label(label, image)
        t = for_batch(antithetic_times, (len(image),), generator, image.device)
        gamma_0, gamma_1 = self.schedule(t.new_tensor([0.0, 1.0]))
        f = self.codec.encode(image, gamma_0, label)
        noise_0, noise = (for_batch(torch.randn, f.shape, generator, f.device) for _ in range(2))

        rescaled = f + (gamma_0 / 2).exp() * noise_0  # z_0 / sqrt(1 - var_0)
        recon, others = self.codec.negative_log_likelihood(image, rescaled, gamma_0, label)

        zero = torch.zeros_like(gamma_1)
        latent = gaussian_kl(torch.sigmoid(-gamma_1).sqrt() * f, functional.logsigmoid(gamma_1), zero, zero)

        if self.num_timesteps is None:
            gamma, slope = with_slope(self.schedule, t)
            weight = slope / 2
        else:
            t = (t * self.num_timesteps).floor().add(1) / self.num_timesteps
            gamma, below = self.schedule(t), self.schedule(t - 1 / self.num_timesteps)
            weight = self.num_timesteps * torch.expm1(gamma - below) / 2
        error = (noise - self.score(noise_to_gamma(f, noise, gamma), gamma, label)).square().flatten(1).sum(dim=1)

        terms = {"recon": recon, "latent": latent.flatten(1).sum(dim=1), "diffusion": weight * error, **others}
        nats = math.log(2) * math.prod(self.spatial_size)
        return {name: term / nats for name, term in terms.items()}, rescaled

    def floor(self, image: Tensor) -> Tensor:
        """Least reconstruction term of Bernoulli pixels for images (B, 1, H, W) in [0, 1]: (B,), in bits per pixel."""
        return binary_entropy(image).flatten(1).mean(dim=1) / math.log(2)

    @torch.no_grad()
    def standardise(self, batches: Iterable[dict]) -> None:
        """Fit, before training, what has a closed form.

        It is how much of the finest patterns images hold (see :class:`ConvolutionalScore`), and of ``medvdm`` the linear
        codec that its encoder and decoder begin as.

        Args:
            batches: dictionaries with ``image``, the images (B, 1, H, W) in [0, 1] of the training, as they are.

        Raises:
            ValueError: of ``medvdm``, for fewer images than ``latent_size``.
        """
        device = next(self.score.parameters()).device
        if self.codec.grey_scale is not None:
            self.codec.begin_linear(torch.cat([batch["image"] for batch in batches]))
            return
        grey = (self.codec.encode(batch["image"].to(device), None, None) for batch in batches)
        amounts = torch.cat([self.score.patterns_of(image) for image in grey])
        self.score.mean.copy_(amounts.mean(dim=0))
        self.score.std.copy_(amounts.std(dim=0))

    @torch.no_grad()
    def calibrate(self, batches: Iterable[dict]) -> None:
        """Fit the scale of the paper's model's 8-bit likelihood; the model of the grey levels has nothing to fit.

        Args:
            batches: dictionaries with ``image``, held-out images (B, 1, H, W) in [0, 1].
        """
        if self.codec.grey_scale is None:
            return
        gaps, count = 0.0, 0
        gamma_0 = self.schedule(torch.zeros(1, device=self.codec.grey_scale.device))[0]
        for batch in batches:
            image = batch["image"].to(gamma_0.device)
            label = self._label(None, image)
            mean = self.codec.decode(self.codec.encode(image, gamma_0, label), gamma_0, label)
            gaps, count = gaps + (image - mean).abs().sum().item(), count + image.numel()
        self.codec.grey_scale.fill_(gaps / count / (2 * math.log(2)))  # a logistic's mean deviation is 2·ln(2) scales

    def losses(self, image: Tensor, class_label: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """What training minimises, as a sum.

        Args:
            image: (B, 1, H, W) in [0, 1].
            class_label: classes (B,); not used without ``num_classes``. In training, 1 of 10 is taken away.
            generator: source of times and noise, see :func:`scripts.samplers.for_batch`.

        Returns:
            ``recon``, ``latent`` and ``diffusion`` of :meth:`bound`, means over the batch, the last two with
            ``diffusion_weight`` in training; ``gradient`` with a ``gradient_weight``. In training with weighting
            ``mixed``: ``velocity``, the mean squared error of the velocity (Salimans & Ho 2022, arXiv 2202.00512).
        """
        label = class_label if self.num_classes else None
        if self.num_classes and self.training:
            unlabelled = for_batch(torch.rand, (len(image),), generator, image.device) < UNLABELLED_SHARE
            label = label.masked_fill(unlabelled, self.num_classes)
        if self.training and self.weighting == "mixed":
            return {"velocity": self._velocity_error(image, label, generator)}
        terms, rescaled = self._bound(image, generator, label)
        weight = self.diffusion_weight if self.training and self.codec.grey_scale is not None else 1.0
        losses = {"recon": terms["recon"].mean()}
        losses |= {name: weight * terms[name].mean() for name in ("latent", "diffusion")}
        if self.gradient_weight:
            gamma_0 = self.schedule(rescaled.new_zeros(1))[0]
            restored = self.codec.decode(rescaled, gamma_0, self._label(label, image))
            losses["gradient"] = self.gradient_weight * gradient_difference(image, restored).mean()
        return losses

    def _velocity_error(self, image: Tensor, label: Tensor | None, generator: torch.Generator) -> Tensor:
        """Mean squared error of the velocity v = (noise - sqrt(var)·z) / sqrt(1 - var).

        A share of the gammas is uniform, as in the bound; the others are normal with mean -2.4 and standard deviation
        2.4, in other words the log of noise over signal has mean -1.2 and 1.2 (Karras et al. 2022, arXiv 2206.00364,
        table 1). Both together are the bound with the weight density(gamma) / (1 - var).
        """
        u = for_batch(antithetic_times, (len(image),), generator, image.device)
        ends = self.schedule(u.new_tensor([0.0, 1.0])).detach()
        even = self.schedule(u / self.bound_share if self.bound_share else u)
        normal = -2.4 + 2.4 * torch.special.ndtri((u - self.bound_share) / (1 - self.bound_share))
        gamma = torch.where(u < self.bound_share, even, normal.clamp(*ends))
        f = self.codec.encode(image, ends[0], label)
        noise = for_batch(torch.randn, f.shape, generator, f.device)
        gap = noise - self.score(noise_to_gamma(f, noise, gamma), gamma, self._label(label, image))
        return (gap.square().flatten(1).mean(dim=1) / torch.sigmoid(-gamma)).mean()

    def _label(self, label: Tensor | None, image: Tensor) -> Tensor | None:
        """Classes for the networks: the number of classes stands for none; None if the network knows no classes."""
        if not self.num_classes:
            return None
        return torch.full((len(image),), self.num_classes, device=image.device) if label is None else label
