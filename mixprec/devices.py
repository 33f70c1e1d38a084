"""What this machine can run, and where."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

__all__ = ["has_triton", "is_capturing", "on_device", "to_host"]

_HERE = nullcontext()


_TRITON = find_spec("triton") is not None


def has_triton() -> bool:
    """Whether kernels can be made here. Triton comes with torch's CUDA builds."""
    return _TRITON


def is_capturing(device: torch.device) -> bool:
    """Whether what is launched on the device now goes into a CUDA graph instead."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def on_device(device: torch.device) -> Any:
    """A context to launch kernels in: Triton launches on the current device.

    To set that takes as long as to launch, so it is set only if it is another.
    """
    if torch.compiler.is_compiling():  # the compiler sets it around all that it makes
        return _HERE
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(device)


def to_host(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Copies on the host of vectors of one dtype, in their order. Waits once for each device.

    >>> to_host([torch.tensor([1, 2]), torch.tensor([3])])
    [tensor([1, 2]), tensor([3])]
    """
    tensors = list(tensors)
    by_device: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        by_device.setdefault(tensor.device, []).append(tensor)
    copies = {
        device: iter(torch.cat(same).cpu().split([len(tensor) for tensor in same]))
        for device, same in by_device.items()
    }
    return [next(copies[tensor.device]) for tensor in tensors]
