from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mixprec.formats import BF16, E4M3, FP16, FP32
from mixprec.precision import Precision, cast_model

# Precision


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_a_preset_stores_and_computes_in_one_format_and_sums_in_fp32(name: Any) -> None:
    precision = Precision(name)
    assert precision.params.name == precision.compute.name == name
    assert precision.grads == precision.reduce == FP32
    assert Precision.parse(name) == precision


@pytest.mark.parametrize(
    ("text", "precision"),
    [
        ("params=bf16,grads=fp32", Precision("bf16")),
        ("params=fp16", Precision("fp16")),
        ("compute=bf16", Precision(compute=BF16)),
        ("params=bf16, grads=bf16, reduce=float16", Precision("bf16", grads=BF16, reduce=FP16)),
        (" bf16 ", Precision("bf16")),
    ],
)
def test_parse_gives_what_the_constructor_gives(text: str, precision: Precision) -> None:
    assert Precision.parse(text) == precision


def test_a_printed_precision_parses_to_itself() -> None:
    precision = Precision("bf16", grads=BF16, reduce=FP16)
    assert str(precision) == "params=bf16,compute=bf16,grads=bf16,reduce=fp16"
    assert Precision.parse(str(precision)) == precision


def test_a_precision_is_a_value() -> None:
    precision = Precision("fp16")
    assert pickle.loads(pickle.dumps(precision)) == precision
    assert len({precision, Precision("fp16"), Precision("bf16")}) == 2
    with pytest.raises(AttributeError, match="cannot assign to field 'params'"):
        precision.params = BF16  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "int8",
            r"unknown precision 'int8'; use one of 'fp32', 'bf16', 'fp16', 'fp8', or "
            r"Precision.parse",
        ),
        ("params=bf16,recipe=best", r"unknown recipe 'best'; use one of 'static', 'adaptive', "),
        ("grad=fp32", r"field 'grad' .* is not one of params, compute, grads, reduce"),
        ("params=bf16,bf16", r"field 'bf16' in precision 'params=bf16,bf16' is not one of params"),
        ("grads=fp32,grads=bf16", r"field 'grads' .* is given twice"),
        ("params=bf17", r"unknown format 'bf17'; use one of fp32"),
        ("params=e4m3", r"params=e4m3 has 8 bits, too few for params; use fp32, bf16 or fp16"),
        ("params=bf16,compute=fp16", r"params=bf16 cannot compute in fp16.*Use compute=bf16"),
        ("params=bf16,grads=fp16", r"grads=fp16 is neither compute=bf16.*Use grads=fp32"),
    ],
)
def test_a_precision_that_cannot_be_is_refused_with_a_remedy(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Precision.parse(text)


def test_the_constructor_refuses_what_is_no_preset_and_no_format() -> None:
    anything: Any = torch.bfloat16
    with pytest.raises(ValueError, match=r"unknown precision torch.bfloat16; use one of 'fp32'"):
        Precision(anything)
    with pytest.raises(TypeError, match=r"compute=torch.bfloat16 is not a Format; use mixprec"):
        Precision(compute=anything)
    with pytest.raises(ValueError, match=r"reduce=e4m3 has 8 bits, too few for reduce"):
        Precision(reduce=E4M3)


def test_only_fp16_needs_a_loss_scale() -> None:
    needing = [p for p in ("fp32", "bf16", "fp16") if Precision.parse(p).needs_loss_scale]
    assert needing == ["fp16"]


def test_explain_says_what_the_loop_has_to_do() -> None:
    assert Precision("fp32").explain() == (
        "Parameters are held in fp32, 4 bytes each.\n"
        "Gradients have the range of FP32 in fp32: no loss scale is needed.\n"
        "Micro-batches sum gradients in fp32, exact enough for any number of micro-batches; "
        "ranks sum them in fp32."
    )
    fp16 = Precision("fp16").explain()
    assert "An update below 0.00049 of a weight would be rounded away" in fp16
    assert "Gradients below 3e-08 become zero in fp16: scale the loss" in fp16
    autocast = Precision(compute=BF16, grads=BF16).explain()
    assert "run the forward pass in torch.autocast(device, dtype=torch.bfloat16)" in autocast
    assert "sum gradients in bf16, which stops growing after 256 equal addends" in autocast


@pytest.mark.parametrize(("format", "limit"), [(BF16, 256), (FP16, 2048)])
def test_a_sum_of_equal_gradients_stops_growing_where_explain_says(format: Any, limit: int) -> None:
    total, one = torch.zeros((), dtype=format.dtype), torch.ones((), dtype=format.dtype)
    for _ in range(2 * limit):
        total += one
    assert total.item() == limit


def test_fsdp_policy_casts_parameters_only_where_compute_differs() -> None:
    stored = Precision("bf16").fsdp_policy()
    assert (stored.param_dtype, stored.reduce_dtype) == (None, torch.float32)
    cast = Precision(compute=BF16, reduce=BF16).fsdp_policy()
    assert (cast.param_dtype, cast.reduce_dtype) == (torch.bfloat16, torch.bfloat16)


# cast_model


class Scaled(nn.Module):
    """Two tensors in, a dict out, weights and buffers of several kinds."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((4,), 1.001))
        self.register_buffer("steps", torch.tensor(7))
        self.register_buffer("table", torch.full((4,), 257.0))
        self.seen: list[torch.dtype] = []

    def forward(self, x: Tensor, *, extra: dict[str, Any] | None = None) -> dict[str, Any]:
        self.seen = [x.dtype]
        if extra is not None:
            self.seen += [extra["pair"][0].dtype, extra["index"].dtype]
        return {"out": x * self.weight, "pair": (x + self.table, 3), "index": torch.arange(2)}


class PreNorm(nn.Module):
    """A container that has a norm's name and no weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(4)
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.norm(x))


