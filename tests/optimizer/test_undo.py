"""Steps that are stopped: what is put back, what is brought to its end, and what is said."""

from __future__ import annotations

import copy
import pickle
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.flop_counter import FlopCounterMode

import mixprec
from mixprec.optimizer.rule.stand_ins import StandIns
from mixprec.optimizer.undo import Contents

UNFINISHED = (
    r"after an unfinished step: it was stopped by .* when .*Load a checkpoint.*adopt_params"
)


class Stumbles(Optimizer):
    """Momentum that stops at a parameter of a given place, but not in trials, which are smaller."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.125})
        self.stop_at: int | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        turn = 0
        for group in self.param_groups:
            for p in group["params"]:
                if turn == self.stop_at and p.numel() == 64:
                    raise torch.OutOfMemoryError("CUDA out of memory")
                m = self.state[p].setdefault("momentum", torch.zeros_like(p))
                p.sub_(m.mul_(0.5).add_(p.grad), alpha=group["lr"])
                turn += 1


def made(
    *, masters: Any = "auto", dtype: torch.dtype = torch.bfloat16, **options: Any
) -> tuple[list[nn.Parameter], mixprec.MixedPrecision]:
    weights = [nn.Parameter(torch.full((8, 8), 1.0 + n).to(dtype)) for n in range(3)]
    options = {"fused": False, "bucket_numel": None, **options}
    return weights, mixprec.MixedPrecision(Stumbles(weights), masters=masters, **options)


def take_step(weights: list[nn.Parameter], optimizer: Any) -> None:
    for weight in weights:
        weight.grad = torch.full_like(weight, 0.25)
    optimizer.step()


def stumble(weights: list[nn.Parameter], optimizer: Any, at: int) -> None:
    optimizer.inner.stop_at = at
    with pytest.raises(torch.OutOfMemoryError):
        take_step(weights, optimizer)
    optimizer.inner.stop_at = None


def everything(optimizer: mixprec.MixedPrecision) -> list[Any]:
    states = [sorted(optimizer.state[p]) for p in optimizer.state]
    values = [v.clone() for entry in optimizer.state.values() for v in entry.values()]
    weights = [p.detach().clone() for p, _ in optimizer.masters()]
    return [states, optimizer.metrics(), *values, *weights]


def assert_same(left: list[Any], right: list[Any]) -> None:
    for one, other in zip(left, right, strict=True):
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other


def test_contents_go_back_into_the_same_objects() -> None:
    tensor = torch.ones(2)
    value: dict[str, Any] = {"a": [1, {"b": deque([2], maxlen=3)}], "t": tensor, "s": {4}}
    inner = value["a"][1]["b"]
    before = Contents(value)
    value["a"].append(5)
    inner.append(6)
    value["s"].add(7)
    value["new"] = value.pop("t")
    before.restore()
    assert value == {"a": [1, {"b": deque([2])}], "t": tensor, "s": {4}}
    assert value["a"][1]["b"] is inner and before.tensors == [tensor]


@pytest.mark.parametrize("masters", ["split", "full"])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_first_step_that_runs_out_of_memory_has_changed_nothing(masters: Any, at: int) -> None:
    weights, optimizer = made(masters=masters)
    before = everything(optimizer)
    stumble(weights, optimizer, at)
    assert_same(everything(optimizer), before)
    assert not optimizer.state and not optimizer.inner.state
    take_step(weights, optimizer)
    other, undisturbed = made(masters=masters)
    take_step(other, undisturbed)
    assert_same(everything(optimizer), everything(undisturbed))


def test_a_later_step_that_is_stopped_before_the_rule_has_written_has_changed_nothing() -> None:
    weights, optimizer = made()
    take_step(weights, optimizer)
    before = everything(optimizer)
    stumble(weights, optimizer, 0)
    assert_same(everything(optimizer), before)
    take_step(weights, optimizer)


class MovesLists(Optimizer):
    """Halves a momentum by an operation on lists, then stops, but not in trials."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.125})
        self.stops = False

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("momentum", torch.ones_like(p))
                torch._foreach_mul_([m], 0.5)
                if self.stops and p.numel() == 64:
                    raise torch.OutOfMemoryError("CUDA out of memory")
                p.sub_(m, alpha=group["lr"])


@pytest.mark.parametrize("watched", [False, True])
def test_writes_that_torch_does_not_count_under_a_mode_are_said(watched: bool) -> None:
    weight = nn.Parameter(torch.ones(8, 8, dtype=torch.bfloat16))
    optimizer: Any = mixprec.MixedPrecision(MovesLists([weight]), fused=False)
    take_step([weight], optimizer)
    optimizer.inner.stops = True
    with FlopCounterMode(display=False) if watched else nullcontext():
        with pytest.raises(torch.OutOfMemoryError):
            take_step([weight], optimizer)
    with pytest.raises(RuntimeError, match=r"step\(\) " + UNFINISHED):
        optimizer.step()


USES: dict[str, Callable[[mixprec.MixedPrecision, nn.Module], object]] = {
    r"step\(\)": lambda optimizer, _: optimizer.step(),
    r"state_dict\(\)": lambda optimizer, _: optimizer.state_dict(),
    r"fp32_state_dict\(\)": lambda optimizer, model: optimizer.fp32_state_dict(model),
    r"masters_in_model\(\)": lambda optimizer, _: optimizer.masters_in_model().__enter__(),
    "copying this optimizer": lambda optimizer, _: copy.deepcopy(optimizer),
    "copying this optimizer ": lambda optimizer, _: pickle.dumps(optimizer),
}


