"""A window holds what its own micro-batches computed, and nothing else."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.checkpoint import checkpoint

from mixprec.accumulation import GradientAccumulator
from mixprec.loss_scaling import DynamicLossScaler, StaticLossScaler
from mixprec.optimizer import MixedPrecision

KINDS: dict[str, tuple[torch.dtype, Callable[[Optimizer], Optimizer]]] = {
    "plain": (torch.float32, lambda inner: inner),
    "wrapped": (torch.float32, MixedPrecision),
    "bfloat16": (torch.bfloat16, MixedPrecision),
}
each_kind = pytest.mark.parametrize("kind", list(KINDS))

STEP_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


def made(
    kind: str, values: tuple[float, ...] = (0.0,), **options: Any
) -> tuple[list[nn.Parameter], Any, GradientAccumulator]:
    """Parameters, an SGD over them with lr 1, and an accumulator with P = 8."""
    dtype, wrap = KINDS[kind]
    params = [nn.Parameter(torch.tensor(value, dtype=dtype)) for value in values]
    named = [(name, p) for name, p in zip("abcdefgh", params, strict=False)]
    optimizer = wrap(SGD(named, lr=1.0))
    return params, optimizer, GradientAccumulator(optimizer, presumed_tokens=8, **options)


def hooks_of(optimizer: Optimizer) -> list[Any]:
    """Those of windows; MixedPrecision has one for good, which guards its inner optimizer."""
    names = (*STEP_HOOKS, "_optimizer_load_state_dict_pre_hooks")
    found = [hook for name in names for hook in getattr(optimizer, name).values()]
    return [hook for hook in found if "guard_inner_step" not in getattr(hook, "__qualname__", "")]


# --- opening


@each_kind
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_what_another_backward_left_is_dropped_and_said_once_by_name(
    kind: str, micro_batches: int
) -> None:
    (a, b), _, accumulator = made(kind, (0.0, 0.0))
    for window in range(3):
        (b * 100.0).backward()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for i in range(micro_batches):
                accumulator.backward(a * 4.0 + b * 4.0, 4, last=i == micro_batches - 1)
        texts = [str(warning.message) for warning in caught]
        assert len(texts) == (window == 0)
        assert all("'b' had a gradient when a window opened" in text for text in texts)
        accumulator.step()
        assert (a.item(), b.item()) == (-window - 1.0, -window - 1.0)


@each_kind
def test_zeros_that_were_left_are_not_worth_a_word(kind: str) -> None:
    (a,), _, accumulator = made(kind)
    a.grad = torch.zeros_like(a)
    accumulator.backward(a * 4.0, 4)
    accumulator.step()
    assert a.item() == -1.0


def test_sparse_gradients_that_were_left_are_dropped_too() -> None:
    table = nn.Embedding(4, 1, sparse=True)
    nn.init.zeros_(table.weight)
    accumulator = GradientAccumulator(SGD(table.parameters(), lr=1.0))
    table(torch.tensor([1, 1])).sum().backward()
    with pytest.warns(RuntimeWarning, match="left by another backward pass"):
        accumulator.backward(table(torch.tensor([2, 3, 3])).sum(), 4, last=False)
    accumulator.backward(table(torch.tensor([3])).sum(), 0)
    accumulator.step()
    assert table.weight.flatten().tolist() == [0.0, 0.0, -0.25, -0.75]


def test_two_networks_that_train_through_each_other_need_no_zero_grad() -> None:
    """A discriminator gets gradients from the generator's loss; its next window drops them."""

    def trained(clears: bool) -> list[float]:
        d, g = (nn.Parameter(torch.ones((), dtype=torch.float64)) for _ in range(2))
        of_d, of_g = (GradientAccumulator(SGD([p], lr=0.125)) for p in (d, g))
        for _ in range(4):
            for i in range(2):
                of_d.backward(d * g.detach() * 3, 2, last=i == 1)
            of_d.step()
            of_g.backward(-d * g * 2, 2)
            of_g.step()
            if clears:
                d.grad = None
        return [d.item(), g.item()]

    expected = trained(clears=True)
    with pytest.warns(RuntimeWarning, match="was dropped"):
        assert trained(clears=False) == expected


