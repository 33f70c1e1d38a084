"""The fused part of an optimizer's step: which parameters take it, and what each step does.

    plan      cohorts of parameters, launches over their tensors; kept while nothing moved
    replay    the rule's probe gives this step's scalars, one replay a cohort
    launch    one kernel for all tensors of a program and a layout
    count     step counts and the like move on, in the state and in the groups

Where the device alone knows whether gradients were finite, counting is on trust: the kernel leaves
everything as it is, and before the next step the host reads the flag, which has long been there,
and takes the counting back (`settle`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from mixprec.optimizer import state_formats
from mixprec.optimizer.fused.cohorts import (
    Cohort,
    Entry,
    Member,
    counts_on_host,
    form_cohorts,
    shown,
)
from mixprec.optimizer.fused.eligible import Fused, FusedGroups
from mixprec.optimizer.fused.held import HeldStates
from mixprec.optimizer.fused.kernels.emit import Layout
from mixprec.optimizer.fused.members import NOBODY, Members
from mixprec.optimizer.fused.pending import Flag, Pending, change
from mixprec.optimizer.fused.plan import Batch, Plan, Prepared, hold, same_strides, stored
from mixprec.optimizer.fused.recording.probe import Recording
from mixprec.optimizer.fused.recording.recorder import NotFusible
from mixprec.optimizer.masters import MasterStore
from mixprec.optimizer.state_formats import StateFormat, StateFormats, format_of

__all__ = ["FusedStep"]


class FusedStep:
    """What is stepped by programs, and how; see `FusedGroups` for the arguments."""

    def __init__(
        self, inner: Optimizer, store: MasterStore, fused: Fused, formats: StateFormats
    ) -> None:
        self._inner, self._store = inner, store
        self.held = HeldStates(inner, formats)
        self.groups = FusedGroups(inner, store, fused, formats, self.held)
        self._kept_plan: tuple[Plan, tuple[int, int]] | None = None
        self._pending: Pending | None = None
        self._captured: tuple[Plan, Tensor | None] | None = None
        self.written = ""
        """A number that parameters share and somebody has written in place, until it was said."""
        self.skipped = False
        """Whether the device has skipped a step since somebody set this to False."""
        self.skips_in_a_row = 0
        """As far as the host has heard; windows of padding count too."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Programs, plans and tables are made anew; whoever copies says `adopt`.
        return FusedStep, (self._inner, self._store, self.groups.fused, self.groups.formats)

    def adopt(self, params: Iterable[Tensor]) -> None:
        """Take over the state of these parameters, which was loaded or copied."""
        self._pending = self._plan = self._captured = None
        self.held.adopt(params)

    @property
    def _plan(self) -> Plan | None:
        """The plan of the last step, if probes and states are those that it was made from."""
        plan, made_at = self._kept_plan or (None, None)
        return plan if made_at == (self.groups.choices, self.held.releases) else None

    @_plan.setter
    def _plan(self, plan: Plan | None) -> None:
        made_at = self.groups.choices, self.held.releases
        self._kept_plan = None if plan is None else (plan, made_at)

    # ---------------------------------------- a step

    def prepare(
        self, members: Members, check: Callable[[Iterable[Tensor]], None], pending: Pending
    ) -> Prepared:
        """This step's replays; `check` is given the parameters where they are new or have moved.

        `pending` hears of every change before it is made, here and in what follows.

        When it raises NotFusible, no parameter has changed, and `split` gives a group fewer.
        """
        plan = self._plan
        if members.capturing:  # rules check for a capture, and their numbers come later
            ready = plan is not None and plan.programs is not None and not plan.fresh
            if plan is None or not ready or not plan.holds(self._inner, members):
                raise RuntimeError(
                    "step() is captured into a CUDA graph before its states and kernels were made. "
                    "Take three steps first, on a side stream, and leave parameters in place."
                )
            return Prepared(plan, members, [], pending)
        if plan is None or not plan.holds(self._inner, members):
            check(members.params)
            plan = self._plan = self._planned(members, pending)
        for cohort in plan.cohorts:
            self.written = cohort.written() or self.written
        recordings: list[Recording] = []
        for cohort in plan.cohorts:
            try:
                recordings.append(cohort.probe.step(cohort.state))
            except NotFusible as error:
                self.groups.give_up(cohort.index, str(error))
            program = recordings[-1].program
            if program not in self.groups.found(cohort.index).programs:
                self.groups.admit_again(cohort.index, program)
                return self.prepare(members, check, pending)
        if not _keep_signs(plan, recordings):
            plan.programs = ()  # states that are stored without a sign get one
        return Prepared(plan, members, recordings, pending)

    def make_ready(
        self, prepared: Prepared, factor: Tensor | None, found_inf: Tensor | None
    ) -> None:
        """All that may fail: states, tables, kernels, gradients in the right order of elements."""
        plan, recordings = prepared.plan, prepared.recordings
        if not prepared.members.capturing:
            if plan.programs != prepared.programs:
                prepared.pending.keep(self._inner.state, self._store, prepared.members.params)
                plan.fresh = self._make_launches(plan, recordings, prepared.members)
            for batch in plan.batches:
                batch.set_scalars(recordings)
        for batch in plan.batches:
            batch.make_ready(prepared.members, factor, found_inf)

    def run(
        self,
        prepared: Prepared,
        found_inf: Tensor | None,
        ran: Collection[int] = (),
    ) -> None:
        """Count and launch. `ran` names the groups that the rule itself has counted already.

        Launches come last: what is on the host can be taken back, and they cannot.
        """
        plan, members, pending = prepared.plan, prepared.members, prepared.pending
        if not members.capturing:
            # On its way before the kernels: whoever reads it later need not wait for them.
            pending.flag = None if found_inf is None else Flag(found_inf)
            self._count(prepared, ran)
            plan.touched(members.params)
            self._pending = pending if found_inf is not None else None
        for batch in plan.batches:
            batch.run(pending)
        if members.capturing:  # nothing happens and nothing is counted until it is replayed
            self._captured = plan, found_inf
        pending.finished = True

    def take_back(self, pending: Pending) -> str:
        """Undo what a step that was stopped has changed; says what is half done."""
        if self._pending is pending:
            self._pending = None
        if pending.begun:
            return "kernels were writing to parameters and states"
        pending.undo(cast(dict[Any, Any], self._inner.state), self._store)
        self._plan = None
        self.groups.share_out_anew()
        return ""

    def prepare_replay(self, pending: Pending) -> None:
        """Give a captured step the numbers of the step that it is about to be; count it."""
        if self._captured is None:
            raise RuntimeError(
                "prepare_replay() without a captured step: call step() inside of "
                "torch.cuda.graph(...) first, with every parameter fused."
            )
        plan, found_inf = self._captured
        recordings: list[Recording] = []
        with suppress(NotFusible):
            if self.groups.is_current():
                recordings = [cohort.probe.step(cohort.state) for cohort in plan.cohorts]
        prepared = Prepared(plan, NOBODY, recordings, pending)
        if prepared.programs != plan.programs or not _keep_signs(plan, recordings):
            raise RuntimeError(
                "the captured step is no longer what the rule does: it took another branch (the "
                "end of RAdam's warm-up, an option that became 0). Capture the step again."
            )
        for batch in plan.batches:
            batch.set_scalars(recordings)
        self._count(prepared, ())
        plan.touched(plan.watch.tensors())
        if found_inf is not None:
            pending.flag = Flag(found_inf, late=True)
            self._pending = pending

    def _count(self, prepared: Prepared, ran: Collection[int]) -> None:
        state, pending = cast(dict[Any, Any], self._inner.state), prepared.pending
        pending.keep_numbers(prepared.plan.cohorts)
        changes: list[tuple[str, dict[Any, Any], Mapping[Any, Any]]] = []
        for cohort, recording in zip(prepared.plan.cohorts, prepared.recordings, strict=True):
            cohort.set_state(recording.state)
            group = self._inner.param_groups[cohort.index]
            changes.append((f"param_groups[{cohort.index}]", group, recording.group))
            changes.append(("state", state, recording.shared))
            changes.append(("optimizer", vars(self._inner), recording.attributes))
        done = [f"param_groups[{index}]" for index in ran]
        done += ["state", "optimizer"] if ran else []
        for where, values, new in changes:
            change(where, values, new, pending, counted=where in done)
            done.append(where)

    @property
    def is_awaited(self) -> bool:
        """Whether `settle` will hear from the device what became of the last step."""
        return self._pending is not None

    def settle(self) -> None:
        """Take the counting of the last step back if the device skipped it."""
        pending, self._pending = self._pending, None
        if pending is None or pending.flag is None:
            return
        if not pending.flag.read():
            self.skips_in_a_row = 0
            return
        self.skips_in_a_row += 1
        self.skipped = True
        if pending.undo(cast(dict[Any, Any], self._inner.state), self._store):
            self._plan = None

    # ---------------------------------------- planning

    def _planned(self, members: Members, pending: Pending) -> Plan:
        state = cast(dict[Tensor, Entry], self._inner.state)
        pending.keep(state, self._store, members.params)
        for index, param in members.pairs:
            if self._store.has(param):
                self._store.put(state, param, self._store.current(state, param))
            same_strides(state[param], param)
            self.groups.probe(index, param)
        found = [
            self._member(index, place, param, state[param])
            for place, (index, param) in enumerate(members.pairs)
        ]
        resting = self.held.resting(members.params)
        self.held.take(members.params)
        return Plan(self._inner, form_cohorts(found, resting), members)

    def _member(self, index: int, place: int, param: Tensor, entry: Entry) -> Member:
        admission = self.groups.found(index)
        counts_on_host(entry, admission.state_of(shown(entry, self.groups.formats), param))
        state = admission.state_of(shown(entry, self.groups.formats), param)
        return Member(index, place, entry, self.groups.probe(index, param), state)

    def _make_launches(self, plan: Plan, recordings: Sequence[Recording], members: Members) -> bool:
        """Launches for the programs of this step; says whether it had to make states."""
        made: list[str] = []
        batches: dict[Any, Batch] = {}
        for number, (cohort, recording) in enumerate(zip(plan.cohorts, recordings, strict=True)):
            dtypes = self._stored_dtypes(cohort, recording)
            program = recording.program
            for member, place in enumerate(cohort.places):
                param = members.params[place]
                entry, tensors = cohort.entries[member], cohort.tensors[member]
                made += hold(entry, tensors, param, dtypes, recording.state)
                layout = self._layout(param, entry, tensors, dtypes, program.reduced)
                batch = batches.setdefault((program, layout, param.device), Batch(program, layout))
                batch.add(number, place, entry, stored(layout, param, entry, tensors))
        programs = tuple(recording.program for recording in recordings)
        plan.adopt(list(batches.values()), programs, members.params)
        return bool(made)

    def _stored_dtypes(self, cohort: Cohort, recording: Recording) -> dict[str, torch.dtype]:
        """How the states of a cohort's program are stored, in the order of its state."""
        program = recording.program
        used = {*program.reads, *program.writes}
        names = [name for name in recording.state.elements if name in used]
        asked: dict[str, StateFormat] = {
            name: "fp32" if "[" in name else format_of(name, self.groups.formats) for name in names
        }
        positive: frozenset[str] = frozenset()
        if "int8" in asked.values():
            positive = self.groups.non_negative(cohort, recording)
        return {
            name: state_formats.stored_dtype(asked[name], non_negative=name in positive)
            for name in names
        }

    def _layout(
        self,
        param: Tensor,
        entry: Entry,
        tensors: dict[str, Tensor],
        dtypes: dict[str, torch.dtype],
        reduced: tuple[str, ...],
    ) -> Layout:
        assert param.grad is not None
        layout = Layout(
            param.dtype,
            self._store.storage(param),
            param.grad.dtype,
            tuple(dtypes.items()),
            reduced=reduced,
        )
        held = stored(layout, param, entry, tensors)
        where = (tensor.data_ptr() for name, tensor in held.items() if name not in reduced)
        return replace(layout, aligned=all(address % 16 == 0 for address in where))


def _keep_signs(plan: Plan, recordings: Sequence[Recording]) -> bool:
    """Whether states that are stored without a sign need none after this step either."""
    pairs = zip(plan.cohorts, recordings, strict=True)
    return all(cohort.keeps_signs(found.program, found.scalars) for cohort, found in pairs)
