"""Saving and loading the optimizer: what a checkpoint holds, and what one that is wrong changes."""

from __future__ import annotations

import copy
import io
from typing import Any, Literal, cast

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import SGD, AdamW

import mixprec

Masters = Literal["auto", "full", "split"]
STORAGES: list[tuple[torch.dtype, Masters]] = [
    (torch.bfloat16, "full"),
    (torch.bfloat16, "split"),
    (torch.float16, "full"),
]


def network(dtype: torch.dtype, width: int = 6) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.Linear(width, 3)).to(dtype)


def train(optimizer: torch.optim.Optimizer, model: nn.Module, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator).bfloat16().to(p.dtype)
        optimizer.step()


def made(
    dtype: torch.dtype = torch.bfloat16, masters: Masters = "auto", steps: int = 3, width: int = 6
) -> tuple[nn.Module, mixprec.MixedPrecision]:
    model = network(dtype, width)
    optimizer = mixprec.MixedPrecision(
        AdamW(model.named_parameters(), lr=1e-2), masters=masters, bucket_numel=8
    )
    train(optimizer, model, range(steps))
    return model, optimizer


def on_disk(state_dict: Any) -> Any:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same(left: Any, right: Any) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=0)


def values(state_dict: dict[str, Any]) -> Any:
    """What can be compared of a state dict."""
    return {k: v for k, v in state_dict["state"].items()}


def masters_of(optimizer: mixprec.MixedPrecision) -> list[Tensor]:
    return [master.clone() for _, master in optimizer.masters()]


@pytest.mark.parametrize(("dtype", "masters"), STORAGES)
@pytest.mark.parametrize("model_first", [True, False])
def test_resumed_run_equals_the_one_that_went_on(
    dtype: torch.dtype, masters: Masters, model_first: bool
) -> None:
    model, optimizer = made(dtype, masters)
    saved_model, saved = on_disk(model.state_dict()), on_disk(optimizer.state_dict())
    resumed_model, resumed = made(dtype, masters, steps=0)
    if model_first:
        resumed_model.load_state_dict(saved_model)
    resumed.load_state_dict(saved)
    if not model_first:
        resumed_model.load_state_dict(saved_model)
    train(optimizer, model, range(3, 6))
    train(resumed, resumed_model, range(3, 6))
    assert_same(resumed_model.state_dict(), model.state_dict())
    assert_same(values(resumed.state_dict()), values(optimizer.state_dict()))


@pytest.mark.parametrize(("saved_as", "loaded_as"), [("full", "split"), ("split", "full")])
def test_full_and_split_checkpoints_are_one_format(saved_as: Masters, loaded_as: Masters) -> None:
    model, optimizer = made(masters=saved_as)
    resumed_model, resumed = made(masters=loaded_as, steps=0)
    resumed_model.load_state_dict(model.state_dict())
    resumed.load_state_dict(on_disk(optimizer.state_dict()))
    train(optimizer, model, range(3, 6))
    train(resumed, resumed_model, range(3, 6))
    assert_same(masters_of(resumed), masters_of(optimizer))


@pytest.mark.filterwarnings("ignore:every gradient of this step is exactly 0")
def test_tie_of_either_rounding_keeps_its_master() -> None:
    """257 is between the BF16 values 256, which is even, and 258, which is away from zero."""
    for saved_as, loaded_as, weight in (("full", "split", 258.0), ("split", "full", 256.0)):
        p = nn.Parameter(torch.tensor([256.0], dtype=torch.bfloat16))
        optimizer = mixprec.MixedPrecision(SGD([p], lr=1.0), masters=cast(Masters, saved_as))
        p.grad = torch.tensor([-1.0], dtype=torch.bfloat16)
        optimizer.step()
        q = nn.Parameter(p.detach().clone())
        other = mixprec.MixedPrecision(SGD([q], lr=1.0), masters=cast(Masters, loaded_as))
        other.load_state_dict(optimizer.state_dict())
        assert masters_of(other)[0].item() == 257.0
        q.grad = torch.zeros(1, dtype=torch.bfloat16)
        other.step()
        assert masters_of(other)[0].item() == 257.0
        assert q.item() == weight


def test_masters_and_moments_come_back_in_fp32_and_groups_keep_their_identity() -> None:
    _, optimizer = made()
    group = optimizer.param_groups[0]
    optimizer.load_state_dict(state_dict=optimizer.state_dict())
    assert optimizer.param_groups[0] is group is optimizer.inner.param_groups[0]
    assert optimizer.state is optimizer.inner.state
    for state in optimizer.state.values():
        assert {k: v.dtype for k, v in state.items()} == {
            "step": torch.float32,
            "exp_avg": torch.float32,
            "exp_avg_sq": torch.float32,
            "master": torch.float32,
        }


