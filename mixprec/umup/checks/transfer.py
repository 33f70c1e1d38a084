"""Whether the best learning rate stays where it is as a model grows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mixprec.umup.checks.picture import Line, draw

__all__ = ["TransferReport", "check_transfer"]


@dataclass(frozen=True)
class TransferReport:
    """What `check_transfer` found."""

    losses: Mapping[int, Mapping[float, float]]
    """By width and learning rate; infinite where training diverged."""
    octaves: float
    """By how much the best learning rate may move."""

    @property
    def best(self) -> dict[int, float]:
        """The best learning rate of each width; NaN where every one diverged."""
        return {
            width: min(losses, key=lambda lr: losses[lr])
            if math.isfinite(min(losses.values()))
            else math.nan
            for width, losses in self.losses.items()
        }

    @property
    def drift(self) -> float:
        """Octaves between the smallest and the largest best learning rate."""
        exponents = [math.log2(lr) if lr > 0 else math.nan for lr in self.best.values()]
        return math.nan if any(map(math.isnan, exponents)) else max(exponents) - min(exponents)

    @property
    def at_an_edge(self) -> list[int]:
        """Widths whose best rate is the first or last tried: the true one may be beyond."""
        return [
            width
            for width, lr in self.best.items()
            if lr in (min(self.losses[width]), max(self.losses[width]))
        ]

    @property
    def ok(self) -> bool:
        return self.drift <= self.octaves + 1e-9 and not self.at_an_edge

    def __str__(self) -> str:
        rates = sorted({lr for losses in self.losses.values() for lr in losses})
        lines = [f"{'width':>7}" + "".join(f"{'2^' + f'{math.log2(r):g}':>9}" for r in rates)]
        for width, losses in self.losses.items():
            best = self.best[width]
            cells = (
                f"{losses.get(r, math.nan):.4f}{'*' if r == best else ' '}".rjust(9) for r in rates
            )
            lines.append(f"{width:7d}" + "".join(cells))
        edge = f"; at the edge of the sweep: widths {self.at_an_edge}" if self.at_an_edge else ""
        return "\n".join([*lines, f"the best learning rate moves by {self.drift:g} octaves{edge}"])

    def svg(self, title: str = "Loss over learning rate") -> str:
        """Loss over learning rate, a line for each width, its best marked."""
        lines = [
            Line(f"width {width}", sorted(losses), [losses[r] for r in sorted(losses)], best)
            for (width, losses), best in zip(self.losses.items(), self.best.values(), strict=True)
        ]
        finite = [y for line in lines for y in line.ys if math.isfinite(y)]
        low = min(finite, default=0.0)
        # Runs on their way to divergence would take all of the height.
        top = low + 4 * (sorted(finite)[len(finite) // 2] - low) if finite else 0.0
        shown = [
            Line(line.name, line.xs, [y if y <= top else math.nan for y in line.ys], line.mark)
            for line in lines
        ]
        return draw(
            shown,
            title=title,
            x_label="learning rate",
            y_label="loss",
            caption=f"Best ones marked; they move by {self.drift:g} octaves.",
        )


def check_transfer(
    train: Callable[[int, float], float],
    widths: Sequence[int],
    lrs: Sequence[float],
    *,
    octaves: float = 1.0,
) -> TransferReport:
    """Train every width at every learning rate, and see how far the best one moves.

    Args:
        train: trains a fresh model of a width at a learning rate and returns its loss, best as a
            mean over the last steps and over seeds. NaN and infinity stand for divergence.
        widths, lrs: what to try; learning rates by powers of two.
        octaves: by how much the best one may move.

    >>> from mixprec import umup
    >>> report = umup.check_transfer(lambda width, lr: (lr - 0.5) ** 2, [64, 128], [0.25, 0.5, 1.0])
    >>> report.best, report.drift, report.ok
    ({64: 0.5, 128: 0.5}, 0.0, True)
    """
    if not widths or len(set(lrs)) < 2 or min(lrs) <= 0:
        raise ValueError(
            f"widths={list(widths)}, lrs={list(lrs)}; give a width or more and two positive "
            f"learning rates or more"
        )
    losses: dict[int, dict[float, float]] = {}
    for width in widths:
        losses[width] = {}
        for lr in sorted(lrs):
            loss = float(train(width, lr))
            losses[width][lr] = math.inf if math.isnan(loss) else loss
    return TransferReport(losses, octaves)
