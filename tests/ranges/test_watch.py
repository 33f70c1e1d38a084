from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from waiting import no_waiting

import mixprec
from mixprec.binades import BINS, Binades, count
from mixprec.float8 import Cast, Recipe
from mixprec.formats import E4M3
from mixprec.ranges.rows import Judge, Row
from mixprec.ranges.watch import Watch


def binades(*tensors: Tensor) -> Binades:
    counts = torch.zeros(BINS, dtype=torch.int64)
    for tensor in tensors:
        count(tensor, counts)
    return Binades(counts.tolist())


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fill(model: nn.Module) -> None:
    with torch.no_grad():
        for seed, parameter in enumerate(model.parameters()):
            parameter.copy_(random(*parameter.shape, seed=seed))


def two_linears() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4, bias=False))
    fill(model)
    return model


def last_weight(model: nn.Sequential) -> Tensor:
    return model.get_parameter("2.weight")


def rows_of(report: Watch) -> dict[str, Row]:
    rows = report.rows()
    named = {row.name: row for row in rows}
    assert len(named) == len(rows)
    return named


def hooks_of(model: nn.Module) -> int:
    modules = sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
        for m in model.modules()
    )
    return modules + sum(len(p._backward_hooks or ()) for p in model.parameters())


class Calls(nn.Module):
    """Passes everything on to a function that may use its linear layer in any way."""

    def __init__(self, act: Callable[[nn.Linear, Any], Any]) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.act = act
        fill(self)

    def forward(self, x: Any) -> Any:
        return self.act(self.inner, x)


# ------------------------------------------------------------------ what is counted


def test_every_tensor_of_every_layer_is_counted() -> None:
    model, inputs = two_linears(), [random(5, 8, seed=7), random(3, 8, seed=8)]
    expected: dict[str, list[Tensor]] = {}
    for x in inputs:
        first = model[0](x).detach().requires_grad_()
        middle = model[1](first)
        middle.retain_grad()
        last = model[2](middle).detach().requires_grad_()
        (last**2).sum().backward()
        assert last.grad is not None
        middle.backward(last.grad @ model[2].weight)
        assert first.grad is not None
        seen = {
            "0 input": x,
            "0 output": first,
            "0 grad_output": first.grad,
            "0 grad_weight": first.grad.t() @ x,
            "0 grad_bias": first.grad.sum(0),
            "2 input": middle,
            "2 output": last,
            "2 grad_output": last.grad,
            "2 grad_weight": last.grad.t() @ middle,
        }
        for name, tensor in seen.items():
            expected.setdefault(name, []).append(tensor)
    model.zero_grad()

    with mixprec.watch(model) as report:
        for x in inputs:
            (model(x) ** 2).sum().backward()

    for name, parameter in model.named_parameters():
        layer, _, role = name.partition(".")
        expected[f"{layer} {role}"] = [parameter]
    rows = rows_of(report)
    assert rows.keys() == expected.keys()
    wrong = [n for n, tensors in expected.items() if rows[n].binades != binades(*tensors)]
    assert not wrong


def test_rows_come_in_the_models_order_where_nothing_is_wrong() -> None:
    model = two_linears()
    with mixprec.watch(model) as report:
        model(random(5, 8)).sum().backward()
    assert [row.name for row in report.rows()] == [
        "0 input",
        "0 output",
        "0 weight",
        "0 bias",
        "0 grad_output",
        "0 grad_weight",
        "0 grad_bias",
        "2 input",
        "2 output",
        "2 weight",
        "2 grad_output",
        "2 grad_weight",
    ]
    assert report.warnings() == []


@pytest.mark.parametrize("every", [1, 2, 3])
def test_every_nth_call_and_every_nth_gradient_count(every: int) -> None:
    model = two_linears()
    with mixprec.watch(model, every=every) as report:
        for seed in range(7):
            model(random(5, 8, seed=seed)).sum().backward()
    rows, times = rows_of(report), len(range(0, 7, every))
    assert rows["0 input"].binades == binades(*(random(5, 8, seed=s) for s in range(0, 7, every)))
    for role, numel in [("output", 20), ("grad_output", 20), ("grad_weight", 64), ("weight", 64)]:
        assert rows[f"2 {role}"].binades.values == numel * (1 if role == "weight" else times)


