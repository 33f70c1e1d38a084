"""What a watch costs: a training step without one, with one, and with one that samples.

    python docs/benchmarks/watch_cost.py [--rounds 15] [--threads 1] [--out FILE]

A stack of two-matrix blocks under AdamW, BF16 weights on a GPU, FP32 on a CPU; medians of
interleaved rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from record import save
from torch import Tensor, nn

import mixprec


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(self.norm(x))))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    width, tokens, depth = (4096, 16384, 4) if on_gpu else (256, 1024, 4)

    torch.manual_seed(0)
    model = nn.Sequential(*(Block(width) for _ in range(depth))).to(device, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    x = torch.randn(tokens, width, device=device, dtype=dtype)

    def step() -> None:
        model(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def seconds(every: int | None, steps: int = 10) -> float:
        report = mixprec.watch(model, every=every) if every else None
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            step()
        if on_gpu:
            torch.cuda.synchronize()
        taken = (time.perf_counter() - start) / steps
        if report is not None:
            report.stop()
        return taken

    choices = (None, 1, 10)
    times: dict[int | None, list[float]] = {every: [] for every in choices}
    for _ in range(args.rounds):
        for every in choices:
            times[every].append(seconds(every))
    base = statistics.median(times[None])
    name = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}: {depth} blocks, {tokens} x {width}, {dtype}")
    for every, each in times.items():
        middle = statistics.median(each)
        print(f"every={every or '-'}: {1e3 * middle:.1f} ms a step, {middle / base:.2f}x")
    numbers = {
        **{"blocks": depth, "tokens": tokens, "width": width, "dtype": str(dtype)},
        "ms": {str(every): 1e3 * statistics.median(each) for every, each in times.items()},
    }
    save(args.out, numbers)


if __name__ == "__main__":
    main()
