"""Train with FSDP2 on several ranks, and never make the logits of all tokens.

    torchrun --nproc-per-node 2 examples/sharded_head.py

Each rank has its own tokens, not equally many. FSDP2 gathers a weight around the forward of the
module that owns it, so the loss is computed there: `LinearCrossEntropy` is that module. Parameters
are FP32 shards that FSDP2 casts to BF16 to compute with, and gradients are summed over ranks in
FP32: AdamW needs no masters then.
"""

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

import mixprec

VOCAB, WIDTH, PADDING, STEPS = 1000, 64, -100, 20


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.body = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        self.head = mixprec.LinearCrossEntropy(WIDTH, VOCAB, shift=True)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Loss summed over next tokens, and their number."""
        hidden = self.body(self.embedding(tokens.clamp(min=0)))
        return self.head(hidden, tokens)


def batch(step: int, rank: int) -> Tensor:
    """Counting sequences, `[8, 32]`; from the second rank on, half of each is padding."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    starts = torch.randint(VOCAB, (8, 1), generator=generator)
    tokens = (starts + torch.arange(32)) % VOCAB
    tokens[:, 16 if rank else 32 :] = PADDING
    return tokens


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(0)
    model = Model().to(device)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for module in (model.head, model):
        fully_shard(module, mesh=init_device_mesh(device, (ranks,)), mp_policy=policy)
    assert isinstance(model, FSDPModule)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    for step in range(STEPS):
        loss_sum, num_tokens = model(batch(step, rank).to(device))
        whole = torch.stack([loss_sum.detach().double(), num_tokens.double()])
        dist.all_reduce(whole)  # sums over ranks: of losses, of tokens
        # Divided by the tokens of all ranks; times the ranks, whose mean FSDP2 takes.
        (loss_sum * (ranks / whole[1]).float()).backward()
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0 and (step + 1) % 5 == 0:
            print(f"step {step + 1}  loss {(whole[0] / whole[1]).item():.4f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
