"""One call of the inner rule on the masters of a bucket of parameters.

    take     masters leave the state, FP32 gradients are made
    run      masters stand in for the parameters while the rule updates them
    put      weights become the rounded masters, masters return to the state

Room for split masters and for the FP32 copies of 16-bit gradients comes from a scratch that the
next bucket reuses; full masters are updated where they live. If the rule raises, weights keep their
values.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mixprec import masters
from mixprec.gradients import local
from mixprec.inner import Bucket, GroupValues, StandIns, copy_marks, rule_of
from mixprec.masters import LOW, MasterStore, Scratch

State = dict[Tensor, Any]


@dataclass(slots=True)
class _Item:
    """A parameter with what is stored for its master, and the master in its place."""

    param: Tensor
    stored: Tensor
    stand_in: Tensor
    split: bool
    origin: Literal["state", "early", "new"]
    """Where the master was before this run; a new one equals its weight."""


class MasterRun:
    """Context in which `inner` sees the masters of `bucket`'s parameters in their place."""

    def __init__(
        self,
        inner: Optimizer,
        state: State,
        store: MasterStore,
        bucket: Bucket,
        scratch: Scratch,
        shared: set[Any] | None = None,
    ) -> None:
        self._state, self._store, self._scratch = state, store, scratch
        self._reserve(param for group in bucket.values() for param in group)
        self._items: list[_Item] = []
        try:
            pairs = {i: [(p, self._stand_in(p)) for p in group] for i, group in bucket.items()}
        except BaseException:  # out of memory, most likely: no master may be lost to it
            self._put_back(failed=True)
            raise
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
        self._write(last=False)
        try:
            yield
        finally:
            self._swap.enter()

    def __enter__(self) -> MasterRun:
        self._swap.enter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._swap.leave()
        if error is None:
            self._write(last=True)
        self._put_back(failed=error is not None)

    def _put_back(self, *, failed: bool) -> None:
        """Return every master to the state; after a failure, to where it was."""
        for item in self._items:
            item.stand_in.grad = None
            if not failed or self._state.get(item.param) or item.origin == "state":
                self._store.put(self._state, item.param, item.stored)
            elif item.origin == "early":
                self._store.early[item.param] = masters.read(item.param, item.stored)

    def _reserve(self, params: Iterable[Tensor]) -> None:
        rooms: dict[torch.device, int] = {}
        splits = False
        for param in params:
            if self._store.has(param):
                rooms[param.device] = rooms.get(param.device, 0) + Scratch.padded(param.numel())
                splits = splits or self._store.storage(param) == "split"
        for device, room in rooms.items():
            self._scratch.reserve(device, "grad", room)
            if splits:
                self._scratch.reserve(device, "master", room)

    def _stand_in(self, param: Tensor) -> Tensor:
        """The parameter's master as a parameter; the parameter itself if it needs none."""
        if not self._store.has(param):
            return param
        origin = self._store.origin(self._state, param)
        stored = self._store.take(self._state, param)
        item = _Item(param, stored, stored, stored.dtype == torch.int16, origin)
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

    def _write(self, *, last: bool) -> None:
        """Round every stand-in into its parameter."""
        weights: list[Tensor] = []
        full: list[Tensor] = []
        for item in self._items:
            master = item.stand_in.detach()
            if item.split:
                masters.write(item.param, item.stored, master, spent=last)
                continue
            if item.stored.data_ptr() != master.data_ptr():  # the rule gave it new data
                item.stored.copy_(master)
            weights.append(local(item.param.detach()))
            full.append(local(item.stored))
        if weights:
            torch._foreach_copy_(weights, full)


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
    stored = {p: store.take(state, p) for _, p in chosen if store.has(p)}
    pairs: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for index, param in chosen:
        copy = nn.Parameter(param.detach().float() if store.has(param) else param.detach().clone())
        copy.grad = torch.zeros_like(copy)
        copy_marks(param, copy)
        pairs.setdefault(index, []).append((param, copy))
    with GroupValues(inner.param_groups).undone(), StandIns(inner, pairs), torch.enable_grad():
        for group in inner.param_groups:
            group.update({key: 0.0 for key in ("lr", "weight_decay") if key in group})
        rule_of(inner)(inner)
    vars(inner).update(numbers)
    for _, param in chosen:
        entry = state[param]
        if "step" in entry:
            step = entry["step"]
            entry["step"] = torch.zeros_like(step) if isinstance(step, Tensor) else 0
        if param in stored:
            store.put(state, param, stored[param])
