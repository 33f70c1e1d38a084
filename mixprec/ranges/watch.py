"""Where the values of a model lie, layer by layer, against the range of every format.

    with mixprec.watch(model) as report:
        loss(model(batch)).backward()
    report.save("report.html")

For each module that owns parameters: its inputs and outputs, the gradients of its outputs, its
parameters and their gradients, each as a histogram over binades (`mixprec.binades`). Hooks count on
the device and wait for nothing; the host waits once, when the report is read. The price is about
six passes over each tensor that is counted; `every=` thins it out.

Hooks are what torch.compile leaves out of compiled code, so there a watch neither counts nor slows
anything down, nor breaks a graph.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import datetime
from os import PathLike
from pathlib import Path

import torch
from torch import nn
from typing_extensions import Self

from mixprec.casting.model import refuse_text
from mixprec.ranges.layers import Layer, choose_layers, read
from mixprec.ranges.page import page
from mixprec.ranges.rows import Row, advice, table

__all__ = ["Watch", "watch"]


def watch(
    model: nn.Module,
    *,
    every: int = 1,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
) -> Watch:
    """A running `Watch` of `model`: a report that fills while the model is used.

    A context manager; or call `stop()` when enough was seen. `print(report)` shows a table,
    `save("x.html")` draws it, `warnings()` says what to do, `rows()` has the numbers. The model's
    results do not change by a bit. Several inputs, outputs or calls of a module count together.
    Integer, complex and empty tensors are skipped; of a DTensor this rank's part counts.

    Args:
        model: watched in each module that owns floating-point parameters itself.
        every: count in every n-th call of each module, and every n-th gradient of a parameter.
        include: patterns of the layers to watch; all by default. One without a dot is compared with
            the last part of a layer's name and with its class, one with a dot with the whole name.
        exclude: patterns of layers to leave out.

    Raises:
        TypeError: if `model` is no module, or patterns are given as one string.
        ValueError: if no layer is left to watch, a pattern matches none, `every` is below 1, or a
            lazy module has no parameters yet.

    >>> import torch
    >>> import mixprec
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    >>> with mixprec.watch(model) as report:
    ...     model(1000 * torch.randn(256, 64)).sum().backward()
    >>> print(report.warnings()[0])
    0 input: 66 % of values are above E4M3's 448 at exponent 0. It needs exponent -6 (-15 to -4 \
fit). Write mixprec.Precision('fp8').convert(model, overrides={'0': 'adaptive'}), which finds it, \
or overrides={'0': mixprec.float8.Recipe(input=mixprec.float8.Cast(exponent=-6))}, which sets it.
    """
    _check(model, every, include, exclude)
    return Watch(choose_layers(model, include, exclude), every, type(model).__name__)


class Watch:
    """Counts while it runs, and is the report. `watch` makes one."""

    def __init__(self, layers: Sequence[Layer], every: int, model: str) -> None:
        self.every = every
        self.about = (
            f"{model}, {len(layers)} layers, watched from {datetime.now():%Y-%m-%d %H:%M} on with "
            f"mixprec {_version()} and torch {torch.__version__}"
        )
        self.running = True
        self._layers = layers
        self._rows: tuple[Row, ...] | None = None
        self._handles = [handle for layer in layers for handle in layer.hook(every)]

    def stop(self) -> Self:
        """Remove the hooks and count the parameters as they are now; a second call does nothing.

        Gradients that arrive later, from a backward pass begun after, are not counted.
        """
        if self.running:
            self._look()
            self.running = False
            for handle in self._handles:
                handle.remove()
            self._handles.clear()
            for layer in self._layers:
                layer.module = None  # so that a report that is kept keeps no model
        return self

    def rows(self) -> tuple[Row, ...]:
        """A row for each tensor that had values: the worst first, the rest in the model's order.

        Waits for the device. While it runs, parameters count as they are at this moment.
        """
        if self._rows is not None:
            return self._rows
        if self.running:
            self._look()
        rows = tuple(sorted(read(self._layers), key=lambda row: -row.badness))
        if not self.running:
            self._rows = rows
        return rows

    def uncalled(self) -> list[str]:
        """Names of the layers that no forward pass has been through."""
        return [layer.name for layer in self._layers if not layer.calls]

    def warnings(self) -> list[str]:
        """Sentences on the tensors that their formats would not hold, worst first, with the call
        that mends each; then what FP16 would lose of those that are FP32.

        Layers that differ only in a number of their names share a sentence. The exponents are those
        of `Precision.stats` for the same tensors.
        """
        return [*advice(self.rows()), *self._remarks()]

    def html(self) -> str:
        """The report as one HTML document that refers to no other file."""
        return page(self.rows(), self.warnings(), self.about)

    def save(self, path: str | PathLike[str]) -> None:
        """Write `html()` to the file `path`."""
        Path(path).write_text(self.html(), encoding="utf-8")

    def __str__(self) -> str:
        sentences = self.warnings()
        return "\n".join([table(self.rows()), *([""] if sentences else []), *sentences])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def _look(self) -> None:
        for layer in self._layers:
            layer.look()

    def _remarks(self) -> list[str]:
        missing = self.uncalled()
        if not missing:
            return []
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        return [
            f"{len(missing)} of {len(self._layers)} layers were not called ({shown}): no step ran, "
            f"or another module uses their parameters, or they ran under torch.compile, which "
            f"leaves hooks out. For the last, run the watched steps in `with "
            f'torch.compiler.set_stance("force_eager"):`'
        ]


def _version() -> str:
    # Not by an import, which would make this module depend on all others.
    return str(vars(sys.modules["mixprec"])["__version__"])


def _check(
    model: object, every: object, include: Sequence[str] | None, exclude: Sequence[str]
) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"watch got a {type(model).__name__}; give it the model, an nn.Module")
    if not isinstance(every, int) or every < 1:
        raise ValueError(f"every={every!r}; 1 counts in each call, n in every n-th")
    refuse_text("include", include)
    refuse_text("exclude", exclude)
