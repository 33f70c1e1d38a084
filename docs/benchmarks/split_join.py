"""Time of `formats.split` and `formats.join` against one BF16 `copy_`, on one CPU thread.

python docs/benchmarks/split_join.py [--out FILE]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from record import save

from mixprec import formats


def microseconds(work: Callable[[], object]) -> float:
    """Best of 20 batches of 20 calls."""
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(20):
            work()
        best = min(best, time.perf_counter() - start)
    return best / 20 * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, float]] = []
    generator = torch.Generator().manual_seed(0)
    print("elements  bf16 copy_      split       join   (microseconds)")
    for exponent in (12, 14, 16, 17, 18, 20):
        fp32 = torch.randn(2**exponent, generator=generator)
        bf16, int16 = formats.split(fp32)
        out, scratch = torch.empty_like(fp32), torch.empty_like(fp32, dtype=torch.int32)
        times = [
            microseconds(partial(bf16.copy_, fp32)),
            microseconds(partial(formats.split, fp32, out=(bf16, int16), scratch=scratch)),
            microseconds(partial(formats.join, bf16, int16, out=out, scratch=scratch)),
        ]
        print(f"{'2^' + str(exponent):>8}" + "".join(f"{each:12.1f}" for each in times))
        rows.append(
            {"exponent": exponent, **dict(zip(("copy", "split", "join"), times, strict=True))}
        )
    save(args.out, {"rows": rows})


if __name__ == "__main__":
    main()
