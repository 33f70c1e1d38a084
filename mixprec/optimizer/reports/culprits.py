"""Which tensors a verdict was about that the host hears of when their gradients are gone.

Whoever judges gradients on a device has a norm for each part of them on the way to the norm of all.
A part whose gradient was not finite has no finite norm. These numbers stay where they are until the
next verdict, which costs nothing, and are read only to write an error or a warning.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from mixprec.parameters import Groups, names_of

__all__ = ["Culprits", "owners_of_nonfinite"]


def owners_of_nonfinite(parts: Tensor, owners: Sequence[int] | Tensor) -> list[int]:
    """The tensors, in order, that have a part whose number is not finite.

    Args:
        parts: `[parts]`, a norm or a sum of squares of each part. Read by the host.
        owners: `[parts]`, the tensor that each part belongs to.

    >>> inf = float("inf")
    >>> owners_of_nonfinite(torch.tensor([1.0, inf, inf, 2.0, float("nan")]), [0, 1, 1, 2, 3])
    [1, 3]
    """
    bad = torch.isfinite(parts).logical_not().tolist()
    found = (int(owner) for owner, is_bad in zip(owners, bad, strict=True) if is_bad)
    return list(dict.fromkeys(found))


class Culprits:
    """What the last verdict of a device was about. Keeps no gradient and no parameter alive."""

    def __init__(self) -> None:
        self._params: list[Any] = []
        self._kind: object = None
        self._parts: Tensor | None = None
        self._owners: Sequence[int] | Tensor = ()

    def note(
        self,
        grads: Sequence[Tensor],
        kind: object,
        params: Iterable[Tensor],
        parts: Tensor,
        owners: Sequence[int] | Tensor,
    ) -> None:
        """Remember where a verdict lies.

        `kind` stands for who has which gradient, see `Members`; where it is the one that was given
        last, nobody looks at `params` again.
        """
        if kind is None or kind is not self._kind:
            holders = {id(param.grad): ref(param) for param in params if param.grad is not None}
            self._params = [holders.get(id(grad)) for grad in grads]
            self._kind = kind
        self._parts, self._owners = parts, owners

    def forget(self) -> None:
        """There was a verdict that the host has."""
        self._parts = None

    def names(self, groups: Groups, limit: int = 3) -> list[str]:
        """The first names of tensors that were not finite. Reads the device."""
        if self._parts is None:
            return []
        owners = owners_of_nonfinite(self._parts, self._owners)
        found = [self._params[owner] for owner in owners[:limit]]
        names = {id(param): name for param, name in names_of(groups)}
        here = [None if weak is None else weak() for weak in found]
        return [names[id(param)] for param in here if param is not None and id(param) in names]

    def __reduce__(self) -> tuple[type[Culprits], tuple[()]]:
        return Culprits, ()  # a copy has not judged anything yet
