"""Roles, the one table, and groups that survive whatever is done to a model."""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import mixprec
from mixprec import umup
from mixprec.cli import main
from mixprec.umup.roles import Entry, Role
from mixprec.umup.rules import FAMILIES, family_of

L = umup.layers


def decoder(**options: Any) -> umup.Decoder:
    return umup.Decoder(50, width=32, depth=4, seq_len=8, **options)


def by_name(groups: list[dict[str, Any]], key: str = "lr") -> dict[str, float]:
    return {name: group[key] for group in groups for name in group["param_names"]}


# ------------------------------------------------------------------ the table


ADAM = ("adam", "AdamW", "Lion", torch.optim.RMSprop, "LAMB", torch.optim.Adafactor)
# (role, shape, depth): multipliers for Adam-like rules and for SGD
ROWS: dict[tuple[Role, tuple[int, ...], int], tuple[float, float]] = {
    ("embedding", (50, 64), 1): (1 / 8, 1.0),
    ("input", (64, 16), 1): (1 / 4, 1 / 4),
    ("hidden", (64, 16), 1): (1 / 4, 1 / 4),
    ("hidden", (64, 16), 4): (1 / 8, 1 / 8),
    ("hidden", (64, 4, 2, 2), 4): (1 / 8, 1 / 8),
    ("output", (50, 64), 1): (1.0, 1.0),
    ("tied", (50, 64), 1): (1.0, 1.0),
    ("norm", (64,), 16): (1 / 4, 1 / 4),
    ("bias", (64,), 1): (1.0, 1.0),
}


@pytest.mark.parametrize(("row", "wanted"), ROWS.items(), ids=str)
def test_learning_rates_of_adam_like_rules_and_sgd(
    row: tuple[Role, tuple[int, ...], int], wanted: tuple[float, float]
) -> None:
    for optimizer in ADAM:
        assert umup.rule(*row, optimizer).lr == pytest.approx(wanted[0])
    assert umup.rule(*row, torch.optim.SGD).lr == pytest.approx(wanted[1])


@pytest.mark.parametrize(
    ("shape", "own", "wanted"),
    [
        ((64, 256), "original", 8.0),  # max(1, 1/4)^1/2 is its own: 64^1/2 is left
        ((256, 64), "original", 8.0),  # 2 is its own: 256^1/2 / 2
        ((64, 64), "match_rms_adamw", 1.0),
        ((64, 256), "match_rms_adamw", 0.5),
        ((64, 256), "spectral_unclamped", 16.0),
        ((64, 256), "spectral_norm", 16.0),
        ((64, 256), "none", 8.0),
    ],
)
def test_muon_gets_what_its_own_factor_leaves(
    shape: tuple[int, ...], own: str, wanted: float
) -> None:
    row = umup.rule("hidden", shape, 4, torch.optim.Muon, adjust_lr_fn=own)
    assert row.lr == pytest.approx(wanted / 2)


def taken_by_muon(own: str) -> bool:
    try:
        torch.optim.Muon([torch.nn.Parameter(torch.zeros(1, 1))], adjust_lr_fn=own)
    except ValueError:
        return False
    return True


TAKEN = [own for own in ("original", "match_rms_adamw", "spectral_unclamped") if taken_by_muon(own)]


@pytest.mark.parametrize("own", [None, *TAKEN])
@pytest.mark.parametrize("given", TAKEN)
def test_groups_carry_the_factor_that_their_rates_assume(own: Any, given: Any) -> None:
    layer = L.Linear(64, 256, bias=False)
    for optimizer in (torch.optim.Muon, "muon"):
        groups = umup.param_groups(layer, 0.5, optimizer, adjust_lr_fn=own)
        made = torch.optim.Muon(groups, adjust_lr_fn=given)
        assert made.param_groups[0]["adjust_lr_fn"] == (own or "original")


