"""An output layer given as a module: its weight and bias, if its logits are made of those alone.

Reading `.weight` off a layer forgets what else its forward does: a bias, an adapter, a multiplier,
a cast to FP8. So the layer itself can be given, and is used as it is where its forward is that of
`nn.Linear`. A parametrised weight is computed here, once, and passes its gradient on. Whatever
else a layer does is refused by name: the loss would be another one, and adapters would not learn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as global_hooks

from mixprec.gradients import is_dtensor

__all__ = ["weight_and_bias"]

_LINEAR_FORWARD = nn.Linear.forward
_CALL = nn.Module.__call__
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_ONLY_LOOK = (
    "mixprec.ranges.layers",
    "mixprec.umup.checks.scales",
    "mixprec.umup.checks.coordinates",
)
"""Whose hooks change nothing that passes by."""


def weight_and_bias(
    layer: nn.Module,
    bias: Tensor | None,
    forward: Callable[..., Tensor] = _LINEAR_FORWARD,
) -> tuple[Tensor, Tensor | None]:
    """Weight `[vocab, width]` and bias of a layer that does nothing but `forward`.

    Raises:
        TypeError: for a layer that does more, with the name of it, and for a second bias.

    >>> from mixprec.cross_entropy.output_layer import weight_and_bias
    >>> weight, bias = weight_and_bias(nn.Linear(8, 50), None)
    >>> weight.shape, bias.shape
    (torch.Size([50, 8]), torch.Size([50]))
    """
    if bias is not None:
        raise TypeError(
            "bias is given beside a module as weight, whose own bias is used; leave bias= out, or "
            "give weight= as a tensor"
        )
    does_more = next(_more_than(forward, layer), None)
    if does_more is not None:
        kind = type(layer).__name__
        raise TypeError(
            f"weight is a {kind}, {does_more}. Its weight and bias alone would be another output "
            f"layer. {_remedy(layer)}"
        )
    return layer.weight, layer.bias  # pyright: ignore[reportReturnType]


def _more_than(forward: Callable[..., Any], layer: nn.Module) -> Iterator[str]:
    """What `layer` does besides `forward`, each as "which ..."."""
    own: Any = type(layer).forward
    if own is not forward:
        yield (
            f"whose forward is {own.__module__}.{own.__qualname__} and not {forward.__qualname__}, "
            f"so its logits may be more than a product and a bias"
        )
    if "forward" in vars(layer) or type(layer).__call__ is not _CALL:
        yield "whose forward was replaced by another one, so its logits may be more"
    for name in _HOOKS:
        hooks = getattr(layer, name), getattr(global_hooks, "_global" + name)
        for hook in (*hooks[0].values(), *hooks[1].values()):
            function: Any = hook.func if isinstance(hook, partial) else hook
            what = getattr(function, "__qualname__", type(function).__name__)
            if getattr(function, "__module__", None) not in _ONLY_LOOK:
                kind = name[1:-1].replace("_", " ")
                yield f"which has a {kind}, {what}, that runs with each call"


def _remedy(layer: Any) -> str:
    if isinstance(layer, nn.Embedding):
        return "To tie the output to an embedding give embedding.weight."
    if hasattr(layer, "umup_roles"):
        return "A LinearReadout is taken by umup.losses.linear_cross_entropy."
    if type(layer).__name__ == "LinearCrossEntropy":
        return "Call it: head(hidden, targets)."
    if is_dtensor(layer._parameters.get("weight")):
        return (
            "Where its weight is spread over ranks give weight=layer.weight and bias=layer.bias, "
            "with hidden as a DTensor of the same mesh or process_group=mesh.get_group(). Under "
            "FSDP hold them in a mixprec.LinearCrossEntropy, whose forward gathers them."
        )
    return (
        "Give the tensors that it comes to as weight= and bias=: for an adapter such as "
        "base.weight + scaling * B.weight @ A.weight, which passes gradients to all of them. For "
        "weights that a hook gathers, as FSDP's does, hold them in a mixprec.LinearCrossEntropy."
    )
