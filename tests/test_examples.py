"""Examples run as they stand, and a training that is killed at any moment loses nothing."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

EXAMPLES = Path(__file__).parent.parent / "examples"
EXAMPLE = EXAMPLES / "train_language_model.py"

# One interpreter imports torch and then forks for every start of the example, which saves three
# seconds each. Moments to die at: `half-written` in the middle of the first checkpoint, `mid-step`
# between two micro-batches of step 6, `unnamed` when a file is complete but not yet renamed.
DRIVER = """
import functools, io, os, runpy, signal, sys
import torch._dynamo  # which every first optimizer imports
import mixprec

example, precision, *starts = sys.argv[1:]

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def save_half(checkpoint, file, save=torch.save):
    whole = io.BytesIO()
    save(checkpoint, whole)
    file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
    file.flush()
    die()

def backward(accumulator, *args, whole=mixprec.GradientAccumulator.backward, calls=[], **kwargs):
    calls.append(None)
    if len(calls) > 5 * 4 + 2:
        die()
    whole(accumulator, *args, **kwargs)

def start(out, moment):
    torch.set_num_threads(1)
    # Starts too high and grows soon: steps are skipped and counted before and after each kill.
    mixprec.DynamicLossScaler = functools.partial(
        mixprec.DynamicLossScaler, init_scale=2.0**32, max_scale=2.0**40, growth_interval=2
    )
    if moment == "half-written":
        torch.save = save_half
    if moment == "mid-step":
        mixprec.GradientAccumulator.backward = backward
    if moment == "unnamed":
        os.replace = die
    sys.argv = [example, "--out", out, "--precision", precision, "--steps=7", "--save-every=4"]
    runpy.run_path(example, run_name="__main__")

for out, moment in zip(starts[::2], starts[1::2]):
    child = os.fork()
    if child == 0:
        start(out, moment)
        sys.exit()
    _, status = os.waitpid(child, 0)
    print("ended", moment, os.waitstatus_to_exitcode(status), flush=True)
"""


def run(precision: str, *starts: tuple[Path, str]) -> list[str]:
    """What the example prints, started in each directory to die at a moment, or never."""
    arguments = [str(argument) for start in starts for argument in start]
    command = [sys.executable, "-W", "error", "-c", DRIVER, str(EXAMPLE), precision, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout.splitlines()


def load(out: Path) -> dict[str, Any]:
    return torch.load(out / "checkpoint.pt", weights_only=True)


def flatten(value: Any, name: str = "") -> dict[str, Any]:
    """Leaves of a checkpoint by path."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        return {name: value}
    leaves: dict[str, Any] = {}
    for key, item in items:
        leaves.update(flatten(item, f"{name}.{key}"))
    return leaves


def assert_same_bits(left: dict[str, Any], right: dict[str, Any]) -> None:
    assert left.keys() == right.keys()
    assert not [name for name in left if not same_bits(left[name], right[name])]


def same_bits(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        same_kind = a.dtype == b.dtype and a.shape == b.shape
        return same_kind and torch.equal(
            a.flatten().view(torch.uint8), b.flatten().view(torch.uint8)
        )
    return type(a) is type(b) and a == b


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_run_killed_at_three_moments_ends_with_the_same_bits(
    tmp_path: Path, precision: str
) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    moments = ["half-written", "mid-step", "unnamed", "never"]
    lines = run(precision, *((killed, moment) for moment in moments), (whole, "never"))

    kills = [f"ended {moment} {-signal.SIGKILL}" for moment in moments[:3]]
    ends = [line for line in lines if line.startswith("ended")]
    assert ends == [*kills, "ended never 0", "ended never 0"]
    assert lines.count("going on after step 4") == 2  # the other kills came before any checkpoint
    assert_same_bits(flatten(load(killed)), flatten(load(whole)))


def start_here(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *arguments])
    runpy.run_path(str(EXAMPLE), run_name="__main__")


