"""Which number is held in which format, said once and applied to a model.

A training run has four places for a format, and they need not agree:

    params    what the model stores, and what a checkpoint of it holds
    compute   what matrix products read and write
    grads     what gradients are summed in over the micro-batches of one step
    reduce    what they are summed in over ranks

`Precision` is that choice as a value. The presets store and compute in one format and sum in FP32:
a sum of 16-bit gradients stops growing after 2^(mantissa bits + 1) equal addends, 256 in BF16. FP32
masters are not listed here, because they belong to the optimizer (`mixprec.MixedPrecision`).

The preset "fp8" is BF16 with a recipe: linear layers read their operands in 8 bits, and everything
else stays as it is (`mixprec.float8`).

`cast_model` applies a precision to a model and keeps chosen modules, by default the norms, in FP32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal, TypeVar

from torch import nn

from mixprec import float8, formats
from mixprec.casting import model as conversion
from mixprec.casting.model import NORMS, Report
from mixprec.float8 import Recipe, Stats
from mixprec.float8.conversion import exponents, load_exponents, recast
from mixprec.formats import BF16, FP16, FP32, Format

if TYPE_CHECKING:
    from torch.distributed.fsdp import MixedPrecisionPolicy

__all__ = ["Precision", "cast_model"]

ModuleT = TypeVar("ModuleT", bound=nn.Module)

_PRESETS = {"fp32": FP32, "bf16": BF16, "fp16": FP16, "fp8": BF16}
"""The format of the parameters."""

_FIELDS = ("params", "compute", "grads", "reduce")


@dataclass(frozen=True, init=False)
class Precision:
    """Which number is held in which format: a preset, with single fields changed if given.

    Args:
        preset: "fp32", "bf16" or "fp16", the format of `params`; or "fp8", which is "bf16" with
            `recipe="adaptive"`.
        params: format of the model's parameters, instead of the preset's.
        compute: format of matrix products. The format of `params` if not given; another one only
            for FP32 parameters, and then autocast or FSDP2 has to cast them.
        grads: format of gradient sums over micro-batches, FP32 or that of `compute`.
        reduce: format of gradient sums over ranks.
        recipe: how linear layers run in FP8: "static" for unit-scaled models, "adaptive" for any
            other, "tensorwise" or "rowwise" for scales computed from each tensor, or a
            `mixprec.float8.Recipe`.

    Raises:
        ValueError: for an unknown preset or formats that do not go together.

    >>> from mixprec import Precision
    >>> print(Precision("bf16"))
    params=bf16,compute=bf16,grads=fp32,reduce=fp32
    >>> Precision.parse("params=bf16,grads=fp32") == Precision("bf16")
    True
    >>> print(Precision("fp8", recipe="static"))
    params=bf16,compute=bf16,grads=fp32,reduce=fp32,recipe=static
    """

    params: Format
    compute: Format
    grads: Format
    reduce: Format
    recipe: Recipe | None

    def __init__(
        self,
        preset: Literal["fp32", "bf16", "fp16", "fp8"] = "fp32",
        *,
        params: Format | None = None,
        compute: Format | None = None,
        grads: Format | None = None,
        reduce: Format | None = None,
        recipe: Recipe | str | None = None,
    ) -> None:
        if recipe is None and preset == "fp8":
            recipe = "adaptive"
        object.__setattr__(self, "recipe", None if recipe is None else float8.by_name(recipe))
        params = params or _preset(preset)
        chosen = (params, compute or params, grads or FP32, reduce or FP32)
        for name, format in zip(_FIELDS, chosen, strict=True):
            _check_format(name, format)
            object.__setattr__(self, name, format)
        if self.params not in (FP32, self.compute):
            raise ValueError(
                f"params={self.params} cannot compute in {self.compute}: a model multiplies in the "
                f"format of its weights. Use compute={self.params}, or params=fp32 with autocast."
            )
        if self.grads not in (FP32, self.compute):
            raise ValueError(
                f"grads={self.grads} is neither compute={self.compute}, in which gradients arrive, "
                "nor FP32, which can sum them. Use grads=fp32."
            )

    @classmethod
    def parse(cls, text: str) -> Precision:
        """The precision that a command line names: a preset, or `field=format` pairs.

        Fields left out follow the constructor's rules, so `params=bf16` alone is the preset "bf16".

        >>> from mixprec import Precision
        >>> print(Precision.parse("compute=bf16"))
        params=fp32,compute=bf16,grads=fp32,reduce=fp32
        """
        if "=" not in text:
            preset = text.strip()
            return cls(params=_preset(preset), recipe="adaptive" if preset == "fp8" else None)
        chosen: dict[str, str] = {}
        known = [field.name for field in fields(cls)]
        for pair in text.split(","):
            name, _, value = (part.strip() for part in pair.partition("="))
            if name not in known or name in chosen:
                fault = "given twice" if name in chosen else f"not one of {', '.join(known)}"
                raise ValueError(f"field {name!r} in precision {text!r} is {fault}")
            chosen[name] = value
        recipe = chosen.pop("recipe", None)
        given = {name: formats.by_name(value) for name, value in chosen.items()}
        return cls(
            params=given.get("params"),
            compute=given.get("compute"),
            grads=given.get("grads"),
            reduce=given.get("reduce"),
            recipe=recipe,
        )

    @property
    def needs_loss_scale(self) -> bool:
        """Whether gradients can fall below the range of `compute`: true for five exponent bits."""
        return self.compute.exponent_bits < FP32.exponent_bits

    def convert(
        self,
        model: nn.Module,
        *,
        keep_fp32: Sequence[str] = (NORMS,),
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = float8.EXCLUDED,
        overrides: Mapping[str, Recipe | str] | None = None,
        min_dim: int = float8.MIN_DIM,
    ) -> Report:
        """Cast `model` in place, as `cast_model` does, and run its linear layers by `recipe`.

        A layer that runs in FP8 keeps its parameters, names, hooks and ties; only its class is
        another, and a state dict shows nothing of it. Convert before `fully_shard`, `parallelize`
        or DDP, and before `torch.compile`. Patterns are those of `cast_model`.

        Args:
            keep_fp32: modules that stay in FP32; see `cast_model`.
            include: layers that may run in FP8; by default all.
            exclude: layers that stay in 16 bits; by default output layers and routers, by their
                usual names.
            overrides: recipes of single layers by pattern, or "bf16" for none; the first that
                matches decides, before `include`, `exclude` and `min_dim`.
            min_dim: layers with a smaller size stay in 16 bits, because their casts cost more than
                their products save.

        Returns:
            What was done to each module, as `rows`, and `losses`: tensors of which the cast made
            infinities or zeros, and buffers that it rounded. With a recipe it is a `LayerReport`:
            `layers` says for each linear layer how it runs and why, `converted` names those in FP8.
            Layers with a size that is no multiple of 16 and those whose weight is also an
            embedding's stay in 16 bits, and the report says so.

        Raises:
            ValueError: for a pattern that matches nothing, and a model that is converted or sharded
                already.

        >>> from torch import nn
        >>> from mixprec import Precision
        >>> print(Precision("bf16").convert(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))))
        0  Linear     20 parameters  fp32 -> bf16
        1  LayerNorm   8 parameters  fp32 -> fp32  matches '*norm*'
        >>> model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 3))
        >>> print(Precision("fp8").convert(model, min_dim=16))
        0  32 -> 64  adaptive
        2  64 -> 3   16 bits   out_features=3 is no multiple of 16
        1 of 2 linear layers in FP8, with 91 % of their weights
        Emulated: cpu has no FP8 units, so the numbers are the same and no time is saved
        """
        if self.recipe is None:
            _refuse_layer_options(self, include, exclude, overrides, min_dim)
            return conversion.convert(model, self.params, keep_fp32=keep_fp32)
        return float8.convert(
            model,
            self.recipe,
            params=self.params,
            keep_fp32=keep_fp32,
            include=include,
            exclude=exclude,
            overrides=overrides,
            min_dim=min_dim,
        )

    def revert(self, model: nn.Module) -> None:
        """Give every FP8 layer of `model` the class back that it had; its parameters stay BF16.

        Raises:
            ValueError: for layers that are sharded; revert before `fully_shard` and the like.
        """
        float8.revert(model)

    def stats(self, model: nn.Module) -> Stats:
        """What the casts of each FP8 layer of `model` lost in the last step that cast anything.

        Print it for a table; `warnings()` has a sentence for each operand that saturates in more
        than 1e-4 of its values or turns more than 5 % into 0, with the exponent that mends it.
        Waits for the device, once.
        """
        return float8.stats(model)

    def exponents(self, model: nn.Module) -> dict[str, dict[str, int]]:
        """Exponents of the adaptive operands of each FP8 layer of `model`; optional to save.

        Without them a resumed run fits its exponents anew in its first step, as the first run did;
        with them it goes on with the same. Waits for the device, once.
        """
        return exponents(model)

    def load_exponents(self, model: nn.Module, saved: Mapping[str, Mapping[str, int]]) -> None:
        """Go on with what `exponents` returned; a ValueError for operands that do not adapt."""
        load_exponents(model, saved)

    def recast(self, model: nn.Module) -> None:
        """Cast the weights of FP8 layers anew at their next use.

        Needed after a write through `.data`, `numpy` and the like, which leaves no trace, between
        two micro-batches of one step. All else is noticed: writes that autograd knows of, and any
        way of writing before an evaluation, after a step of an optimizer, or before a backward
        pass.

        >>> import torch
        >>> model = nn.Sequential(nn.Linear(64, 32, bias=False))
        >>> precision = Precision("fp8")
        >>> _ = precision.convert(model, min_dim=16)
        >>> x = torch.ones(4, 64, dtype=torch.bfloat16)
        >>> model(x).sum().backward()
        >>> _ = model[0].weight.data.zero_()
        >>> precision.recast(model)
        >>> model(x).any().item()
        False
        """
        recast(model)

    def fsdp_policy(self) -> MixedPrecisionPolicy:
        """The `mp_policy` for `torch.distributed.fsdp.fully_shard`.

        FSDP2 takes one parameter dtype a group, so a module that `cast_model` kept in FP32 must be
        sharded by a call of its own. FP32 parameters with `compute=bf16` have no such trouble.
        """
        from torch.distributed.fsdp import MixedPrecisionPolicy

        param_dtype = None if self.compute == self.params else self.compute.dtype
        return MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=self.reduce.dtype)

    def explain(self) -> str:
        """What this precision asks of the loop around it, one sentence a line."""
        return "\n".join(self._sentences())

    def _sentences(self) -> Iterator[str]:
        params, compute, grads = self.params, self.compute, self.grads
        yield f"Parameters are held in {params}, {params.bits // 8} bytes each."
        if params != FP32:
            yield (
                f"An update below {params.epsilon / 2:.2g} of a weight would be rounded away: wrap "
                "the optimizer in mixprec.MixedPrecision, which keeps FP32 masters."
            )
        if compute != params:
            yield (
                f"Products are computed in {compute}: run the forward pass in torch.autocast("
                f"device, dtype={compute.dtype}), or give fsdp_policy() to fully_shard."
            )
        if self.needs_loss_scale:
            yield (
                f"Gradients below {compute.smallest_subnormal / 2:.2g} become zero in {compute}: "
                "scale the loss with mixprec.DynamicLossScaler."
            )
        else:
            yield f"Gradients have the range of FP32 in {compute}: no loss scale is needed."
        if self.recipe is not None:
            follows = "their scales follow gradients of any size."
            if self.recipe.grad_output.scaling == "static":
                follows = (
                    "sum the loss over tokens, with presumed_tokens=1 in a GradientAccumulator, so "
                    "that gradients stay in range."
                )
            yield (
                f"Linear layers that convert() names read their operands in 8 bits (recipe "
                f"{self.recipe}): {follows}"
            )
        sums = "exact enough for any number of micro-batches"
        if grads != FP32:
            sums = f"which stops growing after {2 ** (grads.mantissa_bits + 1)} equal addends"
        yield f"Micro-batches sum gradients in {grads}, {sums}; ranks sum them in {self.reduce}."

    def __str__(self) -> str:
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        return ",".join(f"{name}={value}" for name, value in held.items() if value is not None)


def _preset(name: str) -> Format:
    if name not in _PRESETS:
        raise ValueError(
            f"unknown precision {name!r}; use one of {', '.join(map(repr, _PRESETS))}, or "
            "Precision.parse('params=bf16,grads=fp32') for single fields"
        )
    return _PRESETS[name]


def _refuse_layer_options(precision: Precision, *options: object) -> None:
    if options != (None, float8.EXCLUDED, None, float8.MIN_DIM):
        raise TypeError(
            f"include, exclude, overrides and min_dim choose layers for FP8, and precision "
            f"{str(precision)!r} has no recipe. Use Precision('fp8', recipe='adaptive')."
        )


def _check_format(field: str, format: object) -> None:
    if not isinstance(format, Format):
        raise TypeError(
            f"{field}={format!r} is not a Format; use mixprec.formats.BF16 or "
            f"Precision.parse('{field}=bf16')"
        )
    if format not in _PRESETS.values():
        raise ValueError(
            f"{field}={format} has {format.bits} bits, too few for {field}; use fp32, bf16 or fp16"
        )


def cast_model(
    model: ModuleT, precision: Precision | str, *, keep_fp32: Sequence[str] = (NORMS,)
) -> ModuleT:
    """`model` itself, its parameters and floating buffers cast in place to `precision.params`.

    Modules that match `keep_fp32` stay FP32 with all they contain, their buffers too. Their 16-bit
    inputs are widened to FP32 and their FP32 outputs cast to `precision.params`, by forward hooks
    that `deepcopy` and pickle carry along. So a module must be called to be an island; one whose
    weights are read from outside is none. Inputs of the model itself are yours to cast, as after
    `model.bfloat16()`. Parameters keep their identity, hence ties, hooks and optimizers.

    Args:
        model: any module with FP32, BF16 or FP16 parameters, and integer buffers. What is 16-bit
            already and kept in FP32 is widened; digits lost before stay lost.
        precision: a `Precision`, or text for `Precision.parse`.
        keep_fp32: patterns with `*` and `?`, without case. One without a dot is compared with the
            last part of a module's name and with its class name, one with a dot with the whole
            name. The default "*norm*" leaves alone mere containers, such as a `PreNorm` block.

    Raises:
        ValueError: if a pattern other than "*norm*" matches no module, one tied tensor would have
            to be in both formats, or a lazy module has no shapes yet.
        TypeError: for FP64 and FP8 tensors, and for complex ones outside the kept modules. Nothing
            is changed then.

    Warns of tensors of which the cast makes infinities, or 0 of more than 5 % of the values, with
    their names. What buffers lose is not mended by masters: `Precision.convert` does the same and
    returns a report that counts all of it.

    >>> import mixprec, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    >>> model = mixprec.cast_model(model, "bf16")
    >>> model(torch.ones(1, 4, dtype=torch.bfloat16)).dtype, model[1].weight.dtype
    (torch.bfloat16, torch.float32)
    """
    if isinstance(precision, str):
        precision = Precision.parse(precision)
    precision.convert(model, keep_fp32=keep_fp32)
    return model
