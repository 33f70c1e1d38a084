# pyright: basic, reportMissingImports=false, reportIndexIssue=false
"""A Triton kernel that transposes a matrix of bytes; torch's own copy moves them one by one.

Triton is imported here, so this module is imported inside functions that have a CUDA device before
them.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mixprec.devices import on_device

__all__ = ["transpose"]

_BLOCK_R, _BLOCK_C = 64, 128


@triton.jit
def _kernel(x, out, num_rows, num_cols, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (rows[:, None] < num_rows) & (columns[None, :] < num_cols)
    read = rows[:, None].to(tl.int64) * num_cols + columns[None, :]
    codes = tl.trans(tl.load(x + read, mask=inside, other=0))
    inside = (columns[:, None] < num_cols) & (rows[None, :] < num_rows)
    write = columns[:, None].to(tl.int64) * num_rows + rows[None, :]
    tl.store(out + write, codes, mask=inside)


def transpose(x: Tensor) -> Tensor:
    """`x.t().contiguous()` of a contiguous uint8 matrix that is not empty."""
    num_rows, num_cols = x.shape
    out = x.new_empty(num_cols, num_rows)
    grid = -(-num_rows // _BLOCK_R), -(-num_cols // _BLOCK_C)
    with on_device(x.device):
        _kernel[grid](x, out, num_rows, num_cols, BLOCK_R=_BLOCK_R, BLOCK_C=_BLOCK_C)
    return out