def test_an_fp32_parameter_whose_gradients_stayed_narrow_is_named() -> None:
    """Torch keeps a `grad_dtype` that was set once, also when the model is cast."""
    model = nn.Linear(2, 1).bfloat16()
    accumulator = GradientAccumulator(MixedPrecision(SGD(model.parameters(), lr=1.0)))
    for last in (False, True):
        accumulator.backward(model(torch.ones(2).bfloat16()).float().sum(), 1, last=last)
    accumulator.step()
    model.float()
    with pytest.warns(RuntimeWarning, match=r"rounded to 16 bits.*grad_dtype = param\.dtype"):
        GradientAccumulator(SGD(model.parameters(), lr=1.0))


def test_a_model_that_is_cast_in_the_middle_gets_gradients_of_its_new_dtype() -> None:
    model = nn.Linear(2, 1).bfloat16()
    accumulator = GradientAccumulator(MixedPrecision(SGD(model.parameters(), lr=1.0)))
    accumulator.backward(model(torch.ones(2).bfloat16()).float().sum(), 1, last=False)
    model.float()
    accumulator.reset()
    assert {param.grad_dtype for param in model.parameters()} == {torch.float32}


# --- what others do to gradients in the middle


@each_kind
@pytest.mark.parametrize("last", [False, True])
def test_another_backward_in_the_middle_is_refused(kind: str, last: bool) -> None:
    (a, b), _, accumulator = made(kind, (0.0, 0.0))
    accumulator.backward(a * 4.0 + b * 4.0, 4, last=last)
    (b * 100.0).backward()
    with pytest.raises(RuntimeError, match=r"another backward pass has run.*gradient of 'b' has"):
        accumulator.step() if last else accumulator.backward(a * 4.0 + b * 4.0, 4)
    accumulator.reset()
    accumulator.backward(a * 4.0 + b * 4.0, 4)
    accumulator.step()
    assert (a.item(), b.item()) == (-1.0, -1.0)


def test_a_parameter_that_another_backward_reached_first_is_noticed() -> None:
    (a, b), _, accumulator = made("plain", (0.0, 0.0))
    accumulator.backward(a * 4.0, 4, last=False)
    (b * 100.0).backward()
    with pytest.raises(RuntimeError, match="gradient of 'b' has changed"):
        accumulator.backward(a * 4.0 + b * 4.0, 4)


def test_passes_that_keep_away_from_the_window_are_no_matter() -> None:
    (a,), _, accumulator = made("plain")
    other = nn.Parameter(torch.ones(()))
    accumulator.backward(a * 4.0, 4, last=False)
    (other * a.detach()).backward()
    torch.autograd.grad(a * 3.0, a)
    accumulator.backward(a * 4.0, 4)
    (other * 2).backward()
    accumulator.step()
    assert a.item() == -1.0


def test_passes_inside_of_the_windows_own_are_its_own() -> None:
    (a,), _, accumulator = made("plain", (1.0,))
    accumulator.start(8)

    def inner(x: Tensor) -> Tensor:
        return x.exp()

    for last in (False, True):
        out = checkpoint(inner, a * 1.0, use_reentrant=True)
        accumulator.backward(out * 4, 4, last=last)
        assert a.grad is not None
        a.grad.mul_(1.0)  # an edit, which is no other pass's work
    accumulator.step()
    assert a.item() == pytest.approx(1 - torch.e, rel=1e-6)


