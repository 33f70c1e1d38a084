"""FP8 cast kernels against plain torch: the same bytes, factors and counters.

Without a GPU, Triton's interpreter checks the indexing, on values that need no rounding, which it
does wrongly for FP8: `make test-kernels`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from kernels import DEVICE, INTERPRETED, MARKS
from torch import Tensor
from waiting import no_waiting

from mixprec.float8.casts import cast as casting
from mixprec.float8.casts import in_torch
from mixprec.float8.casts.cast import Operand8, cast_rowwise, cast_scaled, cast_tensorwise
from mixprec.float8.casts.counters import FLUSHED, NON_FINITE, NUM_COUNTERS, SATURATED, SEEN
from mixprec.formats import E4M3, E5M2, Format

pytestmark = MARKS
on_a_gpu = pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FORMATS = [E4M3, E5M2]
Cast = Callable[..., Operand8]


@pytest.fixture(autouse=True)
def _interpret(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if INTERPRETED:
        from mixprec.float8.casts import cast_kernels

        twins: Any = {True: cast_kernels, False: in_torch}
        monkeypatch.setattr(casting, "_twin", lambda x: twins[x.numel() != 0])  # pyright: ignore
    yield


def power(exponent: int) -> Tensor:
    return torch.tensor([2.0**exponent, 2.0**-exponent], device=DEVICE)


def scaled(exponent: int) -> Cast:
    def cast(x: Tensor, format: Format, counters: Tensor | None = None, **kw: Any) -> Operand8:
        return cast_scaled(x, format, power(exponent).to(x.device), counters, **kw)

    return cast


def in_plain_torch(
    cast: Cast, x: Tensor, format: Format, counters: Tensor | None, **options: Any
) -> Operand8:
    """On the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(casting, "_twin", lambda x: in_torch)  # pyright: ignore
        return cast(x.cpu(), format, counters, **options)


def difference(name: str, ours: Tensor | None, exact: Tensor | None, x: Tensor) -> str:
    """What differs, with the first few places, or nothing."""
    if ours is None or exact is None:
        return "" if ours is exact else f"{name}: {ours} is not {exact}"
    if ours.shape != exact.shape or ours.dtype != exact.dtype:
        return f"{name}: {list(ours.shape)} {ours.dtype}, not {list(exact.shape)} {exact.dtype}"
    left, right = ours.cpu(), exact.cpu()
    if left.element_size() == 1:
        left, right = left.view(torch.uint8), right.view(torch.uint8)
    wrong = (left != right).nonzero()
    if not len(wrong):
        return ""
    said = [f"{name}: {len(wrong)} of {left.numel()} differ"]
    for place in wrong[:8].tolist():
        at = tuple(place)
        value = ""
        if len(at) == 2 and name in ("rows", "cols"):
            row, column = at if name == "rows" else at[::-1]
            value = f" of {x[row, column].item()}" if row < len(x) else " of the padding"
        said.append(f"  {at}: {left[at].item():#x} is not {right[at].item():#x}{value}")
    return "\n".join(said) if left.dtype == torch.uint8 else f"{said[0]}: {left} not {right}"


def check(cast: Cast, x: Tensor, format: Format, *, counted: bool = True, **options: Any) -> Tensor:
    """Compare all that a cast makes; the counters. The interpreter makes no NaN."""
    ours, exact = (torch.zeros(NUM_COUNTERS, dtype=torch.int64) for _ in range(2))
    ours = ours.to(DEVICE)
    operand = cast(x, format, ours if counted else None, **options)
    reference = in_plain_torch(cast, x, format, exact if counted else None, **options)
    found = [
        difference(name, left, right, x.cpu())
        for name, left, right in zip(Operand8._fields, operand, reference, strict=True)
    ]
    if not INTERPRETED or bool(x.isfinite().all()):
        assert not any(found), "\n".join(filter(None, found))
    assert ours.tolist() == exact.tolist()
    return exact


