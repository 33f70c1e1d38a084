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

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from itertools import chain
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from mixprec.admission import Admission, accepts_sparse, admit
from mixprec.arguments import check_weights
from mixprec.fused.dispatch import NotFusible
from mixprec.fused.judge import DeviceJudge
from mixprec.fused.members import Members
from mixprec.fused.plan import Prepared
from mixprec.fused.step import FusedStep
from mixprec.gradients import local, nonfinite_names, scale_
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
from mixprec.run import MasterRun
from mixprec.verdict import SkipCounts, Verdict, judge, no_gradients, unjudged

OnNonfinite = Literal["skip", "raise", "ignore"]

MAX_SKIPS_IN_A_ROW = 50
"""Skips in a row after which a step raises when no loss scaler decides."""


class LossScaler(Protocol):
    """What a step needs of `DynamicLossScaler` and `StaticLossScaler`."""

    losses_scaled: int

    @property
    def inverse(self) -> Tensor: ...
    @property
    def max_skips_in_a_row(self) -> int: ...
    def get_scale(self) -> float: ...
    def update(self, grads_finite: Tensor | bool, *, counted: Tensor | bool = True) -> None: ...
    def check_progress(self, named_grads: Iterable[tuple[str, Tensor | None]] = ()) -> None: ...


class _Skipped(Exception):
    """Leaves a rule whose closure gave nothing to step with."""