@pytest.mark.parametrize("own", ["none", "spectral_norm"])
def test_a_factor_that_the_rule_does_not_take_is_refused(own: str) -> None:
    layer = L.Linear(64, 256, bias=False)
    with pytest.raises(ValueError, match=rf"adjust_lr_fn='{own}', and Muon says: .*not supported"):
        umup.param_groups(layer, 0.5, torch.optim.Muon, adjust_lr_fn=own)


@pytest.mark.parametrize("own", TAKEN)
@pytest.mark.parametrize("shape", [(64, 256), (256, 64), (128, 128)])
def test_torchs_muon_moves_outputs_by_the_base_rate_whatever_the_shape(
    shape: tuple[int, int], own: str
) -> None:
    layer = L.Linear(shape[1], shape[0], bias=False)
    groups = umup.param_groups(layer, 0.5, torch.optim.Muon, adjust_lr_fn=own)
    optimizer = torch.optim.Muon(groups, weight_decay=0.0)
    before = layer.weight.detach().clone()
    layer.weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    change = torch.linalg.matrix_norm(layer.weight.detach() - before, 2).item()
    # Spectral norm lr * fan_out^1/2; Newton-Schulz leaves singular values in 0.7..1.2. In RMS mode
    # the rule's 0.2 counts as part of the base rate.
    constant = 0.2 if own == "match_rms_adamw" else 1.0
    assert 0.7 < change / (0.5 * shape[0] ** 0.5 * constant) < 1.3


def test_shampoo_soap_and_completep() -> None:
    assert umup.rule("hidden", (64, 256), 4, "Shampoo").lr == pytest.approx(4.0)
    assert umup.rule("hidden", (64, 256), 4, "SOAP").lr == pytest.approx(0.5)
    assert umup.rule("hidden", (64, 256), 4, depth_rule="completep").lr == pytest.approx(1 / 16)
    assert umup.rule("norm", (64,), 4, depth_rule="completep").lr == 1.0
    assert umup.rule("embedding", (50, 64), embedding_rule="mup").lr == 1.0


def test_a_plain_weight_holds_its_multiplier_in_initial_values_and_learning_rates() -> None:
    hidden = umup.rule("hidden", (64, 256), 4, plain=True)
    assert (hidden.init_std, hidden.forward) == (1 / 16, None)
    assert hidden.lr == pytest.approx(1 / 256 / 2)  # muP: 1 / fan_in
    readout = umup.rule("output", (50, 256), plain=True)
    assert (readout.init_std, readout.lr) == (1 / 256, 1 / 256)
    # SGD without a cut edge, muP's table 8: hidden 1, vectors fan_out, output 1 / fan_in
    sgd: Any = {"optimizer": "SGD", "readout_fan_in": 256}
    assert umup.rule("hidden", (64, 256), plain=True, **sgd).lr == pytest.approx(1.0)
    assert umup.rule("bias", (64,), plain=True, **sgd).lr == pytest.approx(256.0)
    assert umup.rule("output", (50, 256), plain=True, **sgd).lr == pytest.approx(1 / 256)


def test_a_plain_model_trains_as_its_unit_scaled_twin_under_adam() -> None:
    g = torch.Generator().manual_seed(0)
    unit: Any = nn.Sequential(L.Linear(8, 32, role="input"), nn.Tanh(), L.LinearReadout(32, 4))
    plain: Any = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4))
    with torch.no_grad():
        for ours, theirs in ((unit[0], plain[0]), (unit[2], plain[2])):
            ours.weight.normal_(generator=g)
            factor = 8**-0.5 if ours is unit[0] else 1 / 32
            theirs.weight.copy_(ours.weight * factor)
            theirs.bias.zero_()
    spec = umup.spec(plain, {"0.weight": "input", "2.weight": "output"})
    x, y = torch.randn(64, 8, generator=g), torch.randint(4, (64,), generator=g)
    outputs: list[Tensor] = []
    pairs: list[tuple[nn.Module, umup.Spec | None]] = [(unit, None), (plain, spec)]
    for model, given in pairs:
        groups = umup.param_groups(model, 2**-3, torch.optim.Adam, spec=given, eps=1e-30)
        optimizer = torch.optim.Adam(groups)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        outputs.append(model(x).detach())
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------ groups


