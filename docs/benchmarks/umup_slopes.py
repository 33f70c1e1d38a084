"""How the change of each layer in one step depends on the width: ours, and rules of others.

Slopes of log2(RMS of the change of a parameter's own layer) over log2(width), widths 128 to 2048;
0 is wanted. "Others" are learning rates and multipliers of unit-scaling 0.3.5, written out: bias
inside the multiplier, one rule for embeddings and matrices. "fan_in^+1/2" is the exponent that it
had for SGD before. CPU, one thread, about two minutes.

    python docs/benchmarks/umup_slopes.py [--out FILE]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from record import save
from torch import Tensor, nn

from mixprec import umup
from mixprec.umup.checks.coordinates import check_coordinates

ROWS, VOCAB, CLASSES = 32, 64, 16
PARAMETERS = (
    *("embedding", "input W", "input b", "branch norm", "hidden W", "hidden b", "last hidden W"),
    *("last hidden b", "norm", "norm b", "readout W", "readout b"),
)
"""Those of `Model`, in order."""


class Lion(torch.optim.Optimizer):
    """Chen et al. 2023, arXiv:2302.06675, algorithm 2."""

    def __init__(self, params: Any, lr: float = 1e-4) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99)})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            fast, slow = group["betas"]
            for p in (p for p in group["params"] if p.grad is not None):
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                p.sub_(torch.sign(mean * fast + p.grad * (1 - fast)), alpha=group["lr"])
                mean.mul_(slow).add_(p.grad, alpha=1 - slow)


class Both(torch.optim.Optimizer):
    """Muon for hidden matrices and AdamW for the rest, stepped as one."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers
        super().__init__(
            [
                {"params": g["params"], "token_power": -0.5}
                for o in optimizers
                for g in o.param_groups
            ],
            {},
        )

    def step(self, closure: Any = None) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


class Model(nn.Module):
    """A parameter of every role: lookup and data go in, a stack of one branch is between."""

    def __init__(self, width: int, linear: type[nn.Linear], readout: type[nn.Linear]) -> None:
        super().__init__()
        L = umup.layers
        self.embedding = L.Embedding(VOCAB, width)
        self.input = linear(8, width, role="input") if linear is L.Linear else linear(8, width)
        self.layers = L.DepthModuleList([Branch(width, linear)])
        self.norm = L.LayerNorm(width)
        self.readout = readout(width, CLASSES)

    def forward(self, tokens: Tensor, data: Tensor) -> Tensor:
        x = umup.functional.add(self.embedding(tokens), self.input(data))
        for layer in self.layers:
            x = umup.functional.residual(layer, x, 1.0)
        return self.readout(self.norm(x))


class Branch(nn.Module):
    def __init__(self, width: int, linear: type[nn.Linear]) -> None:
        super().__init__()
        self.norm = umup.layers.RMSNorm(width)
        self.up, self.down = linear(width, 2 * width), linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(umup.functional.gelu(self.up(self.norm(x))))


class BiasInside(nn.Linear):
    """The bias is multiplied by fan_in^-power too."""

    power = 0.5

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        multiplier = self.in_features**-self.power
        bias = umup.scale_fwd(self.bias, multiplier)
        if self.power == 0.5:
            return umup.functional.linear(input, self.weight, bias)
        return umup.functional.linear_readout(input, self.weight, bias)


class ReadoutBiasInside(BiasInside):
    power = 1.0


def others(model: nn.Module, kind: Callable[..., Any], power: float = -0.5) -> Any:
    """fan_in^-1/2 for every matrix, an embedding's fan_in taken as its width; 1 for the rest."""
    groups = []
    for name, p in model.named_parameters():
        one = p.ndim < 2 or name.startswith("readout")
        multiplier = 1.0 if one else p.shape[1] ** power
        groups.append({"params": [p], "lr": 2**-6 * multiplier, "token_power": -0.5})
    return kind(groups)


def ours(kind: Any, factor: bool = True, **options: Any) -> Callable[[nn.Module], Any]:
    def make(model: nn.Module) -> Any:
        if kind is torch.optim.Muon:
            hidden = umup.param_groups(model, 2**-6, kind, roles={"hidden"}, **options)
            for group in hidden if not factor else ():
                group["lr"] = 2**-6
            rest = umup.param_groups(
                model, 2**-6, "adam", roles=umup.ROLES - {"hidden"}, embedding_rule="mup"
            )
            return Both(kind(hidden, weight_decay=0.0), torch.optim.AdamW(rest, weight_decay=0.0))
        extra = {"weight_decay": 0.0} if kind is torch.optim.AdamW else {}
        return kind(umup.param_groups(model, 2**-6, kind, embedding_rule="mup"), **extra)

    return make


def model_of(layers: tuple[type[nn.Linear], type[nn.Linear]], width: int) -> Model:
    return Model(width, *layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256, 512, 1024, 2048])
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--only", help="rules whose name contains this")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCAB, (ROWS,), generator=g)
    data, targets = torch.randn(ROWS, 8, generator=g), torch.randint(CLASSES, (ROWS,), generator=g)

    def loss(model: nn.Module) -> tuple[Tensor, int]:
        logits = model(tokens, data)
        return umup.losses.cross_entropy(logits, targets, reduction="sum"), ROWS

    L = umup.layers
    mine = (L.Linear, L.LinearReadout)
    theirs = (BiasInside, ReadoutBiasInside)
    runs: dict[str, tuple[Any, Any]] = {
        "SGD": (mine, ours(torch.optim.SGD)),
        "AdamW": (mine, ours(torch.optim.AdamW)),
        "Lion": (mine, ours(Lion)),
        "Muon": (mine, ours(torch.optim.Muon)),
        "Muon, match_rms_adamw": (mine, ours(torch.optim.Muon, adjust_lr_fn="match_rms_adamw")),
        "Muon without a factor": (mine, ours(torch.optim.Muon, factor=False)),
        "others' SGD": (theirs, lambda m: others(m, torch.optim.SGD)),
        "others' SGD, fan_in^+1/2": (
            theirs,
            lambda m: others(m, torch.optim.SGD, power=0.5),
        ),
        "others' AdamW": (
            theirs,
            lambda m: others(m, lambda g: torch.optim.AdamW(g, weight_decay=0.0)),
        ),
    }
    print("| rule | " + " | ".join(PARAMETERS) + " |\n|---|" + "---|" * len(PARAMETERS))
    numbers: dict[str, dict[str, float]] = {}
    for name, (layers, make_optimizer) in runs.items():
        if args.only and args.only not in name:
            continue
        report = check_coordinates(
            partial(model_of, layers),
            args.widths,
            loss,
            make_optimizer,
            seeds=range(args.seeds),
        )
        slopes = [found.slope for found in report.parameters.values()]
        print(f"| {name} | " + " | ".join(f"{slope:+.2f}" for slope in slopes) + " |", flush=True)
        numbers[name] = dict(zip(PARAMETERS, slopes, strict=True))
        save(args.out, numbers)


if __name__ == "__main__":
    main()
