"""An optimizer stepped by its programs in plain torch: a fused step, without a kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mixprec.fused.admission import FusedAdmission, admit_fused
from mixprec.fused.record import Probe, Recording
from mixprec.inner import rule_of


class Interpreted:
    """Steps `inner` by its programs; all of its parameters have gradients, in FP32.

    A group that is not admitted, and one with parameters of no dimensions, raises.
    """

    def __init__(self, inner: Optimizer) -> None:
        self.inner: Any = inner
        self.admissions: list[FusedAdmission] = []
        for index in range(len(inner.param_groups)):
            self.admissions.append(admit_fused(inner, index))
            assert self.admissions[-1].fusible, self.admissions[-1].reason
        self.probes: dict[Tensor, Probe] = {}

    def step(self) -> None:
        new = not self.inner.state or all(isinstance(k, str) for k in self.inner.state)
        if new and any(admission.first_eager for admission in self.admissions):
            rule_of(self.inner)(self.inner)
            return
        recordings: list[list[Recording]] = []
        for index, group in enumerate(self.inner.param_groups):
            recordings.append([self._step_one(index, param) for param in group["params"]])
        for group, found in zip(self.inner.param_groups, recordings, strict=True):
            group.update(found[0].group)
            self.inner.state.update(found[0].shared)
            vars(self.inner).update(found[0].attributes)

    def _step_one(self, index: int, param: Any) -> Recording:
        if param not in self.probes:
            self.probes[param] = self.admissions[index].probe(self.inner, index, param)
        entry: dict[str, Any] = self.inner.state.get(param) or {}
        state = self.admissions[index].state_of(entry, param)
        recording = self.probes[param].step(state)
        assert recording.program in self.admissions[index].programs
        tensors = state.tensors(entry)
        # Copies, since a state may begin as the master itself.
        given = param.detach().clone(), param.grad.clone()
        master, made = recording.program.run(*given, tensors, recording.scalars)
        shapes = recording.state.reduced
        made = {k: v.reshape(shapes[k]) if k in shapes else v for k, v in made.items()}
        with torch.no_grad():
            param.copy_(master)
        self.inner.state[param] = recording.state.entry({**tensors, **made})
        return recording
