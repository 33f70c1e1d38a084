"""A checkpoint that is wrong, or a load that is stopped, changes nothing and says what it is."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from frozen import difference, frozen
from parts import params_of
from test_checkpoint_moments import BF16, FP16, RULES, Run
from torch import nn
from torch.optim import SGD, Adagrad, AdamW, Optimizer

import mixprec
from mixprec.optimizer.checkpoint.states import States

Damage = Callable[[Any], Any]


def look(optimizer: mixprec.MixedPrecision) -> Any:
    """Everything that a load may change, with the identity of what others hold."""
    inner, scaler = optimizer.inner, optimizer.loss_scaler
    assert optimizer.state is inner.state
    held = [(id(group), id(group["params"])) for group in optimizer.param_groups]
    return [
        held,
        id(optimizer.param_groups) == id(inner.param_groups),
        [id(param) for param in params_of(optimizer)],
        frozen([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]),
        frozen(list(optimizer.state.values())),
        frozen([[p, m] for p, m in optimizer.masters()]),
        frozen(list(optimizer._store.early.values())),
        frozen({k: v for k, v in vars(inner).items() if isinstance(v, (int, float, dict))})
        if type(inner).__name__ == "Counting"
        else None,
        None if scaler is None else frozen(vars(scaler)["_state"]._asdict()),
        optimizer.metrics(),
        optimizer._outcome.has_new_losses,
    ]


def stepped(rule: str = "AdamW", dtype: torch.dtype = BF16, **options: Any) -> Run:
    run = Run(RULES[rule], (dtype,), options)
    for _ in range(2):
        run.happen("step")
    return run


def edited(change: Callable[[Any], object]) -> Damage:
    """A damage that edits the state dict in place."""

    def damage(saved: Any) -> Any:
        change(saved)
        return saved

    return damage


def without(key: str, *, of: str = "state", index: int = 1) -> Damage:
    return edited(lambda saved: saved[of][index].pop(key))


def with_value(key: str, value: Any, *, of: str = "state", index: int = 1) -> Damage:
    return edited(lambda saved: saved[of][index].update({key: value}))


def keys_of_json(saved: Any) -> Any:
    return {**saved, "state": {str(key): entry for key, entry in saved["state"].items()}}


def without_everywhere(key: str) -> Damage:
    return edited(lambda saved: [entry.pop(key) for entry in saved["state"].values()])


def of_one_parameter(saved: Any) -> Any:
    saved["param_groups"][0]["params"] = [0, 0, 2]
    del saved["state"][1]
    return saved


DAMAGE: dict[str, tuple[str, Damage, str]] = {
    "none": ("AdamW", lambda _: None, "was given None, not the dict"),
    "list": ("AdamW", lambda saved: [saved], "was given a list, not the dict"),
    "empty": ("AdamW", lambda _: {}, "is empty and lacks 'state' and 'param_groups'"),
    "model": (
        "AdamW",
        lambda _: nn.Linear(2, 2).state_dict(),
        r"has 'weight', 'bias' and lacks .* It looks like a model's",
    ),
    "whole file": (
        "AdamW",
        lambda saved: {"model": {}, "optimizer": saved},
        "Load its entry 'optimizer'",
    ),
    "scaler": (
        "AdamW",
        lambda _: mixprec.DynamicLossScaler().state_dict(),
        "looks like a loss scaler's",
    ),
    "state is a list": (
        "AdamW",
        lambda saved: {**saved, "state": [*saved["state"].values()]},
        "'state' of the checkpoint is a list",
    ),
    "group is a list": (
        "AdamW",
        lambda saved: {**saved, "param_groups": [[0, 1, 2]]},
        r"param_groups\[0\] of the checkpoint is a list without a list 'params'",
    ),
    "entry is a list": (
        "AdamW",
        edited(lambda saved: saved["state"].update({1: [1]})),
        "state of '1' is a list",
    ),
    "short names": (
        "AdamW",
        edited(lambda saved: saved["param_groups"][0]["param_names"].pop()),
        r"param_groups\[0\] of the checkpoint has 2 param_names for 3 parameters",
    ),
    "one id twice": ("AdamW", of_one_parameter, "holds parameter 0 twice, for 0 and 1 here"),
    "keys of JSON": ("AdamW", keys_of_json, "has the text '0' for a key .* as JSON leaves it"),
    "no lr": (
        "AdamW",
        without("lr", of="param_groups", index=0),
        "lacks 'lr', which AdamW needs",
    ),
    "no betas": (
        "AdamW",
        without("betas", of="param_groups", index=0),
        "lacks 'betas', which AdamW",
    ),
    "lr is no number": (
        "AdamW",
        with_value("lr", "0.1", of="param_groups", index=0),
        r"AdamW cannot step with param_groups\[0\] of the checkpoint",
    ),
    "int master": (
        "AdamW",
        with_value("master", torch.zeros(4, 4, dtype=torch.int32)),
        r"'master' of '1' is torch.int32 .* a master is torch.float32",
    ),
    "16-bit master": (
        "AdamW",
        with_value("master", torch.zeros(4, 4, dtype=BF16)),
        "'master' of '1' is torch.bfloat16 .* Was the checkpoint cast",
    ),
    "text for a master": ("AdamW", with_value("master", "1"), "'master' of '1' is a str"),
    "meta master": (
        "AdamW",
        with_value("master", torch.empty(4, 4, device="meta")),
        "'master' of '1' is on the meta device .* map_location='cpu'",
    ),
    "int moment": (
        "AdamW",
        with_value("exp_avg", torch.zeros(4, 4, dtype=torch.int64)),
        r"'exp_avg' of '1' is torch.int64 \[4, 4\] .* the rule keeps torch.float32 \[4, 4\]",
    ),
    "text for a step": ("AdamW", with_value("step", "three"), "'step' of '1' is 'three'|could not"),
    "step of a shape": (
        "AdamW",
        with_value("step", torch.ones(3)),
        r"'step' of '1' is torch.float32 \[3\] .* keeps torch.float32 \[\]",
    ),
    "no step": ("AdamW", without("step"), "state of (1, which has|'1' lacks 'step')"),
    "no step in NAdam": ("NAdam", without("mu_product"), "state of (1, which has|'1' lacks)"),
    "no moment": ("AdamW", without("exp_avg_sq"), "state of '1' lacks 'exp_avg_sq'"),
    "no moment anywhere": (
        "AdamW",
        without_everywhere("exp_avg_sq"),
        "state of '0' lacks 'exp_avg_sq' .* which AdamW makes in a parameter's first step",
    ),
    "no factor": ("Adafactor", without("row_var"), "state of '1' lacks 'row_var'"),
    "no factor anywhere": ("Adafactor", without_everywhere("col_var"), "'0' lacks 'col_var'"),
    "no momentum": ("Muon", without_everywhere("momentum_buffer"), None or ""),
    "factor of a shape": (
        "Rprop",
        with_value("step_size", torch.ones(4, 3)),
        r"'step_size' of '1' is \[4, 3\] in the checkpoint, the parameter is \[4, 4\]",
    ),
}
del DAMAGE["no momentum"]


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named_and_changes_nothing(case: str) -> None:
    rule, damage, text = DAMAGE[case]
    run = stepped(rule)
    saved = copy.deepcopy(run.optimizer.state_dict())
    saved["param_groups"][0]["weight_decay"] = 0.75
    run.happen("step")
    before = look(run.optimizer)
    with pytest.raises((ValueError, TypeError), match=text) as raised:
        run.optimizer.load_state_dict(damage(saved))
    assert "nothing was loaded" in str(raised.value)
    assert difference(before, look(run.optimizer)) == ""
    run.happen("step")


class Lazy(Optimizer):
    """A rule of nobody's that makes anew what it does not find."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "beta": 0.9})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    for name in ("left", "right"):
                        if name not in state:
                            state[name] = torch.zeros_like(p)
                        state[name].lerp_(p.grad, 1 - group["beta"])
                    p.add_(state["left"] + state["right"], alpha=-group["lr"])


