"""Power-of-two exponents that follow the data, moved only between two optimizer steps.

Scaling by an exponent buys range, not precision: E4M3 keeps 31 dB of a Gaussian tensor whose RMS is
anywhere between 2^-5 and 2^7. So an exponent need not follow each tensor. It stays where it is
until the casts of a whole step have lost something, and moves then to

    2^k,    k = top - 1 - b,    2^(b-1) <= amax < 2^b,    2^top <= format.max < 2^(top+1)

which puts the largest value seen one to two binades below the largest that fits:

- saturated values, more than 1e-5 of all: the exponent falls at once;
- flushed values, more than 1e-2 of all, with range left above: it rises at once;
- the largest value below 1/16 of the range for 16 steps in a row: it rises then.

All of it is arithmetic on the device, for all operands of a step at once: nothing is read by the
host, and a step that is skipped for an overflow changes nothing, because it saw a non-finite value.

A step ends when any `torch.optim.Optimizer` has stepped: torch calls a hook for each.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from mixprec.devices import to_host
from mixprec.float8.casts.counters import AMAX_BITS, FLUSHED, SATURATED, SEEN
from mixprec.float8.recipe import MAX_EXPONENT, Cast
from mixprec.formats import Format

__all__ = [
    "end_step",
    "exponents_of",
    "fitting_exponent",
    "follow",
    "follow_weight",
    "read_exponents",
    "scale_for",
]

MOST_SATURATED = 1e-5
MOST_FLUSHED = 1e-2
SLACK = 4
"""Binades unused above the largest value, beyond the one or two that are always left."""
PATIENCE = 16
"""Steps that slack alone may last."""

_INF_BITS = 0x7F800000


@cache
def top_of(format: Format) -> int:
    """The exponent of the format's largest value: 8 for E4M3's 448, 15 for E5M2's 57344."""
    return int(torch.tensor(format.max).frexp().exponent) - 1


def fitting_exponent(amax: Tensor, top: Tensor | int) -> Tensor:
    """The exponent, int32, that puts `amax` between `2^(top-2)` and `2^(top-1)`.

    >>> import torch
    >>> fitting_exponent(torch.tensor([1.0, 0.02, 300.0]), 8)  # * 2^k: 64, 81.9, 75
    tensor([ 6, 12, -2], dtype=torch.int32)
    """
    return (top - 1 - torch.frexp(amax).exponent).clamp(-MAX_EXPONENT, MAX_EXPONENT).int()


def scale_for(amax: Tensor, format: Format) -> Tensor:
    """`[2^k, 2^-k]` for a tensor whose largest value is `amax`; k = 0 if that is 0, inf or NaN."""
    informed = (amax > 0) & amax.isfinite()
    exponent = fitting_exponent(torch.where(informed, amax, 1.0), top_of(format))
    return _scales(torch.where(informed, exponent, 0))


def _scales(exponent: Tensor) -> Tensor:
    """Multipliers and inverses along a new last axis, from the bits of an FP32: exact."""
    return (torch.stack([exponent, -exponent], -1) + 127 << 23).view(torch.float32)


def exponents_of(scales: Tensor) -> Tensor:
    """The exponents of multipliers that `_scales` made."""
    return (scales[..., 0].view(torch.int32) >> 23) - 127


def read_exponents(operands: Iterable[Scaled]) -> list[int]:
    """Their exponents, on the host, which waits once for each device."""
    scales = to_host(operand.scale for operand in operands)
    return exponents_of(torch.stack(scales)).tolist() if scales else []


