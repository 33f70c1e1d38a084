"""What became of a step: the counts, the loss scaler, and what is said of it.

Where the host decides, it knows all at once. Where the device decides, nobody waits for it, and the
host hears of a step when the next one begins (`_hear`):

    skipped                 the flag that a fused step sends along anyway, else the counts
    which tensors           norms of parts, which lie on the device until the next verdict
    an infinite weight      looked for after a skip and now and then, sent
    zeros, windows without  the counts, sent after the first steps and every sixteenth one
    tokens, a bad factor
    one skip before an error    waited for, so that the error comes at that step
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal, Protocol

from torch import Tensor
from torch.optim import Optimizer

from mixprec.culprits import Culprits
from mixprec.fused.step import FusedStep
from mixprec.grad_factor import complaint
from mixprec.gradients import nonfinite_names, once
from mixprec.infinite_weights import Look
from mixprec.names import names_of
from mixprec.remarks import EMPTY_IN_A_ROW, no_gradient, no_tokens, only_zeros
from mixprec.said import Said
from mixprec.step_counts import Letter, StepCounts
from mixprec.verdict import Verdict

OnNonfinite = Literal["skip", "raise", "ignore"]

MAX_SKIPS_IN_A_ROW = 50
"""Skips in a row after which a step raises when no loss scaler decides."""

LOOK_EVERY = 16
"""Steps of a device after which the host has its counts sent: 10 microseconds, a copy."""

LOOK_AT_WEIGHTS_EVERY = 256
"""Steps after which weights are looked at for an infinite one: 2 bytes a parameter, of 28."""


class LossScaler(Protocol):
    """What a step needs of `DynamicLossScaler` and `StaticLossScaler`."""

    losses_scaled: int

    @property
    def inverse(self) -> Tensor: ...
    @property
    def max_skips_in_a_row(self) -> int: ...
    def get_scale(self) -> float: ...
    def update(self, grads_finite: Tensor | bool, *, counted: Tensor | bool = True) -> None: ...
    def check_progress(self, named_grads: Iterable[tuple[str, Tensor | None]] = ()) -> None: ...


class ReportingOptimizer(Optimizer):
    """The part of MixedPrecision that knows what became of its steps."""

    def __init__(
        self, loss_scaler: LossScaler | None, on_nonfinite: OnNonfinite, fused: FusedStep
    ) -> None:
        super().__init__([{"params": []}], {})  # the groups will be the inner optimizer's own
        self.loss_scaler = loss_scaler
        self.on_nonfinite: OnNonfinite = on_nonfinite
        self._fused = fused
        self._said = Said()
        self._losses_seen = loss_scaler.losses_scaled if loss_scaler is not None else 0
        self._verdict: Verdict | None = None
        self._captured: Verdict | None = None
        """That of a captured step, whose tensors every replay writes."""
        self._factors: tuple[Tensor | float | None, Tensor | None] = (None, None)
        """`grad_factor` and 1 / loss_scale of the last step."""
        self._blamed: tuple[Tensor | float | None, Tensor | None] | None = None
        """The same of a step that was skipped, perhaps for them."""
        self._skips = StepCounts()
        self._culprits = Culprits()
        self._look = Look()
        self._steps_until_look = LOOK_AT_WEIGHTS_EVERY
        self._judged_on_device = 0
        self._zeros_excused = 0
        """Steps of a device that only made state, with gradients of 0 perhaps."""
        self._heard_in_a_row = 0
        """Skips in a row that the host has heard of; windows of padding may be among them."""
        self._is_told = False
        """Whether the last step's skip was an error already; whoever caught it goes on."""
        self._only_counts_tell = False
        """Whether the counts that were sent are all that tells of the last step's skip."""

    # ---------------------------------------- counting

    def _conclude(self, verdict: Verdict) -> None:
        """The counts and the loss scaler; may be done twice, from the same counts."""
        self._verdict = verdict
        scaler = self.loss_scaler
        if scaler is not None and scaler.losses_scaled != self._losses_seen:
            scaler.update(verdict.finite, counted=verdict.tells)
            self._losses_seen = scaler.losses_scaled
        if not verdict.recorded:
            self._count(verdict)

    def _report(self, verdict: Verdict) -> None:
        """Tell what has become of a step that is over: warnings may be errors."""
        self._warn_of_edits()
        self._look_now_and_then()
        if verdict.found_inf is None:
            self._remark(verdict)
        else:
            self._ask(verdict)

    def _count(self, verdict: Verdict) -> None:
        self._skips.add(verdict.overflowed, verdict.held, verdict.zero, verdict.usable)

    def _count_replay(self) -> None:
        """Count the replay of a captured step that is about to be, where its graph does not."""
        verdict = self._verdict = self._captured
        self._look_now_and_then()
        if verdict is None or verdict.found_inf is None:
            self._skips.add(False)  # nobody looks at it
        else:
            self._send_counts()

    def _ask(self, verdict: Verdict) -> None:
        """Where only the device knows, the host hears of it at the next step, in `_hear`.

        It waits only where one more skip would be an error: the gradients are still there to name.
        """
        self._zeros_excused += self._only_makes_state()
        self._send_counts()
        late = self._heard_in_a_row >= self._most_skips - 1
        if late and not self._is_driven and bool(verdict.overflowed):
            self._is_told = True
            self._report_skip(verdict)

    def _look_now_and_then(self) -> None:
        """Gradients may be finite where a weight is not, those of an L1 loss for example."""
        self._steps_until_look -= 1
        if self._steps_until_look <= 0 and not self._said.knows("infinite"):
            self._steps_until_look = LOOK_AT_WEIGHTS_EVERY
            self._look.send(self._params())

    def _send_counts(self) -> None:
        self._judged_on_device += 1
        self._only_counts_tell = not self._fused.is_awaited
        if self._only_counts_tell or self._judged_on_device % LOOK_EVERY in (1, 2):
            self._skips.send()

    @property
    def _most_skips(self) -> int:
        """Skips in a row that are an error."""
        scaler = self.loss_scaler
        return MAX_SKIPS_IN_A_ROW if scaler is None else scaler.max_skips_in_a_row

    @property
    def _is_driven(self) -> bool:
        """Whether a GradScaler steps this optimizer: it skips as a matter of course."""
        return hasattr(self, "found_inf")

    @property
    def _is_scaled(self) -> bool:
        return self.loss_scaler is not None or hasattr(self, "grad_scale")

    def _only_makes_state(self) -> bool:
        """Whether lr is 0 everywhere, as where distributed checkpoints step to have a state."""
        return all(_is_zero(group.get("lr")) for group in self.param_groups)

    # ---------------------------------------- what only the device knew

    def _hear(self) -> None:
        """Listen to what the device has found in earlier steps; it has long been there."""
        self._fused.settle()
        if self._look.found():
            self._tell_infinite()
        skipped, self._fused.skipped = self._fused.skipped, False
        self._heard_in_a_row = self._fused.skips_in_a_row
        letter = self._skips.letter()
        if letter is not None and self._only_counts_tell:
            self._heard_in_a_row = letter.skipped_in_a_row
            skipped = letter.skipped_in_a_row > 0
        told, self._is_told, self._only_counts_tell = self._is_told, False, False
        if skipped and not told and not self._is_driven:
            self._report_late()
        if letter is not None:
            self._remark_on(letter)

    def _report_late(self) -> None:
        """The device skipped the last step, whose gradients are gone by now."""
        verdict = self._verdict
        news = self.loss_scaler is None and not (
            self._said.knows("skip") or self._said.knows("factor")
        )
        if news or self._heard_in_a_row >= self._most_skips:
            if verdict is not None and bool(verdict.overflowed):  # else a window of padding
                self._report_skip(verdict, late=True)
            return
        if not self._said.knows("infinite"):
            self._look.send(self._params())
        if not self._said.knows("factor"):
            # Not worth a wait: most skips are a loss scaler's. The counts will tell.
            self._blamed = self._factors
            self._skips.send()

    # ---------------------------------------- saying it

    def _warn_of_edits(self) -> None:
        raise NotImplementedError

    def _infinite_weight(self) -> str:
        """Which 16-bit weight is infinite, as a sentence; empty if none is. Waits."""
        raise NotImplementedError

    def _tell_infinite(self) -> None:
        if not self._said.knows("infinite") and (found := self._infinite_weight()):
            self._warn("infinite", found)

    def _remark(self, verdict: Verdict) -> None:
        """Say once what is odd about a step that the host knows all of."""
        if verdict.absent:
            params = list(self._params())
            if params:
                self._warn("no gradient", no_gradient(params))
        elif verdict.overflowed:
            if not self._is_driven:
                self._report_skip(verdict)
        elif not verdict.counted:
            if not self._said.knows("no tokens") and self._skips.empty_in_a_row >= EMPTY_IN_A_ROW:
                self._warn("no tokens", no_tokens(EMPTY_IN_A_ROW))
        elif verdict.zero and not self._only_makes_state():
            self._warn("zeros", only_zeros(scaled=self._is_scaled))

    def _remark_on(self, letter: Letter) -> None:
        """The same for steps that the device has decided on."""
        if letter.unusable and not self._is_driven and not self._said.knows("factor"):
            self._warn("factor", _skipped_for(complaint(*(self._blamed or self._factors))))
        if letter.empty_in_a_row >= EMPTY_IN_A_ROW:
            self._warn("no tokens", no_tokens(letter.empty_in_a_row))
        if letter.zero > self._zeros_excused:
            self._warn("zeros", only_zeros(scaled=self._is_scaled))

    def _report_skip(self, verdict: Verdict, *, late: bool = False) -> None:
        """Raise or warn, as `on_nonfinite` and the skips in a row say, and name what it was."""
        try:
            self._report_cause(verdict, late=late)
        except FloatingPointError as error:
            if weight := self._infinite_weight():
                raise FloatingPointError(f"{weight} So {error}") from None
            raise
        self._tell_infinite()

    def _report_cause(self, verdict: Verdict, *, late: bool) -> None:
        factor = None if verdict.usable else complaint(*self._factors)
        if self.on_nonfinite != "raise" and self.loss_scaler is not None and factor is None:
            self.loss_scaler.check_progress(() if late else self._named_grads())
            return
        cause = factor or self._gradients(late=late)
        if self.on_nonfinite == "raise":
            raise FloatingPointError(
                f"{cause}; nothing was updated. Look there first, or pass on_nonfinite='skip' to "
                f"go on without this step."
            )
        skips = self._skips.skipped_in_a_row
        if skips >= self._most_skips:
            hint = (
                " Without a loss scale the cause is the forward pass or the data: look there, or "
                "lower the learning rate."
            )
            raise FloatingPointError(
                f"{skips} steps in a row were skipped: {cause}." + (hint if factor is None else "")
            )
        self._warn("skip" if factor is None else "factor", _skipped_for(cause))

    def _gradients(self, *, late: bool) -> str:
        """Which gradients were not finite, as a sentence."""
        if late:
            names = self._culprits.names(self.param_groups)
        else:
            names = nonfinite_names(self._named_grads())
        where = f"in {', '.join(map(repr, names))}" if names else "in their norm"
        return f"gradients are not finite {where}"

    def _warn(self, cause: str, message: str) -> None:
        """Warn once for each cause, at the line that called step."""
        self._said.warn(cause, message)

    # ---------------------------------------- parameters

    def _params(self) -> Iterator[Tensor]:
        return (param for group in self.param_groups for param in group["params"])

    def _grads(self) -> list[Tensor]:
        return once(p.grad for p in self._params() if p.grad is not None)

    def _named_grads(self) -> list[tuple[str, Tensor]]:
        named = names_of(self.param_groups)
        return [(name, param.grad) for param, name in named if param.grad is not None]


def _skipped_for(cause: str) -> str:
    return (
        f"{cause}; the step was skipped and nothing changed. Further skips are counted in "
        f"metrics()['skipped_steps']."
    )


def _is_zero(rate: Any) -> bool:
    """Whether a learning rate is 0. One on a device would have to be waited for, and is not."""
    if isinstance(rate, Tensor):
        return not rate.is_cuda and float(rate) == 0.0
    return isinstance(rate, (int, float)) and rate == 0
