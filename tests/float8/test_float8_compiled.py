"""A model that is compiled from the start: its first step is that of an eager one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from fp8 import RECIPES
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mixprec
from mixprec import Precision, formats
from mixprec.float8 import operand
from mixprec.float8.casts.cast import Operand8, cast_scaled
from mixprec.float8.operand import Operand, settle_at
from mixprec.float8.operators import operator
from mixprec.float8.recipe import Cast
from mixprec.formats import E5M2

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler, of torch


class Chain(nn.Module):
    """Layers in a row, so that the gradient of each needs those of all that follow."""

    def __init__(self, depth: int, recomputed: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(depth))
        self.recomputed = recomputed

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            step = lambda x, layer=layer: layer(x).relu()  # noqa: E731
            x = checkpoint(step, x, use_reentrant=False) if self.recomputed else step(x)
        return x


def chain(recipe: str, depth: int = 3, *, recomputed: bool = False, **options: Any) -> Any:
    torch.manual_seed(0)
    model = Chain(depth, recomputed)
    Precision("fp8", recipe=recipe, **options).convert(model, min_dim=64)
    return model


def inputs(num: int = 2) -> list[Tensor]:
    """Micro-batches of different size, the gradients of which E5M2 would flush at 2^0."""
    torch.manual_seed(1)
    return [torch.randn(32, 64).bfloat16() * 4**i for i in range(num)]


def backward(forward: Any, x: Tensor) -> None:
    (forward(x).float().square().sum() * 2.0**-30).backward()


def steps(model: Any, forward: Any, num: int = 2) -> list[list[Tensor]]:
    """The gradients of each step, of two micro-batches each; only the first may compile."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    grads: list[list[Tensor]] = []
    for step in range(num):
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            for x in inputs():
                backward(forward, x)
        grads.append([param.grad.clone() for param in model.parameters()])
        optimizer.step()
        optimizer.zero_grad()
    return grads


def assert_equal_steps(one: list[list[Tensor]], other: list[list[Tensor]]) -> None:
    for mine, yours in zip(one, other, strict=True):
        for a, b in zip(mine, yours, strict=True):
            assert a.any()
            torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("recipe", "depth", "recomputed", "backend"),
    [
        *((recipe, 3, False, "aot_eager") for recipe in RECIPES if recipe != "static"),
        ("adaptive", 1, False, "aot_eager"),
        ("adaptive", 8, True, "aot_eager"),
        ("rowwise", 2, True, "aot_eager"),
        ("adaptive", 3, True, "inductor"),
    ],
)
def test_the_first_step_has_the_gradients_of_an_eager_one(
    recipe: str, depth: int, recomputed: bool, backend: str
) -> None:
    torch._dynamo.reset()
    eager = chain(recipe, depth, recomputed=recomputed)
    model = chain(recipe, depth, recomputed=recomputed)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert_equal_steps(steps(model, compiled), steps(eager, eager))
    assert Precision("fp8").exponents(model) == Precision("fp8").exponents(eager)


_launched: list[torch.dtype] = []


def _launch(
    x: Tensor, format: str, scale: Tensor, counters: Tensor, rows: bool, cols: bool
) -> tuple[Tensor, Tensor, Tensor]:
    _launched.append(x.dtype)
    made = cast_scaled(x, formats.by_name(format), scale, counters, rows=rows, cols=cols)
    nothing = x.new_empty(0, dtype=formats.by_name(format).dtype)
    rows8, cols8 = (nothing if codes is None else codes for codes in (made.rows, made.cols))
    return rows8, cols8, made.row_scale


def _fake(
    x: Tensor, format: str, scale: Tensor, counters: Tensor, rows: bool, cols: bool
) -> tuple[Tensor, Tensor, Tensor]:
    num_rows, num_cols = x.shape
    dtype = formats.by_name(format).dtype
    return (
        x.new_empty((num_rows, num_cols) if rows else (0,), dtype=dtype),
        x.new_empty((num_cols, num_rows) if cols else (0,), dtype=dtype),
        scale.new_empty(1),
    )


