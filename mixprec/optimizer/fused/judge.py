"""The norm of all gradients and what follows from it, in one launch and without a wait of the host.

A gradient is read once, and nothing is written but one sum of squares for each program of the grid.
The program that finishes last, known by a counter, adds these up in a fixed order, so a norm has
the same bits whenever the same gradients are given. It also knows all that a step must know, so it
writes that too: `verdict.judge` is its twin in plain torch.

Squares are summed in FP32, as by `gradients.grad_norm`: the norm is not finite if any gradient is
not, or if squares leave the range of FP32 (elements near 1e19). What follows is computed in FP64.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from mixprec import gradients
from mixprec.devices import has_triton, on_device
from mixprec.optimizer.fused.kernels.launch import (
    Addresses,
    chunk_table,
    is_dense,
    module_of,
    upload,
)
from mixprec.optimizer.judging.verdict import Verdict
from mixprec.optimizer.reports.step_counts import StepCounts

__all__ = ["DeviceJudge"]

_BLOCK, _BLOCKS, _WARPS = 2048, 16, 8

_TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}

_SOURCE = """\
import triton
import triton.language as tl


@triton.jit
def judge(
    grads, numels, chunks, partial, finished, factor, counted, external, max_norm, verdict, counts,
    DTYPE: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):
    program = tl.program_id(0)
    tensor = tl.load(chunks + 2 * program).to(tl.int64)
    first = tl.load(chunks + 2 * program + 1).to(tl.int64) * (BLOCK * BLOCKS)
    numel = tl.load(numels + tensor)
    grad = tl.multiple_of(tl.load(grads + tensor).to(tl.pointer_type(DTYPE)), 16)
    lane = tl.arange(0, BLOCK)
    squares = tl.zeros([BLOCK], tl.float32)
    even = numel // 32 * 32
    last = tl.minimum(first + BLOCK * BLOCKS, even)
    for start in range(first, last, BLOCK):
        value = tl.load(grad + start + lane, mask=start + lane < even, other=0).to(tl.float32)
        squares += value * value
    total = tl.sum(squares, 0)
    if (even < numel) & (even >= first) & (even < first + BLOCK * BLOCKS):
        few = even + tl.arange(0, 32)
        value = tl.load(grad + few, mask=few < numel, other=0).to(tl.float32)
        total += tl.sum(value * value, 0)
    tl.store(partial + program, total)
    tl.debug_barrier()
    programs = tl.num_programs(0)
    if tl.atomic_add(finished, 1, sem="acq_rel") == programs - 1:
        squares = tl.zeros([BLOCK], tl.float32)
        for part in range(0, programs, BLOCK):
            squares += tl.load(partial + part + lane, mask=part + lane < programs, other=0)
        norm = tl.sqrt_rn(tl.sum(squares, 0))
        tl.store(finished, 0)
        is_finite = norm < float("inf")
        if external is not None:
            is_finite = is_finite & (tl.load(external) == 0)
        is_counted = program >= 0
        if counted is not None:
            is_counted = tl.load(counted) != 0
        wide = norm.to(tl.float64)
        multiplier = is_counted.to(tl.float64) * 0.0 + 1.0
        if factor is not None:
            multiplier = tl.load(factor).to(tl.float64)
            wide = wide * tl.abs(multiplier)
        tl.store(verdict, wide.to(tl.float32))
        if max_norm is not None:
            clip = max_norm / (wide + 1e-6)
            multiplier = tl.where(clip < 1.0, clip, 1.0) * multiplier
        narrow = multiplier.to(tl.float32)
        is_usable = is_counted
        if factor is not None:
            largest = (norm.to(tl.float64) * multiplier).to(tl.float32)
            fits = (narrow > 0) & (narrow < float("inf")) & (largest < float("inf"))
            is_usable = is_counted & (fits | (is_finite == False))
        go = is_finite & is_usable
        overflow = (is_counted & (go == False)).to(tl.int64)
        empty = (is_counted == False).to(tl.int64)
        is_zero = norm == 0
        tl.store(verdict + 1, narrow)
        tl.store(verdict + 2, tl.where(go, 0.0, 1.0))
        tl.store(verdict + 3, tl.where(is_finite, 1.0, 0.0))
        tl.store(verdict + 4, tl.where(is_usable, 1.0, 0.0))
        tl.store(verdict + 5, tl.where(is_zero, 1.0, 0.0))
        tl.store(counts, tl.load(counts) + overflow)
        tl.store(counts + 1, tl.load(counts + 1) * (overflow + empty) + overflow)
        tl.store(counts + 2, tl.load(counts + 2) + go.to(tl.int64))
        tl.store(counts + 3, tl.load(counts + 3) + empty)
        tl.store(counts + 4, tl.load(counts + 4) * empty + empty)
        tl.store(counts + 5, tl.load(counts + 5) + (go & is_zero).to(tl.int64))
        unusable = (is_counted & (is_usable == False)).to(tl.int64)
        tl.store(counts + 6, tl.load(counts + 6) + unusable)
