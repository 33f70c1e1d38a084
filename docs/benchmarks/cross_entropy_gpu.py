"""linear_cross_entropy on one CUDA device beside its peers: time, memory and error in one run.

Forward and backward of an output layer in BF16, every way once a round, so that a clock which moves
with the chip's temperature moves for all of them; medians of the rounds. The device is kept busy
until the host is ahead of it, as it is in a training loop. Ours hands over an FP32
weight gradient; peers make what they make. The floor is the three bare products of the rows that
are no padding, all at once, with an FP32 weight gradient.

Errors are relative by norm, against FP64: hidden states' gradient on 64 rows, the weight's on 256
rows, half of them classes that some token has. Peak is what a call allocates on top of the inputs,
less the two gradients themselves (FP32 for ours); its slab and scratch.

    python docs/benchmarks/cross_entropy_gpu.py [--out FILE]

Peers are optional (liger-kernel 0.8.5, cut-cross-entropy 25.1.1): one that is absent is named and
left out. Takes about three minutes on an H200.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
import torch.nn.functional as F
from record import save
from torch import Tensor

from mixprec.cross_entropy import linear_cross_entropy
from mixprec.cross_entropy.chunks import default_chunk_size
from mixprec.cross_entropy.rows import LossTerms
from mixprec.cross_entropy.softmax import softmax_gradient_

PADDING = -100
MIB = 2**20


@dataclass(frozen=True)
class Shape:
    name: str
    tokens: int
    width: int
    vocab: int
    rounds: int
    padded: bool = False
    checked: bool = False
    most: float | None = None
    """Milliseconds that ours may take, where a bar is set in milliseconds."""


SHAPES = [
    Shape("Llama 3", 8192, 4096, 128256, 9, checked=True),
    Shape("Llama 3, 1/7 padding", 8192, 4096, 128256, 9, padded=True, checked=True, most=34.0),
    Shape("GPT-2", 32768, 2048, 50304, 9, checked=True),
    Shape("GPT-2, 1/7 padding", 32768, 2048, 50304, 9, padded=True, checked=True, most=28.0),
    Shape("Llama 3, 32k tokens", 32768, 4096, 128256, 3),
    Shape("Gemma 2", 8192, 2304, 256000, 5),
    Shape("Llama 3, 2000 tokens", 2000, 4096, 128256, 9),
]


@dataclass
class Inputs:
    hidden: Tensor
    weight: Tensor
    wide: Tensor
    """The same weight as a leaf whose gradient is FP32."""
    targets: Tensor
    num_tokens: int

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = self.wide.grad = None


def inputs(shape: Shape) -> Inputs:
    g = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(shape.tokens, shape.width, generator=g, device="cuda").bfloat16()
    weight = torch.randn(shape.vocab, shape.width, generator=g, device="cuda")
    weight = weight.div_(shape.width**0.5).bfloat16()
    targets = torch.randint(shape.vocab, (shape.tokens,), generator=g, device="cuda")
    if shape.padded:
        targets[::7] = PADDING
    wide = weight.detach().requires_grad_()
    wide.grad_dtype = torch.float32
    count = int((targets != PADDING).sum())
    return Inputs(hidden.requires_grad_(), weight.requires_grad_(), wide, targets, count)


@dataclass
class Way:
    name: str
    loss: Callable[[Inputs], Tensor]
    """A loss to go backward from; the sum, or the mean."""
    mean: bool = True
    ours: bool = False


@dataclass
class Result:
    shape: str
    name: str
    ours: bool
    ms: float = 0.0
    fastest: float = 0.0
    peak_mib: float = 0.0
    """Beside the gradients."""
    loss_error: float | None = None
    hidden_error: float | None = None
    weight_error: float | None = None
    failed: str | None = None
    times: list[float] = field(default_factory=list[float])


def ours(**options: Any) -> Callable[[Inputs], Tensor]:
    return lambda x: linear_cross_entropy(
        x.hidden, x.wide, x.targets, num_tokens=x.num_tokens, **options
    )[0]


def eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets)


def ways(shape: Shape) -> list[Way]:
    compiled = torch.compile(eager, dynamic=False)
    found = [
        Way("ours", ours(), mean=False, ours=True),
        Way("ours, FP32 logits", ours(logits_dtype=torch.float32), mean=False, ours=True),
        Way("eager", lambda x: eager(x.hidden, x.weight, x.targets)),
        Way("torch.compile", lambda x: compiled(x.hidden, x.weight, x.targets)),
    ]
    if shape.name == "Llama 3":
        found.insert(1, Way("ours, times 1/T", lambda x: ours()(x) / x.num_tokens, ours=True))
    if shape.vocab < 65536:
        found.insert(1, Way("ours, chunks of 4096", ours(chunk_size=4096), mean=False, ours=True))
    return found + liger() + cce()


def liger() -> list[Way]:
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as f
    except ImportError as error:
        print(f"Liger left out: {error}")
        return []
    return [
        Way("Liger", lambda x: f(x.hidden, x.weight, x.targets)),
        Way(
            "Liger, FP32 accumulation",
            lambda x: f(x.hidden, x.weight, x.targets, accum_dtype=torch.float32),
        ),
    ]


def cce() -> list[Way]:
    try:
        from cut_cross_entropy import linear_cross_entropy as f
    except ImportError as error:
        print(f"CCE left out: {error}")
        return []
    return [
        Way("CCE", lambda x: f(x.hidden, x.weight, x.targets)),
        Way(
            "CCE, torch_compile",
            lambda x: f(x.hidden, x.weight, x.targets, impl="torch_compile"),
        ),
    ]


# ------------------------------------------------------------------ time and memory


_AHEAD = 4_000_000  # cycles, about 2 ms


def timed(work: Callable[[], Any]) -> float:
    """Milliseconds on the device, which has work until the host has queued the first of this."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_AHEAD)
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def once(way: Way, x: Inputs) -> Tensor:
    x.clear()
    loss = way.loss(x)
    loss.backward()
    return loss.detach()


