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
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from mixprec import state_formats
from mixprec.fused.alike import first_steps
from mixprec.fused.cohorts import (
    Cohort,
    Entry,
    Member,
    counts_on_host,
    decoded,
    form_cohorts,
    shown,
)
from mixprec.fused.dispatch import NotFusible
from mixprec.fused.groups import Fused, FusedGroups
from mixprec.fused.members import NOBODY, Members
from mixprec.fused.pending import Flag, Pending, change
from mixprec.fused.plan import Batch, Plan, Prepared, hold, same_strides, stored
from mixprec.fused.record import Recording
from mixprec.fused.signs import non_negative_states
from mixprec.fused.triton_emit import Layout
from mixprec.masters import MasterStore
from mixprec.state_formats import StateFormat, StateFormats, format_of

__all__ = ["FusedStep"]


class FusedStep(FusedGroups):
    """What is stepped by programs, and how; see `FusedGroups` for the arguments."""

    def __init__(
        self, inner: Optimizer, store: MasterStore, fused: Fused, formats: StateFormats
    ) -> None:
        super().__init__(inner, store, fused, formats)
        self._held: set[Tensor] = set()
        """Parameters whose state is not as the rule itself would keep it."""
        self._plan: Plan | None = None
        self._pending: Pending | None = None
        self._captured: tuple[Plan, Tensor | None] | None = None
        self.skipped = False
        """Whether the device has skipped a step since somebody set this to False."""
        self.skips_in_a_row = 0
        """As far as the host has heard; windows of padding count too."""

    def reset(self) -> None:
        super().reset()
        self._plan = None

    def adopt(self, params: Iterable[Tensor]) -> None:
        """Take over the state of these parameters, which was loaded or copied."""
        self._pending = self._plan = self._captured = None
        self._held = {param for param in params if param in self._inner.state}

    # ---------------------------------------- a step

    def prepare(self, members: Members, check: Callable[[Iterable[Tensor]], None]) -> Prepared:
        """This step's replays; `check` is given the parameters where they are new or have moved.

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
            return Prepared(plan, members, [])
        if plan is None or not plan.holds(self._inner, members):
            check(members.params)
            plan = self._plan = self._planned(members)
        recordings: list[Recording] = []
        for cohort in plan.cohorts:
            try:
                recordings.append(cohort.probe.step(cohort.state))
            except NotFusible as error:
                self._give_up(cohort.index, str(error))
            program = recordings[-1].program
            if program not in self._admissions[cohort.index].programs:
                self._admit_again(cohort.index, program)
                return self.prepare(members, check)
        return Prepared(plan, members, recordings)

    def run(
        self,
        prepared: Prepared,
        factor: Tensor | None,
        found_inf: Tensor | None,
        ran: Collection[int] = (),
    ) -> None:
        """Launch and count. `ran` names the groups that the rule itself has counted already."""
        plan, recordings = prepared.plan, prepared.recordings
        if prepared.members.capturing:
            self._capture(prepared, factor, found_inf)
            return
        pending = Pending(plan) if found_inf is not None else None
        # On its way before the kernels: whoever reads it later need not wait for them.
        flag = None if found_inf is None else Flag(found_inf)
        if plan.programs != prepared.programs:
            made = self._make_launches(plan, recordings)
            plan.fresh = bool(made)
            if pending is not None:
                pending.made = made
        for batch in plan.batches:
            batch.set_scalars(recordings)
            batch.run(prepared.members, factor, found_inf)
        self._count(prepared, pending, ran)
        plan.touched(self._store)
        if pending is not None:
            pending.flag = flag
            self._pending = pending

    def _capture(self, prepared: Prepared, factor: Tensor | None, found_inf: Tensor | None) -> None:
        """Record the launches; nothing happens and nothing is counted until they are replayed."""
        for batch in prepared.plan.batches:
            batch.run(prepared.members, factor, found_inf)
        self._captured = prepared.plan, found_inf

    def prepare_replay(self) -> None:
        """Give a captured step the numbers of the step that it is about to be; count it."""
        if self._captured is None:
            raise RuntimeError(
                "prepare_replay() without a captured step: call step() inside of "
                "torch.cuda.graph(...) first, with every parameter fused."
            )
        self.settle()
        plan, found_inf = self._captured
        try:
            recordings = [cohort.probe.step(cohort.state) for cohort in plan.cohorts]
        except NotFusible:
            recordings = []
        prepared = Prepared(plan, NOBODY, recordings)
        if prepared.programs != plan.programs:
            raise RuntimeError(
                "the captured step is no longer what the rule does: it took another branch (the "
                "end of RAdam's warm-up, an option that became 0). Capture the step again."
            )
        pending = Pending(plan) if found_inf is not None else None
        for batch in plan.batches:
            batch.set_scalars(recordings)
        self._count(prepared, pending, ())
        plan.touched(self._store)
        if pending is not None and found_inf is not None:
            pending.flag = Flag(found_inf, late=True)
            self._pending = pending

    def _count(self, prepared: Prepared, pending: Pending | None, ran: Collection[int]) -> None:
        state = cast(dict[Any, Any], self._inner.state)
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

    # ---------------------------------------- leaving

    def release(self, params: Iterable[Tensor] | None = None) -> None:
        """Leave these parameters' state as the rule itself keeps it: it is about to run on them."""
        chosen = list(self._held) if params is None else [p for p in params if p in self._held]
        if not chosen:
            return
        self._plan = None
        group_of = {p: group for group in self._inner.param_groups for p in group["params"]}
        for param in chosen:
            self._held.discard(param)
            entry = self._inner.state.get(param)
            if entry is not None:
                plain = self.decoded(entry, param)
                entry.clear()
                entry.update(plain)
                _place_step(entry, param, group_of.get(param, {}))

    def decoded(self, entry: Entry, param: Tensor) -> Entry:
        """An entry as the rule itself would keep it, see `cohorts.decoded`."""
        bf16 = [n for n in entry if format_of(n, self.formats) == "bf16"] if self.formats else []
        return decoded(entry, param, bf16)

    # ---------------------------------------- planning

    def _planned(self, members: Members) -> Plan:
        state = cast(dict[Tensor, Entry], self._inner.state)
        origins: dict[Tensor, str] = {}
        for index, param in members.pairs:
            origins[param] = "state" if state.get(param) else "new"
            if self._store.has(param):
                origins[param] = self._store.origin(state, param)
                self._store.put(state, param, self._store.take(state, param))
            same_strides(state[param], param)
            self._probe(index, param)
        self._merge_kinds()
        found = [self._member(index, param, state[param]) for index, param in members.pairs]
        stepping = set(members.params)
        resting = [state[p] for p in self._held - stepping if p in state]
        self._held |= stepping
        return Plan(self._inner, form_cohorts(found, resting), members, origins)

    def _member(self, index: int, param: Tensor, entry: Entry) -> Member:
        admission = self._admissions[index]
        counts_on_host(entry, admission.state_of(shown(entry), param))
        state = admission.state_of(shown(entry), param)
        return Member(index, param, entry, self._probe(index, param), state)

    def _make_launches(
        self, plan: Plan, recordings: Sequence[Recording]
    ) -> list[tuple[Entry, str]]:
        """Launches for the programs of this step; names the states that it had to make."""
        made: list[tuple[Entry, str]] = []
        batches: dict[Any, Batch] = {}
        for number, (cohort, recording) in enumerate(zip(plan.cohorts, recordings, strict=True)):
            dtypes = self._stored_dtypes(cohort, recording)
            program = recording.program
            for place, param in enumerate(cohort.params):
                entry, tensors = cohort.entries[place], cohort.tensors[place]
                made += hold(entry, tensors, param, dtypes, recording.state)
                layout = self._layout(param, entry, tensors, dtypes, program.reduced)
                batch = batches.setdefault((program, layout, param.device), Batch(program, layout))
                batch.add(number, param, stored(layout, param, entry, tensors))
        plan.adopt(list(batches.values()), tuple(r.program for r in recordings))
        return made

    def _stored_dtypes(self, cohort: Cohort, recording: Recording) -> dict[str, torch.dtype]:
        """How the states of a cohort's program are stored, in the order of its state."""
        program = recording.program
        used = {*program.reads, *program.writes}
        names = [name for name in recording.state.elements if name in used]
        asked: dict[str, StateFormat] = {
            name: "fp32" if "[" in name else format_of(name, self.formats) for name in names
        }
        positive: frozenset[str] = frozenset()
        if "int8" in asked.values():
            # From its first step on, and from where it is now.
            steps = [(r.program, r.scalars) for r in first_steps(cohort.probe, 4)]
            positive = non_negative_states([*steps, (program, recording.scalars)])
            positive -= {n for n in positive if any(_negative(t, n) for t in cohort.tensors)}
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


def _negative(tensors: dict[str, Tensor], name: str) -> bool:
    """Whether a state holds a negative number already; read once, when it is first encoded."""
    value = tensors.get(name)
    return value is not None and value.dtype != torch.uint8 and bool((value < 0).any())


def _place_step(entry: Entry, param: Tensor, group: dict[str, Any]) -> None:
    """Torch's rules want the step count beside the parameter if fused or capturable."""
    step = entry.get("step")
    if isinstance(step, Tensor) and (group.get("fused") or group.get("capturable")):
        entry["step"] = step.to(param.device)
