"""Questions about the picture of `mixprec demo`, answered by training with one thing changed.

When does FP16 need its loss scale? The same run, with gradients divided by the tokens of smaller
and larger steps; and with a loss whose logit gradients are divided after the products. Does
emulation change the curves? The same runs on the processor's own 16-bit kernels, slow where it has
no units for them.

    python docs/benchmarks/demo_variants.py [--out FILE]
"""

from __future__ import annotations

import argparse
import platform
from dataclasses import replace
from pathlib import Path

import torch
from record import save
from torch import Tensor

from mixprec.cli import demo_runs
from mixprec.cli.demo_runs import RUNS, Outcome, Run, Settings, train
from mixprec.cli.demo_text import PADDING, Corpus, model_input, read_text
from mixprec.cross_entropy import linear_cross_entropy

SETTINGS = Settings()
FP32_RUN, *OTHERS = [run for run in RUNS if run.recipe is None]
UNSCALED = next(run for run in RUNS if run.name == "fp16 without a loss scale")


def outcome(run: Run, settings: Settings = SETTINGS) -> Outcome:
    corpus = Corpus(
        read_text().sentences,
        context=settings.context,
        held_out=settings.held_out,
        seed=settings.seed,
    )
    return train(run, settings, corpus, lambda outcome, num_tokens: None)


WITH_LOGITS = demo_runs._Training._loss_sum


def without_logits(training: demo_runs._Training, targets: Tensor) -> Tensor:
    hidden = training.model.last_hidden(model_input(targets))
    return linear_cross_entropy(hidden, training.model.head.weight, targets, ignore_index=PADDING)[
        0
    ]


def above(reference: float, loss: float) -> str:
    return f"{round(loss - reference, 4) + 0.0:+.4f}"  # -0.0 + 0.0 is 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    presumed: dict[str, list[float]] = {}
    without: dict[str, float] = {}
    kernels: dict[str, list[float]] = {}
    print(f"torch {torch.__version__}, Python {platform.python_version()}\n")
    reference = outcome(FP32_RUN).held_out_loss

    print("| gradients divided by | above fp32 | subnormal |\n|---|---|---|")
    for exponent in (10, 12, 14, 16, 18, 20):
        unscaled = outcome(UNSCALED, replace(SETTINGS, presumed_tokens=2**exponent))
        gap = above(reference, unscaled.held_out_loss)
        presumed[str(exponent)] = [unscaled.held_out_loss - reference, unscaled.subnormal_grads]
        print(f"| 2^{exponent} tokens | {gap} | {unscaled.subnormal_grads:.1%} |", flush=True)

    demo_runs._Training._loss_sum = without_logits
    for exponent in (18, 20):
        unscaled = outcome(UNSCALED, replace(SETTINGS, presumed_tokens=2**exponent))
        gap = above(reference, unscaled.held_out_loss)
        without[str(exponent)] = unscaled.held_out_loss - reference
        print(f"linear_cross_entropy, 2^{exponent} tokens: {gap}, {unscaled.subnormal_grads:.1%}")
    demo_runs._Training._loss_sum = WITH_LOGITS

    emulated = {run: outcome(run).held_out_loss for run in OTHERS}
    demo_runs.emulated = lambda device, format: False
    print("\n| run | emulated | own kernels |\n|---|---|---|")
    for run, loss in emulated.items():
        own = outcome(run).held_out_loss
        kernels[run.name] = [loss - reference, own - reference]
        print(f"| {run.name} | {above(reference, loss)} | {above(reference, own)} |", flush=True)
    save(args.out, {"presumed": presumed, "without logits": without, "kernels": kernels})


if __name__ == "__main__":
    main()
