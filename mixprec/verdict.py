"""What the gradients of a step are worth: their norm, whether they are finite, the one factor.

    norm    = |factor| * L2 norm of all gradients, accumulated in FP32
    factor  = grad_factor / loss_scale * min(1, max_grad_norm / (norm + 1e-6))

The clip coefficient is that of `torch.nn.utils.clip_grad_norm_`. A power of two in the factor is
exact, so a loss scale leaves no trace in FP32 and BF16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mixprec.gradients import grad_norm, nonfinite_names


@dataclass(frozen=True)
class Verdict:
    """What to do with the gradients of a step. Flags are tensors where the host does not know."""

    norm: Tensor
    factor: Tensor | None = None
    finite: Tensor | bool = True
    counted: Tensor | bool = True
    """False for an empty window, which says nothing about overflow."""
    found_inf: Tensor | None = None
    """1.0 where the rule has to skip by itself, on the device."""
    recorded: bool = False
    """Whether the device has entered it into the skip counts already."""

    @property
    def go(self) -> bool:
        """Whether to call the rule."""
        return self.found_inf is not None or (bool(self.finite) and bool(self.counted))

    def on_host(self) -> Verdict:
        """The same, read by the host, which waits for the device where it does not know."""
        finite, counted = bool(self.finite), bool(self.counted)
        return replace(self, finite=finite, counted=counted, found_inf=None)

    @property
    def overflowed(self) -> Tensor | bool:
        """Whether something was counted and it was not finite."""
        if isinstance(self.finite, Tensor):
            return self.finite.logical_not() & self.counted
        return not self.finite and bool(self.counted)


class SkipCounts:
    """Steps skipped for overflow, in all and in a row; on the device once the device decides.

    >>> counts = SkipCounts()
    >>> for overflowed in (True, False, True, True):
    ...     counts.add(overflowed)
    >>> counts.total, counts.in_a_row
    (3, 2)
    """

    def __init__(self) -> None:
        self._counts: Tensor = torch.zeros(2, dtype=torch.int64)
        self._in_a_row = False
        """Whether there may be skips in a row to end."""

    def on(self, device: torch.device) -> Tensor:
        """`[2]` int64 on `device`, to be moved on by whoever judges there."""
        if self._counts.device != device:
            source = self._counts.pin_memory() if device.type == "cuda" else self._counts
            self._counts = source.to(device, non_blocking=True)
        self._in_a_row = True
        return self._counts

    def add(self, overflowed: Tensor | bool) -> None:
        if overflowed is False and not self._in_a_row:
            return
        self._in_a_row = overflowed is not False
        if isinstance(overflowed, Tensor):
            overflowed = overflowed.to(self.on(overflowed.device).dtype)
        total, in_a_row = self._counts
        moved = torch.stack([total + overflowed, (in_a_row + overflowed) * overflowed])
        self._counts.copy_(moved)

    @property
    def total(self) -> int:
        """May wait for the device, as `in_a_row` may."""
        return int(self._counts[0])

    @property
    def in_a_row(self) -> int:
        return int(self._counts[1])


def no_gradients() -> Verdict:
    """The verdict where no parameter has a gradient: the rule runs and finds nothing to do."""
    return Verdict(norm=torch.zeros(()))


def unjudged(factor: Tensor | None, counted: Tensor | bool, *, on_device: bool) -> Verdict:
    """The verdict on gradients that nobody looks at: what is in them goes into the weights."""
    unknown = torch.full((), float("nan"))
    if on_device and isinstance(counted, Tensor):
        skip = counted.logical_not().to(torch.float32)
        return Verdict(unknown, factor, counted=counted, found_inf=skip)
    return Verdict(unknown, factor, counted=counted)


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
    norm = grad_norm(grads)
    if isinstance(counted, Tensor):
        flag = counted.to(norm.device)
    else:
        flag = torch.full((), counted, dtype=torch.bool, device=norm.device)
    finite = torch.isfinite(norm)
    if external_found_inf is not None:
        finite = finite & (external_found_inf.to(norm.device).reshape(()) == 0)
    verdict = _clipped(norm, factor, max_grad_norm)
    if on_device:
        skip = (finite & flag).logical_not().to(torch.float32)
        return replace(verdict, finite=finite, counted=flag, found_inf=skip)
    code = int((finite + 2 * flag).item())
    if code == 2 and external_found_inf is None and not nonfinite_names(("", g) for g in grads):
        # All are finite, but the sum of their squares left FP32. FP64 has room for it.
        return _clipped(grad_norm([grad.double() for grad in grads]), factor, max_grad_norm)
    return replace(verdict, finite=bool(code & 1), counted=bool(code & 2))


def _clipped(norm: Tensor, factor: Tensor | None, max_grad_norm: float | None) -> Verdict:
    if factor is not None:
        norm = norm * factor.abs()
    if max_grad_norm is not None:
        clip = (max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        factor = clip if factor is None else clip * factor
    return Verdict(norm, factor)
