"""Masters that a checkpoint brought, until the next step shows which weights they have met."""

from __future__ import annotations

from torch import Tensor

from mixprec.optimizer.checkpoint.loading import Loaded, take_over_wide
from mixprec.optimizer.reports.outcome import Outcome
from mixprec.optimizer.setup import Setup

__all__ = ["LoadedMasters"]


class LoadedMasters:
    """What the last load has left to be found out."""

    def __init__(self, setup: Setup, outcome: Outcome) -> None:
        self._setup, self._outcome = setup, outcome
        self.wide: list[tuple[Tensor, Tensor]] = []
        """Masters of parameters that are not in 16 bits here."""
        self.fresh = False
        """Whether masters were loaded since the last step."""

    def take(self, loaded: Loaded) -> None:
        self.wide, self.fresh = loaded.wide, loaded.has_masters

    def become_params(self) -> None:
        """FP32 parameters that are nothing but the roundings of their masters become these."""
        take_over_wide(self.wide, partly=False)

    def conclude(self) -> None:
        """Weights are loaded by now: masters become FP32 parameters, or are dropped, aloud."""
        if not self.wide:
            return
        here = {id(param) for param in self._setup.params()}
        wide = [(param, master) for param, master in self.wide if id(param) in here]
        others = take_over_wide(wide, partly=True)
        self.wide = []
        if others:
            more = f" and {len(others) - 1} more are" if len(others) > 1 else " is"
            dtype = str(others[0].dtype).removeprefix("torch.")
            self._outcome.warn(
                "wide",
                f"{self._setup.name(others[0])}{more} {dtype} here and has a master in the loaded "
                f"checkpoint, of which it is no rounding to 16 bits; the weights won, the masters "
                f"were dropped. To go on from the masters, load the FP32 weights that "
                f"fp32_state_dict(model) of that run gives, with load_fp32_state_dict(model, ...).",
            )

    def warn_of_edits(self) -> None:
        """Tell of weights that are not their masters, rounded: read in a wrong pair, or written."""
        fresh, self.fresh = self.fresh, False
        edited = self._setup.store.edited
        names = [self._setup.name(param) for param in edited]
        if not names:
            return
        edited.clear()
        one, several = ("is", "are") if fresh else ("was", "were")
        more = f" and {len(names) - 1} more {several}" if len(names) > 1 else f" {one}"
        if fresh:
            self._outcome.warn(
                "load",
                f"{names[0]}{more} not the rounding of the masters that were loaded; the weights "
                f"won where they differ. Are the model's weights of another moment than the "
                f"optimizer's, or its parameters in another order? Without names they are paired "
                f"by position: pass named_parameters() to the optimizer.",
            )
        else:
            self._outcome.warn(
                "edit",
                f"{names[0]}{more} written outside of step() since the last one; masters were read "
                f"again where they differ, and kept their FP32 bits elsewhere. Call adopt_params() "
                f"after an intended edit.",
            )