def test_state_that_a_foreign_rule_would_silently_make_anew_is_missed() -> None:
    run = Run(Lazy, (BF16,), {})
    run.happen("step")
    saved = copy.deepcopy(run.optimizer.state_dict())
    run.optimizer.load_state_dict(saved)
    for entry in saved["state"].values():
        del entry["right"]
    with pytest.raises(ValueError, match=r"state of '0' lacks 'right' .* which Lazy makes"):
        run.optimizer.load_state_dict(saved)
    saved = copy.deepcopy(run.optimizer.state_dict())
    saved["state"][2]["left"] = torch.zeros(2, 2)
    with pytest.raises(
        ValueError, match=r"cannot step from .* of '2' \(RuntimeError: .* dimension"
    ):
        run.optimizer.load_state_dict(saved)


class OneForZeros(Optimizer):
    """A rule that keeps one number where a parameter begins at zero, as Prodigy does."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if "begin" not in self.state[p]:
                    self.state[p]["begin"] = p.clone() if p.any() else torch.zeros(())
                p.sub_(p.grad + self.state[p]["begin"], alpha=group["lr"])


def test_states_whose_shape_depends_on_values_load() -> None:
    for dtype in (torch.float32, BF16):
        weights = [nn.Parameter(torch.full((3,), value, dtype=dtype)) for value in (0.0, 1.0)]
        optimizer = mixprec.MixedPrecision(OneForZeros(weights))
        for p in weights:
            p.grad = torch.ones_like(p)
        optimizer.step()
        saved = frozen(optimizer.state_dict())
        optimizer.load_state_dict(optimizer.state_dict())
        assert difference(saved, frozen(optimizer.state_dict())) == ""


def test_groups_may_differ_in_the_states_that_they_keep() -> None:
    def build() -> mixprec.MixedPrecision:
        weights = [nn.Parameter(torch.ones(3, dtype=BF16)) for _ in range(2)]
        groups = [{"params": [w], "amsgrad": index == 0} for index, w in enumerate(weights)]
        return mixprec.MixedPrecision(AdamW(groups))

    optimizer = build()
    for p in params_of(optimizer):
        p.grad = torch.ones_like(p)
    optimizer.step()
    build().load_state_dict(copy.deepcopy(optimizer.state_dict()))


def test_state_that_was_wrapped_mid_run_saves_a_checkpoint_that_loads() -> None:
    """The bare run's states have no masters yet where a parameter has no gradient any more."""
    weights = [nn.Parameter(torch.full((3,), 1.5, dtype=BF16)) for _ in range(2)]
    bare = AdamW(weights)
    for p in weights:
        p.grad = torch.ones_like(p)
    bare.step()
    optimizer = mixprec.MixedPrecision(bare)
    weights[1].grad = None
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    others = [nn.Parameter(p.detach().clone()) for p in weights]
    resumed = mixprec.MixedPrecision(AdamW(others))
    resumed.load_state_dict(saved)
    assert difference(frozen(saved), frozen(resumed.state_dict())) == ""


