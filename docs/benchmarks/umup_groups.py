"""What groups cost: an AdamW step with one group, with those of umup, and with one a parameter.

A decoder of 12 layers, 111 tensors and 5 million parameters. Medians of interleaved rounds, in
every order; CPU, one thread, half a minute.

    python docs/benchmarks/umup_groups.py [--out FILE]
"""

from __future__ import annotations

import argparse
import time
from itertools import permutations
from pathlib import Path
from statistics import median
from typing import Any

import torch
from record import save

from mixprec import umup


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    numbers: dict[str, Any] = {}
    model = umup.Decoder(256, width=160, depth=12, seq_len=64, num_heads=4)
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    kind = torch.optim.AdamW
    params = list(model.parameters())
    groups = umup.param_groups(model, 1e-6, kind)
    print(
        f"{len(params)} tensors, {sum(p.numel() for p in params)} parameters, {len(groups)} groups"
    )
    numbers |= {"tensors": len(params), "groups": len(groups)}
    for options in ({"fused": True}, {"foreach": True}):
        every: dict[str, Any] = {
            "one": kind(params, lr=1e-6, **options),
            "umup": kind([dict(group) for group in groups], **options),
            "each": kind([{"params": [p]} for p in params], lr=1e-6, **options),
        }
        times: dict[str, list[float]] = {name: [] for name in every}
        for turn in range(60):
            order = list(permutations(every.items()))[turn % 6]
            for name, optimizer in order:
                begin = time.perf_counter()
                optimizer.step()
                times[name].append(time.perf_counter() - begin)
        found = {name: 1e3 * median(ts[6:]) for name, ts in times.items()}
        ratios = {name: ms / found["one"] for name, ms in found.items()}
        shown = ", ".join(f"{name} {ms:.2f} ms ({ratios[name]:.2f}x)" for name, ms in found.items())
        print(f"{next(iter(options))}: {shown}")
        numbers[next(iter(options))] = found
    save(args.out, numbers)


if __name__ == "__main__":
    main()