def test_training_ends_with_the_same_bits_watched_or_not() -> None:
    def train(watched: bool) -> list[Tensor]:
        model = mixprec.cast_model(two_linears(), "bf16")
        optimizer = mixprec.MixedPrecision(torch.optim.AdamW(model.parameters(), lr=1e-2))
        accumulator = mixprec.GradientAccumulator(optimizer)
        report = mixprec.watch(model, every=2) if watched else None
        for step in range(4):
            for half in range(2):
                x = random(6, 8, seed=10 * step + half).bfloat16()
                accumulator.backward((model(x).float() ** 2).sum(), 6, last=half == 1)
            accumulator.step()
        if report is not None:
            assert len(report.stop().rows()) == 12
        return [*model.parameters(), *(master for _, master in optimizer.masters())]

    for plain, watched in zip(train(False), train(True), strict=True):
        assert torch.equal(plain, watched)


def test_calls_of_one_module_count_together() -> None:
    model = Calls(lambda inner, x: inner(inner(x)))
    x = random(3, 4)
    with mixprec.watch(model) as report:
        model(x).sum().backward()
    rows = rows_of(report)
    middle = model.inner(x)
    assert rows["inner input"].binades == binades(x, middle)
    assert rows["inner output"].binades == binades(middle, model.inner(middle))
    assert rows["inner grad_output"].binades.values == 24
    # A tied weight has one gradient a backward pass.
    assert rows["inner grad_weight"].binades.values == 16


@dataclass
class Result:
    hidden: Tensor
    name: str = "x"


@pytest.mark.parametrize(
    "wrap",
    [
        lambda a, b: (a, b),
        lambda a, b: [a, (b, None)],
        lambda a, b: {"a": a, "b": {"c": b}, "n": 3},
        lambda a, b: OrderedDict(a=Result(a), b=b, again=a),
    ],
)
def test_tensors_inside_containers_are_found_once(wrap: Callable[[Tensor, Tensor], Any]) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, tensors: Any, *, mask: Tensor) -> Any:
            return wrap(self.weight * a, self.weight * 2 * b)

    a, b = random(3, 4), random(2, 4, seed=1)
    model = Both()
    with mixprec.watch(model) as report:
        output = model(wrap(a, b), mask=torch.ones(3, dtype=torch.bool))
    assert type(output) is type(wrap(a, b))
    rows = rows_of(report)
    assert rows["(model) input"].binades == binades(a, b)
    assert rows["(model) output"].binades == binades(a, 2 * b)


def test_integers_and_empty_tensors_make_no_row() -> None:
    model = nn.Embedding(10, 4)
    fill(model)
    with mixprec.watch(model) as report:
        model(torch.tensor([1, 2])).sum().backward()
    roles = [row.role for row in report.rows()]
    assert roles == ["output", "weight", "grad_output", "grad_weight"]

    linear = nn.Linear(4, 4, bias=False)
    with mixprec.watch(linear) as report:
        linear(torch.zeros(0, 4)).sum().backward()
    assert [row.role for row in report.rows()] == ["weight", "grad_weight"]
    assert report.rows()[1].zeros == 1.0
    assert report.uncalled() == []


def test_sparse_gradients_count_their_values() -> None:
    model = nn.Embedding(10, 4, sparse=True)
    with mixprec.watch(model) as report:
        model(torch.tensor([1, 2, 1])).sum().backward()
    assert rows_of(report)["(model) grad_weight"].binades == binades(torch.ones(3, 4))


