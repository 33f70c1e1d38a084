"""What a MixedPrecision does with each parameter, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from mixprec.optimizer.masters import Storage
from mixprec.optimizer.rule.admission import Admission

_COST = {
    "full": "FP32 masters, 4 B/param",
    "split": "split masters, 2 B/param",
    "frozen": "frozen, no masters until they step",
    "none": "no masters, stepped as by the rule alone",
}


def explain(
    name: str,
    groups: Sequence[Mapping[str, Any]],
    admission: Admission | None,
    storage: Callable[[Tensor], Storage | Literal["frozen"]],
    bucket_numel: int | None,
    fused: Callable[[int], str],
    details: Sequence[str],
    refusal: str = "",
) -> str:
    """How the rule runs and why, a line for each group and dtype, how each is fused, `details`.

    `refusal` is what a step would raise instead.
    """
    manner = f"step() will refuse: {refusal}" if refusal else _manner(admission, bucket_numel)
    lines = [f"MixedPrecision around {name}", f"  {manner}"]
    for index, group in enumerate(groups):
        counts: Counter[tuple[str, str]] = Counter()
        numel: Counter[tuple[str, str]] = Counter()
        for param in group["params"]:
            dtype = str(param.dtype).removeprefix("torch.")
            kind = (dtype, "not stepped" if refusal else _COST[storage(param)])
            counts[kind] += 1
            numel[kind] += param.numel()
        for (dtype, cost), count in counts.items():
            plural = "tensor" if count == 1 else "tensors"
            lines.append(
                f"  param_groups[{index}]: {count} {dtype} {plural}, "
                f"{numel[dtype, cost]:,} parameters: {cost}"
            )
        if counts and not refusal:
            lines.append(f"  param_groups[{index}] is {fused(index)}")
    return "\n".join([*lines, *(f"  {detail}" for detail in details)])


def _manner(admission: Admission | None, bucket_numel: int | None) -> str:
    if admission is None:
        return "no 16-bit parameters: the rule runs as it is"
    if not admission.per_parameter:
        return f"whole: the rule sees all masters at once, because {admission.reason}"
    if bucket_numel is None:
        return "whole: bucket_numel is None"
    return (
        f"bucket by bucket: {admission.reason} (tried on small tensors), so it runs in a scratch "
        f"of {bucket_numel:,} elements, or the largest tensor if that is larger: 8 bytes each "
        f"for split masters and their gradients, 4 for full ones"
    )
