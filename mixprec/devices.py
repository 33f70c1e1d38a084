"""What this machine can run, and where."""

from __future__ import annotations

from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

__all__ = ["has_triton", "on_device_of"]

_HERE = nullcontext()


_TRITON = find_spec("triton") is not None


def has_triton() -> bool:
    """Whether kernels can be made here. Triton comes with torch's CUDA builds."""
    return _TRITON


def on_device_of(x: Tensor) -> Any:
    """A context to launch kernels on `x`, as Triton does on the current device.

    To set that takes as long as to launch, so it is set only if it is another.
    """
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device_of(x)