def test_frozen_tied_and_unused_parameters() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(10, 4)
            self.frozen = nn.Linear(4, 4).requires_grad_(False)
            self.unused = nn.Linear(4, 4)
            self.head = nn.Linear(4, 10, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.frozen(self.embedding(tokens)))

    model = Tied()
    fill(model)
    with mixprec.watch(model) as report:
        model(torch.tensor([1, 2])).sum().backward()
    rows = rows_of(report)
    assert "frozen weight" in rows and "frozen grad_output" in rows
    assert "frozen grad_weight" not in rows
    assert "unused weight" in rows and "unused grad_weight" not in rows
    assert rows["embedding weight"].also == ("head",)
    assert "head weight" not in rows
    assert "shared with head" in report.html()
    assert report.uncalled() == ["unused"]
    assert report.warnings()[-1].startswith("1 of 4 layers were not called (unused): no step ran, ")


def test_an_output_changed_in_place_later_counts_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
    fill(model)
    x = random(8, 4)
    with mixprec.watch(model) as report:
        model(x).sum().backward()
    rows = rows_of(report)
    assert rows["0 output"].binades == binades(model[0](x))
    assert rows["0 grad_output"].binades == binades((model[0](x) > 0).float())


def test_a_module_that_returns_its_parameter_keeps_no_hook() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.ones(4))

        def forward(self) -> Tensor:
            return self.table

    model = Positions()
    with mixprec.watch(model) as report:
        for _ in range(3):
            model().sum().backward()
    rows = rows_of(report)
    assert rows.keys() == {"(model) output", "(model) table", "(model) grad_table"}
    assert rows["(model) grad_table"].binades.values == 12
    assert hooks_of(model) == 0


def test_parametrized_weights_count_as_what_is_trained() -> None:
    model = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    with mixprec.watch(model) as report:
        model(random(2, 4)).sum().backward()
    names = {row.role for row in report.rows()}
    assert {"weight.original0", "weight.original1", "grad_weight.original1", "bias"} <= names
    assert {row.layer for row in report.rows()} == {""}


def test_checkpointed_layers_count_their_gradients_once() -> None:
    model = Calls(lambda inner, x: checkpoint(inner, x, use_reentrant=False))
    with mixprec.watch(model) as report:
        model(random(3, 4).requires_grad_()).sum().backward()
    rows = rows_of(report)
    assert rows["inner grad_output"].binades.values == 12
    assert rows["inner grad_weight"].binades.values == 16
    assert rows["inner input"].rates == binades(random(3, 4)).rates(mixprec.formats.E4M3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_are_told_and_judge_what_no_product_reads(dtype: torch.dtype) -> None:
    model = two_linears().to(dtype)
    with mixprec.watch(model) as report:
        model(random(5, 8).to(dtype)).sum().backward()
    rows = rows_of(report)
    assert {row.dtypes for row in rows.values()} == {(str(dtype).removeprefix("torch."),)}
    own = None if dtype == torch.float64 else mixprec.formats.by_dtype(dtype)
    assert rows["0 output"].format == rows["0 grad_weight"].format == own
    assert rows["0 input"].format == rows["0 weight"].format == mixprec.formats.E4M3
    assert rows["0 grad_output"].format == mixprec.formats.E5M2


def test_under_autocast_a_tensor_in_two_dtypes_is_judged_by_the_narrower() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    with mixprec.watch(model) as report:
        model(random(2, 4))
        with torch.autocast("cpu", torch.float16):
            model(random(2, 4))
    row = rows_of(report)["0 output"]
    assert row.dtypes == ("float32", "float16") and row.format == mixprec.formats.FP16


def test_inference_mode_first_and_training_later_add_up() -> None:
    model = two_linears()
    with mixprec.watch(model) as report:
        with torch.inference_mode():
            model(random(5, 8))
        model(random(5, 8)).sum().backward()
    rows = rows_of(report)
    assert rows["0 input"].binades == binades(random(5, 8), random(5, 8))
    assert rows["0 grad_output"].binades.values == 80


# ------------------------------------------------------------------ starting and stopping


def test_after_stop_no_hook_is_left_and_nothing_counts() -> None:
    model = two_linears()
    assert hooks_of(model) == 0
    report = mixprec.watch(model)
    assert hooks_of(model) == 4 + 3
    late = model(random(5, 8))
    report.stop()
    assert hooks_of(model) == 0 and not report.running
    weights = binades(last_weight(model))
    late.sum().backward()  # its hooks are on the graph, and stay there
    model(random(5, 8)).sum().backward()
    with torch.no_grad():
        last_weight(model).mul_(2)
    rows = report.stop().rows()
    assert {row.role for row in rows} == {"input", "output", "weight", "bias"}
    assert rows_of(report)["2 input"].binades.values == 80
    assert rows_of(report)["2 weight"].binades == weights
    assert report.rows() is rows


def test_an_error_inside_removes_the_hooks_too() -> None:
    model = two_linears()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), mixprec.watch(model):
        model(random(5, 7))
    assert hooks_of(model) == 0


