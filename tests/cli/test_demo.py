"""`mixprec demo` trains what it says, says what came of it, and draws it."""

from __future__ import annotations

import io
import json
import math
import re
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mixprec.cli import demo, demo_runs, demo_text, main
from mixprec.cli.curves import SOUND, Curve, draw_svg, draw_text
from mixprec.cli.demo_model import LanguageModel
from mixprec.cli.demo_report import Report
from mixprec.cli.demo_runs import RUNS, Outcome, Run, Settings, train
from mixprec.cli.demo_text import PADDING, Corpus, read_text
from mixprec.cli.progress import Progress
from mixprec.cli.table import wrapped
from mixprec.float8.conversion import float8_layers
from mixprec.formats import FP32

DOCS = Path(__file__).parents[2] / "docs"
TINY = Settings(steps=3, width=16, depth=1, context=24, micro_batches=2, held_out=4, warmup=1)
ENDS = {
    "fp32": 2.95,
    "bf16 with masters": 2.951,
    "bf16 without masters": 3.2,
    "fp16 with a loss scale": 2.9499,
    "fp16 without a loss scale": 3.5,
    "fp8 with exponents": 2.953,
    "fp8 without exponents": 3.8,
}
"""Held-out losses of a demo that ends as it should."""


def tiny_corpus(seed: int = 0) -> Corpus:
    sentences = [f"{i}: {i % 7 * 'word '}".encode() for i in range(60)]
    return Corpus(sentences, context=TINY.context, held_out=TINY.held_out, seed=seed)


def train_all(seed: int = 0) -> list[Outcome]:
    settings, corpus = replace(TINY, seed=seed), tiny_corpus(seed)
    return [train(run, settings, corpus, lambda outcome, num_tokens: None) for run in RUNS]


def report(**ends: float) -> Report:
    """One as after the default steps, with these final losses instead of `ENDS`."""
    losses = {**ENDS, **ends}
    made = Report(Settings(), "a text", 0.5, "a CPU", ["BF16", "FP16", "FP8"])
    for run in RUNS:
        curve = [5.6, 4.0, losses[run.name]]
        outcome = Outcome(run, run.format != FP32, 1000, [0, 125, 250], curve, seconds=1.0)
        outcome.unmoved, outcome.subnormal_grads = 0.75 * run.bare, float(not run.sound)
        made.outcomes.append(outcome)
    return made


def svg_text(svg: str) -> list[str]:
    root = ET.fromstring(svg)
    return ["".join(node.itertext()) for node in root.iter() if node.tag.endswith("}text")]


# ---------------------------------------------------------------------------------------- command


def test_json_is_all_that_goes_to_stdout_and_equals_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--steps", "2", "--seed", "5", "--out", str(tmp_path), "--json"]) == 0
    captured = capsys.readouterr()
    results = json.loads(captured.out)

    assert results == json.loads((tmp_path / "results.json").read_text())
    assert list(results) == [
        *("date", "versions", "device", "emulated", "text", "padding"),
        *("settings", "as_expected", "runs"),
    ]
    assert results["settings"]["steps"] == 2 and results["settings"]["seed"] == 5
    assert [run["name"] for run in results["runs"]] == list(ENDS)
    for run in results["runs"]:
        assert run["measured_at"] == [0, 1, 2]
        assert len(run["held_out_losses"]) == 3 and len(run["train_losses"]) == 2
        assert run["held_out_loss"] == run["held_out_losses"][-1]
        assert run["above_fp32"] == run["held_out_loss"] - results["runs"][0]["held_out_loss"]
    assert [run["loss_scale"] for run in results["runs"]] == [
        *(None, None, None, 2.0**16, None, None, None)
    ]
    assert "1/7 fp32  step 2/2" in captured.err
    assert len(svg_text((tmp_path / "demo.svg").read_text())) > 10


def test_without_json_it_prints_plot_table_findings_and_where_the_files_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "run_all", lambda settings, log: report())
    assert main(["demo", "--out", str(tmp_path / "new" / "folder")]) == 0
    printed = capsys.readouterr().out

    assert draw_text(report().curves()) in printed
    assert report().table() in printed
    assert " ".join(report().findings().split()) in " ".join(printed.split())
    assert f"{tmp_path / 'new' / 'folder' / 'demo.svg'}" in printed
    # A terminal of 80 columns breaks no line; a path has no place to be broken at.
    assert max(len(line) for line in printed.splitlines() if str(tmp_path) not in line) <= 80