def peak(way: Way, x: Inputs) -> float:
    x.clear()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    once(way, x)
    torch.cuda.synchronize()
    most = torch.cuda.max_memory_allocated() - before
    grads = [t.grad for t in (x.hidden, x.weight, x.wide) if t.grad is not None]
    return (most - sum(g.numel() * g.element_size() for g in grads)) / MIB


class Products:
    """The three products of one output layer, with nothing between them."""

    def __init__(self, x: Inputs) -> None:
        kept = x.targets != PADDING
        self.hidden, self.weight = x.hidden.detach()[kept], x.weight.detach()
        self.logits = self.hidden.new_empty(len(self.hidden), len(self.weight))
        self.by_hidden = torch.empty_like(self.hidden)
        self.by_weight = torch.empty_like(self.weight, dtype=torch.float32)

    def __call__(self) -> None:
        torch.mm(self.hidden, self.weight.T, out=self.logits)
        torch.mm(self.logits, self.weight, out=self.by_hidden)
        torch.mm(self.logits.T, self.hidden, out_dtype=torch.float32, out=self.by_weight)


def measure(shape: Shape) -> list[Result]:
    x = inputs(shape)
    exact = Exact(x) if shape.checked else None
    running: list[tuple[Way, Result]] = []
    results: list[Result] = []
    for way in ways(shape):
        result = Result(shape.name, way.name, way.ours)
        results.append(result)
        try:
            once(way, x)  # compiles
            loss = once(way, x)
            if exact is not None:
                exact.check(way, x, loss, result)
            result.peak_mib = peak(way, x)
            running.append((way, result))
        except Exception as error:
            result.failed = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
        x.clear()
        gc.collect()
        torch.cuda.empty_cache()
    del exact
    floor = Result(shape.name, "three bare products", False)
    products = Products(x)
    products()
    for _ in range(shape.rounds):
        x.clear()
        floor.times.append(timed(products))
        for way, result in running:
            x.clear()
            try:
                result.times.append(timed(lambda way=way: once(way, x)))
            except torch.OutOfMemoryError:
                result.failed = "out of memory"
    results.insert(0, floor)
    for result in results:
        if result.times:
            result.ms, result.fastest = statistics.median(result.times), min(result.times)
    return results


# ------------------------------------------------------------------ errors