def test_a_stopped_report_keeps_no_model_alive() -> None:
    import weakref

    model = two_linears()
    with mixprec.watch(model) as report:
        model(random(5, 8)).sum().backward()
    reference = weakref.ref(model[0])
    del model
    assert reference() is None and len(report.rows()) == 12


def test_reading_on_the_way_shows_parameters_as_they_are_then() -> None:
    model = two_linears()
    with mixprec.watch(model) as report:
        for factor in (1.0, 4.0):
            with torch.no_grad():
                last_weight(model).mul_(factor)
            assert rows_of(report)["2 weight"].binades == binades(last_weight(model))
        model.load_state_dict(two_linears().state_dict(), assign=True)
        assert rows_of(report)["2 weight"].binades == binades(last_weight(model))
    assert rows_of(report)["2 weight"].binades == binades(last_weight(model))


def test_watches_of_one_model_do_not_see_each_other() -> None:
    model = two_linears()
    outer = mixprec.watch(model)
    inner = mixprec.watch(model[2])
    model(random(5, 8)).sum().backward()
    outer.stop()  # not the one begun last
    model(random(5, 8)).sum().backward()
    inner.stop()
    assert hooks_of(model) == 0
    assert rows_of(outer)["2 input"].binades.values == 80
    assert rows_of(inner)["(model) input"].binades.values == 160


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_a_watched_model_is_not_watched(
    duplicate: Callable[[nn.Module], nn.Module],
) -> None:
    model = two_linears()
    with mixprec.watch(model) as report:
        copied = duplicate(model)
        copied(random(5, 8)).sum().backward()
        assert report.uncalled() == ["0", "2"]
        assert {row.role for row in report.rows()} == {"weight", "bias"}
        model(random(5, 8)).sum().backward()
    assert rows_of(report)["0 input"].binades.values == 40


def test_the_state_dict_is_untouched() -> None:
    model = two_linears()
    with mixprec.watch(model):
        model(random(5, 8)).sum().backward()
        assert list(model.state_dict()) == list(two_linears().state_dict())


def test_compiled_code_is_left_alone_and_the_report_says_so() -> None:
    # Hooks that are there when a graph is captured must not break it: fullgraph raises if they do.
    model = two_linears()
    plain = model(random(5, 8))
    report = mixprec.watch(model)
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(random(5, 8)), plain)
    compiled(random(5, 8)).sum().backward()
    assert report.uncalled() == ["0", "2"]
    assert (
        'run the watched steps in `with torch.compiler.set_stance("force_eager"):`'
        in (report.warnings()[-1])
    )
    # A compiled module may be given as well, and its layers have the names they always had.
    again = mixprec.watch(compiled)
    with torch.compiler.set_stance("force_eager"):
        compiled(random(5, 8)).sum().backward()
    torch.compiler.reset()
    compiled(random(5, 8)).sum().backward()  # captured anew, after a call that counted
    for each in (report, again):
        each.stop()
        assert each.uncalled() == []
        assert rows_of(each)["0 input"].binades == binades(random(5, 8))
    assert hooks_of(model) == 0
    torch.compiler.reset()


