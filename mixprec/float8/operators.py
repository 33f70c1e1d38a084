"""Registering functions as operators that `torch.compile` leaves as they are.

`torch.library.custom_op` does it too, and checks at every call that no output shares memory with
another tensor. That takes longer than to launch three kernels (0.15 ms), so what it registers in
turn is registered here directly; tests make those checks once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["operator", "written"]

_library = torch.library.Library("mixprec", "FRAGMENT")


def operator(
    name: str, function: Callable[..., Any], fake: Callable[..., Any], mutates: Sequence[str]
) -> Callable[..., Any]:
    """`torch.ops.mixprec.<name>`: `function` on every device, without autograd.

    Args:
        fake: returns empty tensors of the right kind for the same arguments.
        mutates: names of the arguments that `function` writes to; it returns none of them.
    """
    schema = torch.library.infer_schema(function, mutates_args=mutates)
    _library.define(name + schema)
    _library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mixprec::{name}", fake, lib=_library)
    registered: Callable[..., Any] = getattr(torch.ops.mixprec, name).default
    return registered


def written(x: Tensor) -> Tensor:
    """`x` for a kernel that compiled code launches: in memory before the kernel's outputs are.

    Left alone, the compiler computes `x` once more for each kernel that reads it, after it has
    allocated what that kernel writes: more traffic, and a higher peak.
    """
    return _mark(x)


def _copy(x: Tensor) -> Tensor:
    return x.clone()


def _traced(x: Tensor) -> Tensor:
    _tell_compiler()
    return torch.empty_like(x)


@cache
def _tell_compiler() -> None:
    """That `_mark` needs no copy. The way to say so is private; without it, there is a copy."""
    try:
        from torch._inductor.lowering import register_lowering
    except ImportError:
        return

    @register_lowering(_mark, type_promotion_kind=None)
    def _(x: Any) -> Any:
        x.realize()
        return x


_mark = operator("float8_written", _copy, _traced, mutates=())
