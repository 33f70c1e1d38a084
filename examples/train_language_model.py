"""Train a byte-level language model in 16 bits, with the whole loop in the open.

    python examples/train_language_model.py --steps 200 --out runs/bf16 --precision bf16

Kill it whenever you like and run it again: it goes on from DIR/checkpoint.pt and ends with the same
weights, bit for bit.
"""

import argparse
import math
import os
import random
import re
from pathlib import Path
from pydoc_data.topics import topics  # the help texts that every CPython carries
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mixprec

WIDTH, DEPTH, HEADS, CONTEXT = 64, 2, 2, 128
MICRO_BATCHES, SENTENCES = 4, 2
LEARNING_RATE, WARMUP, MAX_GRAD_NORM = 1e-3, 20, 1.0
START, PADDING = 256, -100


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.queries_keys_values = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.mix = nn.Linear(WIDTH, WIDTH, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        parts = self.queries_keys_values(self.norm1(x)).unflatten(-1, (3, HEADS, -1))
        queries, keys, values = parts.transpose(1, 3).unbind(2)
        heads = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        x = x + self.mix(heads.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bytes = nn.Embedding(257, WIDTH)
        self.places = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(DEPTH)))
        self.norm = nn.RMSNorm(WIDTH)
        self.head = mixprec.LinearCrossEntropy(WIDTH, 257)

    def forward(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Loss summed over targets, and their number without padding."""
        x = self.bytes(inputs) + self.places.weight
        return self.head(self.norm(self.blocks(x)), targets)


def read_sentences() -> Tensor:
    """Targets `[sentences, CONTEXT]`: bytes, padded with -100, which makes half of each batch."""
    sentences = [s for text in topics.values() for s in re.split(r"\n\s*\n|(?<=[.:])\s", text)]
    rows = [list(sentence.strip().encode()[:CONTEXT]) for sentence in dict.fromkeys(sentences)]
    return torch.tensor([row + [PADDING] * (CONTEXT - len(row)) for row in rows if len(row) > 8])


def micro_batches(targets: Tensor, step: int) -> Tensor:
    """What a step trains on follows from its number alone, so a resumed run reads the same."""
    rows = random.Random(step).sample(range(len(targets)), MICRO_BATCHES * SENTENCES)
    return targets[rows].unflatten(0, (MICRO_BATCHES, SENTENCES))


def loss_and_tokens(model: nn.Module, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Loss summed over the bytes of a micro-batch, and their number without padding."""
    inputs = F.pad(targets[:, :-1], (1, 0), value=START)
    return model(inputs.masked_fill(inputs == PADDING, START), targets)


def save(checkpoint: dict[str, Any], path: Path) -> None:
    """Replace the file at `path` so that whoever looks finds the old or the new one, whole."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())  # before the name is given away, or a power cut could empty both
    os.replace(temporary, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("runs/example"), metavar="DIR")
    parser.add_argument("--save-every", type=int, default=20, metavar="STEPS")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="bf16")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "checkpoint.pt"

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = mixprec.Precision(args.precision)
    model = mixprec.cast_model(Model().to(device), precision)
    scaler = mixprec.DynamicLossScaler() if precision.needs_loss_scale else None
    optimizer = mixprec.MixedPrecision(
        torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE),
        loss_scaler=scaler,
        max_grad_norm=MAX_GRAD_NORM,
    )
    accumulator = mixprec.GradientAccumulator(optimizer)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1, (step + 1) / WARMUP) * (1 + math.cos(math.pi * step / args.steps)) / 2,
    )

    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "schedule": schedule}
    if scaler is not None:
        parts["scaler"] = scaler
    first_step = 0
    if path.exists():
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        if checkpoint["precision"] != args.precision:
            parser.error(f"{path} is a {checkpoint['precision']} run; give that or another --out")
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
        first_step = checkpoint["step"]
        print(f"going on after step {first_step}")

    sentences = read_sentences().to(device)
    for step in range(first_step, args.steps):
        for i, targets in enumerate(micro_batches(sentences, step)):
            loss_sum, num_tokens = loss_and_tokens(model, targets)
            accumulator.backward(loss_sum, num_tokens, last=i == MICRO_BATCHES - 1)
        loss = accumulator.step()
        schedule.step()
        done = step + 1
        if done % args.save_every == 0 or done == args.steps:
            states = {name: part.state_dict() for name, part in parts.items()}
            save({"step": done, "precision": args.precision, **states}, path)
            numbers = "  ".join(f"{key} {value:g}" for key, value in optimizer.metrics().items())
            print(f"step {done}  loss {loss:.4f}  {numbers}", flush=True)


if __name__ == "__main__":
    main()
