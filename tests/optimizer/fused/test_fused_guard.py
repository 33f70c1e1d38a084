"""What a fused step keeps from step to step, and what makes it look again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from frozen import difference, frozen
from torch import Tensor, nn
from torch.optim import SGD, AdamW

import mixprec
from mixprec.optimizer.fused import guard
from mixprec.optimizer.fused.guard import Guard
from mixprec.optimizer.fused.judge import DeviceJudge
from mixprec.optimizer.fused.members import Candidates


@pytest.fixture(autouse=True, params=["compiled", "Python"])
def checks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask by torch's own check, and as where there is none."""
    if request.param == "Python":
        monkeypatch.setattr(guard, "_compiled", lambda tensors: None)  # pyright: ignore[reportUnknownLambdaType, reportUnknownArgumentType]
    elif request.param == "compiled" and guard._compiled([torch.ones(1)]) is None:
        pytest.skip("this version of torch has no TensorGuards")


# ---------------------------------------- the guard

OTHERWISE: dict[str, Callable[[Tensor], Any]] = {
    "dtype": lambda t: t.double(),
    "dtype of the same size": lambda t: t.view(torch.int32),
    "device": lambda t: t.to("meta"),
    "shape": lambda t: t[:3],
    "dimensions": lambda t: t.flatten(),
    "strides": lambda t: t.T,
    "layout": lambda t: t.to_sparse(),
    "type": lambda t: nn.Parameter(t),
    "nothing": lambda t: None,
}


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("change", OTHERWISE)
def test_a_tensor_that_looks_otherwise_is_noticed(change: str, place: int) -> None:
    tensors: list[Any] = [torch.ones(4, 4) for _ in range(3)]
    guard = Guard(tensors)
    assert guard.holds([torch.zeros(4, 4) for _ in range(3)])
    tensors[place] = OTHERWISE[change](tensors[place])
    assert not guard.holds(tensors)


def test_a_guard_on_tensors_of_every_size_and_on_none() -> None:
    tensors = [torch.ones(()), torch.ones(0, 3), torch.ones(2, 3, 4).transpose(0, 2)]
    assert Guard(tensors).holds([t.clone() for t in tensors])
    assert not Guard(tensors).holds([*tensors[:1], torch.ones(3, 0), tensors[2]])
    assert not Guard(tensors).holds(tensors[:2])
    assert Guard([]).holds([]) and not Guard([]).holds(tensors)


# ---------------------------------------- who steps


def test_the_same_kind_is_given_for_as_long_as_gradients_look_the_same() -> None:
    params = [nn.Parameter(torch.ones(4, 4)) for _ in range(3)]
    candidates = Candidates([[*params]], [(0, p) for p in params], deferred=False)
    kinds: list[object] = []

    def steps(*grads: Tensor | None) -> int:
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        members, rest = candidates.stepping([[*params]])
        present = [p for p in params if p.grad is not None]
        dense = [p for p in present if p.grad is not None and not p.grad.is_sparse]
        assert list(map(id, members.params)) == list(map(id, dense))
        assert [id(g) for g in members.grads] == [id(p.grad) for p in dense]
        sparse = [p for p in present if not any(p is other for other in dense)]
        assert list(map(id, rest[0])) == list(map(id, sparse))
        if members.kind not in kinds:
            kinds.append(members.kind)
        return kinds.index(members.kind)

    def grad() -> Tensor:
        return torch.ones(4, 4)

    assert steps(grad(), grad(), grad()) == 0
    assert steps(grad(), grad(), grad()) == 0
    assert steps(grad(), grad().T, grad()) == 1
    assert steps(grad(), None, grad()) == 2
    assert steps(grad(), None, grad()) == 2
    assert steps(grad(), grad().to_sparse(), grad()) == 3
    assert steps(grad(), grad().to_sparse(), grad()) == 3
    assert steps(grad(), None, grad()) == 4
    assert steps(None, None, None) == 5
    assert steps(None, None, None) == 5
    assert steps(None, grad(), None) == 6


def test_gradients_that_look_the_same_are_not_looked_at_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    judge, looks = DeviceJudge(), 0

    def reads(grads: Any) -> bool:
        nonlocal looks
        looks += 1
        return False

    monkeypatch.setattr(judge, "_reads", reads)
    for kind in (1, 1, 2, 2, None, None, 2):
        assert not judge.takes([torch.ones(2)], kind)
    assert looks == 5


