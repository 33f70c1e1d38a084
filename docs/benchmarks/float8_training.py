"""Whether FP8 learns as BF16 does: the same decoder, bytes and seed, step by step.

Two decoders with SwiGLU and rotary positions, GPT-2's parametrisation and unit scaling, read the
Python source of the standard library and of torch. Each pair of runs differs in how linear layers
multiply and in nothing else: same initial weights, same batches, AdamW around FP32 masters, losses
summed over tokens and divided at the step. Compared is the mean training loss of the last steps.

    python docs/benchmarks/float8_training.py --curves DIR                # 100M, one GPU, minutes
    python docs/benchmarks/float8_training.py --size toy --out FILE       # 0.8M, CPU, minutes
    python docs/benchmarks/float8_training.py --quick                     # does it run at all
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from record import runs_of, save
from torch import Tensor, nn
from umup_transfer import StandardDecoder

import mixprec
from mixprec import umup
from mixprec.cli.curves import Curve, Picture, Stroke, draw_svg
from mixprec.cli.table import table
from mixprec.float8.casts.counters import FLUSHED, SATURATED, SEEN
from mixprec.float8.conversion import float8_layers
from mixprec.formats import BF16, FP32

EQUAL = 0.005
"""Share of the loss without FP8 within which a run has equalled it."""


@dataclass(frozen=True)
class Size:
    """Of the model, of a step and of the whole."""

    width: int
    depth: int
    mlp_width: int
    context: int
    rows: int
    micro_batches: int
    steps: int
    text_bytes: int
    lr: float
    unit_lr: float
    warm_up: float = 1 / 12
    """Share of the steps in which the learning rate rises."""
    max_grad_norm: float | None = None
    """Of the ordinary decoder; gradients of unit scale have norms of thousands."""
    last: int = 50
    """Steps whose losses are averaged in the end."""


SIZES = {
    # Clipped, and with a long warm-up: else two runs that differ in nothing end 2 to 13 % apart.
    "100m": Size(
        width=1024,
        depth=8,
        mlp_width=2816,
        context=1024,
        rows=16,
        micro_batches=1,
        steps=1200,
        text_bytes=2**26,
        lr=3e-4,
        unit_lr=2**-1,
        warm_up=1 / 3,
        max_grad_norm=1.0,
    ),
    # 128 wide, 3 blocks, 768 bytes a step: small enough for FP8 emulated on a CPU.
    "toy": Size(128, 3, 352, 64, 6, 2, 400, 2**22, lr=5e-4, unit_lr=2**-2),
}


@dataclass(frozen=True)
class Run:
    """One training: which decoder, how its linear layers multiply, what divides the loss."""

    name: str
    unit: bool
    recipe: str | None = None
    mean: bool = False
    """Whether gradients have the size of a mean over 2^18 tokens, or of a sum."""
    nudged: bool = False
    """Whether initial weights are off by 2^-6 of themselves: two runs that differ in nothing that
    matters end so far apart."""


RUNS = (
    Run("without FP8", False),
    Run("nudged", False, nudged=True),
    Run("adaptive", False, "adaptive"),
    Run("adaptive, mean loss", False, "adaptive", mean=True),
    Run("tensorwise", False, "tensorwise"),
    Run("rowwise", False, "rowwise"),
    Run("static", False, "static"),
    Run("without FP8, unit-scaled", True),
    Run("unit-scaled, nudged", True, nudged=True),
    Run("static, unit-scaled", True, "static"),
    Run("static, unit-scaled, mean loss", True, "static", mean=True),
    Run("adaptive, unit-scaled, mean loss", True, "adaptive", mean=True),
)
DEFAULT = ("without FP8", "adaptive", "without FP8, unit-scaled", "static, unit-scaled")


@dataclass
class Outcome:
    """What a run came to."""

    run: Run
    losses: list[float] = field(default_factory=list[float])
    num_parameters: int = 0
    converted: int = 0
    tokens_per_second: float = 0.0
    peak_gib: float = 0.0
    flushed: dict[str, float] = field(default_factory=dict[str, float])
    """Largest share of any layer in its last step that became 0, by operand."""
    saturated: dict[str, float] = field(default_factory=dict[str, float])

    def final(self, last: int) -> float:
        """Mean loss of the last steps."""
        tail = self.losses[-last:]
        return sum(tail) / len(tail)


# ------------------------------------------------------------------ text


def read_text(limit: int) -> Tensor:
    """Bytes of the `.py` files of the standard library and of torch, in order of name."""
    folders = [Path(sysconfig.get_path("stdlib")), Path(str(torch.__file__)).parent]
    text = bytearray()
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            if "site-packages" not in path.relative_to(folder).parts:
                text += path.read_bytes()
            if len(text) >= limit:
                break
    return torch.frombuffer(text[:limit], dtype=torch.uint8)


def micro_batches(
    text: Tensor, size: Size, seed: int, step: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Random windows of bytes and the byte after each, which follow from the number of the step."""
    generator = torch.Generator().manual_seed(1_000_000 * seed + step)
    shape = (size.micro_batches, size.rows, 1)
    starts = torch.randint(len(text) - size.context - 1, shape, generator=generator)
    windows = text[starts.to(text.device) + torch.arange(size.context + 1, device=text.device)]
    for window in windows.long():
        yield window[:, :-1], window[:, 1:]


