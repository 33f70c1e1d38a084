"""Every operation that torch calls element-wise: recorded right, or refused and said so."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bounds import UPDATE
from small_rules import Rule, params, recordings
from torch import Tensor
from torch.nn import functional as F

from mixprec.optimizer.fused.recording.probe import Probe, RuleState
from mixprec.optimizer.fused.recording.recorder import NotFusible
from mixprec.optimizer.fused.self_check import admit_fused

GIVEN: dict[str, Any] = {
    **{"lambd": 0.2, "eps": 0.1, "min": -0.3, "max": 0.4, "threshold": 0.1, "decimals": 2},
    **{"rounding_mode": "floor", "approximate": "tanh", "exponent": 3.0},
}
"""What an argument is given; others have their default, or 0.7."""


def pointwise() -> dict[str, Any]:
    """All of torch's own operations that are marked so, and make tensors of tensors."""
    found: dict[str, Any] = {}
    # `dir(torch.ops.aten)` lists those that somebody has used.
    schemas = [schema.name for schema in torch._C._jit_get_all_schemas()]
    names = {name.removeprefix("aten::") for name in schemas if name.startswith("aten::")}
    for name in sorted(names):
        packet = getattr(torch.ops.aten, name, None)
        for overload in getattr(packet, "overloads", list[str])():
            func = getattr(packet, overload)
            kinds = {str(argument.type) for argument in func._schema.arguments}
            writes = any(argument.is_out for argument in func._schema.arguments)
            makes = all(str(made.type) == "Tensor" for made in func._schema.returns)
            if torch.Tag.pointwise in func.tags and "Tensor" in kinds and makes and not writes:
                found[f"{name}.{overload}"] = func
    return found


OPERATIONS = pointwise()

REFUSED_BY_TORCH = {
    *("gcd", "lcm", "bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_not", "__xor__"),
    *("bitwise_left_shift", "bitwise_right_shift", "__lshift__", "__rshift__"),
    *("__ilshift__", "__irshift__", "__iand__", "__ior__", "__ixor__", "__and__", "__or__"),
}
"""Which torch itself refuses for FP32 numbers."""

BLIND_TO_NAN = {"logit_backward"}
"""Torch's decomposition makes 0 of a NaN, and its kernel a NaN."""

WITHOUT_A_FORM = {
    *("angle", "digamma", "frexp", "igamma", "igammac", "mvlgamma", "polygamma"),
    "_conj_physical",
    "nextafter",  # Triton makes the least normal number of a subnormal one
    *("special_zeta", "special_erfcx", "special_log_ndtr", "special_ndtri", "special_airy_ai"),
    *("special_bessel_j0", "special_bessel_j1", "special_bessel_y0", "special_bessel_y1"),
    *("i0", "special_i0e", "special_i1", "special_i1e", "special_spherical_bessel_j0"),
    *(f"special_modified_bessel_{kind}" for kind in ("i0", "i1", "k0", "k1")),
    *(f"special_scaled_modified_bessel_{kind}" for kind in ("k0", "k1")),
    *(f"special_chebyshev_polynomial_{kind}" for kind in "tuvw"),
    *(f"special_shifted_chebyshev_polynomial_{kind}" for kind in "tuvw"),
    *(f"special_hermite_polynomial_{kind}" for kind in ("h", "he")),
    *("special_laguerre_polynomial_l", "special_legendre_polynomial_p"),
}
"""Special functions, for which kernels have nothing."""


def refused_by_torch(name: str) -> bool:
    return plain(name) in REFUSED_BY_TORCH or name.startswith("float_power_.")


OTHER_WORDS = {"float_power": "computes in float64", "rrelu": "it draws random numbers"}


def plain(name: str) -> str:
    base = name.partition(".")[0]
    return base[:-1] if base.endswith("_") and not base.endswith("__") else base


def called(func: Any, *tensors: Tensor) -> Tensor:
    """The operation on copies of the tensors, and on numbers as its schema wants them."""
    left = iter(tensors)
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for argument in func._schema.arguments:
        kind, given = str(argument.type), GIVEN.get(argument.name)
        if kind == "Tensor" or (kind == "Optional[Tensor]" and given is not None):
            value: Any = next(left).clone()
            value = value > 0 if argument.name in ("mask", "condition") else value
        elif kind == "List[Tensor]":
            value = [next(left).clone()]
        elif given is not None:
            value = given
        elif argument.has_default_value() or "Tensor" in kind:
            value = argument.default_value
        else:
            value = [0.7] if kind.startswith("List") else 3 if kind == "int" else 0.7
        if argument.kwarg_only:
            kwargs[argument.name] = value
        else:
            args.append(value)
    made = func(*args, **kwargs)
    made = args[0] if made is None else made
    return (made[0] if isinstance(made, (list, tuple)) else made).float()


