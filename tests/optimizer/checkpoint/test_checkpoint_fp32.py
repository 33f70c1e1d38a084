"""Masters and FP32 weights on their way between 16-bit and FP32 models."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

import mixprec

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def network(dtype: torch.dtype, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)).to(dtype)


def made(
    dtype: torch.dtype, seed: int = 0, *, names: bool = True, **options: Any
) -> tuple[nn.Sequential, mixprec.MixedPrecision]:
    model = network(dtype, seed)
    params: Any = model.named_parameters() if names else model.parameters()
    return model, mixprec.MixedPrecision(AdamW(params, lr=1e-3), **options)


def train(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator).bfloat16().to(p.dtype)
        optimizer.step()


def masters_of(optimizer: mixprec.MixedPrecision) -> list[torch.Tensor]:
    return [master.clone() for _, master in optimizer.masters()]


def assert_same(left: Any, right: Any) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=0)


# ---------------------------------------- masters that become FP32 parameters


@pytest.mark.parametrize("order", ["model first", "optimizer first", "model before and after"])
@pytest.mark.parametrize(
    ("dtype", "masters"), [(BF16, "split"), (BF16, "full"), (FP16, "full")], ids=str
)
def test_fp32_model_with_16_bit_weights_goes_on_from_the_masters(
    dtype: torch.dtype, masters: Any, order: str
) -> None:
    low, optimizer = made(dtype, masters=masters)
    train(low, optimizer, range(3))
    weights, state = copy.deepcopy((low.state_dict(), optimizer.state_dict()))
    wide, resumed = made(FP32, seed=1)
    if order != "optimizer first":
        wide.load_state_dict(weights)
    resumed.load_state_dict(state)
    if order == "model first":
        assert_same(masters_of(resumed), masters_of(optimizer))
    else:
        wide.load_state_dict(weights)
    train(low, optimizer, range(3, 5))
    train(wide, resumed, range(3, 5))
    assert_same(masters_of(resumed), masters_of(optimizer))
    assert_same([p.detach() for p in wide.parameters()], masters_of(optimizer))


def test_masters_that_wait_for_their_weights_are_saved_again() -> None:
    low, optimizer = made(BF16)
    train(low, optimizer, range(3))
    _, waiting = made(FP32, seed=1)
    waiting.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    wide, resumed = made(FP32)
    wide.load_state_dict(low.state_dict())
    resumed.load_state_dict(copy.deepcopy(waiting.state_dict()))
    assert_same(masters_of(resumed), masters_of(optimizer))


def test_masters_that_wait_for_their_weights_are_exported() -> None:
    low, optimizer = made(BF16)
    train(low, optimizer, range(3))
    wide, resumed = made(FP32, seed=1)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    wide.load_state_dict(low.state_dict())
    assert_same(resumed.fp32_state_dict(wide), optimizer.fp32_state_dict(low))


def test_element_that_was_edited_keeps_its_value_beside_others_that_become_masters() -> None:
    weight = nn.Parameter(torch.ones(2, dtype=BF16))
    optimizer = mixprec.MixedPrecision(SGD([("w", weight)], lr=1e-3))
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    wide = nn.Parameter(torch.tensor([weight[0].item(), 3.0]))
    resumed = mixprec.MixedPrecision(SGD([("w", wide)], lr=0.0))
    saved = optimizer.state_dict()
    saved["param_groups"][0]["lr"] = 0.0
    resumed.load_state_dict(saved)
    assert wide[0].item() == weight[0].item()  # its weights may yet be loaded
    wide.grad = torch.ones_like(wide)
    with pytest.warns(RuntimeWarning, match="w is float32 here and has a master"):
        resumed.step()
    assert wide.tolist() == [masters_of(optimizer)[0][0].item(), 3.0]


def test_fp32_weights_that_are_the_masters_already_are_left_alone_without_a_word() -> None:
    low, optimizer = made(BF16)
    train(low, optimizer, range(3))
    wide, resumed = made(FP32, seed=1)
    wide.load_state_dict(optimizer.fp32_state_dict(low))
    resumed.load_state_dict(optimizer.state_dict())
    train(wide, resumed, range(3, 4))
    train(low, optimizer, range(3, 4))
    assert_same(masters_of(resumed), masters_of(optimizer))


def test_masters_of_other_weights_are_dropped_with_a_warning() -> None:
    low, optimizer = made(BF16)
    train(low, optimizer, range(3))
    wide, resumed = made(FP32, seed=1)
    before = copy.deepcopy(wide.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    assert_same(wide.state_dict(), before)
    resumed.param_groups[0].update(lr=0.0)
    with pytest.warns(RuntimeWarning, match=r"0\.weight and 3 more are float32 here") as given:
        train(wide, resumed, range(3, 4))
    assert "load_fp32_state_dict(model, ...)" in str(given[0].message)
    assert_same(wide.state_dict(), before)
    train(wide, resumed, range(4, 5))  # said once


def test_fp64_parameters_take_masters_over_as_well() -> None:
    weight = nn.Parameter(torch.ones(2, dtype=BF16))
    optimizer = mixprec.MixedPrecision(SGD([weight], lr=1e-3))
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    wide = nn.Parameter(weight.detach().double())
    mixprec.MixedPrecision(SGD([wide], lr=1e-3)).load_state_dict(optimizer.state_dict())
    assert wide.tolist() == masters_of(optimizer)[0].double().tolist()


# ---------------------------------------- weights that are not their masters' roundings


def test_parameters_in_another_order_without_names_are_said_to_be_that() -> None:
    def build(backwards: bool) -> tuple[list[nn.Parameter], mixprec.MixedPrecision]:
        generator = torch.Generator().manual_seed(0)
        weights = [nn.Parameter(torch.randn(3, generator=generator).bfloat16()) for _ in range(2)]
        params = weights[::-1] if backwards else weights
        return weights, mixprec.MixedPrecision(SGD(params, lr=1e-3))

    weights, optimizer = build(False)
    for p in weights:
        p.grad = torch.ones_like(p)
    optimizer.step()
    others, resumed = build(True)
    for theirs, ours in zip(others, weights, strict=True):
        theirs.detach().copy_(ours)
        theirs.grad = torch.ones_like(theirs)
    resumed.load_state_dict(optimizer.state_dict())
    with pytest.warns(RuntimeWarning, match="and 1 more are not the rounding of the masters") as w:
        resumed.step()
    assert "parameters in another order" in str(w[0].message)
    assert "pass named_parameters()" in str(w[0].message)


# ---------------------------------------- FP32 weights for a 16-bit model


def tied() -> tuple[nn.ModuleDict, mixprec.MixedPrecision]:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    model.bfloat16()
    return model, mixprec.MixedPrecision(SGD(model.named_parameters(), lr=0.1))


@pytest.mark.parametrize("kept", ["embed.weight", "head.weight"])
def test_fp32_weights_may_hold_a_tied_tensor_under_one_of_its_names(kept: str) -> None:
    model, optimizer = tied()
    value = torch.randn(5, 4)
    optimizer.load_fp32_state_dict(model, {kept: value})
    assert_same(masters_of(optimizer), [value])
    assert model["head"].weight is model["embed"].weight


def test_tied_names_with_different_values_are_refused() -> None:
    model, optimizer = tied()
    before = masters_of(optimizer)
    given = {"embed.weight": torch.zeros(5, 4), "head.weight": torch.ones(5, 4)}
    with pytest.raises(ValueError, match=r"'embed\.weight' and 'head.weight' are one tensor"):
        optimizer.load_fp32_state_dict(model, given)
    assert_same(masters_of(optimizer), before)
    optimizer.load_fp32_state_dict(model, dict.fromkeys(given, torch.ones(5, 4)))


@pytest.mark.parametrize(
    ("value", "text"),
    [(3.0, "is 3.0 in the state dict"), (torch.empty(6, 4, device="meta"), r"\(meta\)")],
)
def test_fp32_weight_that_is_no_tensor_with_data_is_refused(value: Any, text: str) -> None:
    model, optimizer = made(BF16)
    given = {**network(FP32).state_dict(), "0.weight": value}
    before = masters_of(optimizer)
    with pytest.raises(ValueError, match=f"'0.weight' is .*{text}|{text}"):
        optimizer.load_fp32_state_dict(model, given)
    assert_same(masters_of(optimizer), before)


# ---------------------------------------- parameters that were resized


@pytest.mark.parametrize("masters", ["full", "split"])
@pytest.mark.parametrize("call", ["state_dict", "fp32_state_dict", "load_fp32_state_dict"])
def test_parameter_that_was_resized_without_its_master_is_named(masters: Any, call: str) -> None:
    model, optimizer = made(BF16, masters=masters)
    train(model, optimizer, range(2))
    weights = network(FP32).state_dict()
    layer: Any = model[1]
    layer.weight.data = layer.weight.data[:2].clone()
    weights["1.weight"] = weights["1.weight"][:2]
    arguments = {"state_dict": (), "fp32_state_dict": (model,)}.get(call, (model, weights))
    with pytest.raises(
        ValueError, match=r"1\.weight is \[2, 6\] and its master \[3, 6\]"
    ) as raised:
        getattr(optimizer, call)(*arguments)
    assert "optimizer.state[param]['master']" in str(raised.value)


@pytest.mark.parametrize("masters", ["full", "split"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    "use",
    [
        lambda optimizer: optimizer.step(),
        lambda optimizer: list(optimizer.masters()),
        lambda optimizer: optimizer.masters_in_model().__enter__(),
        lambda optimizer: optimizer.adopt_params(),
    ],
    ids=["step", "masters", "masters_in_model", "adopt_params"],
)
def test_parameter_that_was_resized_is_named_by_whoever_needs_its_master(
    masters: Any, fused: bool, use: Any
) -> None:
    weight = nn.Parameter(torch.ones(4, 6, dtype=BF16))
    optimizer = mixprec.MixedPrecision(
        SGD([("table", weight)], lr=0.1), masters=masters, fused=fused
    )
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    weight.grad = None
    weight.data = weight.data[:2].clone()
    weight.grad = torch.ones_like(weight)
    with pytest.raises(
        ValueError, match=r"table is \[2, 6\] and its master \[4, 6\]: it was resized"
    ):
        use(optimizer)


# ---------------------------------------- rules that hold optimizers, and optimizers that hold ours


class Both(Optimizer):
    """Two optimizers inside one class with a state dict of its own, as public code has them."""

    def __init__(self, left: Optimizer, right: Optimizer) -> None:
        self.left, self.right = left, right
        super().__init__(left.param_groups + right.param_groups, {})
        self.param_groups = left.param_groups + right.param_groups

    def step(self, closure: Any = None) -> Any:
        self.left.step()
        self.right.step()

    def state_dict(self) -> Any:
        return {"left": self.left.state_dict(), "right": self.right.state_dict()}

    def load_state_dict(self, state_dict: Any) -> None:
        self.left.load_state_dict(state_dict["left"])
        self.right.load_state_dict(state_dict["right"])


def both() -> tuple[nn.ParameterList, mixprec.MixedPrecision]:
    model = nn.ParameterList([torch.ones(2, 2), torch.ones(2)])
    inner = Both(SGD([model[0]], lr=0.1, momentum=0.9), AdamW([model[1]], lr=0.1))
    return model, mixprec.MixedPrecision(inner)


def test_states_of_optimizers_inside_a_rule_come_back_as_copies() -> None:
    """Torch loads the very tensors that it is given: two runs would share their momentum."""
    model, optimizer = both()
    train(model, optimizer, range(3))
    other, resumed = both()
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    resumed.load_state_dict(optimizer.state_dict())
    train(model, optimizer, range(3, 5))
    train(other, resumed, range(3, 5))
    assert_same(list(other.parameters()), list(model.parameters()))


def zero_class() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own import scripts some functions
        from torch.distributed.optim import ZeroRedundancyOptimizer
    return ZeroRedundancyOptimizer


def zero_around(params: list[nn.Parameter]) -> Any:
    return zero_class()(
        params,
        optimizer_class=lambda shard, **options: mixprec.MixedPrecision(AdamW(shard, **options)),
        lr=0.1,
    )


def _zero_steps(rank: int) -> None:
    def weights() -> list[nn.Parameter]:
        generator = torch.Generator().manual_seed(0)
        return [nn.Parameter(torch.randn(3, 4, generator=generator).bfloat16()) for _ in range(3)]

    with pytest.raises(TypeError, match="The other order is right"):
        mixprec.MixedPrecision(zero_class()(weights(), optimizer_class=AdamW, lr=0.1))
    left, right = weights(), weights()
    zero, plain = zero_around(left), mixprec.MixedPrecision(AdamW(right, lr=0.1))
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        for p, q in zip(left, right, strict=True):
            p.grad = torch.randn(p.shape, generator=generator).bfloat16()
            q.grad = p.grad.clone()
        zero.step()
        plain.step()
    assert all(torch.equal(p, q) for p, q in zip(left, right, strict=True))


def test_zero_redundancy_optimizer_goes_around_and_not_inside() -> None:
    on_ranks(_zero_steps, ranks=2)


def test_a_saved_file_needs_no_pickles_of_ours() -> None:
    model, optimizer = made(FP16, loss_scaler=mixprec.DynamicLossScaler())
    assert optimizer.loss_scaler is not None
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    optimizer.load_state_dict(torch.load(file, weights_only=True))
