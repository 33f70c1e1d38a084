"""What a rule itself will want of a checkpoint, found by trying it before anything is changed.

A rule reads its groups and states when it is loaded (`__setstate__`) and when it steps, and what is
missing there surfaces as a KeyError in the middle of either, or not at all: some rules make a state
anew that they do not find. Which states a rule keeps, its interface does not tell. So a copy of the
optimizer is given the checkpoint:

    loaded    its own `__setstate__` runs on the new groups and states
    fresh     from no state, it steps three times: what it makes for a parameter of this shape
    resumed   from the loaded state, it steps once: what it cannot do without, or makes anew

Steps run on the meta device, where tensors have shapes and no data, so a parameter of any size
takes a millisecond, and one of each kind is enough. A rule that reads numbers runs on random ones,
for parameters that are small. What a rule cannot do with its present groups either is no sign of
damage, and is left to its first real step. Shapes that a foreign rule makes may depend on values
and on time (Prodigy keeps one number for a parameter of zeros, SPAM the elements of a mask), so its
states have the wrong one where it stumbles over it.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mixprec.optimizer.checkpoint.reading import NAMES
from mixprec.optimizer.fused.cohorts import shown
from mixprec.optimizer.masters import LOW, MASTER
from mixprec.optimizer.rule.admission import quote, undisturbed
from mixprec.optimizer.rule.stand_ins import copy_marks, map_leaves, rule_of, shared_keys

Entry = dict[str, Any]

_SMALL = 2**16
"""Elements of a parameter up to which a rule that reads numbers is tried: 256 KB a tensor."""

# What a rule raises for something that is not there or of another kind.
_DAMAGE = (AssertionError, AttributeError, IndexError, KeyError, TypeError, ValueError)


def copy_of(
    inner: Optimizer, groups: Sequence[dict[str, Any]], state: Mapping[Any, Any]
) -> Optimizer:
    """A copy of `inner` that shares its parameters, with copies of these groups and this state."""
    twin_groups = [{**copied(group), "params": list(group["params"])} for group in groups]
    twin_state: defaultdict[Any, Any] = defaultdict(dict)
    twin_state.update((k, dict(v) if isinstance(v, dict) else v) for k, v in state.items())
    memo: dict[int, Any] = {id(inner.state): twin_state, id(inner.param_groups): twin_groups}
    for group, twin_group in zip(inner.param_groups, twin_groups, strict=True):
        memo.update({id(group): twin_group, id(group["params"]): twin_group["params"]})
        memo.update((id(param), param) for param in group["params"])
    return _twin(inner, twin_groups, twin_state, memo)


def check_loaded(
    inner: Optimizer,
    groups: Sequence[dict[str, Any]],
    state: Mapping[Any, Any],
    name_of: Callable[[Tensor], str],
) -> None:
    """Let the rule take groups and state over, and step, on copies.

    Args:
        inner: the optimizer as it is.
        groups: the checkpoint's groups with this optimizer's parameters.
        state: the checkpoint's state by parameter.
        name_of: what to call a parameter.

    Raises:
        ValueError: naming the parameter or the group, and what the rule misses in it.
    """
    rule = type(inner).__name__
    with undisturbed(inner):
        taken = copy_of(inner, groups, state)
        try:
            taken.__setstate__({"state": taken.state, "param_groups": taken.param_groups})
        except Exception as error:
            where = next(filter(None, (_lacking(taken, p, state[p], name_of) for p in state)), "")
            raise ValueError(
                f"{rule} cannot take the checkpoint over ({quote(error)}{where}); nothing was "
                f"loaded. The checkpoint is damaged, or of another rule."
            ) from error
        _check_options(inner, taken)
        if not _waits_for_ranks(inner):
            _check_steps(inner, taken, name_of)


def copied(group: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a group's values, without its parameters. Names, which may be many, are shared."""
    long = ("params", NAMES)
    kept = {NAMES: group[NAMES]} if NAMES in group else {}
    return {**copy.deepcopy({k: v for k, v in group.items() if k not in long}), **kept}


def _twin(
    inner: Optimizer, groups: list[dict[str, Any]], state: Any, memo: dict[int, Any]
) -> Optimizer:
    twin = object.__new__(type(inner))
    memo[id(inner)] = twin
    for key, value in vars(inner).items():
        if key.endswith("_hooks"):
            vars(twin)[key] = OrderedDict[int, Any]()
        elif key != "step":  # a scheduler's, bound to the optimizer itself
            try:
                vars(twin)[key] = copy.deepcopy(value, memo)
            except Exception:  # a process group, a generator: nothing that a load would change
                vars(twin)[key] = value
    twin.state, twin.param_groups = state, groups
    return twin


