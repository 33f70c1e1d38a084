"""Turning the linear layers of a model into FP8 ones, and back.

Only the class of a module changes, and one attribute is added that no state dict shows: parameters,
names, hooks and ties stay. Whatever can go wrong with a shape goes wrong here, or becomes a line of
the report that says why a layer stays in 16 bits; nothing waits for a backward pass to fail.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from mixprec import formats
from mixprec.casting.model import NORMS, Report, matches, nearest, refuse_text
from mixprec.casting.model import convert as cast
from mixprec.float8.exponents import read_exponents
from mixprec.float8.linear import Float8Layer, Float8Linear, Float8State
from mixprec.float8.products import ALIGNMENT, has_units
from mixprec.float8.recipe import Recipe, by_name
from mixprec.formats import Format
from mixprec.gradients import is_dtensor

_STAYS = "16 bits"

__all__ = [
    "EXCLUDED",
    "MIN_DIM",
    "Layer",
    "LayerReport",
    "convert",
    "enable_fsdp_float8_all_gather",
    "exponents",
    "float8_layers",
    "load_exponents",
    "recast",
    "revert",
]

EXCLUDED = ("lm_head", "head", "*router*", "*readout*", "*classifier*")
"""Output layers and routers: a small error there changes a choice, not one addend of many."""

MIN_DIM = 1024
"""Below it casts cost more time than products save, measured with thousands of tokens."""

_16_BITS = ("bf16", "fp16", "fp32")


@dataclass(frozen=True)
class Layer:
    """What became of one linear layer."""

    name: str
    in_features: int
    out_features: int
    runs_in: str
    """The recipe, or "16 bits"."""
    reason: str = ""


@dataclass(frozen=True)
class LayerReport(Report):
    """Also one `Layer` for each linear layer, which is what is printed: a table and a sum."""

    layers: tuple[Layer, ...]
    emulated_on: str | None = None
    """The type of the model's device, if that has no FP8 units."""
    others: Mapping[str, int] = field(default_factory=dict[str, int])
    """How many parameters modules of each class have that are no linear layers."""

    @property
    def converted(self) -> tuple[str, ...]:
        """Names of the layers that run in FP8."""
        return tuple(layer.name for layer in self.layers if layer.runs_in != _STAYS)

    def __str__(self) -> str:
        if not self.layers:
            return " ".join(["no linear layers.", *self._about_others(0, 0)]).rstrip(".")
        sizes = [f"{layer.in_features} -> {layer.out_features}" for layer in self.layers]
        name = max(len(layer.name) for layer in self.layers)
        runs_in = max(len(layer.runs_in) for layer in self.layers)
        lines = [
            f"{layer.name:{name}}  {size:{max(map(len, sizes))}}  {layer.runs_in:{runs_in}}  "
            f"{layer.reason}".rstrip()
            for layer, size in zip(self.layers, sizes, strict=True)
        ]
        weights = [layer.in_features * layer.out_features for layer in self.layers]
        in_fp8 = sum(
            number
            for layer, number in zip(self.layers, weights, strict=True)
            if layer.runs_in != _STAYS
        )
        share = 100 * in_fp8 / max(sum(weights), 1)
        lines.append(
            f"{len(self.converted)} of {len(self.layers)} linear layers in FP8, with {share:.0f} % "
            "of their weights"
        )
        lines += self._about_others(in_fp8, sum(weights))
        if self.converted and self.emulated_on:
            lines.append(
                f"Emulated: {self.emulated_on} has no FP8 units, so the numbers are the same and "
                "no time is saved"
            )
        return "\n".join([*lines, *map(str, self.losses)])

    def _about_others(self, in_fp8: int, in_linears: int) -> list[str]:
        """What share of the whole model runs in FP8, if more than linear layers has weights."""
        total = in_linears + sum(self.others.values())
        if not any(self.others.values()):
            return []
        most = max(self.others, key=lambda kind: self.others[kind])
        return [
            f"That is {100 * in_fp8 / total:.0f} % of all the model's weights. No other module "
            f"runs in FP8: {most} has {100 * self.others[most] / total:.0f} %"
        ]


