"""Running another optimizer's rule over stand-ins for its parameters.

A rule reads its parameters from `param_groups`, their gradients from `.grad` and their state from
`state`. So a rule can be made to update FP32 masters, unchanged and unaware: for the time of one
call, put FP32 stand-ins into the groups' own lists and their state under the stand-ins' keys, then
put everything back. The lists are edited in place because some rules (LBFGS) keep the list object
itself. Outside of the call the optimizer looks as its user left it: closures, hooks, schedulers and
checkpoints see model parameters only.

A rule may be called several times for one step, on a bucket of parameters each time. Its groups may
hold counters (`step`, `k`, `weight_sum`) that must advance once a step, not once a bucket:
`GroupValues` gives each bucket the values from before the step and checks that all buckets agree on
the values after it.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

Pairs = Sequence[tuple[Tensor, Tensor]]
"""Parameters and what stands in for each; a parameter may stand in for itself."""


def rule_of(inner: Optimizer) -> Callable[..., Any]:
    """The `step` of the optimizer's class without torch's hooks and profiler around it.

    The wrapper runs hooks once a step; the class attribute would run them again for every bucket.
    """
    step: Any = type(inner).step
    # Torch's compiler wraps that of LBFGS and SparseAdam once more, as it begins to be used.
    while getattr(step, "hooked", False):
        step = step.__wrapped__
    return step


def shared_keys(inner: Optimizer) -> set[Any]:
    """The keys of the optimizer's state that are no parameters."""
    return {key for key in cast(dict[Any, Any], inner.state) if not isinstance(key, Tensor)}


@contextmanager
def without_hooks(inner: Optimizer) -> Generator[None]:
    """Keep the hooks that the wrapper runs itself from being run by the rule's own methods."""
    hooks = {name: value for name, value in vars(inner).items() if name.endswith("_hooks")}
    try:
        vars(inner).update({name: OrderedDict[int, Any]() for name in hooks})
        yield
    finally:
        try:
            vars(inner).update(hooks)
        finally:  # an interrupt may come on that line, too
            vars(inner).update(hooks)


def copy_marks(param: Tensor, stand_in: Tensor) -> None:
    """Give a stand-in the attributes that users set on its parameter, which rules may read."""
    for name, value in vars(param).items():
        setattr(stand_in, name, value)


class StandIns:
    """Context in which `inner` sees stand-ins, by group index, in place of its parameters.

    Groups that are not named are hidden, so that their counters rest. `leave` and `enter` may be
    called in between to let user code (a closure) see the model. `shared` holds the state's keys
    that are no parameters, which every bucket sees; it is looked up here if not given, and kept.
    """

    def __init__(
        self, inner: Optimizer, members: Mapping[int, Pairs], shared: set[Any] | None = None
    ) -> None:
        self.inner = inner
        self.members = members
        self.shared = shared_keys(inner) if shared is None else shared

    def enter(self) -> None:
        """Show the stand-ins. What is in the optimizer's state stays there, too."""
        inner = self.inner
        self._groups = inner.param_groups
        self._params = {i: list(self._groups[i]["params"]) for i in self.members}
        self._state = cast(dict[Any, Any], inner.state)
        self._hooks = inner._optimizer_step_pre_hooks, inner._optimizer_step_post_hooks
        shown: defaultdict[Any, Any] = defaultdict(dict)
        shown.update((key, self._state[key]) for key in self.shared)
        # Rules initialise a state that is absent or empty.
        shown.update((s, self._state[p]) for p, s in self._pairs() if self._state.get(p))
        self._shown = inner.state = shown
        if len(self.members) < len(self._groups):
            inner.param_groups = [self._groups[i] for i in self.members]
        # The wrapper has run them already, and `super().step()` in a rule would run them again.
        inner._optimizer_step_pre_hooks = OrderedDict()
        inner._optimizer_step_post_hooks = OrderedDict()
        for i, pairs in self.members.items():
            self._groups[i]["params"][:] = [stand_in for _, stand_in in pairs]

    def leave(self) -> None:
        """Show the parameters again, with the state that the rule has left. May be done twice."""
        inner, shown = self.inner, self._shown
        for i, params in self._params.items():
            self._groups[i]["params"][:] = params
        inner.param_groups = self._groups
        inner._optimizer_step_pre_hooks, inner._optimizer_step_post_hooks = self._hooks
        param_of = {id(stand_in): param for param, stand_in in self._pairs()}
        self.shared.update(key for key in shown if not isinstance(key, Tensor))
        left = {param_of.get(id(key), key): value for key, value in shown.items()}
        for key in (*param_of.values(), *self.shared):
            if key not in left:
                self._state.pop(key, None)
        self._state.update(left)
        inner.state = cast(Any, self._state)

    def __enter__(self) -> StandIns:
        self.enter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.leave()

    def _pairs(self) -> Iterable[tuple[Tensor, Tensor]]:
        return (pair for pairs in self.members.values() for pair in pairs)


