"""What the gradients of a window hold: its own micro-batches, and nothing else.

Between micro-batches the sums lie in `param.grad`, where anybody can reach them: another loss's
backward, `zero_grad()`, a step by somebody who does not know that they still carry S/P. So a window

    opens     with no gradient in place: what others left is dropped
    looks     after each backward at which gradients are there, as which tensors in which version
    compares  before the next one, and at the step, with what is there now
    guards    its optimizer by hooks while it is open: no step but the accumulator's, no load
    closes    with gradients cleared, their dtypes as they were, and the hooks gone

A change between two looks is an edit by hand (a mask over rows, a clip) or the work of another
backward pass. Versions do not tell the two apart. The autograd engine numbers its passes, so a pass
of one's own tells how many there were since: where there was none, it was an edit.

Nothing here reads a gradient's values or waits for the device, but for the first leftovers.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from operator import eq, is_
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mixprec.gradients import grad_norm, is_dtensor, local
from mixprec.parameters import listed, names_of
from mixprec.user_warnings import Said
from mixprec.window.token_counts import Count

__all__ = ["Window", "open_window", "refuse_open_window"]

_LOW = (torch.bfloat16, torch.float16)

_HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
)


def _nobody() -> None:
    """The owner of a window that was never opened."""


@dataclass(eq=False)
class Window:
    """Micro-batches since the last step, and what they left in the parameters' gradients."""

    declared: Count | None = None
    counts: list[Count] = field(default_factory=list[Count])
    losses: list[Tensor] = field(default_factory=list[Tensor])
    complete: bool = False
    failed: str = ""
    """The backward that did not come to its end, if one did not."""
    spent: bool = False
    """Whether a step or a reset has begun: of use to nobody, if it has not ended."""
    scaler: object = None
    scaler_moves: int = 0
    grad_dtypes: list[tuple[Tensor, torch.dtype, torch.dtype | None]] | None = None
    """16-bit parameters, their dtype and `grad_dtype` from before this window made the latter FP32;
    None if it has not."""
    owner: Callable[[], object] = _nobody
    """The accumulator, by a weak reference: the optimizer holds the hooks, and they the window."""
    _optimizer: Optimizer | None = None
    _hooked: Optimizer | None = None
    _params: list[Tensor] = field(default_factory=list[Tensor])
    _grads: list[Tensor | None] = field(default_factory=list["Tensor | None"])
    _versions: list[int] = field(default_factory=list[int])
    _passes: int | None = None

    # ---------------------------------------- opening and closing

    @property
    def is_open(self) -> bool:
        return self._optimizer is not None

    def open(self, owner: object, optimizer: Optimizer, said: Said) -> None:
        """Take possession of the gradients of the optimizer's parameters.

        Raises:
            RuntimeError: if another accumulator has.
        """
        other = open_window(optimizer)
        if other not in (None, self) and other.owner() is not None and not other.spent:
            raise RuntimeError(
                f"another GradientAccumulator has a window of {len(other.counts)} micro-batches "
                f"open over this {type(optimizer).__name__}: two windows cannot share gradients. "
                f"Call its step() or reset() first, or use one accumulator for both."
            )
        if other is not None:
            other.close()  # nobody is left who could step it, or it was interrupted here
        params = [param for group in optimizer.param_groups for param in group["params"]]
        _drop_leftovers(params, optimizer, said)
        self.owner, self._params, self._hooked = weakref.ref(owner), params, _with_hooks(optimizer)
        self._guard()
        self._look()
        self._optimizer = optimizer  # last: now it is open

    def close(self) -> None:
        """Clear gradients, give their dtypes back, let the optimizer go. May be called again."""
        for param in self._params:
            if param.grad is not None:
                param.grad = None
        for param, dtype, grad_dtype in self.grad_dtypes or ():
            # One that is the parameter's own follows it, if the model was cast in between.
            param.grad_dtype = param.dtype if grad_dtype == dtype else grad_dtype
        self.unguard()

    def _guard(self) -> None:
        hooked = self._hooked
        if hooked is None:
            return
        hooked.register_step_pre_hook(self._before_step)
        hooked.register_step_post_hook(self._after_step)
        if hasattr(hooked, "_optimizer_load_state_dict_pre_hooks"):  # some set up no more than two
            hooked.register_load_state_dict_pre_hook(self._before_load)

    def unguard(self) -> None:
        """Take the hooks off the optimizer, so that the accumulator may step it."""
        for hooks in (getattr(self._hooked, name, {}) for name in _HOOKS):
            for key in [k for k, hook in hooks.items() if getattr(hook, "__self__", None) is self]:
                del hooks[key]

    def widen(self) -> None:
        """Make gradients of 16-bit parameters FP32; values that are there stay."""
        self.grad_dtypes = []
        for param in self._params:
            if param.dtype in _LOW:
                self.grad_dtypes.append((param, param.dtype, param.grad_dtype))
                grad, param.grad = param.grad, None
                param.grad_dtype = torch.float32
                param.grad = None if grad is None else grad.float()
        self._look()

    # ---------------------------------------- what has changed since the last look

    def _look(self) -> None:
        self._grads = [param.grad for param in self._params]
        self._versions = _versions_of(self._grads)

    def take_in(self) -> tuple[bool, str]:
        """Remember what a backward left: whether that is anything, and what to say of it."""
        grads, versions = self._grads, self._versions
        self._look()
        self._passes = _backward_passes()
        if all(map(is_, grads, self._grads)) and versions == self._versions:
            # Sharded parameters get theirs at the last micro-batch, if they are told to wait.
            return any(map(is_dtensor, self._params)), ""
        rested = sum(map(eq, versions, self._versions)) - self._versions.count(-1)
        return True, self._frozen(versions) if rested > 0 and self.counts else ""

    def _frozen(self, versions: list[int]) -> str:
        """What to say of parameters that have a gradient and ceased to require one."""
        rested = zip(versions, self._versions, self._params, strict=True)
        frozen = [i for i, (v, w, p) in enumerate(rested) if v == w != -1 and not p.requires_grad]
        if not frozen:
            return ""
        return (
            f"{self._named(frozen)} ceased to require gradients in the middle of a window: the "
            f"gradient there is of the first micro-batches alone, and is divided by the tokens of "
            f"all. Freeze parameters between windows."
        )

    def check(self, said: Said, *, at_step: bool = False) -> None:
        """Before the next backward, or the step: nobody else was here.

        At the step, gradients that were cleared for some parameters are left out.

        Raises:
            RuntimeError: if the optimizer has other parameters now, if gradients were cleared, or
                if another backward pass added to them.
        """
        self._check_params()
        now = [param.grad for param in self._params]
        versions = _versions_of(now)
        if all(map(is_, now, self._grads)) and versions == self._versions:
            return
        held = [i for i, grad in enumerate(self._grads) if grad is not None]
        cleared = [i for i in held if now[i] is None]
        edited = [
            i
            for i, (grad, version) in enumerate(zip(now, versions, strict=True))
            if grad is not None and (grad is not self._grads[i] or version != self._versions[i])
        ]
        zeroed = not at_step and edited == held and self._are_zero()
        if zeroed or (cleared and (not at_step or len(cleared) == len(held))):
            cleared = cleared or held
            raise RuntimeError(
                f"the gradient of {self._named(cleared)} was cleared in the middle of a window: "
                f"its {len(self.counts)} micro-batches are counted, and their gradients are gone. "
                f"Leave zero_grad() out, because accumulator.step() clears gradients itself; call "
                f"accumulator.reset() to begin the window anew."
            )
        if edited and self._others_ran():
            raise RuntimeError(
                f"another backward pass has run since micro-batch {len(self.counts)} of this "
                f"window, and the gradient of {self._named(edited)} has changed; a window holds "
                f"what its own micro-batches computed and nothing else. Run the other pass before "
                f"the window opens or after step(), or keep it away from these parameters by "
                f"detach() or requires_grad_(False). Call accumulator.reset() to begin anew."
            )
        if cleared:
            said.warn(
                "cleared",
                f"the gradient of {self._named(cleared)} was cleared between backward() and "
                f"step(); these parameters are left out of the step.",
            )
        if edited:
            self._say_edited(edited, said)

    def _are_zero(self) -> bool:
        """Whether all gradients are zeros, as `zero_grad(set_to_none=False)` makes them.

        Reads the device: asked only where all of them were edited between two micro-batches.
        """
        grads = [param.grad for param in self._params if param.grad is not None]
        return local(grads[0]).device.type != "meta" and not bool(grad_norm(grads) != 0)

    def _say_edited(self, edited: list[int], said: Said) -> None:
        if self.declared is not None and self.scaler is None:
            return  # they are the mean's own
        carried = "the loss scale" if self.scaler is not None else ""
        if self.declared is None:
            carried += " and " * bool(carried) + "the presumed tokens"
        said.warn(
            "edited",
            f"the gradient of {self._named(edited)} was changed by hand after backward(). Until "
            f"step() divides it, it still carries {carried}: a norm or a value that it is clipped "
            f"to there is not the one of the step. Clip with MixedPrecision(..., max_grad_norm=), "
            f"or without a loss scale call accumulator.start(T) first, which makes gradients "
            f"means. Masks and reductions over ranks are right as they are.",
        )

    def _check_params(self) -> None:
        assert self._optimizer is not None
        groups = self._optimizer.param_groups
        params = [param for group in groups for param in group["params"]]
        if len(params) == len(self._params) and all(map(is_, params, self._params)):
            return
        before, after = set(map(id, self._params)), set(map(id, params))
        new = [name for param, name in names_of(groups) if id(param) not in before]
        gone = sum(id(param) not in after for param in self._params)
        raise RuntimeError(
            f"the optimizer's parameters changed in the middle of a window of {len(self.counts)} "
            f"micro-batches (new: {listed(new) or 'none'}; removed: {gone}), so gradients and "
            f"token count would be those of different micro-batches. Add, remove, reorder and "
            f"replace parameters between windows; call accumulator.reset() to begin this one anew."
        )

    def _others_ran(self) -> bool:
        """Whether a backward pass may have run since the last look."""
        passes = _backward_passes()
        return passes is None or self._passes is None or passes != self._passes + 1

    def unreached(self) -> str:
        count = len(self._params)
        if not any(param.requires_grad for param in self._params):
            why = "None of them requires a gradient: call requires_grad_(True) on what is to learn."
        else:
            why = (
                "Most likely they are not the model's any more: load_state_dict(assign=True), "
                "to_empty(), fully_shard, adapters put in and some conversions replace parameters. "
                "Build the optimizer from the model as it is now. Or give the loss to the "
                "accumulator of the optimizer that holds what it depends on."
            )
        return (
            f"the backward reached none of the {count} parameters of this "
            f"{type(self._optimizer).__name__} ({self._named(range(count))}), so nothing would be "
            f"learned from this micro-batch. {why}"
        )

    def _named(self, indices: Sequence[int]) -> str:
        assert self._optimizer is not None
        names = [name for _, name in names_of(self._optimizer.param_groups)]
        return listed([names[i] for i in indices if i < len(names)])

    # ---------------------------------------- the optimizer's hooks

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        if self._is_abandoned():
            return
        raise RuntimeError(
            f"{type(optimizer).__name__} is stepped while a GradientAccumulator has a window open "
            f"over it ({len(self.counts)} micro-batches): the gradients are sums that were not yet "
            f"divided by their tokens. Nothing was changed. {self._way_out()}"
        )

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        if self._is_abandoned():
            return
        raise RuntimeError(
            f"a GradientAccumulator's backward() ran inside the step of "
            f"{type(optimizer).__name__}, in a closure most likely: the step has used sums that "
            f"were not divided by their tokens, and its update is wrong. Call "
            f"accumulator.backward() outside, and accumulator.step() without a closure."
        )

    def _before_load(self, optimizer: Optimizer, *_: Any) -> None:
        if self._is_abandoned():
            return
        raise RuntimeError(
            f"a state dict is loaded into {type(optimizer).__name__} in the middle of a window of "
            f"{len(self.counts)} micro-batches, whose gradients were computed before. Nothing was "
            f"loaded. {self._way_out()}"
        )

    def _is_abandoned(self) -> bool:
        """Whether accumulator and gradients are both gone."""
        if self.owner() is not None:
            return False
        if self.failed:
            return all(param.grad is None for param in self._params)
        pairs = zip(self._params, self._grads, strict=True)
        return not any(grad is not None and param.grad is grad for param, grad in pairs)

    def _way_out(self) -> str:
        if self.owner() is None:
            return "The accumulator is gone: call zero_grad() to drop its gradients."
        return (
            "Call accumulator.step() to step with the mean's gradient, or accumulator.reset() to "
            "drop the window."
        )


