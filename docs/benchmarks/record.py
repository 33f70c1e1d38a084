"""Result files: numbers with the date, hardware, versions and command that made them.

Each script here writes one with `--out`; `tables.py` makes the tables of the pages from those in
`results/`. A file is a list of runs, as most of them have one. Some scripts can `--add` a run to a
file: what it measured anew takes the place of what was there, and the rest keeps its date. Numbers
that were copied from a page, because nothing else is left of their run, say so: "transcribed".
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Iterable
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def hardware() -> str:
    """The GPU that torch would use, or the processor and how many cores there are."""
    if torch.cuda.is_available():
        several = f"{dist.get_world_size()} x " if dist.is_initialized() else ""
        return f"{several}{torch.cuda.get_device_name()}"
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0]}, {len(models)} cores" if models else platform.processor()


def versions(peers: Iterable[str] = ()) -> dict[str, str]:
    """Of Python, torch, Triton on a GPU, and of those peers that are installed."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in (*(["triton"] if torch.cuda.is_available() else []), *peers):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            pass
    return found


def runs_of(path: Path | None) -> list[dict[str, Any]]:
    """The runs that a file holds; none if there is no file."""
    return json.loads(path.read_text()) if path is not None and path.exists() else []


def save(
    path: Path | None,
    numbers: dict[str, Any],
    *,
    peers: Iterable[str] = (),
    onto: Iterable[dict[str, Any]] = (),
) -> None:
    """Write a result file, if the script was asked for one.

    Args:
        path: the file, or None.
        numbers: what was measured, by name.
        peers: distributions whose versions matter.
        onto: runs that were there before. What they say under a name of `numbers` is dropped.
    """
    if path is None:
        return
    local = os.environ.get("LOCAL_WORLD_SIZE")
    runner = ["torchrun", "--nproc-per-node", local] if local else ["python"]
    script = f"docs/benchmarks/{Path(sys.argv[0]).name}"
    run = {
        "command": shlex.join([*runner, script, *_arguments()]),
        "date": date.today().isoformat(),
        "hardware": hardware(),
        "versions": versions(peers),
        "numbers": numbers,
    }
    kept = [
        {**old, "numbers": {k: v for k, v in old["numbers"].items() if k not in numbers}}
        for old in onto
    ]
    runs = [*(old for old in kept if old["numbers"]), run]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(runs, indent=1, ensure_ascii=False) + "\n", "utf-8")


def _arguments() -> list[str]:
    """What the script was given, but for where the result goes."""
    given = [argument for argument in sys.argv[1:] if argument != "--add"]
    if "--out" in given:
        at = given.index("--out")
        del given[at : at + 2]
    return given