def exact_values(num_rows: int, num_cols: int, dtype: torch.dtype = BF16) -> Tensor:
    """Values that both formats hold, also times a few powers of two."""
    g = torch.Generator().manual_seed(num_rows * 31 + num_cols)
    size = num_rows, num_cols
    mantissa = torch.randint(4, 8, size, generator=g) / 4
    exponent = torch.randint(-3, 4, size, generator=g)
    sign = torch.randint(0, 2, size, generator=g) * 2 - 1
    return (sign * mantissa * 2.0**exponent).to(DEVICE, dtype)


def values(num_rows: int, num_cols: int, dtype: torch.dtype = BF16) -> Tensor:
    """On a GPU any values, wide enough for all counters."""
    if INTERPRETED:
        return exact_values(num_rows, num_cols, dtype)
    g = torch.Generator(DEVICE).manual_seed(num_rows * 31 + num_cols)
    normal = torch.randn(num_rows, num_cols, generator=g, device=DEVICE)
    return (normal * torch.randn(normal.shape, generator=g, device=DEVICE).mul(3).exp()).to(dtype)


def misaligned(x: Tensor) -> Tensor:
    """The same matrix, two bytes (or four) past a multiple of 16."""
    room = x.new_empty(x.numel() + 1)
    room[1:].copy_(x.flatten())
    return room[1:].view_as(x)


# ---------------------------------------- every value


@on_a_gpu
@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("exponent", [-20, -9, -1, 0, 1, 6, 20])
def test_every_16_bit_value_gets_the_byte_of_plain_torch(
    format: Format, dtype: torch.dtype, exponent: int
) -> None:
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(256, 256).to(DEVICE)
    counters = check(scaled(exponent), x, format)
    check(scaled(exponent), x, format, counted=False)
    assert counters[NON_FINITE] > 0
    # 2^20 lifts all of FP16 above what becomes 0.
    assert (counters[FLUSHED] > 0) == ((dtype, exponent) != (FP16, 20))


@on_a_gpu
@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("exponent", [-20, 0, 20])
def test_fp32_values_get_the_byte_of_plain_torch(format: Format, exponent: int) -> None:
    upper = torch.arange(2**16, dtype=torch.int32) << 16
    lower = torch.tensor([0, 1, -1, 0x8000, 0x7FFF, 0x8001, 0x4000, 0xC000], dtype=torch.int32)
    x = (upper[:, None] + lower).view(FP32).view(2048, 256).to(DEVICE)
    check(scaled(exponent), x, format)


@on_a_gpu
@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("cast", [cast_tensorwise, cast_rowwise])
def test_multipliers_of_every_magnitude_are_those_of_plain_torch(
    cast: Cast, format: Format, power_of_two: bool
) -> None:
    codes = torch.arange(0, 0x7F80, dtype=torch.int16).view(BF16)
    near = torch.tensor([0x2B8CBCCB, 0x2B8CBCCC, 0x2B8CBCCD, 0x3FDFFFFF, 0x3FE00000, 0x3FE00001])
    rows = torch.cat([codes.float(), near.to(torch.int32).view(FP32)])[:, None]
    x = (rows * torch.linspace(-1, 1, 16)).to(DEVICE)
    if cast is cast_rowwise:
        check(cast, x, format, power_of_two=power_of_two)
        check(cast, x.t().contiguous(), format, power_of_two=power_of_two)
    else:
        for row in [0, 1, 200, 7000, 16000, 30000, *range(len(codes), len(x))]:
            check(cast, x[row : row + 1], format, power_of_two=power_of_two)


# ---------------------------------------- every place

SHAPES = [
    (1, 1),
    (33, 1),
    (1, 16),
    (15, 32),
    (16, 16),
    (17, 48),
    (64, 256),
    (65, 272),
    (130, 144),
    (3, 1000),
]
LARGE = [(1, 14336), (1000, 4096), (4099, 1024), (257, 14336), (1000, 1001), (4099, 17), (2048, 16)]
ALL_SHAPES = SHAPES if INTERPRETED else SHAPES + LARGE
CASTS: dict[str, tuple[Cast, dict[str, Any]]] = {
    "scaled": (scaled(1), {}),
    "tensorwise, power of two": (cast_tensorwise, {"power_of_two": True}),
    "rowwise, power of two": (cast_rowwise, {"power_of_two": True}),
}
if not INTERPRETED:
    CASTS["tensorwise"] = (cast_tensorwise, {"power_of_two": False})
    CASTS["rowwise"] = (cast_rowwise, {"power_of_two": False})


