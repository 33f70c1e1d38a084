"""How a rule may run on FP32 masters, decided by trying it.

A rule whose result for one tensor depends on that tensor alone can be stepped bucket by bucket,
through a small FP32 scratch. A rule that couples tensors (LBFGS, Prodigy, a global norm inside the
rule) must see all of them at once. Nothing in a rule's interface tells the two apart, so before its
first real step the rule is run on small random tensors, at its real hyperparameters, in three ways:

    native    on FP32 parameters of its own, as its author wrote it
    whole     on stand-ins for all parameters at once
    bucketed  on stand-ins for one parameter at a time, group counters rewound in between

Parameters, state, group values and attributes must agree bit for bit after every step. The rule
then runs bucketed if that agrees, else whole if that agrees, else it is refused. The trial's
gradients change size from step to step and are missing here and there, so that thresholds, warm-up
branches and lazy state are met; a rule that cannot bear that gets less. It takes some tens of
milliseconds, once.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mixprec.machine_errors import is_of_the_machine
from mixprec.optimizer.masters import LOW, MASTER
from mixprec.optimizer.rule.code import RuleCode
from mixprec.optimizer.rule.copies import Copier, IdOfParameter, Opaque
from mixprec.optimizer.rule.stand_ins import (
    GroupValues,
    StandIns,
    copy_marks,
    fill_buckets,
    map_leaves,
    rule_of,
    same,
)
from mixprec.optimizer.rule.trial import Trying, undisturbed

GRADIENT_SIZES = (1.0, 1e-3, 30.0, 1.0, 1.0, 1e6, 1.0, 1.0)
"""Gradient size of each trial step: both sides of clipping thresholds, past periods of 5 steps."""

TAKEN = (
    f"it keeps a state called {MASTER!r}, where the FP32 masters of 16-bit parameters are kept; "
    f"rename it in the rule"
)

GRADIENT_SPREAD = (0.25, 1.0, 0.0625)
"""Gradient size of the tensors of a trial, in turn: a threshold that one passes another may not."""

# Attributes that the trial replaces, or that only schedulers read.
_OUTSIDE = ("param_groups", "state", "defaults", "step", "_opt_called")


@dataclass(frozen=True)
class Admission:
    """How a rule runs on masters: bucket by bucket or whole, and whether it calls its closure."""

    per_parameter: bool
    calls_closure: bool
    reason: str
    low_states: frozenset[str] = frozenset()
    """Names of states that the rule keeps in 16 bits although its parameters are FP32."""
    counted: bool = True
    """Whether torch's version counters tell of all tensors that the rule writes to."""


@dataclass(frozen=True)
class Manner:
    """What a trial gives the rule."""

    grads: Literal["resting", "partly", "steady", "calm", "sparse"]
    """Missing here and there and once for all parameters; never for all; never missing; nor large;
    sparse."""
    closure: Literal["none", "loss", "evaluates"] = "none"
    """No closure; one that reports a loss, once; one that sets gradients, to be called often."""
    with_state: bool = False
    """Start from corners of the state that is there, such as a rule makes at construction."""
    counters: bool = True
    """Keep numbers in groups that are no options, although the state that they belong to is not."""


_MANNERS = (
    Manner("resting"),
    Manner("partly"),
    Manner("steady"),
    Manner("resting", counters=False),
    Manner("steady", with_state=True),
    Manner("calm"),
    Manner("steady", "evaluates"),
    Manner("sparse"),
)


def admit(inner: Optimizer, *, with_loss: bool = False) -> Admission:
    """How `inner`'s rule may run on masters. Leaves `inner` and the random state alone.

    Args:
        inner: the optimizer, as it is about to step.
        with_loss: whether the rule will be given the loss (some rules use its value).

    Raises:
        TypeError: if the rule cannot run on stand-ins for its parameters, or cannot be tried.

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    >>> admit(torch.optim.AdamW([weight])).per_parameter
    True
    >>> admit(torch.optim.LBFGS([weight])).per_parameter
    False
    """
    with undisturbed(inner) as trying:
        return trying.agreeing(lambda: _admit(inner, trying, with_loss))


