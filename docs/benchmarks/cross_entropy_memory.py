"""Memory of linear_cross_entropy on a CPU, against full logits and against its formula.

Held: what the graph saves from forward to backward, by a saved-tensors hook. Peak: the most that a
forward pass, or forward and backward together, allocates on top of its inputs, from the allocator's
own events, with an FP32 weight gradient as `GradientAccumulator` keeps it. The formula, for 16-bit
inputs, with N tokens of which a chunk has C, width d and V classes, in bytes:

    4 C V + 2 C V    logits of a chunk and their rounded gradient
    4 V d            gradient of the weight
    2 N d            gradient of the hidden states
    4 V d            the weight in FP32: on a CPU only, which has no products of 16-bit numbers
                     with FP32 sums
    (4 + 4 + 2) C d  a chunk of hidden states and of their gradient

    python docs/benchmarks/cross_entropy_memory.py [--out FILE]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from peak_bytes import peak_bytes
from record import save
from torch import Tensor

from mixprec.cross_entropy import linear_cross_entropy

N, D, V = 4096, 256, 16_384

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def full_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")


def chunked(chunk_size: int, recompute: bool = False) -> Loss:
    def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return linear_cross_entropy(
            hidden, weight, targets, chunk_size=chunk_size, recompute=recompute
        )[0]

    return loss


def formula(chunk_size: int) -> int:
    return 6 * chunk_size * V + 8 * V * D + 2 * N * D + 10 * chunk_size * D


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=g).bfloat16().requires_grad_()
    weight = (torch.randn(V, D, generator=g) / D**0.5).bfloat16().requires_grad_()
    weight.grad_dtype = torch.float32
    return hidden, weight, torch.randint(V, (N,), generator=g)


def held(loss: Loss) -> int:
    """Bytes that the graph saves, the inputs themselves not counted."""
    sizes: dict[int, int] = {}
    tensors = inputs()
    given = {tensor.data_ptr() for tensor in tensors}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = loss(*tensors)
    del result
    return sum(sizes.values())


def report(label: str, loss: Loss, predicted: int | None) -> dict[str, object]:
    tensors = inputs()
    forward = peak_bytes(lambda: loss(*tensors))
    both = peak_bytes(lambda: loss(*tensors).backward())
    saved = held(loss) / (N * V)
    said = "" if predicted is None else f", by the formula {predicted / 2**20:6.1f} MiB"
    print(
        f"{label:22s} held {saved:5.2f} B/logit, peak {forward / 2**20:6.1f} MiB in "
        f"forward, {both / 2**20:6.1f} MiB with backward{said}"
    )
    if predicted is not None:
        assert 0.95 < both / predicted < 1.05
    return {"way": label, "held": saved, "forward": forward, "both": both}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"N={N} d={D} V={V}, BF16, full logits are {2 * N * V / 2**20:.0f} MiB in BF16")
    rows = [report("full logits", full_logits, None)]
    for size in (4096, 512, 128):
        rows.append(report(f"chunks of {size}", chunked(size), formula(size)))
    rows.append(report("chunks of 512, recompute", chunked(512, recompute=True), None))
    save(args.out, {"tokens": N, "width": D, "vocab": V, "rows": rows})


if __name__ == "__main__":
    main()