@each_kind
@pytest.mark.parametrize("set_to_none", [False, True])
def test_gradients_cleared_between_micro_batches_are_refused(kind: str, set_to_none: bool) -> None:
    (a,), optimizer, accumulator = made(kind)
    accumulator.backward(a * 4.0, 4, last=False)
    optimizer.zero_grad(set_to_none=set_to_none)
    with pytest.raises(
        RuntimeError, match=r"gradient of 'a' was cleared.*1 micro-batches are counted.*zero_grad"
    ):
        accumulator.backward(a * 4.0, 4)
    accumulator.reset()
    accumulator.backward(a * 4.0, 4)
    accumulator.step()
    assert a.item() == -1.0


def test_gradients_cleared_before_the_step_are_refused_or_left_out() -> None:
    (a, b), optimizer, accumulator = made("plain", (0.0, 0.0))
    accumulator.backward(a * 4.0 + b * 4.0, 4)
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="gradient of 'a', 'b' was cleared"):
        accumulator.step()
    accumulator.backward(a * 4.0 + b * 4.0, 4)
    b.grad = None  # as loops do that hold a layer still for a while
    with pytest.warns(RuntimeWarning, match="gradient of 'b' was cleared between.*left out"):
        accumulator.step()
    accumulator.backward(a * 4.0 + b * 4.0, 4)
    b.grad = None
    accumulator.step()  # the first said it
    assert (a.item(), b.item()) == (-2.0, 0.0)


def clip_by_norm(param: Tensor) -> None:
    nn.utils.clip_grad_norm_([param], 0.25)


def clip_by_value(param: Tensor) -> None:
    nn.utils.clip_grad_value_([param], 0.25)


def replace(param: Tensor) -> None:
    assert param.grad is not None
    param.grad = param.grad.clone() / 2


@pytest.mark.parametrize("edit", [clip_by_norm, clip_by_value, replace])
@pytest.mark.parametrize("scaled", [False, True])
def test_an_edit_by_hand_is_said_once_with_what_gradients_carry(
    edit: Callable[[Tensor], None], scaled: bool
) -> None:
    scaler = StaticLossScaler(8.0) if scaled else None
    (a,), _, accumulator = made("plain", loss_scaler=scaler)
    carried = "the loss scale and the presumed tokens" if scaled else "the presumed tokens"
    accumulator.backward(a * 4.0, 4)
    edit(a)
    with pytest.warns(RuntimeWarning, match=rf"'a' was changed by hand.*{carried}: .*start\(T\)"):
        accumulator.step()
    accumulator.backward(a * 4.0, 4)
    edit(a)
    accumulator.step()  # the first said it


def test_means_may_be_edited_in_silence() -> None:
    (a,), _, accumulator = made("plain")
    accumulator.start(4)
    accumulator.backward(a * 4.0, 4)
    clip_by_norm(a)
    accumulator.step()
    assert a.item() == pytest.approx(-0.25)


def test_with_a_loss_scale_even_means_carry_it() -> None:
    (a,), _, accumulator = made("plain", loss_scaler=StaticLossScaler(8.0))
    accumulator.start(4)
    accumulator.backward(a * 4.0, 4)
    clip_by_norm(a)
    with pytest.warns(RuntimeWarning, match="it still carries the loss scale:"):
        accumulator.step()


# --- what others do to the optimizer in the middle


def add(optimizer: Optimizer) -> None:
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(()))], "param_names": ["new"]})


def remove(optimizer: Optimizer) -> None:
    optimizer.param_groups[0]["params"].pop()
    optimizer.param_groups[0]["param_names"].pop()


def put_another(optimizer: Optimizer) -> None:
    optimizer.param_groups[0]["params"][1] = nn.Parameter(torch.zeros(()))