def test_a_terminal_that_has_no_braille_gets_the_table_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(demo, "run_all", lambda settings, log: report())
    assert main(["demo", "--out", str(tmp_path)]) == 0
    stream.flush()
    assert stream.buffer.getvalue().decode().startswith("\nrun  ")


@pytest.mark.parametrize("steps", ["0", "-3", "many", "1.5"])
def test_steps_below_one_are_refused(steps: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["demo", f"--steps={steps}"])
    wanted = f"'{steps}' is not a number of steps; give 1 or more, or leave it out for 250"
    assert wanted in capsys.readouterr().err


@pytest.mark.parametrize("error", [FileExistsError(17, "File exists"), PermissionError(13, "No")])
def test_a_directory_that_cannot_be_written_is_refused_before_any_training(
    error: OSError,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(dir: Path) -> None:
        raise error

    monkeypatch.setattr(demo, "run_all", None)
    out = tmp_path / "out"
    if isinstance(error, FileExistsError):
        out.touch()
    else:
        monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    assert main(["demo", "--out", str(out)]) == 2
    captured = capsys.readouterr()
    assert f"error: cannot write demo.svg and results.json to {out}" in captured.err
    assert f"({error.strerror}); give a directory of your own, such as --out ~/demo" in captured.err
    assert not captured.out


def test_an_interrupted_demo_leaves_a_clean_terminal_and_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: Any) -> Outcome:
        raise KeyboardInterrupt

    stream = Terminal()
    monkeypatch.setattr(demo, "train", interrupt)
    monkeypatch.setattr(sys, "stderr", stream)
    assert main(["demo", "--out", str(tmp_path)]) == 130
    assert stream.getvalue().endswith("\n\r\x1b[2K")
    assert not list(tmp_path.iterdir())


def test_the_number_of_threads_is_one_while_training_and_then_what_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []

    def note_threads(*arguments: Any) -> Outcome:
        seen.append(torch.get_num_threads())
        return Outcome(RUNS[0], False)

    monkeypatch.setattr(demo, "train", note_threads)
    torch.set_num_threads(2)
    try:
        demo.run_all(Settings(steps=1), io.StringIO())
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)  # as in conftest.py
    assert seen == [1] * len(RUNS)


# ------------------------------------------------------------------------------------------- text


def test_batches_are_half_padding() -> None:
    settings = Settings()
    corpus = Corpus(
        read_text().sentences, context=settings.context, held_out=settings.held_out, seed=0
    )
    assert 0.45 < corpus.padding(settings.steps, settings.shape) < 0.55
    assert 0.45 < (corpus.training == PADDING).double().mean() < 0.55


def test_a_step_is_the_same_whenever_it_is_read_and_never_holds_a_held_out_sentence() -> None:
    corpus, again = tiny_corpus(), tiny_corpus()
    assert corpus.micro_batches(7, (2, 3)).equal(again.micro_batches(7, (2, 3)))
    assert not corpus.micro_batches(7, (2, 3)).equal(corpus.micro_batches(8, (2, 3)))
    assert not corpus.held_out.equal(tiny_corpus(seed=1).held_out)

    held_out = {tuple(row) for row in corpus.held_out.tolist()}
    rows = corpus.micro_batches(1, (1, len(corpus.training))).flatten(0, 1).tolist()
    assert len({tuple(row) for row in rows}) == len(corpus.training)  # no sentence twice
    assert not held_out & {tuple(row) for row in rows}


def test_without_pydoc_data_the_text_is_docstrings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    text = read_text()
    assert text.source == "docstrings of the standard library"
    assert len(text.sentences) == len(set(text.sentences)) > 1500


def test_an_interpreter_without_any_text_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    monkeypatch.setattr(demo_text, "_FALLBACK_MODULES", ())
    with pytest.raises(RuntimeError, match=r"found 0 sentences in docstrings .* without -OO\."):
        read_text()


# ------------------------------------------------------------------------------------------ model