@pytest.mark.parametrize("shape", ALL_SHAPES, ids=str)
@pytest.mark.parametrize("name", CASTS)
def test_all_shapes_agree_with_plain_torch(name: str, shape: tuple[int, int]) -> None:
    cast, options = CASTS[name]
    x = values(*shape)
    for counted in (False, True):
        check(cast, x, E4M3, counted=counted, **options)
        check(cast, misaligned(x), E5M2, counted=counted, **options)
    check(cast, x, E4M3, rows=False, **options)
    check(cast, x, E5M2, cols=False, **options)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("name", CASTS)
def test_all_dtypes_agree_with_plain_torch(name: str, dtype: torch.dtype) -> None:
    cast, options = CASTS[name]
    check(cast, values(100, 144, dtype), E5M2, **options)
    check(cast, values(33, 288, dtype).t(), E4M3, **options)


@pytest.mark.parametrize("name", CASTS)
def test_values_out_of_range_are_counted_wherever_they_are(name: str) -> None:
    cast, options = CASTS[name]
    g = torch.Generator().manual_seed(0)
    shape = (150, 400)
    x = exact_values(*shape)
    places = torch.randperm(x.numel(), generator=g)[:60].to(DEVICE)
    flat = x.view(-1)
    flat[places[:10]], flat[places[10:15]] = math.nan, math.inf
    flat[places[15:20]], flat[places[20:30]] = -math.inf, 0.0
    flat[places[30:40]], flat[places[40:60]] = 2.0**-20, -1e30
    counters = check(cast, x, E4M3, **options)
    assert counters[NON_FINITE] == 20 and counters[SEEN] == x.numel()
    if name == "scaled":
        assert counters[SATURATED] == 20 and counters[FLUSHED] == 10


@pytest.mark.parametrize("name", CASTS)
def test_zeros_and_empty_matrices(name: str) -> None:
    cast, options = CASTS[name]
    check(cast, torch.zeros(40, 48, dtype=BF16, device=DEVICE), E4M3, **options)
    for shape in ((0, 32), (16, 0)):
        check(cast, torch.zeros(shape, dtype=BF16, device=DEVICE), E4M3, **options)


