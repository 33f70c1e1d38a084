"""`mixprec umup table FILE.py:model`: the learning rate of every parameter, and why."""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path
from typing import Any

from torch import nn

from mixprec.umup import table

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(metavar="WHAT", required=True)
    shown = commands.add_parser("table", help="print the rules of every parameter of a model")
    shown.add_argument(
        "model",
        metavar="FILE.py:NAME",
        help="a Python file and the name of a model in it, or of a function that returns one",
    )
    shown.add_argument("--optimizer", default="AdamW", help="class name or family; default AdamW")
    shown.add_argument("--lr", type=float, default=1.0, help="base learning rate; default 1")
    shown.add_argument("--weight-decay", type=float, default=0.0, help="default 0")
    shown.add_argument("--format", choices=("text", "markdown", "json"), default="text")
    shown.add_argument("--embedding-rule", choices=("umup", "mup"), default="umup")
    shown.add_argument("--depth-rule", choices=("sqrt", "completep"), default="sqrt")


def run(args: argparse.Namespace) -> int:
    try:
        model = _load(args.model)
        print(
            table(
                model,
                args.optimizer,
                lr=args.lr,
                weight_decay=args.weight_decay,
                format=args.format,
                embedding_rule=args.embedding_rule,
                depth_rule=args.depth_rule,
            )
        )
    except ValueError as error:
        print(f"mixprec umup: {error}", file=sys.stderr)
        return 1
    return 0


def _load(place: str) -> nn.Module:
    file, _, name = place.rpartition(":")
    if not file or not Path(file).is_file():
        raise ValueError(f"{place!r} names no file; write it as FILE.py:NAME")
    names = runpy.run_path(file, run_name="__mixprec__")
    if name not in names:
        raise ValueError(f"{file} has no {name!r}")
    model: Any = names[name]
    model = model if isinstance(model, nn.Module) else model()
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"{name} in {file} gave a {type(model).__name__}; it must be an nn.Module, or a "
            f"function without arguments that returns one"
        )
    return model
