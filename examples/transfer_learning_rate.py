"""Find the learning rate at width 64, train at width 256 with it: unit scaling and u-muP.

The texts are those that Python's `help()` carries. Rows are padded, micro-batches have different
numbers of tokens, and the step divides by the root of all of them.

    python examples/transfer_learning_rate.py
"""

from __future__ import annotations

import argparse
from pydoc_data import topics

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import mixprec
from mixprec import umup

TIME, PADDING = 64, -100


def rows(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Bytes `[count, TIME]` and the byte after each; paragraphs shorter than that are padded."""
    text = "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
    paragraphs = [p.encode()[: TIME + 1] for p in text.split("\n\n") if len(p) > 1]
    chosen = torch.randint(len(paragraphs), (count,), generator=generator).tolist()
    full = [torch.zeros(TIME + 1, dtype=torch.long)]  # so that every batch has the same length
    lines = full + [torch.tensor(list(paragraphs[i])) for i in chosen]
    padded = pad_sequence(lines, batch_first=True, padding_value=PADDING)[1:]
    return padded[:, :-1].clamp(min=0), padded[:, 1:]


def train(width: int, lr: float, steps: int, *, seed: int = 0) -> float:
    """Mean loss in nats a byte over the last fifth of the steps."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = umup.Decoder(256, width=width, depth=2, seq_len=TIME)  # on a GPU: mixprec.cast_model
    groups = umup.param_groups(model, lr, torch.optim.AdamW, weight_decay=2**-10)
    optimizer = mixprec.MixedPrecision(torch.optim.AdamW(groups))
    accumulator = mixprec.GradientAccumulator(optimizer, presumed_tokens=2**9)
    losses: list[float] = []
    for _ in range(steps):
        for last in (False, True):
            accumulator.backward(*model.loss(*rows(8, generator)), last=last)
        losses.append(accumulator.step().item())
    tail = losses[-max(steps // 5, 1) :]
    return sum(tail) / len(tail)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--small", type=int, default=64, help="width that the sweep runs at")
    parser.add_argument("--large", type=int, default=256, help="width that is trained then")
    args = parser.parse_args()

    model = umup.Decoder(256, width=args.large, depth=2, seq_len=TIME)
    print(umup.table(model, torch.optim.AdamW, weight_decay=2**-10), "\n")

    lrs = [2.0**exponent for exponent in range(-5, 1)]
    sweep = umup.check_transfer(lambda width, lr: train(width, lr, args.steps), [args.small], lrs)
    print(sweep, "\n")
    lr = sweep.best[args.small]
    loss = train(args.large, lr, args.steps)
    print(f"width {args.large} at the rate that was best at width {args.small}, {lr}: {loss:.3f}")


if __name__ == "__main__":
    main()
