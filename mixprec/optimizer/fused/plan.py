"""Launches over the parameters that step, and what they were made from.

A plan holds the tables of its launches for as long as nothing has moved: the same parameters step,
their weights look the same and lie where they lay, states and masters are the same tensors, and
gradients are of the same dtypes. Whether that is so is asked at every step. A step whose plan is
stale makes a new one, which takes milliseconds.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter, is_, itemgetter
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from mixprec.devices import has_triton
from mixprec.optimizer.fused.cohorts import Cohort, Entry, elements_of
from mixprec.optimizer.fused.guard import Guard
from mixprec.optimizer.fused.kernels.emit import WEIGHT, Layout, columns
from mixprec.optimizer.fused.kernels.launch import KernelLaunch, Launch, TwinLaunch
from mixprec.optimizer.fused.members import Members, Watch
from mixprec.optimizer.fused.pending import Pending
from mixprec.optimizer.fused.program.program import Program
from mixprec.optimizer.fused.recording.probe import Recording, RuleState
from mixprec.optimizer.masters import MASTER
from mixprec.optimizer.state_formats import TOP, decode, encode, scale_key, scales_in

__all__ = ["Batch", "Plan", "Prepared", "hold", "same_strides", "stored"]

_dtype = attrgetter("dtype")


class Batch:
    """What one launch works on.

    Attributes:
        places: of its parameters among those of the plan.
        entries: theirs in the optimizer's state.
        tensors: what each holds, by column of the layout.
    """

    def __init__(self, program: Program, layout: Layout) -> None:
        self.program, self.layout = program, layout
        self.cohorts: list[int] = []
        self.places: list[int] = []
        self.entries: list[Entry] = []
        self.tensors: list[dict[str, Tensor]] = []
        self._rows: list[int] = []
        self._kind: object = None
        self._turned: list[int] = []
        self._go: Callable[[Pending], None] | None = None

    def add(self, cohort: int, place: int, entry: Entry, tensors: dict[str, Tensor]) -> None:
        if cohort not in self.cohorts:
            self.cohorts.append(cohort)
        self._rows.append(self.cohorts.index(cohort))
        self.places.append(place)
        self.entries.append(entry)
        self.tensors.append(tensors)

    def make_tables(self, members: int) -> None:
        """Before the first launch; `members` says how many parameters the plan has."""
        self.device = self.tensors[0][WEIGHT].device
        kind = KernelLaunch if self.device.type == "cuda" and has_triton() else TwinLaunch
        self.launch: Launch = kind(self.program, self.layout, self.tensors, self._rows)
        self._all = self.places == list(range(members))
        shape = len(self.cohorts), self.program.num_scalars
        self._scalars = torch.empty(shape, dtype=torch.float32, device=self.device)

    def set_scalars(self, recordings: Sequence[Recording]) -> None:
        """Hand over this step's numbers, where a captured launch finds them too."""
        numbers = [recordings[cohort].scalars for cohort in self.cohorts]
        source = torch.tensor(numbers, dtype=torch.float32, pin_memory=self.device.type == "cuda")
        self._scalars.copy_(source, non_blocking=True)

    def make_ready(self, members: Members, factor: Tensor | None, found_inf: Tensor | None) -> None:
        """Do all that may fail before `run` does the rest."""
        if factor is not None:
            factor = factor.to(self.device, torch.float32).reshape(())
        if found_inf is not None:
            found_inf = found_inf.to(self.device)
        self._go = self.launch.ready(self.grads(members), self._scalars, factor, found_inf)

    def run(self, pending: Pending) -> None:
        """Launch what was made ready."""
        go, self._go = self._go, None
        assert go is not None, "make_ready() comes first"
        go(pending)

    def grads(self, members: Members) -> list[Tensor]:
        """The gradients as the launch wants them: with the strides of their parameters."""
        grads = members.grads
        ours = grads if self._all else [grads[place] for place in self.places]
        if members.kind is not self._kind:
            self._kind = members.kind
            pairs = enumerate(zip(self.places, ours, strict=True))
            params = members.params
            self._turned = [n for n, (place, g) in pairs if not _same_order(params[place], g)]
        if self._turned:
            ours = list(ours)
            for number in self._turned:
                ours[number] = _like(ours[number], members.params[self.places[number]])
        return ours


def _same_order(param: Tensor, grad: Tensor) -> bool:
    """Whether elements lie in the same order; strides of dimensions of size 1 say nothing."""
    both = param.is_contiguous() and grad.is_contiguous()
    return both or param.stride() == grad.stride()


def _like(grad: Tensor, param: Tensor) -> Tensor:
    return torch.empty_like(param, dtype=grad.dtype, requires_grad=False).copy_(grad)


