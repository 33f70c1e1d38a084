"""Which parameters may share a probe, by what a rule's code could ask of them.

A probe has few elements and stands for parameters of any size. That is right as long as the rule
asks of a parameter nothing but its values, and a rule that asks for more, asks by a name:

    how many dimensions, an axis     parameters of other numbers of dimensions have another probe
    a mark, as in `p.lr_scale`       parameters with other marks have another probe
    sizes, as in `p.shape[0]`        seen when it happens (`SizesRead`): that very step is recorded
                                     once more for each size that the probe stands for

So a rule of element-wise operations alone, which names nothing else, has one probe for all. What it
might name is read off its code (`rule.code`), whatever its options are for now.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mixprec.optimizer.fused.recording.translations import OVER_ALL, TRANSLATIONS
from mixprec.optimizer.rule.code import RuleCode
from mixprec.optimizer.rule.copies import by_value

__all__ = ["Kinds", "SizesRead"]


class Kinds:
    """What a rule may ask of parameters.

    Attributes:
        code: that of the rule.
        asks_dimensions: whether it might do something else with matrices than with vectors.
        asks_sizes: whether it might read a size.
        reads_marks: whether it might read an attribute that a user sets on a parameter.
    """

    def __init__(self, code: RuleCode) -> None:
        self.code = code
        self.asks_dimensions = code.everything or not code.words & _OF_TENSORS <= _BLIND
        self.asks_sizes = code.everything or not code.words.isdisjoint(_SIZES)
        self.reads_marks = code.everything or bool(code.marks)

    def kind_of(self, param: Tensor, *, by_size: bool = False) -> tuple[Any, ...]:
        """What a rule may read of a parameter, other than its values; a hashable key.

        Without its sizes, unless `by_size` (`FusedAdmission.by_size`) says that the rule needs
        them.
        """
        marks = by_value(self.marks_in(vars(param)))
        if by_size:
            return tuple(param.shape), marks
        return param.ndim if self.asks_dimensions else None, marks

    def marks_in(self, attributes: Mapping[str, Any]) -> dict[str, Any]:
        """Attributes that users set on a parameter, as far as the rule's code could read them."""
        if not attributes:
            return {}
        return {name: value for name, value in attributes.items() if self.code.names_any((name,))}


_HOLDERS = (Tensor, torch, torch.nn.functional, torch.linalg, torch.fft, torch.special)

_OF_TENSORS = frozenset(
    name
    for holder in _HOLDERS
    for name in dir(holder)
    if not isinstance(getattr(holder, name, None), ModuleType)
)
"""Without modules: which of them torch has depends on what was imported before."""

_ELEMENTWISE = TRANSLATIONS.keys() - OVER_ALL.keys() - {"stack", "cat", "index_put"}

_BLIND = frozenset(
    {
        *_ELEMENTWISE,
        *(f"{name}_" for name in _ELEMENTWISE),
        *(f"_foreach_{name}{suffix}" for name in _ELEMENTWISE for suffix in ("", "_")),
        *("data", "dtype", "device", "grad", "item", "detach", "detach_", "to", "type", "layout"),
        *("float", "double", "cpu", "cuda", "Tensor", "Parameter", "tensor", "as_tensor", "values"),
        *("requires_grad", "is_complex", "is_floating_point", "is_sparse", "is_cuda", "is_cpu"),
        *("is_tensor", "float32", "float64", "float16", "bfloat16", "int32", "int64", "uint8"),
        *("no_grad", "enable_grad", "set_grad_enabled", "is_grad_enabled", "get_default_dtype"),
        *("preserve_format", "contiguous_format", "view_as_real", "view_as_complex", "sign_"),
        *("compiler", "jit", "autograd", "profiler", "accelerator", "xpu", "mps", "warnings"),
        *("math", "promote_types", "finfo", "_C", "sgn_", "square_", "sqrt_", "_foreach_sqrt"),
        *("coalesce", "sparse_mask", "sparse_coo_tensor", "_indices", "_values"),
        *("_fused_adam_", "_fused_adamw_", "_fused_sgd_", "_fused_adagrad_"),
        *("square", "clip", "clip_", "is_xpu", "is_mps", "__name__", *dir(object)),
    }
)
"""Names that mean the same for tensors of all shapes."""

_READ: dict[Any, str] = {
    **{vars(torch._C.TensorBase)["shape"].__get__: "shape"},
    **{vars(torch._C.TensorBase)["nbytes"].__get__: "nbytes"},
    **{getattr(Tensor, name): name for name in ("size", "numel", "nelement", "stride")},
    **{getattr(Tensor, name): name for name in ("is_contiguous", "untyped_storage", "storage")},
    Tensor.__len__: "len",
    torch.numel: "numel",
}

_SIZES = frozenset(_READ.values())


class SizesRead(TorchFunctionMode):
    """Sees whether Python code asks for the size of a tensor of more than one element.

    >>> with SizesRead() as read:
    ...     _ = torch.ones(3).mul_(2)
    >>> read.any
    False
    >>> with read:
    ...     _ = torch.ones(3).shape
    >>> read.any
    True
    """

    def __init__(self) -> None:
        super().__init__()
        self.any = False

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _READ and args[0].numel() > 1:
            self.any = True
        return func(*args, **kwargs) if kwargs else func(*args)
