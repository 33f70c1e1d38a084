"""A linear layer in FP8: three products, any input, and nothing of it lost or hidden."""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import pickle
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils
from fp8 import RECIPES, run
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from torch.utils.checkpoint import checkpoint

import mixprec
from mixprec import Precision, formats
from mixprec.float8 import Cast, Float8Linear, Recipe, operand, operators, weight
from mixprec.float8 import linear as linear_module
from mixprec.float8.operators import written
from mixprec.float8.recipe import PRODUCTS

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PARAMS = {torch.bfloat16: formats.BF16, torch.float16: formats.FP16, torch.float32: formats.FP32}


def layer(
    in_features: int = 64,
    out_features: int = 48,
    *,
    recipe: str | Recipe = "static",
    bias: bool = True,
    dtype: torch.dtype = torch.bfloat16,
) -> Any:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(in_features, out_features, bias))
    with torch.no_grad():
        model[0].weight.normal_()
    precision = Precision("fp8", recipe=recipe, params=PARAMS[dtype])
    report = precision.convert(model, min_dim=16)
    assert report.converted == ("0",)  # pyright: ignore[reportAttributeAccessIssue]
    return model[0]


def snr(got: Tensor, exact: Tensor) -> float:
    """Signal to noise in dB."""
    error = got.double() - exact
    return 10 * torch.log10(exact.square().sum() / error.square().sum()).item()


def in_fp64(linear: Any, x: Tensor, dy: Tensor) -> list[Tensor]:
    """Output and gradients of input, weight and bias on the same values, without rounding."""
    held = [t for t in (x, linear.weight, linear.bias) if t is not None]
    exact = [t.detach().double().requires_grad_() for t in held]
    y = F.linear(exact[0], exact[1], *exact[2:])
    y.backward(dy.double())
    grads = [t.grad for t in exact]
    return [y.detach(), *(grad for grad in grads if grad is not None)]


def operands(
    *shape: int, width: int = 48, dtype: torch.dtype = torch.bfloat16, seed: int = 1
) -> Any:
    torch.manual_seed(1)
    return torch.randn(*shape).to(dtype), torch.randn(*shape[:-1], width).to(dtype)


# ------------------------------------------------------------------ the numbers


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_products_are_as_near_as_8_bits_allow(recipe: str, dtype: torch.dtype, bias: bool) -> None:
    linear = layer(recipe=recipe, dtype=dtype, bias=bias)
    x, dy = operands(160, 64, dtype=dtype)
    got, exact = run(linear, x, dy), in_fp64(linear, x, dy)
    # Two operands of 3 mantissa bits: 31.5 dB each for a Gaussian, 28.5 dB together; with 2 bits
    # for dY 24.6 dB. The bias is a plain sum.
    least = {"rowwise": (28, 28, 28)}.get(recipe, (28, 24, 24))
    for g, e, db in zip(got, exact, (*least, 45), strict=False):
        assert g.shape == e.shape
        assert g.dtype == dtype
        assert snr(g, e) > db


@pytest.mark.parametrize("recipe", RECIPES)
def test_products_of_small_integers_are_exact(recipe: str) -> None:
    """Every step is exact on them, so an operand taken from the wrong place cannot hide."""
    linear = layer(recipe=recipe)
    torch.manual_seed(0)
    with torch.no_grad():
        linear.weight.copy_(torch.randint(-1, 2, linear.weight.shape))
        linear.weight[:, 0] = linear.weight[0] = 1.0  # the same largest value in each row
        linear.bias.zero_()
    x = torch.randint(-1, 2, (37, 64)).bfloat16()
    dy = torch.randint(-1, 2, (37, 48)).bfloat16()
    x[:, 0] = x[0] = dy[:, 0] = dy[0] = 1.0
    if recipe == "tensorwise":  # 448 / 1 is no power of two, so its inverse is rounded
        x, dy = x * 448, dy * 57344
        with torch.no_grad():
            linear.weight.mul_(448)
    for got, exact in zip(run(linear, x, dy), in_fp64(linear, x, dy), strict=True):
        torch.testing.assert_close(got, exact.to(got.dtype), rtol=0, atol=0)


