"""Which parameters of an optimizer are stepped by programs, and why others are not."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor
from torch.optim import Optimizer

from mixprec import state_formats
from mixprec.admission import undisturbed
from mixprec.devices import has_triton
from mixprec.fused.admission import FusedAdmission, admit_fused
from mixprec.fused.alike import step_alike
from mixprec.fused.dispatch import NotFusible
from mixprec.fused.launch import is_dense
from mixprec.fused.members import NOBODY, Candidates, Members
from mixprec.fused.program import GRAD, Program
from mixprec.fused.record import Probe
from mixprec.fused.triton_emit import Layout, source
from mixprec.masters import LOW, MASTER, MasterStore
from mixprec.state_formats import StateFormats, format_of

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
    """

    def __init__(
        self, inner: Optimizer, store: MasterStore, fused: Fused, formats: StateFormats
    ) -> None:
        self._inner, self._store = inner, store
        self.fused: Fused = fused
        self.formats: StateFormats = formats
        self._admissions: dict[int, FusedAdmission] = {}
        self._probes: dict[tuple[int, Any], Probe] = {}
        self._ignores_loss: dict[int, bool] = {}
        self._candidates: dict[bool, Candidates] = {}
        """By whether the step has a loss to give to the rule."""

    def release(self, params: Iterable[Tensor] | None = None) -> None:
        """Leave these parameters' state as the rule itself keeps it: it is about to run on them."""
        raise NotImplementedError

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
            if not any(map(self._takes, self._inner.param_groups[index]["params"])):
                return None
            self._admit(index)
        return self._admissions[index]

    def _admit(self, index: int) -> FusedAdmission:
        self.release(self._inner.param_groups[index]["params"])  # a trial begins from FP32 states
        found = admit_fused(self._inner, index)
        if not found.fusible and (self.fused is True or self.formats is not None):
            self._refuse(found.reason)
        if found.fusible:
            names = {n for program in found.programs for n in program.writes if n != MASTER}
            state_formats.check_names(self.formats, sorted(names), type(self._inner).__name__)
        self._admissions[index] = found
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
        found = self.admission(index)
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
        known = self._candidates.get(with_loss)
        if known is None or known.deferred or not known.are_of(groups):
            fused = self._fused_of(groups, with_loss)
            ready = [(index, param) for index, param in fused if self._is_ready(index, param)]
            known = Candidates(groups, ready, deferred=len(ready) < len(fused))
            self._candidates[with_loss] = known
        return known.stepping()

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
            if not with_loss or self._is_loss_ignored(index, chosen[0]):
                found += [(index, param) for param in chosen]
        return found

    def _is_loss_ignored(self, index: int, like: Tensor) -> bool:
        """Whether a rule does the same whatever loss its closure returns."""
        if index not in self._ignores_loss:
            admission = self._admissions[index]
            probe, without = (admission.probe(self._inner, index, like) for _ in range(2))
            rule, losses = probe._rule, iter(range(1, 10))
            probe._rule = lambda twin: rule(twin, lambda: torch.tensor(float(next(losses))))
            with undisturbed(self._inner):
                self._ignores_loss[index] = step_alike(without, probe)
        return self._ignores_loss[index]

    def _admit_again(self, index: int, program: Program) -> None:
        """A group does what it did not do when it was tried: an option was changed, say."""
        found = self._admit(index)
        if not found.fusible:
            self._give_up(index, found.reason)
        if program not in found.programs:
            self._give_up(index, "no trial step took the branch it takes now")

    def _give_up(self, index: int, reason: str) -> NoReturn:
        """Leave a group to the rule itself from now on; the step at hand has to be shared out anew.

        Raises:
            NotFusible: when `split` will give no parameter of this group any more.
            TypeError: if that was ruled out.
        """
        if self.fused is True or self.formats is not None:
            self._refuse(reason)
        self.release(self._inner.param_groups[index]["params"])
        self._admissions[index] = FusedAdmission(False, reason)
        self._candidates.clear()
        raise NotFusible(reason)

    def reset(self) -> None:
        """Forget what was found of groups and of memory: they have changed."""
        self._candidates.clear()
        self._admissions.clear()
        self._probes.clear()
        self._ignores_loss.clear()

    def _probe(self, index: int, param: Tensor) -> Probe:
        admission = self._admissions[index]
        key = (index, admission.kind_of(param))
        if key not in self._probes:
            self._probes[key] = admission.probe(self._inner, index, param)
        return self._probes[key]

    def _merge_kinds(self) -> None:
        """Let kinds of parameters that a rule steps alike share a probe."""
        by_index: dict[int, dict[Any, Probe]] = {}
        for (index, kind), probe in self._probes.items():
            by_index.setdefault(index, {})[kind] = probe
        for index, probes in by_index.items():
            first = next(iter(probes.values()))
            for kind, probe in probes.items():
                if probe is not first and step_alike(first, probe):
                    self._probes[index, kind] = first
