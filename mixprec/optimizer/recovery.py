"""All or nothing: what a step that was stopped has changed is taken back, or brought to its end.

Whoever is called next begins with `settle`: of a step that was stopped while it was being undone,
and of one that a device has skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from mixprec.optimizer.checks import ParamChecks
from mixprec.optimizer.fused.step import FusedStep
from mixprec.optimizer.judging.scaled_grads import ScaledGrads
from mixprec.optimizer.reports.outcome import Outcome
from mixprec.optimizer.rule.admission import quote
from mixprec.optimizer.setup import Setup
from mixprec.optimizer.undo import Leaving, StepUndo

__all__ = ["Recovery"]

_Result = TypeVar("_Result")


class Recovery:
    """The step at hand, and what is known of one that was stopped.

    Args:
        setup: the optimizer's parameters and settings.
        fused: takes back what it has changed.
        outcome: takes back what it has counted, and concludes a step that is brought to its end.
        scaled: the FP32 gradients of the step at hand.
        parts: all objects that a step changes small things of: flags, numbers, texts.
        check: whether a first step is at hand.
    """

    def __init__(
        self,
        setup: Setup,
        fused: FusedStep,
        outcome: Outcome,
        scaled: ScaledGrads,
        parts: Sequence[object],
        check: ParamChecks,
    ) -> None:
        self._setup, self._fused, self._outcome, self._scaled = setup, fused, outcome, scaled
        self._parts, self._check = parts, check
        self._undo: StepUndo | Leaving | None = None
        """What the step at hand changes; of one that was stopped until somebody settles it."""
        self.runs = False
        """Whether a step is at hand, in which nobody may settle it."""
        self._broken = ""
        """What an unfinished step has left half done."""

    @property
    def record(self) -> StepUndo:
        """Of the step at hand."""
        assert isinstance(self._undo, StepUndo), "run() makes it"
        return self._undo

    def run(self, call: Callable[[], _Result]) -> _Result:
        """`call`, with what it changes taken back if anything stops it."""
        first = not self._check.checked
        self._undo = StepUndo(self._setup, self._fused, self._outcome.counts, self._parts, first)
        self.runs = True
        try:
            result = call()
            self._undo = None
            return result
        except BaseException as error:
            if self._undo is not None:
                self._undo.error = quote(error)
            self._settle_undo()
            raise
        finally:
            self.runs = False

    def leave(self, leaving: Leaving) -> None:
        """Give the model its weights back, now or, if that is stopped, when somebody asks next."""
        self._undo = leaving
        leaving.restore_data()
        self._settle_undo()

    def settle(self) -> None:
        """Before anything else: the end of what was stopped, and of what the device has skipped."""
        self._settle_undo()
        self._fused.settle()

    def _settle_undo(self) -> None:
        undo = self._undo
        if undo is None:
            return
        broken = undo.settle()
        if undo.moved and undo.verdict is not None:
            self._outcome.conclude(undo.verdict)
            self._scaled.forget()
        self._broken = broken or self._broken
        self._undo = None

    def check_finished(self, call: str) -> None:
        """Refuse to go on from weights, masters and states of two steps."""
        if self._broken:
            raise RuntimeError(
                f"{call} after an unfinished step: {self._broken} Weights, masters and states "
                f"may be of two steps. Load a checkpoint of the model and of this optimizer; or "
                f"call adopt_params() to go on from what is there."
            )

    def accept(self) -> None:
        """What is there is what training goes on from."""
        self._broken = ""

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k != "_undo"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _undo=None)