def test_group_values_are_those_of_the_checkpoint_alone() -> None:
    _, optimizer = made()
    saved = optimizer.state_dict()
    optimizer.param_groups[0]["later"] = 1
    optimizer.load_state_dict(saved)
    assert "later" not in optimizer.param_groups[0]


def test_checkpoint_of_the_plain_fp32_optimizer_loads() -> None:
    model = network(torch.float32)
    plain = AdamW(model.parameters(), lr=1e-2)
    train(plain, model, range(3))
    low = copy.deepcopy(model).to(torch.bfloat16)
    optimizer = mixprec.MixedPrecision(AdamW(low.parameters(), lr=1e-2))
    optimizer.load_state_dict(plain.state_dict())
    reference = copy.deepcopy(low).float()
    bare = AdamW(reference.parameters(), lr=1e-2)
    bare.load_state_dict(plain.state_dict())
    train(optimizer, low, range(3, 5))
    train(bare, reference, range(3, 5))
    assert_same(masters_of(optimizer), [p.detach() for p in reference.parameters()])


def test_checkpoint_loads_into_the_plain_fp32_optimizer() -> None:
    model, optimizer = made()
    reference = network(torch.float32)
    fp32 = optimizer.fp32_state_dict(model)
    reference.load_state_dict({k: v.clone() for k, v in fp32.items()})
    bare = AdamW(reference.named_parameters(), lr=1e-2)
    bare.load_state_dict(on_disk(optimizer.state_dict()))
    train(optimizer, model, range(3, 5))
    train(bare, reference, range(3, 5))
    assert_same(masters_of(optimizer), [p.detach() for p in reference.parameters()])


def test_checkpoint_of_a_bare_bf16_optimizer_is_widened() -> None:
    model = network(torch.bfloat16)
    bare = AdamW(model.parameters(), fused=True)
    train(bare, model, range(2))
    optimizer = mixprec.MixedPrecision(AdamW(model.parameters(), fused=True))
    optimizer.load_state_dict(bare.state_dict())
    assert all(s["exp_avg"].dtype == torch.float32 for s in optimizer.state.values())
    train(optimizer, model, range(2, 4))


def test_fp32_parameters_save_what_the_bare_optimizer_saves() -> None:
    left, right = network(torch.float32), network(torch.float32)
    optimizer = mixprec.MixedPrecision(AdamW(left.parameters()))
    bare = AdamW(right.parameters())
    train(optimizer, left, range(3))
    train(bare, right, range(3))
    assert_same(optimizer.state_dict(), bare.state_dict())
    optimizer.load_state_dict(bare.state_dict())
    bare.load_state_dict(optimizer.state_dict())
    assert_same(optimizer.state_dict(), bare.state_dict())


def test_parameters_are_paired_by_name_where_both_sides_have_names() -> None:
    model, optimizer = made()
    saved = optimizer.state_dict()
    other = network(torch.bfloat16)
    backwards = list(other.named_parameters())[::-1]
    resumed = mixprec.MixedPrecision(AdamW(backwards, lr=1e-2))
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(saved)
    assert_same(masters_of(resumed)[::-1], masters_of(optimizer))


