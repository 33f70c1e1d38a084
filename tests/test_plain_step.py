"""The guarded step of optimizers over FP32 and FP64 parameters."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, AdamW, Optimizer

from mixprec.plain_optimizer import check_plain, step_plain

BAD = [float("inf"), -float("inf"), float("nan")]
RULES: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "sgd": lambda params: SGD(params, lr=0.5, momentum=0.9),
    "adamw": lambda params: AdamW(params, lr=0.5),
    "fused sgd": lambda params: SGD(params, lr=0.5, momentum=0.9, fused=True),
    "fused adamw": lambda params: AdamW(params, lr=0.5, fused=True),
}
each_rule = pytest.mark.parametrize("rule", list(RULES))


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.tensor([1.0, -2.0], dtype=dtype)), nn.Parameter(torch.ones(3, 2))]


def set_grads(params: list[nn.Parameter], value: float) -> None:
    for param in params:
        param.grad = torch.full_like(param, value)


def everything(optimizer: Optimizer) -> list[Tensor]:
    """Parameters and all tensors of their state, cloned."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    states = [value for p in params for value in optimizer.state[p].values()]
    return [tensor.detach().clone() for tensor in [*params, *states]]


@each_rule
def test_a_finite_step_is_the_bare_step_on_multiplied_gradients(rule: str) -> None:
    ours, bare = parameters(), parameters()
    guarded, plain = RULES[rule](ours), RULES[rule](bare)
    for value in (8.0, -4.0, 2.0):
        set_grads(ours, value)
        set_grads(bare, value / 4)
        step_plain(guarded, torch.tensor(0.25, dtype=torch.float64))
        plain.step()
        assert all(map(torch.equal, everything(guarded), everything(plain)))


@each_rule
@pytest.mark.parametrize("bad", [*BAD, 0.0], ids=str)
@pytest.mark.parametrize("first", [True, False], ids=["first step", "later step"])
def test_a_skipped_step_changes_no_parameter_and_no_state(
    rule: str, bad: float, first: bool
) -> None:
    """`bad` stands in a gradient, or, if it is 0, for the factor."""
    params = parameters()
    optimizer = RULES[rule](params)
    if not first:
        set_grads(params, 1.0)
        step_plain(optimizer, torch.tensor(1.0))
    before = everything(optimizer)
    set_grads(params, 1.0)
    if bad:
        params[1].grad = torch.tensor([[1.0, 1.0], [bad, 1.0], [1.0, 1.0]])
    outcome = step_plain(optimizer, torch.tensor(1.0 if bad else 0.0))
    assert not bool(outcome.grads_finite & outcome.counted)
    assert bool(outcome.counted) == bool(bad)
    assert all(map(torch.equal, everything(optimizer), before))


def test_fused_rules_decide_on_the_device_from_their_second_step_on() -> None:
    params = parameters()
    optimizer = RULES["fused adamw"](params)
    stepped: list[bool | None] = []
    for _ in range(3):
        set_grads(params, 1.0)
        stepped.append(step_plain(optimizer, torch.tensor(1.0)).stepped)
    assert stepped == [True, None, None]
    assert not hasattr(optimizer, "found_inf")


def test_groups_that_are_not_all_fused_are_stepped_by_the_host() -> None:
    params = parameters()
    groups = [{"params": params[:1]}, {"params": params[1:], "fused": False}]
    optimizer = AdamW(groups, lr=0.5, fused=True)
    for _ in range(2):
        set_grads(params, 1.0)
        assert step_plain(optimizer, torch.tensor(1.0)).stepped is True


def test_an_optimizer_without_gradients_is_not_stepped_and_tells_nothing() -> None:
    outcome = step_plain(RULES["adamw"](parameters()), torch.tensor(1.0))
    assert outcome.stepped is False
    assert not outcome.counted and outcome.named_grads == []


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), -1.0, 1e39, 1e-46])
@each_rule
def test_a_factor_that_fp32_cannot_hold_skips_and_leaves_gradients_alone(
    factor: float, rule: str
) -> None:
    params = parameters()
    optimizer = RULES[rule](params)
    set_grads(params, 1.0)
    step_plain(optimizer, torch.tensor(1.0))
    before = everything(optimizer)
    outcome = step_plain(optimizer, torch.tensor(factor, dtype=torch.float64))
    assert outcome.counted and not outcome.grads_finite and outcome.judged_factor.isnan()
    assert all(map(torch.equal, everything(optimizer), before))
    assert all(bool((grad == 1).all()) for _, grad in outcome.named_grads)