@each_kind
@pytest.mark.parametrize("change", [add, remove, put_another])
@pytest.mark.parametrize("last", [False, True])
def test_other_parameters_in_the_middle_are_refused(
    kind: str, change: Callable[[Optimizer], None], last: bool
) -> None:
    (a, b), optimizer, accumulator = made(kind, (0.0, 0.0))
    accumulator.backward(a * 4.0 + b * 4.0, 4, last=last)
    change(optimizer)
    with pytest.raises(
        RuntimeError, match=r"parameters changed in the middle of a window of 1 micro-batches"
    ):
        accumulator.step() if last else accumulator.backward(a * 4.0 + b * 4.0, 4)
    accumulator.reset()
    assert a.grad is None and b.grad is None
    accumulator.backward(a * 4.0 + b * 4.0, 4)
    b.grad = None
    accumulator._said.keep("cleared")
    accumulator.step()
    assert a.item() == -1.0


def test_parameters_frozen_in_the_middle_are_named() -> None:
    (a, b), _, accumulator = made("plain", (0.0, 0.0))
    accumulator.backward(a * 4.0 + b * 4.0, 4, last=False)
    b.requires_grad_(False)
    with pytest.warns(RuntimeWarning, match="'b' ceased to require gradients in the middle"):
        accumulator.backward(a * 4.0 + b * 4.0, 4, last=False)
    accumulator.backward(a * 4.0 + b * 4.0, 4)
    accumulator.step()
    assert a.item() == -1.0 and b.item() == pytest.approx(-1 / 3)


@each_kind
def test_no_state_is_loaded_in_the_middle(kind: str) -> None:
    (a,), optimizer, accumulator = made(kind)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["lr"] = 9.0
    accumulator.backward(a * 4.0, 4)
    with pytest.raises(RuntimeError, match=r"loaded into .* in the middle of a window of 1"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 1.0
    accumulator.step()
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 9.0


@each_kind
def test_a_second_window_over_one_optimizer_is_refused(kind: str) -> None:
    (a,), optimizer, accumulator = made(kind)
    second = GradientAccumulator(optimizer, presumed_tokens=8)
    accumulator.backward(a * 4.0, 4, last=False)
    with pytest.raises(RuntimeError, match=r"another GradientAccumulator has a window of 1 micro"):
        second.backward(a * 4.0, 4)
    accumulator.backward(a * 4.0, 4)
    accumulator.step()
    second.backward(a * 4.0, 4)
    second.step()
    assert a.item() == -2.0


@each_kind
def test_a_foreign_step_over_an_open_window_is_refused(kind: str) -> None:
    (a,), optimizer, accumulator = made(kind)
    steps: list[Callable[[], Any]] = [optimizer.step, lambda: optimizer.step(lambda: 1.0)]
    if kind != "plain":
        steps.append(optimizer.inner.step)
    for step in steps:
        accumulator.backward(a * 4.0, 4)
        with pytest.raises(
            RuntimeError, match=r"(has a window open.*\.step\(\)|that a MixedPrecision holds)"
        ):
            step()
        accumulator.step()
    assert a.item() == -1.0 * len(steps) and hooks_of(optimizer) == []
    a.grad = torch.ones_like(a)
    optimizer.step()
    assert a.item() == -1.0 * len(steps) - 1


def test_scalers_do_not_step_over_an_open_window() -> None:
    scaler, theirs = StaticLossScaler(8.0), torch.amp.GradScaler("cpu", init_scale=8.0)
    (a,), optimizer, accumulator = made("plain", loss_scaler=scaler)
    accumulator.backward(a * 4.0, 4)
    assert a.grad is not None
    before = a.grad.clone()
    with pytest.raises(RuntimeError, match="SGD is stepped while a GradientAccumulator"):
        scaler.step(optimizer)
    assert torch.equal(before, a.grad)
    theirs.scale(torch.ones(()))
    with pytest.raises(RuntimeError, match="SGD is stepped while a GradientAccumulator"):
        theirs.step(optimizer)
    assert a.item() == 0.0


@each_kind
def test_a_window_that_a_closure_opened_inside_a_step_is_noticed(kind: str) -> None:
    (a,), optimizer, accumulator = made(kind)

    def closure() -> float:
        accumulator.backward(a * 4.0, 4)
        return 1.0

    with pytest.raises(RuntimeError, match=r"backward\(\) ran inside the step of .*closure"):
        optimizer.step(closure)


# --- windows whose accumulator is gone


@each_kind
def test_what_a_lost_accumulator_left_is_neither_stepped_nor_added_to(kind: str) -> None:
    (a,), optimizer, accumulator = made(kind)
    accumulator.backward(a * 4.0, 4, last=False)
    del accumulator
    gc.collect()
    with pytest.raises(RuntimeError, match=r"The accumulator is gone: call zero_grad\(\)"):
        optimizer.step()
    fresh = GradientAccumulator(optimizer, presumed_tokens=8)
    fresh.backward(a * 4.0, 4)
    assert a.grad is not None and a.grad.dtype == a.dtype == a.grad_dtype
    fresh.step()
    assert a.item() == -1.0 and hooks_of(optimizer) == []


def test_after_zero_grad_a_lost_accumulator_is_forgotten() -> None:
    (a,), optimizer, accumulator = made("plain")
    accumulator.backward(a * 4.0, 4)
    del accumulator
    optimizer.zero_grad()
    (a * 3.0).backward()
    optimizer.step()
    assert a.item() == -3.0


# --- losses that reach nobody


@each_kind
def test_a_loss_that_reaches_no_parameter_is_an_error(kind: str) -> None:
    (a, _), optimizer, accumulator = made(kind, (0.0, 0.0))
    stranger = nn.Parameter(torch.zeros(()))
    with pytest.raises(
        RuntimeError, match=r"none of the 2 parameters of this .* \('a', 'b'\).*assign=True"
    ):
        accumulator.backward(stranger * 4.0, 4)
    assert hooks_of(optimizer) == []
    accumulator.backward(a * 4.0, 4, last=False)
    with pytest.raises(RuntimeError, match="reached none of the 2 parameters"):
        accumulator.backward(stranger * 400.0, 400)
    accumulator.backward(a * 4.0, 4)
    accumulator.step()
    assert a.item() == -1.0


def test_parameters_that_ceased_to_be_the_models_are_an_error() -> None:
    model = nn.Linear(2, 1)
    accumulator = GradientAccumulator(SGD(model.parameters(), lr=1.0))
    accumulator.backward(model(torch.ones(2)).sum(), 1)
    accumulator.step()
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    with pytest.raises(RuntimeError, match="not the model's any more"):
        accumulator.backward(model(torch.ones(2)).sum(), 1)


def test_frozen_parameters_are_told_from_strangers() -> None:
    (a,), _, accumulator = made("plain")
    a.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"None of them requires a gradient"):
        accumulator.backward(nn.Parameter(torch.zeros(())) * 4.0, 4)


