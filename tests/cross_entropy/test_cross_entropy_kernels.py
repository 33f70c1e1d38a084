"""Kernels of the cross entropy against plain torch; on a GPU, or by Triton's interpreter.

Without a GPU: `make test-kernels`, which is a part of `make test`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernels import DEVICE, INTERPRETED, MARKS
from torch import Tensor

from mixprec.cross_entropy.rows import LossTerms, front_of_rows
from mixprec.cross_entropy.softmax import softmax_gradient_
from mixprec.cross_entropy.vocab_shard import VocabShard

pytestmark = MARKS

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
KINDS = [(BF16, BF16), (FP16, FP16), (FP32, BF16), (FP32, FP16), (FP32, FP32)]
"""Dtypes of logits and of their gradient."""

TERMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "smoothing": {"label_smoothing": 0.1},
    "class weight": {"class_weight": True},
    "class weight and smoothing": {"class_weight": True, "label_smoothing": 0.3},
    "softcap": {"softcap": 3.0},
    "z-loss": {"z_loss": 0.01},
    "token weight": {"token_weight": True},
    "everything": {
        "bias": True,
        "class_weight": True,
        "label_smoothing": 0.1,
        "softcap": 3.0,
        "z_loss": 0.01,
        "token_weight": True,
    },
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def case(tokens: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits whose rows are longer than the vocabulary, as in a slab, and targets."""
    g = seeded()
    stride = -(-vocab // 64) * 64
    logits = (3 * torch.randn(tokens, stride, generator=g)).to(DEVICE, dtype)[:, :vocab]
    return logits, torch.randint(vocab, (tokens,), generator=g).to(DEVICE)


def filled(name: str, tokens: int, vocab: int) -> tuple[LossTerms, Tensor | None]:
    g = seeded(1)
    tensors: dict[str, Any] = {
        "class_weight": torch.rand(vocab, generator=g).to(DEVICE),
        "bias": torch.randn(vocab, generator=g).to(DEVICE, BF16),
    }
    token_weight = torch.rand(tokens, generator=g).to(DEVICE)
    terms: dict[str, Any] = {k: tensors.get(k, v) for k, v in TERMS[name].items()}
    weighted = terms.pop("token_weight", False)
    return LossTerms(**terms), token_weight if weighted else None


def in_fp64(
    logits: Tensor, targets: Tensor, terms: LossTerms, token_weight: Tensor | None
) -> tuple[Any, Tensor]:
    """What plain torch makes of the same logits in FP64, and its unrounded gradient."""
    bias, class_weight = (None if t is None else t.double() for t in terms[:2])
    wide = terms._replace(bias=bias, class_weight=class_weight)
    weight = None if token_weight is None else token_weight.double()
    exact = logits.double()  # has no kernel
    rows = softmax_gradient_(exact, targets, wide, weight, rounded_to=FP64, argmax=True)
    return rows, exact


def by_kernel(
    logits: Tensor,
    gradient: Tensor | None,
    targets: Tensor,
    terms: LossTerms,
    token_weight: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    from mixprec.cross_entropy.softmax_kernels import loss_and_gradient_

    return loss_and_gradient_(logits, gradient, targets, None, token_weight, *terms)


def close(found: Tensor, exact: Tensor, *, rtol: float, atol: float, what: str) -> None:
    off = (found.double() - exact).abs() - rtol * exact.abs()
    worst = int(off.argmax())
    assert off.flatten()[worst] <= atol, (
        f"{what}: at {worst} of {list(exact.shape)} found {found.flatten()[worst].item()}, "
        f"in FP64 {exact.flatten()[worst].item()}"
    )


# Each kind of kernel is compiled once, so not every product of these is tried.
ROWS = [
    (vocab, name, *kind)
    for name in TERMS
    for kind in KINDS
    for vocab in (1, 50, 8192, 20_001)
    if name in ("plain", "everything") or (vocab == 20_001 and kind in KINDS[::2])
]


@pytest.mark.parametrize(("vocab", "name", "logits_dtype", "dtype"), ROWS)
def test_rows_are_those_of_fp64(
    vocab: int, name: str, logits_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    tokens = 3 if INTERPRETED else 37
    logits, targets = case(tokens, vocab, logits_dtype)
    terms, token_weight = filled(name, tokens, vocab)
    rows, exact = in_fp64(logits, targets, terms, token_weight)
    gradient = front_of_rows(logits, dtype)
    losses, lses, remainders = by_kernel(logits, gradient, targets, terms, token_weight)
    # A few FP32 roundings of numbers up to 20; exponentials by the fast instruction, 2^-22.
    close(losses, rows.losses, rtol=4e-6, atol=4e-6, what="losses")
    close(lses, rows.log_sum_exps, rtol=1e-6, atol=2e-6, what="log-sum-exps")
    # The interpreter cuts BF16 off where a GPU rounds.
    half_spacing = torch.finfo(dtype).eps / (1 if INTERPRETED else 2)
    tiny = 2**-25 if dtype == FP16 else 0.0  # half of FP16's smallest number
    close(gradient, exact, rtol=half_spacing + 1e-5, atol=3e-6 + tiny, what="gradient")
    at = targets[:, None]
    whole = gradient.gather(1, at).squeeze(1).double() + remainders
    close(whole, exact.gather(1, at).squeeze(1), rtol=1e-5, atol=3e-6, what="at the target")


def test_a_target_that_is_well_learnt_keeps_its_small_loss_and_gradient() -> None:
    """Loss and gradient are 1e-4, the spacing of FP32 at the log-sum-exp is 4e-6."""
    vocab = 9001
    logits, targets = case(3, vocab, FP32)
    logits[:] = logits.clamp(-3, 3)
    logits.scatter_(1, targets[:, None], 20.123)
    logits += 31.77
    rows, exact = in_fp64(logits, targets, LossTerms(), None)
    losses, _, remainders = by_kernel(logits, logits, targets, LossTerms(), None)
    # The sum of exponentials, near 1, has a spacing of 1.2e-7.
    close(losses, rows.losses, rtol=0, atol=4e-7, what="losses")
    close(logits, exact, rtol=2e-6, atol=4e-7, what="gradient")
    assert (rows.losses < 1e-3).all() and (remainders == 0).all()


@pytest.mark.parametrize("name", TERMS)
def test_target_logits_stand_in_for_rounded_ones(name: str) -> None:
    vocab = 9001
    logits, targets = case(3, vocab, BF16)
    terms, token_weight = filled(name, 3, vocab)
    given = torch.tensor([1.2345, 7.654, -3.21], device=DEVICE)
    exact = logits.double()
    exact.scatter_(1, targets[:, None], given.double()[:, None])
    rows, exact = in_fp64(exact, targets, terms, token_weight)
    from mixprec.cross_entropy.softmax_kernels import loss_and_gradient_

    losses, _, remainders = loss_and_gradient_(logits, logits, targets, given, token_weight, *terms)
    close(losses, rows.losses, rtol=4e-6, atol=4e-6, what="losses")
    at = targets[:, None]
    whole = logits.gather(1, at).squeeze(1).double() + remainders
    close(whole, exact.gather(1, at).squeeze(1), rtol=1e-5, atol=3e-6, what="at the target")


@pytest.mark.parametrize("width", [1, 300, 2048])
def test_target_logits_are_the_products_of_their_rows(width: int) -> None:
    from mixprec.cross_entropy.softmax_kernels import target_logits

    g = seeded()
    states = torch.randn(5, 2 * width, generator=g).to(DEVICE, BF16)[:, :width]
    weight = torch.randn(7, width, generator=g).to(DEVICE, BF16)
    classes = torch.tensor([6, 0, -1, 3, 3], device=DEVICE)
    found = target_logits(states, weight, classes)
    exact = (states.double() * weight[classes].double()).sum(1)
    exact[2] = 0
    close(found, exact, rtol=0, atol=1e-6 * width, what="target logits")


@pytest.mark.parametrize("name", ["plain", "everything"])
@pytest.mark.parametrize("logits_dtype", [BF16, FP32])
def test_losses_alone_leave_the_logits_as_they_are(name: str, logits_dtype: torch.dtype) -> None:
    logits, targets = case(3, 10_000, logits_dtype)
    before = logits.clone()
    terms, token_weight = filled(name, 3, 10_000)
    losses, lses, _ = by_kernel(logits, None, targets, terms, token_weight)
    assert torch.equal(logits, before)
    again = by_kernel(logits, front_of_rows(logits, BF16), targets, terms, token_weight)
    assert torch.equal(losses, again[0])
    # On a GPU either kernel may round the last product of a logarithm before it is added, or fuse
    # the two: half the spacing of a logarithm near 10, and of a sum below 16 once more.
    fused = 0 if INTERPRETED else 2**-20
    close(lses, again[1], rtol=0, atol=fused, what="log-sum-exps")


def test_front_half_is_written_after_it_was_read() -> None:
    """The same gradient in memory of its own. In another layout, sums would have another order."""
    tokens = 2 if INTERPRETED else 500
    logits, targets = case(tokens, 20_001, FP32)
    apart = front_of_rows(torch.empty_strided(logits.shape, logits.stride(), device=DEVICE), BF16)
    by_kernel(logits, apart, targets, LossTerms(), None)
    gradient = front_of_rows(logits, BF16)
    by_kernel(logits, gradient, targets, LossTerms(), None)
    wrong = (gradient != apart).nonzero()
    assert not len(wrong), f"{len(wrong)} elements differ, the first at {wrong[0].tolist()}"


def test_a_class_barred_by_minus_infinity_gets_nothing_even_a_whole_block_of_them() -> None:
    logits, targets = case(2, 20_000, FP32)
    bias = torch.zeros(20_000, device=DEVICE)
    bias[:9000] = -torch.inf
    targets.fill_(12_345)
    exact = (logits.double() + bias).log_softmax(1)
    gradient = front_of_rows(logits, BF16)
    losses, _, _ = by_kernel(logits, gradient, targets, LossTerms(bias), None)
    close(losses, -exact[:, 12_345], rtol=1e-6, atol=1e-6, what="losses")
    assert (gradient[:, :9000] == 0).all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize(("logits_dtype", "vocab"), [(BF16, 9001), (FP32, 50), (FP16, 1)])
def test_argmax_is_the_first_of_the_largest_logits(
    logits_dtype: torch.dtype, vocab: int, gradient: bool
) -> None:
    from mixprec.cross_entropy.softmax_kernels import loss_and_gradient_, sums

    logits, targets = case(5, vocab, logits_dtype)
    logits[0, [vocab // 3, vocab // 2, vocab - 1]] = 50.0  # in the first block and a later one
    logits[1, vocab - 1] = 50.0
    logits[2, [0, vocab // 2]] = 50.0
    logits[3, :-1] = -torch.inf
    logits[3, -1] = -1000.0
    logits[4] = 0.0
    exact = logits.double().argmax(1)
    found, of_shard = torch.empty_like(targets), torch.empty_like(targets)
    sums(logits, targets, None, None, None, 0.0, None, of_shard)
    out = logits if gradient else None
    loss_and_gradient_(logits, out, targets, None, None, *LossTerms(), found)
    assert found.tolist() == exact.tolist()
    assert of_shard.tolist() == exact.tolist()


def test_argmax_takes_the_exact_logit_of_the_target_and_the_bias() -> None:
    from mixprec.cross_entropy.softmax_kernels import loss_and_gradient_

    logits, targets = case(2, 9001, BF16)
    targets[:] = 8000
    bias = torch.zeros(9001, device=DEVICE)
    bias[123] = 100.0
    given = torch.tensor([50.0, 200.0], device=DEVICE)
    found = torch.empty_like(targets)
    loss_and_gradient_(logits, None, targets, given, None, *LossTerms(bias), found)
    assert found.tolist() == [123, 8000]


def test_nan_in_a_logit_reaches_the_loss() -> None:
    logits, targets = case(2, 9000, BF16)
    logits[1, 8500] = torch.nan
    losses, _, _ = by_kernel(logits, None, targets, LossTerms(), None)
    assert losses.isnan().tolist() == [False, True]


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize(("logits_dtype", "dtype"), [(BF16, BF16), (FP32, BF16), (FP32, FP32)])
def test_a_shard_that_holds_every_class_is_the_whole(
    name: str, logits_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    vocab = 9001
    logits, targets = case(3, vocab, logits_dtype)
    terms, token_weight = filled(name, 3, vocab)
    rows, exact = in_fp64(logits, targets, terms, token_weight)
    from mixprec.cross_entropy.by_kernels import _of_a_shard

    found = _of_a_shard(
        logits, targets, terms, token_weight, None, dtype, True, VocabShard(None, 0, vocab)
    )
    assert found.gradient is not None and found.remainders is not None
    assert found.argmaxes is not None and rows.argmaxes is not None
    if terms.softcap is None:  # it makes equals of the largest logits, as each rounds it
        assert found.argmaxes.tolist() == rows.argmaxes.tolist()
    close(found.losses, rows.losses, rtol=4e-6, atol=4e-6, what="losses")
    spacing = torch.finfo(dtype).eps / (1 if INTERPRETED else 2)
    close(found.gradient, exact, rtol=spacing + 1e-5, atol=3e-6, what="gradient")
    at = targets[:, None]
    assert bool(found.remainders.any()) == (dtype != FP32)
    whole = found.gradient.gather(1, at).squeeze(1).double() + found.remainders
    if not INTERPRETED:  # which rounds in another way than torch does
        close(whole, exact.gather(1, at).squeeze(1), rtol=1e-5, atol=3e-6, what="at the target")


def test_shards_know_nothing_of_targets_elsewhere() -> None:
    from mixprec.cross_entropy.softmax_kernels import shard_gradient_, sums

    logits, targets = case(3, 9000, FP32)
    exact = logits.double().softmax(1)
    exact.scatter_add_(1, targets[:, None], -torch.ones_like(exact[:, :1]))
    whole = logits.clone()
    losses, lse, _ = by_kernel(whole, whole, targets, LossTerms(), None)
    parts = [logits[:, :4000], logits[:, 4000:]]
    tops, totals, _ = zip(
        *(sums(part, targets, None, None, None, 0.0, None) for part in parts), strict=True
    )
    top = torch.maximum(*tops)
    total = torch.stack([t * (m - top).exp() for t, m in zip(totals, tops, strict=True)]).sum(0)
    close(top + total.log(), lse.double(), rtol=1e-6, atol=0, what="log-sum-exp")
    ones, zeros = torch.ones_like(lse), torch.zeros_like(lse)
    for part, start in zip(parts, (0, 4000), strict=True):
        rows = targets - start
        rows = rows.where((rows >= 0) & (rows < part.shape[1]), -1)
        at_target = whole.gather(1, targets[:, None]).squeeze(1)
        shard_gradient_(
            part, part, None, None, rows, at_target, top, ones / total, zeros, None, smoothing=False
        )
    close(logits, exact, rtol=2e-6, atol=1e-7, what="gradient")
    assert losses.isfinite().all()


@pytest.mark.parametrize("targets", ["random", "all equal", "few"])
@pytest.mark.parametrize("width", [1, 64, 300])
def test_products_are_added_by_target_in_a_fixed_order(width: int, targets: str) -> None:
    g = seeded()
    tokens, vocab = 60, 40
    of = {"random": 40, "all equal": 1, "few": 3}[targets]
    labels = torch.randint(of, (tokens,), generator=g).to(DEVICE)
    elsewhere = torch.rand(tokens, generator=g).to(DEVICE) < 0.3
    labels[elsewhere] = -1
    factors = torch.randn(tokens, generator=g).to(DEVICE)
    states = torch.randn(tokens, 2 * width, generator=g).to(DEVICE, BF16)[:, :width]
    states[elsewhere] = torch.nan  # such a state is not read
    start = torch.randn(vocab, width, generator=g).to(DEVICE)

    from mixprec.cross_entropy.softmax_kernels import add_products_by_class_

    sums, again = start.clone(), start.clone()
    add_products_by_class_(sums, labels, factors, states)
    add_products_by_class_(again, labels, factors, states)
    expected = start.double()
    here = ~elsewhere
    products = factors[here, None].double() * states[here].double()
    expected.index_add_(0, labels[here], products)
    close(sums, expected, rtol=0, atol=2e-5, what="sums")
    assert torch.equal(sums, again)


def test_products_of_no_class_at_all_change_nothing() -> None:
    from mixprec.cross_entropy.softmax_kernels import add_products_by_class_

    sums = torch.ones(3, 5, device=DEVICE)
    nowhere = torch.full((4,), -1, device=DEVICE)
    states = torch.full((4, 5), torch.nan, device=DEVICE)
    add_products_by_class_(sums, nowhere, torch.ones(4, device=DEVICE), states)
    add_products_by_class_(sums, nowhere[:0], torch.ones(0, device=DEVICE), states[:0])
    assert (sums == 1).all()


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("width", [1, 300, 2048])
def test_multiples_of_rows_are_rounded_once(width: int, dtype: torch.dtype, added: bool) -> None:
    from mixprec.cross_entropy.softmax_kernels import multiples_of_rows_

    g = seeded()
    weight = torch.randn(7, 2 * width, generator=g).to(DEVICE, BF16)[:, :width]
    classes = torch.tensor([6, 0, -1, 3, 3], device=DEVICE)
    factors = torch.randn(5, generator=g).to(DEVICE)
    found = torch.full((5, width + 3), 9.0, device=DEVICE, dtype=dtype)
    addends = 100 * torch.randn(5, width, generator=g).to(DEVICE) if added else None
    multiples_of_rows_(found[:, :width], factors, weight, classes, addends)
    expected = factors[:, None].double() * weight[classes].double()
    expected[2] = 0
    if addends is not None:
        expected += addends
    assert (found[:, width:] == 9).all()
    # The interpreter cuts BF16 off where a GPU rounds.
    half_spacing = torch.finfo(dtype).eps / (1 if INTERPRETED and dtype == BF16 else 2)
    # FP32 rounds the product, then the sum, each by half a spacing of numbers up to 400.
    close(found[:, :width], expected, rtol=half_spacing, atol=4e-5 * added, what="multiples")


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_scaling_multiplies_in_fp32_and_one_writes_nothing(dtype: torch.dtype) -> None:
    from mixprec.cross_entropy.softmax_kernels import scale_

    values = torch.randn(3, 10_001, generator=seeded()).to(DEVICE, dtype)
    for factor in (1.0, 1 / 7021):
        root = torch.tensor(factor, device=DEVICE)
        scaled = values.clone()
        scale_(scaled, root)
        if not (INTERPRETED and dtype == BF16):  # the interpreter cuts off instead of rounding
            assert torch.equal(scaled, (values.float() * root).to(dtype))
    scale_(values[:0], torch.ones((), device=DEVICE))


def test_a_target_that_another_shard_holds_has_no_remainder_here() -> None:
    logits, targets = case(3, 9001, BF16)
    targets[1] = -1
    from mixprec.cross_entropy.by_kernels import _of_a_shard

    found = _of_a_shard(
        logits,
        targets,
        LossTerms(),
        None,
        torch.zeros(3, device=DEVICE),
        BF16,
        False,
        VocabShard(None, 0, 9001),
    )
    assert found.remainders is not None
    assert (found.remainders != 0).tolist() == [True, False, True]
