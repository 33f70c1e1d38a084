"""MixedPrecision: the rule of any `torch.optim.Optimizer`, run on exact FP32 masters.

The wrapper shares the inner optimizer's group dicts, state and hooks, so that a schedule attached
to either one, before or after wrapping, acts on both and nothing ever needs synchronising. What a
step does is in `step`, where masters live in `masters`, how a rule may run in `admission`.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from mixprec import checkpoint, fp32_weights
from mixprec.admission import admit
from mixprec.arguments import check_options, check_parameters
from mixprec.explain import explain
from mixprec.fused.admission import admit_fused
from mixprec.fused.groups import Fused
from mixprec.fused.judge import DeviceJudge
from mixprec.fused.step import FusedStep
from mixprec.masters import MASTER, MasterStore
from mixprec.names import names_of
from mixprec.run import make_state
from mixprec.state_formats import StateFormats
from mixprec.step import LossScaler, OnNonfinite, SteppingOptimizer

_HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)

# The wrapper that each parameter was last given to; an older one must not step it any more.
_owners: Any = WeakIdKeyDictionary()


class MixedPrecision(SteppingOptimizer):
    """An optimizer that runs the rule of `inner` on FP32 masters of 16-bit parameters.

    Every BF16 or FP16 parameter `p` gets a master in FP32, kept with the rule's own state in
    `state[p]`, which is FP32 too. The rule updates the master; the parameter is the master,
    rounded. FP32 and FP64 parameters have no second copy and are stepped bit for bit as by `inner`
    alone.

    Args:
        inner: any optimizer instance, fresh or with state, over the model's own parameters.
        masters: "full" keeps FP32 tensors (4 B/param); "split" keeps 16 bits beside each BF16
        weight
            (2 B/param), from which the FP32 value is restored exactly; "auto" takes "split" for
            BF16 parameters of rules that treat tensors one by one, else "full".
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
        ValueError: for masters="split" on FP16 or with nothing to split, for parameters that
            overlap in memory, and for other arguments out of range.

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
        _check_inner(inner)
        check_options(
            masters, loss_scaler, max_grad_norm, on_nonfinite, bucket_numel, fused, state_formats
        )
        check_parameters(inner.param_groups, masters)
        store = MasterStore(masters)
        super().__init__(
            inner,
            store,
            loss_scaler,
            max_grad_norm,
            on_nonfinite,
            bucket_numel,
            FusedStep(inner, store, fused, state_formats),
        )
        for name in _HOOKS:
            setattr(self, name, getattr(inner, name))
        self.defaults = inner.defaults
        self.param_groups, self.state = inner.param_groups, inner.state
        self._adopt_state()
        self._take_over()

    def __repr__(self) -> str:
        return f"MixedPrecision({self.inner!r})"

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

        Raises:
            RuntimeError: if a loss scaler is set but no loss was scaled since the last step.
            FloatingPointError: for non-finite gradients, as `on_nonfinite` says.
        """
        return self._step(closure, grad_factor)

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
        self._fused.prepare_replay()
        self._steps += 1

    # ---------------------------------------- masters and weights

    def masters(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Every parameter with its FP32 master; a parameter that needs no master with itself.

        A full master is the live tensor, a split one a decoded copy. Read them; to change weights,
        use `masters_in_model` or write to the parameters.
        """
        self._fused.settle()
        for param in self._params():
            with torch.no_grad():  # never around the yield: the caller's code would run inside
                master = self._store.master(self.state, param)
            yield param, master

    @contextmanager
    def masters_in_model(self) -> Generator[None]:
        """Inside, the model's parameters are their FP32 masters: evaluate, average or export them.

        Parameters keep their identity; their dtype is FP32 inside and what it was afterwards. What
        is written to them inside is kept: the masters take it over and the weights are rounded from
        it. Splitting costs FP32 copies of all split masters while it lasts. Not for backward
        passes.

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
        held = [(p, p.data, master) for p, master in self.masters() if self._store.has(p)]
        versions = [param._version for param, _, _ in held]
        self._in_model = True
        try:
            for param, _, master in held:
                param.data = master
            yield
        finally:
            self._in_model = False
            for (param, weight, master), version in zip(held, versions, strict=True):
                param.data = weight
                if param._version != version:
                    self._store.set(self.state, param, master)

    @torch.no_grad()
    def fp32_state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """`model.state_dict()` with masters in place of 16-bit parameters, everything else in FP32.

        Tied names share one tensor. 16-bit parameters that this optimizer does not hold, and
        16-bit buffers, are widened. As in any state dict, what is FP32 already (full masters, FP32
        parameters) is the live tensor: clone it, or save it, before the next step.

        Raises:
            ValueError: if the model holds none of this optimizer's parameters.
        """
        return fp32_weights.fp32_state_dict(model, self.masters())

    @torch.no_grad()
    def load_fp32_state_dict(self, model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
        """Load FP32 weights: masters keep every bit, 16-bit parameters get their rounding.

        Raises:
            ValueError: for missing, unexpected or misshapen entries; nothing is changed then.
        """
        self._fused.settle()
        ours = {id(param) for param in self._params() if self._store.has(param)}

        def set_master(param: Tensor, value: Tensor) -> bool:
            if id(param) in ours:
                self._store.set(self.state, param, value.float())
            return id(param) in ours

        fp32_weights.load_fp32_state_dict(model, state_dict, set_master)

    @torch.no_grad()
    def adopt_params(self) -> None:
        """Start every master from its parameter's value, exactly, after editing weights by hand.

        Edits are followed without this call as well: a full master is read again where its weight
        is no longer its rounding, and a split one keeps no more than a remainder below half of the
        weight's spacing. This drops those remainders too.
        """
        self._fused.settle()
        for param in self._params():
            if self._store.known(self.state, param):
                self._store.set(self.state, param, param.detach().float())

    # ---------------------------------------- state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the inner optimizer; its parameters get masters at their first step."""
        if not hasattr(self, "inner"):
            super().add_param_group(param_group)
            return
        self._fused.settle()
        known = len(self.param_groups)
        self.inner.add_param_group(param_group)
        try:
            check_parameters(self.param_groups, self._store.choice)
        except (TypeError, ValueError):
            del self.param_groups[known:]
            raise
        self._adopt_state()
        self._take_over()
        self._admissions.clear()
        self._fused.reset()
        self._checked = False

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the parameters' gradients, as the inner optimizer does."""
        self.inner.zero_grad(set_to_none=set_to_none)

    def train(self, mode: bool = True) -> None:
        """Pass `train()` or `eval()` on to a rule that has modes (schedule-free); else nothing."""
        method: Callable[[], Any] | None = getattr(self.inner, "train" if mode else "eval", None)
        if method is None:
            return
        if any(self.state.get(p) for p in self._params()):
            self._ready()
            self._fused.release()
            groups: dict[int, list[Tensor]] = {
                i: [p for p in group["params"] if self.state.get(p) or not self._in_buckets]
                for i, group in enumerate(self.param_groups)
            }
            self._run_rule(method, None, groups)
            self._warn_of_edits()
            return
        method()  # nothing to move yet, and a rule may want its mode before it is tried
        for param in [p for p in self._params() if p in self.state and not self.state[p]]:
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
        self._ready()
        if self._admission is not None and self._admission.calls_closure:
            raise RuntimeError(
                f"{type(self.inner).__name__} makes its state from a closure's loss; step once "
                f"before saving or loading a distributed checkpoint."
            )
        new = [
            (index, param)
            for index, group in enumerate(self.param_groups)
            for param in group["params"]
            if param.requires_grad and not set(self.state.get(param, ())) - {MASTER}
        ]
        one_by_one = self._admission is None or self._admission.per_parameter
        for chosen in [[item] for item in new] if one_by_one else [new]:
            make_state(self.inner, self.state, self._store, chosen)

    def state_dict(self) -> dict[str, Any]:
        """The inner rule's state dict, with an FP32 `master` for each 16-bit parameter.

        Masters are decoded, so full and split checkpoints are one format, and a bare optimizer on
        FP32 parameters loads them too. Empty before the first step, as for any optimizer.
        """
        self._fused.settle()
        decode = self.register_state_dict_post_hook(self._decode, prepend=True)
        try:
            return {**checkpoint.own_entries(self.inner), **super().state_dict()}
        finally:
            decode.remove()

    @torch.no_grad()
    def _decode(self, _optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        ids = [key for group in state_dict["param_groups"] for key in group["params"]]
        state = dict(state_dict["state"])
        for key, param in zip(ids, self._params(), strict=True):
            if key in state:
                state[key] = self._fused.decoded(state[key], param)
            if self._store.known(self.state, param):
                master = self._store.master(self.state, param)
                state[key] = {**state.get(key, {}), MASTER: master}
        return {**state_dict, "state": state}

    @torch._disable_dynamo
    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class, in either storage, or of the bare inner optimizer.

        Everything is checked first; if it fails, nothing has changed. States come back at the dtype
        they were saved in. Weights are not written: where a weight is not the rounding of the
        loaded master when the next step begins, the weight wins, with a warning. So the model and
        the optimizer may be loaded in either order.

        Raises:
            ValueError: naming what is missing, too much or misshapen in the checkpoint, or that
                another rule saved it.
        """
        state_dict = state_dict.copy()
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed: Any = hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        saved_groups, saved_state = deepcopy(state_dict["param_groups"]), state_dict["state"]
        torch_rule = type(self.inner).__module__.startswith("torch.optim")
        pairs = checkpoint.pair(saved_groups, self.param_groups, self._name)
        checkpoint.check_rule(saved_groups, self.param_groups, self.inner)
        checkpoint.check(saved_state, pairs, self._name, torch_rule=torch_rule)
        checkpoint.load_own_entries(self.inner, state_dict)
        group_of = {key: group for group in saved_groups for key in group["params"]}
        state: defaultdict[Any, Any] = defaultdict(dict)
        for key, entry in saved_state.items():
            if key not in pairs:
                state[key] = entry
                continue
            param = pairs[key]
            state[param] = checkpoint.restored(entry, param, group_of[key], torch_rule=torch_rule)
            if not self._store.has(param):
                state[param].pop(MASTER, None)
            if MASTER in state[param]:
                self._store.early.pop(param, None)
        for group, saved in zip(self.param_groups, saved_groups, strict=True):
            kept = {key: group[key] for key in ("params", "param_names") if key in group}
            group.clear()
            group.update({**saved, **kept})
        self.inner.__setstate__({"state": state, "param_groups": self.param_groups})
        self.state = self.inner.state
        self._store.forget_versions()
        self._fused.adopt(self._params())
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def __getstate__(self) -> dict[str, Any]:
        self._fused.settle()
        shared = {"state", "param_groups", "defaults"}
        apart = ("inner", "_fused", "_device_judge")
        own = {k: v for k, v in vars(self).items() if k not in apart and _is_picklable(k)}
        rule = {k: v for k, v in vars(self.inner).items() if k not in shared and _is_picklable(k)}
        fused = (self._fused.fused, self._fused.formats)
        return {**own, "inner": (type(self.inner), rule), "_fused": fused}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "inner" not in state:
            super().__setstate__(state)
            return
        (kind, rule), fused = state["inner"], state["_fused"]
        own = {k: v for k, v in state.items() if k not in ("inner", "_fused")}
        self.inner = object.__new__(kind)
        hooks = {name: OrderedDict[int, Any]() for name in _HOOKS}
        vars(self).update(own, **hooks)
        shared = {name: own[name] for name in ("state", "param_groups", "defaults")}
        vars(self.inner).update(rule, **shared, **hooks)
        self._patch_step_function()
        self.inner._patch_step_function()
        self._store.forget_versions()
        self._fused = FusedStep(self.inner, self._store, *fused)
        self._device_judge = DeviceJudge()
        self._fused.adopt(self._params())
        self._superseded_by = ""
        self._take_over()

    # ---------------------------------------- what happened, and why

    @property
    def grads_finite(self) -> bool:
        """Whether the last step went through; False if overflow made it skip. May synchronise."""
        return not bool(self._verdict.overflowed)

    def metrics(self) -> dict[str, float]:
        """Numbers of the last step and counts since construction, as floats. May synchronise.

        `grad_norm` is the L2 norm after unscaling and before clipping.
        """
        metrics = {
            "grad_norm": float(self._verdict.norm),
            "steps": float(self._steps),
            "skipped_steps": float(self._skips.total),
            "skips_in_a_row": float(self._skips.in_a_row),
        }
        if self.loss_scaler is not None:
            metrics["loss_scale"] = self.loss_scaler.get_scale()
        return metrics

    def explain(self, *, formula: bool = False, source: bool = False) -> str:
        """How the rule runs and why, in which tier, and what each group's masters cost.

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
        admission = self._admission
        if admission is None and any(map(self._store.has, self._params())):
            admission = admit(self.inner)
            self._store.whole = not admission.per_parameter
        details = [f"non-finite gradients: {self.on_nonfinite} the step"]
        if self.max_grad_norm is not None:
            details.append(f"gradients clipped to norm {self.max_grad_norm} in FP32")
        if self.loss_scaler is not None:
            details.append(f"loss scaled by {type(self.loss_scaler).__name__}")
        if formula:
            details += _formulas(self.inner)
        if source:
            details += self._sources()
        return explain(
            type(self.inner).__name__,
            self.param_groups,
            admission,
            self._store.storage,
            self.bucket_numel,
            self._how_fused,
            details,
        )

    def _sources(self) -> Iterator[str]:
        if self._store.whole:
            return
        for index in range(len(self.param_groups)):
            found = self._fused.admission(index)
            if found is not None and found.fusible:
                yield f"param_groups[{index}] runs\n\n{self._fused.source(index)}"

    def _how_fused(self, index: int) -> str:
        """The tier of a group's 16-bit parameters, and why it is no lower one."""
        below = "tier 3" if self._store.whole or self._store.choice == "full" else "tier 2"
        if not any(map(self._store.has, self.param_groups[index]["params"])):
            below = "the rule itself"
        if self._store.whole:
            return f"not fused ({below}): the rule sees all masters at once"
        found = self._fused.admission(index)
        if found is None:
            return f"not fused ({below}): {self._fused.why_not(index)}"
        if not found.fusible:
            return f"not fused ({below}): {found.reason}"
        return f"fused (tier 1, {self._fused.means(index)}): {found.reason}"

    # ---------------------------------------- small things

    def _adopt_state(self) -> None:
        """Widen what the inner optimizer has kept so far for 16-bit parameters."""
        for group in self.param_groups:
            for param in group["params"]:
                entry = self.state.get(param)
                if entry and self._store.has(param) and MASTER not in entry:
                    self.state[param] = checkpoint.widened(entry, param)
                    checkpoint.refill_adagrad(self.inner, group, self.state[param])

    def _take_over(self) -> None:
        """Become the one wrapper of these parameters."""
        for param, name in names_of(self.param_groups):
            owner = _owners[param]() if param in _owners else None
            if owner is not None and owner is not self:
                owner._superseded_by = name
            _owners[param] = weakref.ref(self)


def _formulas(inner: Optimizer) -> Iterator[str]:
    """What each group's rule computes by element, in a step after its first ones."""
    for index, group in enumerate(inner.param_groups):
        if group["params"]:
            found = admit_fused(inner, index)
            if found.fusible:
                lines = str(found.programs[-1]).splitlines()
                yield "\n    ".join([f"param_groups[{index}] computes", *lines])
            else:
                yield f"param_groups[{index}] has no formula: {found.reason}"


def _is_picklable(name: str) -> bool:
    """Schedulers put a bound `step` on the instance; torch leaves hooks out of its pickles too."""
    return name not in _HOOKS and name not in ("step", "grad_scale", "found_inf")


def _check_inner(inner: object) -> None:
    if isinstance(inner, MixedPrecision):
        raise TypeError(
            "inner is a MixedPrecision already: two wrappers would hold two masters of one weight. "
            "Wrap its inner optimizer, or use it as it is."
        )
    if not isinstance(inner, Optimizer):
        hint = " Call the class first." if isinstance(inner, type) else ""
        kind = inner.__name__ if isinstance(inner, type) else type(inner).__name__
        raise TypeError(
            f"inner must be an instance of torch.optim.Optimizer, not {kind}.{hint} For example "
            f"MixedPrecision(torch.optim.AdamW(model.parameters(), lr=3e-4))."
        )
    if not {"param_groups", "state", "_optimizer_step_pre_hooks"} <= vars(inner).keys():
        raise TypeError(
            f"{type(inner).__name__} has no param_groups and state of its own, as a wrapper around "
            f"another optimizer has not, so masters could not take the parameters' place. Give the "
            f"optimizer that it wraps to MixedPrecision, and wrap the result."
        )
