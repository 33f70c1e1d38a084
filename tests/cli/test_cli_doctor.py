from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from mixprec import formats
from mixprec.cli import doctor, doctor_float8, main
from mixprec.float8 import products

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
    assert set(found) == {"versions", "device", "formats", "float8", "torch", "advice"}
    assert found["versions"]["torch"] == torch.__version__
    columns = {"format", "storage", "overflow", "product", "speed", "autocast", "all_reduce"}
    assert [set(row) for row in found["formats"]] == [columns] * len(formats.ALL)
    assert [row["format"] for row in found["formats"]] == [f.name for f in formats.ALL]
    assert found["formats"][0]["speed"] == 1.0
    assert found["advice"].startswith("Use ")
    assert not torch.distributed.is_initialized()


@pytest.mark.usefixtures("quick")
def test_the_page_has_the_advice_first_a_row_a_format_and_the_reasons(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith("Use fp16 with loss scaling, because it multiplies 8.0 times")
    assert printed.count("Use ") == 2 and "mixprec 0" in printed and "\ncpu: " in printed
    table = lines[lines.index("") + 1 :]
    table = table[table.index("") + 1 :]
    assert table[0].split() == "storage overflow product speed autocast all_reduce".split()
    assert [line.split()[0] for line in table[1:6]] == [format.name for format in formats.ALL]
    assert table[2].split()[:5] == ["bf16", "yes", "inf", "emulated", "0.25x"]
    assert "  e4m3 autocast: a product of fp32 tensors is torch.float32" in lines
    assert "fp8 product   recipe     operands  runs in" in lines
    assert "\n\nUse fp8 here to see what it does to a model, not for speed" in printed
    assert lines[-1].startswith("grad_dtype yes, fsdp2 yes, dcp yes, gloo yes, nccl ")
    if not torch.cuda.is_available():  # installed or not, they do nothing here
        assert lines[-1].endswith("nccl no, triton no")


@pytest.mark.usefixtures("quick")
def test_a_probe_that_raises_is_a_finding(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_kernel(*args: Any) -> float:
        raise RuntimeError("not implemented for 'BFloat16'\nwith a long story")

    monkeypatch.setattr(doctor, "_speed", no_kernel)
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert ["bf16", "yes", "inf", "no", "no"] in [line.split()[:5] for line in lines]
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


# ------------------------------------------------------------------ FP8


def float8(speed: float | None = None) -> dict[str, Any]:
    return doctor_float8.examine(CPU, doctor._outcome, speed)


def test_every_product_of_a_layer_is_tried_with_the_formats_of_its_operands() -> None:
    found = float8()
    assert found["units"] is False
    assert {(p["product"], p["recipe"]): p["operands"] for p in found["products"]} == {
        ("output", "static"): "e4m3 x e4m3",
        ("grad_input", "static"): "e5m2 x e4m3",
        ("grad_weight", "static"): "e5m2 x e4m3",
        ("output", "rowwise"): "e4m3 x e4m3",
        ("grad_input", "rowwise"): "e4m3 x e4m3",
        ("grad_weight", "rowwise"): "e4m3 x e4m3",
    }
    assert {p["runs in"] for p in found["products"]} == {"emulated"}


def test_a_product_that_raises_or_is_wrong_is_a_finding_and_fp8_is_advised_against(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fault(left: Any, right: Any, *args: Any) -> Any:
        if left.dtype == torch.float8_e5m2:
            raise RuntimeError("cuBLAS knows no such product\nand more")
        if args[0].numel() > 1:
            return products.scaled_product(left, right, *args) + 3
        return products.scaled_product(left, right, *args)

    monkeypatch.setattr(doctor_float8, "scaled_product", fault)
    found = float8()
    outcomes = [product["runs in"] for product in found["products"]]
    assert outcomes[0] == "emulated"
    assert outcomes[1].startswith("no: off by up to ")
    assert outcomes[2] == "no: cuBLAS knows no such product"
    assert found["advice"].startswith(
        "Leave fp8 alone here, because a product of its layers failed: off by up to "
    )
    page = "\n".join(doctor_float8.page(found))
    assert "  grad_input (static): cuBLAS knows no such product" in page


def test_units_are_believed_only_if_their_products_are_right(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # On a CPU the same call that units take works as well, so a device that has them is played.
    monkeypatch.setattr(doctor_float8, "has_units", lambda device: True)
    found = float8(1.7)
    assert found["units"] is True
    assert {product["runs in"] for product in found["products"]} == {"units"}
    assert found["advice"] == (
        "fp8 products run 1.7 times as fast as bf16 here: mixprec.Precision('fp8') for linear "
        "layers."
    )
    assert "run in units of their own here" in doctor_float8.advice(True, ["units"], None)


def test_casts_of_torch_are_tried_and_ours_are_the_same_everywhere() -> None:
    casts = {cast.pop("cast"): cast for cast in float8()["casts"]}
    ours = {"464": "448", "480": "448", "57344": "448", "61440": "448", "inf": "nan", "nan": "nan"}
    assert casts["mixprec to e4m3"] == ours
    assert casts["mixprec to e5m2"] == {
        **{"464": "448", "480": "512", "57344": "57344", "61440": "57344"},
        **{"inf": "nan", "nan": "nan"},
    }
    for format in (formats.E4M3, formats.E5M2):
        values = torch.tensor([464.0, 480.0, 57344.0, 61440.0, float("inf"), float("nan")])
        torchs = values.to(format.dtype).float().tolist()
        assert list(casts[f"torch to {format}"].values()) == [f"{value:g}" for value in torchs]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_with_units_multiplies_right_in_each_of_them() -> None:
    found = doctor_float8.examine(torch.device("cuda"), doctor._outcome, None)
    outcomes = {(p["product"], p["recipe"]): p["runs in"] for p in found["products"]}
    assert set(outcomes.values()) == {"units" if found["units"] else "emulated"}, outcomes
    ours = [cast for cast in found["casts"] if cast["cast"].startswith("mixprec")]
    assert ours == [cast for cast in float8()["casts"] if cast["cast"].startswith("mixprec")]
