"""Which parameters of an optimizer are stepped by programs, and why others are not."""

from __future__ import annotations

from typing import Any, Literal, NoReturn

import torch
from torch import Tensor
from torch.optim import Optimizer

from mixprec.devices import has_triton
from mixprec.machine_errors import is_of_the_machine
from mixprec.optimizer import state_formats
from mixprec.optimizer.fused.cohorts import Cohort, shown
from mixprec.optimizer.fused.held import HeldStates
from mixprec.optimizer.fused.kernels.emit import Layout, source
from mixprec.optimizer.fused.kernels.launch import is_dense
from mixprec.optimizer.fused.members import NOBODY, Candidates, Members
from mixprec.optimizer.fused.program.program import GRAD, Program
from mixprec.optimizer.fused.program.signs import non_negative_levels
from mixprec.optimizer.fused.recording.kinds import Kinds
from mixprec.optimizer.fused.recording.probe import Probe, Recording, RuleState
from mixprec.optimizer.fused.recording.recorder import NotFusible
from mixprec.optimizer.fused.self_check import FusedAdmission, admit_fused
from mixprec.optimizer.masters import LOW, MASTER, MasterStore
from mixprec.optimizer.rule.code import code_of
from mixprec.optimizer.rule.copies import by_value
from mixprec.optimizer.state_formats import StateFormats, format_of

Fused = Literal["auto"] | bool

__all__ = ["Fused", "FusedGroups"]


