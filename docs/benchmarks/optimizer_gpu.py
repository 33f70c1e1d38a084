"""Time and memory of an optimizer step on a GPU: MixedPrecision, its peers, and the copy speed.

    python docs/benchmarks/optimizer_gpu.py [--out FILE] [--only NAME ...]

1.104e9 BF16 parameters in the 147 tensors of a Llama-like decoder, unless a row says otherwise.
Every way runs in a process of its own, so that its peak is its own; a device copy is timed in each,
and "of copy" compares the bytes that a step has to move with what that copy moves in the same time.
Medians of CUDA events around five steps at a time, with gradients in place, so that the device is
never idle unless the host is slower than it; "host" is the time of a call that finds it idle.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import mixprec

Step = Callable[[], Any]


def decoder_shapes(
    layers: int = 16, width: int = 2048, vocab: int = 32000
) -> list[tuple[int, ...]]:
    """A decoder with grouped queries and a gated MLP of four times its width."""
    layer = [(width, width), (width // 4, width), (width // 4, width), (width, width)]
    layer += [(4 * width, width), (4 * width, width), (width, 4 * width), (width,), (width,)]
    return [(vocab, width), *layer * layers, (width,), (vocab, width)]


SHAPES = {
    "M": decoder_shapes(),
    "S": decoder_shapes(12, 768, 16000),
    "T": [(64, 64)] * 2000,
    "X": decoder_shapes(4, 512, 4096),
}


def parameters(shapes: str, dtype: torch.dtype = torch.bfloat16) -> list[nn.Parameter]:
    torch.manual_seed(0)
    params = [
        nn.Parameter((torch.randn(s, device="cuda") * 0.02).to(dtype)) for s in SHAPES[shapes]
    ]
    for p in params:
        p.grad = (torch.randn(p.shape, device="cuda") * 1e-3).to(dtype)
    return params


def median_ms(step: Step, rounds: int = 12, steps: int = 5) -> float:
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
        torch.cuda.synchronize()
        begin = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times)


def copy_bytes_per_s() -> float:
    """Bytes read and written by a copy of 2 GB."""
    source = torch.randn(500_000_000, device="cuda")
    target = torch.empty_like(source)
    for _ in range(3):
        target.copy_(source)
    return 2 * source.numel() * 4 / median_ms(lambda: target.copy_(source)) * 1e3


# ---------------------------------------- ways


def ours(rule: Callable[[Any], Any], shapes: str = "M", **options: Any) -> Callable[[], Step]:
    def make() -> Step:
        params = parameters(shapes)
        inner = rule([p for p in params if p.ndim == 2] if shapes == "X" else params)
        if callable(train := getattr(inner, "train", None)):
            train()
        optimizer = mixprec.MixedPrecision(inner, **options)
        return optimizer.step

    return make


def adamw(params: Any, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-3, **options)


def bare(dtype: torch.dtype) -> Callable[[], Step]:
    return lambda: adamw(parameters("M", dtype), fused=True).step


def classic() -> Step:
    """FP32 masters by hand: gradients copied up, the fused rule, weights copied down."""
    params = parameters("M")
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


def flashoptim(**options: Any) -> Callable[[], Step]:
    def make() -> Step:
        from flashoptim import FlashAdamW  # pyright: ignore

        return FlashAdamW(parameters("M"), lr=1e-3, **options).step

    return make


def optimi() -> Step:
    from optimi import AdamW  # pyright: ignore

    return AdamW(parameters("M"), lr=1e-3, kahan_sum=True, triton=True).step


def torchao() -> Step:
    from torchao.optim import AdamW8bit  # pyright: ignore

    lr: Any = torch.tensor(1e-3)
    return AdamW8bit(parameters("M"), lr=lr, bf16_stochastic_round=True).step


def heavyball() -> Step:
    import heavyball  # pyright: ignore

    params = parameters("M")
    grads = [p.grad for p in params]
    optimizer = heavyball.AdamW(params, lr=1e-3)

    def step() -> None:
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        optimizer.step()

    return step


def third(package: str, name: str, **options: Any) -> Callable[[Any], Any]:
    def build(params: Any) -> Any:
        module = __import__(package, fromlist=[name])
        return getattr(module, name)(params, **options)

    return build


def torch_rule(name: str, **options: Any) -> Callable[[Any], Any]:
    return lambda params: getattr(torch.optim, name)(params, **{"lr": 1e-3, **options})


UNGUARDED = {"on_nonfinite": "ignore"}

# Bytes that a step must move: weight, remainder and states read and written, the gradient read.
WAYS: dict[str, tuple[Callable[[], Step], float]] = {
    "ours, FP32 states": (ours(adamw), 28),
    "ours, FP32 states, unguarded": (ours(adamw, **UNGUARDED), 26),
    "ours, FP32 states, clipped": (ours(adamw, max_grad_norm=1.0), 28),
    "ours, BF16 states, unguarded": (ours(adamw, state_formats="bf16", **UNGUARDED), 18),
    "ours, 8-bit states, unguarded": (ours(adamw, state_formats="8bit", **UNGUARDED), 14.25),
    "ours, 8-bit states": (ours(adamw, state_formats="8bit"), 16.25),
    "ours, full masters, unguarded": (ours(adamw, masters="full", **UNGUARDED), 30),
    "ours, bucket by bucket": (ours(adamw, fused=False), 26),
    "torch fused, FP32 parameters": (bare(torch.float32), 28),
    "torch fused, BF16, no masters": (bare(torch.bfloat16), 14),
    "classic FP32 masters": (classic, 28),
    "flashoptim 32-bit, 8-bit states": (flashoptim(master_weight_bits=32), 14.25),
    "flashoptim 32-bit, BF16 states": (flashoptim(master_weight_bits=32, quantize=False), 18),
    "optimi Kahan, BF16 states": (optimi, 18),
    "torchao 8-bit, no masters": (torchao, 10.1),
    "heavyball, BF16": (heavyball, 14),
    "S 124M: ours": (ours(adamw, "S", **UNGUARDED), 26),
    "T 2000 x 4096: ours": (ours(adamw, "T", **UNGUARDED), 26),
    "T 2000 x 4096: ours, guarded": (ours(adamw, "T"), 28),
    "Lion": (ours(third("pytorch_optimizer", "Lion", lr=1e-4), **UNGUARDED), 18),
    "SGD": (ours(torch_rule("SGD"), **UNGUARDED), 10),
    "SGD momentum": (ours(torch_rule("SGD", momentum=0.9), **UNGUARDED), 18),
    "SGD Nesterov": (ours(torch_rule("SGD", momentum=0.9, nesterov=True), **UNGUARDED), 18),
    "Adam amsgrad": (ours(torch_rule("Adam", amsgrad=True), **UNGUARDED), 34),
    "NAdam": (ours(torch_rule("NAdam"), **UNGUARDED), 26),
    "RAdam": (ours(torch_rule("RAdam"), **UNGUARDED), 26),
    "RMSprop": (ours(torch_rule("RMSprop"), **UNGUARDED), 18),
    "Adagrad": (ours(torch_rule("Adagrad"), **UNGUARDED), 18),
    "Adamax": (ours(torch_rule("Adamax"), **UNGUARDED), 26),
    "Adadelta": (ours(torch_rule("Adadelta"), **UNGUARDED), 26),
    "ASGD": (ours(torch_rule("ASGD"), **UNGUARDED), 14),
    "Adan": (ours(third("pytorch_optimizer", "Adan"), **UNGUARDED), 42),
    "AdaBelief": (ours(third("pytorch_optimizer", "AdaBelief"), **UNGUARDED), 26),
    "ADOPT": (ours(third("pytorch_optimizer", "ADOPT"), **UNGUARDED), 26),
    "AdEMAMix": (ours(third("pytorch_optimizer", "AdEMAMix"), **UNGUARDED), 34),
    "MARS": (ours(third("pytorch_optimizer", "MARS"), **UNGUARDED), 34),
    "schedule-free AdamW": (ours(third("schedulefree", "AdamWScheduleFree"), **UNGUARDED), 26),
    "LAMB": (ours(third("pytorch_optimizer", "Lamb"), **UNGUARDED), 26),
    "Adafactor (tier 2)": (ours(torch_rule("Adafactor"), **UNGUARDED), 10),
    "X 13M: Adafactor (tier 2)": (ours(torch_rule("Adafactor"), "X"), 10),
    "X 13M: Muon (tier 2)": (ours(torch_rule("Muon"), "X"), 18),
    "X 13M: SOAP (tier 2)": (ours(third("pytorch_optimizer", "SOAP"), "X"), 26),
    "X 13M: Shampoo (tier 2)": (ours(third("pytorch_optimizer", "ScalableShampoo"), "X"), 26),
}


def measure(name: str) -> dict[str, Any]:
    make, moved = WAYS[name]
    step = make()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    step()
    torch.cuda.synchronize()
    first = time.perf_counter() - begin
    for _ in range(8):
        step()
    torch.cuda.synchronize()
    gc.collect()
    count = sum(math.prod(s) for s in SHAPES[name[0] if name[1:2] == " " else "M"])
    torch.cuda.reset_peak_memory_stats()
    stored = torch.cuda.memory_allocated() / count
    step()
    peak = torch.cuda.max_memory_allocated() / count
    ms, host = median_ms(step), host_ms(step)
    again = min(median_ms(step), ms)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    launches = sum(event.count for event in profile.key_averages() if event.device_time_total)
    result = {"ms": again, "host_ms": host, "first_s": first, "stored": stored, "peak": peak}
    del step
    gc.collect()
    torch.cuda.empty_cache()
    of_copy = moved * count / copy_bytes_per_s() * 1e3 / again
    return {**result, "moved": moved, "of_copy": of_copy, "launches": launches}


COLUMNS = ("ms", "of_copy", "moved", "host_ms", "launches", "first_s", "stored", "peak")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="*", default=list(WAYS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", help="measure this way here and print JSON")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one)))
        return
    name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}, copy {copy_bytes_per_s() / 1e12:.2f} TB/s")
    print(f"{'':36s}" + "".join(f"{column:>9s}" for column in COLUMNS))
    rows: dict[str, Any] = {"device": name, "torch": torch.__version__}
    chosen = [way for way in WAYS if any(way.startswith(prefix) for prefix in args.only)]
    for way in chosen:
        command = [sys.executable, __file__, "--one", way]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"{way:36s}  failed: {(done.stderr.strip().splitlines() or ['?'])[-1][:120]}")
            continue
        rows[way] = json.loads(done.stdout.splitlines()[-1])
        cells = "".join(f"{rows[way][column]:9.3f}" for column in COLUMNS)
        print(f"{way:36s}{cells}", flush=True)
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
