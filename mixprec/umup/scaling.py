"""Multipliers of one direction: forward only, or backward only.

Unit scaling puts constants into a network so that activations, weights and gradients all have RMS 1
before training. An operation may use different constants for its output and for the gradient of an
input only where that input is reached through this edge alone (a cut edge): then its gradient is
off by one constant factor, which the learning rate absorbs. Weights, biases, the readout and the
loss are cut edges. Inside a residual branch nothing is, because the skip path carries the true
gradient beside it; there all constants of an operation are made equal by a constraint.

Source: Blake et al. 2023, arXiv:2303.11257, section 3; Blake et al. 2024, arXiv:2407.17465.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor
from torch.autograd.function import Function

from mixprec.autograd import call

__all__ = ["CONSTRAINTS", "Constraint", "constrain", "interpolate", "scale_bwd", "scale_fwd"]

Constraint = Literal[
    "to_output_scale",
    "to_grad_input_scale",
    "to_left_grad_scale",
    "to_right_grad_scale",
    "gmean",
    "hmean",
    "amean",
]


def scale_fwd(x: Tensor, multiplier: float | Tensor) -> Tensor:
    """`multiplier * x`, whose gradient passes as if there were no multiplier.

    Any shape and floating dtype; the product is rounded once. The multiplier may be a 0-d tensor,
    which gets no gradient. Nothing is saved for the backward pass.

    >>> import torch
    >>> from mixprec import umup
    >>> x = torch.ones(2, requires_grad=True)
    >>> y = umup.scale_fwd(x, 3.0)
    >>> y.sum().backward()
    >>> y.tolist(), x.grad.tolist()
    ([3.0, 3.0], [1.0, 1.0])
    """
    return _apply(_ScaleForward, x, multiplier)


def scale_bwd(x: Tensor, multiplier: float) -> Tensor:
    """`x` itself, as a view, whose gradient is multiplied by `multiplier`.

    >>> import torch
    >>> from mixprec import umup
    >>> x = torch.ones(2, requires_grad=True)
    >>> y = umup.scale_bwd(x, 3.0)
    >>> y.sum().backward()
    >>> y.tolist(), x.grad.tolist()
    ([1.0, 1.0], [3.0, 3.0])
    """
    return _apply(_ScaleBackward, x, multiplier)


def _apply(function: type[Function], x: Tensor, multiplier: float | Tensor) -> Tensor:
    if not x.is_floating_point():
        raise TypeError(
            f"x is {x.dtype}, which has no gradient to scale; give it a floating-point tensor"
        )
    if type(multiplier) in (int, float) and multiplier == 1:  # a symbolic one stays unread
        return x
    scaled: Tensor = call(function, x, multiplier)
    return scaled


class _ScaleForward(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, multiplier: float | Tensor) -> Tensor:
        return x * multiplier

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _ScaleBackward(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, multiplier: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.multiplier = inputs[1]  # a number, so that compiled graphs hold it as a constant

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.multiplier, None


# ------------------------------------------------------------------ constraints


def _gmean(*multipliers: float) -> float:
    return math.prod(multipliers) ** (1 / len(multipliers))


def _hmean(*multipliers: float) -> float:
    return len(multipliers) / sum(1 / m for m in multipliers)


def _amean(*multipliers: float) -> float:
    return sum(multipliers) / len(multipliers)


def _item(index: int) -> Callable[..., float]:
    return lambda *multipliers: multipliers[index]


CONSTRAINTS: dict[str, Callable[..., float]] = {
    "to_output_scale": _item(0),
    "to_grad_input_scale": _item(1),
    "to_left_grad_scale": _item(1),
    "to_right_grad_scale": _item(2),
    "gmean": _gmean,
    "hmean": _hmean,
    "amean": _amean,
}
"""What each constraint makes of (output, gradient of input, ...): one number for all of them."""

_NUMBER = {"to_grad_input_scale": 2, "to_left_grad_scale": 3, "to_right_grad_scale": 3}


def constrain(constraint: Constraint | None, *multipliers: float) -> tuple[float, ...]:
    """The multipliers (output, gradient of input, ...) that `constraint` allows.

    None leaves them independent, which is right on cut edges alone; every constraint replaces all
    of them by one number.

    Raises:
        ValueError: for an unknown constraint, or one for another number of inputs.

    >>> from mixprec.umup.scaling import constrain
    >>> constrain("gmean", 0.25, 1.0), constrain(None, 0.25, 1.0)
    ((0.5, 0.5), (0.25, 1.0))
    """
    if constraint is None:
        return multipliers
    if constraint not in CONSTRAINTS:
        raise ValueError(
            f"constraint={constraint!r}; use one of {', '.join(map(repr, CONSTRAINTS))}, or None "
            f"on a cut edge"
        )
    if _NUMBER.get(constraint, len(multipliers)) != len(multipliers):
        raise ValueError(
            f"constraint={constraint!r} is for an operation with {_NUMBER[constraint] - 1} "
            f"inputs, and this one has {len(multipliers) - 1}; use 'to_output_scale' or 'gmean'"
        )
    return (CONSTRAINTS[constraint](*multipliers),) * len(multipliers)


def interpolate(place: float, low: float, high: float) -> float:
    """From `low` at 0 to `high` at 1, evenly in the logarithm.

    >>> from mixprec.umup.scaling import interpolate
    >>> round(interpolate(0.5, 0.01, 1.0), 3)
    0.1
    """
    return math.exp(place * math.log(high) + (1 - place) * math.log(low))
