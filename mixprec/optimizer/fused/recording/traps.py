"""What a rule may be handed and must not look at, because a program cannot follow it."""

from __future__ import annotations

from typing import Any, NoReturn

from mixprec.optimizer.fused.program.program import NotFusible

__all__ = ["Untouchable"]


class Untouchable:
    """Stands for a value that a probe does not have. Any use raises NotFusible.

    A rule may catch what is raised; `touched` says that it was.

    >>> loss = Untouchable("it uses the loss")
    >>> loss is None, touched(loss)
    (False, False)
    >>> loss * 2
    Traceback (most recent call last):
    mixprec.optimizer.fused.program.program.NotFusible: it uses the loss
    >>> touched(loss)
    True
    """

    def __init__(self, reason: str) -> None:
        object.__setattr__(self, "_state", [reason, False])

    def __getattribute__(self, name: str) -> Any:
        if name == "__class__":
            return Untouchable
        _raise(self)


def touched(value: Untouchable) -> bool:
    """Whether anything was done with it."""
    return object.__getattribute__(value, "_state")[1]


def _raise(self: Any, *_arguments: object) -> NoReturn:
    state: list[Any] = object.__getattribute__(self, "_state")
    state[1] = True
    raise NotFusible(state[0])


_USES = (
    "bool float int index complex iter next len getitem setitem delitem contains call hash str "
    "repr format bytes eq ne lt le gt ge neg pos abs invert round trunc floor ceil enter exit "
    "add sub mul truediv floordiv mod divmod pow matmul and or xor lshift rshift radd rsub rmul "
    "rtruediv rfloordiv rmod rdivmod rpow rmatmul rand ror rxor rlshift rrshift iadd isub imul "
    "itruediv ifloordiv imod ipow imatmul setattr delattr reversed array"
).split()

for _name in _USES:
    setattr(Untouchable, f"__{_name}__", _raise)