# ------------------------------------------------------------------ which layers


def block() -> nn.ModuleDict:
    parts = {"norm": nn.LayerNorm(4), "up": nn.Linear(4, 8), "down": nn.Linear(8, 4)}
    model = nn.ModuleDict(parts)
    fill(model)
    return model


@pytest.mark.parametrize(
    ("include", "exclude", "names"),
    [
        (None, (), ["norm", "up", "down"]),
        (("linear",), (), ["up", "down"]),
        (None, ("*norm*",), ["up", "down"]),
        (("up", "down"), ("down",), ["up"]),
    ],
)
def test_patterns_choose_layers(
    include: tuple[str, ...] | None, exclude: tuple[str, ...], names: list[str]
) -> None:
    with mixprec.watch(block(), include=include, exclude=exclude) as report:
        pass
    assert list(dict.fromkeys(row.layer for row in report.rows())) == names


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="watch got a list; give it the model"):
        mixprec.watch([nn.Linear(2, 2)])  # pyright: ignore[reportArgumentType]
    for every in (0, -1, 2.0, None):
        with pytest.raises(ValueError, match=rf"every={every}; 1 counts in each call, n in every "):
            mixprec.watch(block(), every=every)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"include is a sequence of patterns; write include=\('up'"):
        mixprec.watch(block(), include="up")
    with pytest.raises(TypeError, match=r"exclude is a sequence of patterns; write exclude=\('up'"):
        mixprec.watch(block(), exclude="up")
    with pytest.raises(ValueError, match=r"pattern 'dwon' matches no layer .* names: down"):
        mixprec.watch(block(), include=("up", "dwon"))
    with pytest.raises(
        ValueError, match=r"include=\('up',\) and exclude=\('up',\) leave none of 3"
    ):
        mixprec.watch(block(), include=("up",), exclude=("up",))
    with pytest.raises(ValueError, match="the model owns no floating-point parameters"):
        mixprec.watch(nn.ReLU())
    with pytest.raises(
        ValueError, match=r"0\.weight has no shape yet; run a batch through the mod"
    ):
        mixprec.watch(nn.Sequential(nn.LazyLinear(3)))


# ------------------------------------------------------------------ what is said


def stack(sizes: list[float]) -> nn.ModuleList:
    return nn.ModuleList(
        nn.ModuleDict({"down": nn.Linear(64, 64, bias=False)}) for _ in range(len(sizes))
    )


def watched(sizes: list[float]) -> Watch:
    """The report on layers whose inputs have these sizes."""
    layers = stack(sizes)
    with mixprec.watch(layers) as report, torch.no_grad():
        for layer, size in zip(layers, sizes, strict=True):
            layer["down"](size * random(64, 64))  # pyright: ignore[reportIndexIssue]
    return report


def test_a_sentence_names_the_layer_the_loss_and_the_exponents_that_fit() -> None:
    report = watched([1.0, 300.0])
    assert report.warnings() == [
        "1.down input: 13 % of values are above E4M3's 448 at exponent 0. It needs exponent -4 "
        "(-14 to -2 fit). Write mixprec.Precision('fp8').convert(model, overrides={'1.down': "
        "'adaptive'}), which finds it, or overrides={'1.down': mixprec.float8.Recipe("
        "input=mixprec.float8.Cast(exponent=-4))}, which sets it."
    ]
    row = report.rows()[0]
    assert row.fix == -4 and row.name == "1.down input"
    x = 300.0 * random(64, 64)
    assert row.rates.saturated == float((x.abs() > 448).double().mean())
    for exponent, fits in [(-15, False), (-14, True), (-8, True), (-2, True), (-1, False)]:
        assert binades(x * 2.0**exponent).rates(mixprec.formats.E4M3).fits == fits


