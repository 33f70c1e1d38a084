"""Steps by programs, in plain torch: the same path as a kernel's, but for the launch."""

from __future__ import annotations

import copy
import math
import pickle
import re
from typing import Any

import pytest
import torch
from frozen import difference, frozen
from parts import judge_on_device, params_of
from rules import Recipe, torch_recipes
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RAdam

import mixprec
from mixprec import formats
from mixprec.optimizer.fused.program.signs import non_negative_states

SHAPES = [(12, 8), (50,), (), (3, 4, 5), (0, 3)]


def params(dtype: torch.dtype = torch.bfloat16, shapes: Any = SHAPES) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter((torch.randn(s, generator=generator) * 0.1).to(dtype)) for s in shapes]


def give_grads(weights: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in weights:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def run(optimizer: mixprec.MixedPrecision, steps: int, first: int = 0) -> list[Tensor]:
    for step in range(first, first + steps):
        give_grads(list(params_of(optimizer)), step)  # pyright: ignore[reportArgumentType]
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * 0.9
    return [master.clone() for _, master in optimizer.masters()]


# ---------------------------------------- beside the eager tier

RECIPES = [
    recipe
    for recipe in torch_recipes()
    if recipe.name.split(":")[0] not in ("LBFGS", "Muon", "Adafactor", "SparseAdam")
    and not recipe.unable
    and "differentiable" not in recipe.name
]
LOOPS = [recipe for recipe in RECIPES if "for-loop" in recipe.name]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_every_implementation_of_every_rule_is_stepped_as_by_itself(
    recipe: Recipe, dtype: torch.dtype
) -> None:
    compare(recipe, dtype)


@pytest.mark.parametrize("recipe", LOOPS[::3], ids=lambda recipe: recipe.name)
def test_masters_and_states_are_those_of_the_rule(recipe: Recipe) -> None:
    compare(recipe, torch.bfloat16)


def compare(recipe: Recipe, dtype: torch.dtype) -> None:
    """Eight steps by programs beside eight by the rule itself."""

    def optimizer(fused: bool) -> mixprec.MixedPrecision:
        return mixprec.MixedPrecision(recipe.build([{"params": params(dtype)}]), fused=fused)

    ours, plain = optimizer(True), optimizer(False)
    assert "fused (tier 1" in ours.explain()
    for step in range(8):
        before = [master.clone() for _, master in plain.masters()]
        masters = run(ours, 1, step), run(plain, 1, step)
        for left, right, old in zip(*masters, before, strict=True):
            if not torch.equal(left, right):
                # A foreach or fused rule may order its operations otherwise.
                allowed = 2e-6 * (right - old).abs().max() + 2.0**-23 * right.abs().max()
                assert (left - right).abs().max() <= (step + 1) * allowed
                assert "for-loop" not in recipe.name
        for p, master in ours.masters():
            if p.dtype == torch.bfloat16 and p.numel():
                assert torch.equal(p.detach(), formats.split(master)[0])
    found, right = ours.state_dict(), plain.state_dict()
    assert found["param_groups"] == right["param_groups"]
    for key, entry in right["state"].items():
        assert found["state"][key].keys() == entry.keys()
        for name, value in entry.items():
            torch.testing.assert_close(found["state"][key][name], value, rtol=1e-5, atol=1e-7)


def test_sgd_and_its_momentum_keep_every_bit() -> None:
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}
    ours = mixprec.MixedPrecision(SGD(params(), **options), fused=True)
    plain = mixprec.MixedPrecision(SGD(params(), **options), fused=False)
    for left, right in zip(run(ours, 12), run(plain, 12), strict=True):
        assert torch.equal(left, right)
    assert difference(frozen(ours.state_dict()), frozen(plain.state_dict())) == ""


def test_parameters_that_programs_leave_out_are_stepped_by_the_rule_in_the_same_step() -> None:
    weights = [*params(), nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(8, 4).bfloat16())]
    weights[-1].data = weights[-1].data[:, ::2]  # gaps in memory
    optimizer = mixprec.MixedPrecision(AdamW(weights, lr=0.1), state_formats={"exp_avg": "bf16"})
    run(optimizer, 3)
    steps = {float(optimizer.state[p]["step"]) for p in weights}
    kinds = [optimizer.state[p]["exp_avg"].dtype for p in weights]
    assert steps == {3.0}
    assert [kind == torch.bfloat16 for kind in kinds] == [
        True,
        True,
        False,
        True,
        True,
        False,
        False,
    ]


