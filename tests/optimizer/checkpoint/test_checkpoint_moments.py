"""A run may be saved at any moment: what is loaded is what was saved, and goes on bit by bit."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from frozen import difference, frozen
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import Optimizer

import mixprec

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

RULES: dict[str, Callable[[Any], Optimizer]] = {
    "ASGD": lambda params: torch.optim.ASGD(params, lr=0.1),
    "Adadelta": lambda params: torch.optim.Adadelta(params, lr=0.1),
    "Adafactor": lambda params: torch.optim.Adafactor(params, lr=0.1),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=0.1),
    "Adam": lambda params: torch.optim.Adam(params, lr=0.1, amsgrad=True),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.1),
    "Adamax": lambda params: torch.optim.Adamax(params, lr=0.1),
    "Muon": lambda params: torch.optim.Muon(params, lr=0.1),
    "NAdam": lambda params: torch.optim.NAdam(params, lr=0.1),
    "RAdam": lambda params: torch.optim.RAdam(params, lr=0.1),
    "RMSprop": lambda params: torch.optim.RMSprop(params, lr=0.1, momentum=0.5, centered=True),
    "Rprop": lambda params: torch.optim.Rprop(params, lr=0.1),
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1),
    "SGD with momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
}

MOMENTS = ("load weights", "adopt", "step", "rest", "overflow", "freeze", "add", "init")
"""What may happen in a run: FP32 weights loaded, weights edited and adopted, a step, a step in
which some parameters have no gradient, one that is skipped, a parameter frozen, a group added, the
state of all parameters made."""


@dataclass
class Run:
    """A model of several dtypes under one optimizer, and what happens to it."""

    build: Callable[[Any], Optimizer]
    dtypes: tuple[torch.dtype, ...]
    options: dict[str, Any]
    groups: int = 1
    time: int = 0

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        values = [torch.randn(4, 3 + place, generator=generator) for place in range(4)]
        dtypes = [self.dtypes[place % len(self.dtypes)] for place in range(4)]
        self.model = nn.ParameterList(
            nn.Parameter(value.to(dtype)) for value, dtype in zip(values, dtypes, strict=True)
        )
        named = list(self.model.named_parameters())
        scaler = mixprec.DynamicLossScaler(init_scale=2.0**8, growth_interval=2)
        self.optimizer = mixprec.MixedPrecision(
            self.build(named[:3]),
            loss_scaler=scaler if FP16 in self.dtypes else None,
            bucket_numel=8,
            **self.options,
        )
        for _ in range(1, self.groups):
            self._add()

    def _add(self) -> None:
        named = list(self.model.named_parameters())
        self.optimizer.add_param_group({"params": named[3:], "lr": 0.05})

    def happen(self, moment: str) -> None:
        self.time += 1
        if moment == "load weights":
            generator = torch.Generator().manual_seed(self.time)
            values = [torch.randn(p.shape, generator=generator) for p in self.model]
            weights = dict(zip(self.model.state_dict(), values, strict=True))
            self.optimizer.load_fp32_state_dict(self.model, weights)
        elif moment == "adopt":
            with torch.no_grad():
                self.model[0].fill_(0.5 + self.time)
            self.optimizer.adopt_params()
        elif moment == "add" and self.groups == 1:
            self.groups = 2
            self._add()
        elif moment == "freeze":
            self.model[1].requires_grad_(False)
        elif moment == "init":
            self.optimizer.init_state()
        elif moment in ("step", "rest", "overflow"):
            self.step(rest=moment == "rest", overflow=moment == "overflow")

    def step(self, *, rest: bool = False, overflow: bool = False) -> None:
        generator = torch.Generator().manual_seed(100 + self.time)
        scaler = self.optimizer.loss_scaler
        loss: Tensor | float = 1.0
        if scaler is not None:
            loss = scaler.multiply(torch.ones(()))  # pyright: ignore
        for place, param in enumerate(self.model):
            grad = torch.randn(param.shape, generator=generator) * loss
            resting = (rest and place % 2) or not param.requires_grad
            param.grad = None if resting else grad.to(param.dtype)
        if overflow:
            self.model[0].grad = torch.full_like(self.model[0], float("inf"))
        self.optimizer.step()

    def saved(self) -> Any:
        return copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict()))

    def resumed(self) -> Run:
        """A new run from this one's checkpoint."""
        weights, state = self.saved()
        other = Run(self.build, self.dtypes, self.options, self.groups, self.time)
        for ours, theirs in zip(other.model, self.model, strict=True):
            ours.requires_grad_(theirs.requires_grad)
        first, second = (other.model, weights), (other.optimizer, state)
        for thing, value in (first, second) if self.time % 2 else (second, first):
            thing.load_state_dict(value)  # either order is right
        return other

    def look(self) -> Any:
        return frozen([self.saved(), [m for _, m in self.optimizer.masters()]])


def check_resumes(run: Run, moments: list[str]) -> None:
    """Save and load after these moments; then both runs go on alike."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="gradients are not finite")
        for moment in moments:
            run.happen(moment)
        other = run.resumed()
        assert difference(run.look(), other.look()) == ""
        for moment in ("step", "rest", "step"):
            for each in (run, other):
                each.happen(moment)
            assert difference(run.look(), other.look()) == ""


@pytest.mark.parametrize(
    "moments",
    [
        ["load weights"],
        ["load weights", "rest", "rest"],
        ["load weights", "overflow"],
        ["load weights", "freeze", "step"],
        ["add", "rest", "load weights"],
    ],
    ids=", ".join,
)
@pytest.mark.parametrize("rule", RULES)
def test_masters_without_other_state_load_for_every_rule(rule: str, moments: list[str]) -> None:
    check_resumes(Run(RULES[rule], (BF16,), {}), moments)


FUSED = ("AdamW", "Adam", "SGD with momentum", "SGD", "RMSprop", "NAdam", "Adagrad")


@settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    rule=st.sampled_from(sorted(RULES)),
    dtypes=st.sampled_from([(BF16,), (FP16,), (FP32,), (BF16, FP32), (FP16, FP32), (BF16, FP16)]),
    masters=st.sampled_from(["auto", "full"]),
    moments=st.lists(st.sampled_from(MOMENTS), max_size=6),
)
def test_run_saved_at_any_moment_goes_on(
    rule: str, dtypes: tuple[torch.dtype, ...], masters: str, moments: list[str]
) -> None:
    check_resumes(Run(RULES[rule], dtypes, {"masters": masters}), moments)


@settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    rule=st.sampled_from(FUSED),
    dtypes=st.sampled_from([(BF16,), (FP16,), (BF16, FP32)]),
    formats=st.sampled_from([None, "bf16", "8bit"]),
    moments=st.lists(st.sampled_from(MOMENTS), max_size=6),
)
def test_fused_run_saved_at_any_moment_goes_on(
    rule: str, dtypes: tuple[torch.dtype, ...], formats: Any, moments: list[str]
) -> None:
    check_resumes(Run(RULES[rule], dtypes, {"fused": True, "state_formats": formats}), moments)