def _admit(inner: Optimizer, trying: Trying, with_loss: bool) -> Admission:
    _check_ids(inner, trying.code)
    manner, native = _native_trial(inner, trying, with_loss)
    if any(MASTER in entry for states in native.states for entry in states[1:]):
        raise TypeError(
            f"{type(inner).__name__} cannot run on FP32 masters: {TAKEN}, or use FP32 parameters, "
            f"which need no masters."
        )
    why = "it calls its closure itself"
    if manner.closure != "evaluates":
        try:
            why = _difference(native, _trial(inner, trying, _bucketed, manner))
        except Exception as error:
            if is_of_the_machine(error):
                raise
            why = f"one tensor at a time it raised {quote(error)}"
        if not why:
            why = "each tensor's update depends on that tensor alone"
            return Admission(True, False, why, native.low_states, native.counted)
    difference = _difference(native, _trial(inner, trying, _whole, manner))
    if difference:
        raise TypeError(
            f"{type(inner).__name__} cannot run on FP32 masters: with stand-ins for its "
            f"parameters, {difference}. It keeps parameters outside of param_groups, where masters "
            f"never reach it. Use a rule that reads param_groups at each step, or FP32 parameters."
        )
    calls_closure = manner.closure == "evaluates"
    return Admission(False, calls_closure, why, native.low_states, native.counted)


def _check_ids(inner: Optimizer, code: RuleCode) -> None:
    """Refuse a rule that finds its own by the `id` of a parameter: stand-ins have other ones."""
    ids = frozenset(id(param) for group in inner.param_groups for param in group["params"])
    for values in (vars(inner), *inner.param_groups):
        for name, value in values.items():
            if name in ("params", "param_groups", "state") or not code.names_any((name,)):
                continue
            try:
                Copier({id(inner): inner}, ids).copy(value)
            except IdOfParameter as held:
                raise TypeError(
                    f"{type(inner).__name__} cannot run on FP32 masters: {name!r} holds {held}, "
                    f"and the tensors that stand in for parameters have other ids. Keep it in "
                    f"state[param], or use FP32 parameters."
                ) from None
            except Opaque:
                continue


def accepts_sparse(inner: Optimizer) -> bool:
    """Whether the rule takes sparse gradients, found by giving it some."""
    with undisturbed(inner) as trying:
        try:
            _trial(inner, trying, _native, Manner("sparse"))
        except Exception as error:
            if is_of_the_machine(error):
                raise
            return False
    return True


def counts_writes(inner: Optimizer) -> bool:
    """Whether torch's version counters tell of all tensors that the rule writes to, as tried."""
    with undisturbed(inner) as trying:
        try:
            return _native_trial(inner, trying, with_loss=False)[1].counted
        except Exception:
            return False


# ---------------------------------------- trials


@dataclass
class _Record:
    """What a trial left behind: values after every step; after the last, attributes, and what has
    changed outside of the optimizer."""

    params: list[list[Tensor]]
    states: list[list[Any]]
    groups: list[list[dict[str, Any]]]
    attributes: dict[str, Any]
    outside: dict[str, Any] = field(default_factory=dict[str, Any])
    counted: bool = True
    """Whether no tensor has changed behind torch's version counters."""

    @property
    def low_states(self) -> frozenset[str]:
        """Names of states in 16 bits."""
        found: set[str] = set()
        for entry in (entry for entries in self.states for entry in entries):
            found.update(name for name, value in entry.items() if any(map(_is_low, _leaves(value))))
        return frozenset(found)


_Step = Callable[[Optimizer, list[list[Tensor]], Manner, int], None]


