"""Calls under modes of torch that are off afterwards, wherever the call is stopped.

A mode that stayed on would answer for every operation of the process from then on. Where a `with`
block is stopped at the line that ends it, nobody leaves its context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TypeAlias, TypeVar

from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

__all__ = ["run_under"]

T = TypeVar("T")

Mode: TypeAlias = TorchDispatchMode | TorchFunctionMode


def run_under(modes: Sequence[Mode], call: Callable[[], T]) -> T:
    """What `call` returns with these modes on, the last one on top.

    >>> import torch
    >>> class Stops(TorchFunctionMode):
    ...     def __torch_function__(self, func, types, args=(), kwargs=None):
    ...         raise KeyboardInterrupt
    >>> try:
    ...     run_under([Stops()], lambda: torch.ones(2))
    ... except KeyboardInterrupt:
    ...     torch.ones(2)
    tensor([1., 1.])
    """
    try:
        try:
            with ExitStack() as stack:
                for mode in modes:
                    stack.enter_context(mode)
                return call()
        finally:
            _leave(modes)
    finally:
        _leave(modes)  # the other may have been stopped


def _leave(modes: Sequence[Mode]) -> None:
    for mode in reversed(modes):
        on = (*_get_current_dispatch_mode_stack(), *_get_current_function_mode_stack())
        if any(one is mode for one in on):
            mode.__exit__(None, None, None)
