"""Train in FP8 with FSDP2, whose gathered weights travel as bytes.

    torchrun --nproc-per-node 2 examples/fp8_fsdp.py

Parameters are FP32 shards. Each rank casts its own rows to FP8 before they are gathered, with a
multiplier on which all ranks agree; gradients are summed over ranks in FP32, so AdamW needs no
masters. Convert first, shard afterwards.
"""

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import mixprec
from mixprec import float8, formats

VOCAB, WIDTH, STEPS = 64, 64, 40


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.gate, self.up = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(0)
    blocks = nn.Sequential(Block(), Block())
    model = nn.Sequential(nn.Embedding(VOCAB, WIDTH), blocks, nn.Linear(WIDTH, VOCAB)).to(device)
    precision = mixprec.Precision("fp8", params=formats.FP32, compute=formats.BF16)
    precision.convert(model, exclude=("2",), min_dim=64)  # the head stays in 16 bits
    gathered = float8.enable_fsdp_float8_all_gather(model)
    mesh = init_device_mesh(device, (ranks,))
    for module in (*blocks, model):
        fully_shard(module, mesh=mesh, mp_policy=precision.fsdp_policy())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    generator = torch.Generator().manual_seed(rank)  # each rank has tokens of its own
    for step in range(1, STEPS + 1):
        tokens = torch.randint(VOCAB, (256,), generator=generator).to(device)
        # Summed, so that gradients stay within the range of FP8, and divided by AdamW itself.
        loss = F.cross_entropy(model(tokens).float(), (5 * tokens + 1) % VOCAB, reduction="sum")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0 and step % 10 == 0:
            print(f"step {step}  loss {loss.item() / len(tokens):.4f}", flush=True)
    if rank == 0:
        print(f"{len(gathered)} weights were gathered as bytes")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
