"""What this machine can run."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

__all__ = ["has_triton"]


@cache
def has_triton() -> bool:
    """Whether kernels can be made here. Triton comes with torch's CUDA builds."""
    return find_spec("triton") is not None