def test_a_count_kept_in_the_group_moves_once_when_a_group_is_shared_out() -> None:
    class Counts(Optimizer):
        def __init__(self, given: Any) -> None:
            super().__init__(given, {"lr": 0.1, "k": 0})

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                group["k"] += 1
                for p in group["params"]:
                    if p.grad is not None:
                        p.sub_(p.grad, alpha=group["lr"] / group["k"])

    optimizer = mixprec.MixedPrecision(Counts(params()), fused=True)  # one parameter is 0-d
    plain = mixprec.MixedPrecision(Counts(params()), fused=False)
    for left, right in zip(run(optimizer, 4), run(plain, 4), strict=True):
        assert torch.equal(left, right)
    assert optimizer.param_groups[0]["k"] == 4


def test_a_rule_that_makes_its_state_at_construction_is_fused_from_there() -> None:
    class Sums(Optimizer):
        def __init__(self, given: Any) -> None:
            super().__init__(given, {"lr": 0.1})
            for p in self.param_groups[0]["params"]:
                self.state[p] = {"step": 0, "sum": torch.full_like(p, 0.1).float()}

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            for p in self.param_groups[0]["params"]:
                if p.grad is not None:
                    entry = self.state[p]
                    entry["step"] += 1
                    entry["sum"].addcmul_(p.grad, p.grad)
                    p.addcdiv_(p.grad, entry["sum"].sqrt(), value=-0.1 / entry["step"])

    made = [mixprec.MixedPrecision(Sums(params()), fused=f) for f in (True, False)]
    for left, right in zip(*(run(optimizer, 4) for optimizer in made), strict=True):
        assert torch.equal(left, right)
    assert "fused (tier 1" in made[0].explain()
    assert difference(*(frozen(optimizer.state_dict()) for optimizer in made)) == ""


def test_a_gradient_in_fp32_or_of_other_strides_is_taken_as_it_is() -> None:
    weight = nn.Parameter(torch.ones(6, 4, dtype=torch.bfloat16))
    weight.grad_dtype = torch.float32
    grad = torch.randn(4, 6).T
    weight.grad = grad
    optimizer = mixprec.MixedPrecision(SGD([weight], lr=0.5), fused=True)
    optimizer.step(grad_factor=0.5)
    assert weight.grad is grad
    assert torch.equal(dict(optimizer.masters())[weight], 1 - 0.25 * grad)


def test_a_channels_last_weight_keeps_its_strides() -> None:
    data = torch.randn(4, 3, 2, 2).bfloat16().to(memory_format=torch.channels_last)
    weights = [nn.Parameter(data.clone(memory_format=torch.preserve_format)) for _ in range(2)]
    made = [
        mixprec.MixedPrecision(Adam([weights[0]], lr=0.1), fused=True),
        mixprec.MixedPrecision(Adam([weights[1]], lr=0.1), fused=False),
    ]
    masters = [run(optimizer, 3)[0] for optimizer in made]
    assert torch.equal(masters[0], masters[1])
    assert made[0].state[weights[0]]["exp_avg"].stride() == data.stride()


def test_a_parameter_that_rests_keeps_its_age() -> None:
    made = [mixprec.MixedPrecision(AdamW(params(), lr=0.1), fused=f) for f in (True, False)]
    for optimizer in made:
        weights: Any = list(params_of(optimizer))
        for step in range(6):
            give_grads(weights, step)
            weights[step % 4].grad = None
            optimizer.step()
    for left, right in zip(*(dict(o.masters()).values() for o in made), strict=True):
        assert torch.equal(left, right)
    assert difference(frozen(made[0].state_dict()), frozen(made[1].state_dict())) == ""


# ---------------------------------------- state


