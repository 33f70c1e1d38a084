"""What becomes of each linear layer, and why; and the way back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import mixprec
from mixprec import Precision, umup
from mixprec.float8 import Float8Linear, LayerReport
from mixprec.float8.operand import Operand
from mixprec.float8.unit_linear import Float8UnitLinear


class Doubled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(2 * input)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 32)
        self.norm = nn.LayerNorm(32)
        self.up = nn.Linear(32, 96)
        self.down = nn.Linear(96, 32)
        self.odd = nn.Linear(32, 24)
        self.doubled = Doubled(32, 32)
        self.tied = nn.Linear(32, 64, bias=False)
        self.tied.weight = self.embed.weight
        self.router = nn.Linear(32, 32)
        self.lm_head = nn.Linear(32, 64)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.down(torch.relu(self.up(self.norm(self.embed(tokens)))))
        return self.lm_head(self.doubled(self.router(x)))


def convert(model: nn.Module, recipe: str = "static", **options: Any) -> LayerReport:
    options.setdefault("min_dim", 16)
    report = Precision("fp8", recipe=recipe).convert(model, **options)
    assert isinstance(report, LayerReport)
    return report


def test_the_report_says_for_every_linear_layer_what_and_why() -> None:
    report = convert(Model(), overrides={"down": "adaptive"})
    assert str(report).splitlines() == [
        "up       32 -> 96  static",
        "down     96 -> 32  adaptive  override 'down'",
        "odd      32 -> 24  16 bits   out_features=24 is no multiple of 16",
        "doubled  32 -> 32  16 bits   is a Doubled, which may have a forward of its own",
        "tied     32 -> 64  16 bits   its weight is also that of 'embed'",
        "router   32 -> 32  16 bits   excluded by '*router*'",
        "lm_head  32 -> 64  16 bits   excluded by 'lm_head'",
        "2 of 7 linear layers in FP8, with 47 % of their weights",
        # 2 * 32 * 96 of seven layers' 13056, and a norm's 64; the embedding's are a layer's too.
        "That is 47 % of all the model's weights. No other module runs in FP8: LayerNorm has 0 %",
        "Emulated: cpu has no FP8 units, so the numbers are the same and no time is saved",
    ]
    assert report.converted == ("up", "down")


def test_small_layers_stay_unless_asked_for() -> None:
    model = nn.Sequential(nn.Linear(32, 1024), nn.Linear(1024, 1024))
    report = Precision("fp8").convert(model, overrides={"0": "rowwise"})
    assert str(report).startswith("0  32 -> 1024    rowwise   override '0'\n")
    report = Precision("fp8").convert(nn.Sequential(nn.Linear(32, 1024)))
    assert "a size of 32 is below min_dim=1024, where FP8 gains no time" in str(report)
    assert str(report).endswith("0 of 1 linear layers in FP8, with 0 % of their weights")


def test_a_model_without_linear_layers_says_so() -> None:
    assert str(Precision("fp8").convert(nn.Sequential(nn.ReLU()))) == "no linear layers"


def test_the_report_says_how_much_of_a_model_of_convolutions_runs_in_fp8() -> None:
    model: Any = nn.Sequential(nn.Conv2d(16, 64, 3), nn.Conv2d(64, 64, 3))
    model.append(nn.Linear(64, 32, bias=False))
    model.append(nn.Conv2d(64, 64, 3, bias=False)).append(model[0])
    model[3].weight = model[1].weight
    lines = str(convert(model)).splitlines()
    # 2048 weights of 2048 + 9 * 16 * 64 + 64 + 9 * 64 * 64 + 64
    assert lines[-3:-1] == [
        "1 of 1 linear layers in FP8, with 100 % of their weights",
        "That is 4 % of all the model's weights. No other module runs in FP8: Conv2d has 96 %",
    ]
    assert str(convert(nn.Sequential(nn.Conv2d(16, 64, 3)))) == (
        "no linear layers. That is 0 % of all the model's weights. No other module runs in FP8: "
        "Conv2d has 100 %"
    )


def test_a_layer_that_computes_more_than_its_product_stays() -> None:
    model: Any = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32))
    model[0].adapter = nn.Linear(32, 32)
    model[1].forward = lambda x: 2 * x
    report = convert(model, overrides={"0": "static"})
    assert report.converted == ("0.adapter", "2")
    reasons = {layer.name: layer.reason for layer in report.layers}
    assert reasons["0"] == "has a module of its own, 'adapter', which may use its weight"
    assert reasons["1"] == "its forward was replaced, and that may compute anything"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of torch.jit
@pytest.mark.parametrize("of", ["trace", "trace in evaluation", "script"])
def test_torch_jit_is_refused(of: str) -> None:
    model = nn.Sequential(nn.Linear(32, 32))
    convert(model)
    x = torch.ones(16, 32).bfloat16()
    with pytest.raises(
        RuntimeError, match=r"torch.jit cannot hold a layer .*revert\(model\) first"
    ):
        if of == "script":
            torch.jit.script(model)
        else:
            torch.jit.trace(model.eval() if "evaluation" in of else model, x)
    Precision("fp8").revert(model)
    traced: Any = torch.jit.trace(model, x)
    assert traced(x).shape == (16, 32)


def test_a_weight_that_somebody_else_quantized_is_refused() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    model: Any = nn.Sequential(nn.Linear(32, 32))
    convert(model)
    before = model[0].weight
    quantized = TwoTensor(before.detach(), before.detach())
    with pytest.raises(TypeError, match=r"Float8Linear\(.*is a TwoTensor.*revert\(model\) first"):
        model[0].weight = nn.Parameter(quantized)
    assert model[0].weight is before
    Precision("fp8").revert(model)
    model[0].weight = nn.Parameter(quantized)


def test_include_and_overrides_choose() -> None:
    assert convert(Model(), include=("up",)).converted == ("up",)
    assert convert(Model(), overrides={"up": "bf16"}).converted == ("down",)
    assert convert(Model(), exclude=()).converted == ("up", "down", "router", "lm_head")
    mixed = convert(Model(), overrides={"router": "tensorwise", "lm_head": "bf16"}).layers
    assert {layer.name: layer.runs_in for layer in mixed}["router"] == "tensorwise"


def test_kept_fp32_layers_stay_so() -> None:
    report = convert(Model(), keep_fp32=("up", "*norm*"))
    assert "its weight is kept in fp32" in str(report)
    assert {row.module: row.after for row in report.rows}["norm"] == "fp32"


def test_parameters_names_hooks_and_state_dicts_stay() -> None:
    model = Model().bfloat16()
    calls: list[str] = []
    model.up.register_forward_hook(lambda *_: calls.append("hook"))
    before, parameters = copy.deepcopy(model.state_dict()), dict(model.named_parameters())
    modules = [name for name, _ in model.named_modules()]
    convert(model, keep_fp32=())
    assert [name for name, _ in model.named_modules()] == modules
    assert all(model.get_parameter(name) is p for name, p in parameters.items())
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert isinstance(model.up, Float8Linear) and isinstance(model.up, nn.Linear)
    assert (
        repr(model.up) == "Float8Linear(in_features=32, out_features=96, bias=True, float8=static)"
    )
    model(torch.arange(16))
    assert calls == ["hook"]
    plain = Model().bfloat16()
    plain.load_state_dict(after)


def test_revert_gives_the_layers_back() -> None:
    model = Model()
    report = convert(model)
    tokens = torch.arange(16)
    Precision("fp8").revert(model)
    assert type(model.up) is nn.Linear and "_float8" not in vars(model.up)
    twin = Model()
    Precision("bf16").convert(twin)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(model(tokens), twin(tokens))
    assert convert(model).layers == report.layers


def test_unit_scaled_layers_are_converted_as_such() -> None:
    model = nn.Sequential(umup.layers.Linear(32, 64), umup.layers.LinearReadout(64, 32))
    report = convert(model, exclude=())
    assert type(model[0]) is Float8UnitLinear
    assert "1  64 -> 32  16 bits  is a LinearReadout, which may have a forward of its own" in str(
        report
    )
    Precision("fp8").revert(model)
    assert type(model[0]) is umup.layers.Linear


def test_a_model_built_on_the_meta_device_gets_its_memory_later() -> None:
    with torch.device("meta"):
        model: Any = nn.Sequential(nn.Linear(32, 64))
    convert(model, "adaptive")
    model.to_empty(device="cpu")
    with torch.no_grad():
        model[0].weight.normal_()
        model[0].bias.zero_()
    x = torch.randn(16, 32).bfloat16()
    exact = nn.functional.linear(x.double(), model[0].weight.double())
    error = model(x).double() - exact
    assert error.square().sum() < 10**-2.7 * exact.square().sum()


def test_all_operands_move_with_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that is compiled moves nothing; on a GPU it would read a multiplier on the host."""
    model: Any = nn.Sequential(nn.Linear(32, 64))
    convert(model)
    moved: list[Operand] = []
    monkeypatch.setattr(Operand, "move_to", lambda self, device: moved.append(self))
    model.bfloat16()
    assert set(model[0]._float8.operands().values()) <= set(moved)


