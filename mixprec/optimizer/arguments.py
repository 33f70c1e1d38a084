"""The checks of MixedPrecision's public edge: options, parameters and weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from mixprec.gradients import local
from mixprec.optimizer.masters import LOW
from mixprec.optimizer.state_formats import check_formats
from mixprec.parameters import Groups, names_of

_STEPPABLE = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_inner(inner: object, ours: type[Optimizer]) -> None:
    """Refuse what is no optimizer, a wrapper of our own, and rules that masters would not reach."""
    if isinstance(inner, ours):
        raise TypeError(
            "inner is a MixedPrecision already: two wrappers would hold two masters of one weight. "
            "Wrap its inner optimizer, or use it as it is."
        )
    if not isinstance(inner, Optimizer):
        hint = " Call the class first." if isinstance(inner, type) else ""
        kind = inner.__name__ if isinstance(inner, type) else type(inner).__name__
        raise TypeError(
            f"inner must be an instance of torch.optim.Optimizer, not {kind}.{hint} For example "
            f"MixedPrecision(torch.optim.AdamW(model.parameters(), lr=3e-4))."
        )
    if any(kind.__name__ == "ZeroRedundancyOptimizer" for kind in type(inner).__mro__):
        raise TypeError(
            "inner is a ZeroRedundancyOptimizer, which steps an optimizer of its own over this "
            "rank's parameters, where masters would not reach. The other order is right, bit by "
            "bit: ZeroRedundancyOptimizer(params, optimizer_class=lambda params, **options: "
            "mixprec.MixedPrecision(torch.optim.AdamW(params, **options)), lr=...)."
        )
    if not {"param_groups", "state", "_optimizer_step_pre_hooks"} <= vars(inner).keys():
        raise TypeError(
            f"{type(inner).__name__} has no param_groups and state of its own, as a wrapper around "
            f"another optimizer has not, so masters could not take the parameters' place. Give the "
            f"optimizer that it wraps to MixedPrecision, and wrap the result."
        )


def check_options(
    masters: str,
    loss_scaler: object,
    max_grad_norm: float | None,
    on_nonfinite: str,
    bucket_numel: object,
    fused: object,
    state_formats: Any,
) -> None:
    if masters not in ("auto", "full", "split"):
        raise ValueError(f"masters={masters!r}; use 'auto', 'full' or 'split'")
    if on_nonfinite not in ("skip", "raise", "ignore"):
        raise ValueError(f"on_nonfinite={on_nonfinite!r}; use 'skip', 'raise' or 'ignore'")
    if on_nonfinite == "ignore" and loss_scaler is not None:
        raise ValueError(
            "on_nonfinite='ignore' with a loss scaler: overflow is how a loss scale finds its "
            "height, so somebody has to look. Use 'skip', or no loss_scaler."
        )
    if fused not in ("auto", True, False):
        raise ValueError(f"fused={fused!r}; use 'auto', True or False")
    check_formats(state_formats)
    if state_formats is not None and fused is False:
        raise ValueError(
            f"state_formats={state_formats!r} with fused=False: only a fused step reads and writes "
            f"such states, the rule itself knows FP32 alone. Use fused='auto'."
        )
    if max_grad_norm is not None and not 0.0 < max_grad_norm < math.inf:
        raise ValueError(
            f"max_grad_norm={max_grad_norm}; it is the L2 norm that gradients are clipped to and "
            f"must be positive and finite. Use None not to clip."
        )
    if isinstance(loss_scaler, torch.amp.GradScaler):
        raise TypeError(
            "loss_scaler is a torch.amp.GradScaler, which unscales and skips by itself. Use "
            "mixprec.DynamicLossScaler(), which loads its state dict, or let the GradScaler step "
            "this optimizer and pass no loss_scaler."
        )
    if bucket_numel not in ("auto", None) and not (
        isinstance(bucket_numel, int) and bucket_numel > 0
    ):
        raise ValueError(
            f"bucket_numel={bucket_numel!r}; it is a number of elements, 'auto', or None to run "
            f"the rule on all parameters at once"
        )


def check_parameters(groups: Groups, masters: str, fused: object, state_formats: Any) -> None:
    """Refuse what cannot be stepped on masters.

    Raises:
        TypeError: for dtypes other than FP32, FP64, BF16 and FP16, and for DTensors.
        ValueError: for parameters of lazy modules that are not made yet, for overlapping memory,
            and where masters="split" or `state_formats` has nothing to act on.
    """
    _check_made(groups)
    named = _once(list(names_of(groups)), fused)
    for param, name in named:
        if local(param) is not param:
            raise TypeError(
                f"{name} is a DTensor: each rank holds a shard, and ranks do not yet agree here on "
                f"overflow and norm, so their weights would drift apart. Under fully_shard keep "
                f"FP32 parameters with MixedPrecisionPolicy and step the optimizer itself."
            )
        if param.dtype not in _STEPPABLE:
            raise TypeError(
                f"{name} is {_short(param.dtype)}; FP32 masters exist for bfloat16 and float16, "
                f"and float32 and float64 are stepped as they are. Leave it out of this "
                f"optimizer, or keep it in one of these dtypes."
            )
        if param.dtype == torch.float16 and masters == "split":
            raise ValueError(
                f"masters='split' but {name} is float16: 16 more bits cannot restore an FP32 "
                f"value from FP16, whose exponent has 5 bits instead of 8. Use masters='auto', "
                f"which keeps full FP32 masters for FP16."
            )
    if masters == "split" and not any(param.dtype == torch.bfloat16 for param, _ in named):
        raise ValueError(
            "masters='split' but no parameter is bfloat16: float32 parameters are their own "
            "masters and have nothing to split. Use masters='auto', or cast the model to "
            "bfloat16 first."
        )
    if (
        state_formats is not None
        and fused is not True
        and not any(p.dtype in LOW for p, _ in named)
    ):
        raise ValueError(
            f"state_formats={state_formats!r} but no parameter is bfloat16 or float16: the rule "
            f"itself steps others, and its states stay as it makes them. Pass fused=True as well, "
            f"which fuses FP32 parameters, or drop state_formats."
        )
    _check_memory(named)


def _check_made(groups: Groups) -> None:
    """Refuse what a lazy module will make in its first forward: it has no shape to look at."""
    for index, group in enumerate(groups):
        for place, param in enumerate(group["params"]):
            if is_lazy(param):
                names = group.get("param_names")
                name = names[place] if names else f"param_groups[{index}]['params'][{place}]"
                raise ValueError(
                    f"{name} is not initialised: a lazy module makes its parameters in its first "
                    f"forward. Run one batch through the model, then make the optimizer."
                )


def check_weights(groups: Groups) -> None:
    """Refuse weights that hold NaN, which every master would copy. Reads the device once.

    Raises:
        ValueError: naming the first such parameter and how many of its elements are NaN.
    """
    named = [(p, n) for p, n in names_of(groups) if p.numel() and p.device.type != "meta"]
    found = [torch.isnan(local(param.detach())).any() for param, _ in named]
    if not found or not bool(torch.stack([flag.to(found[0].device) for flag in found]).any()):
        return
    param, name = next(item for item, flag in zip(named, found, strict=True) if bool(flag))
    count = int(torch.isnan(local(param.detach())).sum())
    raise ValueError(
        f"{name} holds NaN in {count} of {param.numel()} elements before the first step; masters "
        f"would keep it for ever. Initialise or load the model before stepping."
    )


def _once(named: Sequence[tuple[Tensor, str]], fused: object) -> list[tuple[Tensor, str]]:
    """Every parameter once. Torch warns of one that is in a group twice, and steps it twice."""
    first: dict[int, tuple[Tensor, str]] = {}
    for param, name in named:
        if id(param) not in first:
            first[id(param)] = (param, name)
        elif param.dtype in LOW or fused is True:
            low = param.dtype in LOW
            why = "has one master" if low else "is stepped by one launch (fused=True)"
            raise ValueError(
                f"{name} is {first[id(param)][1]} once more, and torch would step it twice; it "
                f"{why} and can be stepped once. Drop one of the two, for example with "
                f"list(dict.fromkeys(params))."
            )
    return list(first.values())


def _check_memory(named: Sequence[tuple[Tensor, str]]) -> None:
    """Two parameters over the same memory would round each other's masters away."""
    spans: list[tuple[str, int, int, str]] = []
    for param, name in named:
        shard = local(param.detach())
        if shard.device.type == "meta" or not shard.numel():
            continue
        if any(s == 0 and n > 1 for s, n in zip(shard.stride(), shard.shape, strict=True)):
            raise ValueError(
                f"{name} is an expanded tensor: several of its elements are one number in memory, "
                f"which a step would update several times. Use param.contiguous()."
            )
        extent = 1 + sum(s * (n - 1) for s, n in zip(shard.stride(), shard.shape, strict=True))
        start = shard.data_ptr()
        spans.append((str(shard.device), start, start + extent * shard.element_size(), name))
    spans.sort()
    for (device, _, end, name), (next_device, start, _, other) in pairwise(spans):
        if device == next_device and start < end:
            raise ValueError(
                f"{name} and {other} overlap in memory, so each step would overwrite one with the "
                f"other. Pass a tied weight once, as one Parameter; give others memory of their "
                f"own."
            )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