def open_window(optimizer: Optimizer) -> Window | None:
    """The window that guards this optimizer, if there is one."""
    hooked = _with_hooks(optimizer)
    hooks = () if hooked is None else hooked._optimizer_step_pre_hooks.values()
    owners = (getattr(hook, "__self__", None) for hook in hooks)
    return next((owner for owner in owners if isinstance(owner, Window)), None)


def refuse_open_window(optimizer: Optimizer) -> None:
    """Raise RuntimeError where a step of this optimizer would use an open window's sums."""
    window = open_window(optimizer)
    if window is not None:
        window._before_step(optimizer)


def _with_hooks(optimizer: Any) -> Optimizer | None:
    """Whose hooks run when `optimizer` steps: its own, or those of what it wraps."""
    while optimizer is not None:
        if "_optimizer_step_pre_hooks" in getattr(optimizer, "__dict__", ()):
            return optimizer
        optimizer = getattr(optimizer, "optimizer", None)
    return None


def _versions_of(grads: Sequence[Tensor | None]) -> list[int]:
    return [-1 if grad is None else grad._version for grad in grads]


def _drop_leftovers(params: Sequence[Tensor], optimizer: Optimizer, said: Said) -> None:
    """Clear gradients that another backward left, and say once whose they were.

    Zeros, as `zero_grad(set_to_none=False)` leaves them, are not worth a word. A device other than
    the CPU is asked for that once, when there are leftovers for the first time.
    """
    left = {id(param): param.grad for param in params if param.grad is not None}
    if not left:
        return
    for param in params:
        param.grad = None
    grads = list(left.values())
    device = local(grads[0]).device.type
    if said.knows("leftovers") or device == "meta":
        return
    if not bool(grad_norm(grads) != 0):
        if device != "cpu":
            said.keep("leftovers")
        return
    names = [name for param, name in names_of(optimizer.param_groups) if id(param) in left]
    said.warn(
        "leftovers",
        f"{listed(names)} had a gradient when a window opened, left by another backward pass; it "
        f"was dropped, because a window holds what its own micro-batches computed and nothing "
        f"else. Call zero_grad() to drop it in silence.",
    )


@cache
def _probe() -> Callable[[], int | None]:
    numbers: list[int] = []
    with torch.enable_grad(), torch.inference_mode(False):
        leaf = torch.zeros((), device="cpu", requires_grad=True)
        root = leaf * 1
    number = getattr(torch._C, "_current_graph_task_id", lambda: -1)
    root.register_hook(lambda _: numbers.append(number()))

    def run() -> int | None:
        torch.autograd.grad(root, leaf, retain_graph=True)
        found = numbers.pop()
        return found if found >= 0 else None

    return run


def _backward_passes() -> int | None:
    """The number of a backward pass made here and now; None where the engine does not tell."""
    return _probe()()