def test_a_micro_batch_of_padding_reaches_its_parameters() -> None:
    (a,), _, accumulator = made("plain")
    accumulator.backward(a * 0.0, 0, last=False)
    accumulator.backward(a * 4.0, 4)
    accumulator.step()
    assert a.item() == -1.0


# --- loss scales


@pytest.mark.parametrize("how", ["moved", "loaded", "replaced"])
def test_a_window_is_not_stepped_with_another_loss_scale(how: str) -> None:
    scaler = DynamicLossScaler(8.0, growth_interval=1)
    a, b = (nn.Parameter(torch.zeros(())) for _ in range(2))
    optimizer = MixedPrecision(SGD([a], lr=1.0), loss_scaler=scaler)
    accumulator = GradientAccumulator(optimizer)
    accumulator.backward(a * 4.0, 4)
    if how == "moved":
        scaler.multiply(b * 1.0).backward()
        scaler.step(SGD([b], lr=1.0))
        scaler.multiply(b * 1.0)
    elif how == "loaded":
        scaler.load_state_dict(StaticLossScaler(2.0).state_dict())
    else:
        optimizer.loss_scaler = DynamicLossScaler(2.0)
    message = "the loss scaler was replaced" if how == "replaced" else "or its state was loaded"
    with pytest.raises(RuntimeError, match=message):
        accumulator.step()
    assert a.item() == 0.0 and a.grad is None
    accumulator.backward(a * 4.0, 4)
    accumulator.step()
    assert a.item() == -1.0


