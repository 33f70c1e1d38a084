"""What this machine can run, and where."""

from __future__ import annotations

from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any

import torch

__all__ = ["has_triton", "is_capturing", "on_device"]

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
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(device)