# ---------------------------------------- whole steps


def params() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(6, 6), (8, 4), (5,), (1,)]
    return [nn.Parameter(torch.randn(s, generator=generator).bfloat16()) for s in shapes]


def transpose(weight: Any, state: Any) -> None:
    weight.data = weight.data.T


def move(weight: Any, state: Any) -> None:
    weight.data = weight.data.clone()


def turn_its_gradient(weight: Any, state: Any) -> None:
    weight.grad = weight.grad.T.contiguous().T


def widen_its_gradient(weight: Any, state: Any) -> None:
    grad, weight.grad = weight.grad.float(), None
    weight.grad_dtype = torch.float32
    weight.grad = grad


def make_its_gradient_sparse(weight: Any, state: Any) -> None:
    weight.grad = weight.grad.to_sparse()


def drop_its_gradient(weight: Any, state: Any) -> None:
    weight.grad = None


def swap_its_states(weight: Any, state: Any) -> None:
    state[weight].update({k: v.clone() for k, v in state[weight].items()})


def move_its_states(weight: Any, state: Any) -> None:
    for value in state[weight].values():
        value.data = value.data.clone()  # as they are sent to the host and back


def swap_its_entry(weight: Any, state: Any) -> None:
    state[weight] = dict(state[weight])


TURNING = (transpose, turn_its_gradient)

EDITS = (
    *(*TURNING, move, widen_its_gradient, make_its_gradient_sparse),
    *(drop_its_gradient, swap_its_states, move_its_states, swap_its_entry),
)


@pytest.mark.filterwarnings("ignore:.* written outside of step")
@pytest.mark.parametrize("masters", ["split", "full"])
@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
@pytest.mark.parametrize("place", [0, 3])
def test_what_is_changed_between_two_steps_is_noticed(edit: Any, place: int, masters: Any) -> None:
    def steps(fused: bool) -> list[Any]:
        rule = SGD if edit is make_its_gradient_sparse else AdamW
        weights = params()
        optimizer = mixprec.MixedPrecision(rule(weights, lr=0.1), masters=masters, fused=fused)
        for step in range(8):
            generator = torch.Generator().manual_seed(100 + step)
            for p in weights:
                grad = torch.randn(p.shape, generator=generator).bfloat16()
                p.grad = grad.to(getattr(p, "grad_dtype", None) or p.dtype)
            if step in (2, 5):
                edit(weights[0 if edit in TURNING else place], optimizer.state)
            optimizer.step()
        masters_now = [master for _, master in optimizer.masters()]
        return frozen([optimizer.state_dict(), masters_now, [p.detach() for p in weights]])

    assert difference(steps(False), steps(True)) == ""


@pytest.mark.parametrize("place", [0, 3])
@pytest.mark.parametrize("edit", [move, swap_its_states, move_its_states, swap_its_entry])
def test_a_plan_is_made_anew_where_something_has_moved_and_else_not(edit: Any, place: int) -> None:
    weights = params()
    optimizer = mixprec.MixedPrecision(AdamW(weights), fused=True)
    plans: list[Any] = []
    for step in range(5):
        for p in weights:
            p.grad = torch.ones_like(p)
        if step == 3:
            edit(weights[place], optimizer.state)
        optimizer.step()
        plans.append(optimizer._fused._plan)
    assert plans[1] is plans[2] and plans[2] is not plans[3] and plans[3] is plans[4]


def test_a_launch_reads_gradients_of_the_dtype_that_they_have() -> None:
    weight = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    optimizer = mixprec.MixedPrecision(SGD([weight], lr=0.1), fused=True)
    for dtype in (torch.bfloat16, torch.float32, torch.bfloat16):
        weight.grad = None
        weight.grad_dtype = dtype
        weight.grad = torch.ones(4, 4, dtype=dtype)
        optimizer.step()
        plan = optimizer._fused._plan
        assert plan is not None and [batch.layout.grad for batch in plan.batches] == [dtype]


_dynamo: Any = getattr(torch._C, "_dynamo", None)


@pytest.mark.skipif(
    not hasattr(getattr(_dynamo, "guards", None), "TensorGuards"),
    reason="this version of torch has no TensorGuards",
)
@pytest.mark.parametrize("checks", ["as it is"], indirect=True)
def test_torchs_own_check_is_asked_where_there_is_one() -> None:
    assert guard._compiled([torch.ones(2, 3), torch.ones(())]) is not None