def test_layers_that_differ_in_a_number_share_a_sentence() -> None:
    assert watched([300.0, 1.0, 3000.0, 1e-6]).warnings() == [
        "*.down input in 2 layers, worst in 2.down: 87 % of values are above E4M3's 448 at "
        "exponent 0. They need exponents -7 to -4. Write mixprec.Precision('fp8').convert(model, "
        "overrides={'*.down': 'adaptive'}), which finds them.",
        "3.down input: 100 % of values become 0 in E4M3 at exponent 0. It needs exponent +24 (+15 "
        "to +26 fit). Write mixprec.Precision('fp8').convert(model, overrides={'3.down': "
        "'adaptive'}), which finds it, or overrides={'3.down': mixprec.float8.Recipe("
        "input=mixprec.float8.Cast(exponent=24))}, which sets it.",
    ]
    # The last part of a name tells the layers of one block apart.
    model = two_linears()
    with mixprec.watch(model) as report, torch.no_grad():
        model(torch.full((1, 8), 1e4))
        model[2](torch.full((1, 16), 1e4))
    assert [w.partition(":")[0] for w in report.warnings()] == ["0 input", "2 input"]


def test_a_tensor_too_wide_for_any_exponent_is_told_so() -> None:
    model = nn.Linear(64, 64, bias=False)
    with torch.no_grad():
        model.weight.copy_(2.0 ** torch.linspace(-40, 20, 64 * 64).view(64, 64))
    with mixprec.watch(model) as report:
        model(random(8, 64))
    assert report.warnings()[0] == (
        "(model) weight: 19 % of values are above E4M3's 448 and 50 % of values become 0 in E4M3 "
        "at exponent 0. No exponent holds both its ends. Write mixprec.Precision('fp8').convert("
        "model, overrides={'*': 'rowwise'}), which gives each row its own, or "
        "overrides={'*': 'bf16'}."
    )


def test_inf_and_nan_come_first() -> None:
    model = two_linears()
    x = 300 * random(64, 8)
    x[0, 0], x[1, 0] = float("inf"), float("nan")
    with mixprec.watch(model) as report:
        model(x)
    assert report.rows()[0].nonfinite
    assert report.warnings()[0] == (
        "0 input: 1 inf and 1 NaN among 512 values. No exponent mends that: find the first layer "
        "that makes them."
    )


def test_small_fp16_gradients_want_a_higher_loss_scale_and_activations_bf16() -> None:
    model = nn.LayerNorm(64).half()
    with mixprec.watch(model) as report:
        (model(random(64, 64).half()) * 2.0**-20).sum().backward()
        grads = rows_of(report)["(model) grad_output"]
    assert grads.rates.subnormal == 1.0
    said = {w.partition(":")[0]: w for w in report.warnings()}
    assert said["(model) grad_output"] == (
        "(model) grad_output: 100 % of values are in FP16's subnormals, where digits get lost, and "
        "0 are 0. Raise the loss scale 2^6 times, or let it find its size: "
        "mixprec.MixedPrecision(optimizer, loss_scaler=mixprec.DynamicLossScaler())."
    )
    model = nn.LayerNorm(64).half()
    with mixprec.watch(model) as report:
        model(1e-6 * random(64, 64).half())
    assert report.warnings()[0].endswith(
        "are 0. Hold it in BF16: mixprec.cast_model(model, 'bf16')."
    )


def test_the_table_has_a_line_a_tensor_and_the_sentences_follow() -> None:
    report = watched([1.0, 300.0])
    lines = str(report).splitlines()
    assert lines[0].split() == [
        *("layer", "role", "dtype", "binades", "zero", "as", "saturated", "to", "zero", "use")
    ]
    assert lines[1].split() == ("1.down input float32 2^-3 to 2^11 0 e4m3 13 % 0 -4".split())
    assert len(lines) == 1 + 6 + 1 + 1
    assert lines[-1] == report.warnings()[0]
    assert str(watched([1.0])).count("\n") == 3  # nothing to say