def test_padding_adds_neither_loss_nor_gradient() -> None:
    model = LanguageModel(width=8, depth=1, num_heads=2)
    results: list[list[Tensor]] = []
    for context in (6, 11):
        targets = demo_text.encode([b"padded", b"pad"], context)
        logits = model(demo_text.model_input(targets))
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        results.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    for short, padded in zip(*results, strict=True):
        torch.testing.assert_close(short, padded)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_emulation_rounds_each_of_the_three_products_once(dtype: torch.dtype) -> None:
    model = LanguageModel(width=64, depth=1, num_heads=2, emulate=True).to(dtype)
    layer: Any = model.blocks[0].gate_and_up  # type: ignore[union-attr]

    def integers(*shape: int) -> Tensor:
        # Their products add up exactly in FP32, in whatever order, but not in 16 bits.
        return torch.randint(-30, 31, shape, generator=generator).to(dtype)

    generator = torch.Generator().manual_seed(0)
    x, grad = integers(50, 64).requires_grad_(), integers(50, 384)
    layer.weight.data = integers(384, 64)
    y = layer(x)
    y.backward(grad)

    def product(a: Tensor, b: Tensor) -> Tensor:
        return (a.detach().double() @ b.detach().double()).to(dtype)

    assert y.equal(product(x, layer.weight.T))
    assert x.grad is not None and x.grad.equal(product(grad, layer.weight))
    assert layer.weight.grad.equal(product(grad.T, x))


# ------------------------------------------------------------------------------------------- runs


def test_the_same_seed_gives_the_same_losses_to_the_last_bit() -> None:
    def numbers(outcomes: list[Outcome]) -> list[Any]:
        names = ("train_losses", "held_out_losses", "unmoved", "subnormal_grads", "loss_scale")
        return [[getattr(outcome, name) for name in names] for outcome in outcomes]

    first = numbers(train_all(seed=3))
    assert first == numbers(train_all(seed=3))
    assert first != numbers(train_all(seed=4))


def test_all_runs_start_from_the_same_weights_and_read_the_same_text() -> None:
    outcomes = train_all()
    starts = [outcome.held_out_losses[0] for outcome in outcomes]
    # Weights are rounded to 16 bits, 2^-9 of each, and so are activations: far below a nat.
    assert max(starts) - min(starts) < 2e-3
    assert len({outcome.num_tokens for outcome in outcomes}) == 1
    assert [outcome.skipped_steps for outcome in outcomes] == [0] * len(RUNS)
    assert [len(outcome.train_losses) for outcome in outcomes] == [TINY.steps] * len(RUNS)


def test_weights_are_stored_in_the_run_s_format_and_trained_in_fp32_if_there_are_masters() -> None:
    for run in RUNS:
        training = demo_runs._Training(run, TINY, torch.device("cpu"))
        training.step(tiny_corpus().micro_batches(1, TINY.shape))
        weights = list(training.model.parameters())
        assert {weight.dtype for weight in weights} == {run.format.dtype}
        trained = torch.float32 if run.masters else run.format.dtype
        assert {value.dtype for value in training.hidden_values()} == {trained}
        moments = [training.optimizer.state[weight]["exp_avg"] for weight in weights]
        assert {moment.dtype for moment in moments} == {trained}


def test_the_loss_of_a_step_is_the_mean_over_all_its_tokens() -> None:
    targets = tiny_corpus().micro_batches(1, TINY.shape)
    assert len({int(count) for count in (targets != PADDING).sum((1, 2))}) == TINY.micro_batches
    for run in (RUNS[0], RUNS[2]):
        training = demo_runs._Training(run, TINY, torch.device("cpu"))
        loss_sum = training._loss_sum(targets.flatten(0, 1)).item()
        mean = loss_sum / int((targets != PADDING).sum())
        training.step(targets)
        # The same products in another order; 16-bit logits are rounded alike.
        assert training.outcome.train_losses == pytest.approx([mean], rel=1e-4)


def test_each_fault_is_seen_where_it_is_and_nowhere_else() -> None:
    unmoved = {outcome.run.name: outcome.unmoved for outcome in train_all()}
    assert unmoved.pop("bf16 without masters") > 0.1
    assert max(unmoved.values()) < 0.01
    subnormal = {outcome.run.name: outcome.subnormal_grads for outcome in train_all()}
    assert subnormal.pop("fp16 without a loss scale") > 0.9
    assert subnormal.pop("fp8 without exponents") > 0.9
    assert max(subnormal.values()) < 0.05


@pytest.mark.slow
def test_the_default_demo_shows_what_masters_and_scales_are_for() -> None:
    made = demo.run_all(Settings(), io.StringIO())
    assert made.as_expected, made.table()
    masters_missing, scale_missing, exponents_missing = made.outcomes[2::2]
    assert made.gap(masters_missing) > 0.15 and masters_missing.unmoved > 0.5
    assert made.gap(scale_missing) > 0.3 and scale_missing.subnormal_grads > 0.99
    assert made.gap(exponents_missing) > 0.5 and exponents_missing.subnormal_grads > 0.99
    for outcome in made.outcomes:
        if outcome.run.sound:
            assert abs(made.gap(outcome)) <= 0.005
            assert outcome.unmoved < 0.01 and outcome.subnormal_grads < 0.01


