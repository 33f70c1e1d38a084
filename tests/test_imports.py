"""Imports point one way, and importing the package does nothing else."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "mixprec"

BASE = {"mixprec.formats", "mixprec.gradients"}
"""Import nothing of the package."""

CONCERNS = {
    "mixprec.accumulation",
    "mixprec.loss_scaling",
    "mixprec.masters",
    "mixprec.watch",
}
"""Each is useful without the others, so none may reach another, not even through a third."""

OPS = {"mixprec.cross_entropy", "mixprec.umup.functional"}
"""Functions of tensors: they know nothing of training, and training nothing of them."""


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


def test_the_table_of_this_test_names_real_modules() -> None:
    assert BASE | CONCERNS | OPS | {"mixprec.optimizer"} <= MODULES.keys()


@pytest.mark.parametrize("name", LIBRARY)
def test_no_module_reaches_itself_the_package_root_or_the_commands(name: str) -> None:
    reached = reached_from(name)
    assert name not in reached
    assert "mixprec" not in reached
    assert not any(map(belongs_to_cli, reached))


@pytest.mark.parametrize("name", sorted(BASE))
def test_base_modules_import_nothing_of_the_package(name: str) -> None:
    assert ARROWS[name] == set()


@pytest.mark.parametrize("name", sorted(CONCERNS))
def test_no_concern_reaches_another_or_the_optimizer(name: str) -> None:
    assert not reached_from(name) & (CONCERNS | OPS | {"mixprec.optimizer"})


@pytest.mark.parametrize("name", sorted(OPS))
def test_no_operation_reaches_training_or_another(name: str) -> None:
    assert not reached_from(name) & (CONCERNS | OPS | {"mixprec.optimizer"})


def test_precision_knows_the_layers_that_it_converts_and_nothing_of_training() -> None:
    reached = reached_from("mixprec.precision")
    assert "mixprec.float8" in reached
    assert not reached & (CONCERNS | {"mixprec.cross_entropy", "mixprec.optimizer"})


@pytest.mark.parametrize("name", LIBRARY)
def test_no_library_module_imports_the_optimizer(name: str) -> None:
    assert "mixprec.optimizer" not in ARROWS[name]


@pytest.mark.parametrize("name", sorted(MODULES))
def test_modules_import_only_the_standard_library_and_torch_at_their_top(name: str) -> None:
    tree = ast.parse(MODULES[name].read_text())
    at_top = ast.Module([n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)], [])
    packages = {imported.partition(".")[0] for imported in imported_names(at_top)}
    allowed = {"mixprec", "torch", "typing_extensions", *sys.stdlib_module_names}
    assert packages <= allowed | ({"triton"} if is_kernels(name) else set[str]())
    assert not any(map(is_kernels, imported_names(at_top)))


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