class SteppingOptimizer(Optimizer):
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
        super().__init__([{"params": []}], {})  # the groups will be the inner optimizer's own
        self.inner = inner
        self.loss_scaler = loss_scaler
        self.max_grad_norm = max_grad_norm
        self.on_nonfinite: OnNonfinite = on_nonfinite
        self._store = store
        self._fused = fused
        self._device_judge = DeviceJudge()
        self._bucket_numel: int | Literal["auto"] | None = bucket_numel
        self._admissions: dict[bool, Admission] = {}
        self._admission: Admission | None = None
        self._takes_sparse: bool | None = None
        self._checked = False
        self._dtypes: dict[Tensor, torch.dtype] = {}
        self._in_model = False
        self._superseded_by = ""
        self._warned: set[str] = set()
        self._losses_seen = loss_scaler.losses_scaled if loss_scaler is not None else 0
        self._verdict = no_gradients()
        self._steps = 0
        self._skips = SkipCounts()

    @torch._disable_dynamo
    def _step(
        self, closure: Callable[[], float] | None, grad_factor: Tensor | float | None
    ) -> float | None:
        self._ready(with_loss=closure is not None)
        vars(self.inner)["_opt_called"] = True  # read by schedulers that are attached to it
        if self._rule_evaluates(closure):
            return self._step_by_closure(closure, grad_factor)
        loss = None if closure is None else self._evaluate(closure)
        members, rest = self._share_out(with_loss=closure is not None)
        others = [p.grad for p in chain(*rest) if p.grad is not None]
        on_device = self._skips_on_device(members, rest)
        kind = None if others else members.kind
        verdict = self._judge(members.grads + others, grad_factor, on_device=on_device, kind=kind)
        if verdict.go:
            verdict = self._update(verdict, [] if loss is None else [lambda: loss], members, rest)
        if not members.capturing:
            self._conclude(verdict)
        return loss

    def _share_out(self, *, with_loss: bool) -> tuple[Members, list[list[Tensor]]]:
        """What steps by programs, and for each group what is left to the rule itself."""
        if self._store.whole:
            return self._fused.nobody(self._admission.reason if self._admission else "")
        return self._fused.split(with_loss=with_loss)

    def _rule_evaluates(self, closure: Callable[[], float] | None) -> bool:
        if self._admission is not None:
            return self._admission.calls_closure
        return closure is not None  # FP32 parameters only: all is as the rule does it

    def _ready(self, *, with_loss: bool = False) -> None:
        """Before the first step: one look at the weights and at the rule."""
        if self._superseded_by:
            raise RuntimeError(
                f"parameter {self._superseded_by!r} was given to a MixedPrecision created later; "
                f"two wrappers would hold two masters of one weight. Step only the newest, or "
                f"wrap separate parameters."
            )
        if self._in_model:
            raise RuntimeError(
                "step() inside masters_in_model(): the model holds FP32 masters there, which a "
                "step would round to FP32. Leave the context first."
            )
        self.inner.param_groups, self.inner.state = self.param_groups, self.state
        self._fused.settle()
        if self._fused.skipped:
            self._fused.skipped = False
            self._report_late()
        if not self._checked:
            check_weights(self.param_groups)
            self._checked = True
        if with_loss not in self._admissions and any(map(self._store.has, self._params())):
            self._admissions[with_loss] = admit(self.inner, with_loss=with_loss)
        self._admission = self._admissions.get(with_loss)
        if self._admission is not None and not self._admission.per_parameter:
            if self._store.choice == "split":
                raise TypeError(
                    f"masters='split' keeps no FP32 masters to show {type(self.inner).__name__} "
                    f"all at once, and it has to see all tensors together "
                    f"({self._admission.reason}). Use masters='full'."
                )
            self._store.whole = True

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
            return unjudged(factor, counted, on_device=on_device)
        if on_device and self._device_judge.takes(grads, kind):
            return self._device_judge(
                grads,
                factor,
                counted=counted if isinstance(counted, Tensor) else None,
                external_found_inf=external,
                max_grad_norm=self.max_grad_norm,
                counts=self._skips,
            )
        return judge(
            grads,
            factor,
            counted=counted,
            external_found_inf=external,
            max_grad_norm=self.max_grad_norm,
            on_device=on_device,
        )

    def _unscale_factor(
        self, grad_factor: Tensor | float | None, device: torch.device
    ) -> tuple[Tensor | None, Tensor | bool]:
        """`grad_factor / loss_scale`, and whether anything was counted."""
        factor: Tensor | None = None
        counted: Tensor | bool = True
        if isinstance(grad_factor, Tensor):
            factor = grad_factor.to(device, non_blocking=True)
            counted = factor != 0
        elif grad_factor is not None:
            counted = grad_factor != 0
            wide = torch.float32 if device.type == "mps" else torch.float64
            factor = torch.full((), grad_factor, dtype=wide, device=device)  # a fill, not a copy
        inverse = self._inverse_scale()
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
            if all(float(group.get("lr", 1.0)) == 0.0 for group in self.param_groups):
                return None  # it initialises state, as distributed checkpoints do, and no more
            raise RuntimeError(
                f"a loss scaler is set, but no loss was scaled since the last step: gradients "
                f"would be divided by {self.loss_scaler.get_scale()} that never were multiplied. "
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
                "then return the loss itself."
            )
        return loss

    def _conclude(self, verdict: Verdict) -> None:
        """Counters, the loss scaler, and an error where progress has stopped."""
        self._verdict = verdict
        self._steps += 1
        scaler = self.loss_scaler
        if scaler is not None and scaler.losses_scaled != self._losses_seen:
            scaler.update(verdict.finite, counted=verdict.counted)
            self._losses_seen = scaler.losses_scaled
        if verdict.recorded and verdict.found_inf is not None:
            return  # the host hears of it before the next step, in `_report_late`
        overflowed = verdict.overflowed
        if not verdict.recorded:
            self._skips.add(overflowed)
        # Where only the device knows, the host asks once in a while.
        limit = MAX_SKIPS_IN_A_ROW if scaler is None else scaler.max_skips_in_a_row
        ask = not isinstance(overflowed, Tensor) or self._steps % limit == 0
        external = hasattr(self, "found_inf")  # a GradScaler skips as a matter of course
        if ask and overflowed and not external:
            self._report_skip()

    def _report_late(self) -> None:
        """The device skipped the last step, whose gradients are gone by now."""
        skips, scaler = self._fused.skips_in_a_row, self.loss_scaler
        if hasattr(self, "found_inf"):
            return  # a GradScaler skips as a matter of course
        if scaler is not None:
            if skips >= scaler.max_skips_in_a_row:
                scaler.check_progress()
        elif "skip" not in self._warned or skips >= MAX_SKIPS_IN_A_ROW:
            if self._skips.in_a_row:  # else nothing was counted in it
                self._report_skip(late=True)

    def _report_skip(self, *, late: bool = False) -> None:
        names = [] if late else nonfinite_names(self._named_grads())
        where = f"in {', '.join(map(repr, names))}" if names else "in their norm"
        if self.on_nonfinite == "raise":
            raise FloatingPointError(
                f"gradients are not finite {where}; nothing was updated. Look there first, or pass "
                f"on_nonfinite='skip' to go on without this step."
            )
        if self.loss_scaler is not None:
            self.loss_scaler.check_progress(self._named_grads())
            return
        if self._skips.in_a_row >= MAX_SKIPS_IN_A_ROW:
            raise FloatingPointError(
                f"{self._skips.in_a_row} steps in a row were skipped: gradients are not "
                f"finite {where}. Without a loss scale the cause is the forward pass or the data: "
                f"look there, or lower the learning rate."
            )
        self._warn(
            "skip",
            f"gradients are not finite {where}; the step was skipped and nothing changed. Further "
            f"skips are counted in metrics()['skipped_steps'].",
        )

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
        if groups:
            self._fused.release(chain(*rest))
            if verdict.found_inf is not None:
                inner.grad_scale, inner.found_inf = None, verdict.found_inf
            try:
                self._run_rule(lambda: rule_of(inner)(inner, *arguments), verdict.factor, groups)
            finally:
                if verdict.found_inf is not None:
                    del inner.grad_scale, inner.found_inf
        if prepared is not None:
            self._fused.run(prepared, verdict.factor, verdict.found_inf, groups)
        self._warn_of_edits()
        return verdict

    def _prepare(
        self, members: Members, rest: list[list[Tensor]], *, with_loss: bool
    ) -> tuple[Prepared | None, Members, list[list[Tensor]]]:
        """The fused part of this step, and how the parameters are shared out for it.

        A group whose rule takes a branch that cannot be fused is left to the rule itself.
        """
        while members.params:
            try:
                return self._fused.prepare(members, self._check_params), members, rest
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
        self, call: Callable[[], Any], factor: Tensor | None, groups: dict[int, list[Tensor]]
    ) -> None:
        """`call` the rule with masters and gradients in place, once for each bucket of `groups`."""
        self._check_params(chain(*groups.values()))
        self._scale_fp32_grads(factor, chain(*groups.values()))
        everybody = [len(groups.get(i, ())) for i in range(len(self.param_groups))]
        if self._admission is None and everybody == [len(g["params"]) for g in self.param_groups]:
            with torch.enable_grad():
                call()
            return
        buckets = self._buckets(groups)
        scratch = Scratch(self._largest_rooms(buckets))
        shared = shared_keys(self.inner)
        values = GroupValues(self.param_groups) if len(buckets) > 1 else None
        for bucket in buckets:
            run = MasterRun(self.inner, self.state, self._store, bucket, scratch, shared)
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
        if factor is not None:
            grads = [p.grad for p in params if p.grad is not None]
            scale_((g for g in grads if g.dtype not in LOW), factor)

    def _check_params(self, params: Iterable[Tensor]) -> None:
        """What may have changed about these parameters since the last step."""
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

    # ---------------------------------------- rules that evaluate closures

    def _step_by_closure(
        self, closure: Callable[[], float] | None, grad_factor: Tensor | float | None
    ) -> float | None:
        """A step of a rule that calls the closure itself, perhaps several times (LBFGS)."""
        if closure is None:
            raise TypeError(
                f"{type(self.inner).__name__} evaluates the loss itself: pass a closure that "
                f"clears gradients, computes the loss, calls backward and returns the loss."
            )
        run: MasterRun | None = None
        early = self._early_verdict(grad_factor)
        if self._admission is not None:
            everything = dict(enumerate(g["params"] for g in self.param_groups))
            run = MasterRun(self.inner, self.state, self._store, everything, Scratch())
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
            with run or nullcontext(), torch.enable_grad():
                if run and early:
                    run.take_grads(early.factor)
                loss = rule_of(self.inner)(self.inner, evaluate)
        except _Skipped:
            loss = losses[0]
        self._warn_of_edits()
        self._conclude(verdicts[-1] if verdicts else no_gradients())
        return loss

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
        raise FloatingPointError(
            f"evaluation {len(verdicts)} of the closure in one step of "
            f"{type(self.inner).__name__} gave non-finite gradients in "
            f"{', '.join(nonfinite_names(self._named_grads()))}. The rule has moved already, so "
            f"the step cannot be skipped. Lower lr or the loss scale."
        )

    # ---------------------------------------- small things

    def _params(self) -> Iterator[Tensor]:
        return (param for group in self.param_groups for param in group["params"])

    def _grads(self) -> list[Tensor]:
        return [p.grad for p in self._params() if p.grad is not None]

    def _named_grads(self) -> list[tuple[str, Tensor]]:
        named = names_of(self.param_groups)
        return [(name, param.grad) for param, name in named if param.grad is not None]

    def _name(self, param: Tensor) -> str:
        return next(name for other, name in names_of(self.param_groups) if other is param)

    def _warn_of_edits(self) -> None:
        if self._store.edited:
            names = [self._name(param) for param in self._store.edited]
            more = f" and {len(names) - 1} more were" if len(names) > 1 else " was"
            self._warn(
                "edit",
                f"{names[0]}{more} written outside of step() since the last one; masters were read "
                f"again where they differ, and kept their FP32 bits elsewhere. Call adopt_params() "
                f"after an intended edit.",
            )
            self._store.edited.clear()

    def _warn(self, cause: str, message: str) -> None:
        """Warn once for each cause, at the line that called step."""
        if cause not in self._warned:
            self._warned.add(cause)
            warnings.warn(message, RuntimeWarning, stacklevel=_user_level())


def _user_level() -> int:
    """`stacklevel` of the first frame outside of this package and of torch."""
    frame, level = inspect.currentframe(), 0
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if module.split(".")[0] not in ("mixprec", "torch", "contextlib"):
            break
        frame, level = frame.f_back, level + 1
    return level