@pytest.mark.parametrize("run", [run for run in RUNS if run.recipe], ids=lambda run: run.name)
def test_hidden_layers_of_fp8_runs_are_in_fp8_and_nothing_else_is(run: Run) -> None:
    training = demo_runs._Training(run, TINY, torch.device("cpu"))
    names = [name for name, _ in float8_layers(training.model)]
    hidden = ("queries_keys_values", "attention_out", "gate_and_up", "down")
    assert names == [f"blocks.0.{name}" for name in hidden]
    plain = demo_runs._Training(RUNS[1], TINY, torch.device("cpu")).model
    for (name, weight), other in zip(
        training.model.named_parameters(), plain.parameters(), strict=True
    ):
        assert torch.equal(weight, other), name


# ----------------------------------------------------------------------------------------- report


def test_a_run_is_equal_close_worse_or_diverged_by_its_distance_from_fp32() -> None:
    made = report(**{"bf16 with masters": 2.956, "fp16 without a loss scale": math.nan})
    verdicts = [made.verdict(outcome) for outcome in made.outcomes]
    assert verdicts == ["reference", "close", "worse", "equal", "diverged", "equal", "worse"]


def test_findings_are_claimed_only_where_the_runs_bear_them_out() -> None:
    good, bad = report(), report(**{"bf16 without masters": 2.96})
    assert good.as_expected and not bad.as_expected
    assert "The others end within 0.0030 of fp32." in good.findings()
    assert (
        "bf16 without masters: 75% of updates round to nothing; mixprec.MixedPrecision"
        in good.findings()
    )
    assert "These runs did not end as they should" in bad.findings()
    assert "try another --seed" in bad.findings()
    assert good.picture().title.startswith("BF16 needs FP32 masters, FP16 a loss scale")
    assert bad.picture().title == "One training in seven precisions"

    short = replace(bad, settings=replace(bad.settings, steps=10))
    assert "10 steps are too few to tell; the default is 250." in short.findings()


def test_a_loss_that_is_not_a_number_is_null_in_json() -> None:
    data = report(**{"fp16 without a loss scale": math.nan}).data()
    json.dumps(data, allow_nan=False)
    assert data["runs"][4]["held_out_loss"] is None
    assert data["runs"][4]["held_out_losses"] == [5.6, 4.0, None]


# ---------------------------------------------------------------------------------------- picture


def test_the_svg_names_every_curve_with_its_distance_and_says_how_it_was_made() -> None:
    made = report()
    texts = svg_text(draw_svg(made.curves(), made.picture()))
    values = ("2.9500", "+0.0010", "+0.2500", "-0.0001", "+0.5500", "+0.0030", "+0.8500")
    assert {name + value for name, value in zip(ENDS, values, strict=True)} <= set(texts)
    assert "75% of updates round to nothing" in texts and "100% of gradients are subnormal" in texts
    assert "100% of gradients are zero" in texts
    assert {"held-out loss, nats per byte", "optimizer steps"} <= set(texts)
    caption = "\n".join(texts[-3:])
    for fact in ("seed 0", "250 steps", "50% padding", "Python 3", "emulated on a CPU"):
        assert fact in caption


def test_the_svg_is_for_light_and_dark_and_leads_nowhere() -> None:
    svg = draw_svg(report().curves(), report().picture())
    assert svg.count("prefers-color-scheme:dark") == 1
    assert re.findall(r"https?://[^\"]+", svg) == ["http://www.w3.org/2000/svg"]
    assert "<script" not in svg and "<image" not in svg


@pytest.mark.parametrize(
    "ends", [ENDS, dict.fromkeys(ENDS, 3.0), {**ENDS, "fp16 without a loss scale": 9.0}]
)
def test_names_at_line_ends_never_overlap_nor_leave_the_picture(ends: dict[str, float]) -> None:
    made = report(**ends)
    root = ET.fromstring(draw_svg(made.curves(), made.picture()))
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    labels = [node for node in root.iter() if node.tag.endswith("}text")]
    labels = [node for node in labels if float(node.attrib["x"]) > 650]
    ys = sorted(float(node.attrib["y"]) for node in labels)
    assert len(ys) >= len(RUNS)
    assert all(below - above >= 16 for above, below in pairwise(ys))
    assert 0 < ys[0] and ys[-1] < height - 70  # where the caption begins
    assert all(float(node.attrib["x"]) < width for node in labels)