class BatchNormAct(nn.BatchNorm1d):
    """A norm that has a child."""

    def __init__(self) -> None:
        super().__init__(4)
        self.act = nn.ReLU()


def bf16_rows(rows: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed)).bfloat16()


def dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in model.state_dict().items()}


def num_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("text", ["bf16", "fp16"])
def test_without_islands_the_result_is_bitwise_that_of_torch(text: str) -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.LSTM(4, 4))
    expected = copy.deepcopy(model).to(Precision.parse(text).params.dtype)
    assert cast_model(model, text, keep_fp32=()) is model
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        assert ours.dtype == theirs.dtype and ours.equal(theirs)
    assert num_hooks(model) == 0


def test_norms_stay_fp32_by_name_or_by_class() -> None:
    model = nn.ModuleDict(
        {
            "a": nn.LayerNorm(4),
            "b": nn.BatchNorm1d(4),
            "my_norm": nn.Linear(4, 4),
            "c": nn.Linear(4, 4),
        }
    )
    cast_model(model, "bf16")
    kept = {name for name, dtype in dtypes(model).items() if dtype == torch.float32}
    assert kept == {
        *("a.weight", "a.bias", "my_norm.weight", "my_norm.bias"),
        *("b.weight", "b.bias", "b.running_mean", "b.running_var"),
    }
    assert dtypes(model)["b.num_batches_tracked"] == torch.int64


def test_a_container_named_like_a_norm_is_cast_but_the_norm_in_it_is_kept() -> None:
    model = cast_model(nn.Sequential(PreNorm(), BatchNormAct()), "bf16")
    assert dtypes(model)["0.inner.weight"] == torch.bfloat16
    assert dtypes(model)["0.norm.weight"] == torch.float32
    assert dtypes(model)["1.running_mean"] == torch.float32
    assert model(bf16_rows()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("pattern", "kept"),
    [
        ("lm_head", {"lm_head"}),
        ("LM_*", {"lm_head"}),
        ("embedding", {"embed"}),
        ("blocks.1.*", {"blocks.1.norm", "blocks.1.inner"}),
        ("blocks.1", {"blocks.1.norm", "blocks.1.inner"}),
        ("*.inner", {"blocks.0.inner", "blocks.1.inner"}),
        ("inner", {"blocks.0.inner", "blocks.1.inner"}),
        ("blocks", {f"blocks.{i}.{name}" for i in (0, 1) for name in ("norm", "inner")}),
        ("prenorm", {f"blocks.{i}.{name}" for i in (0, 1) for name in ("norm", "inner")}),
        ("?inear", {"lm_head", "blocks.0.inner", "blocks.1.inner"}),
    ],
)
def test_patterns_match_names_and_classes_without_case(pattern: str, kept: set[str]) -> None:
    blocks = nn.ModuleList([PreNorm(), PreNorm()])
    model = nn.ModuleDict(
        {"embed": nn.Embedding(3, 4), "blocks": blocks, "lm_head": nn.Linear(4, 3)}
    )
    cast_model(model, "bf16", keep_fp32=(pattern,))
    found = {name for name, dtype in dtypes(model).items() if dtype == torch.float32}
    assert {name.rpartition(".")[0] for name in found} == kept


