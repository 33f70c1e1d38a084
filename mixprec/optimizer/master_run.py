"""One call of the inner rule on the masters of a bucket of parameters.

    take      masters are brought up to date, FP32 gradients are made
    run       masters stand in for the parameters while the rule updates them
    complete  weights become the rounded masters, masters return to the state

Room for split masters and for the FP32 copies of 16-bit gradients comes from a scratch that the
next bucket reuses; full masters are updated where they live. Weights and remainders are written
only when the rule is through; what else a rule that stops half-way has changed is `undo`'s.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mixprec.gradients import local
from mixprec.optimizer import masters
from mixprec.optimizer.masters import LOW, MASTER, MasterStore, Scratch, nested
from mixprec.optimizer.rule.stand_ins import Bucket, GroupValues, StandIns, copy_marks, rule_of
from mixprec.optimizer.undo import RuleUndo

State = dict[Tensor, Any]


@dataclass(slots=True)
class _Item:
    """A parameter with what is stored for its master, and the master in its place."""

    param: Tensor
    stored: Tensor
    stand_in: Tensor
    split: bool
    known: bool
    """Whether the master was stored before."""


class MasterRun:
    """Context in which `inner` sees the masters of `bucket`'s parameters in their place.

    Args:
        inner: the optimizer.
        state: its state, by parameter.
        store: the masters.
        bucket: parameters by group index.
        scratch: room for masters and gradients.
        undo: what hears of the bucket before its first change and after its last.
        shared: the state's keys that are no parameters, if known.
        low_states: names of states that the rule itself keeps in 16 bits.
    """

    def __init__(
        self,
        inner: Optimizer,
        state: State,
        store: MasterStore,
        bucket: Bucket,
        scratch: Scratch,
        undo: RuleUndo,
        shared: set[Any] | None = None,
        low_states: frozenset[str] = frozenset(),
    ) -> None:
        self.ruled = False
        self._state, self._store, self._scratch, self._undo = state, store, scratch, undo
        self._params = [param for group in bucket.values() for param in group]
        self._reserve(self._params)
        self._items: list[_Item] = []
        for param in filter(store.has, self._params):
            self._widen(param, low_states)
        pairs = {i: [(p, self._stand_in(p)) for p in group] for i, group in bucket.items()}
        self._swap = StandIns(inner, pairs, shared)

    @torch.no_grad()
    def take_grads(self, factor: Tensor | None) -> None:
        """Give each stand-in its parameter's gradient in FP32, times `factor` if it was 16-bit."""
        rooms: list[Tensor] = []
        grads: list[Tensor] = []
        self._scratch.rewind("grad")
        for item in self._items:
            grad = item.param.grad
            if grad is None or grad.dtype not in LOW:
                item.stand_in.grad = grad
            elif _is_sparse(grad):
                item.stand_in.grad = _sparse_float(grad, factor)
            else:
                item.stand_in.grad = room = self._scratch.take(item.param, "grad")
                rooms.append(local(room))
                grads.append(local(grad))
        if rooms:
            torch._foreach_copy_(rooms, grads)
        if rooms and factor is not None:
            for device in {room.device for room in rooms}:
                self._scratch.used(device, "grad").mul_(factor.to(device))

    @contextmanager
    def in_model(self) -> Generator[None]:
        """Inside a running rule: let user code see the model, with weights up to date."""
        self._swap.leave()
        self._write(spare=False)
        try:
            yield
        finally:
            self._swap.enter()

    def __enter__(self) -> MasterRun:
        # A split master is in the scratch, and a new one nowhere else: both can be made again.
        full = [item for item in self._items if not item.split]
        kept = [item.stand_in for item in full if item.known]
        own = [param for param in self._params if not self._store.has(param)]
        self._undo.begin(self, self._params, [*kept, *own])
        for item in self._items:
            entry = self._state.get(item.param)
            if entry is not None:
                entry.pop(MASTER, None)
        self._swap.enter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.ruled = True
            self.complete()
            self._undo.end()

    def complete(self) -> None:
        """Round all weights from the masters, which the rule has left. May be done twice."""
        for item in self._items:
            item.stand_in.grad = None
        self._swap.leave()
        self._write(spare=self._leave_scratch())
        for item in self._items:
            if self._state.get(item.param) or item.param.grad is not None:
                self._store.put(self._state, item.param, item.stored)
            elif item.known:
                # The rule had nothing to do, and made no state: it would take an entry for one.
                self._store.early[item.param] = item.stored

    def _reserve(self, params: Iterable[Tensor]) -> None:
        rooms: dict[torch.device, int] = {}
        splits: set[torch.device] = set()
        for param in filter(self._store.has, params):
            rooms[param.device] = rooms.get(param.device, 0) + Scratch.padded(param.numel())
            if self._store.storage(param) == "split":
                splits.add(param.device)
        for device, room in rooms.items():
            self._scratch.reserve(device, "grad", room)
            if device in splits:
                self._scratch.reserve(device, "master", room)

    def _widen(self, param: Tensor, low_states: frozenset[str]) -> None:
        """Make states FP32 that somebody else has made like the 16-bit parameter.

        The rule itself sees FP32 parameters, and what it keeps in 16 bits all the same it means to.
        """
        entry = self._state.get(param) or {}
        for key, value in entry.items():
            if key != MASTER and key not in low_states and _holds_dtype(value, param.dtype):
                entry[key] = nested(value, lambda t: t.float() if t.dtype == param.dtype else t)

    def _stand_in(self, param: Tensor) -> Tensor:
        """The parameter's master as a parameter; the parameter itself if it needs none."""
        if not self._store.has(param):
            return param
        stored = self._store.current(self._state, param)
        known = self._store.known(self._state, param)
        item = _Item(param, stored, stored, stored.dtype == torch.int16, known)
        self._items.append(item)
        master = stored
        if item.split and _is_sparse(param.grad):
            # Torch adds a sparse tensor at twice the offset that a dense one has in its storage.
            master = masters.read(param, stored)
        elif item.split:
            room, spare = self._scratch.take(param, "master"), self._scratch.take(param, "grad")
            master = masters.read(param, stored, room, spare)
        item.stand_in = nn.Parameter(master, param.requires_grad)
        copy_marks(param, item.stand_in)
        return item.stand_in

    def _leave_scratch(self) -> bool:
        """See to it that nothing the rule keeps lies in the scratch; whether gradients' is free.

        A rule may keep a gradient itself, as in `state["last"] = p.grad`, or a view of a parameter.
        The next bucket would overwrite it. A state of one tensor gets memory of its own, so that it
        is saved as one; what is kept in another way keeps the whole room.
        """
        kept = self._kept_uses()
        for item in self._items if kept else ():
            entry = self._state.get(item.param) or {}
            tensors = {key: value for key, value in entry.items() if isinstance(value, Tensor)}
            entry.update({key: self._scratch.owned(value) for key, value in tensors.items()})
        for use in self._kept_uses() if kept else ():
            self._scratch.give_away(use)
        return self._scratch.has_room("grad")

    def _kept_uses(self) -> list[str]:
        masters = [item.stand_in for item in self._items if item.split]
        views = {"grad": (), "master": masters}
        return [use for use in views if self._scratch.is_kept(use, views[use])]

    def _write(self, *, spare: bool) -> None:
        """Round every stand-in into its parameter; with the gradients' room to spare, in that."""
        weights: list[Tensor] = []
        full: list[Tensor] = []
        self._scratch.rewind("grad" if spare else "")
        for item in self._items:
            master = item.stand_in.detach()
            if item.split:
                room = self._scratch.take(item.param, "grad") if spare else None
                if room is not None and room.stride() != master.stride():
                    room = None  # the rule gave it new data
                scratch = None if room is None else local(room).view(torch.int32)
                masters.write(item.param, item.stored, master, scratch=scratch)
                continue
            if item.stored.data_ptr() != master.data_ptr():  # the rule gave it new data
                item.stored.copy_(master)
            weights.append(local(item.param.detach()))
            full.append(local(item.stored))
        if weights:
            torch._foreach_copy_(weights, full)


