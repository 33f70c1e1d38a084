"""What a step changes, written down before the first change, so that it can be taken back.

Anything may stop a step at any line: out of memory, an error of the rule's, Ctrl-C. What then?

    before the rule runs    nothing has changed but where things stand, and that is put back
    while the rule runs     new states are dropped; old tensors are as they were if the rule has not
                            written to them yet, else nobody can say what is in them
    after the rule ran      masters are complete: the weights are rounded from them to the end
    while kernels start     the first one either starts or does not; after it, nobody can say

Copies of masters and states would let every step be undone. They cost as much as the fastest rules
do themselves, at every step, so there are none: what was half-written is said, and nothing steps or
saves until somebody decides.

A record stands until it has been settled, whoever asks next: to settle may be stopped as well, and
is then begun again. So all that is done here can be done twice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from mixprec.optimizer.fused.pending import Pending
from mixprec.optimizer.fused.step import FusedStep
from mixprec.optimizer.judging.verdict import Verdict
from mixprec.optimizer.reports.step_counts import StepCounts
from mixprec.optimizer.rule.random_states import RandomStates
from mixprec.optimizer.rule.stand_ins import GroupValues
from mixprec.optimizer.setup import Setup

__all__ = ["BareRun", "Contents", "RuleUndo", "StepUndo"]


class Contents:
    """What dicts, lists, deques and sets hold, however deep, to be put back into the same objects.

    Tensors and other values are kept by reference.

    >>> entry = {"step": 3, "history": [1.0]}
    >>> before = Contents(entry)
    >>> entry["history"].append(2.0)
    >>> entry["new"] = 1
    >>> before.restore()
    >>> entry
    {'step': 3, 'history': [1.0]}
    """

    def __init__(self, value: Any) -> None:
        self.tensors: list[Tensor] = []
        self._saved: list[tuple[Any, Any]] = []
        self._keep(value, set())

    def _keep(self, value: Any, seen: set[int]) -> None:
        if isinstance(value, Tensor):
            self.tensors.append(value)
        elif isinstance(value, (dict, list, deque, set, tuple)) and id(value) not in seen:
            held: Any = cast(Any, value)
            seen.add(id(held))
            if not isinstance(held, tuple):
                self._saved.append((held, dict(held) if isinstance(held, dict) else list(held)))
            for item in held.values() if isinstance(held, dict) else held:
                self._keep(item, seen)

    def restore(self) -> None:
        for container, items in self._saved:
            if isinstance(container, list):
                cast(list[Any], container)[:] = items
                continue
            container.clear()
            (container.extend if isinstance(container, deque) else container.update)(items)


class _Run(Protocol):
    """A call of the rule on one bucket, see `master_run.MasterRun`."""

    ruled: bool
    """Whether the rule has come to its end, so that the masters are complete."""

    def complete(self) -> None: ...


class RuleUndo:
    """What the rule's own calls change, bucket by bucket.

    Args:
        inner: the optimizer, as it is before the first call.
        devices: those of its parameters.
        counted: whether torch's version counters tell of all that the rule writes.
        total: how many parameters its buckets hold.
    """

    def __init__(
        self,
        inner: Optimizer,
        devices: Iterable[torch.device],
        *,
        counted: Callable[[], bool],
        total: int,
    ) -> None:
        self.total = total
        self.passed = 0
        """Parameters whose buckets are complete."""
        self.begun = False
        self._inner, self._counted = inner, counted
        state = cast(dict[Any, Any], inner.state)
        self._state = state
        self._shared = {k: v for k, v in state.items() if not isinstance(k, Tensor)}
        self._attributes = dict(vars(inner))
        own = [v for k, v in self._attributes.items() if k not in ("state", "param_groups")]
        self._own = Contents([own, list(self._shared.values())])
        self._groups = Contents(inner.param_groups)
        self._values = GroupValues(inner.param_groups)
        self._random = RandomStates(devices)
        # Under a dispatch mode of somebody's (a counter of operations) torch does not count what
        # its operations on lists write.
        self._is_watched = getattr(torch._C, "_len_torch_dispatch_stack", int)() > 0
        self._run: _Run | None = None
        self._size = 0
        self._entries: list[tuple[Tensor, dict[str, Any] | None, Contents]] = []
        self._versions: list[tuple[Tensor, int]] = []

    @property
    def finished(self) -> bool:
        """Whether all buckets are complete."""
        return self.begun and self.passed >= self.total

    def begin(self, run: _Run, params: Iterable[Tensor], written: Iterable[Tensor]) -> None:
        """Before a bucket's first change; the rule will write to the tensors `written` in place."""
        entries = [(param, self._state.get(param)) for param in params]
        self._entries = [(param, entry, Contents(entry)) for param, entry in entries]
        held = [t for *_, contents in self._entries for t in contents.tensors]
        own = [] if self.passed else self._own.tensors
        self._versions = [(tensor, tensor._version) for tensor in (*own, *held, *written)]
        self._size, self._run, self.begun = len(entries), run, True

    def end(self) -> None:
        """After a bucket's last change."""
        self.passed, self._run, self._size = self.passed + self._size, None, 0

    def settle(self) -> str:
        """Put back what can be, complete what has to be; says what is half done.

        If all is complete, it stays so: ask `finished`.
        """
        run = self._run
        if run is not None and run.ruled:
            run.complete()
            self.end()
        if self.finished:
            return ""
        written = any(tensor._version != version for tensor, version in self._versions)
        if self._run is not None:
            for param, entry, contents in self._entries:
                contents.restore()
                if entry is None:
                    self._state.pop(param, None)
                else:
                    self._state[param] = entry
        self._put_back()
        uncounted = bool(self._versions) and (self._is_watched or not self._counted())
        if self._run is not None and (written or uncounted):
            return f"{type(self._inner).__name__} was writing to {self._size} parameters or states"
        if self.passed:
            return f"{self.passed} of {self.total} parameters had moved"
        return ""

    def _put_back(self) -> None:
        vars(self._inner).clear()
        vars(self._inner).update(self._attributes)
        self._values.restore()
        self._groups.restore()
        self._own.restore()
        for key in [k for k in self._state if not isinstance(k, Tensor) and k not in self._shared]:
            del self._state[key]
        self._state.update(self._shared)
        self._random.restore()