"""


@cache
def _kernel() -> Any:
    return module_of(_SOURCE)["judge"]


class DeviceJudge:
    """`verdict.judge(..., on_device=True)` in one launch. Keeps its tables from step to step."""

    def __init__(self) -> None:
        self._table: _Table | None = None
        self._kind: object = None
        self._taken = False

    def takes(self, grads: Sequence[Tensor], kind: object = None) -> bool:
        """Whether these gradients are of one kind that the kernel reads.

        `kind` may be an object that stands for how they look, `Members.kind`: if it is the one that
        was given last, nobody looks at them again.
        """
        if kind is None or kind is not self._kind:
            self._kind, self._taken = kind, self._reads(grads)
            if self._taken:
                known, looks = self._table, (list(map(Tensor.numel, grads)), grads[0].device)
                if known is None or (known.numels, known.device) != looks:
                    self._table = _Table(*looks)
        return self._taken

    def _reads(self, grads: Sequence[Tensor]) -> bool:
        first = grads[0]
        if not (first.is_cuda and has_triton() and first.dtype in _TYPES):
            return False
        if not set(map(_kind, grads)) == {(first.dtype, first.device, torch.strided)}:
            return False
        if not any(map(Tensor.numel, grads)):
            return False  # a norm of 0 would be taken for gradients that are 0
        if any(gradients.local(grad) is not grad for grad in grads if type(grad) is not Tensor):
            return False
        return all(map(Tensor.is_contiguous, grads)) or all(map(is_dense, grads))

    def __call__(
        self,
        grads: Sequence[Tensor],
        factor: Tensor | None,
        *,
        counted: Tensor | None,
        external_found_inf: Tensor | None,
        max_grad_norm: float | None,
        counts: StepCounts,
    ) -> Verdict:
        """The verdict, all on the device; `counts` move on by it.

        Args:
            grads: those that `takes` was asked for last, at least one.
            factor: 0-d, FP32 or FP64, on the same device, or None for 1.
            counted: 0-d, zero for a window in which nothing was counted, or None.
            external_found_inf: the finding of a torch.amp.GradScaler, or None.
            max_grad_norm: L2 norm to clip to, or None.
            counts: of the optimizer.
        """
        assert self._table is not None, "takes() makes it"
        device = self._table.device
        if external_found_inf is not None:
            external_found_inf = external_found_inf.to(device)
        result = self._table.judge(
            grads, factor, counted, external_found_inf, max_grad_norm, counts.on(device)
        )
        changed = factor is not None or max_grad_norm is not None
        return Verdict(
            norm=result[0],
            factor=result[1] if changed else None,
            finite=result[3],
            usable=True if factor is None and counted is None else result[4],
            zero=result[5],
            counted=True if counted is None else counted,
            found_inf=result[2],
            recorded=True,
            parts=(self._table.partial, self._table.owners),
        )


_kind = attrgetter("dtype", "device", "layout")


class _Table:
    """What the kernel reads beside the gradients, for tensors of these sizes."""

    def __init__(self, numels: list[int], device: torch.device) -> None:
        self.numels, self.device = numels, device
        self._numels = upload(numels, torch.int64, device)
        chunks = chunk_table(numels, _BLOCK * _BLOCKS)
        self._chunks = upload(chunks, torch.int32, device)
        self.owners: list[int] = chunks[:, 0].tolist()
        """The tensor of each program of the grid."""
        self.partial = torch.empty(len(self._chunks), dtype=torch.float32, device=device)
        """The sum of squares that each program found last, not finite where its tensor was not."""
        self._finished = torch.zeros((), dtype=torch.int32, device=device)
        self._addresses = Addresses(device)

    def judge(self, grads: Sequence[Tensor], *arguments: Any) -> Tensor:
        import triton.language as tl  # pyright: ignore[reportMissingImports]

        factor, counted, external, max_norm, counts = arguments
        verdict = torch.empty(6, dtype=torch.float32, device=self.device)
        grads, addresses = self._addresses.of(grads)
        with on_device(self.device):
            _kernel()[(len(self._chunks),)](
                addresses,
                self._numels,
                self._chunks,
                self.partial,
                self._finished,
                factor,
                counted,
                external,
                max_norm,
                verdict,
                counts,
                DTYPE=getattr(tl, _TYPES[grads[0].dtype]),
                BLOCK=_BLOCK,
                BLOCKS=_BLOCKS,
                num_warps=_WARPS,
            )
        return verdict
