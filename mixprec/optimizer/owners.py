"""Who may step a parameter.

One 16-bit weight, one wrapper: two would hold two masters of it and round each other's away.

The wrapper that was made last holds a weight; an older one may not step it any more. FP32 weights
have no masters and may be in several optimizers, as in torch. Nothing here is keyed by a parameter,
so nothing outlives one. The inner optimizer, called by itself, would step the 16-bit weights.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

from torch.optim import Optimizer

from mixprec.optimizer.fused.held import separate_numbers
from mixprec.optimizer.masters import LOW
from mixprec.parameters import names_of

_newer: WeakKeyDictionary[Optimizer, WeakSet[Optimizer]] = WeakKeyDictionary()
"""Every living wrapper, with those that were given some of its parameters later."""


def take_over(optimizer: Optimizer) -> None:
    """Become the newest wrapper of these parameters."""
    ours = {id(param) for param, _ in names_of(optimizer.param_groups)}
    for other, newer in list(_newer.items()):
        if other is not optimizer and any(id(p) in ours for p, _ in names_of(other.param_groups)):
            newer.add(optimizer)
    _newer.setdefault(optimizer, WeakSet())


def superseded_by_newer(optimizer: Optimizer) -> str:
    """The name of a 16-bit parameter that a newer wrapper holds, or the empty string."""
    for other in _newer.get(optimizer, ()):
        theirs = {id(p) for p, _ in names_of(other.param_groups) if p.dtype in LOW}
        for param, name in names_of(optimizer.param_groups):
            if id(param) in theirs:
                return name
    return ""


def plain_states(inner: Optimizer) -> None:
    """Leave the states of a rule as it keeps them itself, whatever its wrappers have made of them.

    A fused step counts once for many parameters, whose entries share the number; the rule itself
    would count that once for each.
    """
    for other in list(_newer):
        holder: Any = other
        if getattr(holder, "inner", None) is inner:
            holder._leave_states()
    separate_numbers(inner)


def guard_inner_step(optimizer: Any) -> None:
    """Refuse `optimizer.inner.step()`, which would update 16-bit weights without their masters.

    What it may step, and what it saves by itself, it finds as it keeps it. The hooks are dropped
    from copies, as torch drops all hooks; whoever makes a copy guards it anew.
    """
    wrapper = ref(optimizer)

    def save(saved: Optimizer) -> None:
        if saved not in _newer:
            plain_states(saved)

    def refuse(stepped: Optimizer, _args: object, _kwargs: object) -> None:
        if stepped not in _newer:
            plain_states(stepped)
        holder = wrapper()
        if holder is None or stepped is not holder.inner:
            return
        for param, name in names_of(stepped.param_groups):
            if param.dtype in LOW:
                kind, dtype = type(stepped).__name__, str(param.dtype).removeprefix("torch.")
                raise RuntimeError(
                    f"step() of the {kind} that a MixedPrecision holds: it would update {name}, "
                    f"which is {dtype}, without its FP32 master, and small updates would vanish. "
                    f"Call step() of the MixedPrecision."
                )

    optimizer.inner.register_step_pre_hook(refuse)
    optimizer.inner.register_state_dict_pre_hook(save)
