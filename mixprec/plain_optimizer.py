"""One guarded step of a plain optimizer whose gradients carry a known factor.

A plain optimizer is any `torch.optim.Optimizer` over FP32 or FP64 parameters that is not wrapped
in MixedPrecision. Its gradients are multiplied by the factor that takes the loss scale and the
token count off, in place and in their own precision; the step happens only if all of them are
finite and the factor is not 0, which stands for a window without tokens. The factor is judged with
the gradients: one that is not finite, that is negative, or that FP32 rounds to 0 or to infinity
skips the step as a non-finite gradient does. The host reads one bool,
or none for torch's fused rules, which can be told on the device to leave everything as it was.
"""

from __future__ import annotations

import inspect
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from mixprec.caller_modes import plain_modes
from mixprec.gradients import grad_norm, is_dtensor, scale_
from mixprec.parameters import names_of

__all__ = [
    "Outcome",
    "check_plain",
    "is_mixed_precision",
    "refuse_closure_rule",
    "step_plain",
    "takes_found_inf",
]


class Outcome(NamedTuple):
    """What a step came to. `grads_finite` and `counted` are 0-d bools on the factor's device."""

    grads_finite: Tensor
    """Whether all gradients are, and the factor is one to multiply them by."""
    counted: Tensor
    """False for a step that tells nothing about the gradients: a factor of 0, or none there."""
    stepped: bool | None
    """None where the device decided and the host does not know."""
    named_grads: list[tuple[str, Tensor]]
    judged_factor: Tensor
    """The factor, or NaN if it is none to multiply gradients by; those are left alone then."""


def takes_found_inf(inner: Optimizer) -> bool:
    """Whether the rule skips on the device when given `found_inf` (torch's fused rules do)."""
    supports = bool(getattr(inner, "_step_supports_amp_scaling", False))
    return supports and all(bool(group.get("fused")) for group in inner.param_groups)


def is_mixed_precision(optimizer: Optimizer) -> bool:
    """Whether `optimizer` unscales by itself.

    The protocol is an attribute `loss_scaler` (a scaler or None), and `step(closure=None, *,
    grad_factor=None)`, which multiplies gradients by the 0-d tensor `grad_factor` and by the
    scaler's `inverse`, and does nothing at all where `grad_factor` is 0.
    """
    return hasattr(optimizer, "loss_scaler")


def refuse_closure_rule(optimizer: Optimizer) -> None:
    """Raise TypeError for a rule, such as LBFGS, that cannot step without a closure."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(
            f"{type(optimizer).__name__} evaluates the loss several times in a step, and each time "
            f"the loss scale and the token count must come off the gradients. Call "
            f"mixprec.MixedPrecision(...).step(closure) with a closure that multiplies the loss by "
            f"the loss scale and divides it by the number of tokens."
        )


def check_plain(optimizer: Optimizer) -> None:
    """Raise TypeError if `step_plain` would not do right by this optimizer."""
    refuse_closure_rule(optimizer)
    for param, name in names_of(optimizer.param_groups):
        if param.dtype in (torch.float32, torch.float64):
            continue
        if param.dtype not in (torch.bfloat16, torch.float16):
            raise TypeError(
                f"{name} is {param.dtype}; gradients are unscaled and checked in FP32 or FP64, and "
                f"masters exist for torch.bfloat16 and torch.float16. Leave it out of this "
                f"optimizer."
            )
        raise TypeError(
            f"{name} is {param.dtype}, and a plain optimizer would unscale and update it in "
            f"that precision, where small gradients and updates vanish. Wrap it: "
            f"mixprec.MixedPrecision({type(optimizer).__name__}(...))."
        )


def step_plain(optimizer: Optimizer, factor: Tensor) -> Outcome:
    """Multiply gradients by `factor`, 0-d; step if all are finite and `factor` is not 0.

    Finite is what has a finite norm (`gradients.grad_norm`): elements beyond 1e19 overflow.

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> weight.grad = torch.tensor([4.0, 8.0])
    >>> optimizer = torch.optim.SGD([weight], lr=1.0)
    >>> step_plain(optimizer, torch.tensor(0.25)).stepped, weight.data
    (True, tensor([-1., -2.]))
    >>> weight.grad = torch.tensor([1.0, float("inf")])
    >>> step_plain(optimizer, torch.tensor(0.25)).stepped, weight.data
    (False, tensor([-1., -2.]))
    >>> weight.grad = torch.ones(2)
    >>> step_plain(optimizer, torch.tensor(1.0) / 0).stepped, weight.data
    (False, tensor([-1., -2.]))
    """
    check_plain(optimizer)
    named_grads = [
        (name, p.grad) for p, name in names_of(optimizer.param_groups) if p.grad is not None
    ]
    for name, grad in named_grads:
        _refuse_sharded(name, grad)
    grads = [grad for _, grad in named_grads]
    usable = _is_usable(factor, grads)
    scale_(grads, torch.where(usable, factor, 1.0))
    grads_finite = torch.isfinite(grad_norm(grads)).to(factor.device) & usable
    counted = (factor != 0) & bool(grads)
    stepped = _step_if(grads_finite & counted, optimizer)
    judged = torch.where(usable, factor, torch.nan)
    return Outcome(grads_finite, counted, stepped, named_grads, judged)


def _is_usable(factor: Tensor, grads: list[Tensor]) -> Tensor:
    """Whether gradients may be multiplied by `factor` as it will be rounded for them."""
    wide = all(grad.dtype == torch.float64 for grad in grads)
    rounded = factor if wide else factor.float()
    return torch.isfinite(rounded) & ((rounded > 0) | (factor == 0))


def _step_if(proceed: Tensor, optimizer: Optimizer) -> bool | None:
    if not _skips_on_device(optimizer):
        stepped = bool(proceed)
        if stepped:
            with plain_modes():
                optimizer.step()
        return stepped
    optimizer.found_inf = proceed.logical_not().float()  # pyright: ignore[reportAttributeAccessIssue]
    try:
        with plain_modes():
            optimizer.step()
    finally:
        del optimizer.found_inf  # pyright: ignore[reportAttributeAccessIssue]
    return None


def _skips_on_device(optimizer: Optimizer) -> bool:
    """Whether the rule takes `found_inf`; not in a parameter's first step, when the momentum that
    fused SGD makes would be left uninitialised by a skip."""
    stepped = (p for p, _ in names_of(optimizer.param_groups) if p.grad is not None)
    return takes_found_inf(optimizer) and all(optimizer.state.get(p) for p in stepped)


def _refuse_sharded(name: str, grad: Tensor) -> None:
    if is_dtensor(grad):
        raise TypeError(
            f"the gradient of {name} is sharded, and each rank would decide by its own shard "
            f"whether to step, so weights would drift apart. Use torch.amp.GradScaler there, whose "
            f"ranks agree."
        )