@pytest.mark.parametrize("factor", [1e39, 1e-46])
def test_fp64_gradients_take_the_factors_of_fp64(factor: float) -> None:
    param = nn.Parameter(torch.ones(2, dtype=torch.float64))
    param.grad = torch.ones_like(param)
    outcome = step_plain(SGD([param], lr=1.0), torch.tensor(factor, dtype=torch.float64))
    assert outcome.stepped and param.grad.tolist() == [factor, factor]


@pytest.mark.parametrize("coalesced", [False, True])
def test_sparse_gradients_are_multiplied_too(coalesced: bool) -> None:
    table = nn.Embedding(4, 2, sparse=True)
    nn.init.zeros_(table.weight)
    table(torch.tensor([1, 1, 3])).sum().backward()
    assert table.weight.grad is not None
    if coalesced:
        table.weight.grad = table.weight.grad.coalesce()
    outcome = step_plain(SGD(table.parameters(), lr=1.0), torch.tensor(0.25))
    assert outcome.stepped is True
    assert table.weight[:, 0].tolist() == [0.0, -0.5, 0.0, -0.25]


def test_fp64_gradients_are_multiplied_in_fp64() -> None:
    params = parameters(torch.float64)
    set_grads(params, 1.0)
    outcome = step_plain(RULES["sgd"](params), torch.tensor(1 / 3, dtype=torch.float64))
    assert outcome.named_grads[0][1].tolist() == [1 / 3, 1 / 3]


def test_gradients_are_named_by_the_optimizer_or_by_their_place() -> None:
    params = parameters()
    set_grads(params, 1.0)
    by_place = step_plain(RULES["sgd"](params), torch.tensor(1.0)).named_grads
    named = SGD([("head", params[0]), ("body", params[1])], lr=0.5)
    by_name = step_plain(named, torch.tensor(1.0)).named_grads
    places = ["param_groups[0]['params'][0] (2)", "param_groups[0]['params'][1] (3x2)"]
    assert [name for name, _ in by_place] == places
    assert [name for name, _ in by_name] == ["head", "body"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_parameters_are_refused_by_name(dtype: torch.dtype) -> None:
    optimizer = SGD([("head.weight", nn.Parameter(torch.ones(2, dtype=dtype)))], lr=0.5)
    with pytest.raises(TypeError, match=rf"head\.weight is {dtype}.*mixprec\.MixedPrecision\(SGD"):
        check_plain(optimizer)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn])
def test_what_no_master_helps_is_not_told_to_be_wrapped(dtype: torch.dtype) -> None:
    optimizer = SGD([("phase", torch.zeros(2).to(dtype).requires_grad_())], lr=0.5)
    with pytest.raises(TypeError, match=rf"phase is {dtype}.*Leave it out of this optimizer"):
        check_plain(optimizer)


def test_parameters_without_a_shape_yet_have_a_name() -> None:
    layer = nn.LazyLinear(2, dtype=torch.bfloat16)
    optimizer = SGD(layer.parameters(), lr=0.5)
    with pytest.raises(TypeError, match=r"\[0\] \(not initialized yet\) is torch\.bfloat16.*Wrap"):
        check_plain(optimizer)


def test_rules_that_evaluate_the_loss_themselves_are_refused() -> None:
    with pytest.raises(TypeError, match=r"LBFGS evaluates the loss several times.*step\(closure\)"):
        check_plain(LBFGS(parameters()))


def test_sharded_gradients_are_refused_by_name() -> None:
    params = parameters()
    set_grads(params, 1.0)
    params[1].grad._local_tensor = torch.ones(3, 2)  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
    with pytest.raises(TypeError, match=r"\[1\] \(3x2\) is sharded.*whose ranks agree"):
        step_plain(RULES["sgd"](params), torch.tensor(1.0))
