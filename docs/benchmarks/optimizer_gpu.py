"""Time and memory of an optimizer step on a GPU: MixedPrecision, its peers, and the copy speed.

    python docs/benchmarks/optimizer_gpu.py [--only NAME ...] [--out FILE [--add]]

1.104e9 BF16 parameters in the 147 tensors of a Llama-like decoder, unless a row says otherwise:
124M is a smaller one, and 15M, 113M and 973M are the hidden matrices alone of three decoders, which
is what rules of matrices are for. "Bare" is the same rule without this library, on FP32 parameters
and gradients.

Every way runs in a process of its own, so that its peak is its own; a device copy is timed in each,
and "of copy" compares the bytes that a step has to move with what that copy moves in the same time.
Medians of CUDA events around five steps at a time, with gradients in place, so that the device is
never idle unless the host is slower than it; "host" is the time of a call that finds it idle.

The file is written after each way, those that compile for long come last, and `--add` puts what is
measured now in the place of the same in the file. `--tiny` tries the script on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from record import runs_of, save
from torch import nn

import mixprec

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
TINY = "--tiny" in sys.argv
PEERS = ("flashoptim", "torch-optimi", "torchao", "heavyball", "pytorch-optimizer", "schedulefree")
Step = Callable[[], Any]


def decoder_shapes(
    layers: int = 16, width: int = 2048, vocab: int = 32000, grouped: int = 4
) -> list[tuple[int, ...]]:
    """A decoder with grouped queries and a gated MLP of four times its width."""
    keys = (width // grouped, width)
    layer = [(width, width), keys, keys, (width, width)]
    layer += [(4 * width, width), (4 * width, width), (width, 4 * width), (width,), (width,)]
    return [(vocab, width), *layer * layers, (width,), (vocab, width)]


def hidden(shapes: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Its matrices, but for the first and the last, which are embeddings."""
    return [shape for shape in shapes[1:-1] if len(shape) == 2]


def sizes() -> dict[str, list[tuple[int, ...]]]:
    if TINY:
        small = decoder_shapes(2, 32, 64)
        return {"1.1B": small, "2000 x 4096": [(8, 8)] * 5} | dict.fromkeys(
            ("124M", "15M", "113M", "973M"), hidden(small)
        )
    return {
        "1.1B": decoder_shapes(),
        "124M": decoder_shapes(12, 768, 16000),
        "2000 x 4096": [(64, 64)] * 2000,
        "15M": hidden(decoder_shapes(4, 512)),
        "113M": hidden(decoder_shapes(12, 768, grouped=1)),
        "973M": hidden(decoder_shapes()),
    }


def parameters(size: str, dtype: torch.dtype = torch.bfloat16) -> list[nn.Parameter]:
    torch.manual_seed(0)
    params = [nn.Parameter((torch.randn(s, device=DEVICE) * 0.02).to(dtype)) for s in sizes()[size]]
    for p in params:
        p.grad = (torch.randn(p.shape, device=DEVICE) * 1e-3).to(dtype)
    return params


def median_ms(step: Step, rounds: int = 12, steps: int = 5) -> float:
    if not CUDA:
        return host_ms(step, 1)
    times: list[float] = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(steps):
            step()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / steps)
    return statistics.median(times)


def host_ms(step: Step, rounds: int = 10) -> float:
    times: list[float] = []
    for _ in range(rounds):
        synchronize()
        begin = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times)


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def copy_bytes_per_s() -> float:
    """Bytes read and written by a copy of 2 GB."""
    source = torch.randn(500_000_000 if CUDA else 1000, device=DEVICE)
    target = torch.empty_like(source)
    for _ in range(3):
        target.copy_(source)
    return 2 * source.numel() * 4 / median_ms(lambda: target.copy_(source)) * 1e3


# ---------------------------------------- ways


Rule = Callable[[Any], Any]
Make = Callable[[str], Step]
"""A step over the parameters of a size."""


def ours(rule: Rule, **options: Any) -> Make:
    def make(size: str) -> Step:
        inner = rule(parameters(size))
        if callable(train := getattr(inner, "train", None)):
            train()
        return mixprec.MixedPrecision(inner, **options).step

    return make


def bare(rule: Rule, dtype: torch.dtype = torch.float32) -> Make:
    return lambda size: rule(parameters(size, dtype)).step


def adamw(params: Any, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-3, **options)


def fused_adamw(params: Any) -> torch.optim.Optimizer:
    return adamw(params, fused=True)


