"""Tests on several ranks: one process each, connected by gloo."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing import spawn

__all__ = ["on_ranks"]


def on_ranks(*checks: Callable[[int], None], ranks: int = 2) -> None:
    """Call `checks` with its rank in each process; what fails in one of them fails here."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_run, (checks, folder, ranks), nprocs=ranks)


def _run(rank: int, checks: tuple[Callable[[int], None], ...], folder: str, ranks: int) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(str(Path(folder) / "store"), ranks)
    backend = "cpu:gloo,cuda:nccl" if ranks == 1 else "gloo"  # one rank alone is on a GPU
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks)
    for check in checks:
        torch.manual_seed(0)
        check(rank)
    dist.barrier()  # a rank that leaves early breaks the other's connection
    dist.destroy_process_group()
    # Gloo's thread may outlive the interpreter, which then aborts; or the last reference to the
    # group goes with a DDP model, which waits for that thread, which waits for the GIL.
    os._exit(0)