class Exact:
    """Loss and parts of both gradients in FP64, of the sum of the losses."""

    def __init__(self, x: Inputs) -> None:
        hidden, weight = x.hidden.detach(), x.weight.detach()
        kept = (x.targets != PADDING).nonzero().squeeze(1)
        targets = x.targets[kept]
        matrix = weight.double()
        g = torch.Generator("cuda").manual_seed(1)
        lse = torch.empty(len(kept), dtype=torch.float64, device="cuda")
        for at in range(0, len(kept), 512):
            rows = kept[at : at + 512]
            lse[at : at + 512] = (hidden[rows].double() @ matrix.T).logsumexp(1)
        picked = (hidden[kept].double() * matrix[targets]).sum(1)
        self.loss = (lse - picked).sum().item()

        some = torch.randperm(len(kept), generator=g, device="cuda")[:64]
        self.rows = kept[some]
        p = (hidden[self.rows].double() @ matrix.T - lse[some, None]).exp_()
        p.scatter_add_(1, targets[some, None], -torch.ones_like(p[:, :1]))
        self.by_hidden = p @ matrix

        others = torch.randint(len(weight), (128,), generator=g, device="cuda")
        self.classes = torch.cat([targets[:128], others])
        p = (hidden[kept].double() @ matrix[self.classes].T - lse[:, None]).exp_()
        p -= (targets[:, None] == self.classes).double()
        self.by_weight = p.T @ hidden[kept].double()

    def check(self, way: Way, x: Inputs, loss: Tensor, result: Result) -> None:
        factor = x.num_tokens if way.mean else 1
        by_weight = x.wide.grad if x.weight.grad is None else x.weight.grad
        assert x.hidden.grad is not None and by_weight is not None
        result.loss_error = abs(loss.double().item() * factor / self.loss - 1)
        result.hidden_error = relative(x.hidden.grad[self.rows].double() * factor, self.by_hidden)
        result.weight_error = relative(by_weight[self.classes].double() * factor, self.by_weight)


def relative(found: Tensor, exact: Tensor) -> float:
    return ((found - exact).norm() / exact.norm()).item()


# ------------------------------------------------------------------ parts of ours


@dataclass
class Part:
    name: str
    work: Callable[[], Any]
    moved: float = 0.0
    """Bytes."""
    multiplied: float = 0.0
    """Floating-point operations."""


def parts() -> list[dict[str, Any]]:
    """Products, and what stands beside them, part by part."""
    found: list[dict[str, Any]] = []
    for group in (rows_of_logits, by_token, products):
        for part in group():
            part.work()
            ms = statistics.median(timed(part.work) for _ in range(9))
            rates = {"tb_per_s": part.moved / ms / 1e9, "tflop_per_s": part.multiplied / ms / 1e9}
            found.append({"part": part.name, "ms": ms, **rates})
        gc.collect()
        torch.cuda.empty_cache()
    return found


def rows_of_logits() -> list[Part]:
    """The kernel of a chunk, in blocks of several sizes."""
    from mixprec.cross_entropy import softmax_kernels as kernels

    tokens, vocab = 4096, 128256
    g = torch.Generator("cuda").manual_seed(0)
    targets = torch.randint(vocab, (tokens,), generator=g, device="cuda")
    picked = torch.zeros(tokens, device="cuda")
    found: list[Part] = []

    def both(logits: Tensor, block: int, warps: int) -> None:
        usual = kernels._BLOCK, kernels._ELEMENTS_OF_A_WARP
        kernels._BLOCK, kernels._ELEMENTS_OF_A_WARP = block, block // warps
        softmax_gradient_(
            logits, targets, LossTerms(), target_logits=picked, rounded_to=torch.bfloat16
        )
        kernels._BLOCK, kernels._ELEMENTS_OF_A_WARP = usual

    for dtype in (torch.bfloat16, torch.float32):
        logits = torch.randn(tokens, vocab, generator=g, device="cuda").to(dtype)
        size = tokens * vocab * dtype.itemsize
        for block, warps in ((4096, 8), (2048, 4), (4096, 4), (8192, 16), (8192, 32), (16384, 32)):
            name = f"row kernel, {dtype}, blocks of {block}, {warps} warps"
            work = partial(both, logits, block, warps)
            found.append(Part(name, work, moved=2 * size + 2 * tokens * vocab))
        alone = partial(softmax_gradient_, logits, targets, LossTerms())
        found.append(Part(f"loss alone, {dtype}", alone, moved=size))
    return found


