"""Any loss at unit scale: its gradient's RMS measured once, and divided by for ever after.

    grad = c * d(sum of losses) / d(prediction),    c = 1 / RMS over the elements of a first batch

c is frozen, because a multiplier that followed the data would be a learning rate schedule. RMS 1 of
the elements says nothing about their mean: `LossReport.bias_grad` is the RMS of the gradient that a
bias would get, N^-1/2 times a sum over the batch. Near 1 the elements cancel; at N^1/2 they agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
        if closed is not None and not options.keys() & {"reduction", "size_average", "reduce"}:
            options["reduction"] = "none"
            prediction, args = _wide(prediction), tuple(map(_wide, args))
            options = {key: _wide(value) for key, value in options.items()}
        if self.grad_multiplier is None:
            if closed is not None and set(options) == {"reduction"} and len(args) == 1:
                self.grad_multiplier = closed(prediction)
            else:
                self.calibrate(prediction, *args, **options)
        assert self.grad_multiplier is not None
        losses = self.fn(scale_bwd(prediction, self.grad_multiplier), *args, **options)
        return losses.sum(dtype=torch.promote_types(losses.dtype, torch.float32))

    def calibrate(self, prediction: Tensor, *args: Any, **options: Any) -> LossReport:
        """Measure the gradient on a batch and freeze the multiplier. Reads the device.

        Raises:
            ValueError: for a gradient that is 0 or not finite, and for a mean, whose gradient
                depends on the size of the batch.
        """
        grad = self._gradient(prediction, args, options)
        rows = grad.reshape(grad.shape[0] if grad.ndim else 1, -1)
        rows = rows[(rows != 0).any(1)]  # padding has no gradient and is no sample
        rms = float(rows.square().mean().sqrt()) if len(rows) else 0.0
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
        return grad.double() if grad.device.type != "mps" else grad.float()

    def _refuse_means(
        self, grad: Tensor, prediction: Tensor, args: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        """A mean over half of the rows has gradients twice as large."""
        with torch.no_grad():
            scalar = self.fn(prediction.detach(), *args, **options).ndim == 0
        if not scalar or prediction.ndim == 0 or len(prediction) < 2:
            return
        half = len(prediction) // 2

        def cut(value: Any) -> Any:
            rows = isinstance(value, Tensor) and value.ndim and len(value) == len(prediction)
            return value[:half] if rows else value

        options = {key: cut(value) for key, value in options.items()}
        less = self._gradient(prediction[:half], tuple(map(cut, args)), options)
        before, after = (float(g.square().mean().sqrt()) for g in (grad[:half], less))
        if after > 1.5 * before:
            raise ValueError(
                f"{_name(self.fn)} returns a mean: on half of the rows each gradient is "
                f"{after / before:.2f} times as large, so a multiplier would fit one batch size "
                f"only. Return the sum, or the losses themselves."
            )

    def get_extra_state(self) -> dict[str, Any]:
        report = None if self.report is None else asdict(self.report)
        return {"grad_multiplier": self.grad_multiplier, "report": report}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.grad_multiplier = state["grad_multiplier"]
        self.report = None if state["report"] is None else LossReport(**state["report"])

    def extra_repr(self) -> str:
        return f"{_name(self.fn)}, grad_multiplier={self.grad_multiplier}"


def unit_loss(fn: Callable[..., Tensor], *, grad_multiplier: float | None = None) -> UnitLoss:
    """`fn` as a loss whose gradient has RMS 1 when training begins.

    Args:
        fn: `fn(prediction, ...)` returns losses of any shape, which are summed in FP32, or their
            sum, in whose dtype it is; torch's own losses are computed in FP32.
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


def _wide(value: Any) -> Any:
    """FP32 for tensors of fewer bits."""
    low = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if low else value


def _name(fn: Any) -> str:
    return str(getattr(fn, "__name__", type(fn).__name__))
