"""A standard pre-norm decoder made unit-scaled in place, and back to plain weights.

The skip path needs no multiplier: with `x + a * f(norm(x))` everything that u-muP asks of a layer
can sit in modules that are there already.

    embedding           N(0, 1)
    norm of a branch    the gradient of its input is multiplied by a, at its call
    linear              fan_in^-1/2, in both directions
    end of a branch     also a, forward only; and 1 / RMS of its input, if an example measured it
    attention's logits  1 / head_dim in place of head_dim^-1/2
    readout             1 / fan_in

Modules keep their identity, names and parameters; `nn.Linear` objects become `umup.layers.Linear`
objects. Afterwards every multiplier can be multiplied into its weight: `export` gives weights that
the original architecture runs without this library.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mixprec.umup.functional import BranchMultipliers, branch_multipliers
from mixprec.umup.layers import Embedding, Linear, LinearReadout
from mixprec.umup.roles import Spec, spec
from mixprec.umup.scaling import scale_bwd

__all__ = ["apply", "export"]

_ENDS = ("o_proj", "out_proj", "c_proj", "wo", "down_proj", "w2", "fc2", "dense_4h_to_h", "down")
_QUERIES = ("q_proj", "query", "wq", "q")
_QUERY_NORMS = ("q_norm", "query_norm", "q_layernorm")
_POST_NORMS = ("post_feedforward", "post_ffn", "post_mlp")
_SCALES = ("scaling", "scale", "softmax_scale")


def apply(
    model: nn.Module,
    *,
    layers: str | None = None,
    head_dim: int | None = None,
    example: Callable[[nn.Module], Any] | None = None,
    reinitialize: bool = True,
    residual_multiplier: float = 1.0,
    attention_ratio: float = 1.0,
    attention_multiplier: float = 1.0,
    attention_scale: Literal["auto", "leave"] = "auto",
    depth_rule: Literal["sqrt", "completep"] = "sqrt",
) -> Spec:
    """Make a pre-norm decoder unit-scaled, in place, and return the roles of its parameters.

    A standard one has an `nn.ModuleList` of layers with two norms, an attention and an MLP each,
    whose branches are added to their input unscaled; embeddings before it; a norm and an
    `nn.Linear` over the vocabulary after it, tied to the embedding or not. So are Llama and its
    relatives.

    Args:
        layers: name of the list of layers; found if left out.
        head_dim: width of a head; read from the attention module's `head_dim` if left out.
        example: runs the model on a batch, `lambda model: model(tokens)`. What reaches the ends of
            each branch is then measured in turn, and divided out for good. Left out, attention's
            average and the activation leave it below 1. Run once before that, as a trial.
        reinitialize: draws weights from N(0, 1), by torch's global generator. Weights that were
            trained with other multipliers are of no use.
        residual_multiplier, attention_ratio, depth_rule: see `functional.branch_multipliers`; give
            the same `depth_rule` to `param_groups`.
        attention_multiplier: of the attention logits, over `1 / head_dim`.
        attention_scale: "leave" keeps logits as they are.

    Raises:
        ValueError: for a model that is not so, with what is odd about it; the model is then as it
            was. Post-norm layers are told by the names of their norms, or by the example. An
            example whose measurement fails has left the model converted, to be built anew.

    >>> from mixprec import umup
    >>> import torch
    >>> from torch import nn
    >>> class Layer(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.norm1, self.norm2 = nn.RMSNorm(8), nn.RMSNorm(8)
    ...         self.attn = nn.ModuleDict({"q_proj": nn.Linear(8, 8), "o_proj": nn.Linear(8, 8)})
    ...         self.mlp = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
    >>> model = nn.ModuleDict({"embed": nn.Embedding(50, 8)})
    >>> model["layers"] = nn.ModuleList([Layer() for _ in range(4)])
    >>> model["head"] = nn.Linear(8, 50, bias=False)
    >>> found = umup.apply(model, head_dim=4)
    >>> found["head.weight"].role, model["layers"][0].mlp[2].output_multiplier
    ('output', 0.5)
    """
    if example is not None:
        _try(model, [_parts(n, m) for n, m in _layers(model, layers)], example)

    def change(model: nn.Module) -> tuple[list[_Parts], Spec]:
        return _change(
            model,
            layers,
            head_dim,
            branch_multipliers(
                len(_layers(model, layers)), residual_multiplier, attention_ratio, depth_rule
            ),
            attention_multiplier if attention_scale == "auto" else None,
        )

    change(_without_data(model))  # whatever is refused is refused here, where nothing is lost
    parts, found = change(model)
    if reinitialize:
        _reinitialize(model)
    if example is not None:
        _measure(model, parts, example)
    return found


def _change(
    model: nn.Module,
    layers: str | None,
    head_dim: int | None,
    branches: BranchMultipliers,
    attention_multiplier: float | None,
) -> tuple[list[_Parts], Spec]:
    """All that `apply` does to modules and nothing that it does to data."""
    name, stack = _find_stack(model, layers)
    parts = [_parts(name, layer) for name, layer in _layers(model, layers)]
    readout = _find_readout(_outside(model, name))
    _check_linears(model)
    _check_norms(model)
    if attention_multiplier is not None:
        for part in parts:
            _set_logits(part, head_dim, attention_multiplier)
    stack.umup_depth = len(stack)  # type: ignore[assignment]
    for module in model.modules():
        _convert(module, module is readout)
    for part in parts:
        for norm, end, multiplier in (
            (part.attention_norm, part.attention_end, branches.attention),
            (part.mlp_norm, part.mlp_end, branches.mlp),
        ):
            norm.register_forward_pre_hook(_BranchStart(multiplier))
            end.output_multiplier = multiplier
    return parts, spec(model)


def _without_data(model: nn.Module) -> nn.Module:
    """A copy on the meta device, which takes no memory and leaves the original alone."""
    memo: dict[int, Any] = {}
    for param in model.parameters():
        memo[id(param)] = nn.Parameter(param.detach().to("meta"), param.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach().to("meta")
    return copy.deepcopy(model, memo)


class _BranchStart:
    """Multiplies the gradient that leaves a branch, at the norm that begins it."""

    def __init__(self, multiplier: float) -> None:
        self.multiplier = multiplier

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return scale_bwd(args[0], self.multiplier), *args[1:]


# ------------------------------------------------------------------ what is where


@dataclass(frozen=True)
class _Parts:
    name: str
    attention: nn.Module
    attention_norm: nn.Module
    attention_end: Any
    mlp_norm: nn.Module
    mlp_end: Any


def _is_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Norm") and not any(True for _ in module.children())


def _find_stack(model: nn.Module, name: str | None) -> tuple[str, nn.ModuleList]:
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    if name is not None:
        if name not in lists:
            raise ValueError(f"there is no nn.ModuleList {name!r}; there are {list(lists)}")
        return name, lists[name]
    fitting = [n for n, m in lists.items() if all(any(map(_is_norm, x.children())) for x in m)]
    if len(fitting) != 1:
        raise ValueError(
            f"{len(fitting)} lists of layers with norms were found ({fitting}), and one is needed; "
            f"give its name, layers='model.layers'"
        )
    return fitting[0], lists[fitting[0]]


def _layers(model: nn.Module, layers: str | None) -> list[tuple[str, nn.Module]]:
    name, stack = _find_stack(model, layers)
    return [(f"{name}.{i}", layer) for i, layer in enumerate(stack)]


def _parts(name: str, layer: nn.Module) -> _Parts:
    children = dict(layer.named_children())
    norms = [n for n, child in children.items() if _is_norm(child)]
    blocks = [n for n, child in children.items() if any(map(_is_linear, child.modules()))]
    attention = [n for n in blocks if "att" in n.lower()]
    if len(norms) != 2 or len(blocks) != 2 or len(attention) != 1:
        raise ValueError(
            f"{name} has norms {norms} and blocks {blocks}; a standard pre-norm layer has two "
            f"norms, one attention and one MLP. Build others from umup.layers and umup.functional."
        )
    after = [n for n in norms if n.startswith(_POST_NORMS)]
    if after:
        raise ValueError(
            f"{name} has a norm {after[0]!r} behind its branch, which would undo the branch's "
            f"multiplier; only pre-norm layers, x + branch(norm(x)), can be converted. Build "
            f"others from umup.layers and umup.functional."
        )
    mlp = next(n for n in blocks if n not in attention)
    order = list(children)
    first, second = sorted(norms, key=order.index)
    return _Parts(
        name,
        children[attention[0]],
        children[first],
        _end_of(f"{name}.{attention[0]}", children[attention[0]]),
        children[second],
        _end_of(f"{name}.{mlp}", children[mlp]),
    )


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _end_of(name: str, block: nn.Module) -> nn.Module:
    """The linear that a branch ends with: by its name, else the last that was registered."""
    linears = {n: m for n, m in block.named_modules() if _is_linear(m)}
    named = [m for n, m in linears.items() if n.rpartition(".")[2] in _ENDS]
    if len(named) > 1:
        raise ValueError(
            f"{name} has several ends: {[n for n, m in linears.items() if m in named]}"
        )
    return named[0] if named else list(linears.values())[-1]


def _outside(model: nn.Module, stack: str) -> dict[str, nn.Module]:
    return {
        name: module
        for name, module in model.named_modules()
        if not name.startswith(f"{stack}.") and name != stack
    }


def _find_readout(outside: Mapping[str, nn.Module]) -> nn.Module:
    vocabularies = {m.num_embeddings for m in outside.values() if isinstance(m, nn.Embedding)}
    linears = {n: m for n, m in outside.items() if isinstance(m, nn.Linear)}
    fitting = [m for m in linears.values() if m.out_features in vocabularies]
    if len(linears) != 1 or len(fitting) != 1:
        raise ValueError(
            f"outside of the layers are linears {list(linears)}, and embeddings of "
            f"{sorted(vocabularies)} rows; there must be one linear, over the vocabulary"
        )
    return fitting[0]


def _check_linears(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if _is_linear(module) and type(module) is not nn.Linear:
            raise ValueError(
                f"{name} is a {type(module).__module__}.{type(module).__name__}, and only plain "
                f"nn.Linear can be given multipliers; convert before adapters, quantisers or "
                f"another umup.apply, and transpose a Conv1D into an nn.Linear"
            )


def _check_norms(model: nn.Module) -> None:
    """A weight of 1 has to mean a multiplier of 1; in Gemma's norms it means 2."""
    for name, module in model.named_modules():
        weight = module._parameters.get("weight") if _is_norm(module) else None
        if weight is None:
            continue
        trial = copy.deepcopy(module).to_empty(device="cpu")
        with torch.no_grad():
            for local, param in trial.named_parameters():
                param.fill_(1.0 if local == "weight" else 0.0)
            probe = torch.ones(1, weight.numel(), dtype=weight.dtype)
            probe[:, ::2] = -1
            size = float(trial(probe.view(1, *weight.shape)).float().square().mean().sqrt())
        if abs(size - 1) > 0.1:
            raise ValueError(
                f"{name} is a {type(module).__name__} that gives RMS {size:.3g} for a weight of 1, "
                f"where 1 is needed (Gemma's multiply by 1 + weight). Use nn.RMSNorm."
            )


# ------------------------------------------------------------------ what is changed


def _set_logits(part: _Parts, head_dim: int | None, multiplier: float) -> None:
    attention: Any = part.attention
    dim = head_dim or getattr(attention, "head_dim", None)
    if not isinstance(dim, int):
        raise ValueError(
            f"{part.name}: the width of a head is not known, and logits are to be q.k / head_dim; "
            f"give head_dim="
        )
    query = next((n for n in _QUERIES if isinstance(getattr(attention, n, None), nn.Linear)), None)
    if query is None and isinstance(attention, nn.ModuleDict):
        query = next((n for n in _QUERIES if n in attention), None)
    factor = multiplier * dim**-0.5  # what logits lack to be multiplier / head_dim
    # Behind a norm of the queries a multiplier of their linear would have no effect.
    norm = next((n for n in _QUERY_NORMS if hasattr(attention, n)), None)
    for name in _SCALES:
        value = getattr(attention, name, None)
        if isinstance(value, float) and math.isclose(value, dim**-0.5, rel_tol=1e-3):
            setattr(attention, name, multiplier / dim)
            vars(attention)["umup_query"] = (norm or query, factor)
            return
    if query is None or norm is not None:
        raise ValueError(
            f"{part.name}: found neither a number head_dim^-1/2 named {', '.join(_SCALES)} nor a "
            f"linear named {', '.join(_QUERIES)}, without a norm behind it, to make logits "
            f"q.k / head_dim with. Give "
            f"attention_scale='leave' and do so yourself."
        )
    attention.get_submodule(query).umup_factor = factor


def _convert(module: nn.Module, is_readout: bool) -> None:
    changed: Any = module
    if type(module) is nn.Linear:
        changed.__class__ = LinearReadout if is_readout else Linear
        changed.constraint = None if is_readout else "to_output_scale"
        changed.multiplier = vars(module).pop("umup_factor", 1.0)
        if not is_readout:
            changed.output_multiplier = 1.0
            changed.umup_roles = {"weight": "hidden", "bias": "bias"}
    elif type(module) is nn.Embedding:
        changed.__class__ = Embedding
    elif _is_norm(module):
        changed.umup_roles = {"weight": "norm", "bias": "bias"}


@torch.no_grad()
def _reinitialize(model: nn.Module) -> None:
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is None:
                continue
            if _is_norm(module) and name == "weight":
                param.fill_(1.0)
            elif name == "bias":
                param.zero_()
            else:
                param.normal_()


@torch.no_grad()
def _try(model: nn.Module, parts: Sequence[_Parts], example: Callable[[nn.Module], Any]) -> None:
    """Run the example on the model as it is: each branch must begin with its norm."""
    calls: list[nn.Module] = []
    ends = [(p.name, n, e) for p in parts for n, e in _branches(p)]
    watched = [m for _, *pair in ends for m in pair]
    _run(model, watched, lambda module, args: calls.append(module), example)
    for name, norm, end in ends:
        if norm not in calls or end not in calls:
            raise ValueError(
                f"the example did not reach both ends of a branch of {name}; it must run the whole "
                f"model on real tokens"
            )
        if calls.index(norm) > calls.index(end):
            raise ValueError(
                f"{name} calls a norm after the linear that ends its branch: a post-norm layer, "
                f"whose norm would undo the branch's multiplier. Only x + branch(norm(x)) can be "
                f"converted. Build others from umup.layers and umup.functional."
            )


def _branches(part: _Parts) -> tuple[tuple[nn.Module, Any], tuple[nn.Module, Any]]:
    """Norm and end of attention and of the MLP."""
    return (part.attention_norm, part.attention_end), (part.mlp_norm, part.mlp_end)


@torch.no_grad()
def _measure(
    model: nn.Module, parts: Sequence[_Parts], example: Callable[[nn.Module], Any]
) -> None:
    """Divide what reaches the end of each branch by its RMS, before the next sees its output."""

    def divide(module: Any, args: tuple[Any, ...]) -> None:
        size = float(args[0].float().square().mean().sqrt())
        if not 0 < size < math.inf:
            raise ValueError(
                f"the example gave RMS {size} at the end of a branch; it must run the whole model "
                f"on real tokens"
            )
        module.multiplier = 1 / size

    _run(model, [end for part in parts for _, end in _branches(part)], divide, example)


def _run(
    model: nn.Module,
    watched: Sequence[nn.Module],
    hook: Callable[[Any, tuple[Any, ...]], None],
    example: Callable[[nn.Module], Any],
) -> None:
    handles = [module.register_forward_pre_hook(hook) for module in watched]
    try:
        example(model)
    finally:
        for handle in handles:
            handle.remove()


# ------------------------------------------------------------------ and back


@torch.no_grad()
def export(model: nn.Module, state_dict: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """`model.state_dict()` with every multiplier inside its weight, for the plain architecture.

    That is the model before `apply`; or for a `Decoder` one of the same names with `nn.Linear`,
    `x + branch`, `down(up(x) * silu(gate(x)))`, and attention with logits `q.k / head_dim^1/2`.
    Products are made in FP32 and rounded to the dtype of the weight.

    Args:
        state_dict: weights to take in place of the model's, such as the FP32 ones of
            `MixedPrecision.fp32_state_dict(model)`.

    Raises:
        ValueError: for tied weights without a norm in front of the readout that could hold
            1 / width, and for logits whose queries cannot be told from keys and values.

    >>> import torch
    >>> from mixprec import umup
    >>> layer = torch.nn.Sequential(umup.layers.Linear(4, 2, bias=False))
    >>> torch.equal(umup.export(layer)["0.weight"], layer[0].weight / 2)
    True
    """
    weights = dict(model.state_dict() if state_dict is None else state_dict)
    factors: dict[str, float] = {}
    tied = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, LinearReadout):
            forward = module.multiplier / module.in_features
            if id(module.weight) in tied:
                _into_final_norm(model, forward, factors)
            else:
                factors[f"{prefix}weight"] = forward
        elif isinstance(module, Linear):
            forward = module.multiplier * module.in_features**-0.5
            factors[f"{prefix}weight"] = forward * module.output_multiplier
            factors[f"{prefix}bias"] = module.output_multiplier
    for name, module in model.named_modules():
        for part, factor in _inner_factors(name, module):
            for local in ("weight", "bias"):
                key = f"{name}.{part}.{local}".removeprefix(".")
                factors[key] = factors.get(key, 1.0) * factor
    return {
        name: (weight.double() * factors[name]).to(weight.dtype) if name in factors else weight
        for name, weight in weights.items()
    }


def _inner_factors(name: str, module: nn.Module) -> list[tuple[str, float]]:
    """Factors of a block that are in none of its linears, and the linear to put them into."""
    found: list[tuple[str, float]] = []
    query: tuple[str | None, float] | None = getattr(module, "umup_query", None)
    if query is not None:
        if query[0] is None:
            raise ValueError(
                f"{name} multiplies its logits by a number of its own, and has no linear for "
                f"queries alone to put {query[1]:.4g} into; set that number in the plain model"
            )
        found.append((query[0], query[1]))
    gate: tuple[str, float] | None = getattr(module, "umup_gate", None)
    if gate is not None:
        found.append(gate)
    return found


def _into_final_norm(model: nn.Module, forward: float, factors: dict[str, float]) -> None:
    """A tied weight cannot hold the readout's multiplier; the norm before the readout can."""
    inside = [name for name, m in model.named_modules() if getattr(m, "umup_depth", None)]
    norms = [
        name
        for name, m in model.named_modules()
        if _is_norm(m) and not any(name.startswith(f"{stack}.") for stack in inside)
    ]
    if len(norms) != 1 or model.get_submodule(norms[0])._parameters.get("weight") is None:
        raise ValueError(
            f"the readout is tied to the embedding, and of the norms outside of the layers "
            f"({norms}) there is not one with a weight that could hold its 1 / width. Untie "
            f"them first: readout.weight = nn.Parameter(readout.weight.clone())"
        )
    factors[f"{norms[0]}.weight"] = factors[f"{norms[0]}.bias"] = forward