def test_weights_win_over_the_masters_of_another_model_with_a_warning() -> None:
    _, optimizer = made()
    for masters in ("full", "split"):
        other, resumed = made(masters=cast(Masters, masters), steps=1)
        with torch.no_grad():
            for p in other.parameters():
                p.fill_(0.5)
        resumed.adopt_params()
        resumed.load_state_dict(optimizer.state_dict())
        assert all((p == 0.5).all() for p in other.parameters()), "loading writes no weight"
        resumed.param_groups[0]["lr"] = 0.0
        with pytest.warns(RuntimeWarning, match=r"0\.weight and 3 more are not the rounding"):
            train(resumed, other, range(1))
        assert all((m == 0.5).all() for m in masters_of(resumed))


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("masters", ["full", "split"])
def test_distributed_checkpoint_api_restores_everything(masters: Masters, flatten: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, optimizer = made(masters=masters)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    resumed_model, resumed = made(masters=masters, steps=0)
    resumed_model.load_state_dict(model.state_dict())
    resumed.init_state()
    set_optimizer_state_dict(resumed_model, resumed, saved, options=options)
    train(optimizer, model, range(3, 5))
    train(resumed, resumed_model, range(3, 5))
    assert_same(masters_of(resumed), masters_of(optimizer))


def test_distributed_checkpoint_initialises_a_fresh_optimizer_and_moves_no_weight() -> None:
    """Torch makes the template with a step at lr = 0, with a loss scaler or without one."""
    for scaler in (None, mixprec.DynamicLossScaler()):
        model, _ = made(steps=0)
        optimizer = mixprec.MixedPrecision(AdamW(model.parameters()), loss_scaler=scaler)
        before = copy.deepcopy(model.state_dict())
        state = cast(Any, get_optimizer_state_dict(model, optimizer))["state"]
        assert set(state["0.weight"]) == {"step", "exp_avg", "exp_avg_sq", "master"}
        assert_same(model.state_dict(), before)


def test_loading_before_the_first_step_round_trips_an_empty_state() -> None:
    _, optimizer = made(steps=0)
    saved = optimizer.state_dict()
    assert saved["state"] == {}
    optimizer.load_state_dict(saved)
    assert not optimizer.state


# ---------------------------------------- what is wrong changes nothing


def without_group(saved: Any) -> Any:
    saved["param_groups"].append(copy.deepcopy(saved["param_groups"][0]))
    return saved


def short_group(saved: Any) -> Any:
    for key in ("params", "param_names"):
        saved["param_groups"][0][key] = saved["param_groups"][0][key][:-1]
    del saved["state"][3]
    return saved


def renamed(saved: Any) -> Any:
    saved["param_groups"][0]["param_names"][1] = "0.offset"
    return saved


def no_master(saved: Any) -> Any:
    del saved["state"][2]["master"]
    return saved


def no_moment(saved: Any) -> Any:
    del saved["state"][1]["exp_avg_sq"]
    return saved


def extra_state(saved: Any) -> Any:
    saved["state"][17] = saved["state"][0]
    return saved


def bad_moment(saved: Any) -> Any:
    saved["state"][0]["exp_avg"] = torch.zeros(6, 5)
    return saved


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (without_group, "the checkpoint has 2 parameter groups, this optimizer 1"),
        (short_group, r"param_groups\[0\] holds 3 parameters in the checkpoint and 4 here"),
        (renamed, r"lacks \['0\.bias'\] and has \['0\.offset'\]"),
        (no_master, r"state of '1\.weight' has no 'master' \(it has step, exp_avg, exp_avg_sq\)"),
        (no_moment, r"state of '0\.bias' lacks 'exp_avg_sq', which other parameters have"),
        (extra_state, "holds state 17, which belongs to none of its parameter groups"),
        (bad_moment, r"'exp_avg' of '0\.weight' is \[6, 5\] in the checkpoint, .* is \[6, 4\]"),
    ],
)
def test_damaged_checkpoint_is_refused_and_nothing_changes(damage: Any, text: str) -> None:
    model, optimizer = made()
    before = copy.deepcopy((values(optimizer.state_dict()), model.state_dict()))
    groups = [
        {k: v for k, v in g.items() if k not in ("params", "param_names")}
        for g in optimizer.param_groups
    ]
    saved = damage(copy.deepcopy(optimizer.state_dict()))
    saved["param_groups"][0]["lr"] = 99.0
    with pytest.raises(ValueError, match=text) as raised:
        optimizer.load_state_dict(saved)
    assert "nothing was loaded" in str(raised.value)
    assert_same((values(optimizer.state_dict()), model.state_dict()), before)
    assert groups[0]["lr"] == optimizer.param_groups[0]["lr"]


def test_checkpoint_of_another_width_is_refused() -> None:
    _, narrow = made(width=6)
    _, wide = made(width=8)
    with pytest.raises(ValueError, match=r"'exp_avg' of '0\.weight' is \[6, 4\] .* is \[8, 4\]"):
        wide.load_state_dict(narrow.state_dict())


def test_checkpoint_of_another_rule_is_refused_and_nothing_changes() -> None:
    model, optimizer = made()
    saved = SGD(model.named_parameters(), lr=0.5, momentum=0.9).state_dict()
    before = copy.deepcopy(values(optimizer.state_dict()))
    with pytest.raises(ValueError, match="has momentum, dampening, nesterov and lacks betas, eps"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 1e-2
    assert_same(values(optimizer.state_dict()), before)


def test_checkpoint_of_an_older_release_that_lacks_an_option_loads() -> None:
    _, optimizer = made()
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["foreach"]
    saved["param_groups"][0]["initial_lr"] = 0.1
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["foreach"] is None


def test_fp32_weights_loaded_first_keep_their_bits_beside_a_plain_checkpoint() -> None:
    plain = network(torch.float32)
    bare = AdamW(plain.named_parameters(), lr=1e-2)
    train(bare, plain, range(2))
    resumed_model, resumed = made(steps=0)
    resumed.load_fp32_state_dict(resumed_model, plain.state_dict())
    resumed.load_state_dict(bare.state_dict())
    resumed.param_groups[0]["lr"] = 0.0
    train(resumed, resumed_model, range(1))
    assert_same(masters_of(resumed), [p.detach() for p in plain.parameters()])


def test_masters_of_a_checkpoint_replace_fp32_weights_that_were_loaded_before() -> None:
    model, optimizer = made()
    resumed_model, resumed = made(steps=0)
    resumed.load_fp32_state_dict(resumed_model, network(torch.float32).state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    resumed_model.load_state_dict(model.state_dict())
    assert_same(masters_of(resumed), masters_of(optimizer))
    assert not resumed._store.early
