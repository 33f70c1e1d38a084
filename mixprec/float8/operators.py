"""Registering functions as operators that `torch.compile` leaves as they are.

`torch.library.custom_op` does it too, and checks at every call that no output shares memory with
another tensor. That takes longer than to launch three kernels (0.15 ms), so what it registers in
turn is registered here directly; tests make those checks once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = ["operator"]

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