def convert(
    model: nn.Module,
    recipe: Recipe | str,
    *,
    params: Format = formats.BF16,
    keep_fp32: Sequence[str] = (NORMS,),
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = EXCLUDED,
    overrides: Mapping[str, Recipe | str] | None = None,
    min_dim: int = MIN_DIM,
) -> LayerReport:
    """Cast `model` to `params` and run its linear layers by `recipe`. See `Precision.convert`.

    >>> from mixprec import float8
    >>> model = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 10))
    >>> print(float8.convert(model, "static", min_dim=16))
    0  64 -> 32  static
    2  32 -> 10  16 bits  out_features=10 is no multiple of 16
    1 of 2 linear layers in FP8, with 86 % of their weights
    Emulated: cpu has no FP8 units, so the numbers are the same and no time is saved
    """
    recipe = by_name(recipe)
    chosen = {pattern: _override(pattern, value) for pattern, value in (overrides or {}).items()}
    _check_patterns(model, include, exclude, chosen)
    _refuse_converted(model)
    _refuse_sharded(_linears(model))
    casts = cast(model, params, keep_fp32=keep_fp32)
    layers: list[Layer] = []
    plans: list[tuple[nn.Linear, Recipe]] = []
    others = _owners_that_are_no_linear(model)
    for name, module in _linears(model):
        plan, reason = _asked_for(name, module, recipe, include, exclude, chosen)
        obstacle = _obstacle(module, others, params)
        if not obstacle and not reason:
            obstacle = _too_small(module, min_dim)
        if plan is not None and obstacle:
            plan, reason = None, obstacle
        if plan is not None:
            plans.append((module, plan))
        runs_in = _STAYS if plan is None else str(plan)
        layers.append(Layer(name, module.in_features, module.out_features, runs_in, reason))
    for module, plan in plans:
        module._float8 = Float8State(plan, module.weight)  # pyright: ignore[reportArgumentType]
        module.__class__ = _float8_class(type(module))  # pyright: ignore[reportAttributeAccessIssue]
    emulated_on = _without_units(module for module, _ in plans)
    return LayerReport(casts.rows, casts.losses, tuple(layers), emulated_on, _others(model))


def revert(model: nn.Module) -> None:
    """Give every FP8 layer of `model` back the class it had.

    >>> from mixprec import float8
    >>> model = nn.Sequential(nn.Linear(64, 32))
    >>> _ = float8.convert(model, "static", min_dim=16)
    >>> float8.revert(model)
    >>> model
    Sequential(
      (0): Linear(in_features=64, out_features=32, bias=True)
    )
    """
    _refuse_sharded(float8_layers(model))
    for _, module in list(float8_layers(model)):
        module.__class__ = module.reverts_to  # pyright: ignore[reportAttributeAccessIssue]
        del module._float8


def exponents(model: nn.Module) -> dict[str, dict[str, int]]:
    """The exponents of each layer's adaptive operands, by name. Waits for the device, once.

    Nothing needs them: without them a resumed run fits them anew in its first step, as the first
    run did. With them it goes on with the same. How long a wait has lasted is not kept.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(64, 32, bias=False))
    >>> _ = convert(model, "adaptive", min_dim=16)
    >>> _ = model(torch.full((4, 64), 3.0, dtype=torch.bfloat16))
    >>> exponents(model)["0"]["input"]  # 3 * 2^5 = 96, less than half of 448
    5
    """
    found = {
        (name, role): operand
        for name, layer in float8_layers(model)
        for role, operand in layer._float8.operands().items()
        if operand.cast.scaling == "adaptive"
    }
    exponents: dict[str, dict[str, int]] = {}
    for (name, role), exponent in zip(found, read_exponents(found.values()), strict=True):
        exponents.setdefault(name, {})[role] = exponent
    return exponents


