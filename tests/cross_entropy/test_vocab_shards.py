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
from mixprec.cross_entropy import chunks as logit_chunks
from mixprec.cross_entropy.vocab_shard import VocabShard

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")

RANKS = 2


EVEN = [25, 25]


def shard_of(tensor: Tensor, rank: int, sizes: list[int] | None = None) -> Tensor:
    parts = tensor.detach().chunk(RANKS) if sizes is None else tensor.detach().split(sizes)
    return parts[rank].clone().requires_grad_(tensor.requires_grad)


def group() -> Any:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


# ------------------------------------------------------------------ tensor parallel


def check_options(rank: int) -> None:
    for how in ({}, {"recompute": True}, {"reduction": "none"}):
        for name, options in OPTIONS.items():
            check_against_the_whole(rank, EVEN, name, options, how)


def check_uneven(rank: int) -> None:
    for sizes in ([31, 19], [50, 0], [0, 50]):
        for name, options in OPTIONS.items():
            check_against_the_whole(rank, sizes, name, options, {})
        per_token: dict[str, Any] = {"reduction": "none"}
        check_against_the_whole(rank, sizes, "everything", OPTIONS["everything"], per_token)


def check_against_the_whole(
    rank: int, sizes: list[int], name: str, options: dict[str, Any], how: dict[str, Any]
) -> None:
    hidden, weight, targets = case()
    whole = filled(options, 37, 50, FP64)
    loss, count, details = linear_cross_entropy(
        hidden, weight, targets, return_details=True, **whole, **how
    )
    root = torch.randn(loss.shape, generator=torch.Generator().manual_seed(2), dtype=FP64)
    leaves = [hidden, weight] + ([whole["bias"]] if "bias" in whole else [])
    expected = list(torch.autograd.grad(loss, leaves, root))
    expected[1:] = [grad.split(sizes)[rank] for grad in expected[1:]]

    part = {
        k: shard_of(v, rank, sizes) if k in ("bias", "class_weight") else v
        for k, v in whole.items()
    }
    mine = [hidden.detach().requires_grad_(), shard_of(weight, rank, sizes)]
    mine += [part["bias"]] if "bias" in part else []
    found, same, same_details = linear_cross_entropy(
        mine[0],
        mine[1],
        targets,
        process_group=group(),
        chunk_size=10 if how else None,
        return_details=True,
        **part,
        **how,
    )
    grads = torch.autograd.grad(found, mine, root)
    torch.testing.assert_close((found, same), (loss, count), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(same_details, details, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        grads, tuple(expected), rtol=1e-11, atol=1e-12, msg=f"{name} {sizes}"
    )


def check_bf16(rank: int) -> None:
    for sizes in ([100, 100], [150, 50], [200, 0]):
        for logits_dtype in (FP32, BF16):
            check_bf16_shards(rank, sizes, logits_dtype)


def check_bf16_shards(rank: int, sizes: list[int], logits_dtype: torch.dtype) -> None:
    hidden, weight, targets = case(300, 32, 200, BF16)
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    linear_cross_entropy(exact[0], exact[1], targets)[0].backward()
    mine = shard_of(weight, rank, sizes)
    fp32_gradients(mine)
    linear_cross_entropy(hidden, mine, targets, process_group=group(), logits_dtype=logits_dtype)[
        0
    ].backward()
    assert error(hidden.grad, exact[0].grad) < 2.2e-3
    exact_grad = exact[1].grad
    assert exact_grad is not None
    if sizes[rank]:
        # Logits in BF16 are off by up to 2^-9 of a unit each, and so is their probability.
        bound = 3e-4 if logits_dtype == FP32 else 1e-3
        assert error(mine.grad, exact_grad.split(sizes)[rank]) < bound
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
    other = targets.clone()
    other[: rank + 1] = PADDING
    with pytest.raises(ValueError, match="ranks of process_group differ in the number of targets"):
        linear_cross_entropy(hidden, mine, other, process_group=group())
    other = targets.flip(0) if rank else targets
    with pytest.raises(ValueError, match="ranks of process_group differ in their targets; a group"):
        linear_cross_entropy(hidden, mine, other, process_group=group())
    with pytest.raises(ValueError, match=r"a target is 50, but weight has 50 rows"):
        linear_cross_entropy(hidden, mine, targets + 50 - targets, process_group=group())
    with pytest.raises(TypeError, match="process_group is a int; give a ProcessGroup"):
        linear_cross_entropy(hidden, mine, targets, process_group=3)  # pyright: ignore
    targets.fill_(PADDING)
    loss, count = linear_cross_entropy(hidden, mine, targets, process_group=group())
    assert loss == 0 and count == 0


def check_what_one_rank_refuses(rank: int) -> None:
    """The other one does not wait for it, and both can go on."""
    hidden, weight, targets = case(padding=0.0)
    mine = shard_of(weight, rank).detach()
    here: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"bias": torch.zeros(24, dtype=FP64)}, ValueError, r"bias is \[24\] but weight is"),
        ({"class_weight": torch.zeros(3)}, ValueError, "class_weight is"),
        ({"softcap": -1.0}, ValueError, "softcap is -1"),
        ({"ignore_index": None}, TypeError, "ignore_index is None"),
    ]
    for wrong, kind, said in here:
        options = wrong if rank else {}
        expected = (kind, said) if rank else (ValueError, "another rank of process_group has refu")
        with pytest.raises(expected[0], match=expected[1]):
            linear_cross_entropy(hidden, mine, targets, process_group=group(), **options)
    with pytest.raises(ValueError, match=r"weight is \[25, 9\] but hidden|another rank of process"):
        narrow = mine[:, :9] if rank else mine
        linear_cross_entropy(hidden, narrow, targets, process_group=group())
    adapted = nn.Linear(16, 25)
    adapted.register_forward_hook(lambda module, inputs, output: output)
    odd: list[tuple[Any, str]] = [
        (adapted, "which has a forward hook"),
        (None, "weight is a NoneType; it must be a tensor"),
        (torch.tensor(1.0), r"weight is \[\] but hidden is"),
        (mine.as_subclass(Doubled), "weight is a Doubled, a tensor that computes in its own way"),
    ]
    for wrong, said in odd:
        given, expected = (wrong, said) if rank else (mine, "another rank of process_group has")
        with pytest.raises((TypeError, ValueError), match=expected):
            linear_cross_entropy(hidden, given, targets, process_group=group())
    linear_cross_entropy(hidden, mine, targets, process_group=group())


