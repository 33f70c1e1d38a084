"""What became of a step: the counts, the loss scaler, and what is said of it.

Where the host decides, it knows all at once. Where the device decides, nobody waits for it, and the
host hears of a step when the next one begins (`hear`):

    skipped                 the flag that a fused step sends along anyway, else the counts
    which tensors           norms of parts, which lie on the device until the next verdict
    an infinite weight      looked for after a skip and now and then, sent
    zeros, windows without  the counts, sent after the first steps and every sixteenth one
    tokens, a bad factor
    one skip before an error    waited for, so that the error comes at that step
"""

from __future__ import annotations

from torch import Tensor

from mixprec.gradients import nonfinite_names
from mixprec.optimizer.fused.step import FusedStep
from mixprec.optimizer.judging.grad_factor import complaint
from mixprec.optimizer.judging.verdict import Verdict
from mixprec.optimizer.reports.culprits import Culprits
from mixprec.optimizer.reports.infinite_weights import Look, infinite_weight
from mixprec.optimizer.reports.remarks import EMPTY_IN_A_ROW, no_gradient, no_tokens, only_zeros
from mixprec.optimizer.reports.step_counts import Letter, StepCounts
from mixprec.optimizer.setup import Setup
from mixprec.parameters import names_of
from mixprec.user_warnings import Said

MAX_SKIPS_IN_A_ROW = 50
"""Skips in a row after which a step raises when no loss scaler decides."""

LOOK_EVERY = 16
"""Steps of a device after which the host has its counts sent: 10 microseconds, a copy."""

LOOK_AT_WEIGHTS_EVERY = 256
"""Steps after which weights are looked at for an infinite one: 2 bytes a parameter, of 28."""