def _native_trial(inner: Optimizer, trying: Trying, with_loss: bool) -> tuple[Manner, _Record]:
    """The reference trial, in the first manner that the rule can run in."""
    errors: list[str] = []
    for manner in _MANNERS:
        if with_loss and manner.closure == "none":
            manner = replace(manner, closure="loss")
        try:
            return manner, _trial(inner, trying, _native, manner)
        except Exception as error:
            if is_of_the_machine(error):
                raise
            text = quote(error)
            errors.extend([text] if text not in errors else [])
    raise TypeError(
        f"{type(inner).__name__} could not be tried on small FP32 tensors, so nothing shows that "
        f"it would be right on FP32 masters ({'; '.join(errors)}). Use FP32 parameters, which "
        f"need no masters."
    )


def _trial(inner: Optimizer, trying: Trying, step: _Step, manner: Manner) -> _Record:
    twin, params = twin_of(inner, manner, trying.code)
    if callable(train := getattr(twin, "train", None)):
        train()  # schedule-free rules step in no other mode; whether the real one is in it, it says
    trying.begin()
    generator = torch.Generator().manual_seed(0)
    record = _Record([], [], [], {})
    flat = [param for group in params for param in group]
    for turn, size in enumerate(GRADIENT_SIZES):
        for place, param in enumerate(flat):
            size = min(size, 1.0) if manner.grads == "calm" else size
            scale = size * GRADIENT_SPREAD[place % len(GRADIENT_SPREAD)]
            grad = torch.randn(param.shape, generator=generator).to(param) * scale
            if _rests(manner, turn, place, len(params[0])):
                param.grad = None
            elif manner.grads == "sparse":
                param.grad = grad.to_sparse(1) if grad.ndim else None  # torch has no sparse scalars
            else:
                param.grad = grad
        before = _versions(twin, flat)
        step(twin, params, manner, turn)
        record.counted = record.counted and _are_counted(before)
        record.params.append([param.detach().clone() for param in flat])
        record.states.append(_states(twin, flat))
        record.groups.append([_plain(group) for group in twin.param_groups])
    record.attributes = _plain({k: v for k, v in vars(twin).items() if k not in _OUTSIDE})
    record.outside = trying.changed()
    return record


def _versions(twin: Optimizer, params: list[Tensor]) -> list[tuple[Tensor, int, Tensor]]:
    """Tensors that a rule may write to, with their versions and values."""
    states = (twin.state.get(param) or {} for param in params)
    held = [*params, *(leaf for state in states for leaf in _leaves(state))]
    dense = (t for t in held if isinstance(t, Tensor) and t.layout == torch.strided)
    return [(tensor, tensor._version, tensor.detach().clone()) for tensor in dense]


def _are_counted(before: list[tuple[Tensor, int, Tensor]]) -> bool:
    return all(t._version != version or same(t.detach(), value) for t, version, value in before)


def _leaves(value: Any) -> list[Any]:
    found: list[Any] = []
    map_leaves(lambda _, leaf: found.append(leaf), "", value)
    return found


def _is_low(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)


def _rests(manner: Manner, turn: int, place: int, first_group: int) -> bool:
    """Whether a parameter has no gradient in a turn."""
    if manner.grads in ("steady", "calm"):
        return False
    here_and_there = (turn + place) % 5 == 4 or (turn == 2 and place < first_group)
    if manner.grads == "partly":
        return here_and_there and place != turn % max(first_group, 1)
    return here_and_there or turn == 4


def _native(twin: Optimizer, params: list[list[Tensor]], manner: Manner, turn: int) -> None:
    arguments: list[Any] = []
    if manner.closure == "evaluates":
        arguments = [_bowl(params)]
    if manner.closure == "loss":
        arguments = [_report(params, turn)]
    with torch.enable_grad():
        rule_of(twin)(twin, *arguments)


def _whole(twin: Optimizer, params: list[list[Tensor]], manner: Manner, turn: int) -> None:
    pairs = {i: [(param, _stand_in(param)) for param in group] for i, group in enumerate(params)}
    with StandIns(twin, pairs):
        _native(twin, [[shadow for _, shadow in group] for group in pairs.values()], manner, turn)
    _copy_back(pairs)