# ------------------------------------------------------------------ one run


def make_model(run: Run, size: Size, seed: int) -> nn.Module:
    """A decoder whose weights follow from the seed."""
    torch.manual_seed(seed)
    decoder = umup.Decoder(
        256,
        width=size.width,
        depth=size.depth,
        seq_len=size.context,
        mlp_width=size.mlp_width,
    )
    model = decoder if run.unit else StandardDecoder(decoder)
    if run.nudged:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + 2**-6 * torch.randn_like(parameter))
    return model


def loss_of(model: nn.Module, run: Run, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the cross entropies and how many."""
    any_model: Any = model
    if run.unit:
        return any_model.loss(tokens, targets)
    decoder = any_model.inner
    return mixprec.linear_cross_entropy(decoder.hidden(tokens), decoder.readout.weight, targets)


def rate(size: Size, done: int) -> float:
    """Share of the learning rate: linear up in the first steps, half a cosine down to 0."""
    rise = min(1.0, (done + 1) / (size.steps * size.warm_up))
    return rise * (1 + math.cos(math.pi * done / size.steps)) / 2


def train(run: Run, size: Size, text: Tensor, seed: int, compile: bool) -> Outcome:
    device, on_gpu = text.device, text.is_cuda
    outcome = Outcome(run)
    model = make_model(run, size, seed).to(device)
    # Most CPUs are slow in BF16; there the rest of the model stays in FP32.
    params = BF16 if on_gpu else FP32
    if run.recipe is None:
        mixprec.Precision("bf16", params=params).convert(model)
    else:
        precision = mixprec.Precision("fp8", params=params, recipe=run.recipe)
        report = precision.convert(model, min_dim=min(1024, size.width))
        outcome.converted = len(getattr(report, "converted", ()))
    outcome.num_parameters = sum(param.numel() for param in model.parameters())
    options: dict[str, Any] = {"betas": (0.9, 0.95), "weight_decay": 0.0}
    groups: Any = (
        umup.param_groups(model, size.unit_lr, torch.optim.AdamW)
        if run.unit
        else model.parameters()
    )
    optimizer = mixprec.MixedPrecision(
        torch.optim.AdamW(groups, lr=size.lr, **options),
        max_grad_norm=None if run.unit else size.max_grad_norm,
    )
    num_tokens = size.micro_batches * size.rows * size.context
    presumed = 2**18 if run.mean else 1
    accumulator = mixprec.GradientAccumulator(optimizer, presumed_tokens=presumed)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(rate, size))
    if compile:
        layers: Any = model.get_submodule("layers" if run.unit else "inner.layers")
        for layer in layers:
            layer.compile()

    losses: list[Tensor] = []
    warm_up, began = min(20, size.steps // 2), 0.0
    for step in range(size.steps):
        if step == warm_up:
            _wait(device)
            began = time.perf_counter()
        for i, (tokens, targets) in enumerate(micro_batches(text, size, seed, step), start=1):
            loss = loss_of(model, run, tokens, targets)
            accumulator.backward(*loss, last=i == size.micro_batches)
        losses.append(accumulator.step())
        schedule.step()
    _wait(device)
    seconds = time.perf_counter() - began
    outcome.losses = torch.stack(losses).tolist()
    outcome.tokens_per_second = (size.steps - warm_up) * num_tokens / seconds
    if on_gpu:
        outcome.peak_gib = torch.cuda.max_memory_allocated() / 2**30
    _note_casts(model, outcome)
    return outcome


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _note_casts(model: nn.Module, outcome: Outcome) -> None:
    """What the casts of the last step lost, in the layer where it is most."""
    for _, layer in float8_layers(model):
        for name, operand in layer._float8.operands().items():
            last = operand.last.tolist()
            seen = max(last[SEEN], 1)
            for shares, counter in ((outcome.flushed, FLUSHED), (outcome.saturated, SATURATED)):
                shares[name] = max(shares.get(name, 0.0), last[counter] / seen)


# ------------------------------------------------------------------ what is said of it


def gap(outcome: Outcome, outcomes: list[Outcome], size: Size) -> float | None:
    """How far above the loss of the same model without FP8 a run has ended, as a share of it."""
    for other in outcomes:
        if is_reference(other.run) and other.run.unit == outcome.run.unit:
            reference = other.final(size.last)
            return None if other is outcome else outcome.final(size.last) / reference - 1
    return None


def results(outcomes: list[Outcome], size: Size, seed: int) -> dict[str, dict[str, Any]]:
    """Last losses, and the shares of dY and x that became zero, by decoder and run."""
    found: dict[str, dict[str, Any]] = {}
    for outcome in outcomes:
        unit = outcome.run.unit
        kind = f"unit-scaled, rate 2^{math.log2(size.unit_lr):g}" if unit else f"seed {seed}"
        way = outcome.run.name.replace("unit-scaled, nudged", "nudged").replace(", unit-scaled", "")
        row = {"loss": outcome.final(size.last), "flushed": outcome.flushed}
        found.setdefault(kind, {})[way] = row
    return found


def describe(outcomes: list[Outcome], size: Size) -> str:
    rows = [("run", "loss", "above", "", "dY to 0", "x to 0", "tokens/s", "GiB")]
    for outcome in outcomes:
        above = gap(outcome, outcomes, size)
        rows.append(
            (
                outcome.run.name,
                f"{outcome.final(size.last):.4f}",
                "" if above is None else f"{above:+.2%}",
                "" if above is None else ("equal" if abs(above) <= EQUAL else "NOT EQUAL"),
                *(
                    f"{outcome.flushed[name]:.1%}" if outcome.flushed else ""
                    for name in ("grad_output", "input")
                ),
                f"{outcome.tokens_per_second:,.0f}",
                f"{outcome.peak_gib:.1f}" if outcome.peak_gib else "",
            )
        )
    return table(rows)


WIDE = (Stroke("#b4bac3", "#6b7480", 8), Stroke("#8fd0b5", "#2f7d5e", 8))
THIN = (
    Stroke("#005083", "#9bd3f7", 1.8),
    Stroke("#aa3377", "#e58cc0", 1.8),
    Stroke("#d55e00", "#ff9a4d", 1.8),
    Stroke("#1f2328", "#f0f3f6", 1.4, "6 4"),
    Stroke("#0a6b4a", "#b6f0d8", 1.8),
)


def is_reference(run: Run) -> bool:
    """Whether others are compared with it."""
    return run.recipe is None and not run.nudged


def curves(outcomes: list[Outcome], size: Size) -> list[Curve]:
    """Losses averaged over blocks of steps, those without FP8 broad and below the others."""
    every = max(1, size.steps // 60)
    wide, thin = iter(WIDE), iter(THIN * 2)
    drawn: list[Curve] = []
    for outcome in sorted(outcomes, key=lambda outcome: not is_reference(outcome.run)):
        blocks = [outcome.losses[i : i + every] for i in range(0, size.steps, every)]
        above = gap(outcome, outcomes, size)
        final = f"{outcome.final(size.last):.4f}"
        drawn.append(
            Curve(
                outcome.run.name,
                [min((i + 1) * every, size.steps) for i in range(len(blocks))],
                [sum(block) / len(block) for block in blocks],
                next(wide if is_reference(outcome.run) else thin),
                value=final if above is None else f"{above:+.2%}",
            )
        )
    return drawn


def picture(outcomes: list[Outcome], size: Size, device: str) -> Picture:
    tokens = size.micro_batches * size.rows * size.context
    return Picture(
        title="FP8 learns what 16 bits learn",
        subtitle="Training loss, nats per byte. Numbers: the mean of the last "
        f"{size.last} steps, and the distance from the same without FP8.",
        x_label="optimizer steps",
        y_label="training loss, nats per byte",
        caption=(
            f"{outcomes[0].num_parameters:,} parameters, {size.steps} steps of {tokens:,} bytes of "
            "Python source, AdamW, one seed for all.",
            f"{device}; torch {torch.__version__}, mixprec {mixprec.__version__}.",
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--size", choices=SIZES, default="100m" if on_gpu else "toy")
    parser.add_argument("--steps", type=int, help="of each run")
    parser.add_argument("--rows", type=int, help="of a micro-batch")
    parser.add_argument("--micro-batches", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--unit-lr", type=float)
    parser.add_argument("--warm-up", type=float, help="share of the steps")
    parser.add_argument("--max-grad-norm", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", nargs="+", choices=[run.name for run in RUNS], default=DEFAULT)
    parser.add_argument("--all", action="store_true", help="every run there is")
    parser.add_argument("--compile", action="store_true", help="compile each layer")
    parser.add_argument("--quick", action="store_true", help="20 steps of the toy on a CPU")
    parser.add_argument("--curves", type=Path, help="folder for the curves and all numbers")
    parser.add_argument("--out", type=Path, help="the last losses alone")
    parser.add_argument("--add", action="store_true", help="keep what else is in the file")
    args = parser.parse_args()
    names = ("steps", "rows", "micro_batches", "lr", "unit_lr", "warm_up", "max_grad_norm")
    given = {name: getattr(args, name) for name in names}
    size = SIZES["toy" if args.quick else args.size]
    if args.quick:
        size = replace(size, steps=20, last=5, text_bytes=2**18)
    size = replace(size, **{name: value for name, value in given.items() if value})
    device = torch.device("cuda" if on_gpu and not args.quick else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    text = read_text(size.text_bytes).to(device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU, FP8 emulated"
    print(f"{size}\n{len(text):,} bytes, {name}, torch {torch.__version__}", flush=True)

    before = runs_of(args.out) if args.add else []
    outcomes: list[Outcome] = []
    for run in RUNS:
        if not (args.all or run.name in args.runs):
            continue
        if device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        outcomes.append(outcome := train(run, size, text, args.seed, args.compile))
        print(
            f"{run.name}: {outcome.final(size.last):.4f}, {outcome.converted} layers in FP8, "
            f"{time.perf_counter() - began:.0f} s",
            flush=True,
        )
        save(args.out, results(outcomes, size, args.seed), onto=before)
        if args.curves:  # after each run, in case the next is cut off
            args.curves.mkdir(parents=True, exist_ok=True)
            numbers = {"size": asdict(size), "device": name, "runs": [*map(asdict, outcomes)]}
            (args.curves / "float8_training.json").write_text(json.dumps(numbers, indent=1))
            svg = draw_svg(curves(outcomes, size), picture(outcomes, size, name))
            (args.curves / "float8_training.svg").write_text(svg, "utf-8")
    print("\n" + describe(outcomes, size))
    above = [gap(outcome, outcomes, size) for outcome in outcomes if outcome.run.name in DEFAULT]
    sys.exit(any(share is not None and abs(share) > EQUAL for share in above))


if __name__ == "__main__":
    main()
