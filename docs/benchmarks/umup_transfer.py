"""Whether the best learning rate stays where it is from width 64 to 512: unit-scaled and standard.

An MLP that learns another's classes, and a decoder on bytes of the texts that Python carries, with
AdamW, SGD with momentum, and Muon (AdamW for what it does not take). "standard" is torch's own
initial values, or deviation 0.02 for the decoder as in GPT-2, and one learning rate for all. The
loss is a mean over the last fifth of the steps. CPU, one thread: minutes for the MLP, most of an
hour for the decoder.

    python docs/benchmarks/umup_transfer.py --task mlp [--out FILE [--add]]
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data import topics
from typing import Any

import torch
import torch.nn.functional as F
from record import runs_of, save
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Muon

from mixprec import umup

L = umup.layers
Batches = Callable[[int], Iterator[tuple[Tensor, Tensor]]]


# ------------------------------------------------------------------ tasks


def mlp_batches(steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """256 points in 32 dimensions, and the classes that a fixed random network gives them."""
    g = torch.Generator().manual_seed(123)
    first, second = torch.randn(32, 64, generator=g) / 32**0.5, torch.randn(64, 10, generator=g)
    for _ in range(steps):
        x = torch.randn(256, 32, generator=g)
        yield x, (torch.tanh(2 * x @ first) @ second).argmax(1)


def text_batches(steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """8 windows of 32 bytes, and the next byte of each."""
    text = "\n".join(topics.topics[name] for name in sorted(topics.topics)).encode()
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    g = torch.Generator().manual_seed(123)
    for _ in range(steps):
        starts = torch.randint(len(data) - 33, (8, 1), generator=g)
        window = data[starts + torch.arange(33)]
        yield window[:, :-1], window[:, 1:]


def unit_mlp(width: int) -> nn.Module:
    act = umup.layers.GELU
    return nn.Sequential(
        L.Linear(32, width, role="input"),
        act(),
        L.Linear(width, width),
        act(),
        L.Linear(width, width),
        act(),
        L.LinearReadout(width, 10),
    )


def standard_mlp(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(32, width),
        nn.GELU(),
        nn.Linear(width, width),
        nn.GELU(),
        nn.Linear(width, width),
        nn.GELU(),
        nn.Linear(width, 10),
    )


def unit_decoder(width: int) -> nn.Module:
    return umup.Decoder(
        256, width=width, depth=2, seq_len=32, num_heads=width // 32, mlp_width=2 * width
    )


def standard_decoder(width: int) -> nn.Module:
    return StandardDecoder(unit_decoder(width))


class StandardDecoder(nn.Module):
    """The same layers with no multipliers, GPT-2's deviations, logits q.k / head_dim^1/2."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.inner: Any = decoder
        for name, module in list(decoder.named_modules()):
            if isinstance(module, L.Linear | L.LinearReadout):
                parent, _, local = name.rpartition(".")
                plain: Any = nn.Linear(module.in_features, module.out_features, bias=False)
                plain.output_multiplier = 1.0
                setattr(decoder.get_submodule(parent), local, plain)
        branches = 2 * len(self.inner.layers)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                end = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / (branches**0.5 if end else 1.0))
        for layer in self.inner.layers:
            layer.attention.logit_multiplier = layer.attention.head_dim**-0.5

    def forward(self, tokens: Tensor) -> Tensor:
        return self.inner(tokens)


# ------------------------------------------------------------------ training


def unit_optimizers(model: nn.Module, kind: Any, lr: float) -> list[torch.optim.Optimizer]:
    if kind is Muon:
        hidden = umup.param_groups(model, lr, Muon, roles={"hidden"})
        rest = umup.param_groups(model, lr, AdamW, roles=umup.ROLES - {"hidden"})
        return [Muon(hidden, weight_decay=0.0), AdamW(rest, weight_decay=0.0)]
    options = {"momentum": 0.9} if kind is SGD else {}
    return [kind(umup.param_groups(model, lr, kind), weight_decay=0.0, **options)]


def standard_optimizers(model: nn.Module, kind: Any, lr: float) -> list[torch.optim.Optimizer]:
    named = dict(model.named_parameters())
    if kind is not Muon:
        options = {"momentum": 0.9} if kind is SGD else {}
        return [kind(named.values(), lr=lr, weight_decay=0.0, **options)]
    # Muon's orthogonal updates of RMS width^-1/2 beside AdamW's of RMS 1: a tenth of the rate.
    last = list(named)[-2:]
    edges = [n for n, p in named.items() if p.ndim != 2 or n in last or n.startswith("0.")]
    edges += [n for n in named if "embedding" in n or "readout" in n]
    hidden = [p for n, p in named.items() if n not in edges]
    rest = [p for n, p in named.items() if n in edges]
    return [Muon(hidden, lr=lr, weight_decay=0.0), AdamW(rest, lr=lr / 10, weight_decay=0.0)]