def classic(size: str) -> Step:
    """FP32 masters by hand: gradients copied up, the fused rule, weights copied down."""
    params = parameters(size)
    masters = [nn.Parameter(p.detach().float()) for p in params]
    rule = adamw(masters, fused=True)

    def step() -> None:
        for m in masters:
            m.grad = torch.empty_like(m)
        torch._foreach_copy_([m.grad for m in masters], [p.grad for p in params])
        rule.step()
        with torch.no_grad():
            torch._foreach_copy_(params, masters)
        for m in masters:
            m.grad = None

    return step


def torchao(params: Any) -> Any:
    from torchao.optim import AdamW8bit  # pyright: ignore

    return AdamW8bit(params, lr=torch.tensor(1e-3), bf16_stochastic_round=True)  # pyright: ignore


def heavyball(size: str) -> Step:
    import heavyball  # pyright: ignore

    params = parameters(size)
    grads = [p.grad for p in params]
    optimizer = heavyball.AdamW(params, lr=1e-3)

    def step() -> None:
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        optimizer.step()

    return step


def third(package: str, name: str, **options: Any) -> Rule:
    def build(params: Any) -> Any:
        module = __import__(package, fromlist=[name])
        return getattr(module, name)(params, **{"lr": 1e-3, **options})

    return build


def torch_rule(name: str, **options: Any) -> Rule:
    return lambda params: getattr(torch.optim, name)(params, **{"lr": 1e-3, **options})


UNGUARDED = {"on_nonfinite": "ignore"}
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Way:
    make: Make
    moved: float
    """Bytes a parameter that a step must move: weight, remainder and states read and written, the
    gradient read."""
    size: str = "1.1B"


WAYS: dict[str, Way] = {
    "ours, FP32 states": Way(ours(adamw), 28),
    "ours, FP32 states, unguarded": Way(ours(adamw, **UNGUARDED), 26),
    "ours, FP32 states, clipped": Way(ours(adamw, max_grad_norm=1.0), 28),
    "ours, BF16 states, unguarded": Way(ours(adamw, state_formats="bf16", **UNGUARDED), 18),
    "ours, 8-bit states, unguarded": Way(ours(adamw, state_formats="8bit", **UNGUARDED), 14.25),
    "ours, 8-bit states": Way(ours(adamw, state_formats="8bit"), 16.25),
    "ours, full masters, unguarded": Way(ours(adamw, masters="full", **UNGUARDED), 30),
    "torch fused, FP32 parameters": Way(bare(fused_adamw), 28),
    "torch fused, BF16, no masters": Way(bare(fused_adamw, BF16), 14),
    "classic FP32 masters": Way(classic, 28),
    "flashoptim 32-bit, BF16 states": Way(
        bare(third("flashoptim", "FlashAdamW", master_weight_bits=32, quantize=False), BF16), 18
    ),
    "optimi Kahan, BF16 states": Way(
        bare(third("optimi", "AdamW", kahan_sum=True, triton=True), BF16), 18
    ),
    "124M: ours": Way(ours(adamw, **UNGUARDED), 26, "124M"),
    "124M: torch fused, FP32 parameters": Way(bare(fused_adamw), 28, "124M"),
    "2000 x 4096: ours": Way(ours(adamw, **UNGUARDED), 26, "2000 x 4096"),
    "2000 x 4096: ours, guarded": Way(ours(adamw), 28, "2000 x 4096"),
    "2000 x 4096: torch fused, FP32 parameters": Way(bare(fused_adamw), 28, "2000 x 4096"),
}

ELEMENTWISE: dict[str, tuple[Rule, float]] = {
    "Lion": (third("pytorch_optimizer", "Lion", lr=1e-4), 18),
    "SGD": (torch_rule("SGD"), 10),
    "SGD momentum": (torch_rule("SGD", momentum=0.9), 18),
    "SGD Nesterov": (torch_rule("SGD", momentum=0.9, nesterov=True), 18),
    "Adam amsgrad": (torch_rule("Adam", amsgrad=True), 34),
    "NAdam": (torch_rule("NAdam"), 26),
    "RAdam": (torch_rule("RAdam"), 26),
    "RMSprop": (torch_rule("RMSprop"), 18),
    "Adagrad": (torch_rule("Adagrad"), 18),
    "Adamax": (torch_rule("Adamax"), 26),
    "Adadelta": (torch_rule("Adadelta"), 26),
    "ASGD": (torch_rule("ASGD"), 14),
    "Adan": (third("pytorch_optimizer", "Adan"), 42),
    "AdaBelief": (third("pytorch_optimizer", "AdaBelief"), 26),
    "ADOPT": (third("pytorch_optimizer", "ADOPT"), 26),
    "AdEMAMix": (third("pytorch_optimizer", "AdEMAMix"), 34),
    "schedule-free AdamW": (third("schedulefree", "AdamWScheduleFree"), 26),
    "LAMB": (third("pytorch_optimizer", "Lamb"), 26),
    "MARS": (third("pytorch_optimizer", "MARS"), 34),
}
"""And two with sums over each tensor."""
WAYS |= {name: Way(ours(rule, **UNGUARDED), moved) for name, (rule, moved) in ELEMENTWISE.items()}

