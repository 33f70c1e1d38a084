"""FP8 on one CUDA device beside its peers: casts, linear layers, a decoder block, and the errors.

    python docs/benchmarks/float8_gpu.py [--only cast linear small depth ...] [--out FILE [--add]]

    cast            the cast kernels, beside torch.compile of the same expression
    linear          forward and backward of one layer at 16384 tokens, and at 8192^3
    small           the same at 4096 tokens, where the host is slow: eager, compiled, CUDA graph
    depth           8 layers in a row at 4096 tokens, where the host works ahead of the device: a
                    pass after a step, and a later micro-batch
    micro           a step of 8 micro-batches between two changes of the weight
    block           a Llama-8B-shaped block with its optimizer step: time and peak memory
    accumulation    what the short register of the tensor cores loses on sums of one sign
    sqnr            signal over error of the three products, by size of values and kind of outliers

A pass is one after a step, whose weight has just been written and has no gradient, unless it says
"weight unchanged" or "micro-batch": then it is a later one of the same step, whose gradients are
added to those that are there, by every way alike. An FP8 weight is cast once a step, in the first.

Every way runs once a round, in another order each, so that a clock which moves with the chip's
power moves for all of them; medians of the rounds, by CUDA events. All inputs are random: products
of zeros run faster.
Every way is also compared with BF16, or with FP64, in the same run, and one that is wrong is named
and left out.
`--quick` takes small shapes and runs on a CPU, without what needs a GPU, to try the script itself.

torchao (0.18) is optional, and named if absent. Compiling takes most of the time: after `--seconds`
no more is compiled, and what is left out is named. All sections take some four minutes on an H200.
`--add` puts what is measured now in the place of the same in the file, and keeps the rest.
"""

from __future__ import annotations

import argparse
import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from record import runs_of, save
from torch import Tensor, nn

import mixprec
from mixprec.float8.casts.cast import cast_rowwise, cast_scaled, cast_tensorwise
from mixprec.float8.casts.counters import NUM_COUNTERS
from mixprec.formats import E4M3, E5M2

BF16 = torch.bfloat16
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
RECIPES = ("static", "adaptive", "tensorwise", "rowwise")
PEERS = ("tensorwise", "rowwise")
Work = Callable[[], Any]


@dataclass
class Run:
    """Settings of a run, and what it has found."""

    quick: bool = False
    rounds: int = 7
    began: float = field(default_factory=time.time)
    deadline: float = math.inf
    numbers: dict[str, Any] = field(default_factory=dict)
    """What goes into the file, by section and shape."""
    bars: list[str] = field(default_factory=list)

    def may_compile(self, name: str) -> bool:
        if CUDA and time.time() > self.deadline:
            print(f"(left out, out of time: {name})")
        return CUDA and time.time() <= self.deadline


RUN = Run()


# ------------------------------------------------------------------ time


def timed(work: Work, calls: int, ahead: bool) -> float:
    """Milliseconds of a call, of several back to back."""
    if not CUDA:
        start = time.perf_counter()
        for _ in range(calls):
            work()
        return 1e3 * (time.perf_counter() - start) / calls
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if ahead:
        torch.cuda._sleep(2_000_000)
    start.record()
    for _ in range(calls):
        work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / calls


def interleaved(ways: dict[str, Work], calls: int = 4, *, ahead: bool = True) -> dict[str, float]:
    """Median milliseconds of each way; a way that fails is named and left out.

    `ahead` keeps the device busy for a millisecond first, as it is within a training step; without
    it, what the host is too slow for counts from the first call.
    """
    times: dict[str, list[float]] = {}
    for name, work in ways.items():
        try:
            for _ in range(3):
                work()
            times[name] = []
        except Exception as error:
            print(f"({name} failed: {said(error)})")
        synchronize()
    order = random.Random(0)
    for _ in range(1 if RUN.quick else RUN.rounds):
        for name in order.sample(list(times), len(times)):  # who runs after whom matters
            times[name].append(timed(ways[name], 1 if RUN.quick else calls, ahead))
    return {name: statistics.median(found) for name, found in times.items()}


def host_us(work: Work, calls: int = 20) -> float:
    """Microseconds that the host spends on a call while the device is busy with something else."""
    synchronize()
    if CUDA:
        torch.cuda._sleep(20_000_000)
    start = time.perf_counter()
    for _ in range(calls):
        work()
    spent = 1e6 * (time.perf_counter() - start) / calls
    synchronize()
    return spent


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def clean() -> None:
    gc.collect()
    if CUDA:
        torch.compiler.reset()
        torch.cuda.empty_cache()


def said(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:110]}"