def trained(
    make_model: Callable[[int], nn.Module],
    make_optimizers: Callable[..., list[torch.optim.Optimizer]],
    kind: Any,
    batches: Batches,
    steps: int,
    seeds: int,
) -> Callable[[int, float], float]:
    unit = make_optimizers is unit_optimizers

    def train(width: int, lr: float) -> float:
        total = 0.0
        for seed in range(seeds):
            torch.manual_seed(seed)
            model = make_model(width)
            optimizers = make_optimizers(model, kind, lr)
            losses: list[float] = []
            for x, y in batches(steps):
                logits = model(x).flatten(0, -2)
                if unit:
                    loss_sum = umup.losses.cross_entropy(logits, y.flatten(), reduction="sum")
                    (loss_sum * y.numel() ** -0.5).backward()
                    losses.append(loss_sum.item() / y.numel())
                else:
                    loss = F.cross_entropy(logits, y.flatten())
                    loss.backward()
                    losses.append(loss.item())
                if not losses[-1] < 20:
                    return float("inf")
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
            tail = losses[-(steps // 5) :]
            total += sum(tail) / len(tail) / seeds
        return total

    return train


# Exponents of the learning rates that are tried: unit-scaled, standard.
SWEEPS: dict[tuple[str, str], tuple[range, range]] = {
    ("mlp", "AdamW"): (range(-6, 2), range(-13, -3)),
    ("mlp", "SGD"): (range(-14, -5), range(-7, 2)),
    ("mlp", "Muon"): (range(-7, 1), range(-10, 0)),
    ("decoder", "AdamW"): (range(-5, 2), range(-13, -5)),
    ("decoder", "SGD"): (range(-13, -5), range(-11, 0)),
    ("decoder", "Muon"): (range(-7, 1), range(-9, -1)),
}
NAMES = {"SGD": "SGD, momentum 0.9"}
OPTIMIZERS = {"AdamW": AdamW, "SGD": SGD, "Muon": Muon}


def summary(report: umup.TransferReport) -> dict[str, Any]:
    """Best rates, as powers of two, and the loss of the widest with the rate of the narrowest."""
    exponents = [math.log2(rate) for rate in report.best.values()]
    widest = list(report.losses.values())[-1]
    first, *_, last = report.best.values()
    return {
        "best": [round(e) for e in exponents],
        "octaves": round(report.drift),
        "loss": widest[first],
        "own": widest[last],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=("mlp", "decoder"), default="mlp")
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--steps", type=int, default=0, help="200 for the MLP, 60 for the decoder")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--pictures", type=Path, help="folder for them")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--add", action="store_true", help="keep what else is in the file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    mlp = args.task == "mlp"
    steps = args.steps or (200 if mlp else 60)
    batches = mlp_batches if mlp else text_batches
    kinds: list[tuple[str, Any, Any]] = [
        ("unit-scaled", unit_mlp if mlp else unit_decoder, unit_optimizers),
        ("standard", standard_mlp if mlp else standard_decoder, standard_optimizers),
    ]
    before = runs_of(args.out) if args.add else []
    numbers: dict[str, Any] = {}
    for name in args.optimizers:
        for (what, make_model, make_optimizers), exponents in zip(
            kinds, SWEEPS[args.task, name], strict=True
        ):
            begin = time.time()
            train = trained(
                make_model, make_optimizers, OPTIMIZERS[name], batches, steps, args.seeds
            )
            report = umup.check_transfer(train, args.widths, [2.0**e for e in exponents])
            title = f"{args.task}, {name}, {what}"
            print(f"{title} ({steps} steps, {args.seeds} seeds, {time.time() - begin:.0f} s)")
            print(f"{report}\n", flush=True)
            task = "MLP" if mlp else "decoder"
            numbers[f"{task}; {NAMES.get(name, name)}; {what}"] = summary(report)
            save(args.out, numbers, onto=before)
            if args.pictures:
                file = f"umup-{args.task}-{name}-{what}.svg".lower()
                (args.pictures / file).write_text(report.svg(title))


if __name__ == "__main__":
    main()