class Computes(Rule):
    """Keeps what a function makes of the gradient, the parameter and their difference."""

    compute: Callable[..., Tensor]

    def update(self, group: Any, p: Any, grad: Tensor, state: Any) -> None:
        p.copy_(type(self).compute(grad, p, p - grad))


def rule(function: Callable[..., Tensor]) -> type[Computes]:
    return type("Of", (Computes,), {"compute": staticmethod(function)})


EDGES = (0.0, -0.0, 0.3, -0.3, 0.5, 1.0, -1.0, 2.5, -7.25, 30.0, math.inf, -math.inf, math.nan)
"""On the axes, between them, where softplus becomes a line, and what is not finite."""


@pytest.mark.parametrize("name", [name for name in OPERATIONS if not refused_by_torch(name)])
def test_what_torch_calls_element_wise_is_recorded_or_refused_by_its_name(name: str) -> None:
    func = OPERATIONS[name]
    edges = torch.tensor(EDGES)
    grad, weight = (x.flatten() for x in torch.meshgrid(edges, edges, indexing="ij"))
    optimizer = rule(lambda *tensors: called(func, *tensors))(params(weight.shape))
    if plain(name) in WITHOUT_A_FORM:
        with pytest.raises(NotFusible, match=f"torch.{plain(name)}_? has no fused form"):
            recordings(optimizer, 1)
        return
    if plain(name) in OTHER_WORDS:
        with pytest.raises(NotFusible, match=OTHER_WORDS[plain(name)]):
            recordings(optimizer, 1)
        return
    recording = recordings(optimizer, 1)[0]
    found, _ = recording.program.run(weight, grad, {}, recording.scalars)
    right = called(func, grad, weight, weight - grad)
    if plain(name) in BLIND_TO_NAN:
        found, right = (x[~(grad + weight).isnan()] for x in (found, right))
    assert torch.equal(found.isnan(), right.isnan())
    large = right.isinf()
    assert torch.equal(found[large], right[large])
    finite = right.isfinite()
    # Of each element, where a rule is promised as much of its largest; near 0 of operands near 0.1.
    distance = (found - right)[finite].abs()
    assert (distance <= UPDATE * right[finite].abs().clamp_min(0.1)).all()


@pytest.mark.parametrize("name", list(filter(refused_by_torch, OPERATIONS)))
def test_what_is_left_out_is_nothing_that_torch_computes_in_fp32(name: str) -> None:
    with pytest.raises(
        RuntimeError, match=r"not implemented for 'Float'|integer|requires dtype Double"
    ):
        called(OPERATIONS[name], torch.ones(3), torch.ones(3), torch.ones(3))


COMPUTED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "softplus": lambda p, g: F.softplus(g, beta=2, threshold=1),
    "silu": lambda p, g: F.silu(g) + F.silu(g.clone(), inplace=True),
    "gelu": lambda p, g: F.gelu(g) + F.gelu(p, approximate="tanh"),
    "leaky_relu": lambda p, g: F.leaky_relu(g, 0.2) + F.elu(g) + F.selu(p) + F.celu(g, 0.5),
    "hard and soft": lambda p, g: F.hardswish(g) + F.softshrink(p) + F.tanhshrink(g) + F.mish(g),
    "log-sigmoid": lambda p, g: F.logsigmoid(g),
    "losses": lambda p, g: F.huber_loss(p, g, reduction="none") + (p - g).hypot(g),
    "log-sums": lambda p, g: torch.logaddexp(p, g) + torch.logaddexp2(g, p) + g.exp2(),
    "remainders": lambda p, g: g % 0.3 + p.fmod(0.1) + g.remainder(p) + 1.0 % p,
    "floors": lambda p, g: g // 0.1 + g // p + 1 // p + torch.floor_divide(p, -0.3),
    "digits": lambda p, g: g.round(decimals=2) + p.frac() + torch.fmax(p, g) + g.fmin(p),
    "out": lambda p, g: torch.hypot(p, g, out=torch.empty_like(p)) + g.xlogy(p.abs()),
    "lists": lambda p, g: torch._foreach_erfc([p])[0] + torch._foreach_frac([g])[0],
    "lists in place": lambda p, g: (torch._foreach_lgamma_(x := [g.clone()]), x[0])[1],
    "a sum of exponentials": lambda p, g: g * torch.logsumexp(g, tuple(range(g.ndim))),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_rules_of_such_operations_are_admitted(name: str) -> None:
    def bounded(g: Tensor, p: Tensor, rest: Tensor) -> Tensor:
        return p - 1e-3 * COMPUTED[name](p, g)

    admission = admit_fused(rule(bounded)(params()), 0)
    assert admission.fusible, admission.reason