def test_a_decoder_has_at_most_six_groups_with_names_and_every_parameter_once() -> None:
    model = decoder(num_heads=2, num_kv_heads=1)
    groups = umup.param_groups(model, 0.5, torch.optim.AdamW, 2**-13)
    assert 3 <= len(groups) <= 6
    names = [name for group in groups for name in group["param_names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    params = dict(model.named_parameters())
    for group in groups:
        for name, param in zip(group["param_names"], group["params"], strict=True):
            assert params[name] is param


def test_weight_decay_is_independent_of_multipliers_and_follows_the_schedule() -> None:
    model = decoder()
    optimizer = torch.optim.AdamW(umup.param_groups(model, 0.5, torch.optim.AdamW, 2**-7))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.25)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    for name, param in model.named_parameters():
        kept = 1.0 if "norm" in name else 1 - 0.25 * 2**-7
        torch.testing.assert_close(param.detach(), before[name] * kept, rtol=1e-6, atol=0)
    assert schedule.get_last_lr()[0] == optimizer.param_groups[0]["lr"]


def test_the_constant_of_the_token_factor_is_in_eps_or_in_sgds_rate() -> None:
    """Both equal a gradient that is multiplied by V^1/2."""
    pairs: Any = ((torch.optim.AdamW, {"eps": 1e-2}), (torch.optim.SGD, {}))
    for kind, options in pairs:
        results: list[Tensor] = []
        for multiplied in (False, True):
            layer = L.Embedding(100, 16)
            with torch.no_grad():
                layer.weight.fill_(1.0)
            groups = umup.param_groups(layer, 0.5, kind, 0.0, **options)
            if multiplied:
                rule = umup.rule("embedding", (100, 16), optimizer=kind)
                groups[0].update(lr=0.5 * rule.lr, **options)
            optimizer = kind(groups)
            for step in range(3):
                grad = torch.randn(100, 16, generator=torch.Generator().manual_seed(step)) / 100
                layer.weight.grad = grad * 10 if multiplied else grad
                optimizer.step()
            results.append(layer.weight.detach())
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_a_learning_rate_of_zero_changes_nothing_and_is_no_error() -> None:
    model = decoder()
    optimizer = torch.optim.AdamW(umup.param_groups(model, 0.0, torch.optim.AdamW, 2**-7))
    before = [p.detach().clone() for p in model.parameters()]
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    torch.testing.assert_close(list(model.parameters()), before, rtol=0, atol=0)


def test_frozen_parameters_need_no_role_and_are_in_no_group() -> None:
    model = nn.Sequential(nn.Linear(4, 4), L.LinearReadout(4, 2))
    model[0].requires_grad_(False)
    groups = umup.param_groups(model, 0.5, torch.optim.SGD)
    assert sorted(by_name(groups)) == ["1.bias", "1.weight"]


def test_roles_are_split_between_two_optimizers() -> None:
    model = decoder()
    hidden = umup.param_groups(model, 0.02, torch.optim.Muon, roles={"hidden"})
    others = umup.param_groups(model, 0.5, torch.optim.AdamW, roles=umup.ROLES - {"hidden"})
    assert not by_name(hidden).keys() & by_name(others).keys()
    assert len(by_name(hidden)) + len(by_name(others)) == len(list(model.parameters()))
    torch.optim.Muon(hidden)


def test_tied_weights_are_one_parameter_with_the_readouts_rate() -> None:
    model = decoder(tied=True)
    spec = umup.spec(model)
    assert spec["embedding.weight"].role == "tied"
    assert spec["embedding.weight"].names == ("embedding.weight", "readout.weight")
    assert "readout.weight" not in spec
    groups = umup.param_groups(model, 0.5, torch.optim.AdamW)
    assert by_name(groups)["embedding.weight"] == 0.5
    assert by_name(groups, "eps")["embedding.weight"] == 1e-8


def test_groups_keep_their_keys_through_mixed_precision_and_state_dicts() -> None:
    model = mixprec.cast_model(decoder(), "bf16")
    groups = umup.param_groups(model, 2**-3, torch.optim.AdamW, 2**-10)
    optimizer = mixprec.MixedPrecision(torch.optim.AdamW(groups))
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    saved = io.BytesIO()
    torch.save(optimizer.state_dict(), saved)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=True)["param_groups"]
    assert [g["lr_multiplier"] for g in loaded] == [g["lr_multiplier"] for g in groups]
    assert [g["roles"] for g in loaded] == [g["roles"] for g in groups]
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.explain()