def moved(
    exponent: Tensor, slack_steps: Tensor, counters: Tensor, top: Tensor
) -> tuple[Tensor, Tensor]:
    """New exponents and steps of slack of n operands, from what the casts of a step counted.

    Args:
        exponent, top: int32 `[n]`.
        slack_steps: int32 `[n]`.
        counters: int64 `[n, 8]`, see `cast_scaled`.
    """
    bits = counters[:, AMAX_BITS].int()
    informed = (bits > 0) & (bits < _INF_BITS)
    amax = torch.where(informed, bits.view(torch.float32), 1.0)
    target = fitting_exponent(amax, top)
    seen = counters[:, SEEN]
    saturates = counters[:, SATURATED] > MOST_SATURATED * seen
    flushes = (counters[:, FLUSHED] > MOST_FLUSHED * seen) & (target > exponent)
    waited = torch.where(target - exponent >= SLACK, slack_steps + 1, 0)
    moves = informed & (saturates | flushes | (waited >= PATIENCE))
    waited = torch.where(informed, waited.masked_fill(moves, 0), slack_steps)
    return torch.where(moves, target, exponent), waited


# ------------------------------------------------------------------ the end of a step


class Scaled(Protocol):
    """What the end of a step needs to know of an operand, see `Operand`."""

    cast: Cast
    scale: Tensor
    counters: Tensor
    last: Tensor
    slack_steps: Tensor
    fitted: bool
    settled: bool

    def __hash__(self) -> int: ...


class MadeOf(Protocol):
    """What was computed from a parameter and is worth keeping while that stays."""

    def forget_if_of(self, identities: set[int]) -> None: ...

    def __hash__(self) -> int: ...


_operands: weakref.WeakSet[Scaled] = weakref.WeakSet()
_weights: weakref.WeakSet[MadeOf] = weakref.WeakSet()


def follow(operand: Scaled) -> None:
    """Call `end_step` with `operand` after every optimizer step, for as long as it lives."""
    _listen()
    _operands.add(operand)


def follow_weight(weight: MadeOf) -> None:
    """Have `weight` cast anew after each step of an optimizer that has it."""
    _listen()
    _weights.add(weight)


@cache
def _listen() -> None:
    register_optimizer_step_post_hook(_after_step)


@torch._disable_dynamo  # a caller may compile his step
def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if not _operands:  # no layer of this process is left
        return
    stepped = {id(param) for group in optimizer.param_groups for param in group["params"]}
    for weight in list(_weights):
        weight.forget_if_of(stepped)
    end_step(list(_operands))


@torch.no_grad()
def end_step(operands: Sequence[Scaled]) -> None:
    """Move exponents by what was counted since the last step, and begin to count anew."""
    by_device: dict[torch.device, list[Scaled]] = {}
    for operand in operands:
        by_device.setdefault(operand.scale.device, []).append(operand)
    for same in by_device.values():
        for operand in same:
            operand.settled |= operand.fitted
        adaptive = [operand for operand in same if operand.cast.scaling == "adaptive"]
        if adaptive:
            _move(adaptive)
        _begin_anew(same)


def _move(operands: list[Scaled]) -> None:
    top = _tops(operands[0].scale.device, tuple(operand.cast.format for operand in operands))
    exponent, slack_steps = moved(
        exponents_of(torch.stack([operand.scale for operand in operands])),
        torch.stack([operand.slack_steps for operand in operands]),
        torch.stack([operand.counters for operand in operands]),
        top,
    )
    torch._foreach_copy_([operand.scale for operand in operands], list(_scales(exponent)))
    torch._foreach_copy_([operand.slack_steps for operand in operands], list(slack_steps))


@cache
def _tops(device: torch.device, formats: tuple[Format, ...]) -> Tensor:
    return torch.tensor([top_of(format) for format in formats], dtype=torch.int32, device=device)


def _begin_anew(operands: list[Scaled]) -> None:
    counters = torch.stack([operand.counters for operand in operands])
    last = torch.stack([operand.last for operand in operands])
    last = torch.where(counters[:, SEEN, None] > 0, counters, last)
    torch._foreach_copy_([operand.last for operand in operands], list(last))
    torch._foreach_zero_([operand.counters for operand in operands])
