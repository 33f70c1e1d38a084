"""A rule may keep a gradient, or a parameter's values, as they are: `state["last"] = p.grad`."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import mixprec
from mixprec.optimizer import MixedPrecision


class Keeps(Optimizer):
    """Remembers something of each step without a copy of its own, and uses it in the next."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.sub_(self.update(self.state[param], param), alpha=group["lr"])
                    self.keep(self.state[param], param)

    def update(self, state: dict[str, Any], param: Tensor) -> Tensor:
        assert param.grad is not None
        return param.grad * 2 - state.get("last", param.grad)

    def keep(self, state: dict[str, Any], param: Tensor) -> None:
        state["last"] = param.grad


class KeepsParts(Keeps):
    """Keeps a view of the gradient, of another shape and order."""

    def update(self, state: dict[str, Any], param: Tensor) -> Tensor:
        assert param.grad is not None
        last = state.get("last")
        return param.grad if last is None else param.grad - last.T.view(param.shape)

    def keep(self, state: dict[str, Any], param: Tensor) -> None:
        assert param.grad is not None
        state["last"] = param.grad.view(1, -1).T


class KeepsValues(Keeps):
    """Keeps the parameter as it was after the step."""

    def update(self, state: dict[str, Any], param: Tensor) -> Tensor:
        assert param.grad is not None
        return param.grad + 0.5 * state.get("last", param.detach())

    def keep(self, state: dict[str, Any], param: Tensor) -> None:
        state["last"] = param.detach()


class KeepsSome(Keeps):
    """Keeps gradients in a list."""

    def update(self, state: dict[str, Any], param: Tensor) -> Tensor:
        assert param.grad is not None
        return sum(state.get("some", []), param.grad)

    def keep(self, state: dict[str, Any], param: Tensor) -> None:
        state.setdefault("some", []).append(param.grad)
        del state["some"][:-2]


class Memory:
    last: Tensor | None = None


class KeepsElsewhere(Keeps):
    """Keeps gradients in an object that only the rule knows how to read."""

    def update(self, state: dict[str, Any], param: Tensor) -> Tensor:
        assert param.grad is not None
        last = state.setdefault("memory", Memory()).last
        return param.grad if last is None else param.grad * 2 - last

    def keep(self, state: dict[str, Any], param: Tensor) -> None:
        state["memory"].last = param.grad


SHAPES: list[tuple[int, ...]] = [(5,), (3, 4), (7,), ()]
STORED: list[tuple[torch.dtype, Any]] = [
    (torch.bfloat16, "split"),
    (torch.bfloat16, "full"),
    (torch.float16, "full"),
]


@pytest.mark.parametrize("bucket_numel", [8, None], ids=["buckets", "one"])
@pytest.mark.parametrize(("dtype", "masters"), STORED, ids=str)
@pytest.mark.parametrize("rule", [Keeps, KeepsParts, KeepsValues, KeepsSome, KeepsElsewhere])
def test_what_a_rule_keeps_is_overwritten_by_nobody(
    rule: Any, dtype: torch.dtype, masters: Any, bucket_numel: int | None
) -> None:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
    expected = [nn.Parameter(value.float()) for value in values]
    params = [nn.Parameter(value.clone()) for value in values]
    bare = rule(expected)
    optimizer = MixedPrecision(rule(params), masters=masters, bucket_numel=bucket_numel)
    for _ in range(4):
        for right, param in zip(expected, params, strict=True):
            grad = torch.randn(param.shape, generator=generator).to(dtype)
            right.grad, param.grad = grad.float(), grad
        bare.step()
        optimizer.step()
        optimizer.zero_grad()
        found = dict(optimizer.masters())
        for right, param in zip(expected, params, strict=True):
            assert torch.equal(right, found[param])


def test_a_kept_gradient_is_saved_alone() -> None:
    params = [nn.Parameter(torch.ones(size, dtype=torch.bfloat16)) for size in (3, 10_000)]
    optimizer = mixprec.MixedPrecision(Keeps(params))
    params[0].grad = torch.ones_like(params[0])
    params[1].grad = torch.zeros_like(params[1])
    optimizer.step()
    last = optimizer.state[params[0]]["last"]
    assert isinstance(last, Tensor) and last.untyped_storage().nbytes() == 3 * 4
    file = io.BytesIO()
    torch.save(last, file)
    assert file.tell() < 10_000
