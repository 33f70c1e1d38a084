"""Time of one optimizer step on a CPU: MixedPrecision against the same work written by hand.

10 million BF16 parameters in the shapes of a small decoder, AdamW with `fused=True`. By hand, a
step is what the wrapper promises: FP32 copies of the gradients, their norm and a check that it is
finite, the fused rule on FP32 masters, and weights copied back. The variants run interleaved, a
step each in turn; medians.

    python docs/benchmarks/wrapper_overhead.py [--rounds N] [--out FILE]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from record import save
from torch import Tensor, nn

import mixprec

WIDTH, LAYERS, VOCAB = 320, 6, 2048
SETTINGS: list[tuple[int, float | None]] = [(1, None), (2, None), (2, 1.0)]
"""Threads, and the norm that gradients are clipped to."""


def shapes() -> list[tuple[int, ...]]:
    """A decoder of 11 million parameters in 39 tensors."""
    layer = [(WIDTH,), (3 * WIDTH, WIDTH), (WIDTH, WIDTH), (WIDTH,), (8 * WIDTH, WIDTH)]
    return [(VOCAB, WIDTH), *[*layer, (WIDTH, 4 * WIDTH)] * LAYERS, (WIDTH,), (VOCAB, WIDTH)]


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(s, generator=generator).bfloat16()) for s in shapes()]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).bfloat16() * 0.01
    return params


def by_hand(max_grad_norm: float | None) -> Callable[[], None]:
    params = parameters()
    masters = [nn.Parameter(p.detach().float()) for p in params]
    rule = torch.optim.AdamW(masters, lr=1e-3, fused=True)
    grads = [torch.empty_like(m) for m in masters]

    @torch.no_grad()
    def step() -> None:
        low: list[Tensor] = [p.grad for p in params if p.grad is not None]
        torch._foreach_copy_(grads, low)
        norm = nn.utils.get_total_norm(grads)
        if not torch.isfinite(norm).item():
            return
        if max_grad_norm is not None:
            torch._foreach_mul_(grads, (max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        for m, g in zip(masters, grads, strict=True):
            m.grad = g
        rule.step()
        torch._foreach_copy_(params, masters)

    return step


def wrapped(masters: str, max_grad_norm: float | None) -> Callable[[], None]:
    inner = torch.optim.AdamW(parameters(), lr=1e-3, fused=True)
    optimizer = mixprec.MixedPrecision(inner, masters=masters, max_grad_norm=max_grad_norm)  # pyright: ignore[reportArgumentType]
    return optimizer.step


def medians(variants: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Milliseconds a step, all variants interleaved."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(3):
        for step in variants.values():
            step()
    for _ in range(rounds):
        for name, step in variants.items():
            begin = time.perf_counter()
            step()
            times[name].append(1e3 * (time.perf_counter() - begin))
    return {name: statistics.median(found) for name, found in times.items()}


def measure(threads: int, max_grad_norm: float | None, rounds: int) -> dict[str, float]:
    torch.set_num_threads(threads)
    variants = {
        "by hand": by_hand(max_grad_norm),
        "full": wrapped("full", max_grad_norm),
        "split": wrapped("split", max_grad_norm),
    }
    return medians(variants, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    count = sum(p.numel() for p in parameters())
    print(f"{count:,} parameters in {len(shapes())} tensors, torch {torch.__version__}")
    rows: list[dict[str, float | None]] = []
    for threads, max_grad_norm in SETTINGS:
        ms = measure(threads, max_grad_norm, args.rounds)
        rows.append({"threads": threads, "max_grad_norm": max_grad_norm, **ms})
        for name, value in ms.items():
            print(
                f"{threads} threads, norm {max_grad_norm}, {name:8s} {value:7.2f} ms  "
                f"{value / ms['by hand']:5.2f}x"
            )
    numbers = {"parameters": count, "tensors": len(shapes()), "rounds": args.rounds, "rows": rows}
    save(args.out, numbers)


if __name__ == "__main__":
    main()