@pytest.mark.parametrize("use", USES)
def test_nothing_steps_or_saves_from_a_step_that_the_rule_has_half_done(use: str) -> None:
    weights, optimizer = made()
    take_step(weights, optimizer)
    stumble(weights, optimizer, 1)
    model = nn.ParameterList(weights)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=use.strip() + " " + UNFINISHED):
            USES[use](optimizer, model)


def test_training_goes_on_from_what_is_there_when_the_user_says_so() -> None:
    weights, optimizer = made(masters="full")
    take_step(weights, optimizer)
    stumble(weights, optimizer, 1)
    with pytest.raises(RuntimeError, match=UNFINISHED):
        take_step(weights, optimizer)
    optimizer.adopt_params()
    for weight, master in optimizer.masters():
        assert torch.equal(weight, master.bfloat16())
    take_step(weights, optimizer)
    assert optimizer.state_dict()["state"]


def test_a_checkpoint_ends_what_was_half_done() -> None:
    weights, optimizer = made()
    take_step(weights, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    held = [weight.detach().clone() for weight in weights]
    stumble(weights, optimizer, 1)
    optimizer.load_state_dict(saved)
    with torch.no_grad():
        for weight, value in zip(weights, held, strict=True):
            weight.copy_(value)
    take_step(weights, optimizer)
    other, undisturbed = made()
    for _ in range(2):
        take_step(other, undisturbed)
    for (_, master), (_, right) in zip(optimizer.masters(), undisturbed.masters(), strict=True):
        assert torch.equal(master, right)


def test_buckets_that_are_done_before_the_one_that_fails_are_said() -> None:
    weights, optimizer = made(bucket_numel=64)
    calls = 0
    step = Stumbles.step

    def third_time(self: Any, closure: Any = None) -> Any:
        nonlocal calls
        calls += self.param_groups[0]["params"][0].shape == (8, 8)
        if calls == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(self, closure)

    take_step(weights, optimizer)  # with its trials
    optimizer.inner.__class__ = type("Stumbles", (Stumbles,), {"step": third_time})
    with pytest.raises(torch.OutOfMemoryError):
        take_step(weights, optimizer)
    with pytest.raises(RuntimeError, match="2 of 3 parameters had moved"):
        optimizer.state_dict()


def test_gradients_that_were_scaled_in_place_are_not_scaled_again() -> None:
    weight = nn.Parameter(torch.ones(64))
    optimizer: Any = mixprec.MixedPrecision(Stumbles([weight]), max_grad_norm=1.0)
    stumble([weight], optimizer, 0)
    assert weight.grad is not None and weight.grad[0] < 0.126
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match=r"an unfinished step has scaled in place.*zero_grad"
        ):
            optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    weight.grad.fill_(0.125)
    optimizer.step()
    assert torch.equal(weight.detach(), 1 - 0.125 * weight.grad)


def test_a_step_that_is_stopped_while_it_leaves_is_ended_by_whoever_asks_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights, optimizer = made()
    take_step(weights, optimizer)

    def stopped(self: StandIns) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StandIns, "leave", stopped)
        with pytest.raises(KeyboardInterrupt):
            take_step(weights, optimizer)
    assert [weight.dtype for weight, _ in optimizer.masters()] == [torch.bfloat16] * 3
    assert all(a is b for a, b in zip(optimizer.param_groups[0]["params"], weights, strict=True))
    assert optimizer.metrics()["steps"] == 2
    other, undisturbed = made()
    for _ in range(3):
        take_step(other, undisturbed)
    take_step(weights, optimizer)
    assert_same(everything(optimizer), everything(undisturbed))


@pytest.mark.parametrize("rule", [lambda p: SGD(p, lr=0.1, momentum=0.9), AdamW])
def test_a_first_fused_step_that_fails_leaves_no_state_behind(
    rule: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mixprec.optimizer.fused.plan import Batch

    weights = [nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = mixprec.MixedPrecision(rule(weights), fused=True)

    def stopped(self: Batch, pending: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Batch, "run", stopped)
        with pytest.raises(KeyboardInterrupt):
            take_step(weights, optimizer)
    assert not optimizer.state and optimizer.state_dict()["state"] == {}
    take_step(weights, optimizer)
    other = [nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16)) for _ in range(2)]
    undisturbed = mixprec.MixedPrecision(rule(other), fused=True)
    take_step(other, undisturbed)
    assert_same(everything(optimizer), everything(undisturbed))


def test_weights_are_back_before_any_is_rounded_on_the_way_out_of_masters_in_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights, optimizer = made()
    take_step(weights, optimizer)
    store: Any = optimizer._store
    rounded = store.set

    def out_of_memory(state: Any, param: Tensor, master: Tensor) -> None:
        if param is weights[1]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        rounded(state, param, master)

    with monkeypatch.context() as patch:
        with pytest.raises(torch.OutOfMemoryError):
            with optimizer.masters_in_model(), torch.no_grad():
                for weight in weights:
                    weight.mul_(1.001)
                patch.setattr(store, "set", out_of_memory)
        assert [weight.dtype for weight in weights] == [torch.bfloat16] * 3
    found = [master for _, master in optimizer.masters()]
    other, undisturbed = made()
    take_step(other, undisturbed)
    with undisturbed.masters_in_model(), torch.no_grad():
        for weight in other:
            weight.mul_(1.001)
    for master, (_, right) in zip(found, undisturbed.masters(), strict=True):
        assert torch.equal(master, right)