# ------------------------------------------------------------------ a spec survives


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Generator[None]:
    file = tmp_path_factory.mktemp("ranks") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def assigned(model: nn.Module) -> nn.Module:
    fresh = {name: t.detach().clone() for name, t in model.state_dict().items()}
    model.load_state_dict(fresh, assign=True)
    return model


def from_meta(model: nn.Module) -> nn.Module:
    with torch.device("meta"):
        other = decoder()
    return other.to_empty(device="cpu")


def sharded(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.layers:  # type: ignore[union-attr]
        fully_shard(layer, mesh=mesh)  # type: ignore[arg-type]
    fully_shard(model, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    return model


def parallel(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (1,))
    plan: Any = {"readout": ColwiseParallel(), "layers.*.mlp.up": ColwiseParallel()}
    return parallelize_module(model, mesh, plan)


def checkpointed(model: nn.Module) -> nn.Module:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model.norm = checkpoint_wrapper(model.norm)  # type: ignore[arg-type]
    return model


SURVIVED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "load_state_dict(assign=True)": assigned,
    "meta and to_empty": from_meta,
    "a cast": lambda model: mixprec.cast_model(model, "bf16"),
    "torch.compile": lambda model: torch.compile(model, backend="eager"),  # type: ignore[return-value]
    "DistributedDataParallel": nn.parallel.DistributedDataParallel,
    "activation checkpointing": checkpointed,
    "fully_shard": sharded,
    "tensor parallel": parallel,
    "a checkpoint": lambda model: model,
}


@pytest.mark.parametrize("what", SURVIVED)
@pytest.mark.filterwarnings("ignore")  # torch.distributed's own
def test_a_spec_taken_before_equals_one_taken_after_and_groups_follow(
    what: str, one_rank: None
) -> None:
    before = umup.spec(decoder())
    rates = by_name(umup.param_groups(decoder(), 0.5, torch.optim.AdamW, 2**-13))
    model = SURVIVED[what](decoder())
    assert umup.spec(model) == before
    saved = umup.Spec.from_dict(json.loads(json.dumps(before.to_dict())))
    for spec in (None, saved):
        groups = umup.param_groups(model, 0.5, torch.optim.AdamW, 2**-13, spec=spec)
        assert by_name(groups) == rates
        owned = {id(param) for group in groups for param in group["params"]}
        assert owned == {id(param) for param in model.parameters()}


# ------------------------------------------------------------------ roles by pattern


class PlainLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(self.norm(x))


class PlainModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(50, 16)
        self.blocks = nn.ModuleList([PlainLayer() for _ in range(4)])
        self.head = nn.Linear(16, 50, bias=False)


PATTERNS: dict[str, Role] = {
    "emb.*": "embedding",
    "*.inner.weight": "hidden",
    "head.weight": "output",
}


def test_a_plain_model_is_given_roles_by_pattern() -> None:
    spec = umup.spec(PlainModel(), PATTERNS, stacks=["blocks"])
    assert spec["blocks.1.inner.weight"] == Entry(
        "hidden", (16, 16), 4, True, ("blocks.1.inner.weight",)
    )
    assert spec["blocks.1.inner.bias"].role == "bias" and spec["head.weight"].depth == 1
    groups = umup.param_groups(PlainModel(), 1.0, torch.optim.AdamW, spec=spec)
    assert by_name(groups)["blocks.1.inner.weight"] == pytest.approx(1 / 16 / 2)
    assert by_name(groups)["head.weight"] == pytest.approx(1 / 16)


def test_patterns_decide_over_what_a_module_says() -> None:
    assert umup.spec(L.Linear(4, 4), {"weight": "input"})["weight"].role == "input"


# ------------------------------------------------------------------ bad input


class Unknown(nn.Module):
    umup_roles: ClassVar[dict[str, str]] = {"weight": "kernel"}

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2))


