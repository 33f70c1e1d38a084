"""Tests of Triton kernels: on a GPU, or on a CPU by Triton's interpreter (TRITON_INTERPRET=1)."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import pytest
import torch

__all__ = ["DEVICE", "INTERPRETED", "MARKS", "marked"]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

MARKS = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter, in lanes masked out
    pytest.mark.gpu,
    pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton"),
    pytest.mark.skipif(
        not INTERPRETED and not torch.cuda.is_available(),
        reason="needs a CUDA device or TRITON_INTERPRET=1",
    ),
]
"""As `pytestmark` of a module."""


def marked(test: Any) -> Any:
    """A single test with all of `MARKS`."""
    for mark in MARKS:
        test = mark(test)
    return test
