"""The optimizer inside of a trainer's wrapper.

Accelerate and Lightning hand out optimizers wrapped in classes of their own, whose `step` takes no
factor and may do nothing (while they accumulate themselves). What a wrapper adds is for the
trainer's own loop. Other wrappers (Lookahead) are part of the rule, and are not opened.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

from mixprec.plain_optimizer import is_mixed_precision

__all__ = ["inside_of"]

_LOW = (torch.bfloat16, torch.float16)

_TRAINERS = ("accelerate", "lightning", "lightning_fabric", "pytorch_lightning")


def inside_of(optimizer: Any) -> Any:
    """What a trainer has wrapped; `optimizer` itself if none has.

    Raises:
        TypeError: for any other wrapper around a MixedPrecision, which would not pass a factor on.
    """
    inner = _held_by(optimizer)
    if inner is None:
        return optimizer
    if any(base.__module__.split(".")[0] in _TRAINERS for base in type(optimizer).__mro__):
        return inside_of(inner)
    while inner is not None:
        if is_mixed_precision(inner) and _needs_factors(inner):
            kind = type(optimizer).__name__
            raise TypeError(
                f"{kind} wraps a MixedPrecision, and its step() would not pass the token count on "
                f"to it. Give the accumulator the MixedPrecision itself, or put {kind} inside, "
                f"mixprec.MixedPrecision({kind}(...)), where it becomes part of the rule."
            )
        inner = _held_by(inner)
    return optimizer


def _needs_factors(optimizer: Any) -> bool:
    """Whether gradients cannot be multiplied before it steps."""
    params = (param for group in optimizer.param_groups for param in group["params"])
    return optimizer.loss_scaler is not None or any(p.dtype in _LOW for p in params)


def _held_by(optimizer: Any) -> Any:
    found = (getattr(optimizer, name, None) for name in ("_optimizer", "optimizer"))
    return next((o for o in found if isinstance(o, Optimizer) and o is not optimizer), None)