class GroupValues:
    """The hyperparameters and counters of every group at the start of a step.

    The first bucket of a group decides what its values become; each later one starts from the old
    values and must end at the same new ones, else the rule couples tensors through its group.
    """

    def __init__(self, groups: Sequence[dict[str, Any]]) -> None:
        self._groups = groups
        self._before = [_values(group) for group in groups]
        self._after: dict[int, dict[str, Any]] = {}

    @contextmanager
    def bucket(self, indices: Iterable[int]) -> Generator[None]:
        """Run one bucket, which shows the groups of these indices."""
        for index in indices:
            if index in self._after:
                _assign(self._groups[index], self._before[index])
        yield
        for index in indices:
            now = _values(self._groups[index])
            after = self._after.setdefault(index, now)
            if not same(after, now):
                key = next(k for k in {**after, **now} if not same(after.get(k), now.get(k)))
                raise RuntimeError(
                    f"param_groups[{index}][{key!r}] became {after.get(key)!r} after one bucket of "
                    f"parameters and {now.get(key)!r} after another: this rule couples tensors, so "
                    f"bucket by bucket it would be wrong. Pass bucket_numel=None to run it whole."
                )

    @contextmanager
    def undone(self) -> Generator[None]:
        """Put every group's values back afterwards."""
        try:
            yield
        finally:
            self.restore()

    def restore(self) -> None:
        """Put every group's values back."""
        for group, before in zip(self._groups, self._before, strict=True):
            _assign(group, before)


@dataclass(frozen=True, eq=False)
class _TensorValue:
    """A tensor in a group and the value it has now. Schedulers hold on to the tensor itself."""

    tensor: Tensor
    version: int
    value: Tensor

    def restore(self) -> Tensor:
        if self.tensor._version != self.version:
            with torch.no_grad():
                self.tensor.copy_(self.value)
        return self.tensor


Bucket = dict[int, list[Tensor]]
"""Parameters by group index."""


def fill_buckets(
    groups: Mapping[int, Sequence[Tensor]], size: Callable[[Tensor], int], capacity: int
) -> list[Bucket]:
    """Consecutive parameters in buckets of at most `capacity`, or of one parameter if larger.

    Groups without parameters ride in the first bucket: their counters advance once a step too.
    """
    buckets: list[Bucket] = [{i: [] for i, group in groups.items() if not group}]
    used = 0
    for index, group in groups.items():
        for param in group:
            if used and used + size(param) > capacity:
                buckets.append({})
                used = 0
            buckets[-1].setdefault(index, []).append(param)
            used += size(param)
    return [dict(sorted(bucket.items())) for bucket in buckets if bucket]


def map_leaves(change: Callable[[str, Any], Any], name: str, value: Any) -> Any:
    """`change(name, value)`, or for a collection the same with each item, called `name[key]`."""
    if type(value) is dict:
        items = cast(dict[Any, Any], value).items()
        return {key: map_leaves(change, f"{name}[{key}]", item) for key, item in items}
    if type(value) not in (list, tuple, deque):
        return change(name, value)
    mapped = [map_leaves(change, f"{name}[{i}]", item) for i, item in enumerate(value)]
    return deque(mapped, value.maxlen) if isinstance(value, deque) else type(value)(mapped)


def same(left: Any, right: Any) -> bool:
    """Equality of nested values, bit by bit for tensors (a NaN equals itself)."""
    if left is right:
        return True
    if isinstance(left, _TensorValue) and isinstance(right, _TensorValue):
        unchanged = left.tensor is right.tensor and left.version == right.version
        return unchanged or same(left.value, right.value)
    if type(left) is not type(right):
        return False
    if isinstance(left, Tensor):
        return _same_bits(left, right)
    if isinstance(left, Mapping):
        if left.keys() != right.keys():
            return False
        return all(value is right[key] or same(value, right[key]) for key, value in left.items())
    if isinstance(left, (list, tuple, deque)):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, float):
        return left == right or (left != left and right != right)
    if hasattr(left, "__dict__") and not callable(left):
        return same(vars(left), vars(right))
    return bool(left == right)


def _same_bits(left: Tensor, right: Tensor) -> bool:
    if left.dtype != right.dtype or left.shape != right.shape or left.layout != right.layout:
        return False
    return bool(torch.equal(_bytes(left), _bytes(right)))


def _bytes(tensor: Tensor) -> Tensor:
    dense = tensor.detach() if tensor.layout == torch.strided else tensor.detach().to_dense()
    # Of one element, a tensor of any stride counts as contiguous; its clone has stride 1.
    return dense.reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8)


def _values(group: dict[str, Any]) -> dict[str, Any]:
    plain = (float, int, bool, str, tuple, type(None))
    return {
        k: v if type(v) in plain else _copied(v)
        for k, v in group.items()
        if k not in ("params", "param_names")
    }


def _assign(group: dict[str, Any], values: dict[str, Any]) -> None:
    for key in [k for k in group if k not in values and k not in ("params", "param_names")]:
        del group[key]
    for key, value in values.items():
        group[key] = value.restore() if isinstance(value, _TensorValue) else copy.copy(value)


def _copied(value: Any) -> Any:
    """A copy that a rule cannot edit."""
    if isinstance(value, Tensor):
        return _TensorValue(value, value._version, value.detach().clone())
    return copy.copy(value) if isinstance(value, (dict, list)) else value