def load_exponents(model: nn.Module, saved: Mapping[str, Mapping[str, int]]) -> None:
    """Go on with the exponents that `exponents` returned.

    Raises:
        ValueError: for a name that is no adaptive operand of `model`.
    """
    layers = dict(float8_layers(model))
    for name, by_role in saved.items():
        operands = layers[name]._float8.operands() if name in layers else {}
        for role in by_role:
            if role not in operands or operands[role].cast.scaling != "adaptive":
                raise ValueError(
                    f"exponents hold {name!r} {role!r}, which is no adaptive operand of this "
                    "model; convert it by the same recipe, overrides and exclusions first"
                )
    for name, by_role in saved.items():
        for role, exponent in by_role.items():
            layers[name]._float8.operands()[role].set_exponent(exponent)
        layers[name]._float8.weight.forget()


def recast(model: nn.Module) -> None:
    """Cast the weights of `model` anew at their next use. See `Precision.recast`."""
    for _, layer in float8_layers(model):
        layer._float8.weight.replaced()


def enable_fsdp_float8_all_gather(model: nn.Module) -> tuple[str, ...]:
    """Have FSDP2 gather the weights of FP8 layers as bytes. Call it before `fully_shard`.

    Half the traffic of a gathering in 16 bits and half its memory, and for 16-bit parameters the
    same results to the bit; FP32 parameters are rounded once, to FP8, instead of twice. Parameters,
    gradients, state dicts and optimizers see nothing of it. What reads `layer.weight` itself in a
    forward pass sees the rounded weight.

    It needs a multiplier that is known before the weight is gathered: that of recipes "static" and
    "adaptive". Other layers are gathered in 16 bits, and so are those under tensor parallelism.

    Returns:
        Names of the layers whose weights will be gathered as bytes.

    Raises:
        ValueError: if no layer runs in FP8, or one is sharded already.

    >>> from mixprec import float8
    >>> model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    >>> _ = float8.convert(model, "static", min_dim=16, overrides={"1": "rowwise"})
    >>> float8.enable_fsdp_float8_all_gather(model)
    ('0',)
    """
    layers = dict(float8_layers(model))
    if not layers:
        raise ValueError(
            "no layer of this model runs in FP8, so none has bytes to gather. Call "
            "Precision('fp8').convert(model) first, then this, then fully_shard."
        )
    _refuse_sharded(layers.items())
    return tuple(name for name, layer in layers.items() if layer._float8.gather_bytes())


def float8_layers(model: nn.Module) -> Iterator[tuple[str, Float8Layer]]:
    """Name and module of every layer that runs in FP8."""
    for name, module in model.named_modules():
        if isinstance(module, Float8Layer):
            yield name, module


# ------------------------------------------------------------------ which layers


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            yield name or "(model)", module


def _float8_class(kind: type[nn.Linear]) -> type[nn.Linear] | None:
    """What a layer of exactly this class becomes; a subclass may compute anything."""
    from mixprec.float8.unit_linear import Float8UnitLinear
    from mixprec.umup import layers

    return {nn.Linear: Float8Linear, layers.Linear: Float8UnitLinear}.get(kind)


def _asked_for(
    name: str,
    module: nn.Linear,
    recipe: Recipe,
    include: Sequence[str] | None,
    exclude: Sequence[str],
    overrides: Mapping[str, Recipe | None],
) -> tuple[Recipe | None, str]:
    """The recipe that the caller wants for a layer, and why it is not the usual one."""
    for pattern, plan in overrides.items():
        if matches(pattern, name, module):
            return plan, f"override {pattern!r}"
    for pattern in exclude:
        if matches(pattern, name, module):
            return None, f"excluded by {pattern!r}"
    if include is not None and not any(matches(pattern, name, module) for pattern in include):
        return None, "not in include"
    return recipe, ""