def test_an_island_computes_in_fp32_and_rounds_once() -> None:
    norm = nn.LayerNorm(4)
    nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(1))
    expected = copy.deepcopy(norm)
    model = cast_model(nn.Sequential(norm), "bf16")
    rows = bf16_rows()
    assert model(rows).equal(expected(rows.float()).bfloat16())


def test_gradients_pass_an_island_in_both_formats() -> None:
    model = cast_model(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)), "bf16")
    model(bf16_rows()).sum().backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert {name: grad.dtype for name, grad in grads.items() if grad is not None} == dtypes(model)


def test_batch_statistics_of_an_island_keep_moving() -> None:
    norm = nn.BatchNorm1d(4, momentum=1e-3)
    reference = copy.deepcopy(norm)
    model = cast_model(nn.Sequential(nn.Identity(), norm), "bf16")
    for seed in range(5):
        # From mean 1 a BF16 average would take no step of 1e-3: half a unit is 2e-3 there.
        model(bf16_rows(seed=seed) + 1)
        reference((bf16_rows(seed=seed) + 1).float())
    assert norm.running_mean is not None and reference.running_mean is not None
    assert norm.running_mean.equal(reference.running_mean)
    assert norm.running_mean.dtype == torch.float32
    assert norm.num_batches_tracked is not None and norm.num_batches_tracked.item() == 5


def test_nested_and_keyword_tensors_are_cast_at_the_edge_and_integers_are_not() -> None:
    module = Scaled()
    model = cast_model(nn.ModuleDict({"island": module}), "bf16", keep_fp32=("island",))
    extra = {"pair": (bf16_rows(), "text"), "index": torch.arange(3)}
    result = model["island"](bf16_rows(), extra=extra)
    assert module.seen == [torch.float32, torch.float32, torch.int64]
    assert result["out"].dtype == result["pair"][0].dtype == torch.bfloat16
    assert result["pair"][1] == 3 and result["index"].dtype == torch.int64
    assert extra["pair"][0].dtype == torch.bfloat16  # the caller's own structure is not edited


def test_only_the_outermost_of_nested_islands_translates() -> None:
    model = cast_model(nn.Sequential(PreNorm()), "bf16", keep_fp32=("prenorm", "norm"))
    (outer,) = model.children()
    assert num_hooks(model) == len(outer._forward_hooks) + len(outer._forward_pre_hooks) == 2
    assert model(bf16_rows()).dtype == torch.bfloat16


def test_buffers_outside_islands_are_cast_and_integer_buffers_are_not() -> None:
    model = cast_model(nn.Sequential(Scaled()), "bf16")
    expected = {"weight": torch.bfloat16, "steps": torch.int64, "table": torch.bfloat16}
    assert dtypes(model[0]) == expected
    assert model.get_buffer("0.steps").item() == 7


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_islands_survive_deepcopy_and_pickle(copied: Any) -> None:
    model = cast_model(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)), "bf16")
    twin = copied(model)
    assert twin(bf16_rows()).equal(model(bf16_rows()))
    cast_model(twin, "fp32")
    assert num_hooks(twin) == 0 and num_hooks(model) == 2
    assert model(bf16_rows()).dtype == torch.bfloat16


