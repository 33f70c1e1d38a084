"""FP8 with unit scaling, loss scaling and accumulation: nothing of what they promise is lost."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mixprec
from mixprec import Precision, umup
from mixprec.float8.casts.counters import FLUSHED, NON_FINITE, SEEN
from mixprec.float8.conversion import float8_layers
from mixprec.formats import BF16, FP16
from mixprec.umup.layers import Linear, LinearReadout
from mixprec.umup.scaling import Constraint

STATIC = Precision("fp8", recipe="static")
VARIANTS = (
    {},
    {"bias": False},
    {"constraint": None},
    {"constraint": "to_grad_input_scale", "multiplier": 3.0},
    {"constraint": None, "output_multiplier": 0.3, "bias": False},
    {"constraint": "gmean", "multiplier": 0.7, "output_multiplier": 1.9},
)


def converted(linear: nn.Linear, precision: Precision = STATIC) -> Any:
    model = nn.Sequential(linear)
    report: Any = precision.convert(model, min_dim=16)
    assert report.converted == ("0",)
    return linear


def unit_linear(in_features: int = 64, out_features: int = 256, **options: Any) -> Linear:
    torch.manual_seed(0)
    linear = Linear(in_features, out_features, **options)
    for parameter in linear.parameters():
        nn.init.normal_(parameter)
    return linear


def results(linear: Any, x: Tensor, dy: Tensor) -> list[Tensor]:
    """Output and gradients of input, weight and bias."""
    x = x.detach().requires_grad_()
    y = linear(x)
    y.backward(dy)
    found = [y.detach(), x.grad, *(parameter.grad for parameter in linear.parameters())]
    return [tensor for tensor in found if tensor is not None]


def in_fp64(linear: Linear, x: Tensor, dy: Tensor) -> list[Tensor]:
    """The same of the same values, without rounding."""
    exact = Linear(
        linear.in_features,
        linear.out_features,
        "bias" in linear.state_dict(),
        constraint=linear.constraint,
        multiplier=linear.multiplier,
        output_multiplier=linear.output_multiplier,
        dtype=torch.float64,
    )
    exact.load_state_dict(linear.state_dict())
    return results(exact, x.double(), dy.double())


def snr(got: Tensor, exact: Tensor) -> float:
    """Signal to noise in dB."""
    exact = exact.detach()
    error = got.detach().double() - exact
    return 10 * math.log10(float(exact.square().sum() / error.square().sum()))


def rms(tensor: Tensor) -> float:
    return float(tensor.double().square().mean().sqrt())


# ------------------------------------------------------------------ one layer


@pytest.mark.parametrize("recipe", ["static", "adaptive", "tensorwise", "rowwise"])
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_a_unit_scaled_layer_is_what_it_was_up_to_8_bits(
    options: dict[str, Any], recipe: str
) -> None:
    plain = unit_linear(**options).bfloat16()
    eight = converted(unit_linear(**options), Precision("fp8", recipe=recipe))
    torch.manual_seed(1)
    x, dy = torch.randn(160, 64).bfloat16(), torch.randn(160, 256).bfloat16()
    exact = in_fp64(plain, x, dy)
    got, before = results(eight, x, dy), results(plain, x, dy)
    # As without multipliers, which are powers of two or multiply an FP32 sum: 28.5 dB for two
    # Gaussian operands of 3 mantissa bits, 24.6 dB where dY has 2. A bias is a sum of 16-bit dY.
    least = (28, 28, 28, 45) if recipe == "rowwise" else (28, 24, 24, 45)
    for ours, theirs, truth, db in zip(got, before, exact, least, strict=False):
        assert ours.dtype == theirs.dtype == torch.bfloat16
        assert min(snr(ours, truth), snr(theirs, truth)) > db
        assert abs(rms(ours) / rms(truth) - 1) < 0.01  # a multiplier too much or too few shows


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("constraint", [None, "to_output_scale"])
def test_multipliers_that_are_powers_of_two_leave_small_integers_exact(
    constraint: Constraint | None, bias: bool
) -> None:
    layer = unit_linear(
        64, 256, bias=bias, constraint=constraint, multiplier=0.5, output_multiplier=4.0
    )
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randint(-2, 3, parameter.shape))
    linear = converted(layer)
    x = torch.randint(-1, 2, (37, 64)).bfloat16()
    dy = torch.randint(-1, 2, (37, 256)).bfloat16()
    for got, exact in zip(results(linear, x, dy), in_fp64(layer, x, dy), strict=True):
        torch.testing.assert_close(got, exact.to(got.dtype), rtol=0, atol=0)


# ------------------------------------------------------------------ a decoder


def decoder(**options: Any) -> umup.Decoder:
    torch.manual_seed(0)
    return umup.Decoder(64, width=128, depth=2, seq_len=32, **options)


def batch(rows: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    both = torch.randint(64, (2, rows, 32), generator=generator)
    return both[0], both[1]


def loss(model: Any) -> tuple[Tensor, Tensor]:
    return model.loss(*batch())


def sizes(report: Any) -> dict[str, list[float]]:
    """Everything that `check_scales` measures, by module."""
    return {
        row.name: [row.output, row.grad_output, row.grad_input, *row.grad_weights.values()]
        for row in report.rows
    }


@pytest.mark.parametrize("recipe", ["static", "adaptive"])
def test_scales_at_the_start_are_those_of_the_model_before(recipe: str) -> None:
    sixteen, eight = mixprec.cast_model(decoder(), "bf16"), decoder()
    Precision("fp8", recipe=recipe).convert(eight, min_dim=16)
    before, after = umup.check_scales(sixteen, loss), umup.check_scales(eight, loss)
    assert before.ok and after.ok, after
    found, expected = sizes(after), sizes(before)
    assert found.keys() == expected.keys()
    # Noise adds its power to a signal's: 31.5 dB under each operand of 14 products forward and
    # 24.6 dB backward, 14 * 2 * 7.1e-4 + 14 * 3.5e-3 = 7 % of the power or 3.5 % of an RMS at most.
    for name, numbers in expected.items():
        for got, want in zip(found[name], numbers, strict=True):
            assert math.isnan(want) == math.isnan(got)
            assert math.isnan(want) or abs(got / want - 1) < 0.035, (name, got, want)


def test_a_forgotten_multiplier_would_be_seen_in_the_scales() -> None:
    eight = decoder()
    STATIC.convert(eight, min_dim=16)
    wrong: Any = eight.get_submodule("layers.0.mlp.down")
    wrong.multiplier *= 4.0
    expected = sizes(umup.check_scales(mixprec.cast_model(decoder(), "bf16"), loss))
    found = sizes(umup.check_scales(eight, loss))
    assert found["layers.0.mlp.down"][0] > 3 * expected["layers.0.mlp.down"][0]


def test_roles_groups_and_table_do_not_know_of_fp8() -> None:
    def told(model: nn.Module) -> tuple[Any, ...]:
        groups = umup.param_groups(model, 0.25, torch.optim.AdamW, weight_decay=2**-13)
        shown = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        table = umup.table(model, torch.optim.AdamW, lr=0.25, weight_decay=2**-13)
        return umup.spec(model), shown, str(table)

    model = mixprec.cast_model(decoder(), "bf16")
    before, keys = told(model), list(model.state_dict())
    STATIC.convert(model, min_dim=16)
    assert told(model) == before
    assert list(model.state_dict()) == keys
    STATIC.revert(model)
    assert told(model) == before
    assert type(model.get_submodule("layers.0.mlp.down")) is Linear


@pytest.mark.parametrize("tied", [False, True])
def test_the_readout_and_the_embedding_stay_in_16_bits(tied: bool) -> None:
    model = decoder(tied=tied)
    report: Any = STATIC.convert(model, min_dim=16)
    assert type(model.readout) is LinearReadout
    assert len(report.converted) == 14 and "readout" not in report.converted
    assert "readout" in str(report) and "excluded by '*readout*'" in str(report)
    chosen: Any = STATIC.convert(decoder(tied=tied), min_dim=16, exclude=())
    line = next(layer for layer in chosen.layers if layer.name == "readout")
    assert line.runs_in == "16 bits" and "LinearReadout" in line.reason


def steps(model: Any, number: int, *, lr: float = 2**-2, **options: Any) -> list[float]:
    """Losses of a few steps of two micro-batches."""
    inner = torch.optim.AdamW(umup.param_groups(model, lr, torch.optim.AdamW))
    accumulator = mixprec.GradientAccumulator(mixprec.MixedPrecision(inner), **options)
    losses: list[float] = []
    for _ in range(number):
        for i, (tokens, targets) in enumerate(zip(*(t.split(8) for t in batch()), strict=True)):
            accumulator.backward(*model.loss(tokens, targets), last=i == 1)
        losses.append(accumulator.step().item())
    return losses


def test_a_decoder_learns_as_it_does_in_16_bits_step_by_step() -> None:
    sixteen, eight = mixprec.cast_model(decoder(), "bf16"), decoder()
    STATIC.convert(eight, min_dim=16)
    expected, got = steps(sixteen, 8, lr=2**-4), steps(eight, 8, lr=2**-4)
    assert expected[-1] < expected[0] - 0.2
    for ours, theirs in zip(got, expected, strict=True):
        assert abs(ours / theirs - 1) < 0.005


def flushed_grads(model: nn.Module, *ends: str) -> dict[str, float]:
    """Share of each layer's dY that became 0 in the last step."""
    shares: dict[str, float] = {}
    for name, layer in float8_layers(model):
        last = layer._float8.grad_output.last.tolist()
        if name.endswith(ends or (name,)):
            shares[name] = last[FLUSHED] / last[SEEN]
    return shares