@pytest.mark.parametrize("stored", [None, "8bit", {"exp_avg": "bf16", "exp_avg_sq": "int8"}])
def test_save_load_and_continue_is_bit_equal(stored: Any) -> None:
    def fresh() -> mixprec.MixedPrecision:
        return mixprec.MixedPrecision(AdamW(params(), lr=0.1), fused=True, state_formats=stored)

    whole, first = fresh(), fresh()
    expected = run(whole, 7)
    run(first, 3)
    for other in (copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        for left, right in zip(run(other, 4, 3), expected, strict=True):
            assert torch.equal(left, right)
    second = fresh()
    for p, q in zip(params_of(second), params_of(first), strict=True):
        p.data.copy_(q.data)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for group, other in zip(second.param_groups, first.param_groups, strict=True):
        group["lr"] = other["lr"]
    for left, right in zip(run(second, 4, 3), expected, strict=True):
        assert torch.equal(left, right)


def test_a_checkpoint_holds_fp32_states_and_numbers_of_their_own() -> None:
    optimizer = mixprec.MixedPrecision(AdamW(params()), state_formats="8bit")
    run(optimizer, 2)
    first, second = list(params_of(optimizer))[:2]
    assert optimizer.state[first]["exp_avg"].dtype == torch.int8
    assert optimizer.state[first]["exp_avg_sq"].dtype == torch.uint8
    assert optimizer.state[first]["step"] is optimizer.state[second]["step"]
    state = optimizer.state_dict()["state"]
    assert set(state[0]) == {"step", "exp_avg", "exp_avg_sq", "master"}
    assert state[0]["exp_avg_sq"].dtype == torch.float32
    assert state[0]["step"] is not state[1]["step"]
    bare = AdamW([nn.Parameter(p.detach().float()) for p in params_of(optimizer)])
    bare.load_state_dict(optimizer.state_dict())
    for p in bare.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    bare.step()
    assert {float(entry["step"]) for entry in bare.state.values()} == {3.0}


def test_raw_codes_load_too() -> None:
    first = mixprec.MixedPrecision(AdamW(params()), state_formats="8bit")
    run(first, 2)
    second = mixprec.MixedPrecision(AdamW(params()), state_formats="8bit")
    second.load_state_dict(copy.deepcopy(first.inner.state_dict()))
    for p, q in zip(params_of(second), params_of(first), strict=True):
        p.data.copy_(q.data)
    for left, right in zip(run(second, 2, 2), run(first, 2, 2), strict=True):
        assert torch.equal(left, right)


@pytest.mark.filterwarnings("ignore:every gradient of this step is exactly 0")
@pytest.mark.parametrize("stored", [None, "8bit"])
def test_a_state_that_was_replaced_by_hand_is_used(stored: Any) -> None:
    optimizer = mixprec.MixedPrecision(SGD(params(), lr=0.1, momentum=0.5), fused=True,
                                       state_formats=stored)  # fmt: skip
    run(optimizer, 2)
    for p in params_of(optimizer):
        entry = optimizer.state[p]
        entry["momentum_buffer"] = torch.zeros_like(entry["momentum_buffer"])
    before = [master.clone() for _, master in optimizer.masters()]
    weights: Any = list(params_of(optimizer))
    for p in weights:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for (_, master), old in zip(optimizer.masters(), before, strict=True):
        assert torch.equal(master, old)


def test_the_rule_itself_takes_over_and_hands_back() -> None:
    optimizer = mixprec.MixedPrecision(AdamW(params(), lr=0.1), state_formats="bf16")
    run(optimizer, 2)
    optimizer._fused.held.release()
    entries = [optimizer.state[p] for p in params_of(optimizer)]
    assert all(entry["exp_avg"].dtype == torch.float32 for entry in entries)
    assert len({id(entry["step"]) for entry in entries}) == len(entries)
    run(optimizer, 1, 2)
    assert optimizer.state[next(params_of(optimizer))]["exp_avg"].dtype == torch.bfloat16


def test_a_warm_up_branch_is_another_program_and_an_option_changed_by_hand_too() -> None:
    made = [mixprec.MixedPrecision(RAdam(params(), lr=0.1), fused=f) for f in (True, False)]
    for optimizer in made:
        run(optimizer, 8)
        optimizer.param_groups[0]["weight_decay"] = 0.1
        run(optimizer, 2, 8)
    for left, right in zip(*(dict(o.masters()).values() for o in made), strict=True):
        assert torch.equal(left, right)


def test_a_weight_edited_by_hand_is_followed() -> None:
    weight = nn.Parameter(torch.ones(4, dtype=torch.float16))
    optimizer = mixprec.MixedPrecision(SGD([weight], lr=0.25), fused=True)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    with torch.no_grad():
        weight.fill_(8.0)
    with pytest.warns(RuntimeWarning, match="written outside of step"):
        optimizer.step()
    assert weight.tolist() == [7.75] * 4
    assert dict(optimizer.masters())[weight].tolist() == [7.75] * 4


def test_a_step_tells_autograd_that_weights_have_changed() -> None:
    weight = nn.Parameter(torch.ones(4))
    optimizer = mixprec.MixedPrecision(SGD([weight], lr=0.25), fused=True)
    loss = weight.square().sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---------------------------------------- a step that the device skips


NO_SCALARS = [(12, 8), (50,), (0, 3)]


@pytest.mark.parametrize("rule", [AdamW, RAdam, lambda ps: SGD(ps, lr=0.1, momentum=0.9)])
def test_counting_is_taken_back_before_the_next_step_if_the_device_skipped(
    rule: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer = mixprec.MixedPrecision(rule(params(shapes=NO_SCALARS)), fused=True)
    plain = mixprec.MixedPrecision(rule(params(shapes=NO_SCALARS)), fused=False)
    judge_on_device(optimizer, monkeypatch)
    with pytest.warns(RuntimeWarning, match="the step was skipped and nothing changed"):
        for step, overflow in enumerate([True, False, False, True, True, False, False]):
            weights: Any = list(params_of(optimizer))
            give_grads(weights, step)
            if overflow:
                weights[0].grad[0, 0] = math.inf
            before = frozen([optimizer.state_dict(), [p.detach().clone() for p in weights]])
            optimizer.step()
            if overflow:
                after = frozen([optimizer.state_dict(), [p.detach() for p in weights]])
                assert difference(before, after) == "", step
            else:
                give_grads(list(params_of(plain)), step)  # pyright: ignore[reportArgumentType]
                plain.step()
            assert optimizer.grads_finite != overflow
    for left, right in zip(optimizer.masters(), plain.masters(), strict=True):
        assert torch.equal(left[1], right[1])
    assert difference(frozen(optimizer.state_dict()), frozen(plain.state_dict())) == ""
    assert optimizer.metrics()["skipped_steps"] == 3


def test_fifty_steps_that_the_device_skips_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = mixprec.MixedPrecision(SGD(params(shapes=NO_SCALARS), lr=0.1), fused=True)
    judge_on_device(optimizer, monkeypatch)
    weights: Any = list(params_of(optimizer))

    def overflowing() -> None:
        for _ in range(51):
            give_grads(weights, 0)
            weights[0].grad[0, 0] = math.nan
            optimizer.step()

    with pytest.warns(RuntimeWarning), pytest.raises(FloatingPointError, match="50 steps in a row"):
        overflowing()


def test_nobody_looks_at_gradients_that_are_to_be_ignored() -> None:
    optimizer = mixprec.MixedPrecision(AdamW(params(), lr=0.1), on_nonfinite="ignore", fused=True)
    weights: Any = list(params_of(optimizer))
    give_grads(weights, 0)
    weights[0].grad[0, 0] = math.nan
    optimizer.step()
    assert weights[0][0, 0].isnan() and not weights[0][1].isnan().any()
    assert math.isnan(optimizer.metrics()["grad_norm"]) and optimizer.grads_finite
    before = weights[1].detach().clone()
    for nothing in (torch.zeros(()), 0.0):
        optimizer.step(grad_factor=nothing)
        assert torch.equal(weights[1].detach(), before)
        assert float(optimizer.state[weights[1]]["step"]) == 1.0


# ---------------------------------------- signs


def test_which_states_cannot_be_negative_is_proved() -> None:
    def proved(rule: Any) -> set[str]:
        optimizer = mixprec.MixedPrecision(rule, state_formats="8bit")
        run(optimizer, 2)
        entry = optimizer.state[next(params_of(optimizer))]
        return {k for k, v in entry.items() if isinstance(v, Tensor) and v.dtype == torch.uint8}

    assert proved(AdamW(params())) == {"exp_avg_sq"}
    assert proved(Adam(params(), amsgrad=True)) == {"exp_avg_sq", "max_exp_avg_sq"}
    assert proved(SGD(params(), momentum=0.9)) == set()
    assert proved(torch.optim.RMSprop(params(), centered=True)) == {"square_avg"}
    assert proved(torch.optim.Adadelta(params())) == {"square_avg", "acc_delta"}
    assert proved(torch.optim.Adamax(params())) == {"exp_inf"}


def test_a_proof_by_induction_drops_what_leans_on_what_was_dropped() -> None:
    from mixprec.optimizer.fused.program.program import Op, Program

    swap = Program((), (("a", "b"), ("b", "grad")), 0)
    assert non_negative_states([(swap, [])]) == frozenset()
    keep = Program((Op("square", ("grad",), "b'"),), (("a", "b"), ("b", "b'")), 0)
    assert non_negative_states([(keep, [])]) == {"a", "b"}
    ops = Op("square", ("grad",), "t0"), Op("lerp", ("v", "t0", "s0"), "v'")
    average = Program(ops, (("v", "v'"),), 1)
    assert non_negative_states([(average, [0.1])]) == {"v"}
    assert non_negative_states([(average, [1.1])]) == frozenset()


# ---------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"fused": "yes"}, ValueError, "fused='yes'; use 'auto', True or False"),
        ({"state_formats": "4bit"}, ValueError, "state_formats='4bit'; use '8bit' or 'bf16'"),
        ({"state_formats": 8}, TypeError, "state_formats is a int; use '8bit', 'bf16', or a"),
        (
            {"state_formats": {"exp_avg": "fp8"}},
            ValueError,
            "state_formats['exp_avg']='fp8'; use 'fp32', 'bf16' or 'int8'",
        ),
        (
            {"state_formats": "8bit", "fused": False},
            ValueError,
            "state_formats='8bit' with fused=False: only a fused step reads and writes such states",
        ),
        (
            {"on_nonfinite": "ignore", "loss_scaler": mixprec.DynamicLossScaler()},
            ValueError,
            "on_nonfinite='ignore' with a loss scaler: overflow is how a loss scale finds its",
        ),
    ],
)
def test_options_that_cannot_be_meant_are_refused(
    options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=re.escape(text)):
        mixprec.MixedPrecision(AdamW(params()), **options)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"fused": True},
            "fused=True, but Adafactor cannot run as one kernel: its Python code looks at a",
        ),
        ({"state_formats": "8bit"}, "state_formats='8bit', but Adafactor cannot run as one kernel"),
    ],
)
def test_insisting_on_what_cannot_be_fused_says_why(options: dict[str, Any], text: str) -> None:
    optimizer = mixprec.MixedPrecision(torch.optim.Adafactor(params()), **options)
    give_grads(list(params_of(optimizer)), 0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=re.escape(text) + ".*Use fused='auto'"):
        optimizer.step()


