"""Unit-scaled training: gradients that do not depend on how a step is cut up, and learning."""

from __future__ import annotations

import runpy
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import mixprec
from mixprec import umup


def decoder(**options: Any) -> umup.Decoder:
    model = umup.Decoder(50, width=32, depth=2, seq_len=16, **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "norm" not in name:
                param.normal_(generator=generator)
    return model


def batch() -> tuple[Tensor, Tensor]:
    """12 rows of tokens and targets, of which more than half is padding."""
    g = torch.Generator().manual_seed(1)
    tokens = torch.randint(50, (12, 16), generator=g)
    targets = torch.randint(50, (12, 16), generator=g)
    targets[torch.rand(12, 16, generator=g) < 0.6] = -100
    targets[3] = -100
    return tokens, targets


def rms(tensor: Tensor) -> float:
    return tensor.detach().double().square().mean().sqrt().item()


class Recorder(torch.optim.SGD):
    """Keeps the gradients that reach the rule."""

    def step(self, closure: Any = None) -> Any:
        self.seen = {
            name: param.grad.clone()
            for group in self.param_groups
            for name, param in zip(group["param_names"], group["params"], strict=True)
        }


def step_gradients(splits: list[int], wrapped: bool = False, **options: Any) -> dict[str, Tensor]:
    """The gradients of one step over the batch, in micro-batches of those sizes."""
    model = decoder()
    optimizer = Recorder(umup.param_groups(model, 0.5, torch.optim.SGD))
    outer = mixprec.MixedPrecision(optimizer) if wrapped else optimizer
    accumulator = mixprec.GradientAccumulator(outer, **options)
    parts = list(zip(*(t.split(splits) for t in batch()), strict=True))
    for i, (tokens, targets) in enumerate(parts):
        accumulator.backward(*model.loss(tokens, targets), last=i == len(parts) - 1)
    loss = accumulator.step()
    assert 3.9 < loss < 4.2  # ln 50 = 3.91, and readouts of RMS 32^-1/2
    return optimizer.seen


@pytest.mark.parametrize("splits", [[3, 3, 3, 3], [1, 2, 1, 8], [3, 1, 8]])
@pytest.mark.parametrize("wrapped", [False, True])
def test_even_and_uneven_micro_batches_give_the_gradients_of_the_full_batch(
    splits: list[int], wrapped: bool
) -> None:
    whole = step_gradients([12])
    parts = step_gradients(splits, wrapped, presumed_tokens=2**6)
    for name, grad in whole.items():
        assert float((parts[name] - grad).norm() / grad.norm()) < 1e-6, name


def test_gradients_at_the_optimizer_have_rms_near_1_and_lookups_their_share() -> None:
    grads = step_gradients([12])
    for name, grad in grads.items():
        factor = 50**0.5 if name == "embedding.weight" else 1.0
        least = 0.03 if "query" in name or "key" in name else 0.3  # theirs are small; see attention
        assert least < rms(grad) * factor < 2, (name, rms(grad))


def on_a_rank(rank: int, folder: Path, uneven: bool) -> None:
    model = nn.parallel.DistributedDataParallel(LossOf(decoder()))
    optimizer = Recorder(umup.param_groups(model, 0.5, torch.optim.SGD))
    accumulator = mixprec.GradientAccumulator(optimizer, grad_reduction="mean")
    # One rank has rows 0..3 or 3 alone, which is padding; the other has the rest.
    rows = [0, 4, 12] if not uneven else [3, 4, 12]
    mine = [(rows[0], rows[1])] if rank == 0 else [(rows[1], rows[2])]
    if uneven and rank == 1:
        mine = [(0, 3), (4, 12)]
    tokens, targets = batch()
    first = mine[0]
    with model.no_sync():
        accumulator.backward(*model(tokens[slice(*first)], targets[slice(*first)]), last=False)
    last = mine[-1] if len(mine) > 1 else (12, 12)  # an empty micro-batch
    accumulator.backward(*model(tokens[slice(*last)], targets[slice(*last)]))
    loss = accumulator.step()
    torch.save((optimizer.seen, loss, accumulator.num_tokens), folder / f"rank{rank}.pt")


class LossOf(nn.Module):
    def __init__(self, model: umup.Decoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, targets: Tensor) -> Any:
        return self.model.loss(tokens, targets)


@pytest.mark.parametrize("uneven", [False, True])
def test_two_ranks_give_the_gradients_of_the_full_batch(uneven: bool, tmp_path: Path) -> None:
    on_ranks(partial(on_a_rank, folder=tmp_path, uneven=uneven))
    whole = step_gradients([12])
    results = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for grads, loss, num_tokens in results:
        assert num_tokens == (batch()[1] != -100).sum()
        torch.testing.assert_close(loss, results[0][1], rtol=0, atol=0)
        for name, grad in whole.items():
            found = grads[f"model.{name}"]
            assert float((found - grad).norm() / grad.norm()) < 1e-6, name


# ------------------------------------------------------------------ sharded


def sharded_on_a_rank(rank: int, folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    plan: dict[str, Any] = {"layers.*.mlp.down": RowwiseParallel()}
    for name in ("mlp.gate", "mlp.up"):
        plan[f"layers.*.{name}"] = ColwiseParallel()
    parallel, sharded = decoder(), decoder()
    parallelize_module(parallel, mesh, plan)
    for layer in sharded.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    results = [one_step(model) for model in (parallel, sharded)]
    torch.save(results, folder / f"rank{rank}.pt")


def one_step(model: umup.Decoder) -> dict[str, Tensor]:
    """Weights after a step of AdamW, whole."""
    kind = torch.optim.AdamW
    optimizer = kind(umup.param_groups(model, 2**-3, kind, 2**-7))
    tokens, targets = batch()
    logits = model(tokens).flatten(0, 1)
    umup.losses.cross_entropy(logits, targets.flatten(), reduction="sum").backward()
    optimizer.step()
    return {
        name: p.full_tensor() if isinstance(p, DTensor) else p.detach()
        for name, p in model.named_parameters()
    }


def test_fully_sharded_and_tensor_parallel_models_step_as_whole_ones(tmp_path: Path) -> None:
    on_ranks(partial(sharded_on_a_rank, folder=tmp_path))
    whole = one_step(decoder())
    for rank in range(2):
        parallel, sharded = torch.load(tmp_path / f"rank{rank}.pt")
        torch.testing.assert_close(sharded, whole, rtol=1e-5, atol=1e-6)
        # A sum that is cut in two rounds elsewhere, and Adam's first step is a sign.
        for name, weight in whole.items():
            same = torch.isclose(parallel[name], weight, rtol=1e-3, atol=1e-4).double().mean()
            assert same > 0.999, name


# ------------------------------------------------------------------ the example


def test_the_example_finds_a_rate_at_one_width_and_trains_another_with_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example = Path(__file__).parents[2] / "examples" / "transfer_learning_rate.py"
    sizes = ["--steps", "10", "--small", "32", "--large", "64"]
    monkeypatch.setattr(sys, "argv", [str(example), *sizes])
    runpy.run_path(str(example), run_name="__main__")
    printed = capsys.readouterr().out
    assert "readout.weight" in printed and "the best learning rate moves by 0 octaves" in printed
    last = printed.splitlines()[-1]
    assert last.startswith("width 64 at the rate that was best at width 32")
    assert float(last.split()[-1]) < 4.5  # from ln 256 = 5.55


# ------------------------------------------------------------------ it learns


RULES: dict[str, Any] = {
    "AdamW": (torch.optim.AdamW, 2**-3, {}),
    "SGD": (torch.optim.SGD, 2**-6, {"momentum": 0.9}),
    "RMSprop": (torch.optim.RMSprop, 2**-5, {}),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("tied", [False, True])
def test_a_decoder_in_bf16_learns_under_one_base_rate(rule: str, tied: bool) -> None:
    kind, lr, options = RULES[rule]
    model = mixprec.cast_model(decoder(tied=tied), "bf16")
    inner = kind(umup.param_groups(model, lr, kind), **options)
    accumulator = mixprec.GradientAccumulator(mixprec.MixedPrecision(inner), presumed_tokens=2**6)
    tokens, targets = batch()
    losses: list[float] = []
    for _ in range(30):
        for rows in (slice(0, 4), slice(4, 12)):
            accumulator.backward(*model.loss(tokens[rows], targets[rows]), last=rows.start == 4)
        losses.append(accumulator.step().item())
    assert losses[-1] < losses[0] - 1.0, losses
