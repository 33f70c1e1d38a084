"""Steps inside of torch's modes: the rule runs as in a fresh process, user code as it was."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adafactor, AdamW

import mixprec
from mixprec.caller_modes import plain_modes

GROWTH = torch.tensor([[1.0, 2.0**-10], [0.0, 1.0]])
"""Its products need more than the 8 bits of BF16."""


class Multiplies(torch.optim.Optimizer):
    """A rule with a product of matrices, a count in a new tensor, and modes."""

    def __init__(self, params: Any, lr: float = 0.125) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["count"] = torch.ones(())
                    state["sum"] = torch.zeros_like(p)
                state["count"] += 1 / 512
                state["sum"].copy_(state["sum"] @ GROWTH + p.grad)
                p.sub_(torch.mm(p.grad, GROWTH) * state["count"] + state["sum"], alpha=group["lr"])

    @torch.no_grad()
    def eval(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.copy_(torch.mm(p, GROWTH))


@contextmanager
def default_dtype(dtype: torch.dtype) -> Generator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic() -> Generator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast to BF16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast to FP16": lambda: torch.autocast("cpu", torch.float16),
    "autocast of another device": lambda: torch.autocast("mtia", torch.bfloat16),
    "default dtype BF16": lambda: default_dtype(torch.bfloat16),
    "default dtype FP16": lambda: default_dtype(torch.float16),
    "default device": lambda: torch.device("meta"),
    "inference": torch.inference_mode,
    "no grad": torch.no_grad,
    "deterministic": deterministic,
}
RULES: dict[str, Any] = {
    "products": Multiplies,
    "Adafactor": lambda ps: Adafactor(ps, lr=0.125),
    "AdamW": lambda ps: AdamW(ps, lr=0.125),
}


def run(rule: Any, mode: Any, dtype: torch.dtype, **options: Any) -> tuple[Any, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(2, 2, generator=generator, device="cpu").to(dtype))
    optimizer = mixprec.MixedPrecision(rule([weight]), **options)
    for _ in range(4):
        weight.grad = torch.randn(2, 2, generator=generator, device="cpu").to(dtype)
        with mode():
            optimizer.step()
            if hasattr(optimizer.inner, "eval"):
                optimizer.eval()
    state = [v for v in optimizer.state[weight].values() if isinstance(v, Tensor)]
    assert not any(value.is_inference() for value in state)
    return optimizer, [*(m.clone() for _, m in optimizer.masters()), *map(torch.clone, state)]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("mode", MODES)
def test_a_step_is_the_same_in_every_mode(
    mode: str, rule: str, dtype: torch.dtype, fused: bool
) -> None:
    if fused and rule != "AdamW":
        return  # products of matrices are not fused
    _, right = run(RULES[rule], torch.enable_grad, dtype, fused=fused)
    _, inside = run(RULES[rule], MODES[mode], dtype, fused=fused)
    torch.testing.assert_close(inside, right, rtol=0, atol=0)


@pytest.mark.parametrize("mode", MODES)
def test_state_is_made_the_same_in_every_mode(mode: str) -> None:
    found: list[Any] = []
    for around in (torch.enable_grad, MODES[mode]):
        weight = nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))
        optimizer = mixprec.MixedPrecision(Multiplies([weight]))
        with around():
            optimizer.init_state()
        found.append({k: v for k, v in optimizer.state[weight].items() if k != "master"})
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_fp64_as_the_default_is_left_to_rules_that_look_at_it() -> None:
    weight = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = mixprec.MixedPrecision(AdamW([weight], lr=0.125))
    weight.grad = torch.ones_like(weight)
    with default_dtype(torch.float64):
        optimizer.step()
    assert optimizer.state[weight]["step"].dtype == torch.float64


@pytest.mark.parametrize("rule", [LBFGS, SGD])
def test_closures_and_hooks_run_in_the_modes_of_the_caller(rule: Any) -> None:
    seen: list[Any] = []

    def look(*_: Any) -> None:
        on = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        seen.append((*on, torch.get_default_dtype(), torch.empty(0).device.type))

    weight = nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))
    optimizer = mixprec.MixedPrecision(rule([weight], lr=0.125))
    optimizer.register_step_pre_hook(look)
    optimizer.register_step_post_hook(look)

    def closure() -> float:
        look()
        weight.grad = torch.ones_like(weight)
        return 1.0

    with torch.autocast("cpu", torch.float16), default_dtype(torch.bfloat16), torch.device("meta"):
        optimizer.step(closure)
        look()
        with plain_modes():
            assert not torch.is_autocast_enabled("cpu") and torch.empty(0).dtype == torch.float32
            assert torch.empty(0).device.type == "cpu"
        look()
    assert len(seen) >= 5
    assert set(seen) == {(True, torch.float16, torch.bfloat16, "meta")}
    assert not torch.is_autocast_enabled("cpu") and torch.get_default_dtype() == torch.float32


def test_autocast_computes_with_the_weights_that_the_step_has_written() -> None:
    """Autocast keeps its 16-bit copies of FP32 weights until its region ends."""
    layer, x = nn.Linear(2, 2, bias=False), torch.ones(1, 2)
    optimizer = mixprec.MixedPrecision(SGD(layer.parameters(), lr=0.5))
    with torch.autocast("cpu", torch.bfloat16):
        layer(x).sum().backward()
        optimizer.step()
        inside = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(inside, layer(x))


def test_modes_are_put_back_behind_an_error() -> None:
    weight = nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))
    optimizer = mixprec.MixedPrecision(SGD([weight], lr=0.125))

    def fails() -> float:
        raise KeyError("closure")

    with torch.autocast("cpu", torch.bfloat16), pytest.raises(KeyError):
        optimizer.step(fails)
    assert not torch.is_autocast_enabled("cpu")
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(KeyError):
        try:
            optimizer.step(fails)
        finally:
            assert torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hooks_run_once_around_a_step_that_the_compiler_has_wrapped(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it wraps LBFGS's and SparseAdam's once it is used, for the rest of the process."""
    param = nn.Parameter(torch.ones(3, dtype=dtype))
    optimizer = mixprec.MixedPrecision(torch.optim.LBFGS([param], lr=0.125))
    wrapped: Any = torch.compiler.disable(torch.optim.LBFGS.step)
    monkeypatch.setattr(torch.optim.LBFGS, "step", wrapped)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure() -> float:
        optimizer.zero_grad()
        loss = param.float().square().sum()
        loss.backward()
        return loss.item()

    optimizer.step(closure)
    assert calls == ["before", "after"]


def test_a_compiled_caller_steps_as_it_is() -> None:
    weight = nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))
    optimizer = mixprec.MixedPrecision(Multiplies([weight]))
    weight.grad = torch.ones_like(weight)

    @torch.compile(backend="eager")
    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            optimizer.step()

    step()
    right = mixprec.MixedPrecision(Multiplies([other := nn.Parameter(torch.ones(2, 2).bfloat16())]))
    other.grad = torch.ones_like(other)
    right.step()
    (_, left), (_, expected) = next(optimizer.masters()), next(right.masters())
    assert torch.equal(left, expected)