_kernel = operator("test_launch", _launch, _fake, mutates=("counters",))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Has compiled code launch casts of adaptive operands, as on a GPU; what it casts, by dtype.

    To a compiler a kernel is what reads and writes certain tensors, and so is an operator.
    """

    def launched(
        plan: Cast, x: Tensor, scale: Tensor, counters: Tensor, rows: bool, cols: bool
    ) -> Operand8:
        if not torch.compiler.is_compiling():
            return cast_scaled(x, plan.format, scale, counters, rows=rows, cols=cols)
        by_row, by_col, factor = _kernel(x, plan.format.name, scale, counters, rows, cols)
        return Operand8(by_row if rows else None, by_col if cols else None, factor, factor)

    monkeypatch.setattr(operand, "has_kernel", lambda device: True)
    monkeypatch.setattr(operand, "cast_as", launched)
    _launched.clear()
    return _launched


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_the_first_step_is_right_where_compiled_code_launches_the_casts(
    backend: str, launches: list[torch.dtype]
) -> None:
    torch._dynamo.reset()
    eager, model = chain("adaptive"), chain("adaptive")
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert_equal_steps(steps(model, compiled), steps(eager, eager))
    assert set(launches) == {torch.bfloat16}


def test_inputs_in_fp32_are_not_launched_in_two_parts(launches: list[torch.dtype]) -> None:
    """Nothing would keep the part that counts nothing behind the fit."""
    torch._dynamo.reset()
    eager, model = (chain("adaptive", params=formats.FP32) for _ in range(2))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = [steps(model, lambda x: compiled(x.float())), steps(eager, lambda x: eager(x.float()))]
    assert_equal_steps(*found)
    assert not launches


def test_a_window_of_an_accumulator_has_the_gradients_of_an_eager_one() -> None:
    torch._dynamo.reset()
    eager, model = chain("adaptive"), chain("adaptive")
    sums: list[list[Tensor]] = []
    for twin, forward in (
        (eager, eager),
        (model, torch.compile(model, backend="aot_eager", fullgraph=True)),
    ):
        optimizer = mixprec.MixedPrecision(torch.optim.SGD(twin.parameters(), lr=0.0))
        accumulator = mixprec.GradientAccumulator(optimizer)
        for i, x in enumerate(inputs()):
            accumulator.backward(forward(x).float().square().sum(), 32, last=i == 1)
        sums.append([param.grad.clone() for param in twin.parameters()])
    for a, b in zip(*sums, strict=True):
        assert a.any() and a.dtype == b.dtype == torch.float32
        # Compiled code rounds each of two gradients to BF16, by 2^-9 of itself at most.
        torch.testing.assert_close(a, b, rtol=2**-8, atol=2**-8 * b.abs().max().item())


def test_a_copy_that_is_compiled_fits_its_own_exponents() -> None:
    torch._dynamo.reset()
    eager, other = chain("adaptive"), chain("adaptive")
    model = copy.deepcopy(other)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    before = Precision("fp8").exponents(other)
    assert_equal_steps(steps(model, compiled), steps(eager, eager))
    assert Precision("fp8").exponents(other) == before


def test_a_weight_that_is_set_after_conversion_is_fitted_when_it_is_cast() -> None:
    torch._dynamo.reset()
    eager, model = chain("adaptive"), chain("adaptive")
    for twin in (eager, model):
        with torch.no_grad():
            for layer in twin.layers:
                layer.weight.mul_(2.0**12)
    compiled = torch.compile(model, backend="inductor", fullgraph=True)
    x = inputs()[0]
    torch.testing.assert_close(compiled(x), eager(x), rtol=0, atol=0)
    assert Precision("fp8").exponents(model) == Precision("fp8").exponents(eager)


# ------------------------------------------------------------------ the operator's part


def adaptive() -> Operand:
    return Operand(Cast(E5M2, "adaptive"), torch.device("cpu"))


def test_an_operand_is_found_by_where_its_multiplier_lies() -> None:
    one, other = adaptive(), adaptive()
    settle_at(torch.full((16, 16), 2.0**-20), other.scale)
    assert other.fitted and not one.fitted
    assert other.scale.tolist() == [2.0**33, 2.0**-33]  # 2^13, two binades below 2^15
    settle_at(torch.ones(16, 16), torch.ones(2))  # nobody's
    before, one.scale = one.scale, torch.ones(2)  # has moved on, as to another device
    settle_at(torch.ones(16, 16), before)  # by now perhaps anybody's
    assert not one.fitted


def test_a_fit_is_no_change_that_a_saved_multiplier_would_be_refused_for() -> None:
    one = adaptive()
    before = one.scale._version
    settle_at(torch.full((16, 16), 2.0**-20), one.scale)
    assert one.fitted and one.scale._version == before


def test_a_settled_exponent_is_not_fitted_again() -> None:
    one = adaptive()
    one.settled = True
    settle_at(torch.full((16, 16), 2.0**-20), one.scale)
    assert one.scale.tolist() == [1.0, 1.0]


def test_a_graph_holds_no_second_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its replays would go on fitting when the exponent is settled."""
    monkeypatch.setattr(operand, "is_capturing", lambda device: True)
    one = adaptive()
    one.settle(torch.full((16, 16), 2.0**-20))
    fitted = one.scale.tolist()
    one.settle(torch.ones(16, 16))
    assert one.scale.tolist() == fitted == [2.0**33, 2.0**-33]


def test_exponents_move_after_a_step_in_compiled_code_as_after_any() -> None:
    model: Any = nn.Sequential(nn.Linear(32, 32, bias=False)).bfloat16()
    Precision("fp8", recipe="adaptive").convert(model, min_dim=16)
    twin = copy.deepcopy(model)
    for layers in (model, twin):
        optimizer = torch.optim.SGD(layers.parameters(), lr=0.1)
        step: Any = optimizer.step
        if layers is model:
            step = torch.compile(lambda step=step: step(), backend="eager")
        for size in (1.0, 64.0, 64.0):
            layers(torch.full((16, 32), size).bfloat16()).sum().backward()
            step()
            optimizer.zero_grad()
    ours, others = (m[0]._float8.operands().values() for m in (model, twin))
    for mine, theirs in zip(ours, others, strict=True):
        assert torch.equal(mine.scale, theirs.scale) and torch.equal(mine.last, theirs.last)
    torch.compiler.reset()
