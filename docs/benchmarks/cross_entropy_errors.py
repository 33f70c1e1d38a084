"""Errors of linear_cross_entropy where a model has learnt: loss and gradients against FP64.

4,096 tokens of width 64, 1,024 classes with frequencies by Zipf's law, hidden states that point at
their class, so that the mean loss is 0.17. Relative by norm, on the same BF16 inputs. CPU, seconds.

    python docs/benchmarks/cross_entropy_errors.py [--out FILE]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from record import save
from torch import Tensor

from mixprec.cross_entropy import linear_cross_entropy

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def ours(logits_dtype: torch.dtype) -> Loss:
    return lambda h, w, y: linear_cross_entropy(h, w, y, logits_dtype=logits_dtype)[0]


def full_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")


def exactly(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight.T, targets, reduction="sum")


def results(loss: Loss, dtype: torch.dtype, wide: bool) -> list[Tensor]:
    """Loss and both gradients, in FP64."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(1024, 64, generator=g) / 8
    targets = torch.multinomial(1 / torch.arange(1.0, 1025), 4096, True, generator=g)
    hidden = torch.randn(4096, 64, generator=g) + 12 * weight[targets]
    leaves = [t.bfloat16().to(dtype).requires_grad_() for t in (hidden, weight)]
    if wide:
        leaves[1].grad_dtype = torch.float32
    value = loss(*leaves, targets)
    value.backward()
    return [value.detach().double(), *(leaf.grad.double() for leaf in leaves)]  # pyright: ignore


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    exact = results(exactly, torch.float64, False)
    ways: dict[str, tuple[Loss, bool]] = {
        "full logits": (full_logits, False),
        "ours, BF16 logits": (ours(torch.bfloat16), True),
        "ours, FP32 logits": (ours(torch.float32), True),
    }
    rows: dict[str, list[float]] = {}
    for name, (loss, wide) in ways.items():
        found = results(loss, torch.bfloat16, wide)
        rows[name] = [((a - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]
        print(
            f"{name:20s} loss {rows[name][0]:.1e}, dX {rows[name][1]:.1e}, dW {rows[name][2]:.1e}"
        )
    save(args.out, {"mean_loss": exact[0].item() / 4096, "rows": rows})


if __name__ == "__main__":
    main()