def test_hooks_added_after_unpickling_in_a_fresh_process_replace_none_of_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stored = pickle.dumps(cast_model(nn.Sequential(nn.LayerNorm(4)), "bf16"))
    monkeypatch.setattr(RemovableHandle, "next_id", 0)  # where a fresh process starts to count
    model = pickle.loads(stored)
    for _ in range(50):
        model[0].register_forward_pre_hook(lambda module, args: None)
    assert model(bf16_rows()).dtype == torch.bfloat16
    assert num_hooks(model) == 52


def test_casting_again_replaces_the_first_cast() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    for text in ("bf16", "bf16", "fp16"):
        cast_model(model, text)
        dtype = Precision.parse(text).params.dtype
        assert num_hooks(model) == 2 and model(bf16_rows().to(dtype)).dtype == dtype
    cast_model(model, "fp16", keep_fp32=())
    assert num_hooks(model) == 0 and set(dtypes(model).values()) == {torch.float16}
    cast_model(model, "fp32")
    assert num_hooks(model) == 0 and set(dtypes(model).values()) == {torch.float32}


def test_a_model_in_bf16_already_gets_fp32_islands_with_the_values_it_has() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)).bfloat16()
    before = copy.deepcopy(model.state_dict())
    after = cast_model(model, "bf16").state_dict()
    assert after["1.weight"].dtype == torch.float32
    assert after["1.weight"].equal(before["1.weight"].float())
    assert after["0.weight"].equal(before["0.weight"])


def test_parameters_keep_identity_ties_gradients_and_requires_grad() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(3, 4), "head": nn.Linear(4, 3, bias=False)})
    model["head"].weight = model["embed"].weight
    model["frozen"] = nn.Linear(4, 4).requires_grad_(False)
    weight = model["embed"].weight
    model["head"](torch.ones(4)).sum().backward()
    cast_model(model, "bf16")
    assert model["embed"].weight is model["head"].weight is weight
    assert weight.grad is not None and weight.grad.dtype == torch.bfloat16
    assert not model["frozen"].weight.requires_grad


def test_state_dict_keys_do_not_change() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    keys = list(model.state_dict())
    assert list(cast_model(model, "bf16").state_dict()) == keys


def test_a_transformer_layer_evaluates_as_it_trains() -> None:
    # In eval mode torch reads the norms' weights past their hooks, unless it sees the hooks.
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    model = cast_model(layer, "bf16")
    rows = bf16_rows()[None]
    trained = model(rows)
    with torch.no_grad():
        evaluated = model.eval()(rows)
    # Attention has a kernel of its own in eval mode, which rounds less: one BF16 unit at 2 is 2^-6.
    torch.testing.assert_close(evaluated, trained.detach(), rtol=0, atol=2**-5)


def test_a_model_on_the_meta_device_is_cast() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    cast_model(model, "bf16")
    assert [p.dtype for p in model.parameters()] == [torch.bfloat16] * 2 + [torch.float32] * 2


def test_the_report_has_a_row_for_each_module_with_floating_tensors() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), Scaled(), PreNorm())
    weight = model.get_parameter("2.weight")
    weight.data = weight.data.half()
    report = Precision("bf16").convert(model, keep_fp32=("*norm*", "scaled"))
    assert str(report) == (
        "0        Linear   20 parameters                fp32 -> bf16\n"
        "2        Scaled    4 parameters  4 in buffers  fp16+fp32 -> fp32  matches 'scaled'\n"
        "3.norm   RMSNorm   4 parameters                fp32 -> fp32       matches '*norm*'\n"
        "3.inner  Linear   20 parameters                fp32 -> bf16"
    )
    whole = Precision("bf16").convert(PreNorm(), keep_fp32=("prenorm",))
    assert [row.reason for row in whole.rows] == ["inside the model"] * 2
    inside = Precision("bf16").convert(nn.Sequential(PreNorm()), keep_fp32=("prenorm",))
    assert [row.reason for row in inside.rows] == ["inside 0"] * 2
    assert Precision("bf16").convert(nn.LayerNorm(4)).rows[0].module == "(model)"
    assert str(Precision("bf16").convert(nn.Tanh())) == "no floating tensors"