def _lacking(taken: Optimizer, param: object, entry: Any, name_of: Callable[[Tensor], str]) -> str:
    """Whether this parameter's state is what the rule stumbles over: `, at the state of ...`."""
    if not isinstance(param, Tensor) or not entry:
        return ""
    alone = object.__new__(type(taken))
    vars(alone).update(vars(taken), state=defaultdict(dict, {param: dict(entry)}))
    try:
        alone.__setstate__({"state": alone.state, "param_groups": taken.param_groups})
    except Exception:
        return f", at the state of {name_of(param)}, which has {', '.join(map(str, entry))}"
    return ""


def _check_options(inner: Optimizer, taken: Optimizer) -> None:
    """Every option that the rule's groups have now is in those of the checkpoint, too."""
    pairs = zip(inner.param_groups, taken.param_groups, strict=True)
    for index, (group, new) in enumerate(pairs):
        for key in inner.defaults:
            if key in group and key not in new:
                raise ValueError(
                    f"param_groups[{index}] of the checkpoint lacks {key!r}, which "
                    f"{type(inner).__name__} needs; nothing was loaded. If you know its value, set "
                    f"it: state_dict['param_groups'][{index}][{key!r}] = ..."
                )


def _waits_for_ranks(inner: Optimizer) -> bool:
    """Whether a step might talk to other ranks, which need not be loading."""
    dist = torch.distributed
    alone = not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1
    return _is_foreign(inner) and not alone


def _is_foreign(rule: Optimizer) -> bool:
    return not type(rule).__module__.startswith("torch.optim")


# ---------------------------------------- steps


def _check_steps(inner: Optimizer, taken: Optimizer, name_of: Callable[[Tensor], str]) -> None:
    seen: set[Any] = set()
    for index, group in enumerate(taken.param_groups):
        for param in group["params"]:
            entry = {
                k: v for k, v in shown(taken.state.get(param, {}), "8bit").items() if k != MASTER
            }
            kind = (index, param.shape, param.dtype, repr(_look(entry)))
            if kind not in seen:
                seen.add(kind)
                rehearsal = _rehearsal(inner, index, param)
                if rehearsal is not None:
                    _check_step(rehearsal, taken, entry, name_of(param))


def _rehearsal(inner: Optimizer, index: int, param: Tensor) -> _Rehearsal | None:
    """Where the rule can step with its present groups: on no data, or on little."""
    for device in ("meta", "cpu") if param.numel() <= _SMALL else ("meta",):
        rehearsal = _Rehearsal(inner, index, param, device)
        try:
            rehearsal.run(inner.param_groups[index], {})
            return rehearsal
        except Exception:  # it cannot do without data, or needs more than a gradient
            continue
    return None


def _check_step(rehearsal: _Rehearsal, taken: Optimizer, entry: Entry, name: str) -> None:
    """Compare one parameter's state with what the rule makes for its like, and step from it."""
    rule, index, foreign = type(taken).__name__, rehearsal.index, _is_foreign(taken)
    try:
        made = rehearsal.run(taken.param_groups[index], {}, steps=3)
    except _DAMAGE as error:
        raise ValueError(
            f"{rule} cannot step with param_groups[{index}] of the checkpoint ({quote(error)}); "
            f"nothing was loaded. The group is damaged, or of another rule."
        ) from error
    except Exception:
        return
    if not made.keys() & entry.keys():
        return  # no state yet, or none that the rule makes in steps
    for key in made.keys() & entry.keys():
        _check_like(key, entry[key], made[key], name, foreign=foreign)
    lacks = sorted(made.keys() - entry.keys(), key=str)
    try:
        after = rehearsal.run(taken.param_groups[index], entry)
    except (*_DAMAGE, RuntimeError) as error:
        if "meta" in str(error) or (isinstance(error, RuntimeError) and not _of_shape(error)):
            return
        if not lacks or isinstance(error, RuntimeError):
            raise ValueError(
                f"{rule} cannot step from the checkpoint's state of {name!r} ({quote(error)}); "
                f"nothing was loaded. The checkpoint is damaged."
            ) from error
        after = {key: None for key in lacks}
    except Exception:
        return
    if lacks := [key for key in lacks if key in after]:
        raise ValueError(
            f"the checkpoint's state of {name!r} lacks {lacks[0]!r} (it has "
            f"{', '.join(map(str, entry))}), which {rule} makes in a parameter's first step; "
            f"nothing was loaded. The checkpoint is damaged."
        )