def test_the_example_learns_and_a_finished_run_can_be_extended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start_here(monkeypatch, "--out", str(tmp_path), "--steps", "30", "--save-every", "30")
    start_here(monkeypatch, "--out", str(tmp_path), "--steps", "40", "--save-every", "5")

    first, again, *rest = capsys.readouterr().out.splitlines()
    assert again == "going on after step 30"
    losses = [float(line.split()[3]) for line in (first, *rest)]
    assert [line.split()[1] for line in (first, *rest)] == ["30", "35", "40"]
    assert losses[-1] < 5.3  # from ln 257 = 5.55, that of a model that knows nothing
    assert set(os.listdir(tmp_path)) == {"checkpoint.pt"}


def test_a_checkpoint_of_another_precision_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start_here(monkeypatch, "--out", str(tmp_path), "--steps", "1", "--precision", "fp32")
    with pytest.raises(SystemExit):
        start_here(monkeypatch, "--out", str(tmp_path), "--steps", "2", "--precision", "fp16")
    assert "checkpoint.pt is a fp32 run; give that or another --out" in capsys.readouterr().err


def test_the_example_is_one_page_of_public_names() -> None:
    source = EXAMPLE.read_text()
    assert len(source.splitlines()) <= 150
    assert "mixprec.cli" not in source and "from mixprec" not in source


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_sharded_head_learns_on_one_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    env = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
    for name, value in {**env, "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    runpy.run_path(str(EXAMPLES / "sharded_head.py"), run_name="__main__")
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 4
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_fp8_fsdp_learns_on_one_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    env = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
    for name, value in {**env, "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    runpy.run_path(str(EXAMPLES / "fp8_fsdp.py"), run_name="__main__")
    *steps, last = capsys.readouterr().out.splitlines()
    losses = [float(line.split()[-1]) for line in steps]
    assert len(losses) == 4
    assert losses[-1] < losses[0] - 1
    assert last == "6 weights were gathered as bytes"


@pytest.mark.parametrize(("loss", "flushed"), [("mean", True), ("sum", False)])
def test_watch_ranges_sees_what_a_mean_does_to_gradients(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    loss: str,
    flushed: bool,
) -> None:
    out = tmp_path / "report.html"
    arguments = ["--out", str(out), "--steps", "6", *(["--sum"] if loss == "sum" else [])]
    monkeypatch.setattr(sys, "argv", ["watch_ranges.py", *arguments])
    runpy.run_path(str(EXAMPLES / "watch_ranges.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    losses = [float(line.split()[-1]) for line in lines[:6]]
    assert losses[-1] < losses[0] - 0.5
    assert ("become 0 in E5M2" in lines[6]) == flushed
    assert "<svg" in out.read_text()


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_sharded_head_learns_on_two_ranks() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(EXAMPLES / "sharded_head.py")], capture_output=True, text=True, check=True
    )
    losses = [float(line.split()[-1]) for line in done.stdout.splitlines()]
    assert len(losses) == 4
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize("recipe", ["adaptive", "static"])
def test_the_fp8_example_learns_and_says_what_its_casts_lost(
    recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example = EXAMPLES / "train_fp8.py"
    monkeypatch.setattr(sys, "argv", [str(example), "--steps", "20", "--recipe", recipe])
    runpy.run_path(str(example), run_name="__main__")
    printed = capsys.readouterr().out.splitlines()
    assert "10 of 10 linear layers in FP8, with 100 % of their weights" in printed
    (loss,) = [float(line.split()[-1]) for line in printed if line.startswith("step 20")]
    assert loss < 4.0  # from ln 256 = 5.55, that of a model that knows nothing
    rows = [line for line in printed if f" {recipe} " in line and line.startswith("blocks.")]
    assert {line.split()[1] for line in rows} == {"input", "weight", "grad_output"}
    assert printed[-1] == "no operand loses more than FP8 has to"


def test_the_fp8_example_is_less_than_a_page() -> None:
    source = (EXAMPLES / "train_fp8.py").read_text()
    assert len(source.splitlines()) < 100 and "from mixprec" not in source
