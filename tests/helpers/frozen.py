"""Copies of nested values, and where two of them differ, bit by bit."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor


def frozen(value: Any) -> Any:
    """A copy of nested values that later steps leave alone; other objects by their attributes."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {k: frozen(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, deque)):
        return [type(value).__name__, *(frozen(v) for v in value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return [type(value).__name__, frozen(getattr(value, "__dict__", {}))]


def difference(right: Any, found: Any) -> str:
    """Where two frozen values first differ, or the empty string. A NaN equals itself."""
    if isinstance(right, Tensor) and isinstance(found, Tensor):
        if right.dtype != found.dtype or right.shape != found.shape:
            return f": {found.dtype} {list(found.shape)}, bare {right.dtype} {list(right.shape)}"
        if torch.equal(bits(right), bits(found)):
            return ""
        return f": values differ by up to {_distance(right, found):.1e}"
    if isinstance(right, dict) and isinstance(found, dict):
        if right.keys() != found.keys():
            return f": keys {sorted(map(str, found))}, bare {sorted(map(str, right))}"
        return _first((k, difference(right[k], found[k])) for k in right)
    if isinstance(right, list) and isinstance(found, list) and len(right) == len(found):
        return _first(enumerate(map(difference, right, found)))
    same = type(right) is type(found) and (right == found or (right != right and found != found))
    return "" if same else f": {found!r}, bare {right!r}"


def _first(differences: Any) -> str:
    return next((f"[{key!r}]{where}" for key, where in differences if where), "")


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor: -0.0 is not 0.0, and a NaN equals itself."""
    dense = tensor.detach().to_dense() if tensor.is_sparse else tensor.detach()
    # `contiguous()` would keep the stride of a single element, which `view` takes offence at.
    return dense.reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8)


def _distance(right: Tensor, found: Tensor) -> float:
    return float((right.double() - found.double()).abs().max()) if right.numel() else 0.0