def _check_like(key: str, saved: Any, made: Any, name: str, *, foreign: bool) -> None:
    """A state is of the kind that the rule makes, and of a rule of torch's in its shape."""
    if not isinstance(made, Tensor):
        return
    kind = f"{saved.dtype} {list(saved.shape)}" if isinstance(saved, Tensor) else repr(saved)
    if not isinstance(saved, Tensor):
        fits = made.ndim == 0 and isinstance(saved, (int, float))
    elif made.is_floating_point() and not saved.is_floating_point():
        fits = False
    else:
        fits = foreign or saved.shape == made.shape or saved.numel() == made.numel() == 1
    if not fits:
        raise ValueError(
            f"{key!r} of {name!r} is {kind[:80]} in the checkpoint, where the rule keeps "
            f"{made.dtype} {list(made.shape)}; nothing was loaded. The checkpoint is damaged, or "
            f"of another model."
        )


def _of_shape(error: RuntimeError) -> bool:
    """Whether torch complains of sizes, and not of what the device or the numbers do not allow."""
    return "must match" in str(error) or "broadcast" in str(error)


class _Rehearsal:
    """Steps of a rule for one parameter such as `param`, of the group `index`, on a device."""

    def __init__(self, inner: Optimizer, index: int, param: Tensor, device: str) -> None:
        self._inner, self.index, self.param, self._device = inner, index, param, device

    def run(self, group: dict[str, Any], entry: Entry, steps: int = 1) -> Entry:
        """What the rule keeps for the parameter after each of some steps from `entry`."""
        twin, stand_in = self._made(group, entry)
        if callable(train := getattr(twin, "train", None)):
            train()
        kept: Entry | None = None
        for _ in range(steps):
            stand_in.grad = torch.randn_like(stand_in)
            with torch.enable_grad():
                rule_of(twin)(twin)
            now: Entry = dict(twin.state.get(stand_in) or {})
            kept = now if kept is None else {k: now[k] for k in kept if k in now}
        return kept or {}

    def _made(self, group: dict[str, Any], entry: Entry) -> tuple[Optimizer, Tensor]:
        """A copy of the optimizer over one stand-in with this state, and the stand-in."""
        inner, param = self._inner, self.param
        dtype = torch.float32 if param.dtype in LOW else param.dtype
        stand_in = nn.Parameter(torch.randn(param.shape, dtype=dtype, device=self._device))
        copy_marks(param, stand_in)
        groups = [{**copied(other), "params": list[Tensor]()} for other in inner.param_groups]
        groups[self.index] = {**copied(group), "params": [stand_in]}
        for key in {"capturable", "foreach", "fused"} & groups[self.index].keys():
            groups[self.index][key] = False  # not for this device
        keys = shared_keys(inner)
        shared = {k: copy.deepcopy(v) for k, v in inner.state.items() if k in keys}
        state: defaultdict[Any, Any] = defaultdict(dict, shared)
        if entry:
            state[stand_in] = _on(self._device, entry)
        memo: dict[int, Any] = {id(inner.state): state, id(inner.param_groups): groups}
        for old, new in zip(inner.param_groups, groups, strict=True):
            memo |= {id(old): new, id(old["params"]): new["params"]}
            memo.update((id(other), stand_in) for other in old["params"])
        return _twin(inner, groups, state, memo), stand_in


def _on(device: str, entry: Entry) -> Entry:
    """A copy of an entry there; single numbers, which rules read, are on the CPU."""

    def move(_name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return copy.deepcopy(value)
        return value.detach().to("cpu" if value.ndim == 0 else device, copy=True)

    return {key: map_leaves(move, key, value) for key, value in entry.items()}


def _look(entry: Entry) -> Entry:
    """What tells kinds of entries apart: names, types, dtypes and shapes, no values."""

    def look(_name: str, value: Any) -> Any:
        return (value.dtype, tuple(value.shape)) if isinstance(value, Tensor) else type(value)

    return {key: map_leaves(look, key, entry[key]) for key in sorted(entry, key=str)}
