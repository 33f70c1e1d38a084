"""Codes of optimizer states: what they lose, never lose, and that a second trip is free."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mixprec.optimizer.state_formats import BLOCK, TOP, decode, encode, num_blocks, scale_key

KINDS = [torch.int8, torch.uint8]


def heavy(size: int, kind: torch.dtype, scale: float = 1.0) -> Tensor:
    """Numbers over many decades; not negative for codes without a sign."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(size, generator=generator) * torch.randn(size, generator=generator).exp()
    return (values.square() if kind == torch.uint8 else values) * scale


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e12])
@pytest.mark.parametrize("kind", KINDS)
def test_a_second_trip_changes_neither_codes_nor_scales(kind: torch.dtype, scale: float) -> None:
    codes, scales = encode(heavy(100_001, kind, scale), kind)
    again = encode(decode(codes, scales), kind)
    assert scales is not None and again[1] is not None
    assert torch.equal(codes, again[0]) and torch.equal(scales, again[1])


@pytest.mark.parametrize("kind", KINDS)
def test_every_code_of_every_scale_comes_back(kind: torch.dtype) -> None:
    top = TOP[kind]
    codes = torch.arange(0 if kind == torch.uint8 else -top, top + 1).to(kind)
    rows = torch.zeros(len(codes), BLOCK, dtype=kind)
    rows[:, 0], rows[:, 1] = top, codes  # the largest code says what the scale is
    # Scales from 2^-103 to 2^110: beyond, a code's part of it is no normal number, or its product
    # with the square of a code leaves FP32.
    for bits in range(0x0C00, 0x7680, 37):
        scale = torch.tensor([bits], dtype=torch.int16).view(torch.bfloat16)
        values = decode(rows.reshape(-1), scale.expand(len(codes)))
        found, scales = encode(values, kind)
        assert scales is not None
        assert torch.equal(found, rows.reshape(-1)), bits
        assert torch.equal(scales, scale.expand(len(codes))), bits


@pytest.mark.parametrize("kind", KINDS)
def test_errors_are_what_the_law_allows(kind: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2**20, generator=generator)
    values = values.square() if kind == torch.uint8 else values
    error = decode(*encode(values, kind)) - values
    noise = float(error.square().mean() / values.square().mean())
    # Half a code of the root is sqrt(x L) / top of x, where L is the block's largest: at random a
    # third of its square, mean(x L) / (3 top^2 mean(x^2)). Of 32 normal numbers L is 2.1 and mean
    # |x| 0.8, which gives 3.5e-5; of their squares L is 5 and it is 0.9e-5.
    assert noise < (1.1e-5 if kind == torch.uint8 else 3.7e-5)
    largest = values.reshape(-1, BLOCK).abs().amax(1, keepdim=True)
    bound = (values.reshape(-1, BLOCK).abs() * largest).sqrt() / TOP[kind] + largest / TOP[
        kind
    ] ** 2
    assert bool((error.reshape(-1, BLOCK).abs() <= 1.01 * bound + largest * 2.0**-8).all())


def test_a_second_moment_never_vanishes() -> None:
    values = torch.cat([torch.tensor([1.0, 1e-30, 1e-12, 0.0]), torch.full((28,), 1e-9)])
    codes, scales = encode(values, torch.uint8)
    assert codes.tolist() == [255, 1, 1, 0] + [1] * 28
    assert bool((decode(codes, scales)[values > 0] > 0).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(0,), (1,), (31,), (32,), (33,), (5, 7), (2, 3, 4, 5)])
def test_shapes_come_back_and_blocks_cover_them(kind: torch.dtype, shape: tuple[int, ...]) -> None:
    values = heavy(int(torch.tensor(shape).prod()), kind).reshape(shape)
    codes, scales = encode(values, kind)
    assert codes.shape == shape and codes.dtype == kind
    assert scales is not None and scales.shape == (num_blocks(values.numel()),)
    assert decode(codes, scales).shape == shape


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_follow_memory_in_a_tensor_of_other_strides(kind: torch.dtype) -> None:
    plain = heavy(2 * 3 * 4 * 5, kind).reshape(2, 4, 5, 3)
    last = plain.permute(0, 3, 1, 2)
    assert last.is_contiguous(memory_format=torch.channels_last)
    codes, scales = encode(last, kind)
    assert codes.stride() == last.stride()
    assert torch.equal(codes.permute(0, 2, 3, 1), encode(plain, kind)[0])
    assert torch.equal(decode(codes, scales).permute(0, 2, 3, 1), decode(*encode(plain, kind)))


def test_zeros_stay_zeros_with_their_block() -> None:
    for kind in KINDS:
        codes, scales = encode(torch.zeros(40), kind)
        assert scales is not None
        assert not codes.any() and not scales.any() and not decode(codes, scales).any()


def test_other_dtypes_are_casts() -> None:
    values = torch.tensor([1.0, 1.00390625, 3e-39])
    codes, scales = encode(values, torch.bfloat16)
    assert scales is None and torch.equal(codes, values.bfloat16())
    assert torch.equal(decode(codes, None), codes.float())
    assert scale_key("exp_avg") == "exp_avg.scale"
