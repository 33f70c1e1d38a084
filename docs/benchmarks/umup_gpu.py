"""Unit scaling on one GPU: what it costs, whether it is exact, and whether learning rates transfer.

    python docs/benchmarks/umup_gpu.py [--out FILE]   everything, about six minutes on one H200
    python docs/benchmarks/umup_gpu.py --tiny         the same at toy size on a CPU
    python docs/benchmarks/umup_gpu.py --only transfer --losses DIR --widths 128
                                                      one width of the third part; several at a time
                                                      keep a GPU busy, and a last run shows them all

1. Unit-scaled linear and MLP against torch.nn.functional, BF16, forward and backward, eager and
   compiled: medians of interleaved rounds, on a device that has work already, as in a model, and on
   an idle one, where the host's time until the first kernel counts too.
2. Their errors against FP64, beside those of plain BF16.
3. A byte-level decoder on the sources of Python's own library, AdamW, TF32: the best learning rate
   at widths 128 to 1024, unit-scaled and standard, two seeds.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable
from operator import truediv
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from record import runs_of, save
from torch import Tensor, nn
from umup_transfer import StandardDecoder, summary

from mixprec import umup
from mixprec.umup import functional as U
from mixprec.umup.checks.transfer import TransferReport

# ------------------------------------------------------------------ 1. overhead


def plain_linear(x: Tensor, weights: list[Tensor]) -> Tensor:
    return F.linear(x, weights[0])


def unit_linear(x: Tensor, weights: list[Tensor]) -> Tensor:
    return U.linear(x, weights[0])


def plain_bias(x: Tensor, weights: list[Tensor]) -> Tensor:
    return F.linear(x, weights[0], weights[3])


def unit_bias(x: Tensor, weights: list[Tensor]) -> Tensor:
    return U.linear(x, weights[0], weights[3])


def plain_mlp(x: Tensor, weights: list[Tensor]) -> Tensor:
    gate, up, down = weights[:3]
    return F.linear(F.linear(x, up) * F.silu(F.linear(x, gate)), down)


def unit_mlp(x: Tensor, weights: list[Tensor]) -> Tensor:
    gate, up, down = weights[:3]
    h = U.linear(x, up, constraint=None) * F.silu(U.linear(x, gate, constraint=None))
    return U.linear(h, down, constraint=None, multiplier=1.682)


PAIRS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "linear": (plain_linear, unit_linear),
    "linear with bias": (plain_bias, unit_bias),
    "SwiGLU": (plain_mlp, unit_mlp),
}


def operands(rows: int, width: int, device: str) -> tuple[Tensor, list[Tensor]]:
    g = torch.Generator().manual_seed(0)
    shapes = [(4 * width, width), (4 * width, width), (width, 4 * width), (4 * width,)]
    x, *weights = (torch.randn(s, generator=g) for s in [(rows, width), *shapes])
    leaves = [t.to(device, torch.bfloat16).requires_grad_() for t in (x, *weights)]
    return leaves[0], leaves[1:]


def timed(call: Callable[[], None], device: str, *, busy: bool) -> float:
    """Milliseconds of a call on an idle device, or of each of four on one that has work already."""
    calls = 4 if busy else 1
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return 1e3 * (time.perf_counter() - start) / calls
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if busy:
        torch.cuda._sleep(4_000_000)  # 2 ms
    begin.record()
    for _ in range(calls):
        call()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / calls


def overhead(
    device: str, sizes: list[tuple[int, int]], rounds: int
) -> dict[str, list[list[float]]]:
    """Ratios on a busy and on an idle device, for each size eager and compiled, by operation."""
    ratios: dict[str, list[list[float]]] = {}
    print(
        "| | rows x width | plain ms | unit ms | ratio | idle device |\n|---|---|---|---|---|---|"
    )
    for rows, width in sizes:
        for name, pair in PAIRS.items():
            for mode in ("eager", "compiled"):
                x, weights = operands(rows, width, device)
                calls: list[Callable[[], None]] = []
                torch._dynamo.reset()
                for function in pair:
                    run = torch.compile(function) if mode == "compiled" else function
                    dy = torch.randn_like(run(x, weights))

                    def call(
                        run: Any = run, x: Tensor = x, ws: Any = weights, dy: Any = dy
                    ) -> None:
                        used = [w for w in (x, *ws) if w.requires_grad]
                        torch.autograd.grad(run(x, ws), used, dy, allow_unused=True)

                    for _ in range(5):
                        call()
                    calls.append(call)
                times = {
                    busy: rounds_of(calls, device, rounds, busy=busy) for busy in (True, False)
                }
                plain, unit = map(median, times[True])
                busy, idle = (median(map(truediv, t[1], t[0])) for t in times.values())
                ratios.setdefault(name, []).append([busy, idle])
                print(
                    f"| {name}, {mode} | {rows} x {width} | {plain:.3f} | {unit:.3f} | "
                    f"{busy:.3f}{'' if busy <= 1.02 else ' (over 1.02)'} | {idle:.3f} |",
                    flush=True,
                )
    return ratios


def rounds_of(
    calls: list[Callable[[], None]], device: str, rounds: int, *, busy: bool
) -> tuple[list[float], ...]:
    """Milliseconds of each call, round by round, the order reversed from one to the next."""
    times: tuple[list[float], ...] = tuple([] for _ in calls)
    for number in range(rounds):
        for place in range(len(calls))[:: 1 if number % 2 else -1]:
            times[place].append(timed(calls[place], device, busy=busy))
    return times


# ------------------------------------------------------------------ 2. errors


def errors(device: str, rows: int, width: int) -> dict[str, dict[str, float]]:
    """Output and gradients against FP64, relative by norm; plain BF16 with multipliers by hand."""
    x, weights = operands(rows, width, device)
    gate, bias = weights[0], weights[3]
    a = width**-0.5
    dy = torch.randn(rows, 4 * width, generator=torch.Generator().manual_seed(1))
    dy = dy.to(device, torch.bfloat16)
    wide = [t.detach().double() for t in (x, gate, bias)]
    exact = [
        a * wide[0] @ wide[1].T + wide[2],
        a * dy.double() @ wide[1],
        dy.double().T @ wide[0],
    ]
    y = U.linear(x, gate, bias)
    ours = [y, *torch.autograd.grad(y, (x, gate), dy)]
    # scale_fwd and scale_bwd around the product, as a library of single operations has to.
    scaled = umup.scale_fwd(F.linear(umup.scale_bwd(x, a), gate), a) + bias
    plain = [scaled, *torch.autograd.grad(scaled, (x, gate), dy)]
    names = ("output", "input gradient", "weight gradient")
    print("| | ours | multipliers by themselves |\n|---|---|---|")
    by_way: dict[str, dict[str, float]] = {"ours": {}, "apart": {}}
    for name, right, one, other in zip(names, exact, ours, plain, strict=True):
        found = [float((t.detach().double() - right).norm() / right.norm()) for t in (one, other)]
        print(f"| {name} | {found[0]:.2e} | {found[1]:.2e} |")
        assert found[0] <= 1.02 * found[1], f"{name}: ours {found[0]}, theirs {found[1]}"
        by_way["ours"][name], by_way["apart"][name] = found
    return by_way


# ------------------------------------------------------------------ 3. transfer


def text() -> Tensor:
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    joined = b"\n".join(file.read_bytes() for file in files)
    return torch.frombuffer(bytearray(joined), dtype=torch.uint8).long()


def trained(
    width: int, lr: float, *, unit: bool, seed: int, data: Tensor, args: argparse.Namespace
) -> float:
    """Mean loss over the last fifth of the steps; infinite if it diverged."""
    torch.manual_seed(seed)
    device = data.device
    with device:
        decoder = umup.Decoder(
            256, width=width, depth=4, seq_len=args.time, num_heads=width // args.head
        )
        model: nn.Module = decoder if unit else StandardDecoder(decoder)
    kind = torch.optim.AdamW
    groups: Any = umup.param_groups(model, lr, kind) if unit else model.parameters()
    optimizer = kind(
        groups, lr=lr, weight_decay=0.0, betas=(0.9, 0.95), fused=device.type == "cuda"
    )
    g = torch.Generator().manual_seed(seed)
    tokens = args.batch * args.time
    losses: list[Tensor] = []
    starts = torch.randint(len(data) - args.time - 1, (args.steps, args.batch, 1), generator=g)
    offsets = torch.arange(args.time + 1, device=device)
    starts = starts.to(device)
    warmup = max(args.steps // 20, 1)
    for step in range(args.steps):
        for group in optimizer.param_groups:
            peak = lr * group.get("lr_multiplier", 1.0)
            group["lr"] = peak * min(1.0, (step + 1) / warmup)
        window = data[starts[step] + offsets]
        logits, targets = model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten()
        if unit:
            loss_sum = umup.losses.cross_entropy(logits, targets, reduction="sum")
            (loss_sum * tokens**-0.5).backward()
            losses.append(loss_sum.detach() / tokens)
        else:
            loss = F.cross_entropy(logits, targets)
            loss.backward()
            losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    tail = torch.stack(losses[-max(args.steps // 5, 1) :]).mean().item()
    return tail if math.isfinite(tail) and tail < 20 else math.inf


def remembered(
    exponent: int, width: int, *, unit: bool, seed: int, data: Tensor, args: argparse.Namespace
) -> float:
    """`trained` at a rate of 2^exponent, or what --losses holds of the same training."""
    name = f"{'unit' if unit else 'standard'}-{args.steps}-steps-seed{seed}-{width}-lr{exponent}"
    file: Path | None = args.losses / name if args.losses else None
    if file is not None and file.exists():
        return float(file.read_text())
    loss = trained(width, 2.0**exponent, unit=unit, seed=seed, data=data, args=args)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(repr(loss))
    return loss


def transfer(device: str, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Best rates and losses of both parametrisations."""
    best: dict[str, dict[str, Any]] = {}
    data = text().to(device)
    begin = time.time()
    found: dict[bool, dict[int, dict[float, list[float]]]] = {True: {}, False: {}}
    for seed in range(args.seeds):
        if seed and time.time() - begin > args.budget / 2:
            print(f"seed {seed} left out: {time.time() - begin:.0f} s are over")
            break
        for unit, exponents in ((True, args.unit_lrs), (False, args.standard_lrs)):
            for width in args.widths:
                for exponent in exponents:
                    loss = remembered(exponent, width, unit=unit, seed=seed, data=data, args=args)
                    found[unit].setdefault(width, {}).setdefault(2.0**exponent, []).append(loss)
    for unit, name in ((True, "unit-scaled"), (False, "standard")):
        report = TransferReport(
            {w: {lr: sum(ls) / len(ls) for lr, ls in by.items()} for w, by in found[unit].items()},
            octaves=1.0,
        )
        seeds = len(next(iter(next(iter(found[unit].values())).values())))
        print(f"decoder, AdamW, {name}: {args.steps} steps, {seeds} seeds\n{report}\n", flush=True)
        best[name] = summary(report)
        if args.pictures:
            args.pictures.mkdir(parents=True, exist_ok=True)
            title = f"Byte-level decoder, AdamW, {name}"
            (args.pictures / f"umup-gpu-{name}.svg").write_text(report.svg(title))
    print(f"{time.time() - begin:.0f} s of training")
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="toy sizes on the CPU")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--time", type=int, default=256)
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256, 512, 1024])
    parser.add_argument("--unit-lrs", type=int, nargs="+", default=list(range(-5, 1)))
    parser.add_argument("--standard-lrs", type=int, nargs="+", default=list(range(-15, -7)))
    parser.add_argument("--budget", type=float, default=300.0, help="seconds of training, about")
    parser.add_argument("--pictures", type=Path, help="folder for them")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--add", action="store_true", help="keep what else is in the file")
    parser.add_argument(
        "--losses", type=Path, help="folder that keeps each training's loss, to go on from"
    )
    parser.add_argument("--only", choices=("overhead", "errors", "transfer"))
    args = parser.parse_args()
    args.head = 64
    sizes, rounds, device = [(8192, 2048), (16384, 4096)], 50, "cuda"
    if args.tiny:
        sizes, rounds, device = [(64, 64)], 3, "cpu"
        args.steps, args.batch, args.time, args.widths, args.head = 5, 2, 16, [32, 64], 16
        args.unit_lrs, args.standard_lrs = [-3, -2, -1], [-9, -8, -7]
        torch.set_num_threads(1)
    else:
        print(torch.cuda.get_device_name(), torch.__version__)
    torch.set_float32_matmul_precision("high")
    before = runs_of(args.out) if args.add else []
    numbers: dict[str, Any] = {}
    if args.only in (None, "errors"):
        no_power_of_two = (256, 48) if args.tiny else (4096, 3072)
        numbers["errors"] = errors(device, *no_power_of_two)
    if args.only in (None, "overhead"):
        numbers["cost"] = overhead(device, sizes, rounds)
    if args.only in (None, "transfer"):
        numbers["best"] = transfer(device, args)
    save(args.out, numbers, onto=before)


if __name__ == "__main__":
    main()
