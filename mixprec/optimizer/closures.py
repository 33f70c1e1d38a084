"""A step of a rule that evaluates its closure itself, perhaps several times (LBFGS, SAM).

Each evaluation runs the user's closure on the model as he knows it, weights up to date, and judges
the gradients that it leaves. The first one decides whether there is anything to step on.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from mixprec.gradients import nonfinite_names
from mixprec.optimizer.buckets import RuleCalls
from mixprec.optimizer.judging.grad_factor import complaint
from mixprec.optimizer.judging.judge import Judge
from mixprec.optimizer.judging.scaled_grads import ScaledGrads
from mixprec.optimizer.judging.verdict import Verdict, no_gradients
from mixprec.optimizer.reports.outcome import Outcome
from mixprec.optimizer.rule.stand_ins import rule_of
from mixprec.optimizer.setup import Setup
from mixprec.optimizer.undo import BareRun, StepUndo

__all__ = ["ClosureStep", "evaluate"]


def evaluate(closure: Callable[[], float], setup: Setup) -> float:
    """The loss of a closure, which has to scale what it differentiates if there is a scaler."""
    scaler = setup.loss_scaler
    before = scaler.losses_scaled if scaler is not None else -1
    with torch.enable_grad():
        loss = closure()
    if scaler is not None and scaler.losses_scaled == before:
        raise RuntimeError(
            "a loss scaler is set, but the closure differentiated a loss that it did not "
            "scale. In the closure call optimizer.loss_scaler.multiply(loss).backward(), "
            "then return the loss itself. Where a trainer made the closure and calls "
            "backward(), return the scaled loss from your training step."
        )
    return loss


class _Skipped(Exception):
    """Leaves a rule whose closure gave nothing to step with."""


class ClosureStep:
    """One step; made anew for each."""

    def __init__(
        self,
        setup: Setup,
        calls: RuleCalls,
        judge: Judge,
        outcome: Outcome,
        scaled: ScaledGrads,
        grad_factor: Tensor | float | None,
    ) -> None:
        self._setup, self._calls, self._judge = setup, calls, judge
        self._outcome, self._scaled, self._grad_factor = outcome, scaled, grad_factor
        self._verdicts: list[Verdict] = []
        self._losses: list[float] = []

    def __call__(
        self, closure: Callable[[], float] | None, undo: StepUndo
    ) -> tuple[float, Verdict]:
        """The loss, and what came of the last evaluation; `undo` hears of every change."""
        setup = self._setup
        inner = setup.inner
        if closure is None:
            raise TypeError(
                f"{type(inner).__name__} evaluates the loss itself: pass a closure that "
                f"clears gradients, computes the loss, calls backward and returns the loss."
            )
        early = self._early_verdict()
        rule_undo = undo.rule = self._calls.undo(sum(1 for _ in setup.params()))
        run = self._calls.on_everything(rule_undo)

        def evaluated() -> float:
            with run.in_model() if run else nullcontext(), torch.no_grad():
                self._losses.append(evaluate(closure, setup))
                verdict = self._judged()
                self._scaled.scale(verdict.factor, setup.params())
                if run:
                    run.take_grads(verdict.factor)
            return self._losses[-1]

        try:
            with run or BareRun(setup.params(), rule_undo), torch.enable_grad():
                if run and early and early.go:
                    run.take_grads(early.factor)
                loss = rule_of(inner)(inner, evaluated)
        except _Skipped:
            rule_undo.settle()
            loss = self._losses[0]
        # Where such a rule has converged, gradients are 0, and nothing is wrong.
        found = self._verdicts
        verdict = replace(found[-1], zero=False) if found else no_gradients()
        undo.verdict, undo.skips = verdict, not verdict.go
        return loss, verdict

    def _early_verdict(self) -> Verdict | None:
        """On gradients from before the closure's first call, which some rules (SAM) begin with."""
        carried = self._setup.loss_scaler is None or self._outcome.has_new_losses
        if not self._calls.admission or not carried:
            return None
        return self._judge(self._setup.grads(), self._grad_factor, on_device=False)

    def _judged(self) -> Verdict:
        """The verdict on an evaluation's gradients.

        One with nothing to step on ends the step if it is the first, else the run.
        """
        verdict = self._judge(self._setup.grads(), self._grad_factor, on_device=False)
        self._verdicts.append(verdict)
        if verdict.go:
            return verdict
        if len(self._verdicts) == 1:
            raise _Skipped
        if not verdict.usable:
            found = complaint(*self._outcome.factors)
        else:
            names = ", ".join(nonfinite_names(self._setup.named_grads()))
            found = f"it gave non-finite gradients in {names or 'their norm'}"
        raise FloatingPointError(
            f"evaluation {len(self._verdicts)} of the closure in one step of "
            f"{type(self._setup.inner).__name__}: {found}. The rule has moved already, so the step "
            f"cannot be skipped. Lower lr or the loss scale."
        )
