"""FP8 under FSDP2 on the GPUs of one host: the same numbers as one process, step time and memory.

    torchrun --nproc-per-node 2 docs/benchmarks/float8_fsdp.py [--blocks 4] [--compile]
        [--out FILE [--add]]

Llama-8B-shaped blocks (4096 wide, 1024 for keys and values, 14336 in the feed-forward), each
sharded by `fully_shard`, BF16 parameters, gradients summed over ranks in FP32, fused AdamW;
forward, backward and step on `--rows` times 4096 tokens a rank. First, with the same tokens on all
ranks, every FP8 way must give the bits of one process without FSDP2; then all ways run once a
round, and the table gives medians of the rounds by wall clock between two barriers, what the host
alone takes to issue a step, and the peak of memory that each way allocates on the first rank.

    bf16                    FSDP2 alone
    fp8, gathers 16 bits    Precision("fp8", recipe=...).convert
    fp8, gathers bytes      and float8.enable_fsdp_float8_all_gather

`--reshard off` keeps gathered weights from the forward to the backward pass. `--micro 4` splits the
step into micro-batches that are gathered for each. Without a GPU it runs with gloo at toy size, to
try the script itself. About two minutes on two H200, four with --compile.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from record import runs_of, save
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import mixprec
from mixprec import float8

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
BF16 = torch.bfloat16
WIDTH, KEYS, HIDDEN, HEADS = (4096, 1024, 14336, 32) if CUDA else (64, 32, 112, 4)
TOKENS = 4096 if CUDA else 16
WAYS = ("bf16", "fp8, gathers 16 bits", "fp8, gathers bytes")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        linear = partial(nn.Linear, bias=False)
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(2))
        self.q, self.o = linear(WIDTH, WIDTH), linear(WIDTH, WIDTH)
        self.k, self.v = linear(WIDTH, KEYS), linear(WIDTH, KEYS)
        self.gate, self.up = linear(WIDTH, HIDDEN), linear(WIDTH, HIDDEN)
        self.down = linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        size = WIDTH // HEADS
        h = self.norms[0](x)
        q, k, v = (
            projection(h).unflatten(-1, (-1, size)).transpose(1, 2)
            for projection in (self.q, self.k, self.v)
        )
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(h.transpose(1, 2).flatten(2))
        h = self.norms[1](x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def build(way: str, options: argparse.Namespace, *, sharded: bool = True) -> tuple[Any, Any]:
    """Model and optimizer; the same weights for every way and on every rank."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model: Any = nn.Sequential(*(Block() for _ in range(options.blocks)))
    model.to(BF16)
    if way != "bf16":
        precision = mixprec.Precision("fp8", recipe=options.recipe)
        report = precision.convert(model, min_dim=16, keep_fp32=())
        assert isinstance(report, float8.LayerReport)
        assert len(report.converted) == 7 * options.blocks, report
    if sharded and way.endswith("bytes"):
        gathered = float8.enable_fsdp_float8_all_gather(model)
        assert len(gathered) == 7 * options.blocks, "weights of this recipe cannot travel as bytes"
    if options.compile:
        torch._dynamo.config.recompile_limit = 256  # one code, many models
        for block in model:
            block.compile()
    if sharded:
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
        mesh = init_device_mesh(DEVICE, (dist.get_world_size(),))
        shard = partial(fully_shard, mesh=mesh, mp_policy=policy)
        for block in model:
            shard(block, reshard_after_forward=options.reshard == "on")
        shard(model)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)


def tokens(seed: int, rows: int) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    x = torch.randn(rows, TOKENS, WIDTH, generator=generator, device=DEVICE, dtype=torch.float32)
    return x.to(BF16)


def step(model: Any, optimizer: Any, batches: list[Tensor]) -> Tensor:
    """Outputs of the last micro-batch. The gradient of each output is a batch too."""
    y = batches[0]
    for i, batch in enumerate(batches):
        if hasattr(model, "set_requires_gradient_sync"):
            model.set_requires_gradient_sync(i == len(batches) - 1)
        y = model(batch)
        y.backward(batch)
    optimizer.step()
    optimizer.zero_grad()
    return y.detach()


# ------------------------------------------------------------------ the same numbers