def _bucketed(twin: Optimizer, params: list[list[Tensor]], manner: Manner, turn: int) -> None:
    values = GroupValues(twin.param_groups)
    with_grad = {i: [p for p in group if p.grad is not None] for i, group in enumerate(params)}
    for bucket in fill_buckets(with_grad, lambda _: 1, capacity=1):
        pairs = {i: [(param, _stand_in(param)) for param in bucket[i]] for i in bucket}
        with values.bucket(bucket), StandIns(twin, pairs):
            _native(twin, params, manner, turn)
        _copy_back(pairs)


def _report(params: list[list[Tensor]], turn: int) -> Callable[[], Tensor]:
    """A closure that returns a loss; the wrapper has evaluated it once, before the rule ran.

    That is the same only for a rule that calls it once and before it moves any parameter.
    """
    flat = [param for group in params for param in group]
    versions = [param._version for param in flat]
    calls: list[int] = []

    def closure() -> Tensor:
        if calls or versions != [param._version for param in flat]:
            raise RuntimeError("it evaluates its closure at weights of its own")
        calls.append(turn)
        return torch.tensor(1.0 / (1 + turn))

    return closure


def _bowl(params: list[list[Tensor]]) -> Callable[[], Tensor]:
    """A closure: half the squared distance to 1, gradients set by hand."""

    def closure() -> Tensor:
        loss = torch.zeros((), device=params[0][0].device)
        with torch.no_grad():
            for param in (param for group in params for param in group):
                param.grad = param.detach() - 1.0
                loss = loss + 0.5 * param.grad.square().sum()
        return loss.requires_grad_()

    return closure


def _stand_in(param: Tensor) -> Tensor:
    shadow = nn.Parameter(param.detach().clone())
    shadow.grad = param.grad
    copy_marks(param, shadow)
    return shadow


@torch.no_grad()
def _copy_back(pairs: dict[int, list[tuple[Tensor, Tensor]]]) -> None:
    for group in pairs.values():
        for param, shadow in group:
            param.copy_(shadow)


def _states(twin: Optimizer, params: list[Tensor]) -> list[Any]:
    """Copies of what the rule keeps under other keys than parameters, then of each parameter's."""
    return copy.deepcopy([_shared_state(twin), *(twin.state.get(param) or {} for param in params)])


def _difference(native: _Record, other: _Record) -> str:
    """What first differs between two trials, or the empty string."""
    for turn in range(len(GRADIENT_SIZES)):
        if not same(native.params[turn], other.params[turn]):
            return f"parameters differ after trial step {turn + 1}"
        if not same(native.states[turn], other.states[turn]):
            return f"state differs after trial step {turn + 1}"
        for left, right in zip(native.groups[turn], other.groups[turn], strict=True):
            for key in {**left, **right}:
                if not same(left.get(key), right.get(key)):
                    return f"param_groups[...][{key!r}] differs after trial step {turn + 1}"
    for key in native.attributes:
        if not same(native.attributes[key], other.attributes.get(key)):
            return f"its attribute {key!r} differs"
    for key in {**native.outside, **other.outside}:
        if not same(native.outside.get(key), other.outside.get(key)):
            return f"{key} differs"
    return ""


# ---------------------------------------- the twin that is tried