def test_a_quotient_is_floored_before_it_is_rounded() -> None:
    optimizer = rule(lambda g, p, rest: torch.div(g, 0.1, rounding_mode="floor") + g // p)(params())
    recording = recordings(optimizer, 1)[0]
    ones = torch.ones(3)
    found, _ = recording.program.run(ones * 0.1, ones, {}, recording.scalars)
    assert found.tolist() == [18.0] * 3  # 1 / 0.1 rounds to 10, and 0.1 is more than a tenth


def test_an_operation_taken_apart_is_played_along_the_last_recording() -> None:
    class Softens(Rule):
        def update(self, group: Any, p: Any, grad: Tensor, state: Any) -> None:
            p.sub_(F.softplus(grad, group["beta"]), alpha=group["lr"])

    optimizer = Softens(params(), beta=1.0)
    probe = Probe(optimizer, 0, params()[0])
    first = probe.step(RuleState())
    optimizer.param_groups[0]["lr"] = 0.25
    assert probe._replay(RuleState()) is not None
    probe.step(RuleState())
    second = probe.step(RuleState())
    assert second.scalars == (*first.scalars[:-1], -0.25 if first.scalars[-1] < 0 else 0.25)
    optimizer.param_groups[0]["beta"] = 3.0
    third = probe.step(RuleState())
    assert third.program == second.program and 3.0 in third.scalars


def test_what_torchs_own_code_asks_of_sizes_the_rule_did_not() -> None:
    """Decompositions ask for shapes; only what the rule asks itself makes sizes matter."""

    def reads_sizes(compute: Callable[[Tensor, Tensor], Tensor]) -> bool:
        probe = Probe(rule(lambda g, p, rest: compute(g, p))(params()), 0, params()[0])
        probe.step(RuleState())
        return probe._sizes_read

    assert not reads_sizes(lambda g, p: F.silu(g).mul_(F.logsigmoid(p)))
    assert reads_sizes(lambda g, p: F.silu(g) + g.numel() * 0)


@pytest.mark.parametrize(
    ("compute", "reason"),
    [
        (lambda g, p: g.double().exp().float(), "torch._to_copy computes in float64, and kernels"),
        (lambda g, p: g.bfloat16().exp().float(), "torch._to_copy computes in bfloat16, and"),
        (lambda g, p: g.half() * p, "torch._to_copy computes in float16, and kernels compute in"),
        (lambda g, p: g.to(torch.int32) * p, "torch._to_copy computes in int32, and kernels"),
        (lambda g, p: torch.digamma(g), "torch.digamma has no fused form"),
        (lambda g, p: g.cumsum(0), "torch.cumsum is not element-wise"),
        (lambda g, p: F.rrelu(g, training=True), "it draws random numbers (torch.rrelu_with_n"),
    ],
)
def test_what_is_refused_is_refused_truly(
    compute: Callable[[Tensor, Tensor], Tensor], reason: str
) -> None:
    admission = admit_fused(rule(lambda g, p, rest: compute(g, p))(params()), 0)
    assert not admission.fusible
    assert reason in admission.reason


@pytest.mark.parametrize("number", [True, False])
def test_a_quotient_by_zero_is_floored_to_an_infinity(number: bool) -> None:
    optimizer = rule(lambda g, p, rest: g // (0.0 if number else p))(params())
    recording = recordings(optimizer, 1)[0]
    grad = torch.tensor([1.0, -1.0])
    found, _ = recording.program.run(torch.zeros(2), grad, {}, recording.scalars)
    assert found.tolist() == [math.inf, -math.inf]


def test_a_number_held_in_a_tensor_is_read_anew_where_an_operation_is_taken_apart() -> None:
    class Leaks(Rule):
        def update(self, group: Any, p: Any, grad: Tensor, state: Any) -> None:
            p.sub_(torch.logaddexp(grad, group["bound"]))

    bound = torch.tensor(0.5)
    optimizer = Leaks(params(), bound=bound)
    probe = Probe(optimizer, 0, params()[0])
    probe.step(RuleState())
    bound.fill_(2.0)
    assert 2.0 in probe.step(RuleState()).scalars