@pytest.mark.parametrize("rms", [2.0**e for e in range(-8, 9, 4)])
def test_adaptive_exponents_find_any_scale_and_static_ones_show_their_window(rms: float) -> None:
    x, dy = operands(160, 64)
    x, dy = x * rms, dy * rms
    found: dict[str, list[float]] = {}
    for recipe in ("static", "adaptive"):
        linear = layer(recipe=recipe, bias=False)
        with torch.no_grad():
            linear.weight.mul_(rms)
        optimizer = torch.optim.SGD(linear.parameters(), lr=0.0)
        run(linear, x, dy)
        optimizer.step()
        got = run(linear, x, dy)
        found[recipe] = list(map(snr, got, in_fp64(linear, x, dy)))
    y, dx, dw = found["adaptive"]
    assert y > 28 and dx > 24 and dw > 24
    assert (found["static"][0] > 28) == (rms in (2.0**-4, 1, 2.0**4))


def test_a_product_that_the_recipe_leaves_out_has_16_bit_operands() -> None:
    for products in itertools.combinations(PRODUCTS, 2):
        fast = tuple(product for product in products if product == "output")
        linear = layer(recipe=Recipe(products=products, fast_accumulation=fast))
        x, dy = operands(160, 64)
        got = run(linear, x, dy)
        errors = dict(zip(PRODUCTS, map(snr, got, in_fp64(linear, x, dy)), strict=False))
        for product, error in errors.items():
            assert (error > 45) == (product not in products)


@pytest.mark.filterwarnings("ignore:.* is infinite in 1 of")  # the weight, where it is that
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("place", ["input", "weight", "grad_output"])
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_overflow_in_any_operand_reaches_the_verdict_on_gradients(
    recipe: str, place: str, value: float
) -> None:
    linear = layer(recipe=recipe)
    optimizer = mixprec.MixedPrecision(torch.optim.SGD(linear.parameters(), lr=1.0))
    x, dy = operands(32, 64)
    run(linear, x, dy)
    optimizer.step()
    assert optimizer.grads_finite
    with torch.no_grad():
        {"input": x, "weight": linear.weight, "grad_output": dy}[place][3, 5] = value
    before = linear.weight.detach().clone()
    y = run(linear, x, dy)[0]
    if place != "grad_output":  # a loss would make the gradient of such outputs NaN
        assert y.isnan().any()
        linear.weight.grad = None
        run(linear, x, torch.where(y.isnan(), y, dy))
    with pytest.warns(RuntimeWarning, match="gradients are not finite"):
        optimizer.step()
    assert not optimizer.grads_finite
    torch.testing.assert_close(linear.weight.detach(), before, rtol=0, atol=0, equal_nan=True)


# ------------------------------------------------------------------ inputs of any kind


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("shape", [(64,), (1, 64), (17, 64), (2, 5, 64), (2, 3, 4, 64), (0, 64)])
def test_any_number_of_tokens_and_axes(recipe: str, shape: tuple[int, ...]) -> None:
    linear = layer(recipe=recipe)
    x, dy = operands(*shape)
    got, exact = run(linear, x, dy), in_fp64(linear, x, dy)
    for g, e in zip(got, exact, strict=True):
        assert g.shape == e.shape
        assert g.isfinite().all()
        if e.numel() and 0 not in shape:
            assert snr(g, e) > 20
    if 0 in shape:
        assert not any(g.any() for g in got[2:])


@pytest.mark.parametrize("recipe", RECIPES)
def test_zeros_give_zeros(recipe: str) -> None:
    linear = layer(recipe=recipe, bias=False)
    with torch.no_grad():
        linear.weight.zero_()
    for got in run(linear, torch.zeros(16, 64).bfloat16(), torch.zeros(16, 48).bfloat16()):
        assert not got.any()


