"""Weights that are infinite because their 16 bits end before their FP32 masters do.

FP16 ends at 65504, BF16 at 3.39e38. A master beyond that rounds to inf, as in a cast of torch's,
and from then on what the weight multiplies is inf or NaN, and every step is skipped. Stopping at
the largest number instead would train on with another model than the masters' and say nothing. So
the weight is inf, and whoever finds one says its name and its master's number.

Nobody looks for one in a step that goes through: that would be one more reading of all weights.
They are looked at where steps fail, before the first step, and where somebody hands over masters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from mixprec.gradients import local
from mixprec.optimizer.fused.pending import Flag
from mixprec.optimizer.masters import LOW

__all__ = ["Look", "check_range", "infinite_weight"]


def infinite_weight(
    named: Iterable[tuple[Tensor, str]], master_of: Callable[[Tensor], Tensor]
) -> str:
    """Which 16-bit weight is infinite, what its master is, and what to do; empty if none is.

    Reads all 16-bit weights, and waits for their devices.

    >>> import torch
    >>> weight = torch.tensor([1.0, torch.inf], dtype=torch.float16)
    >>> infinite_weight([(weight, "scale")], lambda weight: torch.tensor([1.0, 7e4]))[:53]
    'scale is infinite in 1 of 2 elements: float16 ends at'
    """
    low = [(param, name) for param, name in named if _is_low(param)]
    if not low:
        return ""
    flags = [torch.isinf(local(param.detach())).any() for param, _ in low]
    found = torch.stack([flag.to(flags[0].device) for flag in flags]).tolist()
    names = [name for (_, name), flag in zip(low, found, strict=True) if flag]
    if not names:
        return ""
    param, name = low[found.index(True)]
    places = torch.isinf(local(param.detach()))
    master = float(local(master_of(param))[places].flatten()[0])
    others = len(names) - 1
    more = f", and {others} more tensor{'s' * (others > 1)} like it" if others else ""
    return (
        f"{name} is infinite in {int(places.sum())} of {param.numel()} elements{more}: "
        f"{_ends(param.dtype)} and the FP32 master of the first is {master:.6g}. What it "
        f"multiplies is inf or NaN, whatever the loss scale. Hold it in BF16 or FP32, or clamp it "
        f"inside of masters_in_model() and keep it small by a lower lr or by weight decay."
    )


class Look:
    """A look at the weights after a step that the device has skipped, for which nobody waits."""

    def __init__(self) -> None:
        self._flag: Flag | None = None

    def send(self, params: Iterable[Tensor]) -> None:
        """Have the host told whether a 16-bit weight is not finite."""
        low = [local(param.detach()) for param in params if _is_low(param)]
        if low:
            largest = [n.to(low[0].device) for n in torch._foreach_norm(low, torch.inf)]
            self._flag = Flag(torch.stack(largest).isfinite().all().logical_not())

    def found(self) -> bool:
        """What was found, once; false if nobody looked."""
        flag, self._flag = self._flag, None
        return flag is not None and flag.read()

    def __getstate__(self) -> dict[str, Any]:
        return {"_flag": None}  # an event is of this process


def check_range(targets: Iterable[tuple[str, Any]], given: Callable[[str], Tensor]) -> None:
    """Refuse finite numbers that would be infinite in the tensor that they are to be written to.

    Raises:
        ValueError: naming the first such entry and number.
    """
    for name, target in targets:
        if not isinstance(target, Tensor) or target.dtype not in LOW:
            continue
        value = local(given(name).detach())
        beyond = torch.isfinite(value) & torch.isinf(value.to(target.dtype))
        if bool(beyond.any()):
            number = float(value[beyond].flatten()[0])
            raise ValueError(
                f"{name!r} holds {number:.6g} in {int(beyond.sum())} of {value.numel()} elements "
                f"and {_ends(target.dtype)}, so the weight would be infinite; nothing was loaded. "
                f"Hold this parameter in BF16 or FP32, or clamp it in the state dict first."
            )


def _is_low(param: Tensor) -> bool:
    return param.dtype in LOW and bool(param.numel()) and param.device.type != "meta"


def _ends(dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')} ends at {torch.finfo(dtype).max:.6g}"
