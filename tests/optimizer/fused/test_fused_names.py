"""A user's names: none breaks or changes what is generated, and none is taken for one of ours."""

from __future__ import annotations

import ast
import keyword
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from small_rules import Rule, params
from torch import Tensor

import mixprec
from mixprec.optimizer.fused.kernels.emit import Layout, columns, source
from mixprec.optimizer.fused.program.program import Op, Program, is_free_name
from mixprec.optimizer.state_formats import encode, scales_in

Names = tuple[str, str, str]
"""A state in 8 bits, one in FP32 and one number of the tensor."""


def program(names: Names) -> Program:
    coded, plain, reduced = names
    ops = (
        Op("square", ("grad",), "t0"),
        Op("sum", ("t0",), "r0"),
        Op("add", (reduced, "r0"), f"{reduced}'"),
        Op("amax", ("grad",), "r1"),
        Op("lerp", (coded, "grad", "s0"), f"{coded}'"),
        Op("add", (plain, f"{coded}'"), f"{plain}'"),
        Op("mul", (f"{plain}'", f"{reduced}'"), "t1"),
        Op("mul", ("t1", "r1"), "t2"),
        Op("add_scaled", ("master", "t2", "s1"), "master'"),
    )
    written = (*names, "master")
    return Program(ops, tuple((name, f"{name}'") for name in written), 2, (reduced,))


def layout(names: Names) -> Layout:
    states = ((names[0], torch.int8), (names[1], torch.float32))
    return Layout(torch.bfloat16, "split", torch.bfloat16, states, reduced=names[2:])


def text(names: Names) -> str:
    return source(program(names), layout(names))


def identifiers(names: Names) -> list[list[str]]:
    """Those of each function of a module, in order, among marks of all else that it consists of."""
    found: list[list[str]] = []
    for function in ast.parse(text(names)).body:
        found.append([])
        for node in ast.walk(function):
            match node:
                case ast.Name(id=name) | ast.arg(arg=name) | ast.FunctionDef(name=name):
                    found[-1].append(name)
                case _:
                    found[-1].append(f".{type(node).__name__} {getattr(node, 'attr', '')}")
    return found


PLAIN: Names = ("alpha", "beta", "gamma")
EXPECTED = identifiers(PLAIN)
THEIRS = sorted({name for part in EXPECTED for name in part if name[0] != "."})
GLOBAL = {
    *("tl", "triton", "libdevice", "range", "float", "ALL", "larger", "smaller"),
    *("join", "split", "encode", "decode", "step", "reduce1", "finish1"),
}
ADVERSE = [
    *(
        "x",
        "x_pointer",
        "x_scale_pointer",
        "new_x",
        "x_part",
        "x_all",
        "next_x",
        "x_",
        "master_part",
    ),
    *(
        "0m",
        "²",
        "s²",
        "r²",
        "t٣",
        "mask_norm",
        "norm mask",
        "a\nb",
        "a\rimport os",
        "a\u2028b",
        "\x00",
    ),
    *(
        '"',
        '"""',
        "\\",
        "{}",
        "{0}",
        "%s",
        "a.b",
        "x.scale",
        "a b",
        "é",
        "名",
        "#",
        "range",
        "float",
    ),
    *("reduce0", "reduce1_rule", "finish0", "step_block", "weight_pointer", "grad_pointer"),
    *keyword.kwlist,
    *THEIRS,
]
NAMES = st.one_of(st.sampled_from(ADVERSE), st.text(max_size=8)).filter(is_free_name)


@example(("x", "x_pointer", "x_scale_pointer"))
@example(("mask_norm", "mask", "0m"))
@example(("a\nraise", "a\rb", "a\x0cb"))
@example(("s²", "²", "s_"))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(st.lists(NAMES, min_size=3, max_size=3, unique=True).map(tuple))
def test_generated_source_is_the_same_for_all_names_but_for_identifiers(names: Any) -> None:
    for found, expected in zip(identifiers(names), EXPECTED, strict=True):
        there = dict(zip(expected, found, strict=True))
        back = dict(zip(found, expected, strict=True))
        assert [there[name] for name in expected] == found
        assert [back[name] for name in found] == expected
        assert all(there.get(name, name) == name for name in GLOBAL)


def test_every_column_has_a_pointer_of_its_own() -> None:
    names = ("x", "x_pointer", "y")
    tree = ast.parse(text(names))
    (block,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "step_block")
    pointers = [arg.arg for arg in block.args.args if "pointer" in arg.arg]
    assert len(set(pointers)) == len(pointers) == len(columns(layout(names))) + 1


def test_a_formula_has_one_line_for_each_thing_whatever_its_name() -> None:
    lines = str(program(("a\nb", "c = d", "e"))).splitlines()
    assert len(lines) == len(str(program(PLAIN)).splitlines())
    assert "'c = d'' = 'c = d' + 'a\\nb''" in lines


# ---------------------------------------- rules with such names


