"""Recipes for the optimizer packages that people install: what `rules` is to torch.optim.

A package is imported when its recipes are built (pytorch-optimizer: listed), so this module needs
none of them.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from rules import MATRICES, MIXED, ONE_GROUP, Drive, Group, Recipe, Shapes
from torch import nn
from torch.optim import Optimizer

MUON: Shapes = (((4, 6), (5, 4), (3, 2, 2, 2)), ((6, 4), (), (7,)))
NO_SCALARS: Shapes = (((4, 6), (5,), (3, 2, 2, 2)), ((6, 4), (7,)))
LOW_RANK_PAIRS: Shapes = (((2, 6), (5, 2)), ((2, 4), (3, 2)))


def made(package: str, cls: str, **kwargs: Any) -> Callable[[list[Group]], Optimizer]:
    """A builder for `package.cls(groups, **kwargs)`."""

    def build(groups: list[Group]) -> Optimizer:
        optimizer: Optimizer = getattr(importlib.import_module(package), cls)(groups, **kwargs)
        return optimizer

    return build


def pytorch_optimizer_recipes() -> list[Recipe]:
    """Every rule in pytorch-optimizer's registry, at its main options and at its other branches."""
    package: Any = importlib.import_module("pytorch_optimizer")
    return [
        _pytorch_optimizer_recipe(rule, options, kwargs)
        for rule in package.get_supported_optimizers()
        for options, kwargs in _branches(rule, package.load_optimizer(rule))
    ]


