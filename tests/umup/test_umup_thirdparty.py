"""Number by number against unit-scaling 0.3.5: equal where rules are, and where they are not."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mixprec import umup
from mixprec.umup import functional as ours
from mixprec.umup import losses

pytestmark = pytest.mark.thirdparty

NO_EXTRA = "needs the thirdparty extra: pip install -e '.[test,thirdparty]'"
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("unit_scaling", reason=NO_EXTRA)
    theirs: Any = pytest.importorskip("unit_scaling.functional", reason=NO_EXTRA)
    their_rules: Any = pytest.importorskip("unit_scaling.core.functional", reason=NO_EXTRA)
    their_optim: Any = pytest.importorskip("unit_scaling.optim", reason=NO_EXTRA)
    their_parameter: Any = pytest.importorskip("unit_scaling.parameter", reason=NO_EXTRA)
    their_scale: Any = pytest.importorskip("unit_scaling.scale", reason=NO_EXTRA)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def results(function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> list[Tensor]:
    """Output and all gradients."""
    torch.manual_seed(0)
    inputs = [normal(*shape, seed=i) for i, shape in enumerate(shapes)]
    y = function(*inputs)
    y.backward(normal(*y.shape, seed=9).detach())
    return [y.detach(), *(x.grad for x in inputs if x.grad is not None)]


def assert_equal(left: list[Tensor], right: list[Tensor], sums: int = 1) -> None:
    """To 1e-6 of the largest element; gradients after the second divided by the root of `sums`."""
    assert len(left) == len(right)
    for place, (mine, other) in enumerate(zip(left, right, strict=True)):
        mine = mine * (sums**-0.5 if place >= 2 else 1.0)
        assert float((mine - other).abs().max() / other.abs().max()) < 1e-6, place


CONSTRAINTS: tuple[Any, ...] = (
    None,
    "gmean",
    "hmean",
    "amean",
    "to_output_scale",
    "to_grad_input_scale",
)


@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("name", ["linear", "linear_readout"])
def test_linear_without_a_bias(name: str, constraint: Any) -> None:
    shapes = (6, 10, 48), (32, 48)
    mine = results(partial(getattr(ours, name), constraint=constraint), *shapes)
    other = results(lambda x, w: getattr(theirs, name)(x, w, None, constraint=constraint), *shapes)
    assert_equal(mine, other, sums=60)


@pytest.mark.parametrize("constraint", [*CONSTRAINTS[:5], "to_left_grad_scale"])
def test_matmul(constraint: Any) -> None:
    shapes = (3, 16, 24), (3, 24, 40)
    assert_equal(
        results(partial(ours.matmul, constraint=constraint), *shapes),
        results(partial(theirs.matmul, constraint=constraint), *shapes),
    )


@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 1), (1, 4)])
def test_conv1d(constraint: Any, stride: int, groups: int) -> None:
    shapes = (4, 16, 20), (24, 16 // groups, 3)
    options: Any = {"stride": stride, "groups": groups, "constraint": constraint}
    mine = results(partial(ours.conv1d, **options), *shapes)
    other = results(lambda x, w: theirs.conv1d(x, w, None, **options), *shapes)
    assert_equal(mine, other, sums=4 * mine[0].shape[-1])


@pytest.mark.filterwarnings("ignore:Implicit dimension")
@pytest.mark.parametrize("mult", [0.25, 1.0, 4.0])
@pytest.mark.parametrize("name", ["gelu", "silu", "softmax", "silu_glu"])
def test_activations(name: str, mult: float) -> None:
    shapes = ((32, 64),) * (2 if name == "silu_glu" else 1)
    other = {"dim": -1} if name == "softmax" else {}
    for constraint in ("absent",) if name == "silu_glu" else CONSTRAINTS:
        options: Any = {} if constraint == "absent" else {"constraint": constraint}
        assert_equal(
            results(partial(getattr(ours, name), multiplier=mult, **options), *shapes),
            results(partial(getattr(theirs, name), mult=mult, **other, **options), *shapes),
        )


@pytest.mark.parametrize("training", [False, True])
def test_dropout(training: bool) -> None:
    options: Any = {"p": 0.3, "training": training}
    assert_equal(
        results(partial(ours.dropout, **options), (32, 64)),
        results(partial(theirs.dropout, **options), (32, 64)),
    )


@pytest.mark.parametrize("constraint", [None, "to_output_scale", "gmean"])
@pytest.mark.parametrize("other", [(32, 64), (64,)])
def test_add(other: tuple[int, ...], constraint: Any) -> None:
    shapes = (32, 64), other
    assert_equal(
        results(partial(ours.add, constraint=constraint), *shapes),
        results(partial(theirs.add, constraint=constraint), *shapes),
    )


def test_norms() -> None:
    x, w, b = (32, 64), (64,), (64,)
    assert_equal(
        results(lambda x, w, b: ours.layer_norm(x, (64,), w, b), x, w, b),
        results(lambda x, w, b: theirs.layer_norm(x, (64,), w, b), x, w, b),
        sums=32,
    )
    assert_equal(
        results(lambda x, w: ours.rms_norm(x, (64,), w), x, w),
        results(lambda x, w: theirs.rms_norm(x, (64,), w, eps=1e-5), x, w),
        sums=32,
    )


@pytest.mark.parametrize("tau", [0.2, 1.0, 3.0])
def test_residuals(tau: float) -> None:
    def apply(module: Any, x: Tensor) -> Tensor:
        branch, skip = module.residual_split(x, tau=tau)
        return module.residual_add(torch.tanh(branch), skip, tau=tau)

    assert_equal(results(partial(apply, ours), (8, 8)), results(partial(apply, theirs), (8, 8)))


@pytest.mark.parametrize("multiplier", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("ratio", [0.25, 1.0, 3.0])
def test_taus_of_a_transformer(multiplier: float, ratio: float) -> None:
    rule = their_rules.transformer_residual_scaling_rule(multiplier, ratio)
    for index, tau in enumerate(ours.residual_taus(6, multiplier, ratio)):
        assert tau == pytest.approx(rule(index, 12), rel=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mult", [0.5, 1.0, 2.0])
def test_attention_at_the_training_length_with_the_logarithm(causal: bool, mult: float) -> None:
    shapes = ((2, 4, 32, 16),) * 3
    options: Any = {"multiplier": mult, "seq_len": 32, "limit": "log"}
    mine = results(partial(ours.scaled_dot_product_attention, is_causal=causal, **options), *shapes)
    other = results(
        partial(theirs.scaled_dot_product_attention, is_causal=causal, mult=mult), *shapes
    )
    assert_equal(mine, other)
    if causal:  # the exact limit is smaller by (ln S / H_S)^1/2, less where logits are sharp
        options["limit"] = "harmonic"
        exact = results(
            partial(ours.scaled_dot_product_attention, is_causal=True, **options), *shapes
        )
        harmonic = sum(1 / n for n in range(1, 33))
        flat = 1 - 1 / (1 + 4 * 16 / mult**2)
        ratio = (math.log(32) / harmonic) ** (flat / 2)
        torch.testing.assert_close(exact[0], mine[0] * ratio, rtol=1e-5, atol=1e-6)


def test_the_gradient_of_an_embedding_after_the_token_factor() -> None:
    indices = torch.randint(50, (8, 16), generator=torch.Generator().manual_seed(0))
    mine = results(lambda w: ours.embedding(indices, w), (50, 12))
    other = results(lambda w: theirs.embedding(indices, w), (50, 12))
    assert_equal([mine[0], mine[1] * (50 / 128) ** 0.5], other)


@pytest.mark.parametrize("mult", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_cross_entropy(mult: float, reduction: Any) -> None:
    targets = torch.randint(50, (64,), generator=torch.Generator().manual_seed(0))
    assert_equal(
        results(
            lambda z: losses.cross_entropy(z, targets, multiplier=mult, reduction=reduction),
            (64, 50),
        ),
        results(
            lambda z: theirs.cross_entropy(z, targets, mult=mult, reduction=reduction), (64, 50)
        ),
    )


def test_cross_entropy_differs_in_what_a_mean_with_padding_divides_by() -> None:
    targets = torch.randint(50, (64,), generator=torch.Generator().manual_seed(0))
    targets[16:] = -100
    logits = normal(64, 50).detach()
    mine = losses.cross_entropy(logits, targets)
    torch.testing.assert_close(mine, nn.functional.cross_entropy(logits, targets))
    torch.testing.assert_close(theirs.cross_entropy(logits, targets), mine / 4)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_mse_of_predictions_that_are_unit_normal(reduction: Any) -> None:
    options: Any = {"reduction": reduction}
    assert_equal(
        results(partial(losses.mse_loss, residual_std=2**0.5, **options), (64, 8), (64, 8)),
        results(partial(theirs.mse_loss, **options), (64, 8), (64, 8)),
    )


def test_scaling_in_one_direction() -> None:
    for name in ("scale_fwd", "scale_bwd"):
        assert_equal(
            results(lambda x, name=name: getattr(umup, name)(x, 3.0), (8, 8)),
            results(lambda x, name=name: getattr(their_scale, name)(x, 3.0), (8, 8)),
        )


# ------------------------------------------------------------------ where the rules differ


@pytest.mark.parametrize(("name", "power"), [("linear", 0.5), ("linear_readout", 1.0)])
def test_a_bias_is_inside_their_multiplier_and_outside_of_ours(name: str, power: float) -> None:
    shapes = (60, 64), (32, 64), (32,)
    mine = results(getattr(ours, name), *shapes)
    other = results(getattr(theirs, name), *shapes)
    bias = normal(32, seed=2).detach()
    torch.testing.assert_close(other[0], mine[0] - bias + bias * 64**-power, rtol=1e-5, atol=1e-5)


# role: shape, their type, whether SGD agrees
ROLES: dict[Any, tuple[tuple[int, ...], str, bool]] = {
    "hidden": ((32, 64), "weight", True),
    "input": ((32, 8), "weight", True),
    "output": ((50, 64), "output", True),
    "norm": ((64,), "norm", True),
    "bias": ((64,), "bias", True),
    "embedding": ((50, 64), "weight", False),
}


@pytest.mark.parametrize("depth", [1, 16])
@pytest.mark.parametrize("role", ROLES)
def test_learning_rates_agree_but_for_embeddings_under_sgd(role: Any, depth: int) -> None:
    shape, kind, sgd_agrees = ROLES[role]
    if role in ("input", "output", "embedding"):
        depth = 1
    param = their_parameter.Parameter(torch.zeros(shape), kind, depth if depth > 1 else None)
    adam = their_optim.lr_scale_func_adam(param)
    assert umup.rule(role, shape, depth, "adam").lr == pytest.approx(adam)
    sgd = their_optim.lr_scale_func_sgd(None)(param)
    found = umup.rule(role, shape, depth, "sgd").lr
    assert (found == pytest.approx(sgd)) == sgd_agrees
    if not sgd_agrees:
        assert found == pytest.approx(sgd * 64**0.5)


def test_weight_decay_agrees() -> None:
    param = their_parameter.Parameter(torch.zeros(32, 64), "weight")
    (group,) = their_optim.scaled_parameters(
        [param], their_optim.lr_scale_func_adam, lr=0.5, weight_decay=2**-13
    )
    layer = umup.layers.Linear(64, 32, bias=False)
    (mine,) = umup.param_groups(layer, 0.5, torch.optim.AdamW, 2**-13)
    assert mine["lr"] == pytest.approx(float(group["lr"]))
    assert mine["weight_decay"] == pytest.approx(float(group["weight_decay"]))


def test_their_token_factor_is_of_one_micro_batch_and_ours_of_the_step() -> None:
    x, dy, weight = normal(64, 16).detach(), normal(64, 8, seed=1).detach(), normal(8, 16, seed=2)
    grads: dict[str, list[Tensor]] = {}
    for name, module in (("ours", ours), ("theirs", theirs)):
        for splits in ([64], [4, 60]):
            weight.grad = None
            for rows, grad in zip(x.split(splits), dy.split(splits), strict=True):
                y = (
                    module.linear(rows, weight)
                    if module is ours
                    else module.linear(rows, weight, None)
                )
                y.backward(grad)
            assert weight.grad is not None
            grads.setdefault(name, []).append(weight.grad)
    torch.testing.assert_close(grads["ours"][1], grads["ours"][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grads["ours"][0] / 8, grads["theirs"][0], rtol=1e-5, atol=1e-6)
    whole, cut = (g.flatten() for g in grads["theirs"])
    assert nn.functional.cosine_similarity(whole, cut, dim=0) < 0.95