class Plan:
    """Cohorts and launches, and what they were made from."""

    def __init__(
        self,
        inner: Optimizer,
        cohorts: list[Cohort],
        members: Members,
    ) -> None:
        self.cohorts = cohorts
        self.programs: tuple[Program, ...] | None = None
        self.fresh = True
        """Whether the launches at hand make states, which a next step will not."""
        self.batches: list[Batch] = []
        self._kind = members.kind
        self._ids = list(map(id, members.params))
        self._grad_dtypes = list(map(_dtype, members.grads))
        self._weights = Guard(members.params)
        self._addresses = list(map(Tensor.data_ptr, members.params))
        self._state = cast(dict[Any, Any], inner.state)
        self._all_entries = list(self._state.values())
        self._readers: list[tuple[Callable[[Any], Any], list[Entry]]] = []
        self._stored: list[list[Any]] = []
        self._single: list[tuple[Entry, str, Tensor]] = []
        self._memory: list[Any] = []
        self._freed: list[Any] = []
        self._full: list[int] = []
        """Places of parameters with full masters."""
        self._versions: list[int] = []
        this = weakref.ref(self)

        def drop() -> None:
            plan = this()
            if plan is not None:
                plan.drop()

        self.watch = Watch(members.params, drop)

    def drop(self) -> None:
        """Let go of everything: a parameter has died, and its states with it."""
        self.cohorts, self.batches, self._all_entries = [], [], []
        self._readers, self._stored, self._single = [], [], []

    def adopt(
        self, batches: list[Batch], programs: tuple[Program, ...], params: list[Tensor]
    ) -> None:
        """Take the launches for these programs, one a cohort."""
        self._readers, self._single, self._full = [], [], []
        for batch in batches:
            batch.make_tables(len(params))
            names = [n for n in columns(batch.layout) if n != WEIGHT and "[" not in n]
            if names:
                self._readers.append((itemgetter(*names), batch.entries))
                each = ((entry, name, entry[name]) for entry in batch.entries for name in names)
                self._single += [held for held in each if held[2].numel() == 1]
            if batch.layout.master == "full":
                self._full += batch.places
        self.batches, self.programs = batches, programs
        self._stored = [list(map(read, entries)) for read, entries in self._readers]
        self._all_entries = list(self._state.values())
        self._versions = [params[place]._version for place in self._full]
        self._watch_memory(
            tensor for batch in batches for held in batch.tensors for tensor in held.values()
        )

    def _watch_memory(self, tensors: Iterable[Tensor]) -> None:
        """Hear of it when memory is freed: `state.data = ...` moves a tensor, which stays itself.

        This costs a step nothing; to ask every state where it lies takes longer than all the rest.
        """
        freed = self._freed = []
        self._memory = [weakref.ref(tensor.untyped_storage(), freed.append) for tensor in tensors]

    def holds(self, inner: Optimizer, members: Members) -> bool:
        """Whether the same parameters step and everything still lies where it lay."""
        params = members.params
        return (
            not self._freed
            and not self.watch.died
            and self._state is inner.state
            and (members.kind is self._kind or self._are_ours(members))
            and self._weights.holds(params)
            and list(map(Tensor.data_ptr, params)) == self._addresses
            and self._holds_states()
            and all(cohort.holds() for cohort in self.cohorts)
            and [params[place]._version for place in self._full] == self._versions
        )

    def _are_ours(self, members: Members) -> bool:
        same = list(map(id, members.params)) == self._ids
        if not same or list(map(_dtype, members.grads)) != self._grad_dtypes:
            return False
        self._kind = members.kind
        return True

    def _holds_states(self) -> bool:
        entries = list(self._state.values())
        if len(entries) != len(self._all_entries) or not all(map(is_, entries, self._all_entries)):
            return False
        try:
            # What is the same object is equal without a comparison, which would raise for any other
            # tensor of several elements; those of one are looked at by themselves.
            same = [list(map(read, entries)) for read, entries in self._readers] == self._stored
            return same and all(entry[name] is value for entry, name, value in self._single)
        except Exception:
            return False

    def touched(self, params: list[Tensor]) -> None:
        """Kernels write behind autograd's back: tell it, as an operation in place would."""
        torch.autograd.graph.increment_version(params)
        self._versions = [params[place]._version for place in self._full]


@dataclass(frozen=True)
class Prepared:
    """A step that has been replayed and not yet run."""

    plan: Plan
    members: Members
    recordings: list[Recording]
    pending: Pending
    """What the step changes on the host."""

    @property
    def programs(self) -> tuple[Program, ...]:
        """One a cohort."""
        return tuple(recording.program for recording in self.recordings)


# ---------------------------------------- tensors of a parameter


def same_strides(entry: Entry, param: Tensor) -> None:
    """Give states the parameter's order of elements, which a checkpoint may not have kept."""
    for name in (MASTER, *elements_of(entry, param)):
        value = entry.get(name)
        if isinstance(value, Tensor) and value.stride() != param.stride():
            scales = scales_in(entry, name)
            plain = value if scales is None else decode(value, scales)
            entry[name] = torch.empty_like(param, dtype=plain.dtype).copy_(plain)
            if scales is not None:
                del entry[scale_key(name)]


def hold(
    entry: Entry,
    tensors: dict[str, Tensor],
    param: Tensor,
    dtypes: dict[str, torch.dtype],
    after: RuleState,
) -> list[str]:
    """Make a parameter's tensors ready for a program; names those of its entry that are new."""
    made: list[str] = []
    for name, shape in after.reduced.items():
        if name not in tensors:
            tensors[name] = entry[name] = torch.zeros(shape, device=param.device)
            made.append(name)
    for name in (name for name in after.elements if name not in tensors):
        new = torch.empty_like(param, dtype=torch.float32, requires_grad=False)
        if dtypes.get(name, torch.float32) != torch.float32:
            new.zero_()
        tensors[name] = new
        if "[" not in name:
            entry[name] = new
            made.append(name)
    for name, dtype in dtypes.items():
        scales = scales_in(entry, name)
        if tensors[name].dtype != dtype or (scales is not None) != (dtype in TOP):
            plain = decode(tensors[name], scales)
            if scales is not None:
                del entry[scale_key(name)]
            tensors[name], scales = encode(plain, dtype)
            entry[name] = tensors[name]
        if scales is not None:
            entry[scale_key(name)] = scales.bfloat16()  # which a checkpoint may have widened
    return made


def stored(
    layout: Layout, param: Tensor, entry: Entry, tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """A parameter's tensors by the columns of a layout."""
    known = {WEIGHT: param.detach(), **tensors}
    return {c: known[c] if c in known else entry[c] for c in columns(layout)}
