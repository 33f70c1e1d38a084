"""Calling the rule on masters: bucket by bucket, or on all of them at once.

Which of the two is decided by trying the rule (`rule.admission`), before its first step and anew
once groups have changed. A rule that treats tensors one by one may be given a part of them at a
time: FP32 gradients and decoded masters then need room for one bucket alone.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor

from mixprec.optimizer.checks import ParamChecks
from mixprec.optimizer.fused.step import FusedStep
from mixprec.optimizer.judging.scaled_grads import ScaledGrads
from mixprec.optimizer.master_run import MasterRun
from mixprec.optimizer.masters import Scratch
from mixprec.optimizer.rule.admission import Admission, admit, counts_writes
from mixprec.optimizer.rule.stand_ins import Bucket, GroupValues, fill_buckets, shared_keys
from mixprec.optimizer.setup import Setup
from mixprec.optimizer.undo import BareRun, RuleUndo

__all__ = ["RuleCalls"]


class RuleCalls:
    """How the rule of `setup` is called.

    Args:
        setup: the rule and its parameters.
        fused: which of its groups run as programs.
        bucket_numel: see `MixedPrecision`.
        check: what may have changed about parameters, refused before each run.
        scaled: the FP32 gradients that a run has multiplied.
    """

    def __init__(
        self,
        setup: Setup,
        fused: FusedStep,
        bucket_numel: int | Literal["auto"] | None,
        check: ParamChecks,
        scaled: ScaledGrads,
    ) -> None:
        self._setup, self._fused, self._check, self._scaled = setup, fused, check, scaled
        self._bucket_numel: int | Literal["auto"] | None = bucket_numel
        self._admissions: dict[bool, Admission] = {}
        self.admission: Admission | None = None
        """How the rule runs on masters; None where there are none, or before the first step."""

    # ---------------------------------------- how it may run

    def admit(self, *, with_loss: bool) -> None:
        """Try the rule, once with a loss and once without."""
        if with_loss not in self._admissions and self._is_tried(with_loss=with_loss):
            self._admissions[with_loss] = admit(self._setup.inner, with_loss=with_loss)
        self.admission = self._admissions.get(with_loss)
        if self.admission is not None and not self.admission.per_parameter:
            self.check_whole(self.admission)
            self._setup.store.whole = True

    def _is_tried(self, *, with_loss: bool) -> bool:
        """Whether it matters how the rule steps stand-ins, or if it calls its closure itself.

        A bare rule may do as it likes with a closure; one that has to be fused may not.
        """
        if self._setup.has_low():
            return True
        if not with_loss or self._fused.groups.fused is not True:
            return False
        return any([self._fused.groups.admission(i) for i in range(len(self._setup.groups))])

    def try_again(self) -> None:
        """Groups have changed."""
        self._admissions.clear()

    def considered(self) -> Admission | None:
        """What `admit` has found of masters, or would find now; nothing is kept."""
        if self.admission is None and self._setup.has_low():
            return admit(self._setup.inner)
        return self.known()

    def known(self) -> Admission | None:
        """What `admit` has found of masters, if there are any."""
        return self.admission if self._setup.has_low() else None

    def check_whole(self, admission: Admission) -> None:
        """Refuse split masters for a rule that has to see all of them."""
        if self._setup.store.choice == "split":
            raise TypeError(
                f"masters='split' keeps no FP32 masters to show {type(self._setup.inner).__name__} "
                f"all at once, and it has to see all tensors together ({admission.reason}). Use "
                f"masters='full'."
            )

    @property
    def reason(self) -> str:
        return self.admission.reason if self.admission else ""

    @property
    def bucket_numel(self) -> int | None:
        """Elements of FP32 scratch for a rule that runs bucket by bucket."""
        if self._bucket_numel != "auto":
            return self._bucket_numel
        # On a CPU smaller ones fit a core's cache, but cost more calls of the rule than that saves.
        device = next((p.device.type for p in self._setup.params()), "cpu")
        return 2**20 if device == "cpu" else 2**22

    @property
    def in_buckets(self) -> bool:
        """Whether the rule sees a part of its parameters at a time."""
        masters = self.admission is not None and not self._setup.store.whole
        return masters and self.bucket_numel is not None

    # ---------------------------------------- running it

    def undo(self, total: int) -> RuleUndo:
        """A record of what calls on `total` parameters will change."""
        devices = {param.device for param in self._setup.params()}
        admission, inner = self.admission, self._setup.inner
        if admission is not None:
            counted = lambda: admission.counted  # noqa: E731
        else:
            counted = lambda: counts_writes(inner)  # noqa: E731
        return RuleUndo(inner, devices, counted=counted, total=total)

    def run(
        self,
        call: Callable[[], Any],
        factor: Tensor | None,
        groups: Bucket,
        undo: RuleUndo,
    ) -> None:
        """`call` the rule with masters and gradients in place, once for each bucket of `groups`."""
        setup = self._setup
        self._check(chain(*groups.values()))
        everybody = [len(groups.get(i, ())) for i in range(len(setup.groups))]
        if self.admission is None and everybody == [len(g["params"]) for g in setup.groups]:
            with BareRun(setup.params(), undo), torch.enable_grad():
                self._scaled.scale(factor, chain(*groups.values()))
                call()
            return
        buckets = self._buckets(groups)
        scratch = Scratch(self._largest_rooms(buckets))
        shared = shared_keys(setup.inner)
        values = GroupValues(setup.groups) if len(buckets) > 1 else None
        self._scaled.scale(factor, chain(*groups.values()))
        for bucket in buckets:
            run = self._masters_of(bucket, scratch, undo, shared)
            with run, values.bucket(bucket) if values else nullcontext(), torch.enable_grad():
                run.take_grads(factor)
                call()

    def on_everything(self, undo: RuleUndo) -> MasterRun | None:
        """All masters in the rule's hands; None if there are none."""
        if self.admission is None:
            return None
        everything = {i: group["params"] for i, group in enumerate(self._setup.groups)}
        return self._masters_of(everything, Scratch(), undo, None)

    def _masters_of(
        self, bucket: Bucket, scratch: Scratch, undo: RuleUndo, shared: set[Any] | None
    ) -> MasterRun:
        setup = self._setup
        low_states = self.admission.low_states if self.admission else frozenset[str]()
        return MasterRun(
            setup.inner, setup.state, setup.store, bucket, scratch, undo, shared, low_states
        )

    def _buckets(self, groups: Bucket) -> list[Bucket]:
        capacity = self.bucket_numel
        if capacity is None or not self.in_buckets:
            return [groups]
        return fill_buckets(groups, self._room, capacity)

    def _largest_rooms(self, buckets: list[Bucket]) -> dict[torch.device, int]:
        """The most scratch that any bucket takes, by device."""
        largest: dict[torch.device, int] = {}
        for bucket in buckets:
            rooms: dict[torch.device, int] = {}
            for param in (param for params in bucket.values() for param in params):
                rooms[param.device] = rooms.get(param.device, 0) + self._room(param)
            largest = {d: max(rooms.get(d, 0), largest.get(d, 0)) for d in {**rooms, **largest}}
        return largest

    def _room(self, param: Tensor) -> int:
        return Scratch.padded(param.numel()) if self._setup.store.has(param) else 0