class Doubled(Tensor):
    """A tensor that multiplies in a way of its own."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        return 2 * result if func is torch.nn.functional.linear else result


def test_targets_of_other_ranks_are_no_rows_here() -> None:
    shard = VocabShard("g", 4, 10)
    assert shard.local(torch.tensor([0, 5, 9, 3, 4, 7, 8]), 4).tolist() == [-1, 1, -1, -1, 0, 3, -1]


def check_what_ranks_differ_in(rank: int) -> None:
    hidden, weight, targets = case(padding=0.0)
    mine = shard_of(weight, rank).detach()
    ones = torch.ones(25, dtype=FP64)
    apart: list[dict[str, Any]] = [
        {"chunk_size": 5 + rank},
        {"chunk_size": None if rank else 5},
        {"num_tokens": None if rank else 37},
        {"softcap": 3.0 + rank},
        {"label_smoothing": 0.1 * rank},
        {"z_loss": 0.1 * rank},
        {"logit_multiplier": 1.0 + rank},
        {"class_weight": ones if rank else None},
        {"bias": ones if rank else None},
        {"token_weight": torch.ones(37) if rank else None},
        {"return_details": bool(rank)},
        {"ignore_index": -100 - rank},
        {"hidden": hidden.detach() if rank else hidden},
    ]
    for options in apart:
        given: dict[str, Any] = {"hidden": hidden, **options}
        with pytest.raises(ValueError, match="ranks of process_group differ in an option, in the"):
            linear_cross_entropy(weight=mine, targets=targets, process_group=group(), **given)
    linear_cross_entropy(hidden, mine, targets, process_group=group())


def check_default_chunks(rank: int) -> None:
    """Chunks are those of the largest shard on all ranks, or one waits for the others."""
    sizes = [44, 6]
    slab, fewest = logit_chunks._SLAB_BYTES, logit_chunks._FEWEST_TOKENS
    logit_chunks._SLAB_BYTES, logit_chunks._FEWEST_TOKENS = 44 * 8 * 4, 1  # 4 tokens, or 32
    try:
        check_against_the_whole(rank, sizes, "plain", {}, {})
        hidden, weight, targets = case(padding=0.0)
        seen: list[int] = []
        softmax = logit_chunks.softmax_gradient_
        logit_chunks.softmax_gradient_ = lambda *args, **kwargs: (
            seen.append(len(args[0])) or softmax(*args, **kwargs)
        )
        mine = shard_of(weight, rank, sizes)
        linear_cross_entropy(hidden, mine, targets, process_group=group())
        logit_chunks.softmax_gradient_ = softmax
        assert seen == [4] * 9 + [1]
    finally:
        logit_chunks._SLAB_BYTES, logit_chunks._FEWEST_TOKENS = slab, fewest


def test_shards_give_what_the_whole_gives() -> None:
    on_ranks(check_options, check_bf16, check_compiled, check_ties, check_default_chunks)


def check_low_logits(rank: int) -> None:
    """A rank without classes has no logit, not one of 0."""
    hidden, weight, targets = case()
    low = torch.full((50,), -1000.0, dtype=FP64)
    loss = linear_cross_entropy(hidden, weight, targets, bias=low, return_details=True)
    for sizes in ([50, 0], [0, 50]):
        part, bias = (shard_of(t, rank, sizes) for t in (weight, low))
        found = linear_cross_entropy(
            hidden, part, targets, bias=bias, process_group=group(), return_details=True
        )
        torch.testing.assert_close(found, loss, rtol=1e-12, atol=1e-12)


def check_three_ranks(rank: int) -> None:
    for name in ("plain", "everything"):
        check_against_the_whole(rank, [0, 20, 30], name, OPTIONS[name], {})


def check_odd_logits(rank: int) -> None:
    """NaN is the largest, as in torch, and a rank without classes has none."""
    hidden, weight, targets = case(4, padding=0.0)
    hidden, weight = hidden.detach().clone(), weight.detach().clone()
    weight[:, 0], hidden[2] = 1.0, 0.0
    hidden[2, 0] = -torch.inf  # the second, third and fourth token's every logit, or one
    hidden[1] = torch.nan
    weight[30, 1:] = torch.nan
    bare = linear_cross_entropy(hidden, weight, targets, return_details=True)[2].argmax
    for sizes in ([0, 50], [50, 0], [20, 30]):
        mine = shard_of(weight, rank, sizes)
        found = linear_cross_entropy(
            hidden, mine, targets, process_group=group(), return_details=True
        )[2].argmax
        assert found.tolist() == bare.tolist(), (sizes, found.tolist(), bare.tolist())


def test_shards_may_be_uneven_and_empty() -> None:
    on_ranks(check_uneven, check_low_logits, check_odd_logits)
    on_ranks(check_three_ranks, ranks=3)


def test_ranks_that_disagree_are_refused_and_none_waits_for_another() -> None:
    on_ranks(check_refusals, check_what_one_rank_refuses, check_what_ranks_differ_in)


def check_dtensor(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (RANKS,))
    for vocab in (50, 51, 1):  # shards of 26 and 25, and of 1 and 0
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
        layer = nn.Linear(weight.shape[1], vocab, bias=False, dtype=FP64)
        layer.weight = head
        layer.register_forward_hook(lambda module, inputs, output: output)
        with pytest.raises(TypeError, match=r"give weight=layer\.weight .*mesh\.get_group\(\)"):
            linear_cross_entropy(states, layer, targets)
        wrong = distribute_tensor(weight.detach(), mesh, [Shard(1)])
        with pytest.raises(ValueError, match="only its dim 0, the vocabulary, may be sharded"):
            linear_cross_entropy(states, wrong, targets)
        apart = distribute_tensor(hidden.detach()[:36], mesh, [Shard(0)])
        with pytest.raises(ValueError, match="need the same hidden states: redistribute it"):
            linear_cross_entropy(apart, head, targets[:18])
        ones = torch.linspace(0.5, 2.0, vocab, dtype=FP64)
        whole = linear_cross_entropy(hidden, weight, targets, bias=ones, class_weight=ones)[0]
        of_all = distribute_tensor(ones, mesh, [Shard(0)])
        spread = linear_cross_entropy(states, head, targets, bias=of_all, class_weight=of_all)[0]
        torch.testing.assert_close(spread, whole, rtol=1e-12, atol=0)
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
