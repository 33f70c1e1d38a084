"""Loss scaling: lift gradients into FP16's range for the way back, take the factor off in FP32.

FP16 holds nothing below 2^-24, and gradients do fall below it: they become exact zeros, and the
layers behind them stop learning. A loss multiplied by S gives every gradient S times larger; 1/S,
multiplied in FP32 before the update, changes only those that would have been lost. S is a power of
two, so neither product rounds, and in BF16 and FP32 the detour is invisible bit for bit. How large
S may be is found by trial; a trial that fails costs one skipped step.

The state of `DynamicLossScaler` is four 0-d tensors on the device of the first loss,

    loss_scale              S
    growth_tracker          finite updates in a row since S last grew
    overflows_in_a_row      skipped updates in a row; one of these two rows is always 0
    scale_before_overflows  S when the row of overflows began, for the error's text

and a verdict that may be waiting to move it. Every transition:

    call      waiting    effect
    multiply  nothing    none; S multiplies the loss
    multiply  a verdict  the verdict moves the state, once; nothing waits; S multiplies the loss
    update    nothing    (grads_finite or not counted, counted) waits
    update    a verdict  both waiting parts merge: finite if both are, counted if either is

    verdict      the state moves to
    not counted  itself: a step without tokens says nothing about S
    finite       growth_tracker + 1, overflows_in_a_row = 0; when growth_interval is reached,
                 S = min(S * growth_factor, max_scale) and growth_tracker = 0
    overflow     growth_tracker = 0, overflows_in_a_row + 1; from the hysteresis-th in a row on,
                 S = max(S * backoff_factor, min_scale)

Verdicts wait because optimizers may share a scaler: when the first has stepped, the gradients of
the second still carry the old S, which `inverse` has to go on undoing. So run all backward passes
of an iteration before its first step, or use up one optimizer's gradients before the next loss is
multiplied. Where neither holds, give each optimizer a scaler of its own.

With hysteresis 1, S takes the values of `torch.amp.GradScaler`, but stops at its two bounds instead
of running on to 0 (from where it never returns) or to infinity. An update launches about twenty
0-d kernels; `multiply`, `inverse` and `update` never wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer

from mixprec.gradients import nonfinite_names
from mixprec.loss_scaling.machine import ScalePolicy, ScaleState, ScaleVerdict, check_power_of_two
from mixprec.plain_optimizer import is_mixed_precision, refuse_closure_rule, step_plain
from mixprec.user_warnings import Said
from mixprec.window.scaled_losses import is_scaled, mark_scaled
from mixprec.window.window import refuse_open_window
from mixprec.wrapped import inside_of

__all__ = ["DynamicLossScaler", "StaticLossScaler"]

# In the order of ScaleState.
_STATE_KEYS = ("scale", "_growth_tracker", "_overflows_in_a_row", "_scale_before_overflows")

_GRAD_SCALER_KEYS = (
    "scale",
    "growth_factor",
    "backoff_factor",
    "growth_interval",
    "_growth_tracker",
)

_SCALE_TOO_HIGH = (
    "It may still be too high: start or let it fall lower (init_scale, min_scale, or a smaller "
    "StaticLossScaler). If not, look for NaN in the batch and in the weights."
)
_SCALE_NOT_TO_BLAME = (
    "So scaling is not what overflows. Look for NaN in the batch and in the weights, keep these "
    'layers in FP32 with mixprec.cast_model(..., keep_fp32=["name"]), or train in BF16, which has '
    "FP32's range."
)


class _LossScaler:
    """What both scalers do; they differ in how far S may move."""

    losses_scaled: int
    """Losses multiplied so far, known to the host. An optimizer that remembers the count of its
    last step knows whether its gradients carry S."""

    moves: int
    """How often S may have moved so far, known to the host. Gradients may be added to each other
    only while this stands still."""

    def __init__(self, policy: ScalePolicy, init_scale: float) -> None:
        policy.check_scale("init_scale", init_scale)
        self._policy = policy
        self._state = ScaleState.of(init_scale, 0, 0, init_scale)
        self._waiting: ScaleVerdict | None = None
        self.losses_scaled = 0
        self.moves = 0
        self._unread_steps = 0
        self._said = Said()
        self._seen_by: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()
        self._stale_until = 0
        """Losses scaled before the state was loaded or copied: no gradients carry this S."""

    @property
    def max_skips_in_a_row(self) -> int:
        return self._policy.max_skips_in_a_row

    def multiply(self, loss: Tensor) -> Tensor:
        """`loss.float() * S`; call `.backward()` on it.

        An FP64 loss stays FP64. A 16-bit loss is cast up, because FP16 ends at 65504: at the
        initial S of 2^16 a loss of 1 would already be infinite.
        """
        if not isinstance(loss, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"loss is a {type(loss).__name__}; multiply() takes one tensor. Of several losses "
                f"multiply the sum, or each by itself: [scaler.multiply(l) for l in losses]."
            )
        if is_scaled(loss):
            raise RuntimeError(
                "the loss was multiplied by a loss scaler already, and 1/S comes off its gradients "
                "only once. Multiply the loss itself, and call backward() on the result."
            )
        if not loss.is_floating_point():
            raise TypeError(f"loss is {loss.dtype}; only a floating-point loss can be scaled")
        if not self.losses_scaled:
            self._state = self._state.to(loss.device)
        if self._waiting is not None:
            self._state, self._waiting = self._next_state(), None
            self.moves += self._policy.min_scale < self._policy.max_scale
        self.losses_scaled += 1
        wide = loss.to(torch.promote_types(loss.dtype, torch.float32))
        return mark_scaled(wide * self._state.loss_scale.to(loss.device))

    @property
    def inverse(self) -> Tensor:
        """1/S for the gradients at hand: 0-d, FP32, exact because S is a power of two."""
        return self._state.loss_scale.reciprocal()

    @torch.no_grad()
    def update(self, grads_finite: Tensor | bool, *, counted: Tensor | bool = True) -> None:
        """Record the verdict of one optimizer's step; S moves at the next `multiply`.

        Args:
            grads_finite: whether all unscaled gradients, on all ranks, were finite.
            counted: false for a step that tells nothing, such as a window without tokens.
        """
        if not self.losses_scaled:
            raise RuntimeError(
                "update() before any loss was scaled: gradients that do not carry the loss scale "
                "say nothing about it. Call multiply(loss).backward() first."
            )
        finite, counted = self._flag(grads_finite), self._flag(counted)
        finite = finite | ~counted
        if self._waiting is not None:
            finite, counted = finite & self._waiting.grads_finite, counted | self._waiting.counted
        self._waiting = ScaleVerdict(finite, counted)

    def get_scale(self) -> float:
        """S of the next loss. Waits for the device."""
        return float(self._next_state().loss_scale)

    def check_progress(self, named_grads: Iterable[tuple[str, Tensor | None]] = ()) -> None:
        """Raise if `max_skips_in_a_row` steps in a row were skipped. Waits for the device.

        For an optimizer that has just skipped and knows it; where only the device knows, once every
        `max_skips_in_a_row` steps. `named_grads` is read only to name the culprits.

        Raises:
            FloatingPointError: with the first non-finite gradients and the way S went.
        """
        state = self._next_state()
        skips = int(state.overflows_in_a_row)
        if skips < self.max_skips_in_a_row:
            return
        before, now = float(state.scale_before_overflows), float(state.loss_scale)
        names = ", ".join(map(repr, nonfinite_names(named_grads)))
        way = f"fell from {before} to {now}" if now < before else f"stayed at {now}"
        raise FloatingPointError(
            f"{skips} steps in a row had non-finite gradients"
            + (f", first in {names}" if names else "")
            + f"; the loss scale {way}. "
            + (_SCALE_TOO_HIGH if now > 1 else _SCALE_NOT_TO_BLAME)
        )

    def step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any] | None = None,
        *,
        grad_factor: Tensor | float | None = None,
    ) -> Any:
        """Unscale, check, and step or skip a plain optimizer with FP32 or FP64 parameters.

        Gradients are multiplied in place by `1/S`, times `grad_factor` (0-d) if given; a factor of
        0 skips. A closure is called once before that, and its value returned; it has to `multiply`
        its loss. The host reads one bool; none for the fused rules of torch, which skip on the
        device. For 16-bit or sharded parameters and for clipping, use `mixprec.MixedPrecision`.
        """
        optimizer = inside_of(optimizer)
        if is_mixed_precision(optimizer):
            raise TypeError(
                "MixedPrecision divides by the loss scale itself; step() here would do it again. "
                "Give it the scaler, mixprec.MixedPrecision(inner, loss_scaler=scaler), and call "
                "optimizer.step()."
            )
        refuse_closure_rule(optimizer)
        refuse_open_window(optimizer)
        loss = None if closure is None else self._call(closure)
        if self.losses_scaled == max(self._seen_by.get(optimizer, 0), self._stale_until):
            raise RuntimeError(
                f"no loss was scaled since the last step of {type(optimizer).__name__}, or since "
                f"the scaler's state was loaded: its gradients would be divided by a loss scale "
                f"that they do not carry. Call multiply(loss).backward() before step()."
            )
        factor = self.inverse
        if grad_factor is not None:
            factor = factor * _on_device(grad_factor, factor)
        self._seen_by[optimizer] = self.losses_scaled
        outcome = step_plain(optimizer, factor)
        self.update(outcome.grads_finite, counted=outcome.counted)
        self._unread_steps = self._unread_steps + 1 if outcome.stepped is None else 0
        if outcome.stepped is False:
            self._say_factor(grad_factor, outcome.judged_factor)
        if outcome.stepped is False or self._unread_steps == self.max_skips_in_a_row:
            self._unread_steps = 0
            named_factor = ("grad_factor", outcome.judged_factor)
            self.check_progress([named_factor, *outcome.named_grads])
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Settings and state as plain numbers, `torch.amp.GradScaler`'s under its names.

        What is waiting is counted in. Waits for the device.
        """
        values = (part.item() for part in self._next_state())
        return {**dict(zip(_STATE_KEYS, values, strict=True)), **asdict(self._policy)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over the state dict of a scaler or of `torch.amp.GradScaler`, whole or not at all.

        Settings that GradScaler does not have stay as they are; no overflows are on its record.
        Gradients at hand carry the scale of before: if it was another, they cannot be stepped on.
        """
        self._policy, state = self._parse(state_dict)
        before = self._next_state().loss_scale
        self._state, self._waiting = state.to(before.device), None
        if before.is_meta or float(before) != self.get_scale():
            self._stale_until = self.losses_scaled
        self.moves += 1

    def _parse(self, state_dict: Mapping[str, Any]) -> tuple[ScalePolicy, ScaleState]:
        if not state_dict:
            raise ValueError(
                "the loss scaler's state dict is empty, as torch.amp.GradScaler(enabled=False) "
                "saves it: there is no loss scale in it. Do not load it; start with a fresh scaler."
            )
        settings = asdict(self._policy)
        missing = [key for key in _GRAD_SCALER_KEYS if key not in state_dict]
        unknown = [key for key in state_dict if key not in (*settings, *_STATE_KEYS)]
        if missing or unknown:
            raise ValueError(
                f"not the state dict of a loss scaler: {missing} missing, {unknown} unknown. "
                f"Give what state_dict() of a mixprec loss scaler or torch.amp.GradScaler returned."
            )
        policy = ScalePolicy(**{name: state_dict.get(name, settings[name]) for name in settings})
        no_overflows = (state_dict["scale"], 0, 0, state_dict["scale"])
        state = dict(zip(_STATE_KEYS, no_overflows, strict=True))
        state.update((key, state_dict[key]) for key in _STATE_KEYS if key in state_dict)
        for name in ("scale", "_scale_before_overflows"):
            policy.check_scale(f"{name} in the state dict", state[name])
        for name in ("_growth_tracker", "_overflows_in_a_row"):
            if not isinstance(state[name], int) or state[name] < 0:
                raise ValueError(f"{name} is {state[name]!r}; it counts steps: an int from 0 up")
        return policy, ScaleState.of(*state.values())

    def _say_factor(self, grad_factor: Tensor | float | None, judged: Tensor) -> None:
        if grad_factor is not None and not self._said.knows("factor") and bool(judged.isnan()):
            self._said.warn(
                "factor",
                f"grad_factor is {float(grad_factor)}, by which gradients cannot be multiplied; "
                f"the step was skipped, and counts as one with non-finite gradients. P / T is such "
                f"a number where T is 0: give 0 to leave out a step without tokens.",
            )

    def _next_state(self) -> ScaleState:
        if self._waiting is None:
            return self._state
        return self._policy.move(self._state, self._waiting)

    def _flag(self, value: Tensor | bool) -> Tensor:
        """0-d bool beside the state. `torch.full`, because `torch.tensor` would copy and wait."""
        device = self._state.loss_scale.device
        if isinstance(value, Tensor):
            return value.to(device=device, dtype=torch.bool).reshape(())
        return torch.full((), value, dtype=torch.bool, device=device)

    def _call(self, closure: Callable[[], Any]) -> Any:
        before = self.losses_scaled
        with torch.enable_grad():
            loss = closure()
        if self.losses_scaled == before:
            raise RuntimeError(
                "the closure did not scale its loss, so its gradients do not carry the loss scale. "
                "Inside the closure, call multiply(loss).backward()."
            )
        return loss

    def __getstate__(self) -> dict[str, Any]:
        # Weak references to the optimizers of this process mean nothing in a copy.
        return {key: value for key, value in self.__dict__.items() if key != "_seen_by"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _seen_by=WeakKeyDictionary())
        self._stale_until = self.losses_scaled


class DynamicLossScaler(_LossScaler):
    """A loss scale that doubles after 2000 finite steps in a row and halves on overflow.

    States and transitions: at the head of this module.

    Args:
        init_scale: S of the first loss.
        growth_factor: what S is multiplied by after `growth_interval` finite steps in a row.
        backoff_factor: what S is multiplied by on overflow.
        growth_interval: finite steps in a row before S grows.
        hysteresis: the n-th overflow in a row, and each that follows it, backs off; any finite step
            starts the count again. With 2, single bad batches leave S alone.
        min_scale: S never falls below. What overflows at 1 overflows without scaling too.
        max_scale: S never grows above. Gradients that do not overflow (BF16, FP32, FP8 with a scale
            per cast) would otherwise drive S up until the squares in the FP32 norm do. With the
            2^18 tokens that GradientAccumulator presumes, 2^24 puts the gradient of a token's loss
            at 2^6, and FP16 still holds what is 2^30 times smaller; presume more, raise it as much.
        max_skips_in_a_row: that many skipped steps in a row raise FloatingPointError.

    Raises:
        ValueError: for a scale or factor that is not a power of two, or bounds out of order.

    >>> import torch
    >>> scaler = DynamicLossScaler(init_scale=2.0**10)
    >>> weight = torch.ones((), requires_grad=True)
    >>> scaler.multiply(weight * 3).backward()
    >>> weight.grad, weight.grad * scaler.inverse
    (tensor(3072.), tensor(3.))
    >>> scaler.update(grads_finite=False)
    >>> scaler.get_scale()
    512.0
    """

    def __init__(
        self,
        init_scale: float = 2.0**16,
        *,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        hysteresis: int = 1,
        min_scale: float = 1.0,
        max_scale: float = 2.0**24,
        max_skips_in_a_row: int = 50,
    ) -> None:
        policy = ScalePolicy(
            growth_factor=growth_factor,
            backoff_factor=backoff_factor,
            growth_interval=growth_interval,
            hysteresis=hysteresis,
            min_scale=min_scale,
            max_scale=max_scale,
            max_skips_in_a_row=max_skips_in_a_row,
        )
        super().__init__(policy, init_scale)


class StaticLossScaler(_LossScaler):
    """A loss scale that never moves: the same machine with both bounds at `loss_scale`.

    For runs whose range is known. Overflowing steps are skipped and counted all the same.

    >>> scaler = StaticLossScaler(2.0**7)
    >>> scaler.get_scale()
    128.0
    """

    def __init__(self, loss_scale: float, *, max_skips_in_a_row: int = 50) -> None:
        check_power_of_two("loss_scale", loss_scale)
        # The first four move nothing between equal bounds; they are what GradScaler would say.
        policy = ScalePolicy(2.0, 0.5, 2000, 1, loss_scale, loss_scale, max_skips_in_a_row)
        super().__init__(policy, loss_scale)

    def _parse(self, state_dict: Mapping[str, Any]) -> tuple[ScalePolicy, ScaleState]:
        policy, state = super()._parse(state_dict)
        if policy.min_scale != policy.max_scale:
            raise ValueError(
                f"this state dict lets the loss scale move from {policy.min_scale} to "
                f"{policy.max_scale}; load it into a DynamicLossScaler"
            )
        return policy, state


def _on_device(grad_factor: Tensor | float, factor: Tensor) -> Tensor:
    """The factor beside `factor`: FP64 for a number, which FP32 might round to 0 or to infinity."""
    if isinstance(grad_factor, Tensor):
        if grad_factor.numel() != 1:
            raise TypeError(
                f"grad_factor has shape {list(grad_factor.shape)}; it is one number for all "
                f"gradients, such as presumed_tokens / num_tokens"
            )
        return grad_factor.to(factor.device).reshape(())
    wide = torch.float32 if factor.device.type == "mps" else torch.float64
    return torch.full((), grad_factor, dtype=wide, device=factor.device)  # a fill does not wait