def table(title: str, header: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    header = list(header)
    print(f"\n{title}\n\n| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |")
    print(f"\n({time.time() - RUN.began:.0f} s so far)", flush=True)


def bar(what: str, value: float, least: float) -> None:
    RUN.bars.append(
        f"{'met' if value >= least else 'MISSED'}: {what}, at least {least}: {value:.3f}"
    )


def randn(*shape: int, dtype: torch.dtype = BF16, seed: int = 0) -> Tensor:
    g = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(*shape, generator=g, device=DEVICE).to(dtype)


# ------------------------------------------------------------------ casts


def cast_ways(x: list[Tensor]) -> dict[str, Work]:
    """Ways to cast the next of several matrices."""
    scale = torch.tensor([2.0, 0.5], device=DEVICE)
    counters = torch.zeros(NUM_COUNTERS, dtype=torch.int64, device=DEVICE)
    turn = iter(x * 1_000_000)

    def over(f: Callable[..., Any], *args: Any, **options: Any) -> Work:
        return lambda: f(next(turn), *args, **options)

    def plainly(x: Tensor) -> tuple[Tensor, Tensor]:
        codes = (x.float() * scale[0]).clamp(-448, 448).to(E4M3.dtype)
        return codes, codes.t().contiguous()

    ways: dict[str, Work] = {
        "E4M3": over(cast_scaled, E4M3, scale),
        "E4M3, counted": over(cast_scaled, E4M3, scale, counters),
        "E5M2": over(cast_scaled, E5M2, scale),
        "E5M2, counted": over(cast_scaled, E5M2, scale, counters),
        "E4M3, rows alone, counted": over(cast_scaled, E4M3, scale, counters, cols=False),
        "tensorwise": over(cast_tensorwise, E4M3),
        "tensorwise, counted": over(cast_tensorwise, E4M3, counters),
        "rowwise": over(cast_rowwise, E4M3),
        "rowwise, counted": over(cast_rowwise, E4M3, counters),
    }
    if CUDA:
        ways["copy"] = over(torch.clone)
    if len(x[0]) == 16384 and RUN.may_compile("compiled cast"):
        ways["torch.compile, E4M3"] = over(torch.compile(plainly, dynamic=False))
    return ways


def check_casts(x: Tensor) -> None:
    """Bytes and counters against plain operations on the same device."""
    x = x.clone()
    x[0, :3] = torch.tensor([math.inf, -math.nan, 1e30], dtype=x.dtype, device=x.device)
    for format in (E4M3, E5M2):
        for multiplier in (2.0**-6, 2.0**8):
            scale = torch.tensor([multiplier, 1 / multiplier], device=DEVICE)
            counters = torch.zeros(NUM_COUNTERS, dtype=torch.int64, device=DEVICE)
            operand = cast_scaled(x, format, scale, counters)
            product = x.float() * multiplier
            exact = product.clamp(-format.max, format.max).to(format.dtype).view(torch.uint8)
            exact.masked_fill_(~x.isfinite(), 0x7F)
            assert operand.rows is not None and operand.cols is not None
            assert torch.equal(operand.rows.view(torch.uint8), exact), f"{format} bytes differ"
            turned = operand.cols.view(torch.uint8)[:, : len(x)].t()
            assert torch.equal(turned, exact), f"{format} transposed bytes differ"
            fits = 464.0 if format == E4M3 else 61440.0 - 2.0**-8
            counts = [
                ((product.abs() > fits) & x.isfinite()).sum(),
                ((x != 0) & (exact & 0x7F == 0)).sum(),
                (~x.isfinite()).sum(),
                torch.tensor(x.numel()),
            ]
            assert counters[1:5].tolist() == [int(c) for c in counts], f"{format} counters differ"
    x = x[1:]
    for cast in (cast_tensorwise, cast_rowwise):
        operand = cast(x, E4M3)
        assert operand.rows is not None and operand.cols is not None
        turned = (operand.cols.float() * operand.col_scale)[:, : len(x)].t()
        for back in (operand.rows.float() * operand.row_scale, turned):
            error = ((back - x.float()).norm() / x.float().norm()).item()
            assert error < 0.03, f"{cast.__name__} is off by {error:.3f}"  # E4M3 alone: 2.7 %


def section_cast() -> None:
    shapes = [(16384, 4096), (16384, 14336), (8192, 8192), (4096, 4096), (4096, 14336)]
    shapes = [(256, 128), (100, 64)] if RUN.quick else shapes
    rates: dict[str, list[str]] = {}
    for index, (rows, columns) in enumerate(shapes):
        # More than the cache holds, however small a matrix is.
        count = max(2, 2**29 // (2 * rows * columns)) if not RUN.quick else 2
        x = [randn(rows, columns, seed=seed) for seed in range(min(count, 16))]
        check_casts(x[0])
        ways = cast_ways(x)
        times = interleaved(ways, calls=20)
        RUN.numbers[f"cast {rows}x{columns}"] = {"ms": times}
        for name, ms in times.items():
            rate = 4 * rows * columns / ms / 1e9
            rates.setdefault(name, [""] * (1 + len(shapes)))[1 + index] = f"{ms:.3f} ms, {rate:.2f}"
            if rows == 16384 and name in ("E4M3", "E4M3, counted", "E5M2, counted"):
                bar(f"cast {name} {rows}x{columns}, TB/s", rate, 2.9 if columns == 4096 else 3.4)
        if (rows, columns) == shapes[-2]:
            for name, work in ways.items():
                rates[name][0] = f"{host_us(work):.0f}"
        del x
        clean()
    names = [f"{rows}x{columns}" for rows, columns in shapes]
    table(
        "Casts of BF16 to both orientations: time, and TB/s at 4 bytes a value (2 read once, 1 + 1 "
        "written; fitted multipliers read twice)",
        ["", "host us", *names],
        [[name, *cells] for name, cells in rates.items()],
    )


# ------------------------------------------------------------------ tiles


def section_tiles() -> None:
    """Not part of a whole run: how the tiles of the kernels were chosen."""
    if not CUDA:
        return
    from mixprec.float8.casts import cast_kernels

    kernels: Any = cast_kernels
    # Rows, columns, warps.
    tiles = [(64, 128, 4), (64, 128, 8), (64, 64, 2), (64, 64, 4), (64, 256, 8), (128, 128, 16)]
    tiles += [(128, 64, 4), (128, 64, 8), (32, 256, 8)]
    rows: list[list[Any]] = []
    scale = torch.tensor([2.0, 0.5], device=DEVICE)
    counters = torch.zeros(NUM_COUNTERS, dtype=torch.int64, device=DEVICE)
    shapes = [(16384, 4096), (16384, 14336)]
    inputs = {shape: [randn(*shape, seed=seed) for seed in range(2)] for shape in shapes}
    for tile in tiles:
        chosen = dict(zip(("BLOCK_R", "BLOCK_C", "num_warps"), tile, strict=True))
        kernels._TILE = kernels._SMALL_TILE = kernels._ROWWISE_TILE = chosen
        cells: list[Any] = [f"{tile[0]}x{tile[1]}, {tile[2]} warps"]
        for shape, x in inputs.items():
            turn = iter(x * 1_000_000)
            ways: dict[str, Work] = {
                "plain": lambda turn=turn: cast_scaled(next(turn), E4M3, scale),
                "counted": lambda turn=turn: cast_scaled(next(turn), E4M3, scale, counters),
                "rowwise": lambda turn=turn: cast_rowwise(next(turn), E4M3, counters),
            }
            for ms in interleaved(ways, calls=10).values():
                cells.append(f"{4 * shape[0] * shape[1] / ms / 1e9:.2f}")
        rows.append(cells)
    names = [f"{what} {r}x{c}" for r, c in shapes for what in ("plain", "counted", "rowwise")]
    table("Tiles, TB/s", ["tile", *names], rows)


# ------------------------------------------------------------------ linear layers


class Layer:
    """One linear layer with the gradient of its output."""

    def __init__(self, tokens: int, k: int, n: int) -> None:
        self.sizes = tokens, k, n
        self.x = randn(tokens, k, seed=1).requires_grad_()
        self.dy = randn(tokens, n, seed=2)
        self.linear = nn.Linear(k, n, bias=False, device=DEVICE, dtype=BF16)
        with torch.no_grad():
            self.linear.weight.copy_(randn(n, k, seed=3))  # unit scale, which static casts expect
        self.exact = self.results(self.linear)

    @property
    def flop(self) -> float:
        tokens, k, n = self.sizes
        return 6.0 * tokens * k * n

    def ours(self, recipe: str) -> nn.Module:
        model = nn.Sequential(deepcopy(self.linear))
        report = mixprec.Precision("fp8", recipe=recipe).convert(model, min_dim=16)
        assert getattr(report, "converted", None), f"not converted: {report}"
        if recipe == "adaptive":
            settle(model, self.x, self.dy)
        return model

    def theirs(self, recipe: str) -> nn.Module:
        return torchao(nn.Sequential(deepcopy(self.linear)), recipe)

    def results(self, model: nn.Module) -> list[Tensor]:
        """Output and both gradients."""
        y = model(self.x)
        weight = next(iter(model.parameters()))
        grads = torch.autograd.grad(y, [self.x, weight], self.dy)
        return [y.detach(), *grads]

    def check(self, model: nn.Module) -> float:
        """Largest error of the three results beside BF16, relative by norm."""
        errors = [
            ((ours.float() - exact.float()).norm() / exact.float().norm()).item()
            for ours, exact in zip(self.results(model), self.exact, strict=True)
        ]
        # Two E4M3 operands leave an error of 3.7 %, one E5M2 operand 5.9 % (5.3 % its own).
        assert max(errors) < 0.07, f"errors of y, dX, dW beside BF16: {errors}"
        return max(errors)

    def step(self, model: nn.Module, *, changed: bool = True) -> Work:
        return one_pass(model, self.x, self.dy, changed=changed)


def one_pass(model: nn.Module, x: Tensor, dy: Tensor, *, changed: bool) -> Work:
    """Forward and backward, of the first micro-batch after a step or of a later one.

    Args:
        changed: as if an optimizer had just written the weights and gradients had been cleared.
            Otherwise weights are as in the call before, and gradients are summed in place.
    """
    params = list(model.parameters())
    sums: list[Tensor | None] = [None if changed else torch.zeros_like(param) for param in params]

    def work() -> None:
        x.grad = None
        for param, total in zip(params, sums, strict=True):
            param.grad = total
        if changed:
            torch.autograd.graph.increment_version(params)
        model(x).backward(dy)

    return work


def settle(model: nn.Module, x: Tensor, dy: Tensor) -> None:
    """Let adaptive exponents find their place; the weights stay."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for _ in range(3):
        model(x.detach().requires_grad_()).backward(dy)
        optimizer.step()
        optimizer.zero_grad()


def compile(model: nn.Module) -> nn.Module:
    compiled: Any = torch.compile(model, dynamic=False)
    return compiled


def torchao(model: nn.Module, recipe: str) -> nn.Module:
    from torchao.float8 import (  # pyright: ignore[reportMissingImports]
        Float8LinearConfig,
        convert_to_float8_training,
    )

    config = Float8LinearConfig.from_recipe_name(recipe)
    return convert_to_float8_training(model, config=config)


@cache
def has_torchao() -> bool:
    try:
        import torchao.float8  # noqa: F401  # pyright: ignore
    except Exception as error:
        print(f"(torchao left out: {said(error)})")
        return False
    return CUDA


def bare_products(layer: Layer) -> Work:
    """The three products of FP8 operands that are there already, forward with fast accumulation."""
    one = torch.ones((), device=DEVICE)
    tokens, k, n = layer.sizes
    x, w = (
        randn(*size, seed=seed).to(E4M3.dtype) for seed, size in enumerate([(tokens, k), (n, k)])
    )
    dy = randn(tokens, n, seed=5).to(E5M2.dtype)
    xt, wt, dyt = (t.view(torch.uint8).t().contiguous().view(t.dtype) for t in (x, w, dy))

    def work() -> None:
        for left, right, fast in ((x, w, True), (dy, wt, False), (dyt, xt, False)):
            torch._scaled_mm(
                left, right.t(), scale_a=one, scale_b=one, out_dtype=BF16, use_fast_accum=fast
            )

    return work


def attempt(into: dict[str, Any], name: str, make: Callable[[], Any]) -> None:
    """Add what `make` gives; an error is said, and costs only this way."""
    try:
        into[name] = make()
    except Exception as error:
        print(f"({name} left out: {said(error)})")


UNCHANGED = "weight unchanged"


def linear_ways(
    layer: Layer, compiled: Iterable[str], peers: Iterable[str]
) -> tuple[dict[str, Work], dict[str, float]]:
    """Ways through a layer by name, and their errors."""
    ways: dict[str, Work] = {}
    errors: dict[str, float] = {}

    def add(name: str, make: Callable[[], nn.Module], unchanged: bool = False) -> None:
        def build() -> nn.Module:
            model = make()
            errors[name] = layer.check(model)
            return model

        built: dict[str, nn.Module] = {}
        attempt(built, name, build)
        for model in built.values():
            ways[name] = layer.step(model)
            if unchanged:
                ways[f"{name}, {UNCHANGED}"] = layer.step(model, changed=False)

    def compiling(name: str, make: Callable[[], nn.Module], unchanged: bool = False) -> None:
        if RUN.may_compile(name):
            add(name, lambda: compile(make()), unchanged)

    add("bf16 eager", lambda: nn.Sequential(deepcopy(layer.linear)), True)
    if CUDA:
        attempt(ways, "three bare _scaled_mm", lambda: bare_products(layer))
    for recipe in RECIPES:
        add(recipe, partial(layer.ours, recipe), recipe in ("static", "adaptive"))
    compiling("bf16 compiled", lambda: nn.Sequential(deepcopy(layer.linear)))
    if has_torchao():
        for recipe in peers:
            compiling(f"torchao {recipe} compiled", partial(layer.theirs, recipe), True)
    for recipe in compiled:
        compiling(f"{recipe} compiled", partial(layer.ours, recipe))
    return ways, errors


def linear_rows(
    layer: Layer, ways: dict[str, Work], errors: dict[str, float], **options: Any
) -> dict[str, float]:
    times = interleaved(ways, **options)
    RUN.numbers[f"linear {'x'.join(map(str, layer.sizes))}"] = {"ms": times, "errors": errors}
    rows: list[list[str]] = []
    for name, ms in times.items():
        base = times[f"bf16 eager, {UNCHANGED}" if UNCHANGED in name else "bf16 eager"]
        error = f"{100 * errors[name]:.1f} %" if name in errors else ""
        rate = f"{layer.flop / ms / 1e9:.0f}"
        rows.append([name, f"{ms:.3f}", rate, f"{base / ms:.2f}x", error])
    tokens, k, n = layer.sizes
    table(
        f"Linear forward and backward, {tokens} tokens, {k} -> {n}",
        ["", "ms", "TFLOP/s", "of bf16 eager", "largest error beside bf16"],
        rows,
    )
    return times


def linear_bars(name: str, times: dict[str, float]) -> None:
    for end in ("", f", {UNCHANGED}"):
        ours = f"static{end}"
        if ours in times:
            bar(f"{name}: {ours} over bf16 eager", times[f"bf16 eager{end}"] / times[ours], 1.65)
            if (floor := times.get("three bare _scaled_mm")) is not None:
                bar(f"{name}: {ours}, of the bare products", floor / times[ours], 0.90)
            if (peer := times.get(f"torchao tensorwise compiled{end}")) is not None:
                bar(f"{name}: {ours} over torchao tensorwise", peer / times[ours], 1.12)
    for recipe in PEERS:
        peer = times.get(f"torchao {recipe} compiled")
        if peer is not None and recipe in times:
            bar(f"{name}: {recipe} eager over torchao compiled", peer / times[recipe], 1.0)


def section_linear() -> None:
    shapes = [(16384, 4096, 4096), (16384, 4096, 14336), (16384, 14336, 4096), (8192, 8192, 8192)]
    for shape in [(64, 32, 48)] if RUN.quick else shapes:
        layer = Layer(*shape)
        times = linear_rows(layer, *linear_ways(layer, ("static",), PEERS))
        linear_bars("x".join(map(str, shape)), times)
        del layer
        clean()


# ------------------------------------------------------------------ few tokens


def graphed(layer: Layer, model: nn.Module) -> Work:
    """Forward and backward as a CUDA graph, whose gradients stay where they are."""
    step = layer.step(model)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def section_small() -> None:
    for shape in [(16, 32, 48)] if RUN.quick else [(4096, 4096, 4096)]:
        layer = Layer(*shape)
        ways, errors = linear_ways(layer, ("static", "adaptive"), ("tensorwise",))
        if CUDA:
            models: dict[str, Callable[[], nn.Module]] = {
                "bf16, CUDA graph": lambda layer=layer: nn.Sequential(deepcopy(layer.linear)),
                **{f"{r}, CUDA graph": partial(layer.ours, r) for r in RECIPES},
            }
            for name, make in models.items():
                attempt(ways, name, lambda make=make, layer=layer: graphed(layer, make()))
        times = linear_rows(layer, ways, errors, calls=20, ahead=False)
        for ours, base in (
            ("static compiled", "bf16 compiled"),
            ("static, CUDA graph", "bf16, CUDA graph"),
        ):
            if ours in times and base in times:
                name = f"{'x'.join(map(str, shape))}: {ours} over {base}"
                bar(name, times[base] / times[ours], 1.25)
        del layer, ways
        clean()


# ------------------------------------------------------------------ layers in a row


def section_depth() -> None:
    tokens, width, count = (32, 64, 2) if RUN.quick else (4096, 4096, 8)
    x, dy = randn(tokens, width, seed=1).requires_grad_(), randn(tokens, width, seed=2)
    plain = nn.Sequential(
        *(nn.Linear(width, width, bias=False, device=DEVICE, dtype=BF16) for _ in range(count))
    )
    with torch.no_grad():
        for seed, layer in enumerate(plain):
            assert isinstance(layer, nn.Linear)
            layer.weight.copy_(width**-0.5 * randn(width, width, seed=seed, dtype=torch.float32))
    exact = plain(x).detach().float()

    def converted(recipe: str) -> nn.Module:
        model = deepcopy(plain)
        mixprec.Precision("fp8", recipe=recipe).convert(model, min_dim=16)
        settle(model, x, dy)
        return model

    models: dict[str, nn.Module] = {}

    def add(name: str, make: Callable[[], nn.Module]) -> None:
        def build() -> nn.Module:
            model = make()
            error = (model(x).detach().float() - exact).norm() / exact.norm()
            assert error < 0.2, f"off by {error:.2f}"  # count^1/2 times 3.7 % is 0.10
            return model

        attempt(models, name, build)

    add("bf16 eager", lambda: deepcopy(plain))
    add("adaptive", lambda: converted("adaptive"))
    add("tensorwise", lambda: converted("tensorwise"))
    makers: dict[str, Callable[[], nn.Module]] = {
        "bf16 compiled": lambda: deepcopy(plain),
        "adaptive compiled": lambda: converted("adaptive"),
        "tensorwise compiled": lambda: converted("tensorwise"),
    }
    if has_torchao():
        makers["torchao tensorwise compiled"] = lambda: torchao(deepcopy(plain), "tensorwise")
    for name, make in makers.items():
        if RUN.may_compile(name):
            add(name, lambda make=make: compile(make()))
    graphs = partial(torch.compile, dynamic=False, mode="reduce-overhead")
    for name in ("bf16 compiled", "adaptive compiled"):
        if RUN.may_compile(f"{name}, CUDA graphs"):
            add(f"{name}, CUDA graphs", lambda name=name: graphs(makers[name]()))
    title = f"{count} layers in a row, {tokens} tokens, {width} -> {width}"
    for changed, what in ((True, "a pass after a step"), (False, "a later micro-batch")):
        ways = {name: one_pass(model, x, dy, changed=changed) for name, model in models.items()}
        ms = {name: each / count for name, each in interleaved(ways, ahead=False).items()}
        hosts = {name: host_us(ways[name], calls=3) / count for name in ms}
        RUN.numbers[f"depth {what}"] = {"ms": ms, "host_us": hosts, "layers": count}
        table(
            f"{title}: {what}",
            ["", "ms a layer", "of bf16 eager", "host us a layer"],
            [
                [name, f"{each:.3f}", f"{ms['bf16 eager'] / each:.2f}x", f"{hosts[name]:.0f}"]
                for name, each in ms.items()
            ],
        )
        if "adaptive compiled" in ms and "bf16 compiled" in ms:
            gain = ms["bf16 compiled"] / ms["adaptive compiled"]
            bar(f"{title}: {what}, adaptive over bf16, compiled", gain, 1.25)


# ------------------------------------------------------------------ micro-batches


def section_micro() -> None:
    count = 8
    shapes = [(4096, 4096, 14336), (16384, 4096, 4096)]
    for shape in [(32, 32, 48)] if RUN.quick else shapes:
        layer = Layer(*shape)
        change = torch.zeros_like(layer.linear.weight)

        def step(model: nn.Module, layer: Layer = layer, change: Tensor = change) -> Work:
            weight = next(iter(model.parameters()))

            def work() -> None:
                weight.grad = None
                for _ in range(count):
                    layer.x.grad = None
                    model(layer.x).backward(layer.dy)
                with torch.no_grad():
                    weight.add_(change)

            return work

        ways: dict[str, Work] = {"bf16 eager": step(deepcopy(layer.linear))}
        for recipe in RECIPES:
            make = partial(layer.ours, recipe)
            attempt(ways, recipe, lambda make=make, step=step: step(make()))
        if has_torchao() and RUN.may_compile("torchao tensorwise"):
            make = partial(layer.theirs, "tensorwise")
            name = "torchao tensorwise compiled"
            attempt(ways, name, lambda make=make, step=step: step(compile(make())))
        times = interleaved(ways, calls=1, ahead=False)
        RUN.numbers[f"micro {'x'.join(map(str, shape))}"] = {"ms": times, "micro_batches": count}
        base = times["bf16 eager"]
        tokens, k, n = shape
        table(
            f"{count} micro-batches of {tokens} tokens, {k} -> {n}, and a change of the weight",
            ["", "ms", "TFLOP/s", "of bf16 eager"],
            [
                [name, f"{ms:.2f}", f"{count * layer.flop / ms / 1e9:.0f}", f"{base / ms:.2f}x"]
                for name, ms in times.items()
            ],
        )
        if (peer := times.get("torchao tensorwise compiled")) is not None:
            name = (
                f"{count} micro-batches {'x'.join(map(str, shape))}: static over torchao tensorwise"
            )
            bar(name, peer / times["static"], 1.2)
        del layer, ways, change
        clean()


# ------------------------------------------------------------------ a block


class Block(nn.Module):
    """One layer of a decoder with grouped queries and a gated MLP."""

    def __init__(self, width: int, heads: int, kv_heads: int, hidden: int, length: int) -> None:
        super().__init__()
        self.head = width // heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, kv_heads * self.head, bias=False)
        self.v = nn.Linear(width, kv_heads * self.head, bias=False)
        self.o = nn.Linear(width, width, bias=False)
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        angle = torch.arange(length)[:, None] * 5e5 ** -torch.linspace(0, 1, self.head // 2)
        self.register_buffer("cos", angle.cos().to(BF16), persistent=False)
        self.register_buffer("sin", angle.sin().to(BF16), persistent=False)

    def turned(self, x: Tensor) -> Tensor:
        (a, b), cos, sin = x.chunk(2, -1), self.get_buffer("cos"), self.get_buffer("sin")
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (
            t.unflatten(-1, (-1, self.head)).transpose(1, 2)
            for t in (self.q(h), self.k(h), self.v(h))
        )
        a = F.scaled_dot_product_attention(
            self.turned(q), self.turned(k), v, is_causal=True, enable_gqa=True
        )
        x = x + self.o(a.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def block_steps(model: nn.Module, x: Tensor, dy: Tensor) -> dict[int, Work]:
    """Steps of 1 and of 8 micro-batches."""
    optimizer = mixprec.MixedPrecision(torch.optim.AdamW(model.parameters(), lr=1e-6))
    leaf = x.detach().requires_grad_()

    def step(micro_batches: int) -> None:
        for _ in range(micro_batches):
            leaf.grad = None
            model(leaf).backward(dy)
        optimizer.step()
        optimizer.zero_grad()

    return {n: partial(step, n) for n in (1, 8)}


def peak_mib(work: Work) -> float:
    """What a call allocates on top of what there is."""
    if not CUDA:
        work()
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def block_models(sizes: tuple[int, ...], compiled: bool) -> dict[str, Callable[[], nn.Module]]:
    def make(recipe: str | None = None, peer: str | None = None) -> nn.Module:
        torch.manual_seed(0)
        with torch.device(DEVICE):
            model = Block(*sizes)
        # Norms in BF16 for all, so that only the linear layers differ.
        options: dict[str, Any] = {"keep_fp32": ()}
        if recipe is not None:
            mixprec.Precision("fp8", recipe=recipe).convert(model, min_dim=16, **options)
        else:
            mixprec.Precision("bf16").convert(model, **options)
        if peer is not None:
            model = torchao(model, peer)
        return compile(model) if compiled else model

    models: dict[str, Callable[[], nn.Module]] = {"bf16": make}
    for recipe in ("static", "adaptive") if compiled else RECIPES:
        models[recipe] = partial(make, recipe)
    if compiled and has_torchao():
        models["torchao tensorwise"] = partial(make, None, "tensorwise")
    return models


@dataclass
class BlockRow:
    name: str
    error: float
    peak: float
    steps: dict[int, Work]
    ms: dict[int, float] = field(default_factory=dict[int, float])


def block_row(name: str, model: nn.Module, x: Tensor, dy: Tensor, exact: Tensor) -> BlockRow:
    """One way through the block, warm."""
    with torch.no_grad():
        y = model(x).float()
    # Of the branches, whose errors the residual would hide.
    error = ((y - exact).norm() / (exact - x.float()).norm()).item()
    assert error < 0.1, f"output is off by {error:.3f}"
    steps = block_steps(model, x, dy)
    steps[1]()
    steps[1]()
    return BlockRow(name, error, peak_mib(steps[1]), steps)


def section_block() -> None:
    sizes, batch = ((64, 4, 2, 96, 16), 2) if RUN.quick else ((4096, 32, 8, 14336, 4096), 4)
    x = randn(batch, sizes[-1], sizes[0], seed=1)
    dy = randn(*x.shape, seed=2) * 1e-3
    cells: list[list[str]] = []
    for kind in ("eager", "compiled") if CUDA else ("eager",):
        rows: list[BlockRow] = []
        with torch.no_grad():
            exact = block_models(sizes, False)["bf16"]()(x).float()
        for name, make in block_models(sizes, kind == "compiled").items():
            if kind == "compiled" and not RUN.may_compile(f"block, {name}"):
                continue
            try:
                rows.append(block_row(name, make(), x, dy, exact))
            except Exception as error:
                print(f"(block, {kind} {name} left out: {said(error)})")
            gc.collect()
        for n in (1, 8):
            times = interleaved({row.name: row.steps[n] for row in rows}, calls=1)
            for row in rows:
                row.ms[n] = times.get(row.name, math.nan)
        for row in rows:
            cells.append([f"{row.name}, {kind}", f"{100 * row.error:.1f} %", f"{row.peak:.0f}"])
            for n in (1, 8):
                cells[-1] += [f"{row.ms[n]:.2f}", f"{rows[0].ms[n] / row.ms[n]:.2f}x"]
            if row.name in ("static", "adaptive") and rows[0].name == "bf16":
                name = f"block: {row.name} over bf16, both {kind}"
                bar(name, rows[0].ms[1] / row.ms[1], 1.35)
        RUN.numbers[f"block {kind}"] = {
            row.name: {"error": row.error, "peak_mib": row.peak, "ms": row.ms[1], "ms_8": row.ms[8]}
            for row in rows
        }
        rows.clear()
        clean()
    columns = ["ms, 1 micro-batch", "of bf16", "ms, 8 micro-batches", "of bf16"]
    table(
        f"Decoder block (width, heads, kv heads, hidden, length: {sizes}), {batch * sizes[-1]} "
        "tokens a micro-batch, forward, backward and AdamW with FP32 masters",
        ["", "output beside bf16", "peak MiB of a step", *columns],
        cells,
    )


# ------------------------------------------------------------------ numbers


def section_accumulation() -> None:
    if not CUDA:
        print("(accumulation left out: needs a CUDA device)")
        return
    one = torch.ones((), device=DEVICE)
    rows: list[list[str]] = []
    for k in (4096, 16384, 65536):
        for what in ("one sign", "both signs"):
            a, b = randn(512, k, seed=1), randn(512, k, seed=2)
            if what == "one sign":
                a, b = a.abs(), b.abs()
            a8, b8 = a.to(E4M3.dtype), b.to(E4M3.dtype)
            exact = a8.double() @ b8.double().t()
            cells: list[str] = []
            found: list[float] = []
            for fast in (True, False):
                out = torch._scaled_mm(
                    a8,
                    b8.t(),
                    scale_a=one,
                    scale_b=one,
                    out_dtype=torch.float32,
                    use_fast_accum=fast,
                ).double()
                error = ((out - exact).norm() / exact.norm()).item()
                cells.append(f"{error:.1e}")
                found.append(error)
                if what == "one sign":
                    cells.append(f"{((out - exact).sum() / exact.sum()).item():+.1e}")
                else:
                    cells.append("")
            single = ((a8.float() @ b8.float().t()).double() - exact).norm() / exact.norm()
            rows.append([f"{k}, {what}", *cells, f"{single.item():.1e}"])
            RUN.numbers[f"accumulation {k}, {what}"] = {"short": found[0], "exact": found[1]}
    table(
        "Sums of E4M3 products against FP64: error by norm, and bias",
        ["addends", "fast", "bias", "slow", "bias", "FP32 (as torch multiplies it)"],
        rows,
    )


def sqnr(ours: Tensor, exact: Tensor) -> float:
    error = (ours.double() - exact).norm()
    return 20 * math.log10((exact.norm() / error.clamp(min=1e-300)).item())


def cases(tokens: int, k: int, n: int) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """x, W and dY in BF16."""
    x, w, dy = (
        randn(*s, seed=i, dtype=torch.float32)
        for i, s in enumerate(((tokens, k), (n, k), (tokens, n)))
    )
    fan_in = w * k**-0.5
    found: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    for exponent in range(-8, 9, 2):
        found[f"RMS 2^{exponent}, all three"] = tuple(t * 2.0**exponent for t in (x, w, dy))  # type: ignore[assignment]
    g = torch.Generator(DEVICE).manual_seed(9)
    outliers = x.clone()
    outliers[:, :: max(k // 16, 1)] *= 60
    found["x with channels x60"] = outliers, fan_in, dy
    spikes = torch.where(torch.rand(x.shape, generator=g, device=DEVICE) < 1e-4, 300.0, x)
    found["x with spikes of 300"] = spikes, fan_in, dy
    heavy = (2.5 * torch.randn(x.shape, generator=g, device=DEVICE)).exp() * x.sign()
    found["x lognormal(2.5)"] = heavy, fan_in, dy
    rows = torch.randn(tokens, 1, generator=g, device=DEVICE).mul(2).exp()
    found["rows of dY lognormal(2)"] = x, fan_in, dy * rows
    found["RMS of x 1, W 0.02, dY 2^-10"] = x, 0.02 * w, dy * 2.0**-10
    return {name: tuple(t.to(BF16) for t in ts) for name, ts in found.items()}  # type: ignore[misc]


def section_sqnr() -> None:
    sizes = (64, 64, 48) if RUN.quick else (1024, 2048, 1024)
    peers = PEERS if has_torchao() else ()
    rows: list[list[str]] = []
    for name, (x, w, dy) in cases(*sizes).items():
        exact = x.double() @ w.double().t(), dy.double() @ w.double(), dy.double().t() @ x.double()
        cells: list[str] = []
        makers: dict[str, Callable[[nn.Module], nn.Module]] = {"bf16": lambda m: m}
        makers.update({recipe: partial(converted, recipe=recipe) for recipe in RECIPES})
        makers.update({f"torchao {p}": partial(torchao, recipe=p) for p in peers})
        for way, make in makers.items():
            linear = nn.Linear(sizes[1], sizes[2], bias=False, device=DEVICE, dtype=BF16)
            with torch.no_grad():
                linear.weight.copy_(w)
            try:
                model = make(nn.Sequential(linear))
                if way == "adaptive":
                    settle(model, x, dy)
                leaf = x.detach().requires_grad_()
                y = model(leaf)
                weight = next(iter(model.parameters()))
                dx, dw = torch.autograd.grad(y, [leaf, weight], dy)
                found = [sqnr(a, b) for a, b in zip((y, dx, dw), exact, strict=True)]
                cells.append(" / ".join(f"{value:.1f}" for value in found))
                if way == "adaptive" and name.startswith("RMS"):
                    bar(f"SQNR of y, adaptive, {name}", found[0], 25)
                    bar(f"SQNR of dX and dW, adaptive, {name}", min(found[1:]), 20)
            except Exception as error:
                cells.append("failed")
                print(f"({way}, {name}: {said(error)})")
        rows.append([name, *cells])
    header = ["y / dX / dW", "bf16", *RECIPES, *(f"torchao {p}" for p in peers)]
    tokens, k, n = sizes
    table(f"SQNR in dB against FP64, {tokens} tokens, {k} -> {n}", header, rows)


def converted(model: nn.Module, recipe: str) -> nn.Module:
    mixprec.Precision("fp8", recipe=recipe).convert(model, min_dim=16)
    return model


# ------------------------------------------------------------------ all of it


SECTIONS: dict[str, Work] = {
    "cast": section_cast,
    "linear": section_linear,
    "small": section_small,
    "depth": section_depth,
    "micro": section_micro,
    "block": section_block,
    "accumulation": section_accumulation,
    "sqnr": section_sqnr,
    "tiles": section_tiles,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    whole = [name for name in SECTIONS if name != "tiles"]
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=whole)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=200, help="after so many, compile no more")
    parser.add_argument("--quick", action="store_true", help="small shapes, once, also on a CPU")
    parser.add_argument("--out", type=Path, default=None, metavar="PATH", help="JSON goes here")
    parser.add_argument("--add", action="store_true", help="keep what else is in the file")
    args = parser.parse_args()
    if not CUDA and not args.quick:
        parser.error("needs a CUDA device; --quick tries the script without one")
    RUN.quick, RUN.rounds, RUN.deadline = args.quick, args.rounds, time.time() + args.seconds
    print(f"{torch.cuda.get_device_name() if CUDA else 'CPU'}, torch {torch.__version__}")
    before = runs_of(args.out) if args.add else []
    failed: list[str] = []
    for name in args.only:
        try:
            SECTIONS[name]()
        except Exception as error:
            failed.append(name)
            print(f"(section {name} failed: {said(error)})")
            if args.quick:
                raise
        save(args.out, RUN.numbers, peers=("torchao",), onto=before)  # in case the next is cut off
        clean()
    print("\n" + "\n".join(RUN.bars))
    print(f"{time.time() - RUN.began:.0f} s in all")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