def by_token() -> list[Part]:
    """What is done with rows of hidden states and weight, and with the weight gradient."""
    from mixprec.cross_entropy import softmax_kernels as kernels

    tokens, width, vocab = 8192, 4096, 128256
    g = torch.Generator("cuda").manual_seed(0)
    targets = torch.randint(vocab, (tokens,), generator=g, device="cuda")
    common = torch.where(torch.rand(tokens, generator=g, device="cuda") < 0.05, 7, targets)
    weight = torch.randn(vocab, width, generator=g, device="cuda").bfloat16()
    hidden = weight[:tokens].clone()
    sums = torch.zeros(vocab, width, device="cuda")
    factors, out = torch.rand(tokens, device="cuda"), torch.empty_like(hidden)
    one, other = torch.ones((), device="cuda"), torch.full((), 1 / 7, device="cuda")
    rows = torch.arange(tokens, device="cuda")
    size = tokens * width
    add = kernels.add_products_by_class_
    return [
        Part(
            "logits of 8192 targets",
            partial(kernels.target_logits, hidden, weight, targets),
            moved=4 * size,
        ),
        Part(
            "remainders of 8192 hidden states",
            partial(kernels.multiples_of_rows_, out, factors, weight, targets),
            moved=4 * size,
        ),
        Part(
            "remainders of the weight, 8192 tokens",
            partial(add, sums, targets, factors, hidden),
            moved=2 * size + 8 * width * len(targets.unique()),
        ),
        Part(
            "remainders of the weight, 5 % of one class",
            partial(add, sums, common, factors, hidden),
            moved=2 * size + 8 * width * len(common.unique()),
        ),
        Part("sort of 8192 targets", lambda: targets.int().sort(stable=True)),
        Part("picking 8192 rows", partial(hidden.index_select, 0, rows), moved=4 * size),
        Part("weight gradient times 1", partial(kernels.scale_, sums, one)),
        Part(
            "weight gradient times 1/7",
            partial(kernels.scale_, sums, other),
            moved=8 * sums.numel(),
        ),
    ]


def products() -> list[Part]:
    """The three products of a chunk; the second for several chunks, of whole waves and others."""
    found: list[Part] = []
    for width, vocab, sizes in (
        (4096, 128256, (4096, 3968, 3584, 3437, 3053)),
        (2048, 50304, (8192, 8064, 4096, 3895)),
        (2304, 256000, (2048, 1664)),
    ):
        most = max(sizes)
        weight = torch.randn(vocab, width, device="cuda").bfloat16()
        states = torch.randn(most, width, device="cuda").bfloat16()
        logits = torch.randn(most, vocab, device="cuda").bfloat16()
        by_weight = torch.zeros(vocab, width, device="cuda")
        by_hidden = torch.zeros_like(states)
        fp32 = {"out_dtype": torch.float32, "out": by_weight}

        def part(
            name: str, tokens: int, work: Callable[[], Any], width: int = width, vocab: int = vocab
        ) -> None:
            name = f"{name}, {tokens} tokens, d={width}, V={vocab}"
            found.append(Part(name, work, multiplied=2.0 * tokens * width * vocab))

        part("logits", most, partial(torch.mm, states, weight.T, out=logits))
        part("dW written", most, partial(torch.mm, logits.T, states, **fp32))
        part("dW added to", most, partial(torch.addmm, by_weight, logits.T, states, **fp32))
        for tokens in sizes:
            part("dX", tokens, partial(torch.mm, logits[:tokens], weight, out=by_hidden[:tokens]))
        part("dX added to", most, partial(by_hidden.addmm_, logits, weight))
    return found


# ------------------------------------------------------------------ report