def test_computed_weights_stay_in_16_bits() -> None:
    model = nn.Sequential(nn.Linear(32, 64))
    nn.utils.parametrizations.weight_norm(model[0])
    assert "its weight is computed, not a parameter" in str(convert(model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"include": ("attn",)}, "include pattern 'attn' matches no linear layer, so it would do "),
        ({"overrides": {"attn.*": "static"}}, r"overrides pattern 'attn.\*' matches no linear lay"),
        ({"exclude": ("lm_haed",)}, "exclude pattern 'lm_haed' matches.* similar names: lm_head"),
        (
            {"overrides": {"up": "fp4"}},
            r"overrides\['up'\]: unknown recipe 'fp4'; use one of 'static', .* 'bf16' leaves a lay",
        ),
    ],
)
def test_patterns_that_do_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    model = Model()
    with pytest.raises(ValueError, match=message):
        convert(model, **options)
    assert type(model.up) is nn.Linear and model.up.weight.dtype == torch.float32


def test_one_pattern_for_many_is_refused() -> None:
    with pytest.raises(TypeError, match=r"exclude is a sequence of patterns; write exclude=\('up'"):
        convert(Model(), exclude="up")


def test_converting_twice_is_refused() -> None:
    model = Model()
    convert(model)
    with pytest.raises(ValueError, match=r"'up' runs in FP8 already, by recipe static.*revert\(mo"):
        convert(model, "adaptive")


def test_layer_options_need_a_recipe() -> None:
    with pytest.raises(TypeError, match=r"'params=bf16.*' has no recipe. Use Precision\('fp8', re"):
        Precision("bf16").convert(Model(), min_dim=64)


def test_cast_model_converts_too() -> None:
    model = nn.Sequential(nn.Linear(1024, 1024))
    assert type(mixprec.cast_model(model, "fp8")[0]) is Float8Linear
