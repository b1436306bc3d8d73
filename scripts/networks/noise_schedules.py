"""Noise schedules in continuous time (Kingma et al. 2021, arXiv 2107.00630, section 3.2 and appendix H).

A schedule is a module that maps times t in [0, 1] to gamma(t), the negative log of the signal-to-noise ratio, which rises
with t. The variance of the noise is sigmoid(gamma), that of what is left of the signal sigmoid(-gamma).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

__all__ = ["SCHEDULES", "LearnedLinearSchedule", "LinearSchedule", "MonotonicSchedule", "with_slope"]


class LinearSchedule(nn.Module):
    """A straight line between two end points; nothing is learned.

    Args:
        gamma_min: gamma at time 0.
        gamma_max: gamma at time 1.
    """

    def __init__(self, gamma_min: float, gamma_max: float) -> None:
        super().__init__()
        self.gamma_min, self.gamma_max = gamma_min, gamma_max

    def forward(self, t: Tensor) -> Tensor:
        """Gamma at times t in [0, 1], in the shape of t."""
        return self.gamma_min + (self.gamma_max - self.gamma_min) * t


class LearnedLinearSchedule(nn.Module):
    """A straight line whose start and slope are learned; the slope stays positive.

    Args:
        gamma_min: gamma at time 0 before training.
        gamma_max: gamma at time 1 before training.
    """

    def __init__(self, gamma_min: float, gamma_max: float) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.tensor(float(gamma_min)))
        self.log_slope = nn.Parameter(torch.tensor(float(gamma_max - gamma_min)).log())

    def forward(self, t: Tensor) -> Tensor:
        """Gamma at times t in [0, 1], in the shape of t."""
        return self.start + self.log_slope.exp() * t


class MonotonicSchedule(nn.Module):
    """A learned rising curve between two end points: a network whose weights are positive, scaled to end at them.

    One positive weight leads straight from t to gamma, others through a hidden layer of sigmoids (arXiv 2107.00630,
    appendix H). In continuous time the expected bound depends on the end points alone (equation 18 there); what is
    learned between them changes how much the estimate of the bound varies.

    Args:
        gamma_min: gamma at time 0.
        gamma_max: gamma at time 1.
        hidden_size: number of sigmoids.
    """

    def __init__(self, gamma_min: float, gamma_max: float, hidden_size: int = 64) -> None:
        super().__init__()
        self.gamma_min, self.gamma_max = gamma_min, gamma_max
        # the sigmoids' middles lie evenly between the ends, and so the curve begins as almost a straight line
        self.straight = nn.Parameter(torch.zeros(1))
        self.weight = nn.Parameter(torch.full((hidden_size,), 10.0))
        self.bias = nn.Parameter(-10 * torch.linspace(0, 1, hidden_size))
        self.out = nn.Parameter(torch.zeros(hidden_size))

    def _rise(self, t: Tensor) -> Tensor:
        hidden = torch.sigmoid(softplus(self.weight) * t[..., None] + self.bias)
        return softplus(self.straight) * t + (softplus(self.out) * hidden).mean(dim=-1)

    def forward(self, t: Tensor) -> Tensor:
        """Gamma at times t in [0, 1], in the shape of t."""
        first, last = self._rise(t.new_tensor([0.0, 1.0]))
        return self.gamma_min + (self.gamma_max - self.gamma_min) * (self._rise(t) - first) / (last - first)


def with_slope(schedule: nn.Module, t: Tensor) -> tuple[Tensor, Tensor]:
    """Gamma and its derivative by t, both in the shape of t; differentiable by the schedule's weights."""
    return torch.func.jvp(schedule, (t,), (torch.ones_like(t),))


SCHEDULES = {"linear": LinearSchedule, "learned_linear": LearnedLinearSchedule, "monotonic": MonotonicSchedule}