# ------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_host_does_not_wait_until_the_report_is_read(dtype: torch.dtype) -> None:
    model = two_linears().cuda().to(dtype)
    x = random(64, 8).to(dtype).cuda()
    report = mixprec.watch(model)
    with no_waiting():
        for _ in range(3):
            (model(x).float() ** 2).sum().backward()
        report.stop()
    rows = rows_of(report)
    assert len(rows) == 12
    counted = {name: row.binades.values for name, row in rows.items()}
    assert counted["0 input"] == 3 * 512 and counted["0 grad_weight"] == 3 * 128
    assert rows["0 input"].binades == binades(*[x.cpu()] * 3)
    assert rows["2 weight"].binades == binades(last_weight(model).cpu())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_replays_of_a_cuda_graph_count() -> None:
    model = two_linears().cuda()
    x = random(64, 8).cuda()
    report = mixprec.watch(model)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.no_grad():
        model(x)  # the counters are made here, outside the graph
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        model(x)
    for _ in range(5):
        graph.replay()
    report.stop()
    assert rows_of(report)["0 input"].binades == binades(*[x.cpu()] * 6)


def test_loss_layers_of_the_library_are_watched_too() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    head = mixprec.LinearCrossEntropy(8, 20)
    whole = nn.ModuleDict({"body": model, "head": head})
    with mixprec.watch(whole) as report:
        loss, tokens = head(model(random(6, 8)), torch.arange(6))
        (loss / tokens).backward()
    rows = rows_of(report)
    assert rows["head grad_weight"].binades.values == 160
    assert torch.isfinite(F.softmax(loss, 0)).all()


def test_gradients_of_a_mean_become_zero_and_the_last_sentence_says_so() -> None:
    def warnings(reduction: str) -> list[str]:
        model = nn.Linear(64, 256, bias=False)
        fill(model)
        with mixprec.watch(model) as report:
            logits = model(random(4096, 64) / 8)
            F.cross_entropy(logits, torch.arange(4096) % 256, reduction=reduction).backward()
        return report.warnings()

    assert warnings("sum") == []
    flushed, cause = warnings("mean")
    assert "grad_output: 99 % of values become 0 in E5M2 at exponent 0. It needs" in flushed
    assert cause == (
        "Gradients become 0. If the loss is a mean over n tokens, they are n times smaller than a "
        "sum's: write reduction='sum', and mixprec.GradientAccumulator(optimizer, "
        "presumed_tokens=1) divides at the step. If it is a sum already, they are that small, and "
        "exponents that adapt lift them: mixprec.Precision('fp8', recipe='adaptive')."
    )


# ------------------------------------------------------------------ layers in FP8 already