OF_MATRICES: dict[str, tuple[Rule, float, tuple[str, ...]]] = {
    "Muon": (torch_rule("Muon"), 18, ("15M", "113M", "973M")),
    "Adafactor": (torch_rule("Adafactor"), 10, ("15M", "113M", "973M")),
    "SOAP": (third("pytorch_optimizer", "SOAP"), 26, ("15M", "113M")),
    "Shampoo": (third("pytorch_optimizer", "ScalableShampoo"), 26, ("15M",)),
}
"""Rules that mix elements, and how many parameters they are tried on."""
for rule_name, (rule, moved, tried_on) in OF_MATRICES.items():
    for size in tried_on:
        WAYS[f"{rule_name} {size}: bare"] = Way(bare(rule), moved, size)
        WAYS[f"{rule_name} {size}: ours"] = Way(ours(rule), moved, size)

WAYS |= {  # those that take longest, to measure or to compile
    "ours, bucket by bucket": Way(ours(adamw, fused=False), 26),
    "flashoptim 32-bit, 8-bit states": Way(
        bare(third("flashoptim", "FlashAdamW", master_weight_bits=32), BF16), 14.25
    ),
    "torchao 8-bit, no masters": Way(bare(torchao, BF16), 10.1),
    "heavyball, BF16": Way(heavyball, 14),
}


def measure(name: str) -> dict[str, float]:
    way = WAYS[name]
    step = way.make(way.size)
    synchronize()
    begin = time.perf_counter()
    step()
    synchronize()
    first = time.perf_counter() - begin
    for _ in range(8):
        step()
    synchronize()
    gc.collect()
    count = sum(torch.Size(shape).numel() for shape in sizes()[way.size])
    stored, peak = held(step, count)
    ms, host = median_ms(step), host_ms(step)
    again = min(median_ms(step), ms)
    result = {"ms": again, "host_ms": host, "launches": launches(step), "first_s": first}
    del step
    gc.collect()
    copied = copy_bytes_per_s()
    of_copy = way.moved * count / copied * 1e3 / again
    result |= {"stored": stored, "peak": peak, "moved": way.moved, "of_copy": of_copy}
    return {**result, "parameters": count, "copy_tb_per_s": copied / 1e12}


def held(step: Step, count: int) -> tuple[float, float]:
    """Bytes a parameter between two steps, and at most within one."""
    if not CUDA:
        return 0.0, 0.0
    torch.cuda.reset_peak_memory_stats()
    stored = torch.cuda.memory_allocated()
    step()
    return stored / count, torch.cuda.max_memory_allocated() / count


def launches(step: Step) -> int:
    if not CUDA:
        return 0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages() if event.device_time_total)


COLUMNS = ("ms", "of_copy", "moved", "host_ms", "launches", "first_s", "stored", "peak")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="*", default=[""], help="ways that begin like this")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--add", action="store_true", help="keep what else is in the file")
    parser.add_argument("--one", help="measure this way here and print JSON")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, also on a CPU")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one)))
        return
    if not (CUDA or TINY):
        parser.error("needs a CUDA device; --tiny tries the script without one")
    print(f"{torch.cuda.get_device_name() if CUDA else 'CPU'}, torch {torch.__version__}")
    print(f"{'':42s}" + "".join(f"{column:>9s}" for column in COLUMNS))
    before = runs_of(args.out) if args.add else []
    rows: dict[str, Any] = {}
    for way in (way for way in WAYS if way.startswith(tuple(args.only))):
        command = [sys.executable, __file__, "--one", way, *(["--tiny"] if TINY else [])]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"{way:42s}  failed: {(done.stderr.strip().splitlines() or ['?'])[-1][:120]}")
            continue
        rows[way] = json.loads(done.stdout.splitlines()[-1])
        cells = "".join(f"{rows[way][column]:9.3f}" for column in COLUMNS)
        print(f"{way:42s}{cells}", flush=True)
        save(args.out, rows, peers=PEERS, onto=before)


if __name__ == "__main__":
    main()