def tied_across() -> nn.Module:
    model = nn.Sequential(L.Linear(4, 4, bias=False), L.LinearReadout(4, 4, bias=False))
    model[1].weight = model[0].weight
    return model


def nested() -> nn.Module:
    return L.DepthModuleList([L.DepthSequential(L.Linear(4, 4)), L.Linear(4, 4)])


def other_spec() -> umup.Spec:
    return umup.spec(nn.Sequential(L.Linear(4, 4), L.Linear(4, 4)))


ADAMW = torch.optim.AdamW
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "an unknown role": (
        lambda: umup.spec(Unknown()),
        r"weight has role 'kernel'; roles are bias, embedding, hidden",
    ),
    "an unknown role in a pattern": (
        lambda: umup.spec(PlainModel(), {"emb.*": "lookup"}),  # type: ignore[dict-item]
        r"pattern 'emb.\*' has role 'lookup'",
    ),
    "an unknown role in the table": (
        lambda: umup.rule("kernel", (2, 2)),  # type: ignore[arg-type]
        "role='kernel'; roles are",
    ),
    "an unknown role of a Linear": (
        lambda: L.Linear(2, 2, role="output"),  # type: ignore[arg-type]
        "role='output'; a Linear is 'hidden' or 'input'",
    ),
    "an unknown role to make groups of": (
        lambda: umup.param_groups(L.Linear(2, 2), 1.0, ADAMW, roles=["weight"]),  # type: ignore[list-item]
        r"roles=\['weight'\]; roles are",
    ),
    "a parameter without a role": (
        lambda: umup.spec(nn.Sequential(L.Linear(4, 4), nn.Linear(4, 8))),
        r"1.weight has no role: Linear says none for its 'weight', \[8, 4\]. Use a layer of umup",
    ),
    "a pattern that nothing matches": (
        lambda: umup.spec(PlainModel(), {**PATTERNS, "lm_head.*": "output"}),
        r"no parameter matches lm_head.\*; patterns are matched against whole names such as emb",
    ),
    "a stack that is not there": (
        lambda: umup.spec(PlainModel(), PATTERNS, stacks=["layers"]),
        "there is no module layers to take as a residual stack",
    ),
    "a readout inside a residual branch": (
        lambda: umup.spec(L.DepthModuleList([L.LinearReadout(4, 4)])),
        "0.weight is a readout inside a residual stack: it is no cut edge there",
    ),
    "nested depth containers": (
        lambda: umup.spec(nested()),
        "the residual stack '0' is inside the stack 'model'; a branch has one depth",
    ),
    "a fan of zero": (lambda: L.Linear(0, 4), "in_features=0, out_features=4: a fan of zero"),
    "a fan of zero of a plain layer": (
        lambda: umup.spec(nn.Embedding(0, 4), {"weight": "embedding"}),
        r"weight is \[0, 4\]: a fan of zero gives no learning rate",
    ),
    "a fan of zero in the table": (
        lambda: umup.rule("hidden", (0, 4)),
        r"shape=\[0, 4\], depth=1; a fan of zero",
    ),
    "tied weights with clashing roles": (
        lambda: umup.spec(tied_across()),
        r"0.weight \(hidden, depth 1\) and 1.weight \(output, depth 1\) are one tensor, and no",
    ),
    "an optimizer without a rule": (
        lambda: umup.param_groups(decoder(), 1.0, torch.optim.Adadelta),
        "Adadelta has no learning rate rule. If its updates have the size of a family's, give that "
        r"family's name instead, optimizer='adam'. Families: 'adam' \(Adam, AdamW, NAdam, ...\); "
        r"'sgd' \(SGD",
    ),
    "Muon for more than matrices": (
        lambda: umup.param_groups(decoder(), 1.0, torch.optim.Muon),
        "'muon' treats hidden matrices only, and embedding.weight is 'embedding'. Give it to an",
    ),
    "no parameter of that role": (
        lambda: umup.param_groups(L.Embedding(4, 4), 1.0, ADAMW, roles={"hidden"}),
        r"no trained parameter has a role in \['hidden'\]; the model has \['embedding'\]",
    ),
    "coupled weight decay": (
        lambda: umup.param_groups(decoder(), 1.0, torch.optim.Adam, 0.1),
        "Adam adds weight decay to its gradient and normalises the sum",
    ),
    "negative weight decay": (
        lambda: umup.param_groups(decoder(), 1.0, ADAMW, -0.1),
        "weight_decay=-0.1; it is a share",
    ),
    "a spec of another model": (
        lambda: umup.param_groups(decoder(), 1.0, ADAMW, spec=other_spec()),
        "this spec is not of this model: it lacks embedding.weight, "
        "layers.0.attention_norm.weight, layers.0.attention.query.weight and .* more, and the "
        "model lacks 0.weight, 0.bias",
    ),
    "a spec of another width": (
        lambda: umup.param_groups(L.Linear(8, 4), 1.0, ADAMW, spec=umup.spec(L.Linear(4, 4))),
        r"weight is \[4, 8\], but the spec says \[4, 4\]; fans of a shard",
    ),
    "a spec from before weights were tied": (
        lambda: umup.param_groups(
            decoder(tied=True),
            1.0,
            ADAMW,
            spec=umup.Spec(
                {n: e for n, e in umup.spec(decoder()).items() if n != "readout.weight"}
            ),
        ),
        "embedding.weight is one tensor with readout.weight, but the spec ties it to nothing",
    ),
    "an unknown embedding rule": (
        lambda: umup.rule("embedding", (4, 4), embedding_rule="sp"),
        "embedding_rule='sp'; use 'umup' or 'mup'",
    ),
    "an unknown depth rule": (
        lambda: umup.rule("hidden", (4, 4), depth_rule="linear"),
        "depth_rule='linear'; use 'sqrt' or 'completep'",
    ),
    "an unknown factor of Muon": (
        lambda: umup.rule("hidden", (4, 4), optimizer="Muon", adjust_lr_fn="moonlight"),
        "adjust_lr_fn='moonlight'; use one of 'original', 'match_rms_adamw'",
    ),
    "an unknown format": (
        lambda: umup.table(decoder(), ADAMW, format="html"),  # type: ignore[arg-type]
        "format='html'; use 'text', 'markdown' or 'json'",
    ),
    "heads that do not divide": (
        lambda: decoder(num_heads=5),
        "width=32, num_heads=5, num_kv_heads=5; heads must have an even width",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_bad_input_is_refused_with_what_was_seen(what: str) -> None:
    call, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        call()


def test_a_family_may_be_declared_by_its_name() -> None:
    class Novel(torch.optim.Optimizer):
        pass

    with pytest.raises(ValueError, match="Novel has no learning rate rule"):
        family_of(Novel)
    groups = umup.param_groups(decoder(), 0.5, "adam")
    assert by_name(groups) == by_name(umup.param_groups(decoder(), 0.5, ADAMW))

    class Mine(torch.optim.AdamW):
        pass

    assert family_of(Mine) == family_of(Mine([torch.zeros(1)])) == "adam"
    inner = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    assert family_of(mixprec.MixedPrecision(inner)) == "sgd"
    assert len({name for names in FAMILIES.values() for name in names}) == sum(
        map(len, FAMILIES.values())
    )


# ------------------------------------------------------------------ printed


def test_the_printed_table_has_the_rates_of_the_groups() -> None:
    model = decoder()
    rows = json.loads(umup.table(model, ADAMW, lr=0.5, weight_decay=2**-13, format="json"))
    groups = umup.param_groups(model, 0.5, ADAMW, 2**-13)
    for key, column in (("lr", "lr"), ("weight_decay", "weight decay"), ("eps", "eps")):
        assert {r["example"]: r[column] for r in rows} == pytest.approx(
            {r["example"]: by_name(groups, key)[r["example"]] for r in rows}
        )
    assert sum(r["tensors"] for r in rows) == len(list(model.parameters()))
    hidden = next(r for r in rows if r["role"] == "hidden")
    assert hidden["plain lr"] == pytest.approx(hidden["lr"] * 32**-0.5)
    markdown = umup.table(model, "Lion", format="markdown").splitlines()
    assert len(markdown) == len(rows) + 2 and markdown[1].startswith("|---|")
    assert "50^1/2" in umup.table(model, torch.optim.SGD)  # V^1/2 of the lookup
    assert "embedding" not in umup.table(model, torch.optim.Muon)


def test_the_command_prints_the_table_of_a_model_in_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "net.py"
    file.write_text(
        "from mixprec import umup\n"
        "def model():\n    return umup.Decoder(50, width=32, depth=2, seq_len=8)\n"
        "net = model()\nnumber = 3\n"
    )
    assert main(["umup", "table", f"{file}:model", "--lr", "0.5", "--optimizer", "SGD"]) == 0
    assert "readout.weight" in capsys.readouterr().out
    assert main(["umup", "table", f"{file}:net", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)
    for place, message in (
        (f"{tmp_path}/none.py:model", "is read as FILE.py:NAME"),
        (f"{file}:absent", "has no 'absent'"),
    ):
        assert main(["umup", "table", place]) == 1
        assert message in capsys.readouterr().err
    assert main(["umup", "table", f"{file}:net", "--optimizer", "Rprop"]) == 1
    assert "Rprop has no learning rate rule" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("layer", "role", "own"),
    [
        (umup.layers.Conv1d(8, 4, 3), "output", "hidden"),
        (umup.layers.Linear(8, 4), "output", "hidden"),
        (umup.layers.LinearReadout(8, 4), "hidden", "output"),
        (umup.layers.Embedding(8, 4), "output", "embedding"),
    ],
)
def test_a_pattern_cannot_give_a_layer_other_multipliers(layer: Any, role: Any, own: str) -> None:
    said = rf"0.weight is made '{role}', but its {type(layer).__name__} multiplies as '{own}' in"
    with pytest.raises(ValueError, match=said):
        umup.spec(nn.Sequential(layer), {"0.weight": role})


def test_an_attribute_cannot_make_a_readout_of_a_convolution() -> None:
    layer: Any = umup.layers.Conv1d(8, 4, 3)
    layer.umup_roles = {"weight": "output", "bias": "bias"}
    with pytest.raises(ValueError, match="weight is made 'output', but its Conv1d multiplies as"):
        umup.spec(layer)


def test_a_pattern_may_give_a_role_that_multiplies_alike() -> None:
    model = nn.Sequential(umup.layers.Linear(8, 4))
    assert umup.spec(model, {"0.weight": "input"})["0.weight"].role == "input"