def converted(recipe: Any, size: float, steps: int = 2) -> tuple[list[Tensor], Watch]:
    """Gradients and the report of a model in FP8 whose inputs have that size."""
    model = nn.Sequential(nn.Linear(32, 64, bias=False), nn.Tanh(), nn.Linear(64, 32))
    fill(model)
    mixprec.Precision("fp8", recipe=recipe).convert(model, min_dim=16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    grads: list[Tensor] = []
    with mixprec.watch(model) as report:
        for step in range(steps):
            optimizer.zero_grad()
            x = size * random(48, 32, seed=step)
            model(x.bfloat16()).float().square().sum().backward()
            optimizer.step()
            grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return grads, report


def test_a_layer_in_fp8_is_judged_by_its_own_cast() -> None:
    fits = Recipe(input=Cast(exponent=-10))
    _, report = converted(fits, 1e5)
    row = rows_of(report)["0 input"]
    assert (row.kind, row.exponent, row.judge.cast) == ("Float8Linear", -10, Cast(exponent=-10))
    assert row.fault is None and row.rates == row.binades.rates(mixprec.formats.E4M3, -10)
    assert "judged as e4m3 at exponent -10" in report.html()

    _, report = converted("static", 1e5)
    row = rows_of(report)["0 input"]
    assert row.fault is not None and row.fault.startswith(
        "100 % of values are above E4M3's 448 at exponent 0. It needs exponent -"
    )

    lifted = Recipe(input=Cast(exponent=12))
    _, report = converted(lifted, 1.0)
    row = rows_of(report)["0 input"]
    assert row.fault == (
        "91 % of values are above E4M3's 448 at exponent +12. It needs exponent +4 (-5 to +6 fit). "
        "Write mixprec.Precision('fp8').revert(model) and convert(model, overrides={'0': "
        "'adaptive'}), which finds it, or overrides={'0': mixprec.float8.Recipe("
        "input=mixprec.float8.Cast(exponent=4))}, which sets it."
    )


def test_adaptive_exponents_are_those_that_they_have_come_to() -> None:
    _, report = converted("adaptive", 1e5)
    row = rows_of(report)["0 input"]
    assert row.judge.cast == Cast(scaling="adaptive") and row.exponent < -8
    assert row.fault is None


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_dynamic_multipliers_are_not_blamed_for_the_size_of_a_tensor(recipe: str) -> None:
    for size in (1e-5, 1e5):
        _, report = converted(recipe, size)
        row = rows_of(report)["0 input"]
        assert row.fault is None
        assert row.format == (mixprec.formats.BF16 if recipe == "rowwise" else mixprec.formats.E4M3)


def test_watching_a_layer_in_fp8_changes_no_bit() -> None:
    watched, _ = converted("static", 1.0)
    model = nn.Sequential(nn.Linear(32, 64, bias=False), nn.Tanh(), nn.Linear(64, 32))
    fill(model)
    mixprec.Precision("fp8", recipe="static").convert(model, min_dim=16)
    model(random(48, 32, seed=1).bfloat16()).float().square().sum().backward()
    plain = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(plain) == len(watched) == 3
    assert all(map(torch.equal, plain, watched))


def test_exponents_that_move_after_the_end_are_not_the_reports() -> None:
    model = nn.Linear(32, 64)
    mixprec.Precision("fp8", recipe="static").convert(model, min_dim=16)
    with mixprec.watch(model) as report:
        model(random(16, 32).bfloat16())
    state: Any = model._float8
    state.input.scale.mul_(4.0)
    assert rows_of(report)["(model) input"].exponent == 0


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_wrappers_of_torch_distributed_are_watched_under_the_models_own_names() -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = two_linears()
        parallel = nn.parallel.DistributedDataParallel(model)
        with mixprec.watch(parallel) as report:
            parallel(random(5, 8)).sum().backward()
        plain = rows_of(report)
        assert len(plain) == 12 and plain["0 grad_weight"].binades.values == 128

        sharded = two_linears()
        fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
        with mixprec.watch(sharded) as report:
            sharded(random(5, 8)).sum().backward()
        rows = rows_of(report)
        # Gradients of parameters pass no hook there.
        assert rows.keys() == {name for name in plain if "grad_" not in name or "output" in name}
        assert all(rows[name].binades == plain[name].binades for name in rows)
    finally:
        dist.destroy_process_group()


LIMITS = {
    # How many of so many values may be lost at most, one that is, and the exponent that holds it.
    "saturated": (1, 10_000, 1000.0, -3),
    "flushed": (5, 100, 2.0**-12, 6),
}


@pytest.mark.parametrize("limit", LIMITS)
def test_a_tensor_that_loses_no_more_than_it_may_is_left_at_its_exponent(limit: str) -> None:
    most, among, lost, exponent = LIMITS[limit]
    for number, fix in ((most, None), (most + 1, exponent)):
        values = torch.ones(among)
        values[:number] = lost
        judged = Row("a", "Linear", "input", ("float32",), Judge(E4M3), binades(values))
        assert judged.fix == fix
        assert (judged.fault is None) is (fix is None)


def test_names_are_those_of_the_bare_model() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = nn.Sequential(nn.Linear(4, 4), checkpoint_wrapper(nn.Linear(4, 4)))
    report = mixprec.watch(model)
    model(random(5, 4)).sum().backward()
    report.stop()
    assert {name.split()[0] for name in rows_of(report)} == {"0", "1"}
