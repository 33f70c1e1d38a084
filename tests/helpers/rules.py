"""Optimizers that nobody here wrote, each with the hyperparameters and the handling it needs.

A recipe builds one optimizer over given parameter groups and says how a step of it is driven;
`comparison.compare` runs it bare and wrapped. Those for torch.optim are made here, from torch's own
database of test inputs; those for other packages in `thirdparty_rules`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch's tests also use hypothesis
    from torch.testing._internal.common_optimizers import (
        OptimizerInfo,
        _get_optim_inputs_including_global_cliquey_kwargs,
        optim_db,
    )

Group = dict[str, Any]
Shapes = tuple[tuple[tuple[int, ...], ...], ...]

MIXED: Shapes = (((4, 6), (5,), (3, 2, 2, 2)), ((6, 4), (), (7,)))
"""Shapes of two groups' parameters. The very last has no gradient in every other step."""
MATRICES: Shapes = (((4, 6), (3, 5)), ((6, 4), (7, 3)))
ONE_GROUP: Shapes = (MIXED[0] + MIXED[1],)

Drive = Literal["grads", "sparse", "loss", "closure", "grads and closure", "graph"]
"""What a step is given: gradients; sparse gradients; a closure that returns with gradients and the
loss value; a closure that the rule may call at weights of its choice, without or with gradients
from before; or gradients that can be differentiated once more."""


@dataclass(frozen=True)
class Recipe:
    """One optimizer, ready to build, and how to drive it.

    Attributes:
        name: `package.Class`, or the name in its package's registry, and the options that differ.
        build: makes the optimizer over parameter groups.
        shapes: parameter shapes that the rule accepts, by group.
        drive: what a step is given.
        rests: whether the rule accepts a parameter without gradient.
        steps: long enough to move every weight.
        still: whether some weights are meant to stay where they are.
        collective: whether it needs a process group.
        unable: why the bare rule cannot take a step, where it cannot.
        refused: why the rule cannot run on masters, where it cannot.
    """

    name: str
    build: Callable[[list[Group]], Optimizer]
    shapes: Shapes = MIXED
    drive: Drive = "grads"
    rests: bool = True
    steps: int = 6
    still: bool = False
    collective: bool = False
    unable: str = ""
    refused: str = ""


LEAF = "it writes to parameters with autograd on, which torch forbids for leaf tensors"


def torch_recipes() -> list[Recipe]:
    """Every input of torch's optimizer database, with each implementation that a CPU has."""
    return [
        _torch_recipe(info, described, kwargs)
        for info in optim_db
        for described, kwargs in _torch_inputs(info)
    ]


def _torch_inputs(info: OptimizerInfo) -> Iterator[tuple[str, dict[str, Any]]]:
    plain = [(given.desc, given.kwargs) for given in info.optim_inputs_func(device="cpu")]
    flagged = [
        (f"{given.desc} & for-loop" if "&" not in given.desc else given.desc, given.kwargs)
        for given in _get_optim_inputs_including_global_cliquey_kwargs("cpu", torch.float32, info)
    ]
    # The database offers foreach for accelerators only; its code path runs on a CPU as well.
    foreach = [(f"{desc} & foreach", {**kwargs, "foreach": True}) for desc, kwargs in plain]
    yield from plain
    if info.supported_impls:
        yield from flagged
    if "foreach" in info.supported_impls:
        yield from foreach


def _torch_recipe(info: OptimizerInfo, described: str, kwargs: dict[str, Any]) -> Recipe:
    cls: Any = info.optim_cls
    name = f"{cls.__name__}: {described}"
    shapes: Shapes = MIXED
    drive: Drive = "grads"
    if cls.__name__ == "Muon":
        shapes = MATRICES
    if info.only_supports_sparse_grads:
        shapes, drive = MATRICES, "sparse"
    if info.step_requires_closure:
        shapes, drive = ONE_GROUP, "closure"

    def build(groups: list[Group]) -> Optimizer:
        # A database entry may hold a tensor learning rate, which must not be shared between runs.
        own = {k: v.clone() if isinstance(v, Tensor) else v for k, v in kwargs.items()}
        made: Optimizer = cls(groups if info.supports_param_groups else groups[0]["params"], **own)
        return made

    # Fused SGD fails where some momentum buffers exist and others are yet to come.
    rests = drive != "closure" and not (kwargs.get("fused") and kwargs.get("momentum"))
    unable = LEAF if kwargs.get("differentiable") else ""
    return Recipe(name, build, shapes, drive, rests=rests, unable=unable)
