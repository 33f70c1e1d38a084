"""What a bare cast to FP8 turns into 0 before training: a standard decoder and a unit-scaled one.

Width 128, 4 layers, 2048 bytes of the texts that Python carries; the mean of the cross entropy for
the standard decoder, the sum for the unit-scaled one. Gradients that arrive at linear layers. CPU,
seconds.

    python docs/benchmarks/umup_flush.py [--out FILE]
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from record import save
from torch import Tensor, nn
from umup_transfer import StandardDecoder, text_batches

from mixprec import formats, umup
from mixprec.umup.checks.scales import flushed


def look(grads: dict[str, Tensor], name: str, _module: nn.Module, _x: object, y: Tensor) -> None:
    """Keep the gradient that arrives at `y`."""
    y.register_hook(lambda grad: grads.update({name: grad}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, list[list[float]]] = {}
    pairs = list(text_batches(8))
    tokens, targets = (torch.cat([pair[i] for pair in pairs]) for i in range(2))
    print("| | RMS of dy | E5M2 to 0 | E4M3 to 0 | RMS of dW |\n|---|---|---|---|---|")
    for unit in (False, True):
        torch.manual_seed(0)
        model: nn.Module = umup.Decoder(256, width=128, depth=4, seq_len=32, num_heads=2)
        model = model if unit else StandardDecoder(model)
        grads: dict[str, Tensor] = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(partial(look, grads, name))
        logits = model(tokens).flatten(0, 1)
        n = targets.numel()
        if unit:
            umup.losses.cross_entropy(logits, targets.flatten(), reduction="sum").backward()
        else:
            F.cross_entropy(logits, targets.flatten()).backward()
        weights = [p.grad for p in model.parameters() if p.ndim == 2 and p.grad is not None]
        factor = n**-0.5 if unit else 1.0
        columns = (
            [float(g.square().mean().sqrt()) for g in grads.values()],
            [100 * flushed(g, formats.E5M2) for g in grads.values()],
            [100 * flushed(g, formats.E4M3) for g in grads.values()],
            [factor * float(g.square().mean().sqrt()) for g in weights[1:]],
        )
        name = "unit-scaled" if unit else "standard"
        cells = (f"{min(c):.3g} to {max(c):.3g}" for c in columns)
        print(f"| {name} | {' | '.join(cells)} |")
        rows[name] = [[min(c), max(c)] for c in columns]
    save(args.out, rows)


if __name__ == "__main__":
    main()