def test_a_sum_over_tokens_keeps_gradients_in_e5m2_and_a_mean_flushes_them() -> None:
    models: dict[int | None, nn.Module] = {}
    for presumed in (None, 1, 2**18):  # None is what a user gets who says nothing
        models[presumed] = decoder()
        STATIC.convert(models[presumed], min_dim=16)
        steps(models[presumed], 2, presumed_tokens=presumed)
    kept = flushed_grads(models[1])
    assert flushed_grads(models[None]) == kept
    assert len(kept) == 14 and max(kept.values()) < 0.15
    # What the residual stream hands to the ends of branches; behind them zeros stay zeros.
    assert min(flushed_grads(models[2**18], "out", "down").values()) > 0.9


def test_adaptive_exponents_make_a_mean_as_good_as_a_sum() -> None:
    model = decoder()
    Precision("fp8", recipe="adaptive").convert(model, min_dim=16)
    steps(model, 3, presumed_tokens=2**18)
    assert max(flushed_grads(model).values()) < 0.05


# ------------------------------------------------------------------ models made unit-scaled


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attn = nn.ModuleDict(
            {name: nn.Linear(width, width) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
        )
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        h, attn = self.norm1(x), self.attn
        heads = [attn[n](h).unflatten(-1, (4, -1)).mT for n in ("q_proj", "k_proj", "v_proj")]
        y = F.scaled_dot_product_attention(*(head.mT.transpose(1, 2) for head in heads))
        x = x + attn["o_proj"](y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(64, 64)
        self.layers = nn.ModuleList(Layer(64) for _ in range(2))
        self.norm, self.head = nn.RMSNorm(64), nn.Linear(64, 64, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def test_a_model_that_was_made_unit_scaled_runs_in_fp8_and_exports() -> None:
    model, (tokens, targets) = Plain(), batch()
    umup.apply(model, head_dim=16, example=lambda model: model(tokens))
    model = mixprec.cast_model(model, "bf16")
    sixteen, exported = model(tokens), umup.export(model)
    report: Any = STATIC.convert(model, min_dim=16)
    assert len(report.converted) == 12
    assert snr(model(tokens), sixteen.double()) > 18  # 24 products of 28.5 dB one after the other
    for name, weight in umup.export(model).items():
        torch.testing.assert_close(weight, exported[name], rtol=0, atol=0)
    logits = model(tokens).flatten(0, 1).float()
    umup.losses.cross_entropy(logits, targets.flatten(), reduction="sum").backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, grad in grads.items():
        assert grad is not None and grad.isfinite().all() and grad.any(), name


def test_unit_scaling_comes_before_fp8() -> None:
    model = Plain()
    STATIC.convert(model, min_dim=16)
    with pytest.raises(ValueError, match=r"Float8Linear.*convert before adapters, quantisers"):
        umup.apply(model, head_dim=16)


# ------------------------------------------------------------------ FP16 and its loss scale


def test_overflow_of_a_growing_loss_scale_in_e5m2_reaches_the_scaler() -> None:
    """dY in FP16 overflows at 65504; a cast that saturated silently would hide that."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    Precision("fp8", recipe="static", params=FP16).convert(model, min_dim=16)
    layer: Any = model[0]
    scaler = mixprec.DynamicLossScaler(init_scale=2.0**14, growth_interval=1)
    optimizer = mixprec.MixedPrecision(
        torch.optim.SGD(model.parameters(), lr=0.01), loss_scaler=scaler
    )
    accumulator = mixprec.GradientAccumulator(optimizer, presumed_tokens=1)
    x = (torch.randn(32, 64) * 2**-8).half()  # so that nothing but dY comes near the limit
    overflowed: list[bool] = []
    scales: list[float] = []
    for _ in range(8):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        scales.append(optimizer.metrics()["loss_scale"])
        accumulator.backward(model(x).float().sum(), 32)
        accumulator.step()
        overflowed.append(int(layer._float8.grad_output.last[NON_FINITE]) > 0)
        moved = any(
            not torch.equal(parameter, old)
            for parameter, old in zip(model.parameters(), before, strict=True)
        )
        assert moved != overflowed[-1]
    # dY is the loss scale itself: 2^14, 2^15, then 2^16, which is inf in FP16; halved, and again.
    assert scales == [2.0**14, 2.0**15, 2.0**16, 2.0**15, 2.0**16, 2.0**15, 2.0**16, 2.0**15]
    assert overflowed == [scale == 2.0**16 for scale in scales]


def test_gradients_beyond_e5m2_but_inside_fp16_saturate_and_are_counted() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64))
    Precision("fp8", recipe="static", params=FP16).convert(model, min_dim=16)
    layer: Any = model[0]
    y = layer(torch.randn(16, 64).half())
    y.backward(torch.full_like(y, 65000.0))
    counters = layer._float8.grad_output.counters.tolist()
    assert counters[NON_FINITE] == 0
    assert counters[1] == y.numel()
    assert layer.weight.grad is not None
    assert BF16.max > FP16.max > 57344
