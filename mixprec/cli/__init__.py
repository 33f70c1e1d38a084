"""The `mixprec` command: one module here for each subcommand.

A command module has `add_arguments(parser)` and `run(args)`, which returns the exit status. It is
imported only when its command is asked for, so `mixprec --help` costs what `import mixprec` costs.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import signal
import sys
from collections.abc import Sequence

import mixprec

__all__ = ["main"]

COMMANDS = {
    "demo": "train a small model in seven precisions, side by side, and draw the curves",
    "doctor": "say what this machine does with each format, and which one to use",
    "formats": "list the number formats, or show what each makes of a number",
    "umup": "print the learning rate of every parameter of a model, and why",
}


_BROKEN_PIPE = 128 + 13
"""What a shell says of a command that SIGPIPE, which Windows lacks, has ended."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; `argv` defaults to the process's arguments."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="mixprec", description="Mixed-precision training for PyTorch."
    )
    parser.add_argument("--version", action="version", version=f"mixprec {mixprec.__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=f"{summary}.")
        if arguments[:1] == [name]:
            command = importlib.import_module(f"{__name__}.{name}")
            command.add_arguments(subparser)
            subparser.set_defaults(run=command.run)
    if not arguments:
        parser.print_help()
        return 2
    args = parser.parse_args(arguments)
    _write_what_the_encoding_lacks()
    try:
        status = int(args.run(args))
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # Who reads has read enough, as `head` does. At its exit Python would flush once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE


def _write_what_the_encoding_lacks() -> None:
    """As a question mark, rather than to fail where a terminal or a file has no UTF-8."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")
