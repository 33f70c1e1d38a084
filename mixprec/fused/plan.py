"""Launches over the parameters that step, and what they were made from.

A plan holds the tables of its launches for as long as nothing has moved: the same parameters step,
their weights look the same and lie where they lay, states and masters are the same tensors, and
gradients are of the same dtypes. Whether that is so is asked at every step. A step that finds
another plan in the way makes a new one, which takes milliseconds.
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
from mixprec.fused.cohorts import Cohort, Entry, elements_of
from mixprec.fused.guard import Guard
from mixprec.fused.launch import KernelLaunch, Launch, TwinLaunch
from mixprec.fused.members import Members
from mixprec.fused.program import Program
from mixprec.fused.record import Recording, RuleState
from mixprec.fused.triton_emit import WEIGHT, Layout, columns
from mixprec.masters import MASTER, MasterStore
from mixprec.state_formats import TOP, decode, encode, scale_key

__all__ = ["Batch", "Plan", "Prepared", "hold", "same_strides", "stored"]

_dtype, _version = attrgetter("dtype"), attrgetter("_version")


class Batch:
    """What one launch works on."""

    def __init__(self, program: Program, layout: Layout) -> None:
        self.program, self.layout = program, layout
        self.cohorts: list[int] = []
        self.params: list[Tensor] = []
        self.tensors: list[dict[str, Tensor]] = []
        self._rows: list[int] = []
        self._places: list[int] = []
        self._kind: object = None
        self._turned: list[int] = []

    def add(self, cohort: int, param: Tensor, tensors: dict[str, Tensor]) -> None:
        if cohort not in self.cohorts:
            self.cohorts.append(cohort)
        self._rows.append(self.cohorts.index(cohort))
        self.params.append(param)
        self.tensors.append(tensors)

    def ready(self, place_of: dict[Tensor, int]) -> None:
        """Make the tables; `place_of` says where each parameter's gradient will be found."""
        self.device = self.params[0].device
        kind = KernelLaunch if self.device.type == "cuda" and has_triton() else TwinLaunch
        self.launch: Launch = kind(self.program, self.layout, self.tensors, self._rows)
        self._places = [place_of[param] for param in self.params]
        self._all = self._places == list(range(len(place_of)))
        shape = len(self.cohorts), self.program.num_scalars
        self._scalars = torch.empty(shape, dtype=torch.float32, device=self.device)

    def set_scalars(self, recordings: Sequence[Recording]) -> None:
        """Hand over this step's numbers, where a captured launch finds them too."""
        numbers = [recordings[cohort].scalars for cohort in self.cohorts]
        source = torch.tensor(numbers, dtype=torch.float32, pin_memory=self.device.type == "cuda")
        self._scalars.copy_(source, non_blocking=True)

    def run(self, members: Members, factor: Tensor | None, found_inf: Tensor | None) -> None:
        """Launch, on the gradients of those of the plan's members that are in this batch."""
        if factor is not None:
            factor = factor.to(self.device, torch.float32).reshape(())
        if found_inf is not None:
            found_inf = found_inf.to(self.device)
        self.launch.run(self.grads(members), self._scalars, factor, found_inf)

    def grads(self, members: Members) -> list[Tensor]:
        """The gradients as the launch wants them: with the strides of their parameters."""
        grads = members.grads
        ours = grads if self._all else [grads[place] for place in self._places]
        if members.kind is not self._kind:
            self._kind = members.kind
            pairs = enumerate(zip(self.params, ours, strict=True))
            self._turned = [place for place, (p, g) in pairs if not _same_order(p, g)]
        if self._turned:
            ours = list(ours)
            for place in self._turned:
                ours[place] = _like(ours[place], self.params[place])
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
        origins: dict[Tensor, str],
    ) -> None:
        self.cohorts, self.origins = cohorts, origins
        self.programs: tuple[Program, ...] | None = None
        self.fresh = True
        """Whether the launches at hand make states, which a next step will not."""
        self.batches: list[Batch] = []
        self._params, self._kind = members.params, members.kind
        self._grad_dtypes = list(map(_dtype, members.grads))
        self._weights = Guard(self._params)
        self._addresses = list(map(Tensor.data_ptr, self._params))
        self._state = cast(dict[Any, Any], inner.state)
        self._all_entries = list(self._state.values())
        self._readers: list[tuple[Callable[[Any], Any], list[Entry]]] = []
        self._stored: list[list[Any]] = []
        self._single: list[tuple[Entry, str, Tensor]] = []
        self._memory: list[Any] = []
        self._freed: list[Any] = []
        self._full: list[Tensor] = []
        self._versions: list[int] = []

    def adopt(self, batches: list[Batch], programs: tuple[Program, ...]) -> None:
        """Take the launches for these programs, one a cohort."""
        place_of = {param: place for place, param in enumerate(self._params)}
        self._readers, self._single, self._full = [], [], []
        for batch in batches:
            batch.ready(place_of)
            names = [n for n in columns(batch.layout) if n != WEIGHT and "[" not in n]
            if names:
                entries: list[Entry] = [self._state[param] for param in batch.params]
                self._readers.append((itemgetter(*names), entries))
                each = ((entry, name, entry[name]) for entry in entries for name in names)
                self._single += [held for held in each if held[2].numel() == 1]
            if batch.layout.master == "full":
                self._full += batch.params
        self.batches, self.programs = batches, programs
        self._stored = [list(map(read, entries)) for read, entries in self._readers]
        self._all_entries = list(self._state.values())
        self._versions = list(map(_version, self._full))
        self._watch(
            tensor for batch in batches for held in batch.tensors for tensor in held.values()
        )

    def _watch(self, tensors: Iterable[Tensor]) -> None:
        """Hear of it when memory is freed: `state.data = ...` moves a tensor, which stays itself.

        This costs a step nothing; to ask every state where it lies takes longer than all the rest.
        """
        freed = self._freed = []
        self._memory = [weakref.ref(tensor.untyped_storage(), freed.append) for tensor in tensors]

    def holds(self, inner: Optimizer, members: Members) -> bool:
        """Whether the same parameters step and everything still lies where it lay."""
        return (
            not self._freed
            and self._state is inner.state
            and (members.kind is self._kind or self._are_ours(members))
            and self._weights.holds(self._params)
            and list(map(Tensor.data_ptr, self._params)) == self._addresses
            and self._holds_states()
            and list(map(_version, self._full)) == self._versions
        )

    def _are_ours(self, members: Members) -> bool:
        params, dtypes = members.params, list(map(_dtype, members.grads))
        same = len(params) == len(self._params) and all(map(is_, params, self._params))
        if not same or dtypes != self._grad_dtypes:
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

    def touched(self, store: MasterStore) -> None:
        """Kernels write behind autograd's back: tell it, as an operation in place would."""
        torch.autograd.graph.increment_version(self._params)
        store.written(self._full)
        self._versions = list(map(_version, self._full))


