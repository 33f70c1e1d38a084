"""The modes of torch that a caller is in, taken off for a step and given back to his own code.

A rule is written for a process as it starts: products in FP32, new tensors in FP32, on the CPU
unless it says otherwise. A step inside `torch.autocast` would take its products in 16 bits
(Adafactor's, Shampoo's), a default dtype of 16 bits would make its counters stand still at 256, and
states made in inference mode could never be updated outside of it. So whatever runs a rule, really
or for a trial, does so in `plain_modes`, and closures go on in the modes of whoever called `step`.

FP64 as the default dtype stays: it costs no digits, and rules look at it on purpose.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, TypeVar

import torch

__all__ = ["plain_modes", "run_in_plain_modes"]

T = TypeVar("T")

_AUTOCAST = ("cpu", "cuda", "xpu", "mps")

_WIDE = (torch.float32, torch.float64)


class _Modes(NamedTuple):
    """What `plain_modes` takes off; the values are those to go back to."""

    autocast: dict[str, torch.dtype]
    cache: bool
    dtype: torch.dtype
    device: torch.device
    inference: bool


def _modes() -> _Modes | None:
    """The modes that are on, or None in a process as it starts. Takes 2 microseconds."""
    on = [kind for kind in _AUTOCAST if torch.is_autocast_enabled(kind)]
    dtype, inference = torch.get_default_dtype(), torch.is_inference_mode_enabled()
    device = torch.empty(0).device  # get_default_device() takes five times as long
    if not on and dtype in _WIDE and device.type == "cpu" and not inference:
        return None
    autocast = {kind: torch.get_autocast_dtype(kind) for kind in on}
    cache = torch.is_autocast_cache_enabled()
    return _Modes(autocast, cache, dtype, device, inference)


@contextmanager
def plain_modes() -> Generator[_Modes | None]:
    """A process as it starts, whatever is around; gives the modes that it took off."""
    modes = _modes()
    if modes is None:
        yield None
        return
    with ExitStack() as stack:
        for kind in modes.autocast:
            stack.enter_context(torch.autocast(kind, enabled=False))
        if modes.dtype not in _WIDE:
            stack.enter_context(_default_dtype(torch.float32))
        if modes.device.type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if modes.inference:
            stack.enter_context(torch.inference_mode(False))
        yield modes


@contextmanager
def _entered(modes: _Modes) -> Generator[None]:
    with ExitStack() as stack:
        for kind, dtype in modes.autocast.items():
            stack.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=modes.cache))
        if modes.dtype not in _WIDE:
            stack.enter_context(_default_dtype(modes.dtype))
        if modes.device.type != "cpu":
            stack.enter_context(modes.device)
        if modes.inference:
            stack.enter_context(torch.inference_mode())
        yield


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Generator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@torch._disable_dynamo
def run_in_plain_modes(
    step: Callable[..., T], closure: Callable[[], Any] | None, *arguments: Any
) -> T:
    """`step(closure, *arguments)` in plain modes, the closure in those of the caller.

    Autocast keeps the 16-bit copies of FP32 weights that it has made until its outermost region
    ends. The step has moved the weights, so these copies are dropped.
    """
    with plain_modes() as modes:
        if modes is None:
            return step(closure, *arguments)
        try:
            return step(None if closure is None else _InModes(closure, modes), *arguments)
        finally:
            if modes.autocast:
                torch.clear_autocast_cache()


class _InModes:
    """A closure that runs in the modes of whoever made it."""

    def __init__(self, closure: Callable[[], Any], modes: _Modes) -> None:
        self._closure, self._modes = closure, modes

    def __call__(self) -> Any:
        with _entered(self._modes):
            return self._closure()
