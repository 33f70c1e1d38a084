"""Train a byte-level language model in FP8, with the whole loop in the open.

    python examples/train_fp8.py --steps 100 --recipe adaptive

Where there are no FP8 units, on a CPU or an older GPU, the same bytes are multiplied in FP32.
"""

import argparse
from pydoc_data.topics import topics  # the help texts that every CPython carries

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mixprec

WIDTH, DEPTH, HEADS, CONTEXT = 128, 2, 2, 64
MICRO_BATCHES, ROWS = 2, 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.queries_keys_values = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.mix = nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate, self.up = (nn.Linear(WIDTH, 3 * WIDTH, bias=False) for _ in range(2))
        self.down = nn.Linear(3 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.queries_keys_values(self.norm1(x)).unflatten(-1, (3, HEADS, -1))
        queries, keys, values = parts.transpose(1, 3).unbind(2)
        heads = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        x = x + self.mix(heads.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(DEPTH)))
        self.norm = nn.RMSNorm(WIDTH)
        self.head = mixprec.LinearCrossEntropy(WIDTH, 256)

    def forward(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Loss summed over targets, and their number."""
        x = self.bytes(inputs) + self.places.weight
        return self.head(self.norm(self.blocks(x)), targets)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--recipe", default="adaptive", help="static, tensorwise or rowwise")
    args = parser.parse_args()

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = Model().to(device)
    precision = mixprec.Precision("fp8", recipe=args.recipe)
    # Below min_dim a layer gains no time; this model has no larger ones, and shows how it is done.
    print(precision.convert(model, min_dim=64))

    optimizer = mixprec.MixedPrecision(
        torch.optim.AdamW(model.parameters(), lr=2e-3), max_grad_norm=1.0
    )
    # Sums of gradients as they are: a mean would divide them out of an unscaled FP8's range.
    accumulator = mixprec.GradientAccumulator(optimizer, presumed_tokens=1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)

    text = torch.tensor(list("".join(topics.values()).encode()), device=device)
    for step in range(1, args.steps + 1):
        for i in range(1, MICRO_BATCHES + 1):
            starts = torch.randint(len(text) - CONTEXT, (ROWS, 1), device=device)
            rows = text[starts + torch.arange(CONTEXT + 1, device=device)]
            loss_sum, num_tokens = model(rows[:, :-1], rows[:, 1:])
            accumulator.backward(loss_sum, num_tokens, last=i == MICRO_BATCHES)
        loss = accumulator.step()
        schedule.step()
        if step % 20 == 0 or step == args.steps:
            print(f"step {step}  loss {loss.item():.4f}", flush=True)

    stats = precision.stats(model)
    print(stats)
    print(*(stats.warnings() or ["no operand loses more than FP8 has to"]), sep="\n")


if __name__ == "__main__":
    main()
