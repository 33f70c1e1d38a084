"""What a MixedPrecision does with each parameter, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Literal

from torch import Tensor

from mixprec.optimizer.buckets import RuleCalls
from mixprec.optimizer.fused.step import FusedStep
from mixprec.optimizer.masters import Storage
from mixprec.optimizer.rule.admission import Admission
from mixprec.optimizer.setup import Setup

__all__ = ["Explanation"]

_COST = {
    "full": "FP32 masters, 4 B/param",
    "split": "split masters, 2 B/param",
    "frozen": "frozen, no masters until they step",
    "none": "no masters, stepped as by the rule alone",
}


class Explanation:
    """How a rule runs and why, in which tier, and what each group's masters cost. Changes nothing.

    Args:
        setup: the rule, its parameters and settings.
        calls: how the rule runs on masters.
        fused: which of its groups run as programs.
    """

    def __init__(self, setup: Setup, calls: RuleCalls, fused: FusedStep) -> None:
        self._setup, self._calls, self._fused = setup, calls, fused
        self._admission, self._refusal = self._considered()
        self._whole = self._admission is not None and not self._admission.per_parameter

    def text(self, *, formula: bool, source: bool) -> str:
        """See `MixedPrecision.explain`."""
        setup, refusal = self._setup, self._refusal
        manner = _manner(self._admission, self._calls.bucket_numel)
        lines = [
            f"MixedPrecision around {type(setup.inner).__name__}",
            f"  step() will refuse: {refusal}" if refusal else f"  {manner}",
        ]
        for index, group in enumerate(setup.groups):
            lines += self._group(index, group["params"])
        details = [*self._settings()]
        details += self._formulas() if formula else ()
        details += self._sources() if source else ()
        return "\n".join([*lines, *(f"  {detail}" for detail in details)])

    def _considered(self) -> tuple[Admission | None, str]:
        """How the rule would run, and why a step would refuse, if it would."""
        admission = self._calls.known()
        try:
            admission = self._calls.considered()
            if admission is not None and not admission.per_parameter:
                self._calls.check_whole(admission)
                self._fused.groups.nobody(admission.reason)
        except TypeError as error:
            return admission, str(error)
        return admission, ""

    def _group(self, index: int, params: Sequence[Tensor]) -> Iterator[str]:
        """A line for each dtype and cost, and one for the tier."""
        counts: Counter[tuple[str, str]] = Counter()
        numel: Counter[tuple[str, str]] = Counter()
        for param in params:
            dtype = str(param.dtype).removeprefix("torch.")
            kind = (dtype, "not stepped" if self._refusal else _COST[self._will_store(param)])
            counts[kind] += 1
            numel[kind] += param.numel()
        for (dtype, cost), count in counts.items():
            plural = "tensor" if count == 1 else "tensors"
            yield (
                f"  param_groups[{index}]: {count} {dtype} {plural}, "
                f"{numel[dtype, cost]:,} parameters: {cost}"
            )
        if counts and not self._refusal:
            yield f"  param_groups[{index}] is {self._how_fused(index)}"

    def _settings(self) -> Iterator[str]:
        setup = self._setup
        yield f"non-finite gradients: {setup.on_nonfinite} the step"
        if setup.max_grad_norm is not None:
            yield f"gradients clipped to norm {setup.max_grad_norm} in FP32"
        if setup.loss_scaler is not None:
            yield f"loss scaled by {type(setup.loss_scaler).__name__}"

    def _will_store(self, param: Tensor) -> Storage | Literal["frozen"]:
        store = self._setup.store
        if not param.requires_grad and store.has(param):
            if not store.known(self._setup.state, param):
                return "frozen"
        storage = store.storage(param)
        return "full" if self._whole and storage == "split" else storage

    def _formulas(self) -> Iterator[str]:
        """What each group's rule computes by element, in a step after its first ones."""
        for index, group in enumerate(self._setup.groups):
            if group["params"]:
                found = self._fused.groups.recorded(index)
                if found.fusible:
                    lines = str(found.programs[-1]).splitlines()
                    yield "\n    ".join([f"param_groups[{index}] computes", *lines])
                else:
                    yield f"param_groups[{index}] has no formula: {found.reason}"

    def _sources(self) -> Iterator[str]:
        if self._whole:
            return
        for index in range(len(self._setup.groups)):
            try:
                found = self._fused.groups.considered(index)
            except (TypeError, ValueError):
                continue  # `_how_fused` says why
            if found is not None and found.fusible:
                yield f"param_groups[{index}] runs\n\n{self._fused.groups.source(index)}"

    def _how_fused(self, index: int) -> str:
        """The tier of a group's 16-bit parameters, and why it is no lower one."""
        store = self._setup.store
        below = "tier 3" if self._whole or store.choice == "full" else "tier 2"
        if not any(map(store.has, self._setup.groups[index]["params"])):
            below = "the rule itself"
        if self._whole:
            return f"not fused ({below}): the rule sees all masters at once"
        try:
            found = self._fused.groups.considered(index)
        except (TypeError, ValueError) as error:
            return f"refused by step(): {error}"
        if found is None:
            return f"not fused ({below}): {self._fused.groups.why_not(index)}"
        if not found.fusible:
            return f"not fused ({below}): {found.reason}"
        return f"fused (tier 1, {self._fused.groups.means(index)}): {found.reason}"


def _manner(admission: Admission | None, bucket_numel: int | None) -> str:
    if admission is None:
        return "no 16-bit parameters: the rule runs as it is"
    if not admission.per_parameter:
        return f"whole: the rule sees all masters at once, because {admission.reason}"
    if bucket_numel is None:
        return "whole: bucket_numel is None"
    return (
        f"bucket by bucket: {admission.reason} (tried on small tensors), so it runs in a scratch "
        f"of {bucket_numel:,} elements, or the largest tensor if that is larger: 8 bytes each "
        f"for split masters and their gradients, 4 for full ones"
    )
