"""Any loss at unit scale: its gradient's RMS measured once, and divided by for ever after.

    grad = c * d(sum of losses) / d(prediction),    c = 1 / RMS over the elements of a first batch

c is frozen, because a multiplier that followed the data would be a learning rate schedule. RMS 1 of
the elements says nothing about their mean: `LossReport.bias_grad` is the RMS of the gradient that a
bias would get, N^-1/2 times a sum over the batch. Near 1 the elements cancel; at N^1/2 they agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from mixprec.umup.scaling import scale_bwd

__all__ = ["LossReport", "UnitLoss", "unit_loss"]


@dataclass(frozen=True)
class LossReport:
    """What a calibration found."""

    rms: float
    """Of the gradient of one element, before it is multiplied."""
    grad_multiplier: float
    """1 / rms."""
    bias_grad: float
    """RMS of N^-1/2 times the sum over N rows, after: near 1 for independent signs."""
    rows: int
    """N: rows of the batch with a gradient other than 0."""

    def __str__(self) -> str:
        text = (
            f"gradient RMS {self.rms:.4g} over {self.rows} rows, so it is multiplied by "
            f"{self.grad_multiplier:.4g}; a bias then gets {self.bias_grad:.3g}"
        )
        if self.bias_grad > 3:
            text += (
                f", where independent rows would give 1 and equal ones {self.rows**0.5:.3g}: "
                f"predictions all move one way. Begin them where they balance, by the readout's "
                f"bias."
            )
        return text


def _classes(prediction: Tensor) -> float:
    classes = prediction.shape[min(1, prediction.ndim - 1)]
    return classes / (classes - 1) ** 0.5


_CLOSED: dict[Any, Callable[[Tensor], float]] = {
    F.mse_loss: lambda _: 0.5,
    F.l1_loss: lambda _: 1.0,
    F.binary_cross_entropy_with_logits: lambda _: 2.0,
    F.cross_entropy: _classes,
}
"""Of torch's losses with their default options: predictions near 0, targets of RMS 1."""


