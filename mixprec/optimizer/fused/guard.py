"""Whether tensors still look as they did: type, dtype, device, shape and strides, each of them.

What is made for thousands of tensors (tables of addresses, layouts) holds for as long as they look
the same, and that has to be asked at every step. torch.compile asks the same before it runs what it
has compiled, by a check in C++ that takes 0.05 us a tensor; an attribute read in Python takes as
long, and it takes five of them. Where a version of torch has no such check, Python asks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Guard"]


class Guard:
    """How these tensors look; keeps none of them alive.

    >>> import torch
    >>> guard = Guard([torch.zeros(2, 3)])
    >>> guard.holds([torch.ones(2, 3)]), guard.holds([torch.ones(3, 2).T]), guard.holds([None])
    (True, False, False)
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._number = len(tensors)
        self._check = _compiled(tensors) if tensors else None
        self._looks = list(map(_look, tensors)) if self._check is None else []

    def holds(self, tensors: Sequence[Any]) -> bool:
        """Whether as many tensors look the same, one by one. Some may be None."""
        if len(tensors) != self._number:
            return False
        if self._check is None:
            return list(map(_look, tensors)) == self._looks
        return self._check(*tensors)


def _compiled(tensors: Sequence[Tensor]) -> Callable[..., bool] | None:
    """Torch's own check, if there is one that takes what it takes today."""
    guards: Any = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
    shapes, strides = [list(t.shape) for t in tensors], [list(t.stride()) for t in tensors]
    try:
        made = guards.TensorGuards(
            *tensors, dynamic_dims_sizes=shapes, dynamic_dims_strides=strides
        )
        return made.check if made.check(*tensors) else None
    except Exception:
        return None


def _look(tensor: Any) -> Any:
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
        return None
    return type(tensor), tensor.dtype, tensor.device, tensor.shape, tensor.stride()