class Named(Rule):
    """Two states and a count, called as one likes."""

    names: tuple[Any, ...] = ("exp_avg", "exp_avg_sq", "count")

    def update(self, group: Any, p: Any, grad: Tensor, state: Any) -> None:
        first, second, count = self.names
        state[count] = state.get(count, 0) + 1
        m = state.setdefault(first, torch.zeros_like(p))
        v = state.setdefault(second, torch.zeros_like(p))
        m.lerp_(grad, 0.1)
        v.mul_(0.9).addcmul_(grad, grad, value=0.1)
        p.addcdiv_(m, v.sqrt().add_(1e-3), value=-group["lr"] / state[count])


def low() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(p.detach().bfloat16()) for p in params()]


def stepped(optimizer: Any, steps: int = 3) -> Any:
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        for param in optimizer.param_groups[0]["params"]:
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("formats", [None, "bf16", "8bit"])
@pytest.mark.parametrize(
    "names",
    [
        ("m.scale", "v", "n"),
        ("m", "v.scale", "0m"),
        ("x", "x_pointer", "x.y"),
        ("a\nb", "²", "count.scale"),
        ("0m", "class", "grad"),
    ],
)
def test_a_rule_may_call_its_states_as_it_likes(names: Any, formats: Any) -> None:
    made = [Named(low()), Named(low())]
    made[1].names = names
    plain, odd = (
        stepped(mixprec.MixedPrecision(r, fused=True, state_formats=formats)) for r in made
    )
    for (_, left), (_, right) in zip(plain.masters(), odd.masters(), strict=True):
        assert torch.equal(left, right)
    rename = dict(zip(Named.names, names, strict=True)) | {"master": "master"}
    for left, right in zip(
        plain.state_dict()["state"].values(), odd.state_dict()["state"].values(), strict=True
    ):
        assert {rename[key] for key in left} == set(right)
        assert all(
            torch.equal(torch.as_tensor(left[k]), torch.as_tensor(right[rename[k]])) for k in left
        )


def test_a_state_that_lies_where_scales_would_be_is_refused() -> None:
    made = Named(low())
    made.names = ("m", "m.scale", "n")
    optimizer = mixprec.MixedPrecision(made, state_formats={"m": "int8"})
    with pytest.raises(
        ValueError, match=r"Named keeps a state called 'm.scale', where the scales of 'm'"
    ):
        stepped(optimizer, 1)
    made = Named(low())
    made.names = ("m", "m.scale", "n")
    stepped(mixprec.MixedPrecision(made, state_formats={"m.scale": "int8", "m": "bf16"}))


def test_codes_are_told_by_more_than_a_name() -> None:
    codes, scales = encode(torch.ones(40), torch.int8)
    assert scales_in({"m": codes, "m.scale": scales}, "m") is scales
    for entry in (
        {"m": torch.ones(40), "m.scale": scales},
        {"m": codes, "m.scale": torch.ones(40)},
        {"m": codes, "m.scale": 3.0},
        {"m": codes},
    ):
        assert scales_in(entry, "m") is None


@pytest.mark.parametrize("fused", [False, "auto", True])
@pytest.mark.parametrize("place", [0, 2])
def test_a_state_called_master_is_refused_where_there_are_masters(fused: Any, place: int) -> None:
    names = ["m", "v", "n"]
    names[place] = "master"
    made = Named(low())
    made.names = tuple(names)
    with pytest.raises(
        TypeError,
        match=r"keeps a state called 'master', where the FP32 masters .* rename it in the rule",
    ):
        stepped(mixprec.MixedPrecision(made, fused=fused), 1)


def test_a_state_called_master_is_the_rules_own_where_there_are_none() -> None:
    made = [Named(params()), Named(params())]
    for each in made:
        each.names = ("master", "v", "n")
    bare, ours = stepped(made[0]), stepped(mixprec.MixedPrecision(made[1]))
    for left, right in zip(bare.state.values(), ours.state.values(), strict=True):
        assert torch.equal(left["master"], right["master"])
    fresh = Named(params())
    fresh.names = ("master", "v", "n")
    with pytest.raises(
        TypeError, match="fused=True, but Named cannot run as one kernel: it keeps a state"
    ):
        stepped(
            mixprec.MixedPrecision(Named(params()), fused=True).__class__(made[1], fused=True), 1
        )


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t0", "a state called 't0' looks like a value of the program"),
        ("%0", "a state called '%0' looks like a value of the program"),
        ("#1", "a state called '#1' looks like a value of the program"),
        ("", "a state called '' looks like a value of the program"),
        (3, "a state called 3 looks like a value of the program"),
        ("a[0]", "a state called 'a\\[0\\]' looks like an item of a collection"),
    ],
)
def test_names_that_a_program_could_not_tell_are_refused(name: Any, text: str) -> None:
    made = Named(low())
    made.names = (name, "v", "n")
    with pytest.raises(TypeError, match=text):
        stepped(mixprec.MixedPrecision(made, fused=True), 1)
