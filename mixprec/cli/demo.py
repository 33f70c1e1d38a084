"""`mixprec demo`: one training in seven precisions, side by side, in a minute or two on a CPU.

Prints a table of what came of each run, draws `demo.svg` and writes `results.json`.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TextIO

import torch

from mixprec.cli.curves import draw_svg, draw_text
from mixprec.cli.demo_report import Report
from mixprec.cli.demo_runs import RUNS, Outcome, Settings, emulated, train
from mixprec.cli.demo_text import Corpus, read_text
from mixprec.cli.progress import Progress
from mixprec.cli.table import wrapped
from mixprec.formats import BF16, E4M3, FP16

__all__ = ["add_arguments", "run", "run_all"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `mixprec demo`."""
    parser.add_argument(
        "--steps", type=_steps, default=Settings.steps, help="of each run; default %(default)s"
    )
    parser.add_argument(
        "--seed", type=int, default=Settings.seed, help="of weights and data; default %(default)s"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("demo"),
        metavar="DIR",
        help="where demo.svg and results.json go; default %(default)s",
    )
    parser.add_argument(
        "--json", action="store_true", help="print results.json to stdout, and nothing else"
    )


def _steps(text: str) -> int:
    if text.isdecimal() and int(text) >= 1:
        return int(text)
    raise argparse.ArgumentTypeError(
        f"{text!r} is not a number of steps; give 1 or more, or leave it out for {Settings.steps}"
    )


def run(args: argparse.Namespace) -> int:
    """Train, print and draw; 0, 2 where `--out` cannot be written to, 130 if interrupted."""
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out).close()  # now, not after a minute of training
    except OSError as error:
        print(
            f"mixprec demo: error: cannot write demo.svg and results.json to {args.out} "
            f"({error.strerror}); give a directory of your own, such as --out ~/demo",
            file=sys.stderr,
        )
        return 2
    settings = replace(Settings(), steps=args.steps, seed=args.seed)
    try:
        report = run_all(settings, sys.stderr)
    except KeyboardInterrupt:
        return 130  # what a shell says of a command that was stopped by Ctrl-C
    results = json.dumps(report.data(), indent=1)
    (args.out / "demo.svg").write_text(draw_svg(report.curves(), report.picture()), "utf-8")
    (args.out / "results.json").write_text(results + "\n", "utf-8")
    if args.json:
        print(results)
    else:
        _print_report(report, args.out)
    return 0


def run_all(settings: Settings, log: TextIO) -> Report:
    """All runs, one after the other, with progress on `log`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    text = read_text()
    corpus = Corpus(
        text.sentences,
        context=settings.context,
        held_out=settings.held_out,
        seed=settings.seed,
        device=device,
    )
    report = Report(
        settings,
        source=text.source,
        padding=corpus.padding(settings.steps, settings.shape),
        device=_device_name(device),
        emulated=[
            name
            for name, format in (("BF16", BF16), ("FP16", FP16), ("FP8", E4M3))
            if emulated(device, format)
        ],
    )
    print(_preface(report), file=log)
    progress = Progress(log, runs=len(RUNS), steps=settings.steps)
    try:
        with _one_thread():
            for run in RUNS:
                label = f"{len(report.outcomes) + 1}/{len(RUNS)} {run.name}"
                report.outcomes.append(
                    train(run, settings, corpus, partial(_show, progress, label))
                )
    finally:
        progress.clear()
    return report


def _show(progress: Progress, label: str, outcome: Outcome, num_tokens: int) -> None:
    progress.update(
        label,
        step=len(outcome.train_losses),
        loss=outcome.train_losses[-1],
        num_tokens=num_tokens,
        loss_scale=outcome.loss_scale,
    )


@contextmanager
def _one_thread() -> Generator[None]:
    """More gain little with matrices this small, and the results would depend on their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _preface(report: Report) -> str:
    settings = report.settings
    lines = [
        f"{len(RUNS)} runs of {settings.steps} steps, {settings.micro_batches} micro-batches each, "
        f"on {report.source}; {report.padding:.0%} of the batches is padding.",
        report.how,
    ]
    return "\n".join(wrapped("\n".join(lines)))


def _print_report(report: Report, out: Path) -> None:
    plot = draw_text(report.curves())
    try:
        plot.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        plot = ""  # a terminal without braille has the table
    caption = "\n".join(report.picture().caption)
    words = ("\n".join(wrapped(part)) for part in (report.findings(), caption))
    print("\n" + "\n\n".join(filter(None, (plot, report.table(), *words))))
    where = f"The curves are in {out / 'demo.svg'}, all numbers in {out / 'results.json'}."
    print("\n" + "\n".join(wrapped(where)))


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []  # not Linux
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
