"""One step of an optimizer whose rule runs on FP32 masters.

    1. the closure, if there is one         user code sees the model's own parameters
    2. the norm of all gradients in FP32    how long are they, and are they finite?
    3. one factor                           1/loss_scale * grad_factor * clip coefficient
    4. not finite, or an empty window       the step is the identity; the loss scaler hears of it
    5. the rule, for each parameter:
       fused                                one kernel made from the rule, `fused`
       bucket by bucket or whole            masters and FP32 gradients stand in for the parameters;
                                            afterwards each weight is its master, rounded

A rule that evaluates its closure itself (LBFGS) goes through 2 to 4 at each evaluation.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

from torch import Tensor

from mixprec.gradients import once
from mixprec.optimizer.buckets import RuleCalls
from mixprec.optimizer.checks import ParamChecks
from mixprec.optimizer.closures import ClosureStep, evaluate
from mixprec.optimizer.fused.members import Members
from mixprec.optimizer.fused.plan import Prepared
from mixprec.optimizer.fused.recording.recorder import NotFusible
from mixprec.optimizer.fused.step import FusedStep
from mixprec.optimizer.judging.judge import Judge
from mixprec.optimizer.judging.scaled_grads import ScaledGrads
from mixprec.optimizer.judging.verdict import Verdict
from mixprec.optimizer.recovery import Recovery
from mixprec.optimizer.reports.outcome import Outcome
from mixprec.optimizer.rule.stand_ins import rule_of
from mixprec.optimizer.setup import Setup

__all__ = ["Step"]


class Step:
    """Takes the steps of an optimizer; holds its parts and nothing of its own."""

    def __init__(
        self,
        setup: Setup,
        calls: RuleCalls,
        fused: FusedStep,
        judge: Judge,
        outcome: Outcome,
        check: ParamChecks,
        scaled: ScaledGrads,
        recovery: Recovery,
    ) -> None:
        self._setup, self._calls, self._fused, self.judge = setup, calls, fused, judge
        self._outcome, self._check, self._scaled = outcome, check, scaled
        self._recovery = recovery

    def __call__(
        self, closure: Callable[[], float] | None, grad_factor: Tensor | float | None
    ) -> tuple[float | None, Verdict | None]:
        """The loss of the closure, and what came of the step; nothing of one that is captured."""
        vars(self._setup.inner)["_opt_called"] = True  # read by schedulers attached to it
        if self._rule_evaluates(closure):
            self._leave_to_rule()
            step = ClosureStep(
                self._setup, self._calls, self.judge, self._outcome, self._scaled, grad_factor
            )
            return self._recovery.run(lambda: self._concluded(step, closure))
        loss = None if closure is None else evaluate(closure, self._setup)
        return loss, self._recovery.run(lambda: self._once(loss, grad_factor, closure is not None))

    def _concluded(
        self, step: ClosureStep, closure: Callable[[], float] | None
    ) -> tuple[float, Verdict]:
        loss, verdict = step(closure, self._recovery.record)
        self._outcome.conclude(verdict)
        self._scaled.forget()
        return loss, verdict

    def _once(
        self, loss: float | None, grad_factor: Tensor | float | None, with_loss: bool
    ) -> Verdict | None:
        """A step on the gradients that are there."""
        members, rest = self._share_out(with_loss=with_loss)
        others = once(p.grad for p in chain(*rest) if p.grad is not None)
        self._scaled.refuse(chain(members.grads, others))
        on_device = self.judge.may_stay_on_device(members, rest)
        kind = None if others else members.kind
        verdict = self.judge(members.grads + others, grad_factor, on_device=on_device, kind=kind)
        if verdict.go:
            arguments: list[Callable[[], float]] = [] if loss is None else [lambda: loss]
            verdict = self._update(verdict, arguments, members, rest)
        undo = self._recovery.record
        undo.verdict, undo.skips = verdict, not verdict.go
        if members.capturing:
            return None
        self._outcome.conclude(verdict)
        self._scaled.forget()
        return verdict

    # ---------------------------------------- who steps how

    def _share_out(self, *, with_loss: bool) -> tuple[Members, list[list[Tensor]]]:
        """What steps by programs, and for each group what is left to the rule itself."""
        if self._setup.store.whole:
            return self._fused.groups.nobody(self._calls.reason)
        return self._fused.groups.split(with_loss=with_loss)

    def _rule_evaluates(self, closure: Callable[[], float] | None) -> bool:
        if self._calls.admission is not None:
            return self._calls.admission.calls_closure
        return closure is not None  # FP32 parameters only: all is as the rule does it

    def _leave_to_rule(self) -> None:
        """Refuse to let a rule call its closure itself if it was to run as one kernel."""
        if self._calls.admission is not None:
            self._fused.groups.nobody(self._calls.reason)
        for index in range(len(self._setup.groups)):
            self._fused.groups.admission(index)

    def _prepare(
        self, members: Members, rest: list[list[Tensor]], *, with_loss: bool
    ) -> tuple[Prepared | None, Members, list[list[Tensor]]]:
        """The fused part of this step, and how the parameters are shared out for it.

        A group whose rule takes a branch that cannot be fused is left to the rule itself.
        """
        while members.params:
            try:
                pending = self._recovery.record.pending
                return self._fused.prepare(members, self._check, pending), members, rest
            except NotFusible:
                members, rest = self._share_out(with_loss=with_loss)
        return None, members, rest

    def _check_capture(self, rest: list[list[Tensor]]) -> None:
        """Refuse a CUDA graph that would leave part of the step behind."""
        left = next((p for p in chain(*rest) if p.grad is not None), None)
        if left is not None:
            raise RuntimeError(
                f"step() is captured into a CUDA graph, but {self._setup.name(left)} is stepped by "
                f"the rule itself, whose numbers a replay would repeat. Pass fused=True to step "
                f"FP32 parameters by the same kernel; explain() says what else keeps one out."
            )
        if self._setup.loss_scaler is not None:
            raise RuntimeError(
                "step() is captured into a CUDA graph with a loss scaler, whose scale moves on "
                "the host and would stand still in a replay. BF16 needs none: drop loss_scaler."
            )

    # ---------------------------------------- updating

    def _update(
        self,
        verdict: Verdict,
        arguments: list[Callable[[], float]],
        members: Members,
        rest: list[list[Tensor]],
    ) -> Verdict:
        """Step everybody once. Returns the verdict, which the host may have had to read."""
        undo, asked = self._recovery.record, members
        prepared, members, rest = self._prepare(members, rest, with_loss=bool(arguments))
        if members is not asked and not self.judge.may_stay_on_device(members, rest):
            verdict = verdict.on_host()
            if not verdict.go:
                return verdict
        if members.capturing:
            self._check_capture(rest)
        here = set(members.indices)
        groups = {i: params for i, params in enumerate(rest) if params or i not in here}
        if self._calls.in_buckets:
            groups = {i: [p for p in g if p.grad is not None] for i, g in groups.items()}
        undo.verdict, undo.fuses = verdict, prepared is not None
        if prepared is not None:
            self._fused.make_ready(prepared, verdict.factor, verdict.found_inf)
        if groups:
            self._fused.held.release(chain(*rest))
            self._by_rule(verdict, arguments, groups)
        if prepared is not None:
            self._fused.run(prepared, verdict.found_inf, groups)
        return verdict

    def _by_rule(
        self,
        verdict: Verdict,
        arguments: list[Callable[[], float]],
        groups: dict[int, list[Tensor]],
    ) -> None:
        """Step what is left to the rule itself, which may have to skip on the device."""
        inner: Any = self._setup.inner
        undo = self._recovery.record.rule = self._calls.undo(sum(map(len, groups.values())))
        if verdict.found_inf is not None:
            inner.grad_scale, inner.found_inf = None, verdict.found_inf
        self._calls.run(lambda: rule_of(inner)(inner, *arguments), verdict.factor, groups, undo)
        if verdict.found_inf is not None:
            del inner.grad_scale, inner.found_inf

    def change_mode(self, method: Callable[[], Any]) -> None:
        """`method` of a rule that moves its parameters (schedule-free), with masters in place."""
        self._fused.held.release()
        setup, calls = self._setup, self._calls
        groups: dict[int, list[Tensor]] = {
            i: [p for p in group["params"] if setup.state.get(p) or not calls.in_buckets]
            for i, group in enumerate(setup.groups)
        }

        def change() -> None:
            undo = self._recovery.record.rule = calls.undo(sum(map(len, groups.values())))
            calls.run(method, None, groups, undo)

        self._recovery.run(change)
