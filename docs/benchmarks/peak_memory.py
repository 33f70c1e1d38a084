"""Bytes per parameter that a step of MixedPrecision holds and passes through, on a CPU.

Resident: weights, gradients, masters and moments, counted from the tensors themselves. Transient:
the most that a step allocates on top, from the allocator's own events. AdamW with `fused=True` over
10 million BF16 parameters; scratch is 8 bytes (split masters) or 4 (full ones) an element of the
largest bucket, which is the largest tensor if that exceeds `bucket_numel`. Full masters are rounded
to be compared with their weights, a tensor at a time: 2 bytes an element of the largest.

    python docs/benchmarks/peak_memory.py [--out FILE]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from peak_bytes import peak_bytes
from record import save
from torch import Tensor
from wrapper_overhead import parameters, shapes

import mixprec


def resident(optimizer: mixprec.MixedPrecision) -> int:
    """Bytes of weights, gradients and optimizer state."""
    tensors: list[Tensor] = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            tensors += [p, p.grad, *optimizer.state[p].values()]
    return sum(t.numel() * t.element_size() for t in tensors)


def report(label: str, optimizer: mixprec.MixedPrecision, scratch: int) -> dict[str, float]:
    for _ in range(2):
        optimizer.step()
    numel = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    held, passing = resident(optimizer), peak_bytes(optimizer.step)
    print(
        f"{label:28s} resident {held / numel:6.3f} B/param, transient {passing / 2**20:6.2f} MiB, "
        f"by the formula {scratch / 2**20:6.2f} MiB"
    )
    return {"resident": held / numel, "transient": passing, "formula": scratch}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, object]] = []
    largest = max(torch.Size(shape).numel() for shape in shapes())
    print(f"largest tensor {largest:,} elements, torch {torch.__version__}")
    for masters, each in (("split", 8), ("full", 4)):
        for bucket_numel in (2**18, 2**21):
            inner = torch.optim.AdamW(parameters(), lr=1e-3, fused=True)
            optimizer = mixprec.MixedPrecision(
                inner,
                masters=masters,  # pyright: ignore[reportArgumentType]
                bucket_numel=bucket_numel,
            )
            found = report(
                f"{masters}, bucket_numel={bucket_numel}",
                optimizer,
                each * largest_bucket(bucket_numel) + (2 * largest if masters == "full" else 0),
            )
            rows.append({"masters": masters, "bucket_numel": bucket_numel, **found})
    save(args.out, {"largest": largest, "rows": rows})


def largest_bucket(bucket_numel: int) -> int:
    """Elements of the fullest bucket that consecutive tensors fill."""
    fullest = used = 0
    for shape in shapes():
        numel = torch.Size(shape).numel()
        used = numel if used + numel > bucket_numel else used + numel
        fullest = max(fullest, used)
    return fullest


if __name__ == "__main__":
    main()
