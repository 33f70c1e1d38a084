"""Imports point one way, and importing the package does nothing else."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "mixprec"

LAYERS = (
    "formats devices gradients parameters autograd text markup user_warnings machine_errors "
    "torch_modes caller_modes",
    "binades window cross_entropy plain_optimizer",
    "casting wrapped umup",
    "float8",
    "ranges accumulation loss_scaling "
    # An optimizer's own layers, from what it holds to what it does.
    "optimizer.masters optimizer.state_formats optimizer.judging.verdict "
    "optimizer.judging.grad_factor optimizer.reports.step_counts optimizer.reports.culprits "
    "optimizer.reports.remarks optimizer.fused.program",
    "optimizer.arguments optimizer.setup optimizer.rule optimizer.fused.kernels "
    "optimizer.judging.scaled_grads",
    "optimizer.checks optimizer.fused.recording",
    "optimizer.fused",
    "optimizer.reports.infinite_weights",
    "optimizer.undo optimizer.owners optimizer.reports.outcome",
    "optimizer.checkpoint optimizer.judging.judge optimizer.master_run",
    "optimizer.buckets optimizer.recovery",
    "optimizer.closures optimizer.reports.explain optimizer.checkpoint.states",
    "optimizer.step",
    "optimizer.mixed_precision",
    "optimizer optimizer.reports optimizer.judging",
    "precision",
    "",
    "cli",
    "__main__",
)
"""Every module or folder stands in one layer and imports from lower ones, or of its own folder."""

CONCERNS = {
    "mixprec.accumulation",
    "mixprec.loss_scaling",
    "mixprec.optimizer",
    "mixprec.ranges",
}
"""Each is useful without the others, so none may reach another, not even through a third."""

OPS = {"mixprec.cross_entropy", "mixprec.umup.functional"}
"""Functions of tensors: they know nothing of training, and training nothing of them."""

ROOM = {"mixprec": 18}
"""How many modules a folder may hold, itself counted, where it is not 16: what `ls` can show."""


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py")}


def imported_names(tree: ast.AST) -> set[str]:
    """Everything that `tree` imports, anywhere in it, as dotted names."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            # `from mixprec import formats` imports a module, `from mixprec.formats import E4M3` no.
            deeper = {f"{node.module}.{alias.name}" for alias in node.names}
            names.update({name if name in MODULES else f"{node.module}" for name in deeper})
    return names


ARROWS = {
    name: imported_names(ast.parse(path.read_text())) & MODULES.keys()
    for name, path in MODULES.items()
}


def reached_from(name: str) -> set[str]:
    reached: set[str] = set()
    waiting = [name]
    while waiting:
        for target in ARROWS[waiting.pop()] - reached:
            reached.add(target)
            waiting.append(target)
    return reached


def is_kernels(name: str) -> bool:
    """Modules that may import Triton, and so are imported inside functions only."""
    return name.endswith("_kernels")


def belongs_to_cli(name: str) -> bool:
    return name in ("mixprec.cli", "mixprec.__main__") or name.startswith("mixprec.cli.")


LIBRARY = sorted(name for name in MODULES if name != "mixprec" and not belongs_to_cli(name))


PLACES = {
    f"mixprec.{place}".rstrip("."): layer
    for layer, places in enumerate(LAYERS)
    for place in places.split() or [""]
}


def place_of(name: str) -> str:
    """The entry of `LAYERS` that `name` belongs to: itself, or the nearest folder above it."""
    while name not in PLACES or name == "mixprec":
        if name == "mixprec":
            return name
        name = name.rpartition(".")[0]
    return name


def test_the_tables_of_this_test_name_real_modules() -> None:
    assert CONCERNS | OPS | ROOM.keys() | PLACES.keys() <= MODULES.keys()


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_module_has_a_layer_and_imports_from_lower_ones_alone(name: str) -> None:
    place = place_of(name)
    assert place != "mixprec" or name == "mixprec", f"put {name} into LAYERS"
    wrong = [
        target
        for target in sorted(ARROWS[name])
        if place_of(target) != place and PLACES[place_of(target)] >= PLACES[place]
    ]
    assert not wrong, f"{name} stands in layer {PLACES[place]}, below {wrong}"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_module_reaches_itself(name: str) -> None:
    assert name not in reached_from(name)


def belongs_to(name: str, place: str) -> bool:
    return name == place or name.startswith(f"{place}.")


@pytest.mark.parametrize("name", LIBRARY)
def test_no_concern_or_operation_reaches_another(name: str) -> None:
    own = {place for place in CONCERNS | OPS if belongs_to(name, place)}
    if own:
        reached = reached_from(name)
        others = {p for p in CONCERNS | OPS for r in reached if belongs_to(r, p)}
        assert others <= own


def test_precision_knows_the_layers_that_it_converts_and_nothing_of_training() -> None:
    reached = reached_from("mixprec.precision")
    assert "mixprec.float8" in reached
    assert not any(belongs_to(r, p) for r in reached for p in CONCERNS | {"mixprec.cross_entropy"})


@pytest.mark.parametrize("folder", sorted({p.parent for p in MODULES.values()}), ids=str)
def test_a_folder_shows_what_is_in_it(folder: Path) -> None:
    name = module_name(folder / "__init__.py")
    held = sorted(p.stem for p in folder.glob("*.py"))
    assert len(held) <= ROOM.get(name, 16), held


@pytest.mark.parametrize("name", sorted(MODULES))
def test_modules_import_only_the_standard_library_and_torch_at_their_top(name: str) -> None:
    tree = ast.parse(MODULES[name].read_text())
    at_top = ast.Module([n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)], [])
    packages = {imported.partition(".")[0] for imported in imported_names(at_top)}
    allowed = {"mixprec", "torch", "typing_extensions", *sys.stdlib_module_names}
    assert packages <= allowed | ({"triton"} if is_kernels(name) else set[str]())
    assert is_kernels(name) or not any(map(is_kernels, imported_names(at_top)))


IMPORT_AND_LOOK = """
import json, logging, os, sys, warnings
import torch

def state():
    return {
        "default dtype": str(torch.get_default_dtype()),
        "default device": str(torch.get_default_device()),
        "grad mode": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "threads": torch.get_num_threads(),
        "random state": torch.get_rng_state().tolist(),
        "log handlers": len(logging.getLogger().handlers),
        "loggers": sorted(n for n in logging.getLogger().manager.loggerDict if "mixprec" in n),
        "warning filters": len(warnings.filters),
        "environment": dict(os.environ),
        "excepthook": str(sys.excepthook),
    }

modules, before = set(sys.modules), state()
import mixprec
print(json.dumps({"new": sorted(set(sys.modules) - modules), "same": state() == before}))
"""


def test_importing_mixprec_loads_only_torch_prints_nothing_and_changes_no_global_state() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", IMPORT_AND_LOOK],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    (line,) = done.stdout.splitlines()
    seen = json.loads(line)
    assert seen["same"]
    new = set(seen["new"])
    assert not any(map(belongs_to_cli, new))
    packages = {name.partition(".")[0] for name in new}
    assert packages - sys.stdlib_module_names <= {"mixprec", "torch"}
    # Parts of torch that cost more than the rest of it.
    heavy = {"torch._dynamo", "torch._inductor", "torch.distributed.fsdp", "torch.onnx"}
    assert not new & heavy


def test_a_command_loads_no_other_command() -> None:
    code = (
        "import sys; from mixprec.cli import main; main(['formats', '1']); "
        "print(sorted(name for name in sys.modules if name.startswith('mixprec.cli.')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "['mixprec.cli.formats', 'mixprec.cli.table']"
