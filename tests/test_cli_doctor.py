from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from mixprec import formats
from mixprec.cli import doctor, main

CPU = torch.device("cpu")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """FP16 as fast as on a GPU, BF16 emulated, without multiplying anything."""
    speeds = {"fp16": 8.0, "bf16": 0.25, "e4m3": 1.5, "e5m2": 0.125}
    monkeypatch.setattr(doctor, "_speed", lambda format, device: speeds[format.name])
    monkeypatch.setattr(doctor, "_device", lambda: CPU)


def test_the_real_thing_runs_and_its_json_is_complete(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"versions", "device", "formats", "torch", "advice"}
    assert found["versions"]["torch"] == torch.__version__
    columns = {"format", "storage", "overflow", "product", "speed", "autocast", "all_reduce"}
    assert [set(row) for row in found["formats"]] == [columns] * len(formats.ALL)
    assert [row["format"] for row in found["formats"]] == [f.name for f in formats.ALL]
    assert found["formats"][0]["speed"] == 1.0
    assert found["advice"].startswith("Use ")
    assert not torch.distributed.is_initialized()


@pytest.mark.usefixtures("quick")
def test_the_page_has_a_row_a_format_the_reasons_and_the_advice_last(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("mixprec ") and lines[1].startswith("cpu: ")
    assert lines[3].split() == "storage overflow product speed autocast all_reduce".split()
    assert [line.split()[0] for line in lines[4:9]] == [format.name for format in formats.ALL]
    assert lines[5].split()[:5] == ["bf16", "yes", "inf", "emulated", "0.25x"]
    assert "  e4m3 autocast: a product of fp32 tensors is torch.float32" in lines
    assert lines[-1].startswith("Use fp16 with loss scaling, because it multiplies 8.0 times")


@pytest.mark.usefixtures("quick")
def test_a_probe_that_raises_is_a_finding(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_kernel(*args: Any) -> float:
        raise RuntimeError("not implemented for 'BFloat16'\nwith a long story")

    monkeypatch.setattr(doctor, "_speed", no_kernel)
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[5].split()[:5] == ["bf16", "yes", "inf", "no", "no"]
    assert "  bf16 product: not implemented for 'BFloat16'" in lines
    assert not any("long story" in line for line in lines)


@pytest.mark.usefixtures("quick")
def test_what_a_format_makes_of_an_overflow_is_tried_not_looked_up() -> None:
    rows = {row["format"]: row for row in doctor.examine(CPU)["formats"]}
    assert [rows[name]["overflow"] for name in ("fp32", "bf16", "fp16", "e5m2")] == ["inf"] * 4
    # Torch's own cast gives NaN in some releases and saturates in later ones.
    cast = torch.tensor(1e9).to(torch.float8_e4m3fn).float()
    assert rows["e4m3"]["overflow"] == ("nan" if cast.isnan() else "saturates")


@pytest.mark.parametrize(
    ("bf16", "fp16", "advice"),
    [
        (4.0, 8.0, "Use bf16: it multiplies 4.0 times as fast as fp32"),
        (0.25, 8.0, "Use fp16 with loss scaling, because it multiplies 8.0 times as fast as fp32"),
        (None, 8.0, "Use fp16 with loss scaling, because"),
        (0.2, 0.1, "Use bf16 if memory is short, and fp32 for speed, because this device only"),
        (None, None, "Use bf16 if memory is short, and fp32 for speed"),
    ],
)
def test_the_advice_follows_from_the_measured_speeds(
    bf16: float | None, fp16: float | None, advice: str
) -> None:
    assert doctor.advice(bf16, fp16).startswith(advice)


def test_speed_is_a_ratio_of_the_better_of_alternating_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # First calls are slow, and one later call is disturbed; neither may count.
    seconds = iter([9.0, 9.0, 1.0, 2.0, 7.0, 2.5])
    clock = iter([0.0, 0.1, 0.2, 1.0])
    monkeypatch.setattr(doctor, "_seconds", lambda multiply, device: next(seconds))
    monkeypatch.setattr(doctor.time, "perf_counter", lambda: next(clock))
    assert doctor._speed(formats.BF16, CPU) == 2.0


def test_a_product_is_in_the_format_it_is_named_for() -> None:
    for format in formats.ALL:
        result = doctor._product(format, 16, CPU)()
        assert result.dtype == (torch.bfloat16 if format.bits == 8 else format.dtype)
        assert result.float().unique().tolist() == [16.0]