def twin_of(
    inner: Optimizer, manner: Manner, code: RuleCode
) -> tuple[Optimizer, list[list[Tensor]]]:
    """A copy of `inner` at its hyperparameters over small FP32 parameters.

    It has no state, although `inner` may have stepped: what is tried does not depend on its age.
    Attributes that the rule's code never names (a model that somebody put there) are not copied.
    """
    generator = torch.Generator().manual_seed(0)
    state: defaultdict[Any, Any] = defaultdict(dict)
    memo: dict[int, Any] = {id(inner.state): state}
    params: list[list[Tensor]] = []
    groups: list[dict[str, Any]] = []
    for group in inner.param_groups:
        shapes = list(_trial_shapes(group["params"]))
        small = [_small(param, shape, generator) for param, shape in shapes]
        spare = small[0] if small else nn.Parameter(torch.zeros(()))
        memo.update((id(param), spare) for param in group["params"])
        memo[id(group["params"])] = small
        kept = {k: v for k, v in group.items() if manner.counters or _is_option(inner, k, v)}
        groups.append({**copy.deepcopy(kept, memo), **_moving_lr(group), "params": small})
        memo[id(group)] = groups[-1]
        params.append(small)
        if manner.with_state:
            for (param, shape), stand_in in zip(shapes, small, strict=True):
                state[stand_in] = _corner(inner.state.get(param, {}), param, shape)
    memo[id(inner.param_groups)] = groups
    memo[id(inner)] = twin = object.__new__(type(inner))
    kept = {k: v for k, v in vars(inner).items() if k != "step"}
    kept |= {k: OrderedDict() for k in kept if k.startswith("_optimizer_")}
    named = {k: v for k, v in kept.items() if code.names_any((k,)) or k.startswith("_optimizer_")}
    twin.__dict__.update({**kept, **copy.deepcopy(named, memo)})
    state.update(copy.deepcopy(_shared_state(inner), memo))
    twin.state, twin.param_groups = state, groups
    return twin, params


def _shared_state(optimizer: Optimizer) -> dict[Any, Any]:
    """What a rule keeps in its state under keys that are no parameters."""
    state = cast(dict[Any, Any], optimizer.state)
    return {key: value for key, value in state.items() if not isinstance(key, Tensor)}


def _is_option(inner: Optimizer, key: str, value: Any) -> bool:
    number = isinstance(value, (int, float, Tensor)) and not isinstance(value, bool)
    return key in inner.defaults or not number


def _corner(entry: dict[str, Any], param: Tensor, shape: tuple[int, ...]) -> dict[str, Any]:
    """A parameter's state with what is shaped like the parameter cut to `shape`."""
    corner = tuple(slice(0, size) for size in shape)
    if param.dtype in LOW:
        entry = {key: value for key, value in entry.items() if key != MASTER}

    def cut(_name: str, value: Any) -> Any:
        if isinstance(value, Tensor) and value.shape == param.shape:
            return value[corner].clone()
        return copy.deepcopy(value)

    return {key: map_leaves(cut, key, value) for key, value in entry.items()}


def _trial_shapes(params: Sequence[Tensor]) -> Iterator[tuple[Tensor, tuple[int, ...]]]:
    """Two small shapes for each number of dimensions among `params`, like theirs where small.

    Parameters of one element are tried apart: a rule may take them for numbers.
    """
    seen: set[tuple[int, bool]] = set()
    for param in params:
        kind = (param.ndim, param.numel() == 1)
        if kind not in seen and param.numel():
            seen.add(kind)
            yield param, tuple(min(size, 6) for size in param.shape)
            yield param, tuple(min(size, 4) for size in param.shape)


def _small(like: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    values = torch.randn(shape, generator=generator) * 0.1
    small = nn.Parameter(values.to(device=like.device, dtype=dtype))
    copy_marks(like, small)
    return small


def _moving_lr(group: dict[str, Any]) -> dict[str, Any]:
    """A learning rate under which a trial moves: a schedule may have set it to 0 for now."""
    if "lr" not in group or group["lr"] is None or float(group["lr"]) != 0.0:
        return {}
    lr = float(group.get("initial_lr", 0.0)) or 1e-3
    return {"lr": torch.full_like(group["lr"], lr) if isinstance(group["lr"], Tensor) else lr}


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Copies of numbers, strings, tensors and collections; nothing else can be compared."""
    kinds = (int, float, str, Tensor, list, tuple, dict, deque, type(None))
    return {
        k: copy.deepcopy(v) for k, v in values.items() if isinstance(v, kinds) and k != "params"
    }


def quote(error: BaseException) -> str:
    """The error's class and first line, short enough for a message of ours."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:120] if text else ''}"