@dataclass(frozen=True)
class Prepared:
    """A step that has been replayed and not yet run."""

    plan: Plan
    members: Members
    recordings: list[Recording]

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
            if scale_key(name) in entry:
                value = decode(value, entry.pop(scale_key(name)))
            entry[name] = torch.empty_like(param, dtype=value.dtype).copy_(value)


def hold(
    entry: Entry,
    tensors: dict[str, Tensor],
    param: Tensor,
    dtypes: dict[str, torch.dtype],
    after: RuleState,
) -> list[tuple[Entry, str]]:
    """Make a parameter's tensors ready for a program; names those of its entry that are new."""
    made: list[tuple[Entry, str]] = []
    for name, shape in after.reduced.items():
        if name not in tensors:
            tensors[name] = entry[name] = torch.zeros(shape, device=param.device)
            made.append((entry, name))
    for name in (name for name in after.elements if name not in tensors):
        tensors[name] = torch.empty_like(param, dtype=torch.float32, requires_grad=False)
        if "[" not in name:
            entry[name] = tensors[name]
            made.append((entry, name))
        if dtypes.get(name, torch.float32) != torch.float32:
            tensors[name].zero_()
    for name, dtype in dtypes.items():
        if tensors[name].dtype != dtype or (scale_key(name) in entry) != (dtype in TOP):
            plain = decode(tensors[name], entry.pop(scale_key(name), None))
            tensors[name], scales = encode(plain, dtype)
            entry[name] = tensors[name]
            if scales is not None:
                entry[scale_key(name)] = scales
    return made


def stored(
    layout: Layout, param: Tensor, entry: Entry, tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """A parameter's tensors by the columns of a layout."""
    known = {WEIGHT: param.detach(), **tensors}
    return {c: known[c] if c in known else entry[c] for c in columns(layout)}
