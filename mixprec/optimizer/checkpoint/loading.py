"""Loading an optimizer's checkpoint, whole or not at all.

    read     everything is checked, tried and copied to its device; nothing has changed yet
    commit   groups, state, masters, loss scaler and the rule's own entries change places

What stops a load while it reads (damage, no memory) has changed nothing; what stops a commit (a
Ctrl-C, at any line) is undone: `Before` holds the attributes of everybody concerned, which a load
replaces and never edits, and the values of groups, which it edits because schedulers hold them.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mixprec import formats
from mixprec.optimizer.checkpoint import reading as checkpoint
from mixprec.optimizer.checkpoint.own_state import load_own, own_entries, own_part
from mixprec.optimizer.checkpoint.reading import LOSS_SCALER, NAMES
from mixprec.optimizer.checkpoint.rehearsal import check_loaded
from mixprec.optimizer.masters import LOW, MASTER


@dataclass(frozen=True)
class Loaded:
    """A checkpoint that was checked, on its devices.

    Attributes:
        groups: values of each group, with its own parameters and names.
        state: by parameter; under other keys, what the rule keeps for all.
        early: masters of 16-bit parameters that have no other state. In an entry of their own they
            would tell rules that such a state is there.
        wide: masters of parameters that are no 16-bit ones here, see `take_over_wide`.
        own: what the rule saves by its own methods.
        scaler: the loss scaler's state, if it was saved and there is one.
        has_masters: whether this class saved it, as far as one can tell.
    """

    groups: list[dict[str, Any]]
    state: defaultdict[Any, Any]
    early: dict[Tensor, Tensor]
    wide: list[tuple[Tensor, Tensor]]
    own: dict[str, Any]
    scaler: Mapping[str, Any] | None
    has_masters: bool


def read(
    saved: Mapping[str, Any],
    inner: Optimizer,
    loss_scaler: Any,
    name_of: Callable[[Tensor], str],
) -> Loaded:
    """Check a state dict against `inner` and copy it to where it is to be.

    Raises:
        ValueError: naming what is missing, too much, of another shape or kind.
    """
    checkpoint.check_kind(saved)
    groups, saved_state = copy.deepcopy(saved["param_groups"]), saved["state"]
    torch_rule = type(inner).__module__.startswith("torch.optim")
    pairs = checkpoint.pair(groups, inner.param_groups, name_of)
    checkpoint.check_rule(groups, inner.param_groups, inner)
    checkpoint.check(saved_state, groups, pairs, name_of, torch_rule=torch_rule)
    scaler = _scaler_state(saved.get(LOSS_SCALER), loss_scaler)
    group_of = {key: group for group in groups for key in group["params"]}
    masters = any(MASTER in saved_state.get(key, ()) for key in pairs)
    loaded = Loaded([], defaultdict(dict), {}, [], own_part(inner, saved), scaler, masters)
    for key, entry in saved_state.items():
        if key not in pairs:
            loaded.state[key] = copy.deepcopy(entry)
            continue
        param = pairs[key]
        states = checkpoint.restored(entry, param, group_of[key], torch_rule=torch_rule)
        if MASTER in states and param.dtype not in LOW:
            loaded.wide.append((param, states.pop(MASTER)))
        if states.keys() == {MASTER}:
            loaded.early[param] = states[MASTER]
        elif states:
            loaded.state[param] = states
    for group, values in zip(inner.param_groups, groups, strict=True):
        kept = {key: group[key] for key in ("params", NAMES) if key in group}
        loaded.groups.append({**values, **kept})
    check_loaded(inner, loaded.groups, loaded.state, name_of)
    return loaded


def _scaler_state(saved: Any, loss_scaler: Any) -> Mapping[str, Any] | None:
    """The saved state of the loss scaler, tried on a copy; None if it is not saved or not here."""
    if saved is None or not hasattr(loss_scaler, "load_state_dict"):
        return None
    trial = copy.deepcopy(loss_scaler)
    remedy = (
        f"nothing was loaded. To go on with the loss scaler as it is, "
        f"del state_dict[{LOSS_SCALER!r}]."
    )
    try:
        trial.load_state_dict(saved)
    except Exception as error:
        raise ValueError(
            f"the checkpoint's loss scaler cannot be loaded: {error}; {remedy}"
        ) from error
    if _moves(loss_scaler) and not _moves(trial):
        raise ValueError(
            f"the checkpoint's loss scale never moves (it is of a StaticLossScaler), and so would "
            f"that of this {type(loss_scaler).__name__} not; {remedy}"
        )
    return saved


def _moves(loss_scaler: Any) -> bool:
    state = loss_scaler.state_dict()
    return state.get("min_scale") != state.get("max_scale")


class Before:
    """Everything that a load replaces, as it was."""

    def __init__(self, objects: Iterable[object], groups: Sequence[dict[str, Any]]) -> None:
        self._objects = [(vars(thing), dict(vars(thing))) for thing in objects]
        self._groups = [(group, dict(group)) for group in groups]

    def restore(self) -> None:
        for now, before in (*self._groups, *self._objects):
            now.update(before)
            for key in [key for key in now if key not in before]:
                del now[key]


def commit(loaded: Loaded, inner: Optimizer, loss_scaler: Any) -> None:
    """Put what was loaded in its place. The caller undoes it if this is stopped."""
    for group, values in zip(inner.param_groups, loaded.groups, strict=True):
        group.clear()
        group.update(values)
    load_own(inner, loaded.own)
    inner.__setstate__({"state": loaded.state, "param_groups": inner.param_groups})
    if loaded.scaler is not None:
        loss_scaler.load_state_dict(loaded.scaler)


def undo_own(inner: Optimizer) -> Callable[[], None]:
    """What brings back, as well as the rule can, what its own `load_state_dict` edits in place."""
    before = copy.deepcopy(own_entries(inner))
    return lambda: load_own(inner, before)


# ---------------------------------------- masters of parameters that are FP32 here


@torch.no_grad()
def take_over_wide(wide: Iterable[tuple[Tensor, Tensor]], *, partly: bool) -> list[Tensor]:
    """Give FP32 parameters back what 16 bits had rounded away; returns those that are no rounding.

    A 16-bit run's weights, loaded into an FP32 model, are the roundings of its masters: there the
    parameter becomes the master. Whoever loaded the masters as weights has them already. `partly`
    lets each element decide, once weights are what they will be.
    """
    others: list[Tensor] = []
    for param, master in wide:
        weight, wanted = param.detach(), master.to(param.dtype)
        rounded = weight == wanted
        ties_away, _ = formats.split(master.contiguous())
        for low in (*(master.to(dtype) for dtype in LOW), ties_away):
            rounded |= weight == low.to(param.dtype)
        rounded |= weight.isnan() & wanted.isnan()
        if bool(rounded.all()):
            if not torch.equal(weight, wanted):
                weight.copy_(wanted)
            continue
        others.append(param)
        if partly:
            weight.copy_(torch.where(rounded, wanted, weight))
    return others
