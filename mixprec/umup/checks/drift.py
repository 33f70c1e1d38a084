"""Unit scale is a promise about the start. How far have the weights drifted since?

Adam-like rules move an element by about its learning rate, and weight decay takes a share; after
about 1 / weight decay steps they balance at

    RMS(W) = lr * multiplier * r / (2 * weight_decay)^1/2        r: RMS of the rule's update, ~ 1

which falls as the learning rate multiplier does, width^-1/2, while it was 1 at any width. Where
that leaves FP8's range is worth knowing before it happens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mixprec import formats
from mixprec.umup.checks.scales import flushed

__all__ = ["Drift", "DriftMonitor"]


@dataclass(frozen=True)
class Drift:
    """One parameter, now and where it is going."""

    name: str
    initial: float
    """RMS when the monitor was made."""
    rms: float
    """RMS now."""
    equilibrium: float
    """RMS that it would settle at under an Adam-like rule; NaN without weight decay."""
    flush: float
    """Share of its values that E4M3 turns into 0 now."""


class DriftMonitor:
    """Remembers the RMS of every matrix of `model` and says how far each has moved.

    Args:
        model: at its initial values, or where a run resumes.
        optimizer: whose groups tell where weights settle; None leaves that out.
        factor: how far an RMS may move before `warnings` names it.

    >>> import torch
    >>> from mixprec import umup
    >>> layer = umup.layers.Linear(64, 64, bias=False)
    >>> monitor = umup.DriftMonitor(layer)
    >>> with torch.no_grad():
    ...     _ = layer.weight.mul_(10)
    >>> monitor.warnings()
    ['weight: RMS 10 times what it was']
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer | None = None, *, factor: float = 4.0
    ) -> None:
        self.model, self.optimizer, self.factor = model, optimizer, factor
        self._initial = {name: _rms(param) for name, param in self._matrices()}

    def _matrices(self) -> list[tuple[str, Tensor]]:
        return [(name, p) for name, p in self.model.named_parameters() if p.ndim > 1]

    def measure(self) -> list[Drift]:
        """Where each matrix is. Reads the device."""
        settled = self._equilibria()
        return [
            Drift(
                name,
                self._initial.get(name, math.nan),
                _rms(param),
                settled.get(id(param), math.nan),
                flushed(param.detach(), formats.E4M3),
            )
            for name, param in self._matrices()
        ]

    def _equilibria(self) -> dict[int, float]:
        found: dict[int, float] = {}
        for group in self.optimizer.param_groups if self.optimizer else ():
            # The group's own entry: its product with lr is the independent decay, and lr cancels.
            lr, decay = float(group["lr"]), float(group.get("weight_decay", 0.0))
            if lr > 0 and decay > 0:
                found.update({id(p): lr / (2 * lr * decay) ** 0.5 for p in group["params"]})
        return found

    def warnings(self) -> list[str]:
        """One line for each matrix whose RMS has moved by more than the factor."""
        lines: list[str] = []
        for drift in self.measure():
            ratio = drift.rms / drift.initial if drift.initial else math.inf
            if not 1 / self.factor <= ratio <= self.factor:
                lines.append(f"{drift.name}: RMS {ratio:.3g} times what it was")
        return lines

    def __str__(self) -> str:
        lines = [f"{'initial':>9}{'now':>9}{'settles':>9}{'to 0 in E4M3':>14}   parameter"]
        for d in self.measure():
            settles = "-" if math.isnan(d.equilibrium) else f"{d.equilibrium:.3g}"
            lines.append(
                f"{d.initial:9.3g}{d.rms:9.3g}{settles:>9}{100 * d.flush:12.2f} %   {d.name}"
            )
        return "\n".join(lines)


def _rms(tensor: Tensor) -> float:
    with torch.no_grad():
        return float(tensor.detach().float().square().mean().sqrt()) if tensor.numel() else math.nan