def test_strided_and_expanded_inputs() -> None:
    linear = layer()
    x, dy = operands(32, 64)
    wide = torch.stack([x, x], -1)[..., 0]
    assert not wide.is_contiguous()
    for a, b in zip(run(linear, x, dy), run(linear, wide, dy), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    ones = torch.ones((), dtype=dy.dtype).expand(dy.shape)  # what sum().backward() hands over
    for a, b in zip(run(linear, x, ones.clone()), run(linear, x, ones), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_frozen_parts_get_no_gradient_and_the_others_the_same() -> None:
    x, dy = operands(32, 64)
    whole = run(layer(), x, dy)
    frozen = layer()
    frozen.weight.requires_grad_(False)
    inner = x.clone().requires_grad_()
    frozen(inner).backward(dy)
    torch.testing.assert_close(inner.grad, whole[1], rtol=0, atol=0)
    assert frozen.weight.grad is None
    first = layer()
    first(x).backward(dy)
    torch.testing.assert_close(first.weight.grad, whole[2], rtol=0, atol=0)


def test_autocast_casts_once_from_fp32_and_returns_its_dtype() -> None:
    linear = layer(dtype=torch.float32)
    x, dy = operands(32, 64, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = linear(x)
    assert y.dtype == torch.bfloat16
    y.backward(dy.bfloat16())
    assert linear.weight.grad is not None and linear.weight.grad.dtype == torch.float32
    exact = in_fp64(linear, x, dy)
    assert snr(y.detach(), exact[0]) > 28
    assert snr(linear.weight.grad, exact[2]) > 24
    torch.testing.assert_close(linear.bias.grad, dy.bfloat16().float().sum(0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(2, 64), "input is torch.float32 but weight is torch.bfloat16.*autocast"),
        (torch.ones(2, 64).to(torch.float8_e4m3fn), "input is torch.float8_e4m3fn but weight"),
        (torch.ones(2, 64, dtype=torch.int64), "input is torch.int64 but weight is"),
    ],
)
def test_an_input_of_another_dtype_is_refused(x: Tensor, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        layer()(x)


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_tensor_in_8_bits_leaves_a_layer(recipe: str) -> None:
    """So none can reach a product that is not scaled."""
    linear, seen = layer(recipe=recipe), list[Tensor]()
    linear.register_forward_hook(lambda _, inputs, output: seen.extend((*inputs, output)))
    linear.register_full_backward_hook(lambda _, *grads: seen.extend(itertools.chain(*grads)))
    seen += run(linear, *operands(32, 64))
    seen += [*linear.parameters(), *linear.buffers(), *linear.state_dict().values()]
    assert len(seen) == 12 and {tensor.dtype for tensor in seen} == {torch.bfloat16}


def test_a_second_derivative_is_refused() -> None:
    x = operands(16, 64)[0].requires_grad_()
    y = layer()(x).float().sum()
    with pytest.raises(RuntimeError, match="no second derivative, and create_graph=True asks"):
        torch.autograd.grad(y, x, create_graph=True)


def test_inference_and_no_grad_give_the_same_output() -> None:
    linear, (x, dy) = layer(), operands(16, 64)
    y = run(linear, x, dy)[0]
    with torch.no_grad():
        torch.testing.assert_close(linear(x), y, rtol=0, atol=0)
    with torch.inference_mode():
        torch.testing.assert_close(linear(x.clone()), y, rtol=0, atol=0)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_layer_that_begins_with_inference_can_be_trained(recipe: str) -> None:
    linear, (x, dy) = layer(recipe=recipe), operands(16, 64)
    expected = run(linear, x, dy)
    copied = copy.deepcopy(linear)  # its memory comes with its first use
    with torch.inference_mode():
        copied(x.clone())
    for a, b in zip(run(copied, x, dy), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    torch.optim.SGD(copied.parameters(), lr=0.0).step()


# ------------------------------------------------------------------ what is cast when


@pytest.fixture
def casts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of all matrices cast, in order."""
    shapes: list[tuple[int, ...]] = []
    for module in (operand, weight):
        real = module.cast_scaled

        def counted(x: Tensor, *args: Any, real: Any = real, **options: Any) -> Any:
            shapes.append(tuple(x.shape))
            return real(x, *args, **options)

        monkeypatch.setattr(module, "cast_scaled", counted)
    return shapes


def test_a_weight_is_cast_once_a_step(casts: list[tuple[int, ...]]) -> None:
    linear = layer()
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.1)
    x, dy = operands(32, 64)
    for _ in range(2):
        for _ in range(3):
            linear(x).backward(dy)
        optimizer.step()
    assert casts.count((48, 64)) == 2


def test_a_weight_written_behind_its_version_is_cast_again_after_the_step() -> None:
    class ThroughData(torch.optim.Optimizer):
        def step(self, closure: Any = None) -> Any:
            for param in self.param_groups[0]["params"]:
                param.data.zero_()

    linear, (x, _) = layer(bias=False), operands(32, 64)
    optimizer = ThroughData(linear.parameters(), {})
    assert linear(x).any()
    optimizer.step()
    assert not linear(x).any()


def test_edited_and_loaded_and_swapped_weights_are_noticed() -> None:
    linear, (x, _) = layer(bias=False), operands(32, 64)
    with torch.no_grad():  # in FP8 without subnormals, so that factors of two are exact
        linear.weight.copy_(torch.randint(-3, 4, linear.weight.shape))
    saved = copy.deepcopy(linear.state_dict())
    y = linear(x).detach()
    with torch.no_grad():
        linear.weight.mul_(2)
        torch.testing.assert_close(linear(x), 2 * y, rtol=0, atol=0)
        linear.weight.data = -saved["weight"]
        torch.testing.assert_close(linear(x), -y, rtol=0, atol=0)
        linear.load_state_dict(saved)
        torch.testing.assert_close(linear(x), y, rtol=0, atol=0)
        for factor in (2.0, 4.0):  # each a new tensor, perhaps at the address of the last
            other = {"weight": saved["weight"] * factor}
            swapped = torch.func.functional_call(linear, other, x)
            torch.testing.assert_close(swapped, factor * y, rtol=0, atol=0)
            del other, swapped


EDITS = {
    "+=": lambda w: w.data.__iadd__(1),
    "copy_": lambda w: w.data.copy_(torch.ones_like(w)),
    "clamp_": lambda w: w.data.clamp_(-0.01, 0.01),
    "[:]": lambda w: w.data.__setitem__(slice(None), 2.0),
    "init": lambda w: nn.init.ones_(w.data),
    "foreach": lambda w: torch._foreach_add_([w.data], 1.0),
    "view": lambda w: w.data.view(-1)[:64].fill_(3.0),
    "memory": lambda w: w.data.view(torch.int16).numpy().fill(0x4000),  # 2 in BF16
    "exchange": lambda w: setattr(w, "data", torch.ones_like(w)),
    "swap": lambda w: torch.utils.swap_tensors(w, nn.Parameter(torch.ones_like(w))),
}
"""Ways to write a weight, most of them past its version counter."""


def uses_its_weight(linear: Any, x: Tensor) -> bool:
    """Whether the output is what a layer without a past computes."""
    twin = layer(linear.in_features, linear.out_features, recipe=linear._float8.recipe, bias=False)
    with torch.no_grad():
        twin.weight.copy_(linear.weight)
        expected = twin(x)
    return snr(linear(x).detach(), expected.double()) > 24  # exponents may be another's


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("how", ["no_grad", "inference", "eval", "nothing trains"])
def test_evaluation_sees_the_weight_that_is_there(recipe: str, how: str, edit: Any) -> None:
    linear, (x, _) = layer(recipe=recipe, bias=False), operands(32, 64)
    linear(x)  # in training, which keeps its cast
    contexts = {"no_grad": torch.no_grad, "inference": torch.inference_mode}
    linear.train(how != "eval").requires_grad_(how != "nothing trains")
    with contexts.get(how, contextlib.nullcontext)():
        linear(x)
        before = linear.weight.detach().clone()
        edit(linear.weight)
        assert not torch.equal(before, linear.weight)
        assert uses_its_weight(linear, x)


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("frozen", [False, True])
def test_training_sees_what_was_written_since_the_last_step(edit: Any, frozen: bool) -> None:
    linear, (x, dy) = layer(bias=False), operands(32, 64)
    linear.weight.requires_grad_(not frozen)  # as below an adapter, which is what is trained
    adapter = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([adapter if frozen else linear.weight], lr=0.0)
    linear(x.requires_grad_()).backward(dy)
    adapter.grad = torch.zeros(3)
    optimizer.step()
    edit(linear.weight)
    assert uses_its_weight(linear, x)


def test_a_write_between_two_micro_batches_is_told() -> None:
    linear, (x, dy) = layer(bias=False), operands(32, 64)
    linear(x).backward(dy)
    linear.weight.data.zero_()
    assert linear(x).any()  # what this is about
    Precision("fp8").recast(nn.Sequential(linear))
    assert not linear(x).any()


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_training_sees_what_was_written_before_any_backward_pass(edit: Any) -> None:
    linear, (x, _) = layer(bias=False), operands(32, 64)
    linear(x)
    edit(linear.weight)
    assert uses_its_weight(linear, x)


def test_micro_batches_and_recomputation_use_one_cast(casts: list[tuple[int, ...]]) -> None:
    linear, (x, dy) = layer(), operands(32, 64)
    for _ in range(3):
        checkpoint(linear, x.requires_grad_(), use_reentrant=False).backward(dy)
    assert casts.count((48, 64)) == 1


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_layer_that_is_used_twice_before_it_goes_backward(recipe: str) -> None:
    linear, (x, dy) = layer(recipe=recipe), operands(32, 64)
    alone = [run(linear, x, dy)[2:] for _ in range(2)]
    linear.zero_grad()
    outputs = [linear(x) for _ in range(2)]  # casts the same weight again
    for y in outputs:
        y.backward(dy)
    for param, *grads in zip(linear.parameters(), *alone, strict=True):
        torch.testing.assert_close(param.grad, sum(grads), rtol=0, atol=0)


def test_a_weight_that_was_merged_while_frozen_is_cast_anew_for_training() -> None:
    linear, (x, _) = layer(bias=False), operands(32, 64)
    linear.weight.requires_grad_(False)
    linear(x.requires_grad_())
    linear.weight.data.zero_()
    linear.weight.requires_grad_(True)
    assert not linear(x).any()


def test_other_memory_at_the_address_of_the_last_is_noticed() -> None:
    """As of a weight that was moved away and came back."""
    linear, (x, _) = layer(bias=False), operands(32, 64)
    addresses: set[int] = set()
    for value in range(8):
        linear.weight.data = torch.full((48, 64), 1.0 + value).bfloat16()
        addresses.add(linear.weight.data_ptr())
        assert uses_its_weight(linear, x)
        linear.weight.data = torch.empty(0).bfloat16()


@pytest.mark.parametrize("how", ["load", "load, once given", "assign", "new", "recast"])
def test_a_weight_that_is_replaced_gets_an_exponent_of_its_own(how: str) -> None:
    """At once, though the exponent of a weight that is trained has settled."""
    linear, (x, _) = layer(recipe="adaptive", bias=False), operands(32, 64)
    if how == "load, once given":
        Precision("fp8").load_exponents(nn.Sequential(linear), {"0": {"weight": 3}})
    linear(x)
    torch.optim.SGD(linear.parameters(), lr=0.0).step()
    other = 2.0**20 * linear.weight.detach()
    if how == "recast":
        linear.weight.data.copy_(other)
        Precision("fp8").recast(linear)
    elif how == "new":
        linear.weight = nn.Parameter(other)
    else:
        linear.load_state_dict({"weight": other}, assign=how == "assign")
    for context in (torch.no_grad(), contextlib.nullcontext()):
        with context:
            assert uses_its_weight(linear, x)


def test_a_weight_that_is_loaded_keeps_an_exponent_that_was_given() -> None:
    linear, (x, _) = layer(recipe="adaptive", bias=False), operands(32, 64)
    Precision("fp8").load_exponents(nn.Sequential(linear), {"0": {"weight": 3}})
    linear.load_state_dict({"weight": linear.weight.detach().clone()})
    linear(x)
    assert linear._float8.weight.operand.scale[0] == 2.0**3


@pytest.mark.parametrize("keep", ["deepcopy", "swa_utils", "assign"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_an_averaged_copy_follows_its_weights(recipe: str, keep: str) -> None:
    linear, (x, _) = layer(recipe=recipe, bias=False), operands(32, 64)
    linear(x)
    averaged: Any = copy.deepcopy(linear).requires_grad_(False)
    if keep == "swa_utils":
        averaged = torch.optim.swa_utils.AveragedModel(
            linear, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
        )
    for _ in range(3):
        linear.weight.data.add_(torch.randn_like(linear.weight))
        linear(x)
        if keep == "swa_utils":
            averaged.update_parameters(linear)
        elif keep == "assign":
            averaged.load_state_dict({"weight": 2 * linear.weight.detach()}, assign=True)
        else:
            averaged.weight.data.lerp_(linear.weight.data, 0.5)
        assert uses_its_weight(getattr(averaged, "module", averaged), x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler, of torch itself
@pytest.mark.parametrize("recipe", RECIPES)
def test_compiled_evaluation_sees_the_weight_that_is_there(recipe: str) -> None:
    torch._dynamo.reset()
    linear, (x, _) = layer(recipe=recipe, bias=False), operands(32, 64)
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    for context in (contextlib.nullcontext, torch.no_grad):
        with context():
            compiled(x)
    with torch.no_grad():
        linear.weight.data.zero_()
        assert not compiled(x).any()


@pytest.mark.parametrize("recipe", RECIPES)
def test_evaluation_mode_has_the_gradients_of_training(recipe: str) -> None:
    """As of a frozen model that others are trained through."""
    linear, (x, dy) = layer(recipe=recipe), operands(32, 64)
    expected = run(linear, x, dy)
    for a, b in zip(run(linear.eval(), x, dy), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_an_evaluation_leaves_a_pending_backward_pass_alone(casts: list[tuple[int, ...]]) -> None:
    linear, (x, dy) = layer(), operands(32, 64)
    expected = run(linear, x, dy)[1]
    y = linear(x.requires_grad_())
    with torch.no_grad():
        linear(x)
    y.backward(dy)
    torch.testing.assert_close(x.grad, expected, rtol=0, atol=0)
    assert casts.count((48, 64)) == 2  # one for training, one for the evaluation


def test_a_weight_that_a_graph_casts_is_cast_at_every_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replays change it past its version counter, and no optimizer is seen to step."""
    linear, (x, _) = layer(bias=False), operands(32, 64)
    linear(x)
    monkeypatch.setattr(weight, "is_capturing", lambda device: True)
    linear(x)
    monkeypatch.undo()
    assert linear(x).any()
    linear.weight.data.zero_()  # as a replay does, no counter knows
    assert not linear(x).any()


def test_siblings_share_one_cast_of_their_input(casts: list[tuple[int, ...]]) -> None:
    model = nn.ModuleList(nn.Linear(64, 48) for _ in range(3))
    Precision("fp8", recipe="adaptive").convert(model, min_dim=16)
    x, _ = operands(32, 64)
    for module in model:
        module(x)
    assert casts.count((32, 64)) == 1
    x.mul_(2)
    model[0](x)
    assert casts.count((32, 64)) == 2
    model[0](x.clone())
    assert casts.count((32, 64)) == 3


def test_adaptive_siblings_keep_one_exponent_and_strangers_their_own() -> None:
    model: Any = nn.ModuleList(nn.Linear(64, 48) for _ in range(3))
    Precision("fp8", recipe="adaptive").convert(model, min_dim=16)
    x, _ = operands(32, 64)
    states = [module._float8 for module in model]
    for module, factor in zip(model, (1, 1, 100), strict=True):
        module(x if factor == 1 else factor * x)
    assert states[0].input is states[1].input is not states[2].input
    assert states[0].grad_output is not states[1].grad_output


def test_layers_with_other_casts_do_not_share() -> None:
    x, dy = operands(32, 64)
    alone, other = layer(), layer(recipe=Recipe(input=Cast(exponent=3)))
    expected = run(other, x, dy)
    alone(x)
    for a, b in zip(run(other, x, dy), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    wanted = x.clone()
    alone(wanted)
    assert torch.equal(other(wanted), expected[0])


@pytest.mark.parametrize("how", ["no_grad", "frozen weight", "16-bit weight gradient"])
def test_no_transpose_is_written_that_nobody_reads(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted: list[bool] = []
    real = operand.cast_scaled

    def seen(*args: Any, cols: bool, **options: Any) -> Any:
        wanted.append(cols)
        return real(*args, cols=cols, **options)

    monkeypatch.setattr(operand, "cast_scaled", seen)
    products = ("output", "grad_input") if how == "16-bit weight gradient" else tuple(PRODUCTS)
    linear, (x, _) = layer(recipe=Recipe(products=products)), operands(32, 64)
    linear.weight.requires_grad_(how != "frozen weight")
    with torch.set_grad_enabled(how != "no_grad"):
        linear(x.requires_grad_())
    assert len(wanted) == 1 + (how == "no_grad")  # the input, and a weight that is not kept
    assert not any(wanted)


def test_a_backward_pass_through_a_weight_that_was_cast_again_is_refused() -> None:
    linear, (x, dy) = layer(), operands(32, 64)
    y = linear(x.requires_grad_())
    with torch.no_grad():
        linear.weight.mul_(2)
    linear(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(dy)


def test_checkpointing_recomputes_the_same_bytes() -> None:
    linear, (x, dy) = layer(recipe="adaptive"), operands(32, 64)
    plain = run(linear, x, dy)
    torch.optim.SGD(linear.parameters(), lr=0.0).step()
    again = run(linear, x, dy)
    x = x.clone().requires_grad_()
    linear.zero_grad()
    y = checkpoint(linear, x, use_reentrant=False)
    y.backward(dy)
    assert linear.weight.grad is not None
    for a, b, c in zip(plain, again, (y.detach(), x.grad, linear.weight.grad), strict=False):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
        torch.testing.assert_close(b, c, rtol=0, atol=0)


def test_an_exponent_that_moves_before_a_backward_pass_leaves_that_alone() -> None:
    """Two models with an optimizer each, as in adversarial training."""
    linear, (x, dy) = layer(recipe="adaptive", bias=False), operands(32, 64)
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.0)
    run(linear, x, dy)
    optimizer.step()
    expected = run(linear, x, dy)[2]
    y = linear(x)
    linear(x * 2**12)  # saturates, so the next step moves the exponent of the input
    before = linear._float8.input.scale.clone()
    optimizer.step()
    assert (linear._float8.input.scale != before).all()
    linear.zero_grad()
    y.backward(dy)
    torch.testing.assert_close(linear.weight.grad, expected, rtol=0, atol=0)


# ------------------------------------------------------------------ with the rest of training


def test_gradient_sums_in_fp32_get_unrounded_gradients_from_the_first_on() -> None:
    linear = layer()
    optimizer = mixprec.MixedPrecision(torch.optim.SGD(linear.parameters(), lr=1.0))
    accumulator = mixprec.GradientAccumulator(optimizer)
    x, dy = operands(32, 64)
    for last in (False, False, True):
        before = [0 if p.grad is None else p.grad.clone() for p in linear.parameters()]
        loss = (linear(x).float() * dy).sum()
        accumulator.backward(loss, torch.tensor(32), last=last)
        for param, sum_before in zip(linear.parameters(), before, strict=True):
            grad = param.grad - sum_before  # of this micro-batch, but for the rounding of FP32
            assert param.grad.dtype == torch.float32
            # BF16 would be equal, and after the addition of FP32 off by 2^-24 of the sum.
            rounding = 2.0**-22 * param.grad.abs().max()
            assert ((grad - grad.bfloat16().float()).abs() > rounding).any()
    accumulator.step()


def test_tied_linears_add_their_gradients() -> None:
    model: Any = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    model[1].weight = model[0].weight
    Precision("fp8", recipe="static").convert(model, min_dim=16)
    assert model[1].weight is model[0].weight
    x, dy = operands(32, 64, width=64)
    got = run(model, x, dy)[2]
    weights = [model[0].weight.detach().double().requires_grad_() for _ in range(2)]
    F.linear(F.linear(x.double(), weights[0]), weights[1]).backward(dy.double())
    exact = weights[0].grad + weights[1].grad  # pyright: ignore[reportOperatorIssue, reportOptionalOperand]
    assert snr(got, exact) > 20


def test_copies_and_pickles_work_alone() -> None:
    linear, (x, dy) = layer(recipe="adaptive"), operands(32, 64)
    run(linear, x, dy)
    torch.optim.SGD(linear.parameters(), lr=0.0).step()
    expected = run(linear, x, dy)
    stored = io.BytesIO()
    torch.save(linear, stored)
    stored.seek(0)
    copies = [
        copy.deepcopy(linear),
        pickle.loads(pickle.dumps(linear)),
        torch.load(stored, weights_only=False),
    ]
    for twin in copies:
        assert isinstance(twin, Float8Linear)
        for a, b in zip(run(twin, x, dy), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
        with torch.no_grad():
            twin.weight.zero_()
        assert linear(x).any()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler, of torch itself
@pytest.mark.parametrize(
    ("recipe", "backend", "bias"),
    [
        ("static", "aot_eager", True),
        ("adaptive", "inductor", False),
        ("tensorwise", "aot_eager", False),
        ("rowwise", "aot_eager", True),
        (Recipe(inline=True), "inductor", True),
    ],
    ids=["static", "adaptive", "tensorwise", "rowwise", "inline"],
)
def test_compiled_layers_have_no_graph_break_and_the_same_bits(
    recipe: str | Recipe, backend: str, bias: bool
) -> None:
    torch._dynamo.reset()
    linear, (x, dy) = layer(recipe=recipe, bias=bias), operands(2, 9, 64)
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.0)
    run(linear, x, dy)
    optimizer.step()
    eager = run(linear, x, dy)
    optimizer.step()
    compiled = torch.compile(linear, fullgraph=True, backend=backend)
    for _ in range(2):
        for a, b in zip(run(compiled, x, dy), eager, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
    counted = linear._float8.operands()
    if isinstance(recipe, str):
        assert counted["input"].counters[4] == 2 * x.numel()
        assert counted["grad_output"].counters[4] == 2 * dy.numel()
    with torch.no_grad():
        linear.weight.mul_(2)
        half = compiled(x)
        linear.weight.mul_(0.5)
    assert not torch.equal(half, compiled(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler, of torch itself
def test_a_compiled_model_recompiles_for_no_step() -> None:
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    Precision("fp8").convert(model, min_dim=16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, dy = operands(32, 64, width=64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for step in range(4):
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            compiled(x * 4**step).backward(dy)
        optimizer.step()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler, of torch itself
def test_compiled_code_writes_what_several_kernels_read_once() -> None:
    torch._dynamo.reset()
    scale, counters = torch.ones(2), torch.zeros(8, dtype=torch.int64)

    def casts(x: Tensor) -> list[Tensor]:
        y = written(x.sin())
        options = "e4m3", "static", False, scale, counters, True, True
        return [operand._cast(y, *options)[0] for _ in range(2)]

    x = torch.randn(16, 16)
    rows, codes = run_and_get_code(torch.compile(casts, fullgraph=True), x)
    assert "".join(codes).count("= empty_strided_cpu((16, 16)") == 1
    for got in rows:
        assert torch.equal(got.float(), casts(x)[0].float())


def test_another_compiler_copies_what_kernels_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch._inductor.lowering", None)
    operators._tell_compiler.__wrapped__()
    x = torch.randn(16, 16)
    copy = torch.compile(written, fullgraph=True, backend="aot_eager")(x)
    assert copy is not x and torch.equal(copy, x)


def test_a_cast_of_another_thread_in_between_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, (x, _) = layer(), operands(32, 64)
    real = linear_module._is_of

    def interrupted(*args: Any) -> bool:
        found = real(*args)
        monkeypatch.undo()
        linear(4 * x)  # as by another thread, right after the look
        return found

    with torch.no_grad():
        expected = linear(x)
        monkeypatch.setattr(linear_module, "_is_of", interrupted)
        assert torch.equal(linear(x), expected)


def test_a_layer_that_was_unpickled_is_told_of_steps() -> None:
    linear = pickle.loads(pickle.dumps(layer(recipe="adaptive")))
    x, dy = operands(32, 64)
    linear(x).backward(dy)
    seen = linear._float8.input.counters.clone()
    torch.optim.SGD(linear.parameters(), lr=0.0).step()
    assert seen.any()
    assert torch.equal(linear._float8.input.last, seen) and not linear._float8.input.counters.any()
