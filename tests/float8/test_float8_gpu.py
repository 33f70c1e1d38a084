"""FP8 layers on a GPU: the bytes of the CPU, products near those of FP64, and no waiting."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fp8 import RECIPES, run
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from waiting import no_waiting

import mixprec
from mixprec import Precision
from mixprec.float8 import Recipe, has_units
from mixprec.float8 import operand as operand_module
from mixprec.float8 import weight as weight_module

pytestmark = pytest.mark.gpu

FORMATS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@pytest.fixture
def cuda() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if not has_units(torch.device("cuda", 0)):
        pytest.skip("needs FP8 units, sm_89 or later")
    return torch.device("cuda", 0)


def model_on(device: torch.device, recipe: str | Recipe, dtype: torch.dtype, bias: bool) -> Any:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(64, 48, bias))
    with torch.no_grad():
        model[0].weight.normal_()
    precision = Precision.parse(f"params={FORMATS[dtype]}")
    precision.convert(model)
    named = Precision("fp8", recipe=recipe, params=precision.params)
    named.convert(model, min_dim=16)
    return model.to(device)


def exact(model: Any, x: Tensor, dy: Tensor) -> list[Tensor]:
    held = [t.detach().cpu().double().requires_grad_() for t in (x, *model.parameters())]
    y = F.linear(held[0], held[1], *held[2:])
    y.backward(dy.cpu().double())
    return [y.detach(), *(t.grad for t in held if t.grad is not None)]


def snr(got: Tensor, expected: Tensor) -> float:
    error = got.cpu().double() - expected
    return 10 * torch.log10(expected.square().sum() / error.square().sum()).item()


@pytest.mark.parametrize("tokens", [1, 17, 160])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", list(FORMATS))
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_layer_agrees_with_the_cpu_and_with_fp64(
    cuda: torch.device, recipe: str, dtype: torch.dtype, bias: bool, tokens: int
) -> None:
    here, there = (model_on(d, recipe, dtype, bias) for d in (torch.device("cpu"), cuda))
    x, dy = torch.randn(tokens, 64).to(dtype), torch.randn(tokens, 48).to(dtype)
    on_cpu, on_gpu = run(here, x, dy), run(there, x.to(cuda), dy.to(cuda))
    least = (28, 28, 28, 40) if recipe == "rowwise" else (28, 24, 24, 40)
    for cpu, gpu, true, db in zip(on_cpu, on_gpu, exact(here, x, dy), least, strict=False):
        assert gpu.dtype == cpu.dtype
        if tokens > 100:
            assert snr(gpu, true) > db
        # Products of the same bytes: sums differ in their order, and forward in 13 bits of each
        # addend; then one rounding to the dtype.
        scale = true.abs().max().item()
        torch.testing.assert_close(gpu.cpu(), cpu, rtol=2**-7, atol=2**-10 * scale)
    for name, operand in here[0]._float8.operands().items():
        twin = there[0]._float8.operands()[name]
        assert operand.counters.tolist() == twin.counters.tolist(), name
        assert operand.scale.tolist() == twin.scale.tolist(), name
    if recipe == "adaptive":
        held = [m[0]._float8.weight.held for m in (here, there)]
        for a, b in zip(*held, strict=True):
            assert torch.equal(a.cpu().view(torch.uint8), b.cpu().view(torch.uint8))


@pytest.mark.filterwarnings("ignore:gradients are not finite")  # one step later, if at all
@pytest.mark.filterwarnings("ignore:.* is infinite in 1 of")  # the weight, where it is that
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("place", ["input", "weight", "grad_output"])
def test_a_non_finite_operand_reaches_the_verdict(
    cuda: torch.device, recipe: str, place: str
) -> None:
    model = model_on(cuda, recipe, torch.bfloat16, True)
    optimizer = mixprec.MixedPrecision(torch.optim.AdamW(model.parameters(), lr=1.0))
    x, dy = (torch.randn(32, n, device=cuda).bfloat16() for n in (64, 48))
    with torch.no_grad():
        {"input": x, "weight": model[0].weight, "grad_output": dy}[place][3, 5] = float("inf")
    y = run(model, x, dy)[0]
    if place != "grad_output":
        assert y.isnan().any()
        run(model, x, torch.where(y.isnan(), y, dy))
    optimizer.step()
    assert not optimizer.grads_finite


def test_autograd_is_told_of_what_a_kernel_writes(cuda: torch.device) -> None:
    model = model_on(cuda, "static", torch.bfloat16, False)
    x = torch.randn(32, 64, device=cuda).bfloat16().requires_grad_()
    y = model(x)
    with torch.no_grad():
        model[0].weight.mul_(2)
    model(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_step_waits_for_nothing(cuda: torch.device, recipe: str) -> None:
    model = model_on(cuda, recipe, torch.bfloat16, True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    x, dy = (torch.randn(32, n, device=cuda).bfloat16() for n in (64, 48))
    for _ in range(2):
        run(model, x, dy)
        optimizer.step()
    with no_waiting():
        for _ in range(3):
            run(model, x, dy)
            optimizer.step()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_captured_step_replays_with_new_weights_and_exponents(
    cuda: torch.device, recipe: str
) -> None:
    model = model_on(cuda, recipe, torch.bfloat16, False)
    twin = copy.deepcopy(model)
    x, dy = (torch.randn(32, n, device=cuda).bfloat16() for n in (64, 48))
    inputs = [x * 4**i for i in range(6)]

    def step(model: Any, optimizer: Any, x: Tensor) -> None:
        optimizer.zero_grad()
        model(x).backward(dy)
        optimizer.step()

    makes = [torch.optim.SGD(m.parameters(), lr=2**-6) for m in (model, twin)]
    static_x = inputs[0].clone()
    for optimizer, m in zip(makes, (model, twin), strict=True):
        for _ in range(3):
            step(m, optimizer, static_x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(model, makes[0], static_x)
    for x in inputs:
        static_x.copy_(x)
        graph.replay()
        step(twin, makes[1], x)
        assert torch.equal(model[0].weight, twin[0].weight)
        for name, operand in model[0]._float8.operands().items():
            assert torch.equal(operand.scale, twin[0]._float8.operands()[name].scale), name
        with torch.no_grad():  # an evaluation in between, which no counter tells of the replays
            assert torch.equal(model(x), twin(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler, of torch itself
@pytest.mark.parametrize("inline", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
def test_compiled_layers_have_the_bits_of_eager_ones(
    cuda: torch.device, recipe: str, inline: bool
) -> None:
    if inline and recipe != "static":
        pytest.skip("only static casts are inlined")
    torch._dynamo.reset()
    model = model_on(cuda, Recipe(inline=True) if inline else recipe, torch.bfloat16, True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    x, dy = (torch.randn(37, n, device=cuda).bfloat16() for n in (64, 48))
    run(model, x, dy)
    optimizer.step()
    eager = run(model, x, dy)
    optimizer.step()
    compiled = torch.compile(model, fullgraph=True)
    for a, b in zip(run(compiled, x, dy), eager, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler, of torch itself
def test_a_model_that_was_moved_compiles_before_it_has_run(cuda: torch.device) -> None:
    torch._dynamo.reset()
    model = model_on(cuda, "static", torch.bfloat16, True)
    twin = copy.deepcopy(model)
    x, dy = (torch.randn(32, n, device=cuda).bfloat16() for n in (64, 48))
    compiled = run(torch.compile(model, fullgraph=True), x, dy)
    for a, b in zip(compiled, run(twin, x, dy), strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler, of torch itself
@pytest.mark.parametrize("recipe", RECIPES)
def test_compiled_checkpoints_recompute_the_same_bytes_and_no_weight(
    cuda: torch.device, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)

    class Checkpointed(nn.Sequential):
        def forward(self, input: Tensor) -> Any:
            return checkpoint(super().forward, input, use_reentrant=False)

    model: Any = Checkpointed(nn.Linear(64, 48, bias=False), nn.Linear(48, 64, bias=False))
    Precision("fp8", recipe=recipe).convert(model.to(cuda), min_dim=16)
    twin = copy.deepcopy(model)
    x, dy = (torch.randn(32, 64, device=cuda).bfloat16() for _ in range(2))
    optimizers = [torch.optim.SGD(m.parameters(), lr=2**-6) for m in (model, twin)]
    for m, optimizer in zip((model, twin), optimizers, strict=True):  # which settles exponents
        run(m, x, dy)
        optimizer.step()
    casts: list[str] = []

    def counted(name: str, cast: Any) -> Any:
        def counting(*args: Any, **options: Any) -> Any:
            casts.append(name)
            return cast(*args, **options)

        return counting

    for name in ("cast_scaled", "cast_as"):
        monkeypatch.setattr(weight_module, name, counted(name, getattr(weight_module, name)))
    compiled = torch.compile(model, fullgraph=True)

    def summed(model: Any) -> list[Tensor | None]:
        leaf = x.detach().requires_grad_()
        y = model(leaf)
        y.backward(dy)
        return [y.detach(), leaf.grad, *(param.grad for param in model.parameters())]

    for _ in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        for _ in range(2):
            for a, b in zip(summed(compiled), summed(twin), strict=True):
                assert a is not None and b is not None and torch.equal(a, b)
        assert len(casts) == len(model) + len(twin)
        casts.clear()
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler, of torch itself
@pytest.mark.parametrize("recipe", ["tensorwise"])  # "adaptive" settles, which has `x` in memory
def test_compiled_code_allocates_bytes_no_earlier_than_it_writes_them(
    cuda: torch.device, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up, self.down = (
                nn.Linear(*sizes, bias=False) for sizes in ((256, 1024), (256, 1024), (1024, 256))
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.silu(self.gate(x)) * self.up(x))

    def peak() -> int:
        torch._dynamo.reset()
        model = Mlp().to(cuda)
        Precision("fp8", recipe=recipe).convert(model, min_dim=16)
        compiled = torch.compile(model, fullgraph=True, dynamic=False)
        x = torch.randn(4096, 256, device=cuda).bfloat16()
        for _ in range(2):
            run(compiled, x, x)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(compiled, x, x)
        return torch.cuda.max_memory_allocated() - before

    marked = peak()
    monkeypatch.setattr(operand_module, "written", lambda x: x)
    assert marked < peak()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler, of torch itself
# Torch's own, of the empty graph by which it holds its memory.
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
@pytest.mark.parametrize("recipe", RECIPES)
def test_graphs_of_the_compiler_follow_weights_and_exponents(
    cuda: torch.device, recipe: str
) -> None:
    torch._dynamo.reset()
    model = model_on(cuda, recipe, torch.bfloat16, True)
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=2**-6) for m in (model, twin)]
    compiled = torch.compile(model, mode="reduce-overhead")
    dy = torch.randn(32, 48, device=cuda).bfloat16()
    for m, optimizer in zip((model, twin), optimizers, strict=True):  # which settles exponents
        run(m, torch.ones(32, 64, device=cuda).bfloat16(), dy)
        optimizer.step()
    for step in range(6):
        x = torch.randn(32, 64, device=cuda).bfloat16() * 4**step
        torch.compiler.cudagraph_mark_step_begin()
        for a, b in zip(run(compiled, x, dy), run(twin, x, dy), strict=True):
            assert torch.equal(a, b)
        for name, operand in model[0]._float8.operands().items():
            other = twin[0]._float8.operands()[name]
            if name != "weight":  # a replay casts it, whether it has changed or not
                assert torch.equal(operand.counters, other.counters), name
        for optimizer in optimizers:
            optimizer.step()
        for name, operand in model[0]._float8.operands().items():
            assert torch.equal(operand.scale, twin[0]._float8.operands()[name].scale), name


def test_a_large_model_keeps_two_bytes_a_weight_and_one_a_saved_input(cuda: torch.device) -> None:
    width, tokens = 2048, 4096
    with torch.no_grad():  # the workspace of the products
        warm = model_on(cuda, "static", torch.bfloat16, False)
        warm(torch.ones(16, 64, device=cuda).bfloat16())
    model = nn.Sequential(nn.Linear(width, width, bias=False)).to(cuda).bfloat16()
    before = torch.cuda.memory_allocated()
    Precision("fp8", recipe="static").convert(model)
    converted = torch.cuda.memory_allocated() - before
    assert abs(converted - 2 * width * width) < 2**16
    x = torch.randn(tokens, width, device=cuda).bfloat16()
    before = torch.cuda.memory_allocated()
    y = model(x)
    saved = torch.cuda.memory_allocated() - before - y.nbytes
    # The transpose for the weight gradient; the last cast's rows are kept for a sibling.
    assert abs(saved - 2 * tokens * width) < 2**16


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler, of torch itself
@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_compiled_first_step_has_the_gradients_of_an_eager_one(
    cuda: torch.device, recipe: str, recomputed: bool
) -> None:
    def grads(compiled: bool) -> list[Tensor]:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
        Precision("fp8", recipe=recipe).convert(model, min_dim=16)
        model.to(cuda)  # what casts hold moves along, and must be found there

        def forward(x: Tensor) -> Tensor:
            for layer in model:
                x = checkpoint(layer, x, use_reentrant=False) if recomputed else layer(x)
            return x

        run = torch.compile(forward, fullgraph=True) if compiled else forward
        x = torch.randn(32, 64, generator=torch.Generator().manual_seed(1)).bfloat16().to(cuda)
        small = 1.0 if recipe == "static" else 2.0**-30  # which E5M2 itself has not
        (run(x).float().square().sum() * small).backward()
        return [param.grad for param in model.parameters() if param.grad is not None]

    for a, b in zip(grads(True), grads(False), strict=True):
        assert a.any() and torch.equal(a, b)
