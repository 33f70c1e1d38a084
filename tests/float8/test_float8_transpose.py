"""A matrix of bytes is transposed as torch does it.

Without a GPU, by Triton's interpreter: `make test-kernels`.
"""

from __future__ import annotations

import pytest
import torch
from kernels import DEVICE, marked

from mixprec.float8.late_cast import transposed

SHAPES = [(16, 16), (16, 4096), (4096, 16), (80, 208), (64, 128), (1024, 3072), (1, 1), (65, 129)]


def every_code(shape: tuple[int, int], device: str) -> torch.Tensor:
    numbers = torch.arange(shape[0] * shape[1], device=device)
    return (numbers * 167 + numbers // 256).to(torch.uint8).view(shape)


@pytest.mark.parametrize("shape", [*SHAPES, (0, 16), (16, 0)])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_columns_become_rows(shape: tuple[int, int], dtype: torch.dtype) -> None:
    codes = every_code(shape, "cpu")
    found = transposed(codes.view(dtype))
    assert found.dtype == dtype and found.is_contiguous()
    assert torch.equal(found.view(torch.uint8), codes.t())


@marked
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_writes_the_same_bytes(shape: tuple[int, int]) -> None:
    from mixprec.float8.casts import transpose_kernels

    codes = every_code(shape, DEVICE)
    found = transpose_kernels.transpose(codes)
    wrong = (found != codes.t()).nonzero()
    assert not len(wrong), f"{len(wrong)} bytes differ, the first at {wrong[0].tolist()}"
