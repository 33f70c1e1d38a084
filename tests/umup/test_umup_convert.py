"""Plain decoders made unit-scaled, and unit-scaled ones made plain."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixprec import umup
from mixprec.umup.decoder import SwiGLU


class Attention(nn.Module):
    """As Llama's: a scale of its own, grouped queries, no rotation."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head_dim = width // heads
        self.scaling = self.head_dim**-0.5
        self.q_proj = nn.Linear(width, width, bias=True)
        self.k_proj = nn.Linear(width, width // 2, bias=True)
        self.v_proj = nn.Linear(width, width // 2, bias=False)
        self.o_proj = nn.Linear(width, width, bias=True)

    def heads(self, x: Tensor) -> list[Tensor]:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        return [p(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in projections]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        scale = float(self.scaling)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=scale)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class ImplicitScale(Attention):
    """The scale is torch's default."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads)
        del self.scaling

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class QueryNorm(Attention):
    """Queries and keys go through norms, as Qwen3's."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads)
        self.q_norm, self.k_norm = OwnRMSNorm(self.head_dim), OwnRMSNorm(self.head_dim)

    def heads(self, x: Tensor) -> list[Tensor]:
        q, k, v = super().heads(x)
        return [self.q_norm(q), self.k_norm(k), v]


class MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, 3 * width, bias=False)
        self.up_proj = nn.Linear(width, 3 * width, bias=False)
        self.down_proj = nn.Linear(3 * width, width, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class OwnRMSNorm(nn.Module):
    """Not torch's class, as Llama's is not."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, 1e-6)


class Layer(nn.Module):
    def __init__(self, width: int, attention: type[Attention]) -> None:
        super().__init__()
        self.self_attn = attention(width, 4)
        self.mlp = MLP(width)
        self.input_layernorm = OwnRMSNorm(width)
        self.post_attention_layernorm = OwnRMSNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Plain(nn.Module):
    def __init__(
        self,
        width: int = 32,
        depth: int = 3,
        tied: bool = False,
        attention: type[Attention] = Attention,
    ) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(50, width)
        self.layers = nn.ModuleList([Layer(width, attention) for _ in range(depth)])
        self.norm = OwnRMSNorm(width)
        self.lm_head = nn.Linear(width, 50, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


TOKENS = torch.randint(50, (8, 16), generator=torch.Generator().manual_seed(0))
TARGETS = torch.randint(50, (8, 16), generator=torch.Generator().manual_seed(1))


def example(model: nn.Module) -> Any:
    return model(TOKENS)


def converted(*args: Any, options: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    torch.manual_seed(3)
    model = Plain(*args, **kwargs)
    arguments: dict[str, Any] = {"example": example} if options is None else options
    umup.apply(model, **arguments)
    return model


def noisy(model: nn.Module) -> Any:
    """Norms and biases away from 1 and 0, in FP64."""
    g = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for param in model.parameters():
            if param.ndim == 1:
                param.add_(torch.randn(param.shape, generator=g), alpha=0.3)
    return model.double()


def unit_loss(model: nn.Module) -> tuple[Tensor, int]:
    logits = model(TOKENS).flatten(0, 1)
    return umup.losses.cross_entropy(logits, TARGETS.flatten(), reduction="sum"), TARGETS.numel()


def embedding_cosine(unit: nn.Module, plain: nn.Module) -> float:
    """Between the embeddings' gradients of a unit-scaled model and of its export."""
    logits = plain(TOKENS).flatten(0, 1)
    losses = unit_loss(unit)[0], F.cross_entropy(logits, TARGETS.flatten(), reduction="sum")
    grads: list[Tensor] = []
    for model, loss in zip((unit, plain), losses, strict=True):
        (weight,) = (m.weight for m in model.modules() if isinstance(m, nn.Embedding))
        grads.append(torch.autograd.grad(loss, weight)[0].flatten())
    return float(F.cosine_similarity(*grads, dim=0))


# ------------------------------------------------------------------ conversion


def test_a_llama_like_model_gets_roles_multipliers_and_initial_values() -> None:
    model = Plain()
    parameters = dict(model.named_parameters())
    torch.manual_seed(0)
    found = umup.apply(model, example=example)
    assert {n: id(p) for n, p in model.named_parameters()} == {
        n: id(p) for n, p in parameters.items()
    }
    assert found["layers.1.self_attn.o_proj.weight"].role == "hidden"
    assert found["layers.1.self_attn.o_proj.weight"].depth == 3
    assert found["layers.0.input_layernorm.weight"].role == "norm"
    assert (found["lm_head.weight"].role, found["embed_tokens.weight"].role) == (
        "output",
        "embedding",
    )
    assert not any(entry.plain for entry in found.values() if entry.role not in ("norm", "bias"))
    layer: Any = model.layers[0]
    assert layer.self_attn.scaling == 1 / 8
    assert layer.mlp.down_proj.output_multiplier == pytest.approx(3**-0.5)
    report = umup.check_scales(model, unit_loss)
    rows = {row.name: row for row in report.rows}
    for name in ("self_attn.v_proj", "mlp.up_proj"):
        assert rows[f"layers.0.{name}"].output == pytest.approx(1, abs=0.15)
    assert rows["layers.1.mlp.down_proj"].output == pytest.approx(3**-0.5, rel=0.2)
    assert rows["layers.1.self_attn.o_proj"].output == pytest.approx(3**-0.5, rel=0.3)
    assert rows["lm_head"].grad_input == pytest.approx(1, abs=0.1)
    assert rows["layers.1.mlp.up_proj"].grad_output == pytest.approx(0.8, rel=0.5)


def test_the_branch_multipliers_of_both_directions_give_the_true_gradient() -> None:
    """All the unit-scaled products but the readout are honest, so autograd on the export agrees."""
    model = noisy(converted())
    plain = Plain().double()
    plain.load_state_dict(umup.export(model))
    assert embedding_cosine(model, plain) > 1 - 1e-10


def test_updates_of_a_converted_model_do_not_depend_on_the_width() -> None:
    tokens, targets = TOKENS[:1], TARGETS[:1]

    def loss(model: nn.Module) -> tuple[Tensor, int]:
        logits = model(tokens).flatten(0, 1)
        return umup.losses.cross_entropy(logits, targets.flatten(), reduction="sum"), 16

    report = umup.check_coordinates(
        lambda width: converted(width, depth=1),
        [64, 128, 256, 512],
        loss,
        lambda m: torch.optim.AdamW(
            umup.param_groups(m, 2**-6, torch.optim.AdamW, embedding_rule="mup"), weight_decay=0.0
        ),
        seeds=range(2),
        tolerance=0.15,
    )
    assert report.ok, str(report)


def test_a_converted_model_survives_deepcopy_pickle_and_compile() -> None:
    model = converted()
    wanted = unit_loss(model)[0]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(unit_loss(other)[0], wanted)
        assert umup.spec(other) == umup.spec(model)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_converted_model_compiles() -> None:
    model = converted(depth=1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(TOKENS), model(TOKENS))


# ------------------------------------------------------------------ export


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("attention", [Attention, ImplicitScale, QueryNorm])
@pytest.mark.parametrize(
    "options", [None, {}, {"residual_multiplier": 2.0, "depth_rule": "completep"}]
)
def test_exported_weights_run_in_the_plain_architecture(
    tied: bool, attention: type[Attention], options: dict[str, Any] | None
) -> None:
    if options:
        options = {**options, "attention_ratio": 0.5, "attention_multiplier": 1.5}
    model = noisy(converted(tied=tied, attention=attention, options=options))
    plain = Plain(tied=tied, attention=attention).double()
    plain.load_state_dict(umup.export(model))
    torch.testing.assert_close(plain(TOKENS), model(TOKENS), rtol=1e-10, atol=1e-10)


class PlainDecoder(nn.Module):
    """What `export` says of `Decoder`'s plain architecture, written out."""

    def __init__(self, like: umup.Decoder) -> None:
        super().__init__()
        self.inner: Any = copy.deepcopy(like)
        for name, module in list(self.inner.named_modules()):
            if isinstance(module, nn.Linear):
                parent, _, local = name.rpartition(".")
                plain: Any = nn.Linear(module.in_features, module.out_features, bias=False)
                plain.output_multiplier = 1.0
                setattr(self.inner.get_submodule(parent), local, plain.double())
        for layer in self.inner.layers:
            layer.attention.logit_multiplier = layer.attention.head_dim**-0.5
            layer.mlp.multiplier = 1.0


@pytest.mark.parametrize("tied", [False, True])
def test_a_decoder_is_exported_to_plain_weights(tied: bool) -> None:
    torch.manual_seed(0)
    model = umup.Decoder(
        50, width=32, depth=2, seq_len=16, num_heads=4, num_kv_heads=2, tied=tied,
        attention_multiplier=2.0, attention_ratio=0.5,
    )  # fmt: skip
    for layer in model.layers:
        branch = layer.mlp.down.output_multiplier
        layer.mlp = SwiGLU(32, 64, multiplier=1.5, branch=branch)
    model = noisy(model)
    plain = PlainDecoder(model)
    if tied:
        plain.inner.readout.weight = plain.inner.embedding.weight
    plain.inner.load_state_dict(umup.export(model))
    torch.testing.assert_close(plain.inner(TOKENS), model(TOKENS), rtol=1e-10, atol=1e-10)
    if not tied:  # and below the readout, gradients are true but for one factor
        assert embedding_cosine(model, plain.inner) > 1 - 1e-10


def test_export_takes_fp32_weights_and_keeps_their_dtype() -> None:
    model = converted().bfloat16()
    given = {name: t.float() for name, t in model.state_dict().items()}
    exported = umup.export(model, given)
    assert {t.dtype for t in exported.values()} == {torch.float32}
    assert {t.dtype for t in umup.export(model).values()} == {torch.bfloat16}
    assert exported.keys() == model.state_dict().keys()


# ------------------------------------------------------------------ bad input


def changed(change: Callable[[Any], Any]) -> Any:
    model = Plain()
    change(model)
    return model


class Conv1D(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(32, 32))


def two_stacks(model: Any) -> None:
    model.encoder = copy.deepcopy(model.layers)


def third_norm(model: Any) -> None:
    model.layers[1].extra_norm = OwnRMSNorm(32)


def other_linear(model: Any) -> None:
    model.projection = nn.Linear(32, 32)


def conv1d(model: Any) -> None:
    model.layers[2].mlp.up_proj = Conv1D()


def no_query(model: Any) -> None:
    for layer in model.layers:
        del layer.self_attn.scaling
        layer.self_attn.c_attn = layer.self_attn.q_proj
        del layer.self_attn.q_proj


def norm_behind(model: Any) -> None:
    for layer in model.layers:
        del layer.self_attn.scaling
        layer.self_attn.q_norm = OwnRMSNorm(8)


def two_ends(model: Any) -> None:
    model.layers[0].mlp.c_proj = nn.Linear(32, 32)


def no_head_dim(model: Any) -> None:
    del model.layers[0].self_attn.head_dim


REFUSED: dict[str, tuple[Callable[[Any], Any], dict[str, Any], str]] = {
    "two stacks": (two_stacks, {}, r"2 lists of layers with norms were found \(\['layers', 'enc"),
    "a stack that is not there": (
        lambda m: None,
        {"layers": "model.layers"},
        r"there is no nn.ModuleList 'model.layers'; there are \['layers'\]",
    ),
    "a third norm": (
        third_norm,
        {},
        r"layers.1 has norms \['input_layernorm', 'post_attention_layernorm', 'extra_norm'\]",
    ),
    "another linear outside": (
        other_linear,
        {},
        r"outside of the layers are linears \['lm_head', 'projection'\]",
    ),
    "a transposed linear": (conv1d, {}, r"layers.2.mlp.up_proj is a test_umup_convert.Conv1D, and"),
    "two ends": (two_ends, {}, r"layers.0.mlp has several ends: \['down_proj', 'c_proj'\]"),
    "no head width": (no_head_dim, {}, "layers.0: the width of a head is not known"),
    "no queries": (
        no_query,
        {"head_dim": 8},
        "layers.0: found neither a number head_dim.* nor a linear named q_proj",
    ),
    "a norm behind the queries": (
        norm_behind,
        {},
        "nor a linear named q_proj, query, wq, q, without a norm behind it, to make logits",
    ),
    "an example that runs nothing": (
        lambda m: None,
        {"example": lambda m: None},
        "the example did not reach both ends of a branch of layers.0",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_models_that_are_not_standard_are_refused_with_what_is_odd(what: str) -> None:
    change, options, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        umup.apply(changed(change), **options)


def test_a_model_is_converted_once() -> None:
    model = converted()
    with pytest.raises(ValueError, match=r"mixprec\.umup\.layers\.Linear, and only plain nn"):
        umup.apply(model)


def test_what_cannot_be_exported_is_refused() -> None:
    model = converted(tied=True)
    model.second_norm = OwnRMSNorm(32)
    with pytest.raises(ValueError, match=r"readout is tied.*\['norm', 'second_norm'\]"):
        umup.export(model)
    model: Any = Plain()
    for layer in model.layers:
        layer.self_attn.c_attn = layer.self_attn.q_proj
        del layer.self_attn.q_proj
    umup.apply(model)
    with pytest.raises(ValueError, match=r"no linear for queries alone to put 0\.3536 into"):
        umup.export(model)


@pytest.mark.parametrize("attention", [Attention, ImplicitScale, QueryNorm])
def test_what_reaches_the_end_of_every_branch_has_rms_1_at_any_depth(
    attention: type[Attention],
) -> None:
    # As Llama and Mistral, with torch's default scale, and with norms of queries as Qwen.
    model = converted(depth=16, attention=attention)
    seen: dict[str, float] = {}
    for name, module in model.named_modules():
        if name.endswith(("o_proj", "down_proj")):

            def look(module: Any, args: Any, name: str = name) -> None:
                seen[name] = float(args[0].square().mean().sqrt() * module.multiplier)

            module.register_forward_pre_hook(look)
    with torch.no_grad():
        model(TOKENS)
    assert len(seen) == 32
    for name, size in seen.items():
        assert size == pytest.approx(1, abs=1e-5), name  # the same batch, in the same order


class GemmaNorm(OwnRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], 1 + self.weight, 1e-6)


class ScaledEmbedding(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.embedding_dim**0.5


class PostNorm(Layer):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.input_layernorm(self.self_attn(x))
        return x + self.post_attention_layernorm(self.mlp(x))


class Olmo(PostNorm):
    def __init__(self, width: int) -> None:
        super().__init__(width, Attention)
        del self.input_layernorm
        self.post_feedforward_layernorm = OwnRMSNorm(width)


def gemma_norm(model: Any) -> None:
    model.norm = GemmaNorm(32)


def gemma_embedding(model: Any) -> None:
    model.embed_tokens = ScaledEmbedding(50, 32)


def post_norm(model: Any) -> None:
    model.layers[2] = PostNorm(32, Attention)


def olmo(model: Any) -> None:
    model.layers[2] = Olmo(32)


def failing(model: nn.Module) -> None:
    raise ValueError("out of batches")


@pytest.mark.parametrize(
    ("change", "run", "message"),
    [
        (gemma_norm, None, r"norm is a GemmaNorm that gives RMS 2 for a weight of 1"),
        (gemma_embedding, None, r"embed_tokens\.weight has no role: ScaledEmbedding"),
        (post_norm, example, r"layers\.2 calls a norm after the linear that ends its branch"),
        (olmo, None, r"layers\.2 has a norm 'post_feedforward_layernorm' behind its branch"),
        (lambda model: None, failing, "out of batches"),
    ],
)
def test_a_model_that_is_refused_is_left_as_it_was(
    change: Callable[[Any], None], run: Any, message: str
) -> None:
    model: Any = Plain()
    change(model)
    kinds = [(name, type(module), len(vars(module))) for name, module in model.named_modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scaling = model.layers[0].self_attn.scaling
    with pytest.raises(ValueError, match=message):
        umup.apply(model, example=run)
    assert kinds == [(n, type(module), len(vars(module))) for n, module in model.named_modules()]
    assert model.layers[0].self_attn.scaling == scaling
    assert all(not module._forward_pre_hooks for module in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
