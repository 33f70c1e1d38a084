# pyright: basic, reportMissingImports=false, reportIndexIssue=false
"""Triton kernels of the cross entropy: a row of logits becomes its own gradient where it lies.

`rows` has the equations, `in_torch` the same steps in plain torch. Logits are read twice,
for the softmax online (Milakov and Gimelshein 2018, arXiv:1805.02867) and for the gradient, and
written once. Blocks of 4096 with 8 warps do so at 3.9 TB/s on an H200, whose copies run at 4.2.

Rows may be read and written up to `padded`, a multiple of 16 where their memory reaches that far:
Triton takes 16 bytes at once only where it can tell that a mask does not divide them.

Only the options in use are compiled in. Triton is imported here, so this module is imported inside
functions that have a CUDA device before them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixprec.devices import on_device

__all__ = [
    "add_products_by_class_",
    "loss_and_gradient_",
    "multiples_of_rows_",
    "scale_",
    "shard_gradient_",
    "sums",
    "target_logits",
]

_BLOCK = 4096
_ELEMENTS_OF_A_WARP = 512
_SCALE_BLOCK = 8192


@triton.jit
def _load_logits(
    logits,
    bias,
    offsets,
    vocab,
    padded,
    target,
    target_logit,
    softcap,
    SOFTCAP: tl.constexpr,
    EXACT: tl.constexpr,
    EVICTION: tl.constexpr,
):
    inside = offsets < vocab
    z = tl.load(logits + offsets, mask=offsets < padded, other=0.0, eviction_policy=EVICTION).to(
        tl.float32
    )
    if EXACT:
        z = tl.where(offsets == target, target_logit, z)
    if bias is not None:
        z += tl.load(bias + offsets, mask=inside, other=0.0).to(tl.float32)
    if SOFTCAP:  # tanh |u| = (1 - e) / (1 + e), e = exp(-2 |u|)
        e = tl.exp(-2.0 * tl.abs(z) / softcap)
        capped = softcap * (1.0 - e) / (1.0 + e)
        z = tl.where(z < 0, -capped, capped)
    return tl.where(inside, z, -float("inf"))


@triton.jit
def _row_sums(
    logits,
    bias,
    class_weight,
    vocab,
    padded,
    target,
    target_logit,
    softcap,
    SOFTCAP: tl.constexpr,
    SMOOTHING: tl.constexpr,
    EXACT: tl.constexpr,
    ARGMAX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Largest logit, sum of exponentials below it, sum of weighted logits (if smoothing).

    Then the first class of the largest logit (if ARGMAX).
    """
    top = -float("inf")
    best = 0
    total = 0.0
    weighted = 0.0
    for start in range(0, vocab, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        inside = offsets < vocab
        z = _load_logits(
            logits,
            bias,
            offsets,
            vocab,
            padded,
            target,
            target_logit,
            softcap,
            SOFTCAP,
            EXACT,
            "evict_last",
        )
        higher = tl.maximum(top, tl.max(z, axis=0))
        if ARGMAX:
            first = tl.min(tl.where(z == higher, offsets, 2147483647), axis=0)
            best = tl.where(higher > top, first, best)
        shift = tl.where(higher == -float("inf"), 0.0, higher)  # all barred so far: no NaN of it
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(z - shift), axis=0)
        top = higher
        if SMOOTHING:
            if class_weight is not None:
                w = tl.load(class_weight + offsets, mask=inside, other=0.0)
                weighted += tl.sum(tl.where(inside, w * z, 0.0), axis=0)
            else:
                weighted += tl.sum(tl.where(inside, z, 0.0), axis=0)
    return top, total, weighted, best


