"""`mixprec umup table FILE.py:model`: the learning rate of every parameter, and why."""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from mixprec.umup import spec as spec_of
from mixprec.umup import table
from mixprec.umup.groups import rules_for
from mixprec.umup.roles import ROLES
from mixprec.umup.rules import _MATRICES_ONLY

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
    shown.add_argument(
        "--roles",
        nargs="+",
        type=_role,
        default=[],
        metavar="PATTERN=ROLE",
        help="roles of parameters whose modules say none, such as '*.wte.weight=embedding'",
    )
    shown.add_argument("--embedding-rule", choices=("umup", "mup"), default="umup")
    shown.add_argument("--depth-rule", choices=("sqrt", "completep"), default="sqrt")


def run(args: argparse.Namespace) -> int:
    try:
        model = _load(args.model)
        spec = spec_of(model, dict(args.roles))
        rules = {"embedding_rule": args.embedding_rule, "depth_rule": args.depth_rule}
        print(
            table(
                model,
                args.optimizer,
                lr=args.lr,
                weight_decay=args.weight_decay,
                format=args.format,
                spec=spec,
                **rules,
            )
        )
        family = rules_for(spec, args.optimizer, **rules).family
    except ValueError as error:
        print(f"mixprec umup: {error}", file=sys.stderr)
        return 1
    others = sum(entry.role != "hidden" for entry in spec.values())
    if family in _MATRICES_ONLY and others:
        print(
            f"\n{args.optimizer} trains hidden matrices only: {others} of {len(spec)} parameters "
            f"are not listed. See theirs with the optimizer that trains them, --optimizer AdamW.",
            file=sys.stderr,
        )
    return 0


def _role(text: str) -> tuple[str, str]:
    pattern, _, role = text.rpartition("=")
    if not pattern or role not in ROLES:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no PATTERN=ROLE, such as '*.wte.weight=embedding'; roles are "
            f"{', '.join(sorted(ROLES))}"
        )
    return pattern, role


def _load(place: str) -> nn.Module:
    """The model that FILE.py:NAME means; a ValueError says why it is none."""
    file, _, name = place.rpartition(":")
    if not file:
        raise ValueError(f"{place!r} names no model; write it as FILE.py:NAME, {place}:model")
    if not Path(file).is_file():
        raise ValueError(f"there is no file {file!r}; {place!r} is read as FILE.py:NAME")
    names = _attempt(file, lambda: runpy.run_path(file, run_name="__mixprec__"))
    if name not in names:
        models = [each for each, value in names.items() if isinstance(value, nn.Module)]
        raise ValueError(f"{file} has no {name!r}; its models are: {', '.join(models) or 'none'}")
    model: Any = names[name]
    if callable(model) and not isinstance(model, nn.Module):
        model = _attempt(f"{name}() in {file}", model)
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"{name} in {file} gave a {type(model).__name__}; it must be an nn.Module, or a "
            f"function without arguments that returns one"
        )
    return model


def _attempt(what: str, call: Callable[[], Any]) -> Any:
    """What the user's code returns, or a ValueError with what it raised."""
    try:
        return call()
    except Exception as error:
        raise ValueError(f"{what} raised {type(error).__name__}: {error}") from error
