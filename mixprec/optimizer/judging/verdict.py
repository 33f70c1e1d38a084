"""What the gradients of a step are worth: their norm, whether they are finite, the one factor.

    norm    = |factor| * L2 norm of all gradients, accumulated in FP32
    factor  = grad_factor / loss_scale * min(1, max_grad_norm / (norm + 1e-6))

The clip coefficient is that of `torch.nn.utils.clip_grad_norm_`. A power of two in the factor is
exact, so a loss scale leaves no trace in FP32 and BF16.

The factor is judged with the gradients. It is usable if it is above 0 and finite once it is rounded
to what it multiplies, and if the norm of the product is finite there: no element is larger.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mixprec.gradients import are_zero, grad_norm, nonfinite_names, part_norms


@dataclass(frozen=True)
class Verdict:
    """What to do with the gradients of a step. Flags are tensors where the host does not know."""

    norm: Tensor
    factor: Tensor | None = None
    finite: Tensor | bool = True
    """Whether the gradients are, before they are multiplied."""
    usable: Tensor | bool = True
    """Whether anything was counted and the factor is usable; true where gradients are to blame."""
    counted: Tensor | bool = True
    """False for an empty window, which says nothing about overflow."""
    zero: Tensor | bool = False
    """Whether every gradient is exactly 0."""
    absent: bool = False
    """Whether no parameter has a gradient; the rule runs and finds nothing to do."""
    found_inf: Tensor | None = None
    """1.0 where the rule has to skip by itself, on the device."""
    recorded: bool = False
    """Whether the device has entered it into the step counts already."""
    parts: tuple[Tensor, Sequence[int]] | None = None
    """The norms of parts of the gradients and whose they are, where the host does not know."""

    @property
    def go(self) -> bool:
        """Whether to call the rule."""
        if self.found_inf is not None:
            return True
        return bool(self.finite) and bool(self.usable) and bool(self.counted)

    def on_host(self) -> Verdict:
        """The same, read by the host, which waits for the device where it does not know."""
        finite, usable, counted = bool(self.finite), bool(self.usable), bool(self.counted)
        zero = bool(self.zero)
        return replace(
            self, finite=finite, usable=usable, counted=counted, zero=zero, found_inf=None
        )

    @property
    def overflowed(self) -> Tensor | bool:
        """Whether something was counted, and it or its factor was not finite."""
        fine = _and(self.finite, self.usable)
        return _and(not fine if isinstance(fine, bool) else fine == 0, self.counted)

    @property
    def held(self) -> Tensor | bool:
        """Whether there was anything to step with: tokens, and gradients."""
        return _and(self.counted, not self.absent)

    @property
    def tells(self) -> Tensor | bool:
        """Whether it says anything about a loss scale."""
        return _and(self.usable, not self.absent)


def _and(left: Tensor | bool, right: Tensor | bool) -> Tensor | bool:
    """Both flags, by the host where one of them settles it."""
    if isinstance(left, bool):
        return right if left else False
    if isinstance(right, bool):
        return left if right else False
    return (left != 0) & (right != 0)


def no_gradients() -> Verdict:
    """The verdict where no parameter has a gradient: the rule runs and finds nothing to do."""
    return Verdict(norm=torch.zeros(()), absent=True)


def unjudged(factor: Tensor | None, counted: Tensor | bool, *, on_device: bool) -> Verdict:
    """The verdict on gradients that nobody looks at: what is in them goes into the weights.

    The factor is one number, so it is looked at all the same.
    """
    unknown = torch.full((), float("nan"))
    if factor is None:
        return Verdict(unknown, factor, counted=counted)
    usable = _is_number(factor, torch.float32) & counted
    if not on_device:
        return Verdict(unknown, factor, usable=usable, counted=counted).on_host()
    skip = usable.logical_not().to(torch.float32)
    return Verdict(unknown, factor, usable=usable, counted=counted, found_inf=skip)


def judge(
    grads: Sequence[Tensor],
    factor: Tensor | None = None,
    *,
    counted: Tensor | bool = True,
    external_found_inf: Tensor | None = None,
    max_grad_norm: float | None = None,
    on_device: bool = False,
) -> Verdict:
    """The verdict on gradients that will be multiplied by `factor`.

    Args:
        grads: all gradients of the step.
        factor: 0-d, or None for 1.
        counted: whether any token was counted.
        external_found_inf: the finding of a torch.amp.GradScaler, nonzero for an overflow.
        max_grad_norm: L2 norm to clip to, or None.
        on_device: leave the flags on the device; else the host reads one scalar, and looks closer
            only where that says overflow.

    >>> import torch
    >>> verdict = judge([torch.tensor([3.0, 4.0])], torch.tensor(2.0), max_grad_norm=1.0)
    >>> verdict.norm.item(), round(verdict.factor.item(), 4), verdict.go
    (10.0, 0.2, True)
    """
    if not grads:
        return no_gradients()
    parts, owners = part_norms(grads)
    norm = torch.linalg.vector_norm(parts)
    if isinstance(counted, Tensor):
        flag = counted.to(norm.device)
    else:
        flag = torch.full((), counted, dtype=torch.bool, device=norm.device)
    finite = torch.isfinite(norm)
    if external_found_inf is not None:
        finite = finite & (external_found_inf.to(norm.device).reshape(()) == 0)
    verdict = _clipped(norm, factor, max_grad_norm)
    usable = flag if factor is None else flag & (_fits(norm, verdict, grads) | ~finite)
    zero = norm == 0
    if on_device:
        return replace(
            verdict,
            finite=finite,
            usable=usable,
            counted=flag,
            zero=zero,
            found_inf=(finite & usable).logical_not().to(torch.float32),
            parts=(parts, owners),
        )
    code = int((finite + 2 * flag + 4 * usable + 8 * zero).item())
    is_finite, is_counted = bool(code & 1), bool(code & 2)
    overflow = is_counted and not is_finite and external_found_inf is None
    if overflow and not nonfinite_names(("", g) for g in grads):
        # All are finite, but the sum of their squares left FP32. FP64 has room for it.
        norm = grad_norm([grad.double() for grad in grads])
        verdict = _clipped(norm, factor, max_grad_norm)
        return replace(verdict, usable=factor is None or bool(_fits(norm, verdict, grads)))
    return replace(
        verdict,
        finite=is_finite,
        usable=bool(code & 4),
        counted=is_counted,
        zero=bool(code & 8) and are_zero(grads),  # the squares may have left FP32 below
    )


def _fits(norm: Tensor, verdict: Verdict, grads: Sequence[Tensor]) -> Tensor:
    """Whether gradients of this norm can be multiplied by the factor in their own precision."""
    factor = verdict.factor
    assert factor is not None
    wide = all(grad.dtype == torch.float64 for grad in grads)
    dtype = torch.float64 if wide else torch.float32
    return _is_number(factor, dtype) & ((norm * factor).to(dtype) < torch.inf)


def _is_number(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Whether it is above 0 and finite in the precision that it multiplies in."""
    factor = factor.to(dtype)
    return (factor > 0) & (factor < torch.inf)


def _clipped(norm: Tensor, factor: Tensor | None, max_grad_norm: float | None) -> Verdict:
    if factor is not None:
        norm = norm * factor.abs()
    if max_grad_norm is not None:
        clip = (max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        factor = clip if factor is None else clip * factor
    return Verdict(norm, factor)
