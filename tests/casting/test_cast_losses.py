"""Infinities and zeros that a cast makes are counted, named and warned of."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor, nn

import mixprec
from mixprec import formats
from mixprec.casting import losses as cast_losses
from mixprec.casting.losses import losses
from mixprec.formats import BF16, FP16, FP32, Format

INF, NAN = math.inf, math.nan


class Masked(nn.Module):
    """A linear layer with a mask and an epsilon beside it."""

    def __init__(self, mask: float = -1e9, epsilon: float = 1e-9) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.attention = nn.Module()
        self.attention.register_buffer("mask", torch.tensor([0.0, mask]))
        self.attention.register_buffer("epsilon", torch.tensor(epsilon))


@pytest.mark.parametrize(
    ("values", "format", "infinities", "zeros", "rounded"),
    [
        # FP16: 65519.99 rounds to 65504 and 65520 to inf; 2^-25 ties to 0, and above it to 2^-24.
        ([65519.99, 65520.0, -7e4, 1.0], FP16, 2, 0, 1),
        ([2.0**-25, -1e-9, 1.001 * 2.0**-25, 1.0], FP16, 0, 2, 1),
        # What was there before was not made by the cast.
        ([INF, -INF, NAN, 0.0, -0.0], FP16, 0, 0, 0),
        ([INF, 1e9, NAN, 0.0, 1e-9, 2049.0], FP16, 1, 1, 1),
        # BF16 ends 0.4 % below FP32, where masks of finfo.min are.
        ([torch.finfo(torch.float32).min, 1e-9, -1e9, 257.0], BF16, 1, 0, 3),
        ([1.0, 2.0, 0.5], BF16, 0, 0, 0),
        ([3e38, 1e-9], FP32, 0, 0, 0),
    ],
)
def test_what_a_cast_makes_is_counted(
    values: list[float], format: Format, infinities: int, zeros: int, rounded: int
) -> None:
    tensor = torch.tensor(values)
    found = losses([("buffer", tensor), ("weight", nn.Parameter(tensor.clone()))], format)
    if not infinities + zeros + rounded:
        assert not found
        return
    buffer, *weight = found
    assert (buffer.infinities, buffer.zeros, buffer.rounded) == (infinities, zeros, rounded)
    assert (buffer.kind, buffer.values) == ("buffer", len(values))
    # Most values of a parameter are rounded, which masters mend; it is not said of each.
    assert len(weight) == bool(infinities + zeros)
    for loss in weight:
        assert (loss.infinities, loss.zeros, loss.rounded) == (infinities, zeros, 0)


def test_counts_of_a_large_tensor_are_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cast_losses, "_PIECE", 97)  # so that it is looked at in pieces
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(50, 40, generator=generator) * 10 ** (
        12 * torch.rand(50, 40, generator=generator) - 7
    )
    cast = tensor.half()
    (loss,) = losses([("x", tensor.t())], FP16)
    assert loss.infinities == int(cast.isinf().sum()) > 0
    assert loss.zeros == int((cast == 0).sum()) > 0
    changed = int((cast.float() != tensor).sum())
    assert loss.rounded == changed - loss.infinities - loss.zeros > 0
    finite = cast.isfinite()
    assert loss.error == (cast.float() - tensor)[finite].abs().max()
    assert loss.largest == tensor.abs().max()


@pytest.mark.parametrize("start", [torch.bfloat16, torch.float16])
def test_sixteen_bits_lose_in_sixteen_others_and_nothing_in_their_own(start: torch.dtype) -> None:
    tensor = torch.tensor([7e4, 1e-9], dtype=torch.bfloat16).to(start)
    assert not losses([("x", tensor)], formats.by_dtype(start))
    found = losses([("x", tensor)], FP16 if start == torch.bfloat16 else BF16)
    assert [(loss.infinities, loss.zeros) for loss in found] == [(1, 1)] * len(found)
    assert len(found) == (start == torch.bfloat16)


def test_the_report_counts_buffers_and_says_what_each_lost() -> None:
    model = Masked(mask=-1e9)
    model.attention.register_buffer("steps", torch.tensor(3))
    model.attention.register_buffer("alphas", torch.tensor([0.9997, 1.0]))
    with pytest.warns(RuntimeWarning, match="a cast to fp16 loses numbers"):
        report = mixprec.Precision("fp16").convert(model)
    assert str(report) == (
        "linear     Linear  6 parameters                fp32 -> fp16\n"
        "attention  Module  0 parameters  5 in buffers  fp32 -> fp16\n"
        "buffer 'attention.mask', 2 values: 1 becomes inf (fp16 ends at 65504, the largest is "
        "1e+09)\n"
        "buffer 'attention.epsilon', 1 value: 1 becomes 0 (fp16 makes 0 of 3e-08 and less)\n"
        "buffer 'attention.alphas', 2 values: 1 rounded by up to 0.00019"
    )
    assert [row.num_buffered for row in report.rows] == [0, 5]


def test_the_report_on_fp8_says_it_too() -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    model.register_buffer("table", torch.tensor([257.0]))
    report = mixprec.Precision("fp8").convert(model, min_dim=16)
    assert str(report).endswith("\nbuffer 'table', 1 value: 1 rounded by up to 1")


def test_an_infinity_is_warned_of_with_what_to_write() -> None:
    with pytest.warns(RuntimeWarning) as said:
        mixprec.cast_model(Masked(epsilon=1.0), "fp16")
    assert [str(warning.message) for warning in said] == [
        "a cast to fp16 loses numbers. buffer 'attention.mask', 2 values: 1 becomes inf (fp16 ends "
        "at 65504, the largest is 1e+09). A product with inf is inf or NaN. Use "
        "keep_fp32=('*norm*', 'attention') or 'bf16', which has the range of FP32. Where the "
        "numbers only have to be large, as in a mask, make them fit before: "
        "model.get_buffer('attention.mask').detach().clamp_(-65504, 65504)."
    ]
    assert said[0].filename == __file__


@pytest.mark.parametrize("format", ["fp16", "bf16"])
def test_each_thing_that_the_warning_tells_to_write_ends_it(format: str) -> None:
    low = torch.finfo(torch.float32).min

    def cast(model: nn.Module, format: str, **options: tuple[str, ...]) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            mixprec.cast_model(model, format, **options)
        return model.get_buffer("attention.mask")

    with pytest.raises(RuntimeWarning):
        cast(Masked(low, 1.0), format)
    assert cast(Masked(low, 1.0), format, keep_fp32=("*norm*", "attention"))[1] == low
    assert cast(Masked(-1e9, 1e-9), "bf16").isfinite().all()
    model = Masked(low, 1.0)
    limit = {"fp16": 65504, "bf16": 3.38953e38}[format]
    model.get_buffer("attention.mask").detach().clamp_(-limit, limit)
    assert cast(model, format).isfinite().all()


def test_bf16_is_not_told_to_use_bf16() -> None:
    with pytest.warns(RuntimeWarning) as said:
        mixprec.cast_model(Masked(torch.finfo(torch.float32).min), "bf16")
    assert "Use keep_fp32=('*norm*', 'attention'). Where" in str(said[0].message)
    assert "clamp_(-3.38953e+38, 3.38953e+38)" in str(said[0].message)


def test_zeros_are_warned_of_where_they_are_many() -> None:
    with pytest.warns(RuntimeWarning) as said:
        mixprec.cast_model(Masked(mask=-1.0), "fp16")
    assert str(said[0].message) == (
        "a cast to fp16 loses numbers. buffer 'attention.epsilon', 1 value: 1 becomes 0 (fp16 "
        "makes 0 of 3e-08 and less). Divided by, 0 gives inf. Use keep_fp32=('*norm*', "
        "'attention') or 'bf16', which has the range of FP32."
    )
    # 1 of 20 is 5 %: reported and not warned of, as the far tail of a weight is.
    rare, frequent = nn.Linear(20, 1, bias=False), nn.Linear(19, 1, bias=False)
    for linear in (rare, frequent):
        nn.init.ones_(linear.weight)
        linear.weight.data[0, 0] = 1e-9
    report = mixprec.Precision("fp16").convert(rare)
    assert str(report).endswith(
        "\nparameter 'weight', 20 values: 1 becomes 0 (fp16 makes 0 of 3e-08 and less)"
    )
    with pytest.warns(RuntimeWarning, match=r"Use 'bf16', which has the range of FP32\.$"):
        mixprec.cast_model(frequent, "fp16")


def test_infinities_are_named_first_and_many_tensors_are_summed_up() -> None:
    model = nn.Module()
    for place in range(6):
        model.register_buffer(f"epsilon{place}", torch.tensor(1e-9))
    model.register_buffer("mask", torch.tensor(-1e9))
    with pytest.warns(RuntimeWarning) as said:
        report = mixprec.Precision("fp16").convert(model)
    message = str(said[0].message)
    assert message.startswith("a cast to fp16 loses numbers. buffer 'mask', 1 value: 1 becomes inf")
    assert "'epsilon3', 1 value: 1 becomes 0" in message and "'epsilon4'" not in message
    assert "And 2 tensors more. A product with inf" in message
    assert [loss.tensor for loss in report.losses] == [*(f"epsilon{i}" for i in range(6)), "mask"]


def test_where_warnings_are_errors_nothing_is_changed() -> None:
    model = Masked()
    with warnings.catch_warnings(), pytest.raises(RuntimeWarning):
        warnings.simplefilter("error")
        mixprec.cast_model(model, "fp16")
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    assert model.get_buffer("attention.mask")[1] == -1e9


def test_kept_shared_and_shapeless_tensors() -> None:
    kept = Masked()
    mixprec.cast_model(kept, "fp16", keep_fp32=("attention",))
    assert kept.get_buffer("attention.mask")[1] == -1e9
    shared = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    nn.init.constant_(shared.get_parameter("0.weight"), 1e5)
    shared[1].weight = shared[0].weight
    with pytest.warns(RuntimeWarning, match="parameter '0.weight', 4 values: 4 become inf"):
        report = mixprec.Precision("fp16").convert(shared)
    assert [loss.tensor for loss in report.losses] == ["0.weight"]
    with torch.device("meta"):
        assert not mixprec.Precision("fp16").convert(Masked()).losses
    empty = nn.Module()
    empty.register_buffer("x", torch.empty(0, 3))
    assert not mixprec.Precision("fp16").convert(empty).losses


def test_a_layer_without_a_shape_is_refused_with_what_to_do() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(2))
    with pytest.raises(ValueError, match=r"'1\.weight' has no shape yet; run a batch through"):
        mixprec.cast_model(model, "bf16")
    assert model[0].weight.dtype == torch.float32