def _branches(rule: str, cls: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """The options of a rule to try: its main ones, the other sign, the other implementation."""
    main = OPTIONS.get(rule, {})
    known = inspect.signature(cls.__init__).parameters
    yield "", main
    ascent = {"maximize": True, "weight_decay": 0.1}
    per_tensor = {"foreach": False, "weight_decay": 0.1, "ams_bound": True, "rectify": True}
    for options in (ascent, per_tensor, *FURTHER.get(rule, ())):
        kwargs = {k: v for k, v in options.items() if k in known and k not in main}
        if "foreach" in kwargs or "maximize" in kwargs or options in FURTHER.get(rule, ()):
            yield ", ".join(f"{k}={v}" for k, v in kwargs.items()), {**main, **kwargs}


def _pytorch_optimizer_recipe(rule: str, options: str, kwargs: dict[str, Any]) -> Recipe:
    drive = DRIVES.get(rule, "grads")
    return Recipe(
        f"{rule}: {options}" if options else rule,
        _registered(rule, kwargs),
        SHAPES.get(rule, MUON if rule in MUON_FAMILY else MIXED),
        drive,
        rests=drive in ("grads", "loss") and rule not in ("distributedmuon", "lorarite"),
        still=rule == "sara",
        collective=rule in ("demo", "distributedmuon"),
        unable=IN_BACKWARD if rule in ("lomo", "adalomo") else "",
        refused="" if rule == "sara" and "foreach" in kwargs else REFUSED.get(rule, ""),
    )


def _registered(rule: str, kwargs: dict[str, Any]) -> Callable[[list[Group]], Optimizer]:
    def build(groups: list[Group]) -> Optimizer:
        cls: Any = importlib.import_module("pytorch_optimizer").load_optimizer(rule)
        given: Any = groups
        if rule in MUON_FAMILY:
            given = [{**group, "use_muon": i == 0} for i, group in enumerate(groups)]
        elif rule in ("adalomo", "adammini", "lomo"):
            given = _module(groups)
        elif rule == "lbfgs":
            given = groups[0]["params"]
        elif rule == "magma":
            given = torch.optim.AdamW(groups, lr=1e-2)
        optimizer: Optimizer = cls(given, **kwargs)
        return optimizer

    return build


def _module(groups: list[Group]) -> nn.Module:
    module = nn.Module()
    for index, param in enumerate(param for group in groups for param in group["params"]):
        module.register_parameter(f"weight{index}", param)
    return module


MUON_FAMILY = ("adago", "adamuon", "distributedmuon", "muon", "muonclip", "normuon")

SHAPES: dict[str, Shapes] = {
    "adan": NO_SCALARS,
    "demo": MATRICES,
    "lbfgs": ONE_GROUP,
    "lorarite": LOW_RANK_PAIRS,
    "spectralsphere": MATRICES,
}

DRIVES: dict[str, Drive] = {
    "adahessian": "graph",
    "alig": "loss",
    "bsam": "grads and closure",
    "emofact": "loss",
    "emolynx": "loss",
    "emonavi": "loss",
    "lbfgs": "closure",
    "sophiah": "graph",
}

IN_BACKWARD = "it updates weights in backward hooks and has no step()"
TWICE = "it differentiates its gradients once more, and FP32 copies of them have no graph"

REFUSED = {
    "adahessian": TWICE,
    "demo": "it keeps state by parameter outside of `state`",
    "lorarite": "it updates parameters in pairs whose shapes a small trial does not know",
    "magma": "it wraps an optimizer and is none itself: it has neither state nor groups of its own",
    "sara": "it keeps an index of the weights to train by parameter, outside of `state`",
    "sophiah": TWICE,
}

OPTIONS: dict[str, dict[str, Any]] = {
    "adagc": {"warmup_steps": 3},
    "adashift": {"keep_num": 2},
    "alig": {"max_lr": 0.1},
    "bsam": {"num_data": 100},
    "lorarite": {"lr": 1e-2},
    "ranger21": {"num_iterations": 20},
    "sara": {"lr": 1e-2, "threshold": 0.1},
}
"""Arguments that a rule requires, or without which a few steps would not move small weights."""

FURTHER: dict[str, tuple[dict[str, Any], ...]] = {
    "adan": ({"max_grad_norm": 1.0},),
    "adashift": ({"reduce_func": None},),
    "alig": ({"momentum": 0.9, "adjusted_momentum": True},),
    "flashadamw": ({"quantize": False}, {"decouple_lr": True, "check_numerics": True}),
    "kron": ({"memory_save_mode": "one_diag"},),
    "lamb": ({"pre_norm": True, "max_grad_norm": 0.5},),
    "laprop": ({"centered": True, "steps_before_using_centered": 2},),
    "mars": ({"mars_type": "lion", "optimize_1d": True},),
    "sara": ({"progressive_iter": 3},),
    "scalableshampoo": ({"start_preconditioning_step": 2, "preconditioning_compute_steps": 2},),
    "soap": ({"precondition_frequency": 2, "precondition_1d": True},),
    "spam": ({"update_proj_gap": 3, "density": 0.5},),
    "stablespam": ({"t_max": 4, "update_proj_gap": 3},),
    "splus": ({"inverse_steps": 2},),
    "swats": ({"nesterov": True},),
    "conda": ({"update_proj_gap": 3},),
    "dash": ({"precondition_frequency": 2},),
}
"""Options that reach branches of a rule which its defaults leave cold for the first steps."""


def other_recipes() -> list[Recipe]:
    """schedulefree, lion-pytorch, optimi, prodigyopt and what bitsandbytes can do on a CPU."""
    return [*_schedulefree(), *_lion(), *_optimi(), *_prodigy(), *_bitsandbytes()]


def _schedulefree() -> Iterator[Recipe]:
    for foreach in (True, False):
        for rule, kwargs in {
            "AdamWScheduleFree": {"lr": 1e-2, "weight_decay": 0.1, "warmup_steps": 3},
            "RAdamScheduleFree": {"lr": 1e-2, "weight_decay": 0.1},
            "SGDScheduleFree": {"lr": 1e-1, "weight_decay": 0.1, "warmup_steps": 3},
        }.items():
            build = made("schedulefree", rule, foreach=foreach, **kwargs)
            yield Recipe(f"schedulefree.{rule}(foreach={foreach})", build)
            build = made("schedulefree", f"{rule}Closure", foreach=foreach, **kwargs)
            name = f"schedulefree.{rule}Closure(foreach={foreach})"
            yield Recipe(name, build, drive="closure", rests=False)
    for rule in (
        "AdamWScheduleFreeReference",
        "AdamWScheduleFreePaper",
        "SGDScheduleFreeReference",
    ):
        yield Recipe(f"schedulefree.{rule}", made("schedulefree", rule, lr=1e-2))


def _lion() -> Iterator[Recipe]:
    yield Recipe("lion_pytorch.Lion", made("lion_pytorch", "Lion", lr=1e-2, weight_decay=0.1))
    for module, kwargs in {
        "foreach": {"decoupled_weight_decay": True},
        "cautious_lion": {"cautious_factor": 0.1},
    }.items():
        build = made(f"lion_pytorch.{module}", "Lion", lr=1e-2, weight_decay=0.1, **kwargs)
        yield Recipe(f"lion_pytorch.{module}.Lion", build)


def _optimi() -> Iterator[Recipe]:
    for rule in ("Adam", "AdamW", "Adan", "Lion", "RAdam", "Ranger", "SGD", "StableAdamW"):
        for foreach in (None, False):
            build = made("optimi", rule, lr=1e-2, weight_decay=1e-4, foreach=foreach)
            yield Recipe(f"optimi.{rule}(foreach={foreach})", build)
        for kwargs in ({"decouple_lr": True}, {"kahan_sum": True}):
            build = made("optimi", rule, lr=1e-2, weight_decay=1e-4, **kwargs)
            yield Recipe(f"optimi.{rule}({next(iter(kwargs))}=True)", build)
    build = made("optimi", "SGD", lr=1e-2, momentum=0.9, dampening=True, torch_init=True)
    yield Recipe("optimi.SGD(momentum=0.9, dampening=True, torch_init=True)", build)


def _prodigy() -> Iterator[Recipe]:
    yield Recipe("prodigyopt.Prodigy", made("prodigyopt", "Prodigy"), ONE_GROUP)
    build = made(
        "prodigyopt", "Prodigy", use_bias_correction=True, safeguard_warmup=True, slice_p=2
    )
    yield Recipe("prodigyopt.Prodigy(slice_p=2)", build, ONE_GROUP)


TRANSPOSED = "its CPU kernel does not fit the state that it makes for matrices"


def _bitsandbytes() -> Iterator[Recipe]:
    for rule in ("Adam", "AdamW", "AdEMAMix", "Adagrad", "LAMB", "LARS", "Lion", "RMSprop", "SGD"):
        momentum = {"momentum": 0.9} if rule in ("LARS", "SGD") else {}
        for bits in ("32bit", "8bit"):
            # The 8-bit form keeps FP32 state for tensors below min_8bit_size elements.
            small = {"min_8bit_size": 8} if bits == "8bit" else {}
            build = made("bitsandbytes.optim", rule + bits, lr=1e-2, **momentum, **small)
            unable = TRANSPOSED if rule + bits == "AdEMAMix32bit" else ""
            yield Recipe(f"bitsandbytes.{rule}{bits}", build, unable=unable)
    yield Recipe("bitsandbytes.PagedAdamW32bit", made("bitsandbytes.optim", "PagedAdamW32bit"))
    build = made("bitsandbytes.optim", "PytorchLARS", lr=1e-2, momentum=0.9)
    yield Recipe("bitsandbytes.PytorchLARS", build)
