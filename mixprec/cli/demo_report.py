"""What `mixprec demo` says about its runs: a verdict on each, a table, findings, curves, data.

All of it is worked out from the outcomes, findings and title too: where runs do not end as they
should, nothing claims that they did.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from typing import Any

import torch

import mixprec
from mixprec.cli.curves import FAULTY, SOUND, Curve, Picture
from mixprec.cli.demo_runs import Outcome, Settings
from mixprec.cli.table import table, wrapped

__all__ = ["EQUAL", "WORSE", "Report"]

EQUAL, WORSE = 0.005, 0.05
"""Nats per byte from fp32: up to the first, a run has equalled it; from the second on, it shows."""


@dataclass(frozen=True)
class Report:
    """The finished runs, fp32 first, and what they are made with."""

    settings: Settings
    source: str
    padding: float
    device: str
    emulated: Sequence[str]
    """Names of formats whose products are widened to FP32."""
    outcomes: list[Outcome] = field(default_factory=list[Outcome])

    @property
    def how(self) -> str:
        """How products of 16-bit matrices are made, a sentence."""
        if not self.emulated:
            return f"16-bit kernels of {self.device}."
        *first, last = self.emulated
        names = f"{', '.join(first)} and {last}" if first else last
        return (
            f"{names} emulated on {self.device}: stored in 16 bits, multiplied in FP32, rounded "
            f"once."
        )

    def gap(self, outcome: Outcome) -> float:
        """Held-out loss above fp32's."""
        return outcome.held_out_loss - self.outcomes[0].held_out_loss

    def verdict(self, outcome: Outcome) -> str:
        """How a run ended beside fp32, in one word."""
        gap = self.gap(outcome)
        if outcome is self.outcomes[0]:
            return "reference"
        if not math.isfinite(gap):
            return "diverged"
        if abs(gap) <= EQUAL:
            return "equal"
        return "worse" if gap >= WORSE else "close"

    @property
    def as_expected(self) -> bool:
        """Whether sound runs equal fp32 and the others are visibly worse."""
        good, bad = ("reference", "equal"), ("worse", "diverged")
        return all(
            self.verdict(outcome) in (good if outcome.run.sound else bad)
            for outcome in self.outcomes
        )

    def table(self) -> str:
        """One row a run, and what the columns are."""
        rows = [
            ("run", "loss", "above fp32", "unmoved", "subnormal", "verdict"),
        ]
        for outcome in self.outcomes:
            verdict = self.verdict(outcome)
            rows.append(
                (
                    outcome.run.name,
                    f"{outcome.held_out_loss:.4f}",
                    "" if verdict == "reference" else _signed(self.gap(outcome)),
                    f"{outcome.unmoved:.1%}",
                    f"{outcome.subnormal_grads:.1%}",
                    verdict,
                )
            )
        return table(rows) + "\n\n" + self._legend()

    def _legend(self) -> str:
        middle = (self.settings.steps + 1) // 2
        return "\n".join(
            wrapped(
                "loss: held-out text, nats per byte. unmoved: hidden weights, or their masters, "
                f"that step {middle} left as they were. subnormal: hidden gradients below the "
                "normal range of the format, after the last step."
            )
        )

    def findings(self) -> str:
        """What the table shows, in sentences."""
        if not self.as_expected:
            return (
                f"These runs did not end as they should, sound ones within {EQUAL} of fp32 and the "
                f"others {WORSE} above it.\n{self._advice()}"
            )
        faulty = [outcome for outcome in self.outcomes if not outcome.run.sound]
        sound = [outcome for outcome in self.outcomes if outcome.run.sound]
        lines = [f"{each.run.name}: {self._reason(each)}; {_remedy(each)}." for each in faulty]
        widest = max(abs(self.gap(outcome)) for outcome in sound)
        return "\n".join([*lines, f"The others end within {widest:.4f} of fp32."])

    def _advice(self) -> str:
        if self.settings.steps < Settings.steps:
            return (
                f"{self.settings.steps} steps are too few to tell; the default is {Settings.steps}."
            )
        return "Look at the curves, and try another --seed."

    def _reason(self, outcome: Outcome) -> str:
        if outcome.run.bare:
            return f"{outcome.unmoved:.0%} of updates round to nothing"
        if outcome.run.recipe:
            return f"{outcome.subnormal_grads:.0%} of gradients are zero"
        return f"{outcome.subnormal_grads:.0%} of gradients are subnormal"

    def curves(self) -> list[Curve]:
        """Held-out losses, in drawing order: the widest line first, faulty runs on top."""
        strokes = {True: iter(SOUND), False: iter(FAULTY)}
        curves: list[Curve] = []
        for outcome in sorted(self.outcomes, key=lambda outcome: not outcome.run.sound):
            verdict = self.verdict(outcome)
            number = outcome.held_out_loss if verdict == "reference" else self.gap(outcome)
            curves.append(
                Curve(
                    outcome.run.name,
                    outcome.measured_at,
                    outcome.held_out_losses,
                    next(strokes[outcome.run.sound]),
                    value=f"{number:.4f}" if verdict == "reference" else _signed(number),
                    note=self._reason(outcome) if verdict in ("worse", "diverged") else "",
                )
            )
        return curves

    def picture(self) -> Picture:
        """The words around the curves."""
        first, settings = self.outcomes[0], self.settings
        return Picture(
            title=(
                "BF16 needs FP32 masters, FP16 a loss scale, FP8 exponents"
                if self.as_expected
                else "One training in seven precisions"
            ),
            subtitle=(
                "Seven runs of one small language model: same text, same initial weights. "
                "Numbers: distance from fp32."
            ),
            x_label="optimizer steps",
            y_label="held-out loss, nats per byte",
            caption=(
                f"{first.num_parameters:,} parameters, {settings.steps} steps of AdamW on "
                f"{self.source}, {self.padding:.0%} padding, gradients divided by "
                f"2^{settings.presumed_tokens.bit_length() - 1} tokens; seed {settings.seed}.",
                self.how,
                f"mixprec {mixprec.__version__}, torch {torch.__version__}, "
                f"Python {platform.python_version()}, {date.today().isoformat()}.",
            ),
        )

    def data(self) -> dict[str, Any]:
        """Everything as plain data for JSON; a number that is not finite becomes null."""
        return {
            "date": date.today().isoformat(),
            "versions": {
                "mixprec": mixprec.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "device": self.device,
            "emulated": list(self.emulated),
            "text": self.source,
            "padding": self.padding,
            "settings": asdict(self.settings),
            "as_expected": self.as_expected,
            "runs": [self._run_data(outcome) for outcome in self.outcomes],
        }

    def _run_data(self, outcome: Outcome) -> dict[str, Any]:
        run = outcome.run
        measured = {key: _finite(value) for key, value in vars(outcome).items() if key != "run"}
        return {
            "name": run.name,
            "format": run.format.name,
            "masters": run.masters,
            "loss_scaling": run.loss_scaling,
            "recipe": run.recipe,
            "verdict": self.verdict(outcome),
            "held_out_loss": _finite(outcome.held_out_loss),
            "above_fp32": _finite(self.gap(outcome)),
            "tokens_per_second": outcome.tokens_per_second,
            **measured,
        }


def _remedy(outcome: Outcome) -> str:
    if outcome.run.bare:
        return "mixprec.MixedPrecision keeps them"
    if outcome.run.recipe:
        return 'recipe="adaptive" of mixprec.Precision keeps them in range'
    return "mixprec.DynamicLossScaler lifts them"


def _signed(gap: float) -> str:
    """
    >>> _signed(0.25), _signed(-0.00001)
    ('+0.2500', '+0.0000')
    """
    return f"{gap if abs(gap) >= 0.00005 else 0.0:+.4f}"


def _finite(value: Any) -> Any:
    """`value` with null for NaN and infinities, for which JSON has no words."""
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