def test_what_a_rule_keeps_for_all_parameters_is_copied() -> None:
    run = stepped()
    shared: Any = run.optimizer.state
    shared["counts"] = {"all": torch.zeros(1)}
    saved = run.optimizer.state_dict()
    other = stepped()
    other.optimizer.load_state_dict(saved)
    shared["counts"]["all"].fill_(7.0)
    assert other.optimizer.state["counts"]["all"].item() == 0.0  # pyright: ignore


def test_meta_parameters_are_refused_by_name() -> None:
    saved = stepped().optimizer.state_dict()
    run = Run(RULES["AdamW"], (BF16,), {})
    empty = [(name, p.to("meta")) for name, p in run.model.named_parameters()][:3]
    optimizer = mixprec.MixedPrecision(AdamW([(n, nn.Parameter(p)) for n, p in empty]))
    with pytest.raises(ValueError, match=r"0 is on the meta device, .*model.to_empty"):
        optimizer.load_state_dict(saved)


def test_adagrad_of_another_shape_is_refused_before_its_own_load() -> None:
    wide, narrow = (nn.Parameter(torch.ones(n, dtype=BF16)) for n in (4, 3))
    saved = mixprec.MixedPrecision(Adagrad([("w", wide)])).state_dict()
    with pytest.raises(ValueError, match=r"'(sum|master)' of 'w' is \[4\] in the checkpoint"):
        mixprec.MixedPrecision(Adagrad([("w", narrow)])).load_state_dict(saved)