def _too_small(module: nn.Linear, min_dim: int) -> str:
    smallest = min(module.in_features, module.out_features)
    if smallest >= min_dim:
        return ""
    return f"a size of {smallest} is below min_dim={min_dim}, where FP8 gains no time"


def _obstacle(module: nn.Linear, others: Mapping[int, str], params: Format) -> str:
    """Why a layer cannot run in FP8 whatever is asked for, or nothing."""
    kind, weight = type(module), module.weight
    if "weight" not in module._parameters:
        return "its weight is computed, not a parameter"
    if _float8_class(kind) is None:
        return f"is a {kind.__name__}, which may have a forward of its own"
    if "forward" in vars(module):
        return "its forward was replaced, and that may compute anything"
    if module._modules:
        return f"has a module of its own, {next(iter(module._modules))!r}, which may use its weight"
    for size in ("in_features", "out_features"):
        if getattr(module, size) % ALIGNMENT:
            return f"{size}={getattr(module, size)} is no multiple of {ALIGNMENT}"
    if weight.dtype != params.dtype:
        return f"its weight is kept in {formats.by_dtype(weight.dtype)}"
    if id(weight) in others:
        return f"its weight is also that of {others[id(weight)]!r}"
    return ""


def _owners_that_are_no_linear(model: nn.Module) -> dict[int, str]:
    """Names of the modules that read a parameter and are no linear layers, by its identity."""
    return {
        id(parameter): name
        for name, module in model.named_modules()
        if not isinstance(module, nn.Linear)
        for parameter in module.parameters(recurse=False)
    }


def _others(model: nn.Module) -> dict[str, int]:
    """Numbers of parameters of modules that are no linear layers, by class; shared ones once."""
    seen = {id(linear.weight) for _, linear in _linears(model)}
    numbers: dict[str, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if not isinstance(module, nn.Linear) and id(parameter) not in seen:
                seen.add(id(parameter))
                kind = type(module).__name__
                numbers[kind] = numbers.get(kind, 0) + parameter.numel()
    return numbers


def _without_units(modules: Iterable[nn.Linear]) -> str | None:
    for module in modules:
        if not has_units(module.weight.device):
            return module.weight.device.type
    return None


# ------------------------------------------------------------------ bad input


def _override(pattern: str, value: Recipe | str) -> Recipe | None:
    """The recipe of an override; None for a layer that stays as it is."""
    if isinstance(value, str) and value in _16_BITS:
        return None
    try:
        return by_name(value)
    except ValueError as error:
        raise ValueError(
            f"overrides[{pattern!r}]: {error}; 'bf16' leaves a layer as it is"
        ) from None


def _check_patterns(
    model: nn.Module,
    include: Sequence[str] | None,
    exclude: Sequence[str],
    overrides: Mapping[str, Recipe | None],
) -> None:
    linears = list(_linears(model))
    given = {"include": include or (), "exclude": exclude, "overrides": tuple(overrides)}
    for option, patterns in given.items():
        refuse_text(option, patterns)
        for pattern in patterns:
            if pattern in EXCLUDED and option == "exclude":
                continue
            if not any(matches(pattern, name, module) for name, module in linears):
                near = nearest(pattern, (name for name, _ in linears))
                raise ValueError(
                    f"{option} pattern {pattern!r} matches no linear layer, so it would do "
                    f"nothing. Layers with similar names: {near}"
                )


def _refuse_sharded(layers: Iterable[tuple[str, nn.Linear]]) -> None:
    for name, layer in layers:
        if is_dtensor(layer.weight):
            raise ValueError(
                f"the weight of {name!r} is a DTensor already. Choose how layers run in FP8 before "
                "fully_shard and parallelize_module, which then find out what they shard."
            )


def _refuse_converted(model: nn.Module) -> None:
    for name, module in float8_layers(model):
        raise ValueError(
            f"{name or 'the model'!r} runs in FP8 already, by recipe {module._float8.recipe}. Call "
            "Precision.revert(model) first, to convert by another recipe."
        )