class BareRun:
    """Context of a rule that runs on its own parameters, with no masters in between."""

    def __init__(self, params: Iterable[Tensor], undo: RuleUndo) -> None:
        self.ruled = False
        self._params, self._undo = list(params), undo

    def __enter__(self) -> BareRun:
        self._undo.begin(self, self._params, self._params)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.ruled = True
            self._undo.end()

    def complete(self) -> None:
        """Nothing is left to do."""


class StepUndo:
    """What one step of a MixedPrecision changes.

    Attributes:
        rule: what the rule's own calls change, if it runs.
        pending: what the fused part changes.
        fuses: whether there is a fused part, which comes last.
        verdict: what the step will be concluded with.
        skips: whether nothing is to be updated.
        error: what has stopped the step.
    """

    def __init__(
        self,
        setup: Setup,
        fused: FusedStep,
        counts: StepCounts,
        parts: Sequence[object],
        first: bool,
    ) -> None:
        self.rule: RuleUndo | None = None
        self.pending = Pending()
        self.fuses = self.skips = False
        self.verdict: Verdict | None = None
        self.error = "an interrupt"
        self._fused, self._counts = fused, counts
        self._small = [
            (vars(part), {k: v for k, v in vars(part).items() if type(v) in _SMALL})
            for part in parts
        ]
        self._saved_counts = counts.saved()
        scaler: Any = setup.loss_scaler
        self._scaler = None
        if scaler is not None:
            self._scaler = scaler, scaler.losses_scaled, getattr(scaler, "_waiting", None)
        # A rule may draw numbers as it is tried, before its first step.
        self._random = RandomStates(p.device for p in setup.params()) if first else None

    @property
    def moved(self) -> bool:
        """Whether everything has been updated that is to be."""
        if self.fuses:
            return self.pending.finished
        return self.skips or (self.rule is not None and self.rule.finished)

    def settle(self) -> str:
        """Take it back, or bring it to its end (then `moved`); says what is half done."""
        broken = "" if self.rule is None or self.moved else self.rule.settle()
        if not self.moved:
            if self.rule is not None and self.rule.finished:
                broken = f"{self.rule.passed} parameters had moved and others had not"
            broken = self._fused.take_back(self.pending) or broken
        self._restore_counts()
        return f"it was stopped by {self.error} when {broken}." if broken else ""

    def _restore_counts(self) -> None:
        for now, before in self._small:
            now.update(before)
        self._counts.restore(self._saved_counts)
        if self._scaler is not None:
            scaler, losses_scaled, waiting = self._scaler
            if scaler.losses_scaled == losses_scaled and hasattr(scaler, "_waiting"):
                scaler._waiting = waiting  # unless a closure has scaled another loss
        if self._random is not None and not self.moved:
            self._random.restore()


class Leaving:
    """The way out of `masters_in_model`: parameters get their weights back, then those get rounded.

    Whatever was written inside is kept, in whatever way: in place, through `.data`, or by giving
    `.data` another tensor.
    """

    verdict: Verdict | None = None
    moved = False
    error = ""

    def __init__(self, setup: Setup, held: Sequence[_Held], buffers: Sequence[_Held]) -> None:
        self._setup = setup
        self._held = [(param, weight, param.data) for param, weight, _ in held]
        self._buffers = [(buffer, value, buffer.data) for buffer, value, _ in buffers]

    def restore_data(self) -> None:
        """Give all parameters and buffers their own data back, as it was."""
        for tensor, own, _ in (*self._held, *self._buffers):
            if tensor.dtype != own.dtype or tensor.data_ptr() != own.data_ptr():
                tensor.data = own
        self._setup.in_model = self._setup.store.in_model = False

    def settle(self) -> str:
        """Round the weights from what was inside."""
        self.restore_data()
        store, state = self._setup.store, self._setup.state
        with torch.no_grad():
            for buffer, _, inside in self._buffers:
                buffer.copy_(inside)
            while self._held:
                param, weight, inside = self._held[-1]
                store.set(state, param, inside.to(weight.device, torch.float32))
                self._held.pop()
        return ""


_Held = tuple[Tensor, Tensor, Tensor]
"""A parameter or buffer, its own data, and what it is inside."""

_SMALL = (int, float, bool, str, tuple, type(None), Verdict)
