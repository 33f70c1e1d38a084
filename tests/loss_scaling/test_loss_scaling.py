"""The loss scalers: their state machine, every transition, and `torch.amp.GradScaler` as oracle."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import random
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed.checkpoint as checkpoint
from torch import Tensor, nn
from torch.distributed.checkpoint.stateful import Stateful
from torch.optim import LBFGS, SGD, AdamW, Optimizer
from waiting import no_waiting

from mixprec.loss_scaling import DynamicLossScaler, StaticLossScaler
from mixprec.loss_scaling.machine import ScalePolicy, ScaleState, ScaleVerdict

Event = Literal["finite", "overflow", "empty"]

NOT_DEFAULT: dict[str, Any] = {
    "growth_factor": 4.0,
    "backoff_factor": 0.25,
    "growth_interval": 3,
    "hysteresis": 2,
    "min_scale": 0.5,
    "max_scale": 2.0**20,
    "max_skips_in_a_row": 7,
}


def weight(value: float = 1.0) -> nn.Parameter:
    return nn.Parameter(torch.tensor(value))


def backward(scaler: DynamicLossScaler | StaticLossScaler, param: Tensor) -> None:
    scaler.multiply(param * 3).backward()


def play(scaler: DynamicLossScaler, events: str) -> list[float]:
    """The loss scale after each update: f finite, o overflow, e empty."""
    scales: list[float] = []
    for event in events:
        scaler.multiply(torch.ones(()))
        scaler.update(event == "f", counted=event != "e")
        scales.append(scaler.get_scale())
    return scales


# --- multiply and inverse


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_product_is_fp32_and_exact_where_16_bits_would_overflow(dtype: torch.dtype) -> None:
    scaled = DynamicLossScaler().multiply(torch.tensor(3.0, dtype=dtype))
    assert scaled.dtype == torch.float32 and scaled.item() == 3 * 2.0**16


def test_a_loss_with_a_dimension_is_cast_up_as_well() -> None:
    scaled = DynamicLossScaler().multiply(torch.tensor([3.0, 2.0], dtype=torch.float16))
    assert scaled.dtype == torch.float32 and scaled.tolist() == [3 * 2.0**16, 2.0**17]


def test_an_fp64_loss_stays_fp64() -> None:
    loss = torch.tensor(1 / 3, dtype=torch.float64)
    assert DynamicLossScaler().multiply(loss).item() == 2.0**16 / 3


def test_inverse_undoes_every_loss_scale_exactly() -> None:
    for exponent in range(-126, 127):
        scaler = StaticLossScaler(2.0**exponent)
        assert scaler.inverse.dtype == torch.float32 and scaler.inverse.shape == ()
        assert scaler.inverse.item() == 2.0**-exponent


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_power_of_two_is_invisible_in_bf16_and_fp32_gradients(dtype: torch.dtype) -> None:
    def gradients(loss_scale: float) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8))
        with torch.no_grad():
            for param in model.parameters():
                param.copy_(torch.randn(param.shape, generator=generator) / 4)
        model.to(dtype)
        inputs = torch.randn(64, 16, generator=generator).to(dtype)
        scaler = StaticLossScaler(loss_scale)
        scaler.multiply(model(inputs).float().square().sum()).backward()
        return [p.grad * scaler.inverse for p in model.parameters() if p.grad is not None]

    unscaled = gradients(1.0)
    for exponent in (-20, 8, 12, 16, 24):
        assert all(map(torch.equal, gradients(2.0**exponent), unscaled))


def test_fp16_gradients_below_its_range_are_recovered() -> None:
    def gradient(loss_scale: float) -> float:
        param = nn.Parameter(torch.ones((), dtype=torch.float16))
        scaler = StaticLossScaler(loss_scale)
        scaler.multiply(param.float() * 2.0**-30).backward()
        assert param.grad is not None
        return (param.grad * scaler.inverse).item()

    assert gradient(1.0) == 0.0
    assert gradient(2.0**16) == 2.0**-30


def test_neither_multiply_nor_inverse_nor_update_reads_the_device() -> None:
    """A meta tensor has no value: whoever reads one raises."""
    yes, no = (torch.tensor(flag, device="meta") for flag in (True, False))
    param = nn.Parameter(torch.ones((), device="meta"))
    scaler = DynamicLossScaler()
    for finite, counted in ((yes, yes), (no, no), (True, yes), (yes, False)):
        scaler.multiply(param * 3).backward()
        assert scaler.inverse.device.type == "meta"
        scaler.update(finite, counted=counted)
        scaler.update(finite)
    with pytest.raises(RuntimeError, match="meta"):
        scaler.get_scale()


def test_the_state_is_made_on_the_device_of_the_first_loss() -> None:
    scaler = DynamicLossScaler()
    assert scaler.inverse.device.type == "cpu"
    scaler.multiply(torch.ones((), device="meta"))
    assert scaler.inverse.device.type == "meta"
    scaler.update(True)
    scaler.multiply(torch.ones((), device="meta"))
    scaler.load_state_dict(DynamicLossScaler().state_dict())
    assert {tensor.device.type for tensor in scaler._state} == {"meta"}


def test_an_integer_loss_is_refused() -> None:
    with pytest.raises(TypeError, match=r"loss is torch\.int64; only a floating-point loss"):
        DynamicLossScaler().multiply(torch.tensor(1))


@pytest.mark.parametrize("losses", [[torch.ones(())], (torch.ones(()),), 2.0])
def test_what_is_no_tensor_is_refused_with_what_to_type(losses: Any) -> None:
    with pytest.raises(TypeError, match=rf"loss is a {type(losses).__name__}.*multiply\(l\) for l"):
        DynamicLossScaler().multiply(losses)


@pytest.mark.parametrize(
    "change",
    [
        lambda scaled: scaled,
        lambda scaled: scaled.double().reshape(1).sum(),
        lambda scaled: scaled / 4 + torch.ones((), requires_grad=True),
        lambda scaled: sum([scaled, *(torch.ones((), requires_grad=True) for _ in range(5))]),
    ],
    ids=["itself", "cast", "divided and added to", "one of six"],
)
def test_a_loss_is_not_multiplied_twice(change: Any) -> None:
    scaler, param = DynamicLossScaler(), weight()
    loss = param * 3
    scaled = change(scaler.multiply(loss))
    for twice in (scaler, StaticLossScaler(4.0)):
        with pytest.raises(RuntimeError, match=r"was multiplied by a loss scaler already"):
            twice.multiply(scaled)
    scaler.multiply(loss)  # the loss itself carries none


def test_the_penalty_on_scaled_gradients_may_be_scaled() -> None:
    """The graph of second derivatives passes by the product, not through it."""
    scaler, param = StaticLossScaler(8.0), weight(2.0)
    loss = param.square()
    (scaled_grad,) = torch.autograd.grad(scaler.multiply(loss), param, create_graph=True)
    scaler.multiply(loss + (scaled_grad * scaler.inverse).square()).backward()
    assert param.grad is not None and (param.grad * scaler.inverse).item() == 4 + 8 * 2


# --- the machine


def python_machine(
    policy: ScalePolicy, events: tuple[Event, ...]
) -> list[tuple[float, int, int, float]]:
    """The states that a run of verdicts leads through, in plain Python, as the docs tell it."""
    scale, growth, overflows, before = 8.0, 0, 0, 8.0
    states: list[tuple[float, int, int, float]] = []
    for event in events:
        if event == "finite":
            growth, overflows = growth + 1, 0
            if growth == policy.growth_interval:
                scale, growth = min(scale * policy.growth_factor, policy.max_scale), 0
            before = scale
        elif event == "overflow":
            growth, overflows = 0, overflows + 1
            if overflows >= policy.hysteresis:
                scale = max(scale * policy.backoff_factor, policy.min_scale)
        states.append((scale, growth, overflows, before))
    return states


@pytest.mark.parametrize("hysteresis", [1, 2, 3])
def test_every_run_of_eight_verdicts_moves_the_state_as_documented(hysteresis: int) -> None:
    policy = ScalePolicy(2.0, 0.5, 2, hysteresis, 2.0, 16.0, 50)
    events: list[Event] = ["finite", "overflow", "empty"]
    runs = list(itertools.product(events, repeat=8))
    expected = torch.tensor([python_machine(policy, run) for run in runs])
    state = ScaleState(*(torch.full((len(runs),), start) for start in (8.0, 0, 0, 8.0)))
    for step in range(8):
        finite = torch.tensor([run[step] == "finite" for run in runs])
        counted = torch.tensor([run[step] != "empty" for run in runs])
        state = policy.move(state, ScaleVerdict(finite, counted))
        assert torch.equal(torch.stack([part.float() for part in state], 1), expected[:, step])


def test_the_nth_overflow_in_a_row_and_the_following_back_off() -> None:
    scaler = DynamicLossScaler(2.0**10, hysteresis=3)
    assert play(scaler, "oofooo") == [1024.0, 1024.0, 1024.0, 1024.0, 1024.0, 512.0]
    assert play(scaler, "ofo") == [256.0, 256.0, 256.0]


def test_sparse_overflows_do_not_wear_the_loss_scale_down_with_hysteresis() -> None:
    spikes = ("f" * 9 + "o") * 10
    assert play(DynamicLossScaler(hysteresis=2), spikes)[-1] == 2.0**16
    assert play(DynamicLossScaler(hysteresis=1), spikes)[-1] == 2.0**6


def test_the_loss_scale_stops_at_both_bounds() -> None:
    scaler = DynamicLossScaler(4.0, growth_interval=1, min_scale=2.0, max_scale=8.0)
    assert play(scaler, "ooofffff") == [2.0, 2.0, 2.0, 4.0, 8.0, 8.0, 8.0, 8.0]


def test_an_empty_window_interrupts_neither_row() -> None:
    scaler = DynamicLossScaler(4.0, growth_interval=2, hysteresis=2)
    assert play(scaler, "fef") == [4.0, 4.0, 8.0]
    assert play(scaler, "oeo") == [8.0, 8.0, 4.0]


def test_a_static_loss_scale_never_moves_but_counts_skips() -> None:
    scaler = StaticLossScaler(64.0, max_skips_in_a_row=3)
    for _ in range(3):
        scaler.check_progress()
        scaler.multiply(torch.ones(()))
        scaler.update(False)
    assert scaler.get_scale() == 64.0 and scaler.moves == 0
    with pytest.raises(FloatingPointError, match=r"3 steps in a row.*stayed at 64\.0"):
        scaler.check_progress()


# --- verdicts wait


def test_the_inverse_stays_that_of_the_gradients_until_the_next_loss() -> None:
    scaler = DynamicLossScaler(8.0)
    scaler.multiply(torch.ones(()))
    scaler.update(False)
    assert scaler.inverse.item() == 1 / 8 and scaler.get_scale() == 4.0
    assert scaler.state_dict()["scale"] == 4.0 and scaler.inverse.item() == 1 / 8
    assert scaler.multiply(torch.ones(())).item() == 4.0
    assert scaler.inverse.item() == 1 / 4 and scaler.moves == 1


@pytest.mark.parametrize("verdicts", list(itertools.product("foe", repeat=3)), ids="".join)
def test_all_verdicts_of_one_iteration_make_one_transition(verdicts: tuple[str, ...]) -> None:
    scaler = DynamicLossScaler(8.0, growth_interval=1)
    scaler.multiply(torch.ones(()))
    for verdict in verdicts:
        scaler.update(torch.tensor(verdict == "f"), counted=torch.tensor(verdict != "e"))
    expected = 4.0 if "o" in verdicts else 16.0 if "f" in verdicts else 8.0
    assert scaler.get_scale() == expected
    scaler.multiply(torch.ones(()))
    assert scaler.get_scale() == expected


def test_two_optimizers_share_a_scaler() -> None:
    scaler = DynamicLossScaler(8.0)
    first, second = weight(), weight()
    optimizers = [SGD([first], lr=1.0), SGD([second], lr=1.0)]
    backward(scaler, first)
    backward(scaler, second)
    first.grad = torch.tensor(float("inf"))
    for optimizer in optimizers:
        scaler.step(optimizer)
    assert (first.item(), second.item()) == (1.0, -2.0)
    assert scaler.get_scale() == 4.0


def test_update_without_any_scaled_loss_is_refused() -> None:
    with pytest.raises(
        RuntimeError, match=r"update\(\) before any loss.*multiply\(loss\)\.backward"
    ):
        DynamicLossScaler().update(True)


# --- torch.amp.GradScaler as oracle


def grad_scaler(**settings: Any) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", **settings)


def torch_state(scaler: torch.amp.GradScaler) -> dict[str, Any]:
    return {key: scaler.state_dict()[key] for key in ("scale", "_growth_tracker")}


def our_state(scaler: DynamicLossScaler) -> dict[str, Any]:
    return {key: scaler.state_dict()[key] for key in ("scale", "_growth_tracker")}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("rule", ["sgd", "fused adamw"])
def test_scale_and_weights_follow_grad_scaler_through_random_overflows(
    seed: int, rule: str
) -> None:
    chance = random.Random(seed)
    odds = chance.choice([0.05, 0.3, 0.7])
    settings: dict[str, Any] = {"init_scale": 2.0**10, "growth_interval": 3}
    ours = DynamicLossScaler(**settings, min_scale=2.0**-126, max_scale=2.0**126)
    theirs = grad_scaler(**settings)
    params = weight(), weight()
    optimizers = [
        AdamW([p], lr=0.1, fused=True) if rule == "fused adamw" else SGD([p], lr=0.1, momentum=0.5)
        for p in params
    ]
    for _ in range(150):
        bad = chance.choice([float("inf"), float("nan")]) if chance.random() < odds else 1.0
        for param in params:
            param.grad = None
        ours.multiply(params[0] * bad).backward()
        theirs.scale(params[1] * bad).backward()
        ours.step(optimizers[0])
        theirs.step(optimizers[1])
        theirs.update()
        assert our_state(ours) == torch_state(theirs)
        assert torch.equal(*params)


@pytest.mark.parametrize("seed", range(3))
def test_two_optimizers_follow_grad_scaler_with_one_update_an_iteration(seed: int) -> None:
    chance = random.Random(seed)
    settings: dict[str, Any] = {"init_scale": 2.0**10, "growth_interval": 3}
    ours, theirs = DynamicLossScaler(**settings, min_scale=2.0**-126), grad_scaler(**settings)
    params = [weight() for _ in range(4)]
    optimizers = [SGD([param], lr=2.0**-4) for param in params]
    for _ in range(100):
        factors = [float("inf") if chance.random() < 0.2 else 1.0 for _ in range(2)]
        for param in params:
            param.grad = None
        for i, factor in enumerate(factors):
            ours.multiply(params[i] * factor).backward()
            theirs.scale(params[2 + i] * factor).backward()
        for i in range(2):
            ours.step(optimizers[i])
            theirs.step(optimizers[2 + i])
        theirs.update()
        assert our_state(ours) == torch_state(theirs)
        assert torch.equal(params[0], params[2]) and torch.equal(params[1], params[3])


def test_state_dicts_are_exchanged_with_grad_scaler_both_ways() -> None:
    ours = DynamicLossScaler(2.0**12, growth_interval=5, backoff_factor=0.25)
    play(ours, "offf")
    theirs = grad_scaler()
    theirs.load_state_dict(ours.state_dict())
    theirs.scale(torch.ones(()))
    loaded = theirs.state_dict()
    assert loaded == {key: ours.state_dict()[key] for key in loaded}

    back = DynamicLossScaler(hysteresis=3, max_skips_in_a_row=9)
    play(back, "o")
    back.load_state_dict(loaded)
    expected = DynamicLossScaler(
        2.0**10, growth_interval=5, backoff_factor=0.25, hysteresis=3, max_skips_in_a_row=9
    ).state_dict()
    assert back.state_dict() == {**expected, "_growth_tracker": 3}


# --- copies and state dicts


def worn_scaler() -> DynamicLossScaler:
    """No setting and no part of the state has its default."""
    scaler = DynamicLossScaler(2.0**10, **NOT_DEFAULT)
    play(scaler, "ffffooo")
    return scaler


def test_no_field_of_the_worn_scaler_is_at_its_default() -> None:
    fresh, worn = DynamicLossScaler().state_dict(), worn_scaler().state_dict()
    same = {key for key in fresh if fresh[key] == worn[key]}
    assert same == {"_growth_tracker"}  # 0 after any overflow
    scaler = worn_scaler()
    play(scaler, "f")
    assert scaler.state_dict()["_growth_tracker"] == 1


@pytest.mark.parametrize("tail", ["", "f", "o"])
def test_every_field_survives_the_state_dict(tail: str) -> None:
    scaler = worn_scaler()
    play(scaler, tail)
    buffer = io.BytesIO()
    torch.save(scaler.state_dict(), buffer)
    buffer.seek(0)
    restored = DynamicLossScaler()
    restored.load_state_dict(torch.load(buffer, weights_only=True))
    assert restored.state_dict() == scaler.state_dict()
    assert play(restored, "ofofffoooof") == play(scaler, "ofofffoooof")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_distributed_checkpoint_takes_the_scaler_as_it_is(tmp_path: Path) -> None:
    assert isinstance(DynamicLossScaler(), Stateful)
    scaler, restored = worn_scaler(), DynamicLossScaler()
    play(scaler, "f")
    checkpoint.save({"scaler": scaler}, checkpoint_id=tmp_path, no_dist=True)
    checkpoint.load({"scaler": restored}, checkpoint_id=tmp_path, no_dist=True)
    assert restored.state_dict() == scaler.state_dict()


@pytest.mark.parametrize("way", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_a_copy_goes_on_like_the_original_with_the_waiting_verdict(way: Any) -> None:
    scaler = worn_scaler()
    scaler.multiply(torch.ones(()))
    scaler.update(False)
    param = weight()
    backward(scaler, param)
    scaler.step(SGD([param], lr=1.0))
    twin = way(scaler)
    assert twin.state_dict() == scaler.state_dict()
    assert twin.inverse.item() == scaler.inverse.item()
    assert (twin.losses_scaled, twin.moves) == (scaler.losses_scaled, scaler.moves)
    assert play(twin, "ffoffff") == play(scaler, "ffoffff")


def test_a_static_scaler_survives_its_state_dict_but_takes_no_moving_one() -> None:
    scaler = StaticLossScaler(64.0, max_skips_in_a_row=9)
    restored = StaticLossScaler(2.0)
    restored.load_state_dict(scaler.state_dict())
    assert restored.state_dict() == scaler.state_dict() and restored.get_scale() == 64.0
    with pytest.raises(ValueError, match=r"move from 1\.0 to 16777216\.0; load it into a Dynamic"):
        restored.load_state_dict(DynamicLossScaler(64.0).state_dict())
    assert restored.state_dict() == scaler.state_dict()


@pytest.mark.parametrize("how", ["loaded", "copied", "pickled"])
def test_gradients_from_before_a_load_or_a_copy_are_not_stepped_with_the_new_scale(
    how: str,
) -> None:
    scaler, param = DynamicLossScaler(8.0), weight()
    backward(scaler, param)
    if how == "loaded":
        scaler.load_state_dict(DynamicLossScaler(2.0).state_dict())
    else:
        scaler = copy.deepcopy(scaler) if how == "copied" else pickle.loads(pickle.dumps(scaler))
    with pytest.raises(RuntimeError, match=r"no loss was scaled since.*state was loaded"):
        scaler.step(SGD([param], lr=1.0))
    param.grad = None
    backward(scaler, param)
    scaler.step(SGD([param], lr=1.0))
    assert param.item() == -2.0


def test_loading_in_the_middle_of_a_run_forgets_the_waiting_verdict() -> None:
    scaler = DynamicLossScaler(8.0)
    saved = scaler.state_dict()
    play(scaler, "o")
    scaler.load_state_dict(saved)
    assert scaler.get_scale() == 8.0
    assert scaler.multiply(torch.ones(())).item() == 8.0


SAVED = DynamicLossScaler(8.0).state_dict()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (grad_scaler(enabled=False).state_dict(), r"empty.*GradScaler\(enabled=False\).*fresh"),
        ({**SAVED, "scale": 3.0}, r"scale in the state dict is 3\.0.*power of two.*such as 4\.0"),
        ({**SAVED, "scale": 0.0}, r"scale in the state dict is 0\.0.*power of two"),
        ({**SAVED, "scale": 2.0**25}, r"33554432\.0, outside the bounds.*max_scale=33554432\.0"),
        ({**SAVED, "scale": None}, r"scale in the state dict is None"),
        ({**SAVED, "growth_factor": 1.5}, r"growth_factor is 1\.5; it must be a power of two"),
        ({**SAVED, "_growth_tracker": -1}, r"_growth_tracker is -1; it counts steps"),
        ({**SAVED, "_overflows_in_a_row": 0.5}, r"_overflows_in_a_row is 0\.5; it counts steps"),
        (
            {**SAVED, "_scale_before_overflows": 5.0},
            r"_scale_before_overflows in the state dict is 5",
        ),
        ({"scale": 8.0, "lr": 0.1}, r"\['growth_factor', .* missing, \['lr'\] unknown"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_state_dict_is_refused_and_changes_nothing(
    state: dict[str, Any], message: str
) -> None:
    scaler = worn_scaler()
    before = scaler.state_dict()
    with pytest.raises(ValueError, match=message):
        scaler.load_state_dict(state)
    assert scaler.state_dict() == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_scale": 1000.0}, r"init_scale is 1000\.0; .*power of two.*such as 1024\.0"),
        ({"init_scale": 0.5}, r"init_scale is 0\.5, outside the bounds \[1\.0, 16777216\.0\]"),
        ({"init_scale": float("nan")}, r"init_scale is nan; it must be a power of two"),
        ({"init_scale": 2.0**127, "max_scale": 2.0**127}, r"max_scale is .*2\^-126 to 2\^126,"),
        ({"growth_factor": 3.0}, r"growth_factor is 3\.0; it must be a power of two"),
        ({"growth_factor": 0.5}, r"growth_factor is 0\.5 and backoff_factor 0\.5; the first must"),
        ({"backoff_factor": 1.0}, r"backoff_factor 1\.0; the first must be above 1"),
        ({"min_scale": 3.0}, r"min_scale is 3\.0; it must be a power of two"),
        ({"max_scale": 1e6}, r"max_scale is 1000000\.0; .*such as 1048576\.0"),
        ({"min_scale": 4.0, "max_scale": 2.0}, r"min_scale 4\.0 is above max_scale 2\.0"),
        ({"growth_interval": 0}, r"growth_interval is 0; it counts steps: give an int from 1 up"),
        ({"hysteresis": 1.5}, r"hysteresis is 1\.5; it counts steps"),
        ({"max_skips_in_a_row": -1}, r"max_skips_in_a_row is -1; it counts steps"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DynamicLossScaler(**settings)


def test_a_static_loss_scale_is_a_power_of_two() -> None:
    with pytest.raises(ValueError, match=r"loss_scale is 100; it must be a power of two.* 128\.0"):
        StaticLossScaler(100)


# --- no progress


def test_too_many_skips_in_a_row_name_the_tensor_and_the_fall_of_the_scale() -> None:
    scaler = DynamicLossScaler(2.0**3, max_skips_in_a_row=5)
    model = nn.Linear(2, 2)
    optimizer = SGD(list(model.named_parameters()), lr=1.0)
    for step in range(5):
        optimizer.zero_grad()
        scaler.multiply(model(torch.ones(1, 2)).sum()).backward()
        assert model.bias.grad is not None
        model.bias.grad[0] = float("nan")
        if step < 4:
            scaler.step(optimizer)
    message = (
        r"5 steps in a row had non-finite gradients, first in 'bias'; the loss scale fell from "
        r"8\.0 to 1\.0\. So scaling is not what overflows\..*keep_fp32=.*BF16"
    )
    with pytest.raises(FloatingPointError, match=message):
        scaler.step(optimizer)


def test_a_scale_that_can_still_fall_is_named_as_the_suspect() -> None:
    scaler = DynamicLossScaler(2.0**10, max_skips_in_a_row=2)
    play(scaler, "oo")
    with pytest.raises(
        FloatingPointError, match=r"from 1024\.0 to 256\.0\. It may still be too high"
    ):
        scaler.check_progress()


def test_gradients_are_read_only_when_it_comes_to_raising() -> None:
    scaler = DynamicLossScaler(max_skips_in_a_row=2)
    play(scaler, "o")
    scaler.check_progress((name, torch.empty(0)) for name in iter(lambda: pytest.fail("read"), 0))


def test_a_finite_step_ends_the_row_of_skips() -> None:
    scaler = DynamicLossScaler(max_skips_in_a_row=2)
    for _ in range(5):
        play(scaler, "of")
        scaler.check_progress()


def test_rules_that_skip_on_the_device_are_asked_once_in_max_skips() -> None:
    scaler = DynamicLossScaler(max_skips_in_a_row=4)
    param = weight()
    optimizer = AdamW([param], lr=1.0, fused=True)
    backward(scaler, param)
    scaler.step(optimizer)
    for _ in range(3):
        backward(scaler, param * float("inf"))
        scaler.step(optimizer)
    backward(scaler, param * float("inf"))
    with pytest.raises(FloatingPointError, match="4 steps in a row"):
        scaler.step(optimizer)


# --- stepping plain optimizers


def test_step_unscales_in_place_and_takes_the_bare_step() -> None:
    ours, bare = weight(), weight()
    optimizer, plain = AdamW([ours], lr=0.1), AdamW([bare], lr=0.1)
    scaler = DynamicLossScaler()
    for _ in range(3):
        for param, rule in ((ours, optimizer), (bare, plain)):
            rule.zero_grad()
            if param is ours:
                backward(scaler, param)
                scaler.step(optimizer)
            else:
                (param * 3).backward()
                plain.step()
        assert torch.equal(ours, bare) and ours.grad == bare.grad


@pytest.mark.parametrize("factor", [0.5, torch.tensor(0.5), torch.tensor(0.5).double()])
def test_the_grad_factor_multiplies_and_a_factor_of_zero_leaves_all_alone(factor: Any) -> None:
    scaler = DynamicLossScaler(8.0, growth_interval=1)
    param = weight()
    optimizer = SGD([param], lr=1.0)
    backward(scaler, param)
    scaler.step(optimizer, grad_factor=factor)
    assert param.item() == 1 - 3 / 2 and scaler.get_scale() == 16.0
    optimizer.zero_grad()
    backward(scaler, param * float("inf"))
    scaler.step(optimizer, grad_factor=factor * 0)
    assert param.item() == 1 - 3 / 2 and scaler.get_scale() == 16.0


BAD_FACTORS = [float("nan"), float("inf"), -float("inf"), -2.0, 1e60, 1e-60]


@pytest.mark.parametrize("factor", BAD_FACTORS)
@pytest.mark.parametrize("wrap", [float, lambda f: torch.tensor([f], dtype=torch.float64)])
@pytest.mark.parametrize("rule", [SGD, AdamW])
def test_a_factor_that_is_none_skips_counts_and_is_said_by_name(
    factor: float, wrap: Any, rule: Any
) -> None:
    scaler = DynamicLossScaler(8.0, max_skips_in_a_row=3)
    param = weight()
    optimizer = rule([("head", param)], lr=0.5)
    given = wrap(factor)

    def step() -> None:
        optimizer.zero_grad()
        backward(scaler, param)
        scaler.step(optimizer, grad_factor=given)

    with pytest.warns(RuntimeWarning, match=r"grad_factor is .*T is 0: give 0 to leave out a step"):
        step()
    assert param.item() == 1.0 and param.grad == 24.0 and not optimizer.state
    step()  # said already
    with pytest.raises(FloatingPointError, match=r"3 steps in a row .* first in 'grad_factor';"):
        step()
    assert param.item() == 1.0


def test_a_division_by_no_tokens_is_such_a_factor() -> None:
    scaler, param = DynamicLossScaler(8.0), weight()
    backward(scaler, param)
    with pytest.warns(RuntimeWarning, match="grad_factor is inf"):
        scaler.step(SGD([param], lr=1.0), grad_factor=torch.tensor(128.0) / torch.tensor(0))
    assert param.item() == 1.0


def test_a_fused_rule_skips_a_factor_that_is_none_on_the_device() -> None:
    scaler, param = DynamicLossScaler(8.0), weight()
    optimizer = AdamW([param], lr=0.5, fused=True)
    backward(scaler, param)
    scaler.step(optimizer)
    before = param.item()
    optimizer.zero_grad()
    backward(scaler, param)
    scaler.step(optimizer, grad_factor=float("nan"))
    assert param.item() == before and scaler.get_scale() == 4.0


def test_several_factors_are_refused() -> None:
    scaler, param = DynamicLossScaler(), weight()
    backward(scaler, param)
    with pytest.raises(TypeError, match=r"grad_factor has shape \[2\]; it is one number"):
        scaler.step(SGD([param], lr=1.0), grad_factor=torch.ones(2))
    assert param.item() == 1.0


def test_an_optimizer_without_gradients_tells_the_scaler_nothing() -> None:
    scaler = DynamicLossScaler(8.0, growth_interval=1)
    used, unused = weight(), weight()
    backward(scaler, used)
    scaler.step(SGD([unused], lr=1.0))
    assert scaler.get_scale() == 8.0
    scaler.step(SGD([used], lr=1.0))
    assert scaler.get_scale() == 16.0


def test_a_closure_that_scales_is_called_once_and_its_value_returned() -> None:
    scaler = DynamicLossScaler()
    param = weight(2.0)
    optimizer = SGD([param], lr=1.0)
    calls: list[float] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = param.square()
        scaler.multiply(loss).backward()
        calls.append(loss.item())
        return loss

    with torch.no_grad():
        assert scaler.step(optimizer, closure).item() == 4.0
    assert calls == [4.0] and param.item() == -2.0


def test_a_closure_that_does_not_scale_is_refused() -> None:
    param = weight()
    scaler = DynamicLossScaler()
    backward(scaler, param)
    with pytest.raises(
        RuntimeError, match=r"closure did not scale.*multiply\(loss\)\.backward\(\)"
    ):
        scaler.step(SGD([param], lr=1.0), lambda: param.square().backward())
    assert param.item() == 1.0


def test_step_without_a_scaled_loss_is_refused_for_each_optimizer() -> None:
    scaler = DynamicLossScaler()
    param = weight()
    optimizer = SGD([param], lr=1.0)
    param.grad = torch.ones(())
    with pytest.raises(RuntimeError, match=r"no loss was scaled since the last step of SGD"):
        scaler.step(optimizer)
    backward(scaler, param)
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match=r"Call multiply\(loss\)\.backward\(\) before step"):
        scaler.step(optimizer)


def test_16_bit_gradients_are_refused_with_what_to_type() -> None:
    scaler = DynamicLossScaler()
    param = nn.Parameter(torch.ones((), dtype=torch.float16))
    backward(scaler, param)
    with pytest.raises(TypeError, match=r"torch\.float16.*Wrap it: mixprec\.MixedPrecision\(SGD"):
        scaler.step(SGD([param], lr=1.0))


def test_a_rule_that_evaluates_the_loss_itself_is_refused() -> None:
    scaler = DynamicLossScaler()
    param = weight()
    backward(scaler, param)
    with pytest.raises(TypeError, match=r"LBFGS evaluates the loss several times in a step"):
        scaler.step(LBFGS([param]), lambda: 0.0)


def test_a_mixed_precision_optimizer_is_refused_because_it_unscales_itself() -> None:
    class UnscalesItself(SGD):
        loss_scaler = None

    optimizer: Optimizer = UnscalesItself([weight()], lr=1.0)
    with pytest.raises(TypeError, match=r"divides by the loss scale itself.*loss_scaler=scaler"):
        DynamicLossScaler().step(optimizer)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_a_scaled_step_of_a_fused_rule_never_waits() -> None:
    param = nn.Parameter(torch.ones(8, device="cuda"))
    optimizer = AdamW([param], lr=0.1, fused=True)
    scaler = DynamicLossScaler(growth_interval=1)
    for step in range(4):
        # The first has made the state, on the host's knowledge.
        with no_waiting() if step else nullcontext():
            optimizer.zero_grad()
            scaler.multiply(param.sum()).backward()
            scaler.step(optimizer)
    assert scaler.get_scale() == 2.0**20
