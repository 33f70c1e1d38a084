"""What to call a parameter in an error."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

Groups = Sequence[Mapping[str, Any]]


def names_of(groups: Groups) -> Iterator[tuple[Tensor, str]]:
    """Every parameter with its `param_names` entry, or its place and shape where it has none."""
    for index, group in enumerate(groups):
        names = group.get("param_names")
        for place, param in enumerate(group["params"]):
            shape = "x".join(map(str, param.shape)) or "scalar"
            position = f"param_groups[{index}]['params'][{place}] ({shape})"
            yield param, names[place] if names else position
