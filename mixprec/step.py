"""One step of an optimizer whose rule runs on FP32 masters.

    1. the closure, if there is one         user code sees the model's own parameters
    2. the norm of all gradients in FP32    how long are they, and are they finite?
    3. one factor                           1/loss_scale * grad_factor * clip coefficient
    4. not finite, or an empty window       the step is the identity; the loss scaler hears of it
    5. the rule, for each parameter:
       fused                                one kernel made from the rule, `mixprec.fused`
       bucket by bucket or whole            masters and FP32 gradients stand in for the parameters;
                                            afterwards each weight is its master, rounded

A rule that evaluates its closure itself (LBFGS) goes through 2 to 4 at each evaluation.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from itertools import chain
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from mixprec.admission import Admission, accepts_sparse, admit, counts_writes, quote
from mixprec.arguments import check_weights
from mixprec.devices import is_capturing
from mixprec.fused.dispatch import NotFusible
from mixprec.fused.judge import DeviceJudge
from mixprec.fused.members import Members
from mixprec.fused.plan import Prepared
from mixprec.fused.step import FusedStep
from mixprec.grad_factor import complaint, on
from mixprec.gradients import local, nonfinite_names, once, scale_
from mixprec.infinite_weights import infinite_weight
from mixprec.inner import (
    Bucket,
    GroupValues,
    fill_buckets,
    rule_of,
    shared_keys,
    takes_found_inf,
)
from mixprec.masters import LOW, MasterStore, Scratch
from mixprec.names import names_of
from mixprec.outcome import LossScaler, OnNonfinite, ReportingOptimizer
from mixprec.owners import superseded_by_newer
from mixprec.run import MasterRun
from mixprec.undo import BareRun, Leaving, RuleUndo, StepUndo
from mixprec.verdict import Verdict, judge, no_gradients, unjudged

_Result = TypeVar("_Result")


class _Skipped(Exception):
    """Leaves a rule whose closure gave nothing to step with."""


class SteppingOptimizer(ReportingOptimizer):
    """The part of MixedPrecision that steps. Holds what a step needs and counts what happened."""

    def __init__(
        self,
        inner: Optimizer,
        store: MasterStore,
        loss_scaler: LossScaler | None,
        max_grad_norm: float | None,
        on_nonfinite: OnNonfinite,
        bucket_numel: int | Literal["auto"] | None,
        fused: FusedStep,
    ) -> None:
        super().__init__(loss_scaler, on_nonfinite, fused)
        self.inner = inner
        self.max_grad_norm = max_grad_norm
        self._store = store
        self._device_judge = DeviceJudge()
        self._bucket_numel: int | Literal["auto"] | None = bucket_numel
        self._admissions: dict[bool, Admission] = {}
        self._admission: Admission | None = None
        self._takes_sparse: bool | None = None
        self._checked = False
        self._dtypes: Any = WeakIdKeyDictionary()
        self._in_model = False
        self._undo: StepUndo | Leaving | None = None
        """What the step at hand changes; of one that was stopped until somebody settles it."""
        self._broken = ""
        """What an unfinished step has left half done."""
        self._scaled_grads: list[weakref.ref[Tensor]] = []
        """FP32 gradients that a step at hand, or one that was stopped, has scaled in place."""

    @torch._disable_dynamo
    def _step(
        self, closure: Callable[[], float] | None, grad_factor: Tensor | float | None
    ) -> float | None:
        self._settle()
        self._check_finished("step()")
        self._undoable(lambda: self._ready(with_loss=closure is not None))
        vars(self.inner)["_opt_called"] = True  # read by schedulers that are attached to it
        if self._rule_evaluates(closure):
            self._leave_to_rule()
            loss, verdict = self._undoable(lambda: self._step_by_closure(closure, grad_factor))
        else:
            loss = None if closure is None else self._evaluate(closure)
            with_loss = closure is not None
            verdict = self._undoable(
                lambda: self._step_once(loss, grad_factor, with_loss=with_loss)
            )
        if verdict is not None:
            self._report(verdict)
        return loss

    def _step_once(
        self, loss: float | None, grad_factor: Tensor | float | None, *, with_loss: bool
    ) -> Verdict | None:
        """A step on the gradients that are there; nothing comes of one that is captured."""
        members, rest = self._share_out(with_loss=with_loss)
        others = once(p.grad for p in chain(*rest) if p.grad is not None)
        self._check_unscaled(chain(members.grads, others))
        on_device = self._skips_on_device(members, rest)
        kind = None if others else members.kind
        verdict = self._judge(members.grads + others, grad_factor, on_device=on_device, kind=kind)
        if verdict.go:
            arguments: list[Callable[[], float]] = [] if loss is None else [lambda: loss]
            verdict = self._update(verdict, arguments, members, rest)
        self._record.verdict = verdict
        self._record.skips = not verdict.go
        if members.capturing:
            return None
        self._conclude(verdict)
        self._scaled_grads = []
        return verdict

    @property
    def _record(self) -> StepUndo:
        assert isinstance(self._undo, StepUndo), "_undoable() makes it"
        return self._undo

    # ---------------------------------------- all or nothing

    def _undoable(self, call: Callable[[], _Result]) -> _Result:
        """`call`, with what it changes taken back if anything stops it."""
        self._undo = StepUndo(self)
        try:
            result = call()
            self._undo = None
            return result
        except BaseException as error:
            if self._undo is not None:
                self._undo.error = quote(error)
            self._settle_undo()
            raise

    def _settle(self) -> None:
        """Before anything else: the end of what was stopped, and of what the device has skipped."""
        self._settle_undo()
        self._fused.settle()

    def _settle_undo(self) -> None:
        """Take back what a stopped step has changed, or bring it to its end."""
        undo = self._undo
        if undo is None:
            return
        broken = undo.settle()
        if undo.moved and undo.verdict is not None:
            self._conclude(undo.verdict)
            self._scaled_grads = []
        self._broken = broken or self._broken
        self._undo = None

    def _check_finished(self, call: str) -> None:
        """Refuse to go on from weights, masters and states of two steps."""
        if self._broken:
            raise RuntimeError(
                f"{call} after an unfinished step: {self._broken} Weights, masters and states "
                f"may be of two steps. Load a checkpoint of the model and of this optimizer; or "
                f"call adopt_params() to go on from what is there."
            )

    def _check_unscaled(self, grads: Iterable[Tensor]) -> None:
        """Refuse gradients that a step has scaled in place before it was stopped."""
        scaled = {id(grad) for grad in (ref() for ref in self._scaled_grads) if grad is not None}
        if scaled and any(id(grad) in scaled for grad in grads):
            raise RuntimeError(
                "step() on gradients that an unfinished step has scaled in place: they would be "
                "unscaled and clipped twice. Call optimizer.zero_grad() and run the backward pass "
                "again."
            )
        self._scaled_grads = []

    def _share_out(self, *, with_loss: bool) -> tuple[Members, list[list[Tensor]]]:
        """What steps by programs, and for each group what is left to the rule itself."""
        if self._store.whole:
            return self._fused.nobody(self._admission.reason if self._admission else "")
        return self._fused.split(with_loss=with_loss)

    def _rule_evaluates(self, closure: Callable[[], float] | None) -> bool:
        if self._admission is not None:
            return self._admission.calls_closure
        return closure is not None  # FP32 parameters only: all is as the rule does it

    def _leave_to_rule(self) -> None:
        """Refuse to let a rule call its closure itself if it was to run as one kernel."""
        if self._admission is not None:
            self._fused.nobody(self._admission.reason)
        for index in range(len(self.param_groups)):
            self._fused.admission(index)

    def _ready(self, *, with_loss: bool = False) -> None:
        """Before the first step: one look at the weights and at the rule."""
        if taken := superseded_by_newer(self):
            raise RuntimeError(
                f"parameter {taken!r} was given to a MixedPrecision created later; "
                f"two wrappers would hold two masters of one weight. Step only the newest, or "
                f"wrap separate parameters."
            )
        if self._in_model:
            raise RuntimeError(
                "step() inside masters_in_model(): the model holds FP32 masters there, which a "
                "step would round to FP32. Leave the context first."
            )
        self.inner.param_groups, self.inner.state = self.param_groups, self.state
        self._hear()
        if not self._checked:
            check_weights(self.param_groups)
            self._checked = True
        if with_loss not in self._admissions and self._is_tried(with_loss=with_loss):
            self._admissions[with_loss] = admit(self.inner, with_loss=with_loss)
        self._admission = self._admissions.get(with_loss)
        if self._admission is not None and not self._admission.per_parameter:
            self._check_whole(self._admission)
            self._store.whole = True

    def _is_tried(self, *, with_loss: bool) -> bool:
        """Whether it matters how the rule steps stand-ins, or if it calls its closure itself.

        A bare rule may do as it likes with a closure; one that has to be fused may not.
        """
        if any(map(self._store.has, self._params())):
            return True
        if not with_loss or self._fused.fused is not True:
            return False
        return any([self._fused.admission(i) for i in range(len(self.param_groups))])

    def _check_whole(self, admission: Admission) -> None:
        if self._store.choice == "split":
            raise TypeError(
                f"masters='split' keeps no FP32 masters to show {type(self.inner).__name__} all at "
                f"once, and it has to see all tensors together ({admission.reason}). Use "
                f"masters='full'."
            )

    # ---------------------------------------- what the gradients are worth

    def _judge(
        self,
        grads: list[Tensor],
        grad_factor: Tensor | float | None,
        *,
        on_device: bool,
        kind: object = None,
    ) -> Verdict:
        """`kind`, if given, stands for how the gradients look, see `Members`."""
        if not grads:
            return no_gradients()
        factor, counted = self._unscale_factor(grad_factor, local(grads[0]).device)
        external = getattr(self, "found_inf", None)
        if self.on_nonfinite == "ignore" and self.max_grad_norm is None and external is None:
            return self._entered(unjudged(factor, counted, on_device=on_device), grads)
        if on_device and self._device_judge.takes(grads, kind):
            verdict = self._device_judge(
                grads,
                factor,
                counted=counted if isinstance(counted, Tensor) else None,
                external_found_inf=external,
                max_grad_norm=self.max_grad_norm,
                counts=self._skips,
            )
        else:
            verdict = judge(
                grads,
                factor,
                counted=counted,
                external_found_inf=external,
                max_grad_norm=self.max_grad_norm,
                on_device=on_device,
            )
        if verdict.parts is None:
            self._culprits.forget()
        else:
            self._culprits.note(grads, kind, self._params(), *verdict.parts)
        return self._entered(verdict, grads)

    def _entered(self, verdict: Verdict, grads: list[Tensor]) -> Verdict:
        """The verdict; in a capture its counting goes into the graph too."""
        if is_capturing(local(grads[0]).device):
            if verdict.found_inf is not None and not verdict.recorded:
                self._count(verdict)
            self._captured = verdict
        return verdict

    def _unscale_factor(
        self, grad_factor: Tensor | float | None, device: torch.device
    ) -> tuple[Tensor | None, Tensor | bool]:
        """`grad_factor / loss_scale`, and whether anything was counted."""
        factor: Tensor | None = None
        counted: Tensor | bool = True
        if grad_factor is not None:
            factor = on(device, grad_factor)
            counted = (factor if isinstance(grad_factor, Tensor) else grad_factor) != 0
        inverse = self._inverse_scale()
        self._factors = grad_factor, inverse
        if inverse is not None:
            factor = inverse if factor is None else factor * inverse.to(factor.device)
        return factor, counted

    def _inverse_scale(self) -> Tensor | None:
        external = getattr(self, "grad_scale", None)
        if self.loss_scaler is None:
            return None if external is None else external.double().reciprocal().reshape(())
        if hasattr(self, "found_inf"):
            raise RuntimeError(
                "a torch.amp.GradScaler steps this MixedPrecision, which has a loss_scaler of its "
                "own: gradients would be unscaled twice. Drop one of the two."
            )
        if self.loss_scaler.losses_scaled == self._losses_seen:
            if self._only_makes_state():
                return None
            raise RuntimeError(
                f"a loss scaler is set, but no loss was scaled since the last step, or since "
                f"another scale was loaded: gradients would be divided by "
                f"{self.loss_scaler.get_scale()}, which they do not carry. "
                f"Call optimizer.loss_scaler.multiply(loss).backward()."
            )
        return self.loss_scaler.inverse

    def _skips_on_device(self, members: Members, rest: list[list[Tensor]]) -> bool:
        """Whether whoever steps is given `found_inf`, so that the host reads nothing.

        A rule of torch not in a parameter's first step: its fused SGD leaves a new momentum buffer
        uninitialised when it skips. Kernels always; on a CPU reading costs nothing.
        """
        if self.on_nonfinite == "raise":
            return False
        stepped = [p for p in chain(*rest) if p.grad is not None]
        if members.grads and not members.grads[0].is_cuda:
            return False
        if not stepped:
            return bool(members.grads)
        ready = all(len(self.state.get(p, ())) > self._store.has(p) for p in stepped)
        return takes_found_inf(self.inner) and ready

    def _evaluate(self, closure: Callable[[], float]) -> float:
        scaler = self.loss_scaler
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

    # ---------------------------------------- running the rule

    def _update(
        self,
        verdict: Verdict,
        arguments: list[Callable[[], float]],
        members: Members,
        rest: list[list[Tensor]],
    ) -> Verdict:
        """Step everybody once. Returns the verdict, which the host may have had to read."""
        inner: Any = self.inner
        undo = self._record
        asked = members
        prepared, members, rest = self._prepare(members, rest, with_loss=bool(arguments))
        if members is not asked and not self._skips_on_device(members, rest):
            verdict = verdict.on_host()
            if not verdict.go:
                return verdict
        if members.capturing:
            self._check_capture(rest)
        here = set(members.indices)
        groups = {i: params for i, params in enumerate(rest) if params or i not in here}
        if self._in_buckets:
            groups = {i: [p for p in g if p.grad is not None] for i, g in groups.items()}
        undo.verdict, undo.fuses = verdict, prepared is not None
        if prepared is not None:
            self._fused.make_ready(prepared, verdict.factor, verdict.found_inf)
        if groups:
            self._fused.release(chain(*rest))
            undo.rule = self._rule_undo(sum(map(len, groups.values())))
            if verdict.found_inf is not None:
                inner.grad_scale, inner.found_inf = None, verdict.found_inf
            self._run_rule(
                lambda: rule_of(inner)(inner, *arguments), verdict.factor, groups, undo.rule
            )
            if verdict.found_inf is not None:
                del inner.grad_scale, inner.found_inf
        if prepared is not None:
            self._fused.run(prepared, verdict.found_inf, groups)
        return verdict

    def _rule_undo(self, total: int) -> RuleUndo:
        devices = {param.device for param in self._params()}
        admission = self._admission
        if admission is not None:
            counted = lambda: admission.counted  # noqa: E731
        else:
            counted = lambda: counts_writes(self.inner)  # noqa: E731
        return RuleUndo(self.inner, devices, counted=counted, total=total)

    def _prepare(
        self, members: Members, rest: list[list[Tensor]], *, with_loss: bool
    ) -> tuple[Prepared | None, Members, list[list[Tensor]]]:
        """The fused part of this step, and how the parameters are shared out for it.

        A group whose rule takes a branch that cannot be fused is left to the rule itself.
        """
        while members.params:
            try:
                pending = self._record.pending
                return self._fused.prepare(members, self._check_params, pending), members, rest
            except NotFusible:
                members, rest = self._share_out(with_loss=with_loss)
        return None, members, rest

    def _check_capture(self, rest: list[list[Tensor]]) -> None:
        """Refuse a CUDA graph that would leave part of the step behind."""
        left = next((p for p in chain(*rest) if p.grad is not None), None)
        if left is not None:
            raise RuntimeError(
                f"step() is captured into a CUDA graph, but {self._name(left)} is stepped by the "
                f"rule itself, whose numbers a replay would repeat. Pass fused=True to step FP32 "
                f"parameters by the same kernel; explain() says what else keeps one out."
            )
        if self.loss_scaler is not None:
            raise RuntimeError(
                "step() is captured into a CUDA graph with a loss scaler, whose scale moves on "
                "the host and would stand still in a replay. BF16 needs none: drop loss_scaler."
            )

    def _run_rule(
        self,
        call: Callable[[], Any],
        factor: Tensor | None,
        groups: dict[int, list[Tensor]],
        undo: RuleUndo,
    ) -> None:
        """`call` the rule with masters and gradients in place, once for each bucket of `groups`."""
        self._check_params(chain(*groups.values()))
        everybody = [len(groups.get(i, ())) for i in range(len(self.param_groups))]
        if self._admission is None and everybody == [len(g["params"]) for g in self.param_groups]:
            with BareRun(self._params(), undo), torch.enable_grad():
                self._scale_fp32_grads(factor, chain(*groups.values()))
                call()
            return
        buckets = self._buckets(groups)
        scratch = Scratch(self._largest_rooms(buckets))
        shared = shared_keys(self.inner)
        low_states = self._admission.low_states if self._admission else frozenset[str]()
        values = GroupValues(self.param_groups) if len(buckets) > 1 else None
        self._scale_fp32_grads(factor, chain(*groups.values()))
        for bucket in buckets:
            run = MasterRun(
                self.inner, self.state, self._store, bucket, scratch, undo, shared, low_states
            )
            with run, values.bucket(bucket) if values else nullcontext(), torch.enable_grad():
                run.take_grads(factor)
                call()

    def _buckets(self, groups: dict[int, list[Tensor]]) -> list[Bucket]:
        capacity = self.bucket_numel
        if capacity is None or not self._in_buckets:
            return [groups]
        return fill_buckets(groups, self._room, capacity)

    @property
    def _in_buckets(self) -> bool:
        """Whether the rule sees a part of its parameters at a time."""
        masters = self._admission is not None and not self._store.whole
        return masters and self.bucket_numel is not None

    def _largest_rooms(self, buckets: list[Bucket]) -> dict[torch.device, int]:
        """The most scratch that any bucket takes, by device."""
        largest: dict[torch.device, int] = {}
        for bucket in buckets:
            rooms: dict[torch.device, int] = {}
            for param in (param for params in bucket.values() for param in params):
                rooms[param.device] = rooms.get(param.device, 0) + self._room(param)
            largest = {d: max(rooms.get(d, 0), largest.get(d, 0)) for d in {**rooms, **largest}}
        return largest

    def _room(self, param: Tensor) -> int:
        return Scratch.padded(param.numel()) if self._store.has(param) else 0

    @property
    def bucket_numel(self) -> int | None:
        """Elements of FP32 scratch for a rule that runs bucket by bucket."""
        if self._bucket_numel != "auto":
            return self._bucket_numel
        # On a CPU smaller ones fit a core's cache, but cost more calls of the rule than that saves.
        device = next((p.device.type for p in self._params()), "cpu")
        return 2**20 if device == "cpu" else 2**22

    def _scale_fp32_grads(self, factor: Tensor | None, params: Iterable[Tensor]) -> None:
        if factor is None:
            return
        grads = once(p.grad for p in params if p.grad is not None and p.grad.dtype not in LOW)
        self._scaled_grads += map(weakref.ref, grads)
        scale_(grads, factor)

    def _check_params(self, params: Iterable[Tensor]) -> None:
        """What may have changed about these parameters since the last step."""
        params = list(params)
        self._check_master_shapes(params)
        for p in params:
            if self._dtypes.setdefault(p, p.dtype) != p.dtype:
                raise RuntimeError(
                    f"{self._name(p)} was {self._dtypes[p]} when its optimizer state was made and "
                    f"is {p.dtype} now; nothing was updated. Convert the model before it is given "
                    f"to an optimizer, or build the optimizer anew."
                )
            if p.grad is not None and p.grad.layout != torch.strided and self._store.has(p):
                if self._takes_sparse is None:
                    self._takes_sparse = accepts_sparse(self.inner)
                if not self._takes_sparse:
                    raise RuntimeError(
                        f"the gradient of {self._name(p)} is sparse and "
                        f"{type(self.inner).__name__} does not take sparse gradients; nothing was "
                        f"updated. Use SparseAdam, SGD or Adagrad, or an embedding with "
                        f"sparse=False."
                    )

    def _check_master_shapes(self, params: Iterable[Tensor]) -> None:
        """Refuse a parameter that was resized or replaced in place, its master left behind."""
        for param in filter(self._store.has, params):
            stored = self._store.stored(self.state, param)
            if stored is not None and stored.shape != param.shape:
                raise ValueError(
                    f"{self._name(param)} is {list(param.shape)} and its master "
                    f"{list(stored.shape)}: it was resized after the master was made. Give its "
                    f"states the new shape, optimizer.state[param]['master'] like the others, or "
                    f"delete them all: del optimizer.state[param]."
                )

    # ---------------------------------------- rules that evaluate closures

    def _step_by_closure(
        self, closure: Callable[[], float] | None, grad_factor: Tensor | float | None
    ) -> tuple[float, Verdict]:
        """A step of a rule that calls the closure itself, perhaps several times (LBFGS)."""
        if closure is None:
            raise TypeError(
                f"{type(self.inner).__name__} evaluates the loss itself: pass a closure that "
                f"clears gradients, computes the loss, calls backward and returns the loss."
            )
        undo = self._record
        run: MasterRun | None = None
        early = self._early_verdict(grad_factor)
        undo.rule = self._rule_undo(sum(1 for _ in self._params()))
        if self._admission is not None:
            everything = dict(enumerate(g["params"] for g in self.param_groups))
            low_states = self._admission.low_states
            run = MasterRun(
                self.inner,
                self.state,
                self._store,
                everything,
                Scratch(),
                undo.rule,
                None,
                low_states,
            )
        verdicts: list[Verdict] = []
        losses: list[float] = []

        def evaluate() -> float:
            with run.in_model() if run else nullcontext(), torch.no_grad():
                losses.append(self._evaluate(closure))
                verdicts.append(self._judge(self._grads(), grad_factor, on_device=False))
                self._refuse_late_overflow(verdicts)
                self._scale_fp32_grads(verdicts[-1].factor, self._params())
                if run:
                    run.take_grads(verdicts[-1].factor)
            return losses[-1]

        try:
            with run or BareRun(self._params(), undo.rule), torch.enable_grad():
                if run and early and early.go:
                    run.take_grads(early.factor)
                loss = rule_of(self.inner)(self.inner, evaluate)
        except _Skipped:
            undo.rule.settle()
            loss = losses[0]
        # Where such a rule has converged, gradients are 0, and nothing is wrong.
        verdict = replace(verdicts[-1], zero=False) if verdicts else no_gradients()
        undo.verdict, undo.skips = verdict, not verdict.go
        self._conclude(verdict)
        self._scaled_grads = []
        return loss, verdict

    def _early_verdict(self, grad_factor: Tensor | float | None) -> Verdict | None:
        """On gradients from before the closure's first call, which some rules (SAM) begin with."""
        scaler = self.loss_scaler
        carried = scaler is None or scaler.losses_scaled != self._losses_seen
        if not self._admission or not carried:
            return None
        return self._judge(self._grads(), grad_factor, on_device=False)

    def _refuse_late_overflow(self, verdicts: list[Verdict]) -> None:
        """An evaluation with nothing to step on ends the step if it is the first, else the run."""
        if verdicts[-1].go:
            return
        if len(verdicts) == 1:
            raise _Skipped
        if not verdicts[-1].usable:
            found = complaint(*self._factors)
        else:
            names = ", ".join(nonfinite_names(self._named_grads()))
            found = f"it gave non-finite gradients in {names or 'their norm'}"
        raise FloatingPointError(
            f"evaluation {len(verdicts)} of the closure in one step of "
            f"{type(self.inner).__name__}: {found}. The rule has moved already, so the step "
            f"cannot be skipped. Lower lr or the loss scale."
        )

    # ---------------------------------------- small things

    def _name(self, param: Tensor) -> str:
        return next(name for other, name in names_of(self.param_groups) if other is param)

    def _infinite_weight(self) -> str:
        """Of those that are stepped; a frozen mask may well hold -inf."""
        named = names_of(self.param_groups)
        stepped = [(p, n) for p, n in named if p.requires_grad or self._store.known(self.state, p)]
        return infinite_weight(stepped, lambda param: self._store.master(self.state, param))

    def _warn_of_edits(self) -> None:
        """Tell of weights that somebody else has written, before anything is updated."""
        edited = list(self._store.edited)
        if edited:
            names = [self._name(param) for param in edited]
            more = f" and {len(names) - 1} more were" if len(names) > 1 else " was"
            self._store.edited.clear()
            self._warn(
                "edit",
                f"{names[0]}{more} written outside of step() since the last one; masters were read "
                f"again where they differ, and kept their FP32 bits elsewhere. Call adopt_params() "
                f"after an intended edit.",
            )