class FusedGroups:
    """Which parameters of `inner` are stepped by programs, why, and by which probes.

    Args:
        inner: the optimizer, whose groups and state are used as they are.
        store: its masters.
        fused: "auto" takes 16-bit parameters where kernels run, or where `formats` asks for it;
            True takes all that can be taken, everywhere; False none.
        formats: how states are stored.
        held: states that are not as the rule keeps them.
    """

    def __init__(
        self,
        inner: Optimizer,
        store: MasterStore,
        fused: Fused,
        formats: StateFormats,
        held: HeldStates,
    ) -> None:
        self._inner, self._store, self._held = inner, store, held
        self.fused: Fused = fused
        self.formats: StateFormats = formats
        self._admissions: dict[int, FusedAdmission] = {}
        self._probes: dict[tuple[int, Any], Probe] = {}
        self._seen = list(map(id, inner.param_groups))
        """Groups that were looked at last, which nothing here keeps alive."""
        self._kinds: Kinds | None = None
        self._marks: list[tuple[dict[str, Any], Any]] = []
        """What users set on parameters, and what it was when their probes were chosen."""
        self._uses_loss: set[int] = set()
        self._given_loss = False
        self._candidates: dict[bool, Candidates] = {}
        """By whether the step has a loss to give to the rule."""
        self.choices = 0
        """How often probes were chosen anew; a plan that was made before does not hold."""

    @property
    def kinds(self) -> Kinds:
        """What the rule's code could ask of parameters."""
        if self._kinds is None:
            self._kinds = Kinds(code_of(self._inner))
        return self._kinds

    def is_current(self) -> bool:
        """Whether the rule's code, and the marks on parameters that it may read, are as they were
        when probes were chosen."""
        if self._kinds is None:
            return True
        return self._kinds.code.holds() and all(
            not (marks or known) or by_value(self._kinds.marks_in(marks)) == known
            for marks, known in self._marks
        )

    def _takes(self, param: Tensor) -> bool:
        """Whether this parameter is stepped here, if its group's rule can be."""
        if self.fused is False or param.ndim == 0 or not is_dense(param):
            return False
        if param.dtype in LOW:
            wanted = self.fused is True or self.formats is not None
            return wanted or (param.is_cuda and has_triton())
        return param.dtype == torch.float32 and self.fused is True

    def admission(self, index: int) -> FusedAdmission | None:
        """Whether a group's rule runs as programs; None if none of its parameters asks for it."""
        if index not in self._admissions:
            if not self._asks(index):
                return None
            self._admit(index)
        return self._admissions[index]

    def _asks(self, index: int) -> bool:
        """Whether a parameter of a group wants to be fused. One in FP64 that has to be cannot."""
        params: list[Tensor] = self._inner.param_groups[index]["params"]
        has_to = self.fused is True
        return any(self._takes(p) or (has_to and p.dtype == torch.float64) for p in params)

    def _admit(self, index: int) -> FusedAdmission:
        # A trial begins from FP32 states.
        self._held.release(self._inner.param_groups[index]["params"])
        found = self._admissions[index] = self._try(index)
        return found

    def considered(self, index: int) -> FusedAdmission | None:
        """What `admission` would find now, for whoever asks without a step: nothing is kept."""
        if index in self._admissions:
            return self._admissions[index]
        if not self._asks(index):
            return None
        with self._held.shown_plainly(self._inner.param_groups[index]["params"]):
            return self._try(index)

    def recorded(self, index: int) -> FusedAdmission:
        """What a group's rule is as programs, whatever runs it; nothing is kept."""
        with self._held.shown_plainly(self._inner.param_groups[index]["params"]):
            return admit_fused(self._inner, index)

    def _try(self, index: int) -> FusedAdmission:
        found = admit_fused(self._inner, index, self.formats, self.kinds)
        if not found.fusible and (self.fused is True or self.formats is not None):
            self._refuse(found.reason)
        if found.fusible:
            names = {n for program in found.programs for n in program.writes if n != MASTER}
            rule = type(self._inner).__name__
            state_formats.check_names(self.formats, sorted(names), rule)
            state_formats.check_keys(self.formats, found.keys, rule)
        return found

    def _refuse(self, reason: str) -> None:
        asked = "fused=True" if self.fused is True else f"state_formats={self.formats!r}"
        raise TypeError(
            f"{asked}, but {type(self._inner).__name__} cannot run as one kernel: {reason}. Use "
            f"fused='auto' and no state_formats, which runs it on FP32 masters, or an element-wise "
            f"rule such as AdamW."
        )

    def nobody(self, reason: str) -> tuple[Members, list[list[Tensor]]]:
        """All parameters left to the rule itself, which has to see them together."""
        if self.fused is True or self.formats is not None:
            self._refuse(reason)
        return NOBODY, [group["params"] for group in self._inner.param_groups]

    def why_not(self, index: int) -> str:
        """Why no parameter of a group asks to be fused."""
        params: list[Tensor] = self._inner.param_groups[index]["params"]
        low = [param for param in params if param.dtype in LOW]
        if self.fused is False:
            return "fused=False"
        if not low and self.fused is not True:
            return "FP32 parameters keep the bits of the rule; fused=True fuses them too"
        if not any(param.ndim and is_dense(param) for param in params):
            return "kernels take tensors of one dimension or more, without gaps in memory"
        return "kernels run on a GPU with Triton; fused=True runs the same program in plain torch"

    def source(self, index: int) -> str:
        """The kernels of a group's latest program, for the kind of its first parameter here."""
        found = self.considered(index)
        assert found is not None and found.fusible
        program = found.programs[-1]
        param = next(filter(self._takes, self._inner.param_groups[index]["params"]))
        named = (n for n in {*program.reads, *program.writes} - {MASTER, GRAD, *program.reduced})
        states = tuple((name, self._plain_dtype(name)) for name in sorted(named))
        storage = self._store.storage(param)
        layout = Layout(param.dtype, storage, param.dtype, states, reduced=program.reduced)
        return source(program, layout)

    def _plain_dtype(self, name: str) -> torch.dtype:
        """What a state is stored in, if it may have either sign."""
        return state_formats.stored_dtype(format_of(name, self.formats), non_negative=False)

    def means(self, index: int) -> str:
        """What runs a group's programs."""
        taken = filter(self._takes, self._inner.param_groups[index]["params"])
        on_gpu = has_triton() and all(param.is_cuda for param in taken)
        return "one kernel" if on_gpu else "plain torch"

    def split(self, *, with_loss: bool = False) -> tuple[Members, list[list[Tensor]]]:
        """The parameters that step here now, and for each group those left to the rule itself.

        `with_loss` says that the rule would be given the loss; a rule that uses it is left alone.
        """
        groups: list[list[Tensor]] = [group["params"] for group in self._inner.param_groups]
        if self.fused is False:
            return NOBODY, groups
        if not self._groups_hold():
            self.reset()
        elif not self.is_current():
            self._forget_probes()
        self._give_loss(with_loss)
        known = self._candidates.get(with_loss)
        if known is None or known.deferred or not known.are_of(groups):
            fused = self._fused_of(groups, with_loss)
            ready = [(index, param) for index, param in fused if self._is_ready(index, param)]
            known = Candidates(groups, ready, deferred=len(ready) < len(fused))
            self._candidates[with_loss] = known
        return known.stepping(groups)

    def _groups_hold(self) -> bool:
        """Whether groups are those that were admitted, each in its place."""
        before, self._seen = self._seen, list(map(id, self._inner.param_groups))
        return before == self._seen

    def _is_ready(self, index: int, param: Tensor) -> bool:
        """Whether a parameter may step here now; some rules take its first step themselves."""
        state = self._inner.state.get(param, ())
        return not self._admissions[index].first_eager or bool(set(state) - {MASTER})

    def _fused_of(self, groups: list[list[Tensor]], with_loss: bool) -> list[tuple[int, Tensor]]:
        found: list[tuple[int, Tensor]] = []
        for index, params in enumerate(groups):
            admission = self.admission(index)
            if admission is None or not admission.fusible:
                continue
            chosen = [param for param in params if self._takes(param)]
            if not with_loss or self._ignores_loss(index, chosen):
                found += [(index, param) for param in chosen]
        return found

    def _ignores_loss(self, index: int, params: list[Tensor]) -> bool:
        """Whether a rule does not look at the loss; each step asks again (`Probe.given_loss`)."""
        if params and index not in self._uses_loss:
            probe = self.probe(index, params[0])
            state = self._state_of(index, params[0])
            try:
                for _ in range(3):
                    state = probe.step(state).state
            except NotFusible as error:
                if self.fused is True or self.formats is not None:
                    self._refuse(str(error))
                self._uses_loss.add(index)
        return index not in self._uses_loss

    def _state_of(self, index: int, param: Tensor) -> RuleState:
        entry = shown(self._inner.state.get(param) or {}, self.formats)
        return self._admissions[index].state_of(entry, param)

    def _give_loss(self, with_loss: bool) -> None:
        """Say whether the next steps have a loss, which programs cannot use."""
        if with_loss != self._given_loss:
            self._given_loss = with_loss
            for probe in self._probes.values():
                probe.given_loss = with_loss

    def admit_again(self, index: int, program: Program) -> None:
        """A group does what it did not do when it was tried: an option was changed, say."""
        found = self._admit(index)
        if not found.fusible:
            self.give_up(index, found.reason)
        if program not in found.programs:
            self.give_up(index, "no trial step took the branch it takes now")

    def give_up(self, index: int, reason: str) -> NoReturn:
        """Leave a group to the rule itself from now on; the step at hand has to be shared out anew.

        Raises:
            NotFusible: when `split` will give no parameter of this group any more.
            TypeError: if that was ruled out.
        """
        if self.fused is True or self.formats is not None:
            self._refuse(reason)
        self._held.release(self._inner.param_groups[index]["params"])
        self._admissions[index] = FusedAdmission(False, reason)
        self._candidates.clear()
        raise NotFusible(reason)

    def found(self, index: int) -> FusedAdmission:
        """What the trial of a group that steps here has found."""
        return self._admissions[index]

    def share_out_anew(self) -> None:
        """Ask every parameter again whether it may step here."""
        self._candidates.clear()

    def reset(self) -> None:
        """Forget what was found of groups and of memory: they have changed."""
        self._candidates.clear()
        self._admissions.clear()
        self._forget_probes()

    def _forget_probes(self) -> None:
        self._probes.clear()
        self._uses_loss.clear()
        self._marks.clear()
        self._kinds = None
        self.choices += 1

    def probe(self, index: int, param: Tensor) -> Probe:
        """The probe of a parameter's kind."""
        if not self._takes(param):
            self._candidates.clear()
            raise NotFusible("a parameter has moved to where kernels do not reach")
        admission, kinds = self._admissions[index], self.kinds
        key = (index, kinds.kind_of(param, by_size=admission.by_size))
        if key not in self._probes:
            probe = self._probes[key] = admission.probe(self._inner, index, param, kinds)
            probe.given_loss, probe.in_use = self._given_loss, True
        if kinds.reads_marks:
            self._marks.append((vars(param), by_value(kinds.marks_in(vars(param)))))
        self._probes[key].serve(param)
        return self._probes[key]

    def non_negative(self, cohort: Cohort, recording: Recording) -> frozenset[str]:
        """The states of a cohort that need no sign: from its first step on, and where it is now.

        Reads what is about to be coded for the first time.
        """
        steps = [(r.program, r.scalars) for r in _first_steps(cohort.probe, 4)]
        steps.append((recording.program, recording.scalars))
        negative = self._admissions[cohort.index].negative
        levels = non_negative_levels(steps, negative)
        negative |= {name for name in levels if cohort.has_negative(name)}
        cohort.prove(non_negative_levels(steps, negative))
        return frozenset(cohort.non_negative)


def _first_steps(probe: Probe, count: int) -> list[Recording]:
    """Recordings of a rule's first steps, at its group's present values, as far as there are."""
    found: list[Recording] = []
    try:
        for _ in range(count):
            found.append(probe.step(found[-1].state if found else RuleState()))
    except Exception as error:
        if is_of_the_machine(error):
            raise
        # It may want a first step of its own, or a state made for it.
    return found