@pytest.mark.parametrize("shape", [(1, 16), (200, 48), (400, 400)], ids=str)
def test_tiles_that_are_counted_together_agree_with_plain_torch(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mixprec.float8.casts import cast_kernels

    monkeypatch.setattr(cast_kernels, "_COUNTED_TILES", 3)
    x = values(*shape)
    check(scaled(1), x, E4M3)
    x.view(-1)[:: 7 * 64] = math.inf
    x.view(-1)[5 :: 5 * 64] = -1e30
    x.view(-1)[9 :: 9 * 64] = 2.0**-20
    check(scaled(1), x, E4M3)
    check(cast_tensorwise, x, E4M3, power_of_two=True)


def test_given_buffers_are_overwritten_with_their_padding() -> None:
    first = scaled(0)(exact_values(40, 48), E4M3)
    assert first.rows is not None and first.cols is not None
    for buffer in (first.rows, first.cols):
        buffer.view(torch.uint8).fill_(0x55)
    x = exact_values(40, 48).neg()
    scale = power(0)
    again = cast_scaled(x, E4M3, scale, out=(first.rows, first.cols))
    scale.fill_(7.0)
    exact = in_plain_torch(scaled(0), x, E4M3, None)
    assert again.rows is first.rows and again.cols is first.cols
    assert not difference("rows", again.rows, exact.rows, x)
    assert not difference("cols", again.cols, exact.cols, x)
    assert again.row_scale.item() == 1.0
    assert again.row_scale.data_ptr() % 16 == 0 or INTERPRETED, "no product takes this factor"


# ---------------------------------------- what only a device can show


@on_a_gpu
@pytest.mark.parametrize("name", CASTS)
@pytest.mark.parametrize("shape", [(2**17 + 16, 2**14 + 16), (2**27 + 16, 16)], ids=str)
def test_more_than_2_to_the_31_elements(name: str, shape: tuple[int, int]) -> None:
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free memory")
    cast, options = CASTS[name]
    x = torch.empty(shape, dtype=BF16, device=DEVICE)
    for part in x.split(-(-shape[0] // 8)):
        part.normal_()
    x[-1, -1] = 100.0
    counters = torch.zeros(NUM_COUNTERS, dtype=torch.int64, device=DEVICE)
    operand = cast(x, E4M3, counters, **options)
    assert operand.rows is not None and operand.cols is not None
    assert counters[SEEN] == x.numel() and counters[NON_FINITE] == 0
    power_of_two = options.get("power_of_two", False)
    if name == "scaled":
        by_row = by_col = torch.tensor(2.0, device=DEVICE).view(1, 1)
    elif cast is cast_tensorwise:
        by_row, factor = in_torch._fitted(x.abs().amax().view(1, 1), E4M3, power_of_two)
        by_col = by_row
        assert torch.equal(operand.row_scale, factor.view(1))
    else:
        by_row, factor = in_torch._fitted(x.abs().amax(1, keepdim=True), E4M3, power_of_two)
        assert torch.equal(operand.row_scale, factor)
        by_col, factor = in_torch._fitted(x.abs().amax(0, keepdim=True), E4M3, power_of_two)
        assert torch.equal(operand.col_scale, factor.t())
    for first in (0, shape[0] // 2, shape[0] - 64):
        part = slice(first, first + 64)
        of_rows = by_row[part] if len(by_row) > 1 else by_row
        exact = in_torch._codes(x[part].cpu(), of_rows.cpu(), E4M3)
        assert torch.equal(operand.rows[part].view(torch.uint8).cpu(), exact), f"rows {part}"
        exact = in_torch._codes(x[part].cpu(), by_col.cpu(), E4M3)
        turned = operand.cols.view(torch.uint8)[:, part].t().cpu()
        assert torch.equal(turned, exact), f"columns, {part}"


@on_a_gpu
@pytest.mark.parametrize("name", CASTS)
def test_a_cuda_graph_casts_what_is_there_at_each_replay(name: str) -> None:
    cast, options = CASTS[name]
    x = values(1000, 512)
    scale = power(1)
    counters = torch.zeros(NUM_COUNTERS, dtype=torch.int64, device=DEVICE)

    def run() -> Operand8:
        if name == "scaled":
            return cast_scaled(x, E4M3, scale, counters)
        return cast(x, E4M3, counters, **options)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        operand = run()
    for round in range(3):
        x.copy_(values(1000, 512) * 2.0**round)
        scale.copy_(power(-round))
        counters.zero_()
        graph.replay()
        exact_counters = torch.zeros(NUM_COUNTERS, dtype=torch.int64)
        again = scaled(-round) if name == "scaled" else cast
        exact = in_plain_torch(again, x, E4M3, exact_counters, **options)
        for field, left, right in zip(Operand8._fields, operand, exact, strict=True):
            said = difference(field, left, right, x.cpu())
            assert not said, f"replay {round}: {said}"
        assert counters.tolist() == exact_counters.tolist()


@on_a_gpu
@pytest.mark.parametrize("name", CASTS)
def test_the_host_never_waits_and_launches_few_kernels(name: str) -> None:
    cast, options = CASTS[name]
    x = values(1000, 512)
    counters = torch.zeros(NUM_COUNTERS, dtype=torch.int64, device=DEVICE)
    scale = power(1)

    def run() -> None:
        if name == "scaled":
            cast_scaled(x, E4M3, scale, counters)
        else:
            cast(x, E4M3, counters, **options)

    run()
    with no_waiting():
        run()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    launched = [e.name for e in profile.events() if e.device_type.name == "CUDA"]  # type: ignore[union-attr]
    assert len(launched) == (1 if name == "scaled" else 3), launched


@on_a_gpu
@pytest.mark.parametrize("name", CASTS)
def test_the_same_bytes_come_every_time(name: str) -> None:
    cast, options = CASTS[name]
    x = values(4096, 4096)
    first = cast(x, E5M2, **options)
    for _ in range(20):
        again = cast(x, E5M2, **options)
        for field, left, right in zip(Operand8._fields, again, first, strict=True):
            said = difference(field, left, right, x)
            assert not said, said
