"""`mixprec doctor`: what this machine does with each format, by trying, and which one to use.

Documentation says what a device supports; a matrix product with a clock beside it says whether that
is by units of its own or by emulation, which is several times slower than FP32. So nothing here is
looked up in a table of devices. A probe that raises has found out something as well: its message is
the result.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import math
import platform
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import mixprec
from mixprec import formats
from mixprec.cli import doctor_float8
from mixprec.cli.table import table, wrapped
from mixprec.formats import Format

__all__ = ["add_arguments", "run"]

NATIVE = 1.2
"""Times the speed of FP32 from which a 16-bit product must have units of its own: those give 2 or
more, and emulation, which widens to FP32 first, gives less than 1."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print everything found as JSON")


def run(args: argparse.Namespace) -> int:
    found = examine(_device())
    print(json.dumps(found, indent=2) if args.json else _page(found))
    return 0


def examine(device: torch.device) -> dict[str, Any]:
    """All findings about `device` and the torch that drives it, as plain data."""
    rows = [_examine_format(format, device) for format in formats.ALL]
    speed = {row["format"]: row["speed"] for row in rows}
    ratio = speed["e4m3"] / speed["bf16"] if speed["e4m3"] and speed["bf16"] else None
    return {
        "versions": {
            "mixprec": mixprec.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "system": platform.platform(),
        },
        "device": {"type": device.type, "name": _device_name(device)},
        "formats": rows,
        "float8": doctor_float8.examine(device, _outcome, ratio),
        "torch": {name: _outcome(probe) for name, probe in _FEATURES.items()},
        "advice": advice(speed["bf16"], speed["fp16"]),
    }


def advice(bf16_speed: float | None, fp16_speed: float | None) -> str:
    """One sentence, from the speed of either format as a multiple of FP32's (None: cannot)."""
    bf16, fp16 = bf16_speed or 0.0, fp16_speed or 0.0
    if bf16 >= NATIVE:
        return (
            f"Use bf16: it multiplies {bf16:.1f} times as fast as fp32 here, and has its range, "
            "so no loss scale is needed."
        )
    if fp16 >= NATIVE:
        return (
            f"Use fp16 with loss scaling, because it multiplies {fp16:.1f} times as fast as fp32 "
            f"here, and bf16 only {bf16:.1f} times."
        )
    return (
        f"Use bf16 if memory is short, and fp32 for speed, because this device only emulates 16 "
        f"bits: bf16 multiplies {bf16:.1f} times as fast as fp32, fp16 {fp16:.1f} times."
    )


def _device() -> torch.device:
    found = torch.accelerator.current_accelerator(check_available=True)
    return found or torch.device("cpu")


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{platform.processor() or platform.machine()}, {capability}"


def _examine_format(format: Format, device: torch.device) -> dict[str, Any]:
    speed = None
    try:
        speed = 1.0 if format == formats.FP32 else float(f"{_speed(format, device):.2g}")
        product = "native" if format == formats.FP32 or speed >= NATIVE else "emulated"
    except Exception as error:  # a device may lack the kernel in any way it likes
        product = _reason(error)
    return {
        "format": format.name,
        "storage": _outcome(lambda: _storage(format, device)),
        "overflow": _outcome(lambda: _overflow(format, device)),
        "product": product,
        "speed": speed,
        "autocast": _outcome(lambda: _autocast(format, device)),
        "all_reduce": _outcome(lambda: _all_reduce(format, device)),
    }


def _outcome(probe: Callable[[], str]) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return probe()
    except Exception as error:  # whatever is raised is the finding
        return _reason(error)


def _reason(error: Exception) -> str:
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"no: {first_line[:100]}"


def _storage(format: Format, device: torch.device) -> str:
    ones = torch.ones(4, device=device).to(format.dtype)
    return "yes" if ones.float().sum().item() == 4 else "no: ones do not come back as ones"


def _overflow(format: Format, device: torch.device) -> str:
    """What `.to(dtype)` makes of a finite number above the format's range."""
    if format == formats.FP32:
        return "inf"
    largest = torch.tensor(formats.FP32.max, device=device)
    value = largest.to(format.dtype).float().item()
    return "saturates" if value == format.max else str(value)