# --- copies


def pickled(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


def saved(thing: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


each_way = pytest.mark.parametrize("way", [copy.deepcopy, copy.copy, pickled, saved])


@each_kind
@each_way
@pytest.mark.parametrize("last", [False, True])
def test_an_accumulator_is_not_copied_in_the_middle_of_a_window(
    kind: str, way: Callable[[Any], Any], last: bool
) -> None:
    (a,), _, accumulator = made(kind)
    accumulator.backward(a * 4.0, 4, last=last)
    with pytest.raises(RuntimeError, match=r"copied or pickled in the middle of a window of 1"):
        way(accumulator)
    if not last:
        accumulator.backward(a * 4.0, 4)
    accumulator.step()
    assert a.item() == -1.0


@each_kind
@pytest.mark.parametrize("way", [copy.deepcopy, pickled, saved])
def test_a_copy_made_between_windows_belongs_to_its_own_optimizer(
    kind: str, way: Callable[[Any], Any]
) -> None:
    (a,), optimizer, accumulator = made(kind)
    accumulator.backward(a * 4.0, 4)
    accumulator.step()
    a2, optimizer2, accumulator2 = way((a, optimizer, accumulator))
    assert accumulator2.optimizer is optimizer2
    for i in range(2):
        accumulator2.backward(a2 * 8.0, 4, last=i == 1)
        assert hooks_of(optimizer) == [] and a.grad is None
    accumulator2.step()
    accumulator.backward(a * 4.0, 4)
    with pytest.raises(RuntimeError, match="window open"):
        optimizer.step()
    accumulator.step()
    assert (a.item(), a2.item()) == (-2.0, -3.0)


def test_a_count_given_to_start_is_copied_with_it() -> None:
    (a,), _, accumulator = made("plain")
    accumulator.start(4)
    a2, accumulator2 = copy.deepcopy((a, accumulator))
    accumulator2.backward(a2 * 4.0, 4)
    assert a2.grad is not None and a2.grad.item() == 1.0


@each_kind
@pytest.mark.parametrize("way", [copy.deepcopy, pickled, saved])
def test_an_optimizer_copied_in_the_middle_has_no_window(
    kind: str, way: Callable[[Any], Any]
) -> None:
    (a,), optimizer, accumulator = made(kind)
    accumulator.backward(a * 4.0, 4, last=False)
    a2, optimizer2 = way((a, optimizer))
    assert a2.grad is None and a2.grad_dtype == a2.dtype
    (a2 * 3.0).backward()
    optimizer2.step()
    accumulator.backward(a * 4.0, 4)
    accumulator.step()
    assert (a.item(), a2.item()) == (-1.0, -3.0)


def test_a_process_group_is_shared_by_copies_and_not_pickled() -> None:
    _, _, accumulator = made("plain")
    group = object()
    accumulator._process_group = group
    twin = copy.deepcopy(accumulator)
    assert twin._process_group is group and twin.optimizer is not accumulator.optimizer
    with pytest.raises(TypeError, match="a process group belongs to its process"):
        pickle.dumps(accumulator)


# --- what stops in the middle


class Stops(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise torch.OutOfMemoryError("no memory")


@each_kind
@pytest.mark.parametrize("before", [0, 1])
def test_a_backward_that_failed_half_way_leaves_a_window_that_says_so(
    kind: str, before: int
) -> None:
    (a, b), optimizer, accumulator = made(kind, (0.0, 0.0))
    for _ in range(before):
        accumulator.backward(a * 4.0 + b * 4.0, 4, last=False)
    with pytest.raises(torch.OutOfMemoryError):
        accumulator.backward(Stops.apply(a) * 4.0 + b * 4.0, 4)
    message = rf"backward of micro-batch {before + 1} did not get to its end.*reset\(\)"
    for call in (
        accumulator.step,
        lambda: accumulator.start(8),
        lambda: accumulator.backward(a * 4.0 + b * 4.0, 4),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()
    with pytest.raises(RuntimeError, match="window open"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="in the middle of a window"):
        copy.deepcopy(accumulator)
    accumulator.reset()
    assert {a.grad, b.grad} == {None} and a.grad_dtype == a.dtype
    accumulator.backward(a * 4.0 + b * 4.0, 4)
    accumulator.step()
    assert (a.item(), b.item()) == (-1.0, -1.0)


class Interrupt:
    """Raises KeyboardInterrupt at the n-th line that is run in the accumulator's modules."""

    def __init__(self, line: int) -> None:
        self.left = line

    def __call__(self, frame: Any, event: str, _: Any) -> Any:
        if frame.f_globals.get("__name__") not in ("mixprec.accumulation", "mixprec.window.window"):
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self


def test_a_window_interrupted_at_any_line_is_whole_or_says_that_it_is_not() -> None:
    line, done = 0, False
    while not done:
        line += 1
        (a, b), optimizer, accumulator = made("bfloat16", (0.0, 0.0))
        done = True
        sys.settrace(Interrupt(line))
        try:
            accumulator.backward(a * 4.0 + b * 4.0, 4, last=False)
            accumulator.backward(a * 8.0 + b * 8.0, 4)
            accumulator.step()
        except KeyboardInterrupt:
            done = False
        finally:
            sys.settrace(None)
        moved = (a.item(), b.item())
        assert moved in ((0.0, 0.0), (-1.5, -1.5)), line
        if line % 2:  # the user resets, or goes on with a window that still is whole
            accumulator.reset()
            assert hooks_of(optimizer) == [], line
            assert {a.grad, b.grad} == {None} and a.grad_dtype == torch.bfloat16, line
        try:
            accumulator.backward(a * 4.0 + b * 4.0, 4)
            accumulator.step()
        except RuntimeError as error:
            assert line % 2 == 0 and "did not get to its end" in str(error), (line, error)
            continue
        assert accumulator.num_tokens is not None
        mean = {4: 1.0, 8: 1.0, 12: 4 / 3}[int(accumulator.num_tokens)]  # of what it still held
        master = next(m for _, m in optimizer.masters()).item()
        assert moved[0] - master == pytest.approx(mean, rel=1e-6), line
        assert hooks_of(optimizer) == [] and a.grad_dtype == torch.bfloat16, line
    assert line > 100


def test_a_reset_interrupted_at_any_line_is_gone_through_with() -> None:
    line, done = 0, False
    while not done:
        line += 1
        (a, b), optimizer, accumulator = made("bfloat16", (0.0, 0.0))
        for _ in range(2):
            accumulator.backward(a * 8.0 + b * 8.0, 4, last=False)
        done = True
        sys.settrace(Interrupt(line))
        try:
            accumulator.reset()
        except KeyboardInterrupt:
            done = False
        finally:
            sys.settrace(None)
        if line == 1:  # it had not begun
            accumulator.reset()
        accumulator.backward(a * 4.0 + b * 4.0, 4)
        accumulator.step()
        assert (a.item(), b.item()) == (-1.0, -1.0), line
        assert hooks_of(optimizer) == [] and a.grad_dtype == b.grad_dtype == torch.bfloat16, line
    assert line > 10


def test_the_state_of_adam_is_untouched_by_a_refused_step() -> None:
    a = nn.Parameter(torch.zeros(()))
    optimizer = AdamW([a], lr=0.5)
    accumulator = GradientAccumulator(optimizer)
    accumulator.backward(a * 4.0, 4)
    with pytest.raises(RuntimeError, match="Nothing was changed"):
        optimizer.step()
    assert len(optimizer.state) == 0
