"""How large activations and gradients are, module by module, and what 8 bits would make of them.

The numbers are RMS, to be compared with 1, or with what a function documents. The verdict is about
formats: what a bare cast, without any scale, would lose.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from mixprec import formats
from mixprec.formats import Format
from mixprec.text import aligned
from mixprec.umup.checks.coordinates import Loss

__all__ = ["ScaleReport", "ScaleRow", "check_scales", "flushed"]


@dataclass
class ScaleRow:
    """One module's numbers; NaN where there is none."""

    name: str
    kind: str
    output: float = math.nan
    """RMS of the output."""
    grad_output: float = math.nan
    """RMS of the gradient that arrives, over rows that have one."""
    grad_input: float = math.nan
    """RMS of the gradient that is passed on, over rows that have one."""
    grad_weights: dict[str, float] = field(default_factory=dict[str, float])
    """RMS of the gradient of each parameter, times N^-1/2 ((V/N)^1/2 for an embedding)."""
    output_flush: float = math.nan
    """Share of the output that E4M3 turns into 0."""
    grad_flush: float = math.nan
    """Share of `grad_output` that E5M2 turns into 0."""
    overflow: float = 0.0
    """The larger share of either that is beyond its format's largest value."""

    def sizes(self) -> list[float]:
        """All RMS that there are."""
        return [
            size
            for size in (
                self.output,
                self.grad_output,
                self.grad_input,
                *self.grad_weights.values(),
            )
            if not math.isnan(size)
        ]


@dataclass(frozen=True)
class ScaleReport:
    """What `check_scales` found."""

    rows: Sequence[ScaleRow]
    max_flush: float

    def failures(self) -> list[ScaleRow]:
        """Modules with values beyond 8 bits, or with too many that become 0 there."""
        limit = self.max_flush
        return [
            row
            for row in self.rows
            if row.overflow > 0 or row.output_flush > limit or row.grad_flush > limit
        ]

    @property
    def ok(self) -> bool:
        return not self.failures()

    def __str__(self) -> str:
        failing = {row.name for row in self.failures()}
        header = ("", "module", "output", "dy", "dx", "dw", "y to 0", "dy to 0", "overflow")
        cells = [
            (
                "NOT" if row.name in failing else "ok",
                f"{row.name} ({row.kind})",
                *(_number(x) for x in (row.output, row.grad_output, row.grad_input)),
                " ".join(map(_number, row.grad_weights.values())) or "-",
                *(_percent(x) for x in (row.output_flush, row.grad_flush, row.overflow)),
            )
            for row in self.rows
        ]
        return aligned([header, *cells])


def check_scales(model: nn.Module, loss: Loss, *, max_flush: float = 0.25) -> ScaleReport:
    """RMS of every module's output and gradients in one backward pass, and their loss in FP8.

    Works on any model. Gradients that the model holds are replaced by those of this pass and left
    there. Rows of a gradient that are 0 throughout are padding and left out.

    Args:
        loss: runs the model on a batch and returns the loss, or its sum and the number of tokens,
            by whose root weight gradients are then divided.
        max_flush: share of a module's output in E4M3, or of the gradient that arrives in E5M2, that
            may become 0 without a scale of its own. Some always do: the first position of causal
            attention has no gradient of its query but rounding.

    >>> import torch
    >>> from mixprec import umup
    >>> model = torch.nn.Sequential(umup.layers.Linear(64, 64), umup.layers.LinearReadout(64, 8))
    >>> x, y = torch.randn(256, 64), torch.randint(8, (256,))
    >>> report = umup.check_scales(
    ...     model, lambda model: (umup.losses.cross_entropy(model(x), y, reduction="sum"), 256)
    ... )
    >>> [row.name for row in report.rows], report.failures() == []
    (['0', '1'], True)
    """
    rows: dict[str, ScaleRow] = {}
    handles: list[Any] = []
    for name, module in model.named_modules():
        if not any(True for _ in module.children()):
            rows[name] = ScaleRow(name or "model", type(module).__name__)
            handles.append(module.register_forward_pre_hook(_input_hook(rows[name])))
            handles.append(module.register_forward_hook(_output_hook(rows[name])))
    model.zero_grad()
    try:
        value = loss(model)
        total, tokens = value if isinstance(value, tuple) else (value, None)
        total.backward()
    finally:
        for handle in handles:
            handle.remove()
    factor = 1.0 if tokens is None else max(float(tokens), 1.0) ** -0.5
    for name, param in model.named_parameters():
        owner, _, local = name.rpartition(".")
        if param.grad is not None and owner in rows:
            module = model.get_submodule(owner)
            lookup = tokens is not None and isinstance(module, nn.Embedding)
            each = factor * (param.shape[0] ** 0.5 if lookup else 1.0)
            rows[owner].grad_weights[local] = _rms(param.grad) * each
    return ScaleReport([row for row in rows.values() if row.sizes()], max_flush)


def _input_hook(row: ScaleRow) -> Callable[..., Any]:
    """Puts a view in the input's place, whose gradient is what this module alone passes on."""

    def look(module: nn.Module, args: Any) -> Any:
        if not args or not isinstance(args[0], Tensor) or not args[0].requires_grad:
            return None
        view = args[0].view_as(args[0])
        view.register_hook(note)
        return (view, *args[1:])

    def note(grad: Tensor) -> None:
        if math.isnan(row.grad_input):
            row.grad_input = _rms(_real_rows(grad))

    return look


def _output_hook(row: ScaleRow) -> Callable[..., Any]:
    def look(module: nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return None
        if math.isnan(row.output):
            row.output = _rms(output)
            row.output_flush = flushed(output, formats.E4M3)
            row.overflow = max(row.overflow, _overflowing(output, formats.E4M3))
        if not output.requires_grad:
            return None
        view = output.view_as(output)
        view.register_hook(note)
        return view

    def note(grad: Tensor) -> None:
        if math.isnan(row.grad_output):
            row.grad_output = _rms(_real_rows(grad))
            row.grad_flush = flushed(grad, formats.E5M2)
            row.overflow = max(row.overflow, _overflowing(grad, formats.E5M2))

    return look


def flushed(tensor: Tensor, format: Format) -> float:
    """Share of the elements other than 0 that `format` turns into 0; NaN where there is none.

    >>> import torch
    >>> from mixprec import formats
    >>> from mixprec.umup.checks.scales import flushed
    >>> flushed(torch.tensor([0.0, 1.0, 2.0**-11]), formats.E4M3)
    0.5
    """
    present = tensor != 0
    count = int(present.sum())
    if not count:
        return math.nan
    return float((present & (formats.cast(tensor, format).float() == 0)).sum()) / count


def _overflowing(tensor: Tensor, format: Format) -> float:
    return float((tensor.abs() > format.max).double().mean()) if tensor.numel() else 0.0


def _real_rows(grad: Tensor) -> Tensor:
    rows = grad.reshape(-1, grad.shape[-1]) if grad.ndim else grad.reshape(1, 1)
    return rows[(rows != 0).any(1)]


def _rms(tensor: Tensor) -> float:
    values = tensor.detach()
    values = values._values() if values.is_sparse else values
    return float(values.double().square().mean().sqrt()) if values.numel() else math.nan


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3g}"


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f} %"