def _autocast(format: Format, device: torch.device) -> str:
    ones = torch.ones(2, 2, device=device)
    with torch.autocast(device.type, dtype=format.dtype):
        dtype = torch.mm(ones, ones).dtype
    return "yes" if dtype == format.dtype else f"no: a product of fp32 tensors is {dtype}"


def _all_reduce(format: Format, device: torch.device) -> str:
    """Whether the device's own backend sums this format, tried in a group of one."""
    import torch.distributed as dist

    backend: Any = dist.ProcessGroupNCCL if device.type == "cuda" else dist.ProcessGroupGloo
    group = backend(dist.HashStore(), 0, 1)
    group.allreduce([torch.ones(2, device=device).to(format.dtype)]).wait()
    return "yes"


def _speed(format: Format, device: torch.device) -> float:
    """Products in `format` as a multiple of FP32's speed: best against best, taken in turns."""
    # Large enough that arithmetic outweighs the launch. No CPU has 8-bit units that torch uses, and
    # some emulate them element by element: seconds for anything larger.
    size = 4096 if device.type != "cpu" else 512 if format.bits > 8 else 128
    multiply, multiply_fp32 = (_product(each, size, device) for each in (format, formats.FP32))
    best = best_fp32 = math.inf
    deadline = time.perf_counter() + 0.5
    for _ in range(20):
        best = min(best, _seconds(multiply, device))
        best_fp32 = min(best_fp32, _seconds(multiply_fp32, device))
        if time.perf_counter() > deadline:
            break
    return best_fp32 / best


def _product(format: Format, size: int, device: torch.device) -> Callable[[], Tensor]:
    """A square matrix product: `torch._scaled_mm` for 8 bits, `torch.mm` for the rest."""
    a = torch.ones(size, size, device=device).to(format.dtype)
    if format.bits > 8:
        return functools.partial(torch.mm, a, a.t())
    # No device multiplies E5M2 by E5M2, and none needs to: it is for gradients, times E4M3.
    b = torch.ones(size, size, device=device).to(formats.E4M3.dtype).t()
    one = torch.ones((), device=device)
    return functools.partial(torch._scaled_mm, a, b, one, one, out_dtype=torch.bfloat16)


def _seconds(multiply: Callable[[], Tensor], device: torch.device) -> float:
    start = time.perf_counter()
    multiply()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - start


def _has_grad_dtype() -> str:
    return "yes" if hasattr(torch.Tensor, "grad_dtype") else "no: gradients have the weight's dtype"


def _has_module(name: str, attribute: str) -> str:
    getattr(importlib.import_module(name), attribute)
    return "yes"


def _has_for_gpus(name: str, attribute: str) -> str:
    has = _has_module(name, attribute)
    return has if torch.cuda.is_available() else "no: installed, and of no use without a GPU"


_FEATURES: dict[str, Callable[[], str]] = {
    "grad_dtype": _has_grad_dtype,
    "fsdp2": functools.partial(_has_module, "torch.distributed.fsdp", "fully_shard"),
    "dcp": functools.partial(_has_module, "torch.distributed.checkpoint", "save"),
    "gloo": functools.partial(_has_module, "torch.distributed", "ProcessGroupGloo"),
    "nccl": functools.partial(_has_for_gpus, "torch.distributed", "ProcessGroupNCCL"),
    "triton": functools.partial(_has_for_gpus, "triton", "jit"),
}


def _page(found: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    device = f"{found['device']['type']}: {found['device']['name']}"
    columns = ("format", "storage", "overflow", "product", "speed", "autocast", "all_reduce")
    rows = [[_cell(row[column]) for column in columns] for row in found["formats"]]
    features = ", ".join(f"{name} {_cell(outcome)}" for name, outcome in found["torch"].items())
    header = ["", *columns[1:]]
    reasons = sorted(
        {
            "\n    ".join(
                wrapped(f"  {row['format']} {column}: {row[column].removeprefix('no: ')}", 76)
            )
            for row in found["formats"]
            for column in columns
            if str(row[column]).startswith("no: ")
        }
    )
    parts = [*wrapped(found["advice"]), "", *wrapped(versions), *wrapped(device), ""]
    parts += [table([header, *rows]), "", *reasons, ""]
    parts += [*doctor_float8.page(found["float8"]), "", *wrapped(found["float8"]["advice"])]
    return "\n".join([*parts, "", *wrapped(features)])


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.2g}x"
    return "no" if value is None or str(value).startswith("no: ") else str(value)