class UnitLoss(nn.Module):
    """`fn`'s sum, with a gradient towards its first argument of RMS 1; see `unit_loss`.

    A module, so that a model that holds it saves the multiplier with its state dict.
    """

    def __init__(self, fn: Callable[..., Tensor], grad_multiplier: float | None = None) -> None:
        super().__init__()
        if grad_multiplier is not None and not 0 < grad_multiplier < math.inf:
            raise ValueError(f"grad_multiplier={grad_multiplier}; it must be positive and finite")
        self.fn = fn
        self.grad_multiplier = grad_multiplier
        self.report: LossReport | None = None

    def forward(self, prediction: Tensor, *args: Any, **options: Any) -> Tensor:
        """Sum of the losses; the first call calibrates, unless that is done or not needed."""
        closed = _CLOSED.get(self.fn)
        prediction, args, options = tree_map(_wide, (prediction, args, options))
        if closed is not None and not options.keys() & {"reduction", "size_average", "reduce"}:
            options["reduction"] = "none"
        if self.grad_multiplier is None:
            if closed is not None and set(options) == {"reduction"} and len(args) == 1:
                self.grad_multiplier = closed(prediction)
            else:
                self.calibrate(prediction, *args, **options)
        assert self.grad_multiplier is not None
        losses = self.fn(scale_bwd(prediction, self.grad_multiplier), *args, **options)
        return _wide(losses).sum()

    def calibrate(self, prediction: Tensor, *args: Any, **options: Any) -> LossReport:
        """Measure the gradient on a batch and freeze the multiplier. Reads the device.

        Raises:
            ValueError: for a gradient that is 0 or not finite; for a mean, whole or masked, whose
                gradient depends on the size of the batch; and for a number of which neither can
                be told, because `fn` does not run on a batch with each sample twice.
        """
        prediction, args, options = tree_map(_wide, (prediction, args, options))
        grad = self._gradient(prediction, args, options)
        real = _real(grad)
        rows = grad.reshape(-1, grad.shape[-1] if grad.ndim > 1 else 1)
        rows = rows[(rows != 0).any(1)]  # padding has no gradient and is no sample
        rms = float((grad.square().sum() / real.sum()).sqrt()) if len(rows) else 0.0
        if not 0 < rms < math.inf:
            raise ValueError(
                f"the gradient of {_name(self.fn)} has RMS {rms} on the calibration batch, so "
                f"nothing can be learned from it about scale. Give a batch with real targets and "
                f"the predictions of a fresh model."
            )
        self._refuse_means(grad, prediction, args, options)
        bias = rows.sum(0) / len(rows) ** 0.5 / rms
        self.grad_multiplier = 1 / rms
        self.report = LossReport(rms, 1 / rms, float(bias.square().mean().sqrt()), len(rows))
        return self.report

    def _gradient(
        self, prediction: Tensor, args: tuple[Any, ...], options: dict[str, Any]
    ) -> Tensor:
        leaf = prediction.detach().requires_grad_()
        with torch.enable_grad():
            loss = self.fn(leaf, *args, **options)
            (grad,) = torch.autograd.grad(loss.sum(), leaf)
        return _double(grad)

    def _refuse_means(
        self, grad: Tensor, prediction: Tensor, args: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        """In a batch with every sample twice, gradients of a mean are half as large."""
        with torch.no_grad():
            scalar = self.fn(prediction.detach(), *args, **options).ndim == 0
        if not scalar or prediction.ndim == 0:
            return
        for axis in range(max(1, prediction.ndim - 1)):  # the last has the features, if another has
            size, before = prediction.shape[axis], _rms(grad)
            twice = self._of_twice(prediction, args, options, axis)
            if axis == 0 and not twice:
                raise ValueError(
                    f"{_name(self.fn)} returns one number and does not run on a batch with each "
                    f"sample twice, so a sum cannot be told from a mean, whose gradients depend on "
                    f"the size of the batch. Return the losses themselves, without .sum(); or give "
                    f"grad_multiplier= for a sum that you are sure of."
                )
            for after in twice:
                ratio = _rms(after.narrow(axis, 0, size)) / before
                if ratio < 1 / 1.5:
                    raise ValueError(
                        f"{_name(self.fn)} returns a mean: with each sample twice along axis "
                        f"{axis} each gradient is {ratio:.2f} times as large, so a multiplier "
                        f"would fit one batch size only. Return the sum, or the losses themselves."
                    )

    def _of_twice(
        self, prediction: Tensor, args: tuple[Any, ...], options: dict[str, Any], axis: int
    ) -> list[Tensor]:
        """Gradients in a batch that is twice as long along an axis, in each way that runs."""
        found: list[Tensor] = []
        for strict in (True, False):
            leaf = torch.cat([prediction.detach()] * 2, axis).requires_grad_()
            mode = _Twice(prediction.shape, axis, strict, leaf)
            more, named = tree_map(mode.twice, (args, options))
            try:
                with torch.enable_grad(), mode:
                    loss = self.fn(leaf, *more, **named)
                found += torch.autograd.grad(loss, leaf)
            except Exception:  # whatever a loss says to tensors that do not fit together
                continue
        return [_double(grad) for grad in found]

    def get_extra_state(self) -> Tensor:
        """Multiplier and report in one FP64 tensor, which all formats of checkpoints hold."""
        report = (math.nan,) * 4 if self.report is None else astuple(self.report)
        multiplier = math.nan if self.grad_multiplier is None else self.grad_multiplier
        return torch.tensor([multiplier, *report], dtype=torch.float64)

    def set_extra_state(self, state: Any) -> None:
        if isinstance(state, dict):  # of checkpoints that were saved as one
            report = state["report"]
            self.grad_multiplier = state["grad_multiplier"]
            self.report = None if report is None else LossReport(**report)
            return
        multiplier, rms, per_rms, bias_grad, rows = state.tolist()
        self.grad_multiplier = None if math.isnan(multiplier) else multiplier
        known = not math.isnan(rms)
        self.report = LossReport(rms, per_rms, bias_grad, int(rows)) if known else None

    def extra_repr(self) -> str:
        return f"{_name(self.fn)}, grad_multiplier={self.grad_multiplier}"


def unit_loss(fn: Callable[..., Tensor], *, grad_multiplier: float | None = None) -> UnitLoss:
    """`fn` as a loss whose gradient has RMS 1 when training begins.

    Args:
        fn: `fn(prediction, ...)` returns losses of any shape, or their sum. It is given 16-bit
            tensors in FP32, so that nothing is summed in fewer bits.
        grad_multiplier: what the gradient of the sum is multiplied by. Left out, it is known for
            `F.mse_loss`, `F.l1_loss`, `F.cross_entropy` and `F.binary_cross_entropy_with_logits`,
            and measured for others, in the first call or by `calibrate`. On several ranks give one
            number to all.

    Returns:
        A module that returns the sum of the losses. Its `report` says what was measured.

    Raises:
        ValueError: see `UnitLoss.calibrate`.

    >>> import torch
    >>> from mixprec import umup
    >>> loss = umup.unit_loss(lambda prediction, target: (prediction - target).abs() ** 3)
    >>> g = torch.Generator().manual_seed(0)
    >>> loss.calibrate(torch.zeros(1000, 8), torch.randn(1000, 8, generator=g)).bias_grad < 2
    True
    """
    return UnitLoss(fn, grad_multiplier)


class _Twice(TorchFunctionMode):
    """Gives every tensor that a loss meets and did not make itself each of its samples twice.

    So targets and masks are reached wherever they come from: an argument, a dict, a closure or a
    global name. `strict` takes only what has the prediction's leading axes, or 1 in place of them;
    without it the one axis counts, as for `[N, T]` classes of `[N, C, T]` logits.
    """

    def __init__(self, shape: torch.Size, axis: int, strict: bool, leaf: Tensor) -> None:
        super().__init__()
        self._shape, self._axis, self._strict = shape, axis, strict
        self._own = {id(leaf): leaf}  # holds what it names, so that no id is used again
        self._made: dict[int, tuple[Tensor, Tensor]] = {}

    def twice(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or id(value) in self._own or not self._fits(value.shape):
            return value
        if id(value) not in self._made:
            self._made[id(value)] = value, torch.cat([value, value], self._axis)
            self._keep(self._made[id(value)][1])
        return self._made[id(value)][1]

    def _fits(self, shape: torch.Size) -> bool:
        axis, whole = self._axis, self._shape
        if len(shape) <= axis or shape[axis] != whole[axis]:
            return False
        leading = zip(shape, whole[: max(1, len(whole) - 1)], strict=False)
        return not self._strict or all(mine in (1, theirs) for mine, theirs in leading)

    def _keep(self, value: Any) -> None:
        if isinstance(value, Tensor):
            self._own[id(value)] = value

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(self.twice, (args, kwargs or {}))
        out = func(*args, **kwargs)
        tree_map(self._keep, out)
        return out


def _real(grad: Tensor) -> Tensor:
    """Which elements are of real samples: padding has no gradient in any feature.

    Features are on the last axis, or on axis 1 of three and more (`[N, C, ...]`).
    """
    nonzero = grad != 0
    if grad.ndim < 2:
        return nonzero
    real = nonzero.any(-1, keepdim=True).expand_as(grad)
    if grad.ndim > 2 and grad.shape[1] > 1:
        real = real & nonzero.any(1, keepdim=True)
    return real


def _double(grad: Tensor) -> Tensor:
    return grad.double() if grad.device.type != "mps" else grad.float()


def _rms(tensor: Tensor) -> float:
    return float(tensor.square().mean().sqrt())


def _wide(value: Any) -> Any:
    """FP32 for tensors of fewer bits."""
    low = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if low else value


def _name(fn: Any) -> str:
    return str(getattr(fn, "__name__", type(fn).__name__))