def test_json_keeps_groups() -> None:
    """Tuples come back as lists, which rules take."""
    run = stepped()
    saved = run.optimizer.state_dict()
    saved["param_groups"] = json.loads(json.dumps(saved["param_groups"]))
    run.optimizer.load_state_dict(saved)
    run.happen("step")


# ---------------------------------------- a load that is stopped

PACKAGE = Path(mixprec.__file__).parent


@contextmanager
def stopped_at(number: int) -> Generator[list[int]]:
    """Raise KeyboardInterrupt at a line of ours, counted from where a load begins to commit."""
    passed: list[int] = []

    def trace(frame: Any, event: str, _argument: Any) -> Any:
        code = frame.f_code
        ours = PACKAGE in Path(code.co_filename).parents
        if not ours or not (passed or code is States.commit.__code__):
            return None
        passed.append(frame.f_lineno)
        if event == "line" and len(passed) >= number:
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        yield passed
    finally:
        sys.settrace(None)


class Counting(SGD):
    """A rule with counters and a schedule of its own, in its own part of the checkpoint."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1, momentum=0.9)
        self.count, self.nested = 0, {"seen": [0]}

    def step(self, closure: Any = None) -> Any:
        self.count += 1
        self.nested["seen"][0] += 1
        return super().step(closure)

    def state_dict(self) -> Any:
        return {**super().state_dict(), "count": self.count, "nested": self.nested}

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        self.count = state_dict["count"]
        self.nested["seen"][0] = state_dict["nested"]["seen"][0]


SOME_LINES = [("AdamW", 3), ("fused", 3), ("scaled", 23), ("own", 41)]
"""How many lines lie between two that are tried; those of a window and of a trial are many."""


@pytest.mark.parametrize(
    ("kind", "apart"),
    [*SOME_LINES, *(pytest.param(kind, 1, marks=pytest.mark.slow) for kind, _ in SOME_LINES)],
)
def test_load_that_is_interrupted_at_any_line_changes_nothing(
    kind: str, apart: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "mixprec.optimizer.checkpoint.loading.check_loaded", lambda *_: None
    )  # it works on copies
    if kind == "own":
        run = Run(Counting, (BF16,), {})
        run.happen("step")
    else:
        options: dict[str, Any] = (
            {"fused": True, "state_formats": "8bit"} if kind == "fused" else {}
        )
        run = stepped(dtype=FP16 if kind == "scaled" else BF16, **options)
    optimizer = run.optimizer
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["lr"] = 0.5
    run.happen("step")
    run.happen("overflow" if kind == "scaled" else "step")
    optimizer.state_dict()  # settles
    before = look(optimizer)
    finished, number = False, 0
    while not finished:
        number += apart
        try:
            with stopped_at(number):
                optimizer.load_state_dict(saved)
            finished = True
        except KeyboardInterrupt:
            now = look(optimizer)
            if now[3][1]["lr"] == 0.5:  # the load was done, and something after it was stopped
                break
            assert difference(frozen(before), frozen(now)) == "", f"stopped at line {number}"
    assert number > 60
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_rule_that_refuses_its_own_part_of_a_checkpoint_keeps_it() -> None:
    run = Run(Counting, (BF16,), {})
    run.happen("step")
    saved = copy.deepcopy(run.optimizer.state_dict())
    del saved["nested"]
    saved["count"], saved["param_groups"][0]["lr"] = 17, 0.5
    before = look(run.optimizer)
    with pytest.raises(ValueError, match=r"refuses 'count' of the checkpoint \(KeyError"):
        run.optimizer.load_state_dict(saved)
    assert difference(frozen(before), frozen(look(run.optimizer))) == ""