@triton.jit
def _write_gradient(
    logits,
    gradient,
    bias,
    class_weight,
    vocab,
    padded,
    softcap,
    target,
    at_target,
    top,
    share,
    spread,
    SOFTCAP: tl.constexpr,
    SMOOTHING: tl.constexpr,
    NARROWER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`(share exp(z - top) - spread w) slope`, and `at_target` at the target.

    Not `exp(z - lse)`: rounding a log-sum-exp of 20 would move every p by a millionth, which is all
    of p - 1 where a target is well learnt. `z - top` is exact there.

    A gradient of half the width goes to the front half of the row: bytes 2j to 2j+1, where those of
    4j to 4j+3 were read. No block writes what a later one reads; the first writes what it reads
    itself, so all of it must have been read. One of the whole width is written from the back of the
    row, whose logits were read last and may still be in the cache.
    """
    last = (vocab - 1) // BLOCK * BLOCK
    for done in range(0, vocab, BLOCK):
        start = done if NARROWER else last - done
        offsets = start + tl.arange(0, BLOCK)
        inside = offsets < vocab
        z = _load_logits(
            logits,
            bias,
            offsets,
            vocab,
            padded,
            target,
            0.0,
            softcap,
            SOFTCAP,
            False,
            "evict_first",
        )
        g = share * tl.exp(z - top)
        if SMOOTHING:
            if class_weight is not None:
                g -= spread * tl.load(class_weight + offsets, mask=inside, other=0.0)
            else:
                g -= spread
        if SOFTCAP:
            u = z / softcap
            g *= 1.0 - u * u
        g = tl.where(offsets == target, at_target, g)
        if NARROWER:
            tl.debug_barrier()
        tl.store(
            gradient + offsets,
            g.to(gradient.dtype.element_ty),
            mask=offsets < padded,
            eviction_policy="evict_first",
        )


@triton.jit
def _loss_and_gradient_kernel(
    logits,
    gradient,
    targets,
    target_logits,
    bias,
    class_weight,
    weight_sum,
    token_weight,
    losses,
    lses,
    remainders,
    argmaxes,
    logits_stride,
    gradient_stride,
    vocab,
    padded,
    label_smoothing,
    softcap,
    z_loss,
    SMOOTHING: tl.constexpr,
    SOFTCAP: tl.constexpr,
    Z_LOSS: tl.constexpr,
    EXACT: tl.constexpr,
    ARGMAX: tl.constexpr,
    GRADIENT: tl.constexpr,
    NARROWER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_stride
    target = tl.load(targets + row).to(tl.int32)
    target_logit = 0.0
    if EXACT:
        target_logit = tl.load(target_logits + row)
    # Before any reduction, whose barriers keep it apart from the writes to the same place.
    picked = _load_logits(
        logits, bias, target, vocab, padded, target, target_logit, softcap, SOFTCAP, EXACT, ""
    )
    top, total, weighted, best = _row_sums(
        logits,
        bias,
        class_weight,
        vocab,
        padded,
        target,
        target_logit,
        softcap,
        SOFTCAP,
        SMOOTHING,
        EXACT,
        ARGMAX,
        BLOCK,
    )
    log_total = tl.log(total)
    lse = top + log_total

    hit = 1.0
    target_weight = 1.0
    if class_weight is not None:
        target_weight = tl.load(class_weight + target)
        hit = target_weight
    if SMOOTHING:
        hit = hit * (1.0 - label_smoothing)
    loss = hit * ((top - picked) + log_total)
    mass = hit
    taken = hit
    spread = 0.0
    if SMOOTHING:
        spread = label_smoothing / vocab
        everything = vocab * 1.0
        if weight_sum is not None:
            everything = tl.load(weight_sum)
        loss += spread * (everything * lse - weighted)
        mass += spread * everything
        taken += spread * target_weight
    if Z_LOSS:
        loss += z_loss * lse * lse
        mass += 2.0 * z_loss * lse
    if token_weight is not None:
        factor = tl.load(token_weight + row)
        loss *= factor
        mass *= factor
        taken *= factor
        spread *= factor
    tl.store(losses + row, loss)
    tl.store(lses + row, lse)
    if ARGMAX:
        tl.store(argmaxes + row, best)

    if GRADIENT:
        share = tl.div_rn(mass, total)
        at_target = share * tl.exp(picked - top) - taken
        if SOFTCAP:
            u = picked / softcap
            at_target *= 1.0 - u * u
        rounded = at_target.to(gradient.dtype.element_ty).to(tl.float32)
        tl.store(remainders + row, at_target - rounded)
        _write_gradient(
            logits,
            gradient + row * gradient_stride,
            bias,
            class_weight,
            vocab,
            padded,
            softcap,
            target,
            at_target,
            top,
            share,
            spread,
            SOFTCAP,
            SMOOTHING,
            NARROWER,
            BLOCK,
        )


def loss_and_gradient_(
    logits: Tensor,
    gradient: Tensor | None,
    targets: Tensor,
    target_logits: Tensor | None,
    token_weight: Tensor | None,
    bias: Tensor | None,
    class_weight: Tensor | None,
    label_smoothing: float,
    softcap: float | None,
    z_loss: float,
    argmaxes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, log-sum-exps and remainders `[tokens]`, FP32; `gradient`, which may share memory.

    All factors are FP32; `target_logits` stand in for rounded ones. `gradient` None computes losses
    alone, and leaves remainders undefined. `argmaxes`, int64, are written where they are given.
    """
    tokens, vocab = logits.shape
    losses, lses, remainders = logits.new_empty(3, tokens, dtype=torch.float32).unbind()
    out = logits if gradient is None else gradient
    _launch(
        _loss_and_gradient_kernel,
        logits,
        out,
        targets,
        target_logits,
        bias,
        class_weight,
        None if class_weight is None or not label_smoothing else class_weight.sum(),
        token_weight,
        losses,
        lses,
        remainders,
        argmaxes,
        logits.stride(0),
        out.stride(0),
        vocab,
        _padded(logits, out),
        label_smoothing,
        1.0 if softcap is None else softcap,
        z_loss,
        SMOOTHING=label_smoothing != 0,
        SOFTCAP=softcap is not None,
        Z_LOSS=z_loss != 0,
        EXACT=target_logits is not None,
        ARGMAX=argmaxes is not None,
        GRADIENT=gradient is not None,
        NARROWER=out.element_size() < logits.element_size(),
    )
    return losses, lses, remainders


@triton.jit
def _sums_kernel(
    logits,
    bias,
    class_weight,
    targets,
    target_logits,
    results,
    argmaxes,
    logits_stride,
    results_stride,
    vocab,
    padded,
    softcap,
    SOFTCAP: tl.constexpr,
    SMOOTHING: tl.constexpr,
    EXACT: tl.constexpr,
    ARGMAX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_stride
    target_logit = 0.0
    if EXACT:
        target_logit = tl.load(target_logits + row)
    top, total, weighted, best = _row_sums(
        logits,
        bias,
        class_weight,
        vocab,
        padded,
        tl.load(targets + row).to(tl.int32),
        target_logit,
        softcap,
        SOFTCAP,
        SMOOTHING,
        EXACT,
        ARGMAX,
        BLOCK,
    )
    tl.store(results + row, top)
    tl.store(results + results_stride + row, total)
    tl.store(results + 2 * results_stride + row, weighted)
    if ARGMAX:
        tl.store(argmaxes + row, best)


def sums(
    logits: Tensor,
    targets: Tensor,
    target_logits: Tensor | None,
    bias: Tensor | None,
    class_weight: Tensor | None,
    label_smoothing: float,
    softcap: float | None,
    argmaxes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row: the largest logit, the sum of `exp(z - largest)`, and that of `w z`, FP32.

    The last is 0 without label smoothing, which alone needs it. `argmaxes`, int64, are written
    where they are given: columns of this shard.
    """
    tokens, vocab = logits.shape
    results = logits.new_empty(3, tokens, dtype=torch.float32)
    _launch(
        _sums_kernel,
        logits,
        bias,
        class_weight,
        targets,
        target_logits,
        results,
        argmaxes,
        logits.stride(0),
        tokens,
        vocab,
        _padded(logits),
        1.0 if softcap is None else softcap,
        SOFTCAP=softcap is not None,
        SMOOTHING=label_smoothing != 0,
        EXACT=target_logits is not None,
        ARGMAX=argmaxes is not None,
    )
    top, total, weighted = results.unbind()
    return top, total, weighted


@triton.jit
def _shard_gradient_kernel(
    logits,
    gradient,
    bias,
    class_weight,
    targets,
    at_targets,
    tops,
    shares,
    spreads,
    logits_stride,
    gradient_stride,
    vocab,
    padded,
    softcap,
    SOFTCAP: tl.constexpr,
    SMOOTHING: tl.constexpr,
    NARROWER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    _write_gradient(
        logits + row * logits_stride,
        gradient + row * gradient_stride,
        bias,
        class_weight,
        vocab,
        padded,
        softcap,
        tl.load(targets + row).to(tl.int32),
        tl.load(at_targets + row),
        tl.load(tops + row),
        tl.load(shares + row),
        tl.load(spreads + row),
        SOFTCAP,
        SMOOTHING,
        NARROWER,
        BLOCK,
    )


def shard_gradient_(
    logits: Tensor,
    gradient: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    targets: Tensor,
    at_targets: Tensor,
    tops: Tensor,
    shares: Tensor,
    spreads: Tensor,
    softcap: float | None,
    smoothing: bool,
) -> None:
    """Write `(share exp(z - top) - spread w) slope`; `at_targets` at `targets` that are here."""
    _launch(
        _shard_gradient_kernel,
        logits,
        gradient,
        bias,
        class_weight,
        targets,
        at_targets,
        tops,
        shares,
        spreads,
        logits.stride(0),
        gradient.stride(0),
        logits.shape[1],
        _padded(logits, gradient),
        1.0 if softcap is None else softcap,
        SOFTCAP=softcap is not None,
        SMOOTHING=smoothing,
        NARROWER=gradient.element_size() < logits.element_size(),
    )


def _padded(*matrices: Tensor) -> int:
    vocab = matrices[0].shape[1]
    padded = -(-vocab // 16) * 16
    return padded if all(matrix.stride(0) >= padded for matrix in matrices) else vocab


def _launch(kernel, logits: Tensor, *args, **options) -> None:
    """One program a row, in blocks that fit a row of this width."""
    tokens, vocab = logits.shape
    block = min(_BLOCK, max(triton.next_power_of_2(vocab), 128))
    if tokens:
        with on_device(logits.device):
            kernel[(tokens,)](
                logits,
                *args,
                **options,
                BLOCK=block,
                num_warps=min(max(block // _ELEMENTS_OF_A_WARP, 1), 32),
            )


@triton.jit
def _target_logits_kernel(
    states, weight, classes, results, width, states_stride, weight_stride, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    own = tl.load(classes + row)
    total = tl.zeros((BLOCK,), tl.float32)
    if own >= 0:
        for start in range(0, width, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < width
            x = tl.load(states + row * states_stride + columns, mask=inside, other=0.0)
            w = tl.load(weight + own * weight_stride + columns, mask=inside, other=0.0)
            total += x.to(tl.float32) * w.to(tl.float32)
    tl.store(results + row, tl.sum(total, axis=0))


def target_logits(states: Tensor, weight: Tensor, classes: Tensor) -> Tensor:
    """`states[i] @ weight[classes[i]]`, FP32; 0 for a class of -1."""
    tokens, width = states.shape
    results = states.new_empty(tokens, dtype=torch.float32)
    if tokens:
        states, weight = _with_dense_rows(states), _with_dense_rows(weight)
        block = min(4096, max(triton.next_power_of_2(width), 128))
        with on_device(states.device):
            _target_logits_kernel[(tokens,)](
                states,
                weight,
                classes,
                results,
                width,
                states.stride(0),
                weight.stride(0),
                BLOCK=block,
                num_warps=min(max(block // 512, 1), 8),
            )
    return results


@triton.jit
def _multiples_of_rows_kernel(
    results,
    factors,
    weight,
    classes,
    addends,
    width,
    results_stride,
    weight_stride,
    addends_stride,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    own = tl.load(classes + row)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    w = tl.load(weight + own * weight_stride + columns, mask=inside & (own >= 0), other=0.0)
    product = tl.load(factors + row) * w.to(tl.float32)
    if addends is not None:
        product += tl.load(addends + row * addends_stride + columns, mask=inside, other=0.0)
    at = results + row * results_stride + columns
    tl.store(at, product.to(results.dtype.element_ty), mask=inside)


def multiples_of_rows_(
    results: Tensor,
    factors: Tensor,
    weight: Tensor,
    classes: Tensor,
    addends: Tensor | None = None,
) -> Tensor:
    """`results[i] = factors[i] * weight[classes[i]] + addends[i]`, in FP32, rounded once.

    A class of -1 counts as a row of zeros. Factors and addends are FP32.
    """
    tokens, width = results.shape
    assert results.stride(1) == 1 and (addends is None or addends.stride(1) == 1)
    if results.numel():
        weight = _with_dense_rows(weight)
        block = _columns_of_a_program(width)
        with on_device(results.device):
            _multiples_of_rows_kernel[(tokens, triton.cdiv(width, block))](
                results,
                factors,
                weight,
                classes,
                addends,
                width,
                results.stride(0),
                weight.stride(0),
                0 if addends is None else addends.stride(0),
                BLOCK=block,
                num_warps=max(block // 256, 1),
            )
    return results


@triton.jit
def _add_products_kernel(
    sums,
    factors,
    states,
    classes,
    order,
    count,
    width,
    sums_stride,
    states_stride,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
):
    first = tl.program_id(0)
    here = tl.load(classes + first)  # 32 bits
    before = tl.load(classes + first - 1, mask=first > 0, other=-1)
    if before != here:  # this program begins the run of a class, which is not -1
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = columns < width
        at = sums + here.to(tl.int64) * sums_stride + columns
        start = tl.load(at, mask=inside, other=0.0)
        row = tl.load(order + first)
        x = tl.load(states + row * states_stride + columns, mask=inside, other=0.0)
        total = tl.load(factors + row) * x.to(tl.float32)
        # Most runs are one token long; the rest of a long one is read several rows at once.
        place = first + 1
        goes_on = tl.load(classes + place, mask=place < count, other=-1) == here
        while goes_on:
            for ahead in tl.static_range(DEPTH):
                ours = tl.load(classes + place + ahead, mask=place + ahead < count, other=-1)
                row = tl.load(order + place + ahead, mask=ours == here, other=0)
                factor = tl.load(factors + row, mask=ours == here, other=0.0)
                x = tl.load(
                    states + row * states_stride + columns,
                    mask=inside & (ours == here),
                    other=0.0,
                )
                total += factor * x.to(tl.float32)
            place += DEPTH
            goes_on = tl.load(classes + place, mask=place < count, other=-1) == here
        tl.store(at, start + total, mask=inside)


def add_products_by_class_(sums: Tensor, classes: Tensor, factors: Tensor, states: Tensor) -> None:
    """`sums[classes[i]] += factors[i] * states[i]`, in the same order every time.

    `sums` `[vocab, width]` and `factors` `[tokens]` are FP32, `classes` is int64; a class of -1 is
    left out, and its state is not read. No atomic addition: classes are sorted, and one program
    adds up each run of equal ones. Only rows of `sums` that are some class are read and written.
    """
    count, width = states.shape
    if not states.numel():
        return
    states = _with_dense_rows(states)
    ordered, order = classes.int().sort(stable=True)  # half the passes of 64 bits
    block = _columns_of_a_program(width)
    with on_device(sums.device):
        _add_products_kernel[(count, triton.cdiv(width, block))](
            sums,
            factors,
            states,
            ordered,
            order,
            count,
            width,
            sums.stride(0),
            states.stride(0),
            BLOCK=block,
            DEPTH=8,
            num_warps=max(block // 256, 1),
        )


def _with_dense_rows(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _columns_of_a_program(width: int) -> int:
    """8 elements a thread, 16 bytes of 16-bit numbers, in at most 4 warps."""
    return min(1024, max(triton.next_power_of_2(width), 32))


@triton.jit
def _scale_kernel(values, factor, numel, BLOCK: tl.constexpr):
    f = tl.load(factor)
    if f != 1.0:
        offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = offsets < numel
        x = tl.load(values + offsets, mask=inside, other=0.0).to(tl.float32)
        tl.store(values + offsets, (x * f).to(values.dtype.element_ty), mask=inside)


def scale_(values: Tensor, factor: Tensor) -> None:
    """`values *= factor` in FP32, rounded once; nothing is read where `factor`, 0-d FP32, is 1."""
    assert values.is_contiguous() and factor.dtype == torch.float32
    if values.numel():
        with on_device(values.device):
            _scale_kernel[(triton.cdiv(values.numel(), _SCALE_BLOCK),)](
                values, factor, values.numel(), BLOCK=_SCALE_BLOCK, num_warps=8
            )
