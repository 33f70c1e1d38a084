"""What to call a parameter in an error."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn.parameter import is_lazy

Groups = Sequence[Mapping[str, Any]]


def names_of(groups: Groups) -> Iterator[tuple[Tensor, str]]:
    """Every parameter with its `param_names` entry, or its place and shape where it has none."""
    for index, group in enumerate(groups):
        names = group.get("param_names")
        for place, param in enumerate(group["params"]):
            if names:
                yield param, names[place]
            else:
                yield param, f"param_groups[{index}]['params'][{place}] ({_shape(param)})"


def listed(names: Sequence[str], limit: int = 3) -> str:
    """The first names in quotes, and how many more there are.

    >>> listed(["a", "b", "c", "d", "e"])
    "'a', 'b', 'c' and 2 more"
    """
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(repr, names[:limit])) + more


def _shape(param: Tensor) -> str:
    if is_lazy(param):
        return "not initialized yet"  # it has no shape to ask for
    return "x".join(map(str, param.shape)) or "scalar"