class Outcome:
    """Counts the steps of an optimizer, moves its loss scale, and says what there is to say.

    Args:
        setup: the optimizer's parameters and settings.
        fused: its fused part, which hears first what a device has skipped.
    """

    def __init__(self, setup: Setup, fused: FusedStep) -> None:
        self._setup, self._fused = setup, fused
        scaler = setup.loss_scaler
        self.said = Said()
        self._losses_seen = 0 if scaler is None else scaler.losses_scaled
        self.verdict: Verdict | None = None
        self.captured: Verdict | None = None
        """That of a captured step, whose tensors every replay writes."""
        self.factors: tuple[Tensor | float | None, Tensor | None] = (None, None)
        """`grad_factor` and 1 / loss_scale of the last step."""
        self._blamed: tuple[Tensor | float | None, Tensor | None] | None = None
        """The same of a step that was skipped, perhaps for them."""
        self.counts = StepCounts()
        self.culprits = Culprits()
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

    @property
    def has_new_losses(self) -> bool:
        """Whether a loss was scaled since the last step, so that gradients carry the scale."""
        scaler = self._setup.loss_scaler
        return scaler is not None and scaler.losses_scaled != self._losses_seen

    def forget_losses(self) -> None:
        """Gradients that are there carry no scale, or another one."""
        scaler = self._setup.loss_scaler
        self._losses_seen = 0 if scaler is None else scaler.losses_scaled

    def conclude(self, verdict: Verdict) -> None:
        """The counts and the loss scaler; may be done twice, from the same counts."""
        self.verdict = verdict
        scaler = self._setup.loss_scaler
        if scaler is not None and self.has_new_losses:
            scaler.update(verdict.finite, counted=verdict.tells)
            self.forget_losses()
        if not verdict.recorded:
            self.count(verdict)

    def report(self, verdict: Verdict) -> None:
        """Tell what has become of a step that is over: warnings may be errors."""
        self._tell_shared()
        self._look_now_and_then()
        if verdict.found_inf is None:
            self._remark(verdict)
        else:
            self._ask(verdict)

    def count(self, verdict: Verdict) -> None:
        self.counts.add(verdict.overflowed, verdict.held, verdict.zero, verdict.usable)

    def count_replay(self) -> None:
        """Count the replay of a captured step that is about to be, where its graph does not."""
        verdict = self.verdict = self.captured
        self._look_now_and_then()
        if verdict is None or verdict.found_inf is None:
            self.counts.add(False)  # nobody looks at it
        else:
            self._send_counts()

    def _ask(self, verdict: Verdict) -> None:
        """Where only the device knows, the host hears of it at the next step, in `hear`.

        It waits only where one more skip would be an error: the gradients are still there to name.
        """
        self._zeros_excused += self._setup.only_makes_state()
        self._send_counts()
        late = self._heard_in_a_row >= self._most_skips - 1
        if late and not self._setup.driver.is_there and bool(verdict.overflowed):
            self._is_told = True
            self._report_skip(verdict)

    def _look_now_and_then(self) -> None:
        """Gradients may be finite where a weight is not, those of an L1 loss for example."""
        self._steps_until_look -= 1
        if self._steps_until_look <= 0 and not self.said.knows("infinite"):
            self._steps_until_look = LOOK_AT_WEIGHTS_EVERY
            self._look.send(self._setup.params())

    def _send_counts(self) -> None:
        self._judged_on_device += 1
        self._only_counts_tell = not self._fused.is_awaited
        if self._only_counts_tell or self._judged_on_device % LOOK_EVERY in (1, 2):
            self.counts.send()

    @property
    def _most_skips(self) -> int:
        """Skips in a row that are an error."""
        scaler = self._setup.loss_scaler
        return MAX_SKIPS_IN_A_ROW if scaler is None else scaler.max_skips_in_a_row

    @property
    def _is_scaled(self) -> bool:
        return self._setup.loss_scaler is not None or self._setup.driver.has_scale

    # ---------------------------------------- what only the device knew

    def hear(self) -> None:
        """Listen to what the device has found in earlier steps; it has long been there."""
        self._fused.settle()
        if self._look.found():
            self.tell_infinite()
        skipped, self._fused.skipped = self._fused.skipped, False
        self._heard_in_a_row = self._fused.skips_in_a_row
        letter = self.counts.letter()
        if letter is not None and self._only_counts_tell:
            self._heard_in_a_row = letter.skipped_in_a_row
            skipped = letter.skipped_in_a_row > 0
        told, self._is_told, self._only_counts_tell = self._is_told, False, False
        if skipped and not told and not self._setup.driver.is_there:
            self._report_late()
        if letter is not None:
            self._remark_on(letter)

    def _report_late(self) -> None:
        """The device skipped the last step, whose gradients are gone by now."""
        verdict = self.verdict
        news = self._setup.loss_scaler is None and not (
            self.said.knows("skip") or self.said.knows("factor")
        )
        if news or self._heard_in_a_row >= self._most_skips:
            if verdict is not None and bool(verdict.overflowed):  # else a window of padding
                self._report_skip(verdict, late=True)
            return
        if not self.said.knows("infinite"):
            self._look.send(self._setup.params())
        if not self.said.knows("factor"):
            # Not worth a wait: most skips are a loss scaler's. The counts will tell.
            self._blamed = self.factors
            self.counts.send()

    # ---------------------------------------- saying it

    def _infinite_weight(self) -> str:
        """Which of the weights that are stepped is infinite; a frozen mask may well hold -inf."""
        store, state = self._setup.store, self._setup.state
        named = names_of(self._setup.groups)
        stepped = [(p, n) for p, n in named if p.requires_grad or store.known(state, p)]
        return infinite_weight(stepped, lambda param: store.master(state, param))

    def _tell_shared(self) -> None:
        """Tell of a number that fused parameters share and somebody has written in place."""
        number, self._fused.written = self._fused.written, ""
        if number:
            self.warn(
                "shared",
                f"state[...][{number!r}] was written in place, and fused parameters of one age "
                f"share one such tensor: each write was one for all of them. To change it for one "
                f"parameter, set another: state[param][{number!r}] = torch.tensor(...).",
            )

    def tell_infinite(self) -> None:
        """Look at the weights, which waits for the device, and name an infinite one once."""
        if not self.said.knows("infinite") and (found := self._infinite_weight()):
            self.warn("infinite", found)

    def _remark(self, verdict: Verdict) -> None:
        """Say once what is odd about a step that the host knows all of."""
        if verdict.absent:
            params = list(self._setup.params())
            if params:
                self.warn("no gradient", no_gradient(params))
        elif verdict.overflowed:
            if not self._setup.driver.is_there:
                self._report_skip(verdict)
        elif not verdict.counted:
            if not self.said.knows("no tokens") and self.counts.empty_in_a_row >= EMPTY_IN_A_ROW:
                self.warn("no tokens", no_tokens(EMPTY_IN_A_ROW))
        elif verdict.zero and not self._setup.only_makes_state():
            self.warn("zeros", only_zeros(scaled=self._is_scaled))

    def _remark_on(self, letter: Letter) -> None:
        """The same for steps that the device has decided on."""
        if letter.unusable and not self._setup.driver.is_there and not self.said.knows("factor"):
            self.warn("factor", _skipped_for(complaint(*(self._blamed or self.factors))))
        if letter.empty_in_a_row >= EMPTY_IN_A_ROW:
            self.warn("no tokens", no_tokens(letter.empty_in_a_row))
        if letter.zero > self._zeros_excused:
            self.warn("zeros", only_zeros(scaled=self._is_scaled))

    def _report_skip(self, verdict: Verdict, *, late: bool = False) -> None:
        """Raise or warn, as `on_nonfinite` and the skips in a row say, and name what it was."""
        try:
            self._report_cause(verdict, late=late)
        except FloatingPointError as error:
            if weight := self._infinite_weight():
                raise FloatingPointError(f"{weight} So {error}") from None
            raise
        self.tell_infinite()

    def _report_cause(self, verdict: Verdict, *, late: bool) -> None:
        factor = None if verdict.usable else complaint(*self.factors)
        if (
            self._setup.on_nonfinite != "raise"
            and self._setup.loss_scaler is not None
            and factor is None
        ):
            self._setup.loss_scaler.check_progress(() if late else self._setup.named_grads())
            return
        cause = factor or self._gradients(late=late)
        if self._setup.on_nonfinite == "raise":
            raise FloatingPointError(
                f"{cause}; nothing was updated. Look there first, or pass on_nonfinite='skip' to "
                f"go on without this step."
            )
        skips = self.counts.skipped_in_a_row
        if skips >= self._most_skips:
            hint = (
                " Without a loss scale the cause is the forward pass or the data: look there, or "
                "lower the learning rate."
            )
            raise FloatingPointError(
                f"{skips} steps in a row were skipped: {cause}." + (hint if factor is None else "")
            )
        self.warn("skip" if factor is None else "factor", _skipped_for(cause))

    def _gradients(self, *, late: bool) -> str:
        """Which gradients were not finite, as a sentence."""
        if late:
            names = self.culprits.names(self._setup.groups)
        else:
            names = nonfinite_names(self._setup.named_grads())
        where = f"in {', '.join(map(repr, names))}" if names else "in their norm"
        return f"gradients are not finite {where}"

    def warn(self, cause: str, message: str) -> None:
        """Warn once for each cause, at the line that called step."""
        self.said.warn(cause, message)


def _skipped_for(cause: str) -> str:
    return (
        f"{cause}; the step was skipped and nothing changed. Further skips are counted in "
        f"metrics()['skipped_steps']."
    )