def report(shape: Shape, results: list[Result]) -> list[str]:
    """Rows of a table, and below it which bars were met."""
    n = shape.tokens - (-(-shape.tokens // 7) if shape.padded else 0)
    floor = results[0].ms
    print(
        f"\n{shape.name}: N={shape.tokens} ({n} no padding) d={shape.width} V={shape.vocab}, "
        f"chunks of at most {default_chunk_size(shape.vocab, torch.bfloat16)} (BF16 logits) or "
        f"{default_chunk_size(shape.vocab, torch.float32)} (FP32)\n"
    )
    print("| | ms | of the floor | peak beside gradients | loss | dX | dW |")
    print("|---|---|---|---|---|---|---|")
    for r in results:
        if r.failed:
            print(f"| {r.name} | {r.failed} | | | | | |")
            continue
        errors = (r.loss_error, r.hidden_error, r.weight_error)
        shown = " | ".join("" if e is None else f"{e:.1e}" for e in errors)
        memory = "" if r is results[0] else f"{r.peak_mib:.0f} MiB"
        print(f"| {r.name} | {r.ms:.2f} | {r.ms / floor:.3f} | {memory} | {shown} |")
    return bars(shape, {r.name: r for r in results if not r.failed})


def bars(shape: Shape, by_name: dict[str, Result]) -> list[str]:
    floor = by_name["three bare products"].ms
    said: list[str] = []

    def bar(what: str, value: float, most: float) -> None:
        said.append(f"{'met' if value <= most else 'MISSED'}: {shape.name}: {what}: {value:.4g}")

    fast, exact = by_name["ours"], by_name["ours, FP32 logits"]
    if shape.name in ("Llama 3", "GPT-2"):
        bar("of the floor, at most 1.10", fast.ms / floor, 1.10)
        bar("of the floor with FP32 logits, at most 1.10", exact.ms / floor, 1.10)
    if shape.most is not None:
        bar(f"ms, at most {shape.most}", fast.ms, shape.most)
        bar(f"ms with FP32 logits, at most {shape.most}", exact.ms, shape.most)
    if shape.checked:
        bar("dX with FP32 logits, at most 2.2e-3", exact.hidden_error or 0.0, 2.2e-3)
        bar("dW with FP32 logits, at most 3e-4", exact.weight_error or 0.0, 3e-4)
    if "eager" in by_name and shape.checked:
        full = by_name["eager"]
        # Both round it to BF16 once; where that is all of the error, chance decides digit five.
        over = (fast.hidden_error or 0) / (full.hidden_error or 1)
        bar("dX over eager's, at most 1", round(over, 4), 1.0)
        bar("dW over eager's, at most 1", (fast.weight_error or 0) / (full.weight_error or 1), 1.0)
    if shape.tokens == 2000 and "eager" in by_name:
        bar("ms over eager's, at most 1", fast.ms / by_name["eager"].ms, 1.0)
    for r in (fast, exact):
        bar(f"{r.name}: peak MiB beside gradients, at most 1024", r.peak_mib, 1024)
    return said


def numbers_of(result: Result) -> dict[str, Any]:
    """What goes into the file."""
    left_out = ("shape", "name", "ours", "times")
    return {k: v for k, v in asdict(result).items() if k not in left_out and v is not None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=None, metavar="PATH", help="JSON goes here")
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="only the first so many")
    args = parser.parse_args()
    began = time.time()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    results: list[Result] = []
    said: list[str] = []
    for shape in SHAPES[: args.shapes]:
        results += (found := measure(shape))
        said += report(shape, found)
        print(f"\n({time.time() - began:.0f} s so far)", flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    print("\n| part (of 4096 tokens, d=4096, V=128256) | ms | TB/s | TFLOP/s |\n|---|---|---|---|")
    for part in (found_parts := parts()):
        rates = f"{part['tb_per_s']:.2f} | {part['tflop_per_s']:.0f}"
        print(f"| {part['part']} | {part['ms']:.3f} | {rates} |")
    print("\n" + "\n".join(said))
    numbers: dict[str, Any] = {
        shape.name: {
            **{"tokens": shape.tokens, "width": shape.width, "vocab": shape.vocab},
            "ways": {r.name: numbers_of(r) for r in results if r.shape == shape.name},
        }
        for shape in SHAPES[: args.shapes]
    }
    numbers["parts"] = {part.pop("part"): part for part in found_parts}
    save(args.out, numbers, peers=("liger-kernel", "cut-cross-entropy"))
    print(f"{time.time() - began:.0f} s in all")


if __name__ == "__main__":
    main()