def test_a_curve_that_is_nan_from_the_start_and_one_of_a_single_point_are_drawn() -> None:
    curves = [
        Curve("lost", [0, 1], [math.nan, math.inf], SOUND[0]),
        Curve("short", [0], [1.0], SOUND[1]),
    ]
    assert "short" in "".join(svg_text(draw_svg(curves, report().picture())))
    assert "short" in draw_text(curves)
    assert draw_text(curves[:1])


def test_markup_in_a_name_is_escaped() -> None:
    curve = Curve("<b> & co", [0, 1], [2.0, 1.0], SOUND[0])
    assert "<b> & co" in "".join(svg_text(draw_svg([curve], report().picture())))
    curve = Curve("a\x00b\x1b", [0, 1], [2.0, 1.0], SOUND[0])
    assert r"a\x00b\x1b" in "".join(svg_text(draw_svg([curve], report().picture())))


# --------------------------------------------------------------------------------------- progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def ticking(stream: io.StringIO, seconds: float) -> Progress:
    """Progress on two runs of five steps, each of which takes `seconds`."""
    return Progress(stream, runs=2, steps=5, clock=map(seconds.__mul__, count()).__next__)


def test_a_terminal_has_one_line_redrawn_and_cleared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    progress = ticking(stream, 2.0)
    for step in (1, 2, 3):
        progress.update("2/5 bf16", step=step, loss=3.14159, num_tokens=1000, loss_scale=65536.0)
    progress.clear()
    drawn = stream.getvalue().split("\r\x1b[2K")
    assert "\n" not in stream.getvalue()
    assert drawn[0] == drawn[-1] == "" and len(drawn) == 5
    assert drawn[-2] == "2/5 bf16  step 3/5  loss 3.142  500 tokens/s  loss scale 65536  0:14 left"


def test_the_live_line_is_cut_before_it_wraps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    stream = Terminal()
    ticking(stream, 1.0).update("a long name of a run", step=1, loss=1.0, num_tokens=1)
    assert stream.getvalue() == "\r\x1b[2Ka long name of a ru"


def test_the_live_line_is_redrawn_ten_times_a_second_at_most() -> None:
    stream = Terminal()
    progress = ticking(stream, 0.04)
    for step in (1, 2, 3, 4):
        progress.update("fp32", step=step, loss=1.0, num_tokens=10)
    assert stream.getvalue().count("step") == 1 and "step 3/5" in stream.getvalue()
    assert "250 tokens/s" in stream.getvalue()  # of all steps since the last drawing


def test_a_pipe_gets_plain_lines_now_and_then_and_at_the_end_of_a_run() -> None:
    stream = io.StringIO()
    progress = ticking(stream, 6.0)
    for step in (1, 2, 3, 4, 5):
        progress.update("fp32", step=step, loss=1.0, num_tokens=60)
    progress.clear()
    assert re.findall(r"step (\d)/5", stream.getvalue()) == ["2", "4", "5"]
    assert "\r" not in stream.getvalue() and "loss scale" not in stream.getvalue()
    assert stream.getvalue().endswith("0:30 left\n")


# ------------------------------------------------------------------------------------------- docs


def test_the_page_and_the_picture_come_from_the_same_run() -> None:
    page = (DOCS / "demo.md").read_text()
    picture = svg_text((DOCS / "demo.svg").read_text())
    rows = [re.split(r"  +", line) for line in page.splitlines() if line.startswith(tuple(ENDS))]
    table = {row[0]: row[1:] for row in rows if len(row) > 4}
    assert list(table) == list(ENDS)
    assert "fp32" + table["fp32"][0] in picture
    for name in list(ENDS)[1:]:
        assert name + table[name][1] in picture


def test_the_page_shows_what_the_demo_prints_of_such_a_run() -> None:
    page = (DOCS / "demo.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith(tuple(ENDS)) and "%" in line]
    rows = [re.split(r"  +", line) for line in rows if "  " in line]
    made = report(**{row[0]: float(row[1]) for row in rows})
    for outcome, row in zip(made.outcomes, rows, strict=True):
        outcome.unmoved, outcome.subnormal_grads = (
            float(cell.rstrip("%")) / 100 for cell in row[-3:-1]
        )

    def form(text: str) -> str:  # differences of rounded losses are not rounded differences
        return re.sub(r"\d\.\d{4}", "#", text)

    assert form(made.table()) in form(page)
    assert form("\n".join(wrapped(made.findings()))) in form(page)