def results(way: str, options: argparse.Namespace, *, sharded: bool) -> list[Tensor]:
    """Outputs of three steps and the weights after them, on the CPU."""
    model, optimizer = build(way, options, sharded=sharded)
    found = [step(model, optimizer, [tokens(i, options.rows)]) for i in range(3)]
    held = [param.detach() for param in model.parameters()]
    return [t.cpu() for t in (*found, *(t.full_tensor() if sharded else t for t in held))]


def check(options: argparse.Namespace) -> None:
    """Every rank has the same tokens, so that their mean gradient is that of one process."""
    # The backward pass of attention adds in any order unless it is told not to.
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    alone = results(WAYS[1], options, sharded=False)
    for way, sharded in ((WAYS[1], False), (WAYS[1], True), (WAYS[2], True)):
        free()
        differ = [
            not torch.equal(ours, right)
            for ours, right in zip(results(way, options, sharded=sharded), alone, strict=True)
        ]
        who = way if sharded else "one process, once more"
        say(f"{who}: {sum(differ)} of {len(differ)} outputs and weights differ from one process")
        if any(differ) and not options.compile:  # a compiler may order sums otherwise
            raise SystemExit(f"{who}: not equal to the bit")
    torch.use_deterministic_algorithms(False)
    free()


# ------------------------------------------------------------------ time and memory


def measure(options: argparse.Namespace) -> None:
    batches = [tokens(100 * dist.get_rank() + i, options.rows) for i in range(options.micro)]
    peaks = {way: peak(way, options, batches) for way in WAYS}
    held = {way: build(way, options) for way in WAYS}
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    for number in range(options.rounds + 3):
        for way in WAYS:
            taken = timed(*held[way], batches)
            if number >= 3:
                times[way].append(taken)
    found = {way: tuple(map(statistics.median, zip(*times[way], strict=True))) for way in WAYS}
    what = f"{options.recipe}, {options.rows * TOKENS} tokens, micro-batches: {options.micro}"
    say(f"\n| {what} | step | | the host alone | peak |\n|---|---|---|---|---|")
    for way, (taken, issued) in found.items():
        say(
            f"| {way} | {1e3 * taken:.1f} ms | {found['bf16'][0] / taken:.2f}x "
            f"| {1e3 * issued:.1f} ms | {peaks[way]:.2f} GiB |"
        )
    name = f"{options.recipe}, {options.micro} x {options.rows * TOKENS}"
    name += ", compiled" if options.compile else ""
    rows = {
        way: {"ms": 1e3 * taken, "host_ms": 1e3 * issued, "peak_gib": peaks[way]}
        for way, (taken, issued) in found.items()
    }
    if dist.get_rank() == 0:
        save(options.out, {name: rows}, onto=runs_of(options.out) if options.add else [])


def peak(way: str, options: argparse.Namespace, batches: list[Tensor]) -> float:
    """GiB of a step, in the allocator's bytes, with nothing else on the device."""
    free()
    if not CUDA:
        return 0.0
    model, optimizer = build(way, options)
    for _ in range(2):
        step(model, optimizer, batches)
    torch.cuda.reset_peak_memory_stats()
    step(model, optimizer, batches)
    return torch.cuda.max_memory_allocated() / 2**30


def timed(model: Any, optimizer: Any, batches: list[Tensor]) -> tuple[float, float]:
    """Seconds of a step, and until the host had issued it."""
    wait()
    began = time.perf_counter()
    step(model, optimizer, batches)
    issued = time.perf_counter()
    wait()
    return time.perf_counter() - began, issued - began


def wait() -> None:
    if CUDA:
        torch.cuda.synchronize()
    dist.barrier()


def free() -> None:
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


def say(line: str) -> None:
    if dist.get_rank() == 0:
        print(line, flush=True)


def main() -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for the check, see there
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--recipe", default="static", choices=("static", "adaptive"))
    parser.add_argument("--blocks", type=int, default=4 if CUDA else 2)
    parser.add_argument("--rows", type=int, default=2, help="sequences of a micro-batch")
    parser.add_argument("--micro", type=int, default=1)
    parser.add_argument("--no-check", action="store_true", help="leave out the comparison of bits")
    parser.add_argument("--rounds", type=int, default=9 if CUDA else 2)
    parser.add_argument("--reshard", default="on", choices=("on", "off"))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--add", action="store_true", help="keep what else is in the file")
    options = parser.parse_args()
    if CUDA:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if CUDA else "gloo")
    say(f"{dist.get_world_size()} x {torch.cuda.get_device_name() if CUDA else 'CPU'}, {options}")
    if not options.no_check:
        check(options)
    measure(options)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