def _holds_dtype(value: Any, dtype: torch.dtype) -> bool:
    found: list[bool] = []
    nested(value, lambda t: found.append(t.dtype == dtype) or t)
    return any(found)


def _is_sparse(grad: Tensor | None) -> bool:
    return grad is not None and grad.layout != torch.strided


def _sparse_float(grad: Tensor, factor: Tensor | None) -> Tensor:
    grad = grad.detach().float()
    return grad if factor is None else grad * factor.to(device=grad.device, dtype=grad.dtype)


def make_state(
    inner: Optimizer, state: State, store: MasterStore, chosen: list[tuple[int, Tensor]]
) -> None:
    """Give the chosen parameters, by group index, the state that the rule makes in a first step.

    The rule steps copies of them with zero gradients at lr = 0. Counters called `step` go back
    to 0; groups and the optimizer's own counters are left as they were.
    """
    numbers = {k: v for k, v in vars(inner).items() if isinstance(v, (int, float))}
    stored = {p: store.current(state, p) for _, p in chosen if store.has(p)}
    for param, master in stored.items():
        store.early[param] = master  # where the rule does not see it, and nothing loses it
        state.pop(param, None)
    pairs: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for index, param in chosen:
        copy = nn.Parameter(param.detach().float() if store.has(param) else param.detach().clone())
        copy.grad = torch.zeros_like(copy)
        copy_marks(param, copy)
        pairs.setdefault(index, []).append((param, copy))
    try:
        with GroupValues(inner.param_groups).undone(), StandIns(inner, pairs), torch.enable_grad():
            for group in inner.param_groups:
                group.update({key: 0.0 for key in ("lr", "weight_decay") if key in group})
            rule_of(inner)(inner)
    except BaseException:
        for _, param in chosen:
            state.pop(param, None)
        raise
    finally:
        vars(inner).update(numbers)
    for _, param in chosen:
        entry = state[param]
        if "step" in entry:
            step = entry["step"]
            entry["step"] = torch.zeros_like(step) if isinstance(step, Tensor) else 0
        if param in stored:
            store.put(state, param, stored[param])