# What cast_model refuses, leaving the model as it was


def refused(model: nn.Module, error: type[Exception], message: str, **options: Any) -> None:
    before = dtypes(model)
    with pytest.raises(error, match=message):
        cast_model(model, "bf16", **options)
    assert dtypes(model) == before and num_hooks(model) == 0


def test_a_pattern_that_matches_nothing_is_an_error_unless_it_is_the_default() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(3, 4), "lm_head": nn.Linear(4, 3)})
    cast_model(copy.deepcopy(model), "bf16")
    refused(
        model,
        ValueError,
        r"pattern 'lm_haed' matches no module, .*similar names: lm_head, embed",
        keep_fp32=("*norm*", "lm_head", "lm_haed"),
    )
    refused(nn.Tanh(), ValueError, r"'x' matches no module.*names: none", keep_fp32=("x",))


def test_a_single_string_is_not_taken_for_its_letters() -> None:
    refused(
        nn.Linear(1, 1),
        TypeError,
        r"sequence of patterns; write keep_fp32=\('\*norm\*',\)",
        keep_fp32="*norm*",
    )


def test_one_tied_tensor_cannot_be_in_two_formats() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(3, 4), "head": nn.Linear(4, 3, bias=False)})
    model["head"].weight = model["embed"].weight
    message = (
        r"'{}.weight' would stay in FP32, but it is one tensor with '{}.weight', .*"
        r"Name both modules in keep_fp32, or neither"
    )
    refused(model, ValueError, message.format("head", "embed"), keep_fp32=("head",))
    refused(model, ValueError, message.format("embed", "head"), keep_fp32=("embed",))
    cast_model(model, "bf16", keep_fp32=("embed", "head"))
    assert model["embed"].weight is model["head"].weight


def test_fp64_and_fp8_tensors_are_refused_anywhere() -> None:
    message = r"'0.weight' is torch.float64, and a cast would change its digits unasked; call float"
    refused(nn.Sequential(nn.Linear(1, 1).double()), TypeError, message)
    refused(nn.Sequential(nn.Linear(1, 1).double()), TypeError, message, keep_fp32=("linear",))
    model = nn.Sequential(nn.Linear(1, 1))
    model[0].register_buffer("table", torch.ones(1).to(torch.float8_e4m3fn))
    refused(model, TypeError, r"'0.table' is torch.float8_e4m3fn")


def test_complex_tensors_are_refused_outside_islands_and_untouched_inside() -> None:
    model = nn.ModuleDict({"spectral": Scaled(), "linear": nn.Linear(1, 1)})
    model["spectral"].weight = nn.Parameter(torch.ones(4, dtype=torch.complex64))
    message = r"'spectral.weight' is torch.complex64.*keep_fp32=\('spectral',\)"
    refused(model, TypeError, message)
    refused(model["spectral"], TypeError, r"'weight' is torch.complex64.*\('Scaled',\)")
    cast_model(model, "bf16", keep_fp32=("spectral",))
    assert dtypes(model)["spectral.weight"] == torch.complex64
    assert dtypes(model)["linear.weight"] == torch.bfloat16


def shard_as_the_page_says(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def made() -> Any:
        torch.manual_seed(0)
        inner = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
        return cast_model(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), inner), "bf16")

    whole, model, mesh = made(), made(), init_device_mesh("cpu", (2,))
    for module in model.modules():
        if any(p.dtype == torch.float32 for p in module.parameters(recurse=False)):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    x = torch.randn(4, 8).bfloat16()  # the same on both ranks, so the mean of gradients is each
    outputs = [each(x) for each in (whole, model)]
    for output in outputs:
        output.float().sum().backward()
    assert torch.equal(*outputs)
    for p, sharded in zip(whole.parameters(), model.parameters(), strict=True):
        assert p.dtype == sharded.dtype and p.grad is not None
        grad: Any = sharded.grad
        torch.testing.assert_close(grad.full_tensor(), p.grad)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_a_cast_model_is_sharded_with_its_islands_apart() -> None:
    on_ranks(shard_as_the_page_says)
