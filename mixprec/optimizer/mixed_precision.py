"""MixedPrecision: the rule of any `torch.optim.Optimizer`, run on exact FP32 masters.

The wrapper shares the inner optimizer's group dicts, state and hooks, so that a schedule attached
to either one, before or after wrapping, acts on both and nothing ever needs synchronising. What a
step does is in `step`, where masters live in `masters`, how a rule may run in `rule.admission`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mixprec.caller_modes import run_in_plain_modes
from mixprec.optimizer.arguments import check_inner, check_options, check_parameters
from mixprec.optimizer.buckets import RuleCalls
from mixprec.optimizer.checkpoint import fp32_weights, loading
from mixprec.optimizer.checkpoint import reading as checkpoint
from mixprec.optimizer.checkpoint.loaded_masters import LoadedMasters
from mixprec.optimizer.checkpoint.own_state import own_entries
from mixprec.optimizer.checkpoint.states import States
from mixprec.optimizer.checks import ParamChecks
from mixprec.optimizer.fused.eligible import Fused
from mixprec.optimizer.fused.step import FusedStep
from mixprec.optimizer.judging.grad_factor import checked
from mixprec.optimizer.judging.judge import Judge
from mixprec.optimizer.judging.scaled_grads import ScaledGrads
from mixprec.optimizer.masters import LOW, MasterStore
from mixprec.optimizer.owners import guard_inner_step, plain_states, superseded_by_newer, take_over
from mixprec.optimizer.recovery import Recovery
from mixprec.optimizer.reports.explain import Explanation
from mixprec.optimizer.reports.outcome import Outcome
from mixprec.optimizer.setup import Driver, LossScaler, OnNonfinite, Setup
from mixprec.optimizer.state_formats import StateFormats
from mixprec.optimizer.step import Step
from mixprec.optimizer.undo import Leaving
from mixprec.parameters import names_of

_HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


def _setting(name: str, doc: str) -> Any:
    """A setting of a step, which all parts read where it is kept."""
    return property(
        lambda self: getattr(self._setup, name),
        lambda self, value: setattr(self._setup, name, value),
        doc=doc,
    )


class MixedPrecision(Optimizer):
    """An optimizer that runs the rule of `inner` on FP32 masters of 16-bit parameters.

    Every BF16 or FP16 parameter `p` gets a master in FP32, kept with the rule's own state in
    `state[p]`, which is FP32 too. The rule updates the master; the parameter is the master,
    rounded. FP32 and FP64 parameters have no second copy and are stepped bit for bit as by `inner`
    alone.

    Args:
        inner: any optimizer instance, fresh or with state, over the model's own parameters.
        masters: "full" keeps FP32 tensors (4 B/param); "split" keeps 16 bits beside each BF16
            weight (2 B/param), from which the FP32 value is restored exactly; "auto" takes "split"
            for BF16 parameters of rules that treat tensors one by one, else "full".
        loss_scaler: a `DynamicLossScaler` or `StaticLossScaler`; scale losses with its `multiply`.
        max_grad_norm: clips the gradients of the whole step to this L2 norm, in FP32, after
            unscaling, with the formula of `torch.nn.utils.clip_grad_norm_`.
        on_nonfinite: "skip" leaves everything as it was when a gradient is not finite; "raise"
            raises `FloatingPointError`. After 50 skips in a row both raise. "ignore" does not look,
            as a bare optimizer does not, and saves one reading of all gradients.
        bucket_numel: elements of FP32 scratch that a rule which treats tensors one by one is run
            in; "auto" is 2^20 on a CPU and 2^22 elsewhere. A larger tensor makes a bucket of its
            own. None runs every rule on all parameters at once.
        fused: whether an element-wise rule runs as one kernel, made from its own code and checked
            against it first: casts, clip, rule and rounding in one pass over memory. "auto" fuses
            16-bit parameters on a GPU with Triton; True insists, and fuses FP32 parameters too;
            off a GPU the same program runs in plain torch. False never fuses.
        state_formats: how a fused rule's states are stored between steps: a mapping of state names
            to "fp32", "bf16" or "int8" (codes in blocks of 32), or "8bit" or "bf16" for all.

    Raises:
        TypeError: if `inner` is no optimizer or a wrapper already; for integer, complex and 8-bit
            parameters; at the first step for a rule that does not read its parameters from groups.
        ValueError: for masters="split" on FP16 or with nothing to split, for `state_formats` with
            no 16-bit parameter and no fused=True, for parameters that overlap in memory, and for
            other arguments out of range.

    Numerics:
        Masters are bit-identical to the bare rule on FP32 parameters given the same gradients; of a
        fused rule to 2e-6 of each update, with the bits of SGD and Lion.
        Weights round to nearest: ties to even from full masters, ties away from zero in split ones.
        Clip, unscale and `grad_factor` multiply FP32 gradients once. FP32 gradients are scaled in
        place, as by torch's clipping; 16-bit ones are left alone and scaled on their way to FP32.

    >>> import torch
    >>> import mixprec
    >>> weight = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    >>> optimizer = mixprec.MixedPrecision(torch.optim.SGD([weight], lr=1e-3))
    >>> for _ in range(4):
    ...     weight.grad = torch.ones_like(weight)
    ...     optimizer.step()
    >>> weight[0].item(), [round(m[0].item(), 4) for _, m in optimizer.masters()]
    (0.99609375, [0.996])
    """

    # A class switch: True lets a torch.amp.GradScaler hand over FP16 gradients and its scale.
    _step_supports_amp_scaling = False

    def __init__(
        self,
        inner: Optimizer,
        *,
        masters: Literal["auto", "full", "split"] = "auto",
        loss_scaler: LossScaler | None = None,
        max_grad_norm: float | None = None,
        on_nonfinite: OnNonfinite = "skip",
        bucket_numel: int | Literal["auto"] | None = "auto",
        fused: Fused = "auto",
        state_formats: StateFormats = None,
    ) -> None:
        check_inner(inner, MixedPrecision)
        check_options(
            masters, loss_scaler, max_grad_norm, on_nonfinite, bucket_numel, fused, state_formats
        )
        check_parameters(inner.param_groups, masters, fused, state_formats)
        super().__init__([{"params": []}], {})  # the groups will be the inner optimizer's own
        self.inner = inner
        for name in _HOOKS:
            setattr(self, name, getattr(inner, name))
        self.defaults = inner.defaults
        self.param_groups, self.state = inner.param_groups, inner.state
        store = MasterStore(masters)
        setup = Setup(inner, store, loss_scaler, max_grad_norm, on_nonfinite)
        step = FusedStep(inner, store, fused, state_formats)
        scaled, check, outcome = ScaledGrads(), ParamChecks(setup), Outcome(setup, step)
        calls = RuleCalls(setup, step, bucket_numel, check, scaled)
        judge = Judge(setup, outcome)
        loaded = LoadedMasters(setup, outcome)
        parts = [setup, check, calls, outcome, loaded]
        recovery = Recovery(setup, step, outcome, scaled, parts, check)
        self._setup, self._store, self._fused, self._calls = setup, store, step, calls
        self._check, self._scaled, self._outcome, self._loaded = check, scaled, outcome, loaded
        self._states = States(setup, check, step, loaded, outcome, recovery)
        self._recovery = recovery
        self._take_step = Step(setup, calls, step, judge, outcome, check, scaled, recovery)
        plain_states(inner)
        self._states.adopt()
        take_over(self)
        guard_inner_step(self)

    def __repr__(self) -> str:
        return f"MixedPrecision({self.inner!r})"

    loss_scaler = _setting("loss_scaler", "The loss scaler, whose state is saved with this.")
    max_grad_norm = _setting("max_grad_norm", "The norm that gradients are clipped to.")
    on_nonfinite = _setting("on_nonfinite", "What comes of gradients that are not finite.")

    @property
    def bucket_numel(self) -> int | None:
        """Elements of FP32 scratch for a rule that runs bucket by bucket."""
        return self._calls.bucket_numel

    # ---------------------------------------- the step

    @overload
    def step(self, closure: None = None, *, grad_factor: Tensor | float | None = None) -> None: ...
    @overload
    def step(
        self, closure: Callable[[], float], *, grad_factor: Tensor | float | None = None
    ) -> float: ...

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], float] | None = None,
        *,
        grad_factor: Tensor | float | None = None,
    ) -> float | None:
        """Update masters and parameters from the parameters' gradients.

        Args:
            closure: computes the loss and its gradients again, and returns the loss. With a loss
                scaler it must scale what it differentiates.
            grad_factor: multiplies all gradients, in FP32, together with unscaling and clipping:
                a number or a 0-d tensor, which is not read by the host. 0 says that nothing was
                counted (a window of padding): the step is the identity and no overflow is recorded.
                One that is not finite, alone or times 1/loss_scale, is skipped like an overflow.

        Raises:
            TypeError, ValueError: for a `grad_factor` that is no number, negative, or several.
            RuntimeError: if a loss scaler is set but no loss was scaled since the last step.
            FloatingPointError: for non-finite gradients, as `on_nonfinite` says.
        """
        return run_in_plain_modes(self._step, closure, checked(grad_factor))

    @torch._disable_dynamo
    def _step(
        self, closure: Callable[[], float] | None, grad_factor: Tensor | float | None
    ) -> float | None:
        self._begin("step()")
        self._recovery.run(lambda: self._ready(with_loss=closure is not None))
        loss, verdict = self._take_step(closure, grad_factor)
        if verdict is not None:
            self._loaded.warn_of_edits()
            self._outcome.report(verdict)
        return loss

    def _begin(self, call: str = "") -> None:
        """Before anything else: what came before is over, and whole if a call is named."""
        self.inner.param_groups, self.inner.state = self.param_groups, self.state
        self._setup.driver = Driver.of(self)
        self._recovery.settle()
        if call:
            self._recovery.check_finished(call)

    def _ready(self, *, with_loss: bool = False) -> None:
        """Whether this may step; the device's news; a look at weights, rule and masters."""
        if taken := superseded_by_newer(self):
            raise RuntimeError(
                f"parameter {taken!r} was given to a MixedPrecision created later; "
                f"two wrappers would hold two masters of one weight. Step only the newest, or "
                f"wrap separate parameters."
            )
        self._setup.refuse_in_model("step()", "a step would round to FP32")
        is_new = self._loaded.fresh or not self._check.checked
        self._outcome.hear()
        self._check.first_look()
        self._calls.admit(with_loss=with_loss)
        self._loaded.conclude()
        if is_new:
            self._outcome.tell_infinite()

    @torch.no_grad()
    def prepare_replay(self) -> None:
        """Before each replay of a CUDA graph that holds `step()`: hand it this step's numbers.

        A graph repeats what the device does; learning rate, step count and bias corrections are
        computed by the rule's own code on the host, which this runs once. The captured step itself
        does nothing until it is replayed. Waits for the last replay to tell whether it was skipped
        for overflow (not with `on_nonfinite="ignore"`).

            for _ in range(3):
                train_step()  # forward, backward, step(), on a side stream
            with torch.cuda.graph(graph):
                train_step()
            for batch in data:
                copy_into_static_inputs(batch)
                optimizer.prepare_replay()
                graph.replay()

        Raises:
            RuntimeError: without a captured step, and where the rule has taken another branch.
        """
        self._begin("prepare_replay()")
        self._outcome.hear()
        prepare, recovery = self._fused.prepare_replay, self._recovery
        recovery.run(lambda: run_in_plain_modes(lambda _: prepare(recovery.record.pending), None))
        self._outcome.count_replay()

    # ---------------------------------------- masters and weights

    def masters(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Every parameter with its FP32 master; a parameter that needs no master with itself.

        A full master is the live tensor, a split one a decoded copy. Read them; to change weights,
        use `masters_in_model` or write to the parameters.
        """
        self._begin()
        self._check.masters(self._setup.params())
        for param in self._setup.params():
            with torch.no_grad():  # never around the yield: the caller's code would run inside
                master = self._store.master(self.state, param)
            yield param, master

    @contextmanager
    def masters_in_model(self, model: nn.Module | None = None) -> Generator[None]:
        """Inside, the model's parameters are their FP32 masters: evaluate, average or export them.

        Parameters keep their identity; their dtype is FP32 inside and what it was afterwards. What
        is written to them inside is kept, in whatever way it is written: the masters take it over
        and the weights are rounded from it. 16-bit buffers of `model`, if it is given, are FP32
        inside as well. Splitting costs FP32 copies of all split masters while it lasts. Not for
        backward passes. Inside of another such context, this one does nothing.

        >>> import torch
        >>> import mixprec
        >>> weight = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
        >>> optimizer = mixprec.MixedPrecision(torch.optim.SGD([weight], lr=0.1))
        >>> with optimizer.masters_in_model():
        ...     weight.dtype
        torch.float32
        >>> weight.dtype
        torch.bfloat16
        """
        if self._setup.in_model:
            yield
            return
        self._begin("masters_in_model()")
        held = [(p, p.data, master) for p, master in self.masters() if self._store.has(p)]
        buffers = [] if model is None else [b for b in model.buffers() if b.dtype in LOW]
        wide = [(buffer, buffer.data, buffer.float()) for buffer in buffers]
        try:
            self._setup.in_model, self._store.in_model = True, bool(held)
            for tensor, _, value in (*held, *wide):
                tensor.data = value
            yield
        finally:
            self._recovery.leave(Leaving(self._setup, held, wide))
        self._check.note_masters()
        self._outcome.tell_infinite()

    @torch.no_grad()
    def fp32_state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """`model.state_dict()` with masters in place of 16-bit parameters, everything else in FP32.

        Tied names share one tensor. 16-bit parameters that this optimizer does not hold, and
        16-bit buffers, are widened. As in any state dict, what is FP32 already (full masters, FP32
        parameters) is the live tensor: clone it, or save it, before the next step.

        Raises:
            ValueError: if the model holds none of this optimizer's parameters.
        """
        self._begin("fp32_state_dict()")
        self._check.masters(self._setup.params())
        self._loaded.become_params()
        return fp32_weights.fp32_state_dict(model, self.masters())

    @torch.no_grad()
    def load_fp32_state_dict(self, model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
        """Load FP32 weights: masters keep every bit, 16-bit parameters get their rounding.

        Raises:
            ValueError: for missing, unexpected or misshapen entries, and for numbers that would be
                infinite in a 16-bit parameter; nothing is changed then.
        """
        self._begin()
        self._check.masters(self._setup.params())
        ours = {id(param) for param in self._setup.params() if self._store.has(param)}

        def set_master(param: Tensor, value: Tensor) -> bool:
            if id(param) in ours:
                self._store.set(self.state, param, value.float())
            return id(param) in ours

        fp32_weights.load_fp32_state_dict(model, state_dict, set_master)
        self._check.note_masters()

    @torch.no_grad()
    def adopt_params(self, params: Iterable[Tensor] | None = None) -> None:
        """Read masters again from weights that somebody has written, where they are not the same.

        A step does so as well, and warns. Where the weight is still its master, rounded, the master
        keeps its FP32 bits. After a step that was stopped half-way, this says that training is to
        go on from the weights and states that are there.

        Args:
            params: those to look at; all by default.
        """
        self._begin()
        self._setup.refuse_in_model("adopt_params()", "the weights will be rounded from")
        chosen = list(self._setup.params() if params is None else params)
        self._check.masters(chosen)
        for param in chosen:
            if self._store.known(self.state, param):
                self._store.set(self.state, param, self._store.master(self.state, param))
        if params is None:
            self._recovery.accept()

    # ---------------------------------------- state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the inner optimizer; its parameters get masters at their first step."""
        if not hasattr(self, "inner"):
            super().add_param_group(param_group)
            return
        self._begin()
        known = len(self.param_groups)
        self.inner.add_param_group(param_group)
        try:
            groups = self._fused.groups
            check_parameters(self.param_groups, self._store.choice, groups.fused, groups.formats)
        except BaseException:
            del self.param_groups[known:]
            raise
        self._states.adopt()
        take_over(self)
        self._calls.try_again()
        self._fused.groups.reset()
        self._check.checked = False

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the parameters' gradients, as the inner optimizer does."""
        self.inner.zero_grad(set_to_none=set_to_none)
        self._scaled.forget()

    def train(self, mode: bool = True) -> None:
        """Pass `train()` or `eval()` on to a rule that has modes (schedule-free); else nothing."""
        run_in_plain_modes(lambda _: self._set_mode(mode), None)

    def _set_mode(self, mode: bool) -> None:
        method: Callable[[], Any] | None = getattr(self.inner, "train" if mode else "eval", None)
        if method is None:
            return
        if any(self.state.get(p) for p in self._setup.params()):
            self._begin("train()" if mode else "eval()")
            self._ready()
            self._take_step.change_mode(method)
            self._loaded.warn_of_edits()
            return
        method()  # nothing to move yet, and a rule may want its mode before it is tried
        for param in [p for p in self._setup.params() if p in self.state and not self.state[p]]:
            del self.state[param]

    def eval(self) -> None:
        """Pass `eval()` on to a rule that has modes, see `train`."""
        self.train(False)

    @torch.no_grad()
    def init_state(self) -> None:
        """Make the state of all parameters that have none, as it is before a first step.

        Distributed checkpoints read the state of a fresh optimizer as the template of what to
        load, and want every parameter to have some. The rule runs on copies with zero gradients at
        lr = 0; counters called `step` are set back to 0, and groups are left as they are.

        Raises:
            RuntimeError: for a rule that evaluates closures (LBFGS), whose state needs a loss.
        """
        run_in_plain_modes(lambda _: self._make_state(), None)

    def _make_state(self) -> None:
        self._begin("init_state()")
        self._setup.refuse_in_model("init_state()", "are no state")
        self._check.masters(self._setup.params())
        self._ready()
        admission = self._calls.admission
        if admission is not None and admission.calls_closure:
            raise RuntimeError(
                f"{type(self.inner).__name__} makes its state from a closure's loss; step once "
                f"before saving or loading a distributed checkpoint."
            )
        self._states.make(one_by_one=admission is None or admission.per_parameter)

    def state_dict(self) -> dict[str, Any]:
        """The inner rule's state dict, with an FP32 `master` for each 16-bit parameter.

        Masters are decoded, so full and split checkpoints are one format, and a bare optimizer on
        FP32 parameters loads them too. Empty before the first step, as for any optimizer. A loss
        scaler's state is in it as "loss_scaler".

        Raises:
            ValueError: for a parameter that is no longer of its master's shape.
        """
        self._begin("state_dict()")
        own = own_entries(self.inner)
        hooks: list[Any] = []
        try:
            hooks.append(self.register_state_dict_post_hook(self._states.decode, prepend=True))
            return {**own, **super().state_dict()}
        finally:
            for hook in hooks:
                hook.remove()

    @torch._disable_dynamo
    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class, in either storage, or of the bare inner optimizer.

        Everything is checked first, what the rule will want of it included; a load that fails or
        is interrupted has changed nothing. States come back at the dtype they were saved in, and
        the loss scaler, where one was saved and is here. Weights are not written: where a weight
        is not the rounding of the loaded master when the next step begins, the weight wins, with a
        warning. So the model and the optimizer may be loaded in either order. Only FP32 parameters
        that are the roundings of saved masters become those masters.

        Raises:
            TypeError: for what is no dict.
            ValueError: naming what is missing, too much or misshapen in the checkpoint, or that
                another rule saved it.
            RuntimeError: inside `masters_in_model()`.
        """
        self._setup.refuse_in_model("load_state_dict()", "would be overwritten when it ends")
        checkpoint.check_dict(state_dict)
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed: Any = hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        names = {id(param): name for param, name in names_of(self.param_groups)}
        loaded = loading.read(
            state_dict, self.inner, self.loss_scaler, lambda param: names[id(param)]
        )
        self._states.commit(loaded, self)
        self._loaded.become_params()
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def __getstate__(self) -> dict[str, Any]:
        self._setup.refuse_in_model("copying", "would be FP32 for ever in the copy")
        self._begin("copying this optimizer")
        self._check.masters(self._setup.params())
        shared = {"state", "param_groups", "defaults"}
        own = {k: v for k, v in vars(self).items() if _is_picklable(k)}
        rule = {k: v for k, v in vars(self.inner).items() if k not in shared and _is_picklable(k)}
        # The rule itself, so that a schedule over it is copied as one over the copy's rule.
        return {**own, "_rule": rule}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "inner" not in state:
            super().__setstate__(state)
            return
        rule = state["_rule"]
        own = {k: v for k, v in state.items() if k != "_rule"}
        hooks = {name: OrderedDict[int, Any]() for name in _HOOKS}
        vars(self).update(own, **hooks)
        shared = {name: own[name] for name in ("state", "param_groups", "defaults")}
        vars(self.inner).update(rule, **shared, **hooks)
        self._patch_step_function()
        self.inner._patch_step_function()
        self._store.forget_versions()
        self._fused.adopt(self._setup.params())
        self._check.note_masters()
        take_over(self)
        guard_inner_step(self)

    # ---------------------------------------- what happened, and why

    @property
    def grads_finite(self) -> bool:
        """Whether the last step went through. May synchronise.

        False if it was skipped, for gradients or a `grad_factor` that were not finite, and if there
        was nothing to step with: no tokens, or no gradient. A schedule that waits for it counts
        what the rule counts. True before the first step.
        """
        verdict = self._outcome.verdict
        return verdict is None or (bool(verdict.held) and not bool(verdict.overflowed))

    def metrics(self) -> dict[str, float]:
        """Numbers of the last step and counts since construction, as floats. May synchronise.

        `grad_norm` is the L2 norm after unscaling and before clipping; a step that is skipped for
        its `grad_factor` has that of the gradients times it, so inf or NaN. `steps` went through,
        as many as the rule itself has counted; `skipped_steps` were skipped, `skips_in_a_row` of
        them since the last that went through; `empty_steps` had no tokens or no gradient.
        """
        counts, verdict = self._outcome.counts.now(), self._outcome.verdict
        metrics = {
            "grad_norm": 0.0 if verdict is None else float(verdict.norm),
            "steps": float(counts.stepped),
            "skipped_steps": float(counts.skipped),
            "skips_in_a_row": float(counts.skipped_in_a_row),
            "empty_steps": float(counts.empty),
        }
        if self.loss_scaler is not None:
            metrics["loss_scale"] = self.loss_scaler.get_scale()
        return metrics

    def explain(self, *, formula: bool = False, source: bool = False) -> str:
        """How the rule runs and why, in which tier, and what each group's masters cost.

        Changes nothing. Where a step would refuse, it says so in the step's words.

        With `formula`, also what the rule computes for each element, read off its own code by
        recording a step: a prime marks new values, s0, s1, ... are numbers that follow from the
        group and the step, r0, r1, ... numbers of one tensor such as a sum, numel its elements. Or
        the reason why there is none. With `source`, the Triton source of a fused group's kernel.

        >>> import torch
        >>> import mixprec
        >>> weight = torch.nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
        >>> inner = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
        >>> print(mixprec.MixedPrecision(inner).explain(formula=True).partition("computes\\n")[2])
            momentum_buffer' = momentum_buffer * s0 + grad
            master' = master + s1 * momentum_buffer'
        """
        found = Explanation(self._setup, self._calls, self._fused)
        return found.text(formula=formula, source=source)

    # ---------------------------------------- small things

    def _leave_states(self) -> None:
        """Leave the inner rule's states as it keeps them itself: somebody else runs or saves it."""
        if not self._recovery.runs:  # else it does so itself, or a closure looks at it meanwhile
            self._recovery.settle()
            self._fused.held.release()


def _is_picklable(name: str) -> bool:
    """Schedulers put a bound `step` on the instance; torch leaves hooks out of its pickles too."""
    return name not in _HOOKS and name not in ("step", "grad_scale", "found_inf")
