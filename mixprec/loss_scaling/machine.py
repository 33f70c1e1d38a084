"""The machine that moves a loss scale: settings, state, verdict, and where one leads from another.

Its states and transitions stand at the head of `loss_scaling`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["ScalePolicy", "ScaleState", "ScaleVerdict", "check_power_of_two"]

# So that S and 1/S are both normal FP32 numbers: multiplying by a subnormal one would round.
_SMALLEST_SCALE, _LARGEST_SCALE = 2.0**-126, 2.0**126


class ScaleState(NamedTuple):
    loss_scale: Tensor
    growth_tracker: Tensor
    overflows_in_a_row: Tensor
    scale_before_overflows: Tensor

    @classmethod
    def of(cls, loss_scale: float, growth: int, overflows: int, before: float) -> ScaleState:
        return cls(
            torch.tensor(loss_scale, dtype=torch.float32),
            torch.tensor(growth, dtype=torch.int32),
            torch.tensor(overflows, dtype=torch.int32),
            torch.tensor(before, dtype=torch.float32),
        )

    def to(self, device: torch.device) -> ScaleState:
        return ScaleState(*(tensor.to(device) for tensor in self))


class ScaleVerdict(NamedTuple):
    grads_finite: Tensor
    counted: Tensor


@dataclass(frozen=True)
class ScalePolicy:
    """Settings, and the machine that they make, as a function from state to state."""

    growth_factor: float
    backoff_factor: float
    growth_interval: int
    hysteresis: int
    min_scale: float
    max_scale: float
    max_skips_in_a_row: int

    def __post_init__(self) -> None:
        for name in ("growth_factor", "backoff_factor", "min_scale", "max_scale"):
            check_power_of_two(name, getattr(self, name))
        if not self.backoff_factor < 1 < self.growth_factor:
            raise ValueError(
                f"growth_factor is {self.growth_factor} and backoff_factor {self.backoff_factor}; "
                f"the first must be above 1 and the second below, such as 2.0 and 0.5"
            )
        if self.min_scale > self.max_scale:
            raise ValueError(f"min_scale {self.min_scale} is above max_scale {self.max_scale}")
        for name in ("growth_interval", "hysteresis", "max_skips_in_a_row"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; it counts steps: give an int from 1 up")

    def check_scale(self, name: str, value: float) -> None:
        check_power_of_two(name, value)
        if not self.min_scale <= value <= self.max_scale:
            raise ValueError(
                f"{name} is {value}, outside the bounds [{self.min_scale}, {self.max_scale}]; "
                f"build the scaler with min_scale={min(value, self.min_scale)}, "
                f"max_scale={max(value, self.max_scale)}"
            )

    def move(self, state: ScaleState, verdict: ScaleVerdict) -> ScaleState:
        finite, counted = verdict
        growth_tracker = (state.growth_tracker + 1) * finite
        overflows = (state.overflows_in_a_row + 1) * ~finite
        grows, backs_off = growth_tracker >= self.growth_interval, overflows >= self.hysteresis
        larger = (state.loss_scale * self.growth_factor).clamp(max=self.max_scale)
        smaller = (state.loss_scale * self.backoff_factor).clamp(min=self.min_scale)
        loss_scale = torch.where(grows, larger, torch.where(backs_off, smaller, state.loss_scale))
        before = torch.where(finite, loss_scale, state.scale_before_overflows)
        moved = (loss_scale, growth_tracker * ~grows, overflows, before)
        kept = zip(moved, state, strict=True)
        return ScaleState(*(torch.where(counted, new, old) for new, old in kept))


def check_power_of_two(name: str, value: Any) -> None:
    inside = isinstance(value, int | float) and _SMALLEST_SCALE <= value <= _LARGEST_SCALE
    if not inside or math.frexp(value)[0] != 0.5:
        near = f", such as {2.0 ** round(math.log2(value))}" if inside else ""
        raise ValueError(
            f"{name} is {value!r}; it must be a power of two from 2^-126 to 2^126{near}, "
            f"because any other factor rounds every gradient that it multiplies"
        )
