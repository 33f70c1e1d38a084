"""A vocabulary over two ranks, and FSDP2 around a head: the same numbers as on one rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from losses import BF16, FP32, FP64, OPTIONS, PADDING, case, error, filled, fp32_gradients
from ranks import on_ranks
from torch import Tensor, nn

from mixprec.cross_entropy import LinearCrossEntropy, linear_cross_entropy

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")

RANKS = 2


def shard_of(tensor: Tensor, rank: int) -> Tensor:
    return tensor.detach().chunk(RANKS)[rank].clone().requires_grad_(tensor.requires_grad)


def group() -> Any:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


# ------------------------------------------------------------------ tensor parallel


def check_options(rank: int) -> None:
    hows: list[dict[str, Any]] = [{}, {"recompute": True}, {"reduction": "none"}]
    for name, options in OPTIONS.items():
        for how in hows:
            hidden, weight, targets = case()
            whole = filled(options, 37, 50, FP64)
            loss, count, details = linear_cross_entropy(
                hidden, weight, targets, return_details=True, **whole, **how
            )
            root = torch.randn(loss.shape, generator=torch.Generator().manual_seed(2), dtype=FP64)
            leaves = [hidden, weight] + ([whole["bias"]] if "bias" in whole else [])
            expected = list(torch.autograd.grad(loss, leaves, root))
            expected[1:] = [grad.chunk(RANKS)[rank] for grad in expected[1:]]

            part = {
                k: shard_of(v, rank) if k in ("bias", "class_weight") else v
                for k, v in whole.items()
            }
            mine = [hidden.detach().requires_grad_(), shard_of(weight, rank)]
            mine += [part["bias"]] if "bias" in part else []
            found, same, same_details = linear_cross_entropy(
                mine[0],
                mine[1],
                targets,
                process_group=group(),
                chunk_size=10,
                return_details=True,
                **part,
                **how,
            )
            grads = torch.autograd.grad(found, mine, root)
            torch.testing.assert_close((found, same), (loss, count), rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(same_details, details, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(grads, tuple(expected), rtol=1e-11, atol=1e-12, msg=name)


def check_bf16(rank: int) -> None:
    hidden, weight, targets = case(300, 32, 200, BF16)
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    linear_cross_entropy(exact[0], exact[1], targets)[0].backward()
    mine = shard_of(weight, rank)
    fp32_gradients(mine)
    linear_cross_entropy(hidden, mine, targets, process_group=group())[0].backward()
    assert error(hidden.grad, exact[0].grad) < 2.2e-3
    exact_grad = exact[1].grad
    assert exact_grad is not None
    assert error(mine.grad, exact_grad.chunk(RANKS)[rank]) < 3e-4
    both = [torch.empty_like(hidden) for _ in range(RANKS)]
    dist.all_gather(both, hidden.grad)
    assert torch.equal(both[0], both[1])


def check_compiled(rank: int) -> None:
    hidden, weight, targets = case(30, dtype=BF16)
    leaves = hidden, shard_of(weight, rank)
    whole = group()

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(hidden * 2, weight, targets, process_group=whole)[0] * 3

    expected = loss(*leaves)
    grads = torch.autograd.grad(expected, leaves)
    compiled: Any = torch.compile(loss, backend="aot_eager", fullgraph=True)
    found = compiled(*leaves)
    assert torch.equal(found, expected)
    for ours, right in zip(torch.autograd.grad(found, leaves), grads, strict=True):
        assert torch.equal(ours, right)


def check_ties(rank: int) -> None:
    """The first of equal logits is that of the first rank that has one."""
    hidden, targets = torch.ones(3, 1), torch.tensor([1, 3, 6])
    mine = torch.tensor([[0.0], [2.0], [0.0], [2.0]] if rank == 0 else [[1.0], [2.0], [2.0], [0.0]])
    details = linear_cross_entropy(
        hidden, mine, targets, process_group=group(), return_details=True
    )[2]
    assert details.argmax.tolist() == [1, 1, 1]
    assert details.correct.tolist() == [True, False, False]


def check_refusals(rank: int) -> None:
    hidden, weight, targets = case(padding=0.0)
    mine = shard_of(weight, rank).detach()
    with pytest.raises(ValueError, match="ranks of process_group hold different numbers of rows"):
        linear_cross_entropy(hidden, mine[rank:], targets, process_group=group())
    other = targets.clone()
    other[: rank + 1] = PADDING
    with pytest.raises(ValueError, match="ranks of process_group differ in the number of targets"):
        linear_cross_entropy(hidden, mine, other, process_group=group())
    with pytest.raises(ValueError, match=r"a target is 50, but weight has 50 rows"):
        linear_cross_entropy(hidden, mine, targets + 50 - targets, process_group=group())
    with pytest.raises(TypeError, match="process_group is a int; give a ProcessGroup"):
        linear_cross_entropy(hidden, mine, targets, process_group=3)  # pyright: ignore
    targets.fill_(PADDING)
    loss, count = linear_cross_entropy(hidden, mine, targets, process_group=group())
    assert loss == 0 and count == 0


def test_shards_give_what_the_whole_gives_and_ranks_that_disagree_are_refused() -> None:
    on_ranks(check_options, check_bf16, check_compiled, check_ties, check_refusals)


def check_dtensor(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (RANKS,))
    for vocab in (50, 51):  # 51: shards of 26 and 25
        hidden, weight, targets = case(vocab=vocab)
        loss, _ = linear_cross_entropy(hidden, weight, targets)
        loss.backward()
        head = nn.Parameter(distribute_tensor(weight.detach(), mesh, [Shard(0)]))
        states = distribute_tensor(hidden.detach(), mesh, [Replicate()]).requires_grad_()
        plain = hidden.detach().requires_grad_()
        found, _ = linear_cross_entropy(states, head, targets)
        found.backward()
        again, _ = linear_cross_entropy(plain, head, targets, process_group=mesh.get_group())
        again.backward()
        assert isinstance(head.grad, DTensor) and isinstance(states.grad, DTensor)
        torch.testing.assert_close((found, again), (loss, loss), rtol=1e-12, atol=0)
        for grad in (states.grad.full_tensor(), plain.grad):
            torch.testing.assert_close(grad, hidden.grad, rtol=1e-11, atol=1e-12)
        assert weight.grad is not None
        torch.testing.assert_close(head.grad.full_tensor(), 2 * weight.grad, rtol=1e-11, atol=1e-12)
        with pytest.raises(ValueError, match=r"weight is a DTensor.*Under FSDP read the weight"):
            linear_cross_entropy(plain, head, targets)
        wrong = distribute_tensor(weight.detach(), mesh, [Shard(1)])
        with pytest.raises(ValueError, match="only its dim 0, the vocabulary, may be sharded"):
            linear_cross_entropy(states, wrong, targets)
        apart = distribute_tensor(hidden.detach()[:36], mesh, [Shard(0)])
        with pytest.raises(ValueError, match="need the same hidden states: redistribute it"):
            linear_cross_entropy(apart, head, targets[:18])
        replicated = distribute_tensor(weight.detach(), mesh, [Replicate()])
        torch.testing.assert_close(linear_cross_entropy(plain, replicated, targets)[0], loss)


# ------------------------------------------------------------------ FSDP2


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(16, 16)
        self.head = LinearCrossEntropy(16, 50)

    def forward(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(self.body(hidden).tanh(), targets)


def check_fsdp(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    torch.manual_seed(0)
    model = Model()
    expected = Model()
    expected.load_state_dict(model.state_dict())
    hidden, _, targets = case(40, dtype=FP32)
    hidden = hidden.detach()
    loss_sum, num_tokens = expected(hidden, targets)
    (loss_sum / num_tokens).backward()

    mesh = init_device_mesh("cpu", (RANKS,))
    policy = MixedPrecisionPolicy(param_dtype=FP32, reduce_dtype=FP32)
    for module in (model.body, model.head, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    mine = slice(0, 25) if rank == 0 else slice(25, 40)  # ranks differ in their tokens
    with pytest.raises(ValueError, match="Under FSDP read the weight inside"):
        linear_cross_entropy(hidden[mine], model.head.weight, targets[mine])
    loss_sum, _ = model(hidden[mine], targets[mine])
    (loss_sum * RANKS / num_tokens).backward()  # FSDP takes the mean over ranks
    for (name, param), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        grad: Any = param.grad
        torch.testing.assert_close(grad.full_tensor(), other.grad, rtol=1e-5, atol=1e-7, msg=name)


def test_dtensor_says_where_its_rows_are_and_fsdp_gathers_it_around_its_module() -> None:
    on_ranks(check_dtensor, check_fsdp)