def test_an_unknown_state_is_answered_with_those_there_are() -> None:
    optimizer = mixprec.MixedPrecision(AdamW(params()), state_formats={"momentum": "bf16"})
    give_grads(list(params_of(optimizer)), 0)  # pyright: ignore[reportArgumentType]
    text = "state_formats names 'momentum', which AdamW does not keep for each element; its "
    with pytest.raises(ValueError, match=text + "states are exp_avg, exp_avg_sq"):
        optimizer.step()


def test_a_closure_may_be_given_to_a_rule_that_ignores_the_loss() -> None:
    optimizer = mixprec.MixedPrecision(AdamW(params(), lr=0.1), state_formats="8bit")
    weights: Any = list(params_of(optimizer))

    def closure() -> float:
        give_grads(weights, 0)
        return 3.0

    assert optimizer.step(closure) == 3.0
    assert optimizer.state[weights[0]]["exp_avg"].dtype == torch.int8


def test_explain_tells_the_tier_and_why() -> None:
    text = mixprec.MixedPrecision(AdamW(params())).explain()
    assert "param_groups[0] is not fused (tier 2): kernels run on a GPU with Triton" in text
    text = mixprec.MixedPrecision(AdamW(params()), fused=True).explain()
    assert "param_groups[0] is fused (tier 1, plain torch): its recording equals the rule" in text
    text = mixprec.MixedPrecision(torch.optim.LBFGS(params())).explain()
    assert "param_groups[0] is not fused (tier 3): the rule sees all masters at once" in text
    text = mixprec.MixedPrecision(AdamW(params()), fused=False).explain()
    assert "param_groups[0] is not fused (tier 2): fused=False" in text
    text = mixprec.MixedPrecision(AdamW(params(torch.float32))).explain()
    assert "(the rule itself): FP32 parameters keep the bits of the rule" in text


@pytest.mark.parametrize("stored", [None, "bf16", "8bit"])
def test_the_source_of_a_kernel_is_python_that_says_what_it_computes(stored: Any) -> None:
    optimizer = mixprec.MixedPrecision(AdamW(params(), lr=0.1), state_formats=stored, fused=True)
    text = optimizer.explain(source=True).partition("runs\n\n")[2]
    assert text.startswith("# exp_avg' = lerp(exp_avg, grad, s1)\n")
    compile(text, "kernel", "exec")
    assert ("def encode" in text) == (stored == "8bit")
    assert "def step(table, grads, chunks, scalars" in text
