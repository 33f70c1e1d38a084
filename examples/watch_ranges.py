"""Would this model train in FP8, and which layers need an exponent? Watch a few steps and see.

    python examples/watch_ranges.py --out report.html

A byte-level model with squared ReLUs, trained in FP32 on counting sequences. The loss is a mean
over tokens, which makes gradients small; `--sum` takes the sum instead.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mixprec

VOCAB, WIDTH, DEPTH, LENGTH, BATCH = 256, 64, 3, 64, 64


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(self.norm(x))) ** 2)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default="report.html")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--sum", action="store_true", help="sum the loss over tokens")
    args = parser.parse_args()

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(VOCAB, WIDTH),
        *(Block() for _ in range(DEPTH)),
        nn.LayerNorm(WIDTH),
        nn.Linear(WIDTH, VOCAB, bias=False),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    with mixprec.watch(model, every=5) as report:  # every fifth call of each layer
        for step in range(args.steps):
            tokens = (torch.randint(VOCAB, (BATCH, 1)) + torch.arange(LENGTH + 1)) % VOCAB
            logits = model(tokens[:, :-1]).flatten(0, 1)
            reduction = "sum" if args.sum else "mean"
            loss = F.cross_entropy(logits, tokens[:, 1:].flatten(), reduction=reduction)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            print(f"step {step + 1} loss {loss.item() / (BATCH * LENGTH if args.sum else 1):.3f}")

    report.save(args.out)
    print(*(report.warnings() or ["every tensor fits its format"]), sep="\n")


if __name__ == "__main__":
    main()
