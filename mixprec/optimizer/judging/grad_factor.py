"""The number that a caller multiplies all gradients by: what may be given, and what was wrong.

    multiplier = grad_factor / loss_scale * clip coefficient

Any of the three may be no number that a gradient can be multiplied by: P / T without tokens is an
infinity or a NaN, a loss scale of GradScaler's may have run to 0 or infinity, and their product may
leave FP32. `verdict.judge` looks at the multiplier together with the norm, wherever it lies, and a
step with one that is not above 0 and finite is skipped. What no number can be, and what the host
sees to be negative, is refused here, at the edge.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from mixprec.gradients import is_dtensor

__all__ = ["checked", "complaint", "on"]

_WIDE = (torch.float32, torch.float64)


def checked(grad_factor: Any) -> Tensor | float | None:
    """`grad_factor` as a float or a detached 0-d tensor. A tensor on a device is not read.

    Raises:
        TypeError: for what is no real number, and for tensors of 16 bits.
        ValueError: for a tensor of several numbers or without values, and for a negative number.
    """
    if grad_factor is None:
        return None
    if isinstance(grad_factor, Tensor):
        _check_tensor(grad_factor)
        grad_factor = grad_factor.detach().reshape(())
        if grad_factor.device.type == "cpu":
            _check_sign(float(grad_factor))
        return grad_factor
    if isinstance(grad_factor, bool) or not isinstance(grad_factor, Real):
        raise TypeError(
            f"grad_factor is {grad_factor!r}, a {type(grad_factor).__name__}; it multiplies all "
            f"gradients: give a number or a 0-d tensor, such as presumed_tokens / num_tokens."
        )
    try:
        value = float(grad_factor)
    except OverflowError:
        value = math.inf
    _check_sign(value)
    return value


def _check_tensor(grad_factor: Tensor) -> None:
    if is_dtensor(grad_factor):
        raise TypeError(
            "grad_factor is a DTensor, and every rank has to multiply by the same number: give "
            "grad_factor.full_tensor()."
        )
    dtype = grad_factor.dtype
    if dtype == torch.bool or dtype.is_complex or (dtype.is_floating_point and dtype not in _WIDE):
        why = "keeps two or three digits of it" if dtype.is_floating_point else "is no real number"
        raise TypeError(
            f"grad_factor is a tensor of {dtype}, which {why}, and every gradient is multiplied by "
            f"it: compute it in FP32 or FP64, such as presumed_tokens / num_tokens.double()."
        )
    if grad_factor.numel() != 1:
        raise ValueError(
            f"grad_factor has shape {list(grad_factor.shape)}; one number multiplies all "
            f"gradients: give a 0-d tensor."
        )
    if grad_factor.is_meta:
        raise ValueError("grad_factor is on the meta device and has no value.")


def _check_sign(value: float) -> None:
    if value < 0:
        raise ValueError(
            f"grad_factor is {value}; below 0 the step would climb. Give its size, and "
            f"maximize=True to the optimizer if climbing is meant."
        )


def on(device: torch.device, grad_factor: Tensor | float) -> Tensor:
    """A checked factor, 0-d on `device`: a number by a fill, which does not wait, not by a copy."""
    if isinstance(grad_factor, Tensor):
        # A copy to the host has to be waited for, else its first reader finds old memory.
        return grad_factor.to(device, non_blocking=device.type != "cpu")
    wide = torch.float32 if device.type == "mps" else torch.float64
    if wide == torch.float32 and grad_factor > torch.finfo(wide).max:
        grad_factor = math.inf  # torch refuses to narrow it
    return torch.full((), grad_factor, dtype=wide, device=device)


def complaint(grad_factor: Tensor | float | None, inverse: Tensor | None) -> str:
    """What is wrong with a multiplier that was not usable. Reads the device.

    Args:
        grad_factor: as it was given to the step.
        inverse: 1 / loss_scale, or None without one.
    """
    given = None if grad_factor is None else float(grad_factor)
    if given is not None and not math.isfinite(given):
        return (
            f"grad_factor is {given}: a window of 0 tokens gives P / 0. Give grad_factor=0.0 for a "
            f"window without tokens, which leaves everything as it is, or let "
            f"mixprec.GradientAccumulator count"
        )
    if given is not None and given < 0:
        return f"grad_factor is {given}, and below 0 the step would climb"
    unscale = None if inverse is None else float(inverse)
    if unscale is not None and not 0.0 < unscale < math.inf:
        scale = math.inf if unscale == 0.0 else 1 / unscale
        return (
            f"the loss scale is {scale}, and gradients cannot be divided by it. "
            f"mixprec.DynamicLossScaler keeps its own within bounds"
        )
    parts = [f"grad_factor {given}"] if given is not None else []
    parts += [f"1/loss_scale {unscale}"] if unscale is not None else []
    return f"gradients times {' times '.join(parts)} leave the range of FP32"
