"""The measured tables of the pages, made from the files in results/.

    python docs/benchmarks/tables.py            # names those that are not what the files give
    python docs/benchmarks/tables.py --write    # writes them

What stands on a page between `<!-- figures: NAME -->` and `<!-- end -->` is what the function of
that name here returns: a table, or words with numbers in them. Bold is the least time of a row, or
of rows that do the same, whoever's it is. Below a table stand its script, day, hardware and
versions. A table asks for what is in its file, so a way that was left out of a run has no row.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from textwrap import indent
from typing import Any

HERE = Path(__file__).parent
DOCS = HERE.parent
PAGES = [DOCS.parent / "README.md", *sorted(DOCS.glob("*.md")), HERE / "README.md"]
MARKS = re.compile(r"(<!-- figures: (?P<name>[\w-]+) -->)(?P<text>.*?)(<!-- end -->)", re.DOTALL)

FIGURES: dict[str, Callable[[], str]] = {}
READ: set[str] = set()
"""Names of the result files that were asked for."""


def figures(function: Callable[[], str]) -> Callable[[], str]:
    FIGURES[function.__name__.replace("_", "-")] = function
    return function


# ------------------------------------------------------------------ files


def runs(name: str) -> list[dict[str, Any]]:
    READ.add(name)
    return json.loads((HERE / "results" / f"{name}.json").read_text("utf-8"))


def numbers(name: str) -> dict[str, Any]:
    """What a file says, of all its runs."""
    return {key: value for run in runs(name) for key, value in run["numbers"].items()}


def origin(name: str, keys: Iterable[str] = ()) -> str:
    """Script, day, hardware and versions of a file, or of some of its numbers."""
    wanted = set(keys) or set(numbers(name))
    used = [(run, [key for key in run["numbers"] if key in wanted]) for run in runs(name)]
    used = sorted(((run, here) for run, here in used if here), key=lambda each: len(each[1]))
    parts: list[str] = []
    for number, (run, here) in enumerate(used, 1):
        versions = ", ".join(f"{package} {version}" for package, version in run["versions"].items())
        some = f"{', '.join(here)}: " if number < len(used) else "the others: "
        copied = f" (copied from {run['transcribed']})" if run.get("transcribed") else ""
        link = f"[{run['date']}](benchmarks/results/{name}.json)"
        parts.append(f"{some * (len(used) > 1)}{link}{copied}, {run['hardware']}, {versions}")
    script = re.search(r"docs/benchmarks/(\w+\.py)", runs(name)[0]["command"])
    assert script, f"{name} names no script"
    return f"[{script[1]}](benchmarks/{script[1]}): {'; '.join(parts)}."


# ------------------------------------------------------------------ cells


def grid(header: Iterable[str], rows: Iterable[Iterable[str]], below: str = "") -> str:
    first, *others = [list(header), *map(list, rows)]
    lines = [first, ["---"] * len(first), *others]
    text = "\n".join(
        "".join(f"| {cell} " if cell else "| " for cell in line) + "|" for line in lines
    )
    return f"{text}\n\n{below}" if below else text


def digits(value: float, count: int = 3) -> str:
    """A number with so many digits, its last zeros too."""
    shown = f"{value:#.{count}g}".rstrip(".")
    return f"{value:.0f}" if "e" in shown else shown


def bold(text: str, when: bool = True) -> str:
    return f"**{text}**" if when else text


def least(times: Mapping[str, float]) -> str:
    return min(times, key=lambda name: times[name])


def among(values: Iterable[float], show: Callable[[float], str] = digits) -> str:
    """From the least to the largest."""
    found = list(values)
    low, high = show(min(found)), show(max(found))
    return low if low == high else f"{low} to {high}"


def times_faster(times: Mapping[str, float], ways: Iterable[str], base: str) -> list[str]:
    """A cell for each way: milliseconds, and how many times as fast as the base; least is bold."""
    best = min(times[way] for way in (*ways, base) if way in times)
    cells: list[str] = []
    for way in ways:
        shown = digits(times[way]) if way in times else ""
        ratio = f", {times[base] / times[way]:.2f}x" if way in times and way != base else ""
        cells.append(bold(shown, way in times and times[way] == best) + ratio)
    return cells


# ------------------------------------------------------------------ steps on a CPU


@figures
def step_by_hand() -> str:
    rows: list[list[str]] = []
    for row in numbers("wrapper_overhead")["rows"]:
        times = {way: row[way] for way in ("by hand", "full", "split")}
        clipped = f", norm {row['max_grad_norm']:g}" if row["max_grad_norm"] else ""
        cells = [
            bold(f"{ms:.1f} ms", way == least(times))
            + (f", {ms / times['by hand']:.2f}x" if way != "by hand" else "")
            for way, ms in times.items()
        ]
        rows.append([f"{row['threads']}{clipped}", *cells])
    header = ["threads, clipping", "by hand", "full masters", "split masters"]
    return grid(header, rows, origin("wrapper_overhead"))


@figures
def step_by_hand_ratios() -> str:
    rows = numbers("wrapper_overhead")["rows"]
    full, split = (
        among((row[way] / row["by hand"] for row in rows), lambda ratio: f"{ratio:.1f}")
        for way in ("full", "split")
    )
    return f"{full} times as long with full masters, and {split} times with split ones"


@figures
def step_memory() -> str:
    header = ["masters", "`bucket_numel`", "resident", "transient", "formula"]
    rows = [
        [
            row["masters"],
            "2¹⁸" if row["bucket_numel"] == 2**18 else "2²¹",
            f"{row['resident']:.3f} B/param",
            f"{row['transient'] / 2**20:.2f} MiB",
            f"{row['formula'] / 2**20:.2f} MiB",
        ]
        for row in numbers("peak_memory")["rows"]
    ]
    return grid(header, rows, origin("peak_memory"))


@figures
def split_join() -> str:
    rows = [
        [f"2^{row['exponent']}", *(f"{row[name]:.1f}" for name in ("copy", "split", "join"))]
        for row in numbers("split_join")["rows"]
    ]
    return grid(["elements", "BF16 `copy_`", "`split`", "`join`"], rows, origin("split_join"))


@figures
def split_ratio() -> str:
    rows = numbers("split_join")["rows"]
    return among((row["split"] / row["copy"] for row in rows), lambda ratio: f"{ratio:.1f}")


# ------------------------------------------------------------------ fused steps

_ADAMW = {
    "FP32 masters and states": {
        "ours, FP32 states, unguarded": "mixprec, nobody looks at gradients, as in every peer",
        "ours, FP32 states": "mixprec, norm and overflow check included (the default)",
        "ours, FP32 states, clipped": "mixprec, and clipped to a norm",
        "ours, full masters, unguarded": "mixprec, full masters, compared with their weights",
        "torch fused, FP32 parameters": "torch fused, FP32 parameters and gradients",
        "classic FP32 masters": "FP32 masters by hand: copy, torch fused, copy",
        "ours, bucket by bucket": "mixprec, `fused=False`",
    },
    "32-bit weights, BF16 states": {
        "ours, BF16 states, unguarded": "mixprec, nobody looks at gradients",
        "flashoptim 32-bit, BF16 states": "flashoptim, 32-bit masters",
        "optimi Kahan, BF16 states": "optimi, Kahan sums in BF16",
    },
    "32-bit weights, 8-bit states": {
        "ours, 8-bit states, unguarded": "mixprec, nobody looks at gradients",
        "ours, 8-bit states": "mixprec, norm and overflow check included",
        "flashoptim 32-bit, 8-bit states": "flashoptim, 32-bit masters",
    },
    "no masters (small updates are lost, or rounded by chance)": {
        "torch fused, BF16, no masters": "torch fused, BF16",
        "heavyball, BF16": "heavyball, BF16",
        "torchao 8-bit, no masters": "torchao, 8-bit states",
    },
}


@figures
def fused_adamw() -> str:
    found = numbers("optimizer_gpu")
    rows: list[list[str]] = []
    for group, ways in _ADAMW.items():
        times = {way: found[way]["ms"] for way in ways if way in found}
        if times:
            rows.append([f"*{group}*", *[""] * 6])
        for way in times:
            row = found[way]
            extra = f", peak {row['peak']:.1f}" if row["peak"] > row["stored"] + 0.05 else ""
            rows.append(
                [
                    ways[way],
                    bold(f"{row['ms']:.2f}", way == least(times)),
                    f"{100 * row['of_copy']:.0f} %",
                    f"{row['moved']:g}",
                    f"{row['host_ms']:.1f}",
                    f"{row['launches']:.0f}",
                    f"{row['stored']:.1f}{extra}",
                ]
            )
    header = ["way", "ms", "of copy", "bytes moved a parameter", "host ms", "launches"]
    keys = [way for ways in _ADAMW.values() for way in ways if way in found]
    return grid([*header, "bytes held a parameter"], rows, origin("optimizer_gpu", keys))


_RULES = {
    **{"SGD": "SGD", "SGD momentum": "SGD with momentum", "SGD Nesterov": "SGD, Nesterov"},
    **{"Lion": "Lion", "RMSprop": "RMSprop", "Adagrad": "Adagrad", "ASGD": "ASGD"},
    **{"NAdam": "NAdam", "RAdam": "RAdam", "Adamax": "Adamax", "Adadelta": "Adadelta"},
    **{"Adam amsgrad": "Adam with amsgrad", "AdaBelief": "AdaBelief", "ADOPT": "ADOPT"},
    **{"schedule-free AdamW": "schedule-free AdamW", "AdEMAMix": "AdEMAMix", "Adan": "Adan"},
    **{"LAMB": "LAMB, sums over each tensor", "MARS": "MARS, sums over each tensor"},
}


@figures
def fused_rules() -> str:
    found = numbers("optimizer_gpu")
    cells = [
        [_RULES[rule], digits(found[rule]["ms"]), f"{100 * share:.0f} %" if share else ""]
        for rule in _RULES
        if rule in found
        for share in [found[rule].get("of_copy")]
    ]
    half = -(-len(cells) // 2)
    rows = [
        [*left, "", *right]
        for left, right in zip(cells[:half], [*cells[half:], [""] * 3], strict=False)
    ]
    header = ["rule", "ms", "of copy", "", "rule", "ms", "of copy"]
    keys = [rule for rule in _RULES if rule in found]
    return grid(header, rows, origin("optimizer_gpu", keys))


def _pairs() -> dict[str, dict[str, float]]:
    """Milliseconds of rules of matrices, with this library and bare, by rule and size."""
    found = numbers("optimizer_gpu")
    pairs: dict[str, dict[str, float]] = {}
    for way in found:
        name, _, who = way.partition(": ")
        if who == "bare" and f"{name}: ours" in found:
            pairs[name] = {"bare": found[way]["ms"], "ours": found[f"{name}: ours"]["ms"]}

    def by_rule_and_size(name: str) -> tuple[str, int]:
        rule, _, size = name.partition(" ")
        return rule, int(size.removesuffix("M"))

    return {name: pairs[name] for name in sorted(pairs, key=by_rule_and_size)}


@figures
def fused_matrices() -> str:
    rows = [
        [
            name,
            *(bold(digits(times[who]), who == least(times)) for who in ("bare", "ours")),
            f"{times['ours'] / times['bare']:.2f}",
        ]
        for name, times in _pairs().items()
    ]
    keys = [f"{name}: {who}" for name in _pairs() for who in ("bare", "ours")]
    header = ["rule, parameters", "bare, ms", "mixprec, ms", "times as long"]
    return grid(header, rows, origin("optimizer_gpu", keys))


@figures
def fused_small() -> str:
    found = numbers("optimizer_gpu")
    names = {
        "124M: ours": "124 million parameters in 112 tensors, mixprec unguarded",
        "124M: torch fused, FP32 parameters": "124 million, torch fused on FP32 parameters",
        "2000 x 4096: ours, guarded": "2,000 tensors of 4,096 elements, mixprec (the default)",
        "2000 x 4096: ours": "2,000 tensors, mixprec unguarded",
        "2000 x 4096: torch fused, FP32 parameters": "2,000 tensors, torch fused on FP32",
    }
    ways = [way for way in names if way in found]
    same = {way: {each: found[each]["ms"] for each in ways if each[:4] == way[:4]} for way in ways}
    rows: list[list[str]] = []
    for way in ways:
        wins = way == least(same[way]) and len({"torch" in each for each in same[way]}) == 2
        row = found[way]
        rows.append([names[way], bold(f"{row['ms']:.2f}", wins), f"{row['host_ms']:.2f}"])
    return grid(["AdamW", "ms", "host ms"], rows, origin("optimizer_gpu", ways))


@figures
def fused_first_step() -> str:
    ways = {way for group in _ADAMW.values() for way in group if "bucket" not in way}
    found = numbers("optimizer_gpu")
    seconds = [found[way]["first_s"] for way in ways if way.startswith("ours")]
    return f"{among(seconds, lambda s: f'{s:.1f}')} s"


# ------------------------------------------------------------------ cross-entropy

_LOSSES = {
    "ours": "`linear_cross_entropy`",
    "ours, FP32 logits": "`linear_cross_entropy`, FP32 logits",
    "eager": "full logits",
    "torch.compile": "full logits, torch.compile",
    "Liger": "Liger",
    "Liger, FP32 accumulation": "Liger, FP32 accumulation",
    "CCE": "cut-cross-entropy",
    "CCE, torch_compile": "cut-cross-entropy, `torch_compile`",
}


@figures
def loss_memory() -> str:
    rows: list[list[str]] = []
    for row in numbers("cross_entropy_memory")["rows"]:
        forward, both = (f"{row[key] / 2**20:.0f} MiB" for key in ("forward", "both"))
        name = row["way"].replace("recompute", "`recompute=True`")
        peak = f"{both}, {forward} before the backward pass" if "recompute" in name else both
        rows.append([name, f"{row['held']:.2f}", peak])
    header = ["", "held for the backward pass, bytes per logit", "peak of forward and backward"]
    return grid(header, rows, origin("cross_entropy_memory"))


@figures
def loss_one_shape() -> str:
    ways = numbers("cross_entropy_gpu")["Llama 3"]["ways"]
    floor = ways["three bare products"]["ms"]
    best = {
        key: min(ways[way][key] for way in _LOSSES) for key in ("ms", "peak_mib", "weight_error")
    }
    rows = [["three bare products", f"{floor:.1f}", "1.00", "", "", ""]]
    for way, name in _LOSSES.items():
        row = ways[way]
        rows.append(
            [
                name,
                bold(f"{row['ms']:.1f}", row["ms"] == best["ms"]),
                f"{row['ms'] / floor:.2f}",
                bold(f"{row['peak_mib']:.0f} MiB", row["peak_mib"] == best["peak_mib"]),
                f"{row['hidden_error']:.1e}",
                bold(f"{row['weight_error']:.1e}", row["weight_error"] == best["weight_error"]),
            ]
        )
    header = ["N=8192, d=4096, V=128256", "ms", "of the floor", "peak beside gradients", "dX", "dW"]
    return grid(header, rows, origin("cross_entropy_gpu"))


def _shapes() -> dict[str, dict[str, Any]]:
    return {
        name: shape
        for name, shape in numbers("cross_entropy_gpu").items()
        if name not in ("Llama 3", "parts")
    }


@figures
def loss_shapes() -> str:
    rows: list[list[str]] = []
    for name, shape in _shapes().items():
        times = {way: shape["ways"][way]["ms"] for way in _LOSSES}
        cells = [bold(digits(ms), way == least(times)) for way, ms in times.items()]
        size = f"N={shape['tokens']}, d={shape['width']}, V={shape['vocab']}"
        padding = ", 1/7 of the targets padding" if "padding" in name else ""
        cells.insert(2, digits(shape["ways"]["three bare products"]["ms"]))
        rows.append([f"{size}{padding}", *cells])
    header = ["milliseconds", "ours", "ours, FP32 logits", "floor", "full logits", "compiled"]
    return grid([*header, "Liger", "Liger FP32", "CCE", "CCE compiled"], rows)


@figures
def loss_beside_compiled() -> str:
    shapes = {"Llama 3": numbers("cross_entropy_gpu")["Llama 3"], **_shapes()}
    ratios: dict[bool, list[float]] = {False: [], True: []}
    for name, shape in shapes.items():
        ways = shape["ways"]
        peer = min(ways[way]["ms"] for way in ("torch.compile", "CCE, torch_compile"))
        ratios["padding" in name].append(ways["ours"]["ms"] / peer)
    peaks = {
        who: [shape["ways"][way]["peak_mib"] for shape in shapes.values() for way in ways]
        for who, ways in {
            "ours": ("ours", "ours, FP32 logits"),
            "theirs": ("torch.compile", "CCE, torch_compile"),
        }.items()
    }
    plain, padded = (among(ratios[kind], lambda ratio: f"{ratio:.2f}") for kind in (False, True))
    mine, theirs = max(peaks["ours"]), among(peaks["theirs"], lambda peak: f"{peak:.0f}")
    return (
        "Full logits, compiled, and cut-cross-entropy's compiled form hold the logits of all\n"
        "tokens and round the weight gradient to BF16. Beside the faster of these two\n"
        f"`linear_cross_entropy` takes {plain} times as long without padding and {padded} times\n"
        f"with it. Its peak is at most {mine:.0f} MiB, theirs {theirs} MiB."
    )


@figures
def loss_errors() -> str:
    names = {
        "full logits": "full logits in BF16",
        "ours, BF16 logits": "`linear_cross_entropy`, BF16 logits",
        "ours, FP32 logits": "`linear_cross_entropy`, FP32 logits",
    }
    rows = numbers("cross_entropy_errors")["rows"]
    cells = [[names[way], *(f"{error:.1e}" for error in rows[way])] for way in names]
    return grid(["", "loss", "hidden states", "weight"], cells, origin("cross_entropy_errors"))


@figures
def loss_row_kernel() -> str:
    parts = numbers("cross_entropy_gpu")["parts"]
    rate = parts["row kernel, torch.bfloat16, blocks of 4096, 8 warps"]["tb_per_s"]
    size = "8192 tokens, d=2048, V=50304"
    products = sum(parts[f"{part}, {size}"]["ms"] for part in ("logits", "dW added to", "dX"))
    share = 6 * 8192 * 50304 / (rate * 1e9) / products
    return f"{rate:.1f} TB/s and is {100 * share:.0f} % of the products at d=2048"


# ------------------------------------------------------------------ FP8

_RECIPES = ("static", "adaptive", "tensorwise", "rowwise")
_TORCHAO = ("torchao tensorwise compiled", "torchao rowwise compiled")
_LINEAR = ("bf16 eager", *_RECIPES, *_TORCHAO)
_UNCHANGED = ("bf16 eager", "static", "adaptive", *_TORCHAO)


def _linear() -> dict[str, dict[str, float]]:
    found = numbers("float8_gpu")
    return {
        key.removeprefix("linear ").replace("x", " x "): value["ms"]
        for key, value in found.items()
        if key.startswith("linear ")
    }


@figures
def fp8_linear() -> str:
    rows: list[list[str]] = []
    for shape, times in _linear().items():
        cells = times_faster(times, _LINEAR, "bf16 eager")
        rows.append([shape, *cells, digits(times["three bare _scaled_mm"])])
        graphs = {
            way.removesuffix(", CUDA graph"): ms for way, ms in times.items() if "graph" in way
        }
        if graphs:
            cells = times_faster(graphs, ("bf16", *_RECIPES), "bf16")
            rows.append([f"{shape}, CUDA graph", *cells, "", "", ""])
    header = ["tokens x in x out, ms", "BF16", *(f"`{recipe}`" for recipe in _RECIPES)]
    header += ["torchao tensorwise", "torchao rowwise", "three bare products"]
    keys = [key for key in numbers("float8_gpu") if key.startswith("linear ")]
    return grid(header, rows, origin("float8_gpu", keys))


@figures
def fp8_gain() -> str:
    """Of the large layers, whose time is the device's."""
    large = [ms for shape, ms in _linear().items() if not shape.startswith("4096 ")]
    over = {
        way: among((ms[way] / ms["static"] for ms in large), lambda ratio: f"{ratio:.2f}")
        for way in ("bf16 eager", "torchao tensorwise compiled")
    }
    return (
        f"Of the four large layers `static` is {over['bf16 eager']} times as fast as BF16, and "
        f"{over['torchao tensorwise compiled']} times as fast as torchao."
    )


_DEPTH = {
    "bf16 eager": "BF16, eager",
    "bf16 compiled": "BF16, compiled",
    "adaptive": "`adaptive`, eager",
    "adaptive compiled": "`adaptive`, compiled",
    "tensorwise": "`tensorwise`, eager",
    "tensorwise compiled": "`tensorwise`, compiled",
    "torchao tensorwise compiled": "torchao tensorwise, compiled",
    "bf16 compiled, CUDA graphs": "BF16, compiled, CUDA graphs",
    "adaptive compiled, CUDA graphs": "`adaptive`, compiled, CUDA graphs",
}


@figures
def fp8_depth() -> str:
    found = {
        key.removeprefix("depth "): value
        for key, value in numbers("float8_gpu").items()
        if key.startswith("depth ")
    }
    header = ["8 layers of 4096 x 4096, 4096 tokens, ms a layer"]
    for what in found:
        header += [what, "the host alone"]
    rows: list[list[str]] = []
    for way, name in _DEPTH.items():
        row = [name]
        for each in found.values():
            times, best = each["ms"], least(each["ms"])
            host = f"{each['host_us'][way] / 1e3:.2f}" if way in times else ""
            row += [bold(f"{times[way]:.2f}", way == best) if way in times else "", host]
        rows.append(row)
    return grid(header, rows, origin("float8_gpu", [f"depth {what}" for what in found]))


@figures
def fp8_steps() -> str:
    found = numbers("float8_gpu")
    rows: list[list[str]] = []
    keys = [key for key in found if key.startswith(("micro ", "block "))]
    for key in keys:
        if key.startswith("micro "):
            times = found[key]["ms"]
            name = f"8 micro-batches of {key[6:].replace('x', ' x ')} and a change of W"
            ways = ("bf16 eager", *_RECIPES, "torchao tensorwise compiled")
            rows.append([name, *times_faster(times, ways, "bf16 eager")])
            continue
        kind = key.removeprefix("block ")
        ways = ("bf16", *_RECIPES, "torchao tensorwise")
        for column, what in (("ms", "1 micro-batch"), ("ms_8", "8 micro-batches")):
            times = {way: row[column] for way, row in found[key].items()}
            name = f"Llama-8B block with AdamW, {kind}, {what}"
            rows.append([name, *times_faster(times, ways, "bf16")])
    header = ["ms", "BF16", *(f"`{recipe}`" for recipe in _RECIPES), "torchao tensorwise, compiled"]
    return grid(header, rows, origin("float8_gpu", keys))


@figures
def fp8_block_peak() -> str:
    rows = numbers("float8_gpu")["block compiled"]
    ours, plain, theirs = (
        f"{rows[way]['peak_mib']:.0f}" for way in ("adaptive", "bf16", "torchao tensorwise")
    )
    return f"{plain} MiB in BF16, {ours} in `adaptive`, {theirs} in torchao"


@figures
def fp8_cast() -> str:
    found = numbers("float8_gpu")
    shapes = ("16384x4096", "16384x14336")
    names = {
        "E4M3, counted": "`static`, `adaptive`, with counters",
        "tensorwise, counted": "`tensorwise`, with counters",
        "rowwise, counted": "`rowwise`, with counters",
        "torch.compile, E4M3": "torch.compile of a static cast, no counters",
        "copy": "a copy of the same bytes",
    }
    rows: list[list[str]] = []
    for way, name in names.items():
        cells: list[str] = []
        for shape in shapes:
            ms = found[f"cast {shape}"]["ms"][way]
            row, column = map(int, shape.split("x"))
            cells.append(f"{ms:.3f} ms, {4 * row * column / ms / 1e9:.1f} TB/s")
        rows.append([name, *cells])
    header = ["cast of BF16 to both orientations", *(shape.replace("x", " x ") for shape in shapes)]
    return grid(header, rows, origin("float8_gpu", [f"cast {shape}" for shape in shapes]))


@figures
def fp8_unchanged() -> str:
    """Empty where no run has measured it."""
    end = ", weight unchanged"
    rows: list[list[str]] = []
    for shape, times in _linear().items():
        same = {way.removesuffix(end): ms for way, ms in times.items() if way.endswith(end)}
        if same:
            rows.append([shape, *times_faster(same, _UNCHANGED, "bf16 eager")])
    header = ["a later micro-batch, ms", "BF16", "`static`", "`adaptive`", "torchao tensorwise"]
    return grid([*header, "torchao rowwise"], rows) if rows else ""


@figures
def fp8_evaluation() -> str:
    found = numbers("float8_gpu")
    casts = found["cast 4096x14336"]["ms"]
    product = found["linear 16384x4096x14336"]["ms"]["three bare _scaled_mm"] / 3
    return (
        f"{casts['E4M3, rows alone, counted']:.2f} ms for 4096 x 14336, where the product of 16384 "
        f"tokens takes {product:.1f} ms"
    )


@figures
def fp8_frozen() -> str:
    return f"{numbers('float8_gpu')['cast 4096x14336']['ms']['E4M3, counted']:.2f} ms"


@figures
def fp8_exact_sums() -> str:
    found = numbers("float8_gpu")
    products = [found[f"products {shape}"] for shape in ("16384x4096x4096", "16384x14336x4096")]
    (a, b), (c, d) = ([digits(each[how]) for how in ("short", "exact")] for each in products)
    return f"{a} ms with the short register and {b} without at 16384 x 4096 x 4096, {c} and {d} at"


@figures
def fp8_register() -> str:
    rows: list[list[str]] = []
    found = numbers("float8_gpu")
    keys = [
        f"accumulation {n}, {what}" for what in ("one sign", "both signs") for n in (4096, 65536)
    ]
    for key in keys:
        count, what = key.removeprefix("accumulation ").split(", ")
        cells = (f"{100 * found[key][register]:.2g} %" for register in ("short", "exact"))
        rows.append([f"{count} of {what}", *cells])
    return grid(["addends", "short register", "exact"], rows, origin("float8_gpu", keys))


@figures
def fp8_fsdp() -> str:
    found = numbers("float8_fsdp")
    usual = "static, 1 x 8192"
    rows = {way: [name, *row] for (way, name), row in zip(_FSDP.items(), _fsdp(usual), strict=True)}
    for way, row in rows.items():
        measured = found[usual][way]
        row += [f"{measured['host_ms']:.0f}", f"{measured['peak_gib']:.2f} GiB"]
    header = ["ms", usual, "the host alone", "peak"]
    for what in (key for key in found if key != usual):
        header.append(what)
        for row, cells in zip(rows.values(), _fsdp(what), strict=True):
            row += cells
    return grid(header, rows.values(), origin("float8_fsdp"))


_FSDP = {
    "bf16": "BF16",
    "fp8, gathers 16 bits": "FP8, gathers 16 bits",
    "fp8, gathers bytes": "FP8, gathers bytes",
}


def _fsdp(what: str) -> list[list[str]]:
    times = {way: row["ms"] for way, row in numbers("float8_fsdp")[what].items()}
    return [[cell] for cell in times_faster(times, _FSDP, "bf16")]


_TRAINED = {
    "static": "`static`",
    "static, mean loss": "`static`, mean over 2¹⁸ tokens",
    "adaptive": "`adaptive`",
    "adaptive, mean loss": "`adaptive`, mean over 2¹⁸ tokens",
    "tensorwise": "`tensorwise`",
    "rowwise": "`rowwise`",
    "nudged": "no FP8, initial weights off by 2⁻⁶ of themselves",
}


@figures
def fp8_toy() -> str:
    rows: list[list[str]] = []
    for kind, ways in numbers("float8_training_toy").items():
        base = ways["without FP8"]["loss"]
        first = [kind, f"{base:.4f}"]
        for way in (way for way in _TRAINED if way in ways):
            lost = ways[way].get("flushed", {})
            shares = [
                f"{100 * lost[operand]:.0f} % of {name}"
                for operand, name in (("grad_output", "dY"), ("input", "x"))
                if lost.get(operand, 0) > 0.02
            ]
            zero = f": up to {' and '.join(shares)} became zero" if shares else ""
            loss = ways[way]["loss"]
            above = f"{100 * (loss / base - 1):+.2f} %"
            rows.append([*first, f"{_TRAINED[way]}{zero}", f"{loss:.4f}", above])
            first = ["", ""]
    return grid(["", "without FP8", "", "loss", ""], rows, origin("float8_training_toy"))


@figures
def fp8_training() -> str:
    found = numbers("float8_training")
    losses = {kind: {way: row["loss"] for way, row in ways.items()} for kind, ways in found.items()}
    seeds = [ways for kind, ways in losses.items() if kind.startswith("seed")]
    each = ("without FP8", "nudged", "adaptive")
    losses = {
        **{kind: ways for kind, ways in losses.items() if ways in seeds},
        "mean of the seeds": {way: sum(ways[way] for ways in seeds) / len(seeds) for way in each},
        **{kind: ways for kind, ways in losses.items() if ways not in seeds},
    }
    rows: list[list[str]] = []
    for kind, ways in losses.items():
        base = ways["without FP8"]
        above = {way: f"{100 * (loss / base - 1):+.2f} %" for way, loss in ways.items()}
        fp8 = ", ".join(f"`{way}` {above[way]}" for way in _RECIPES if way in ways)
        rows.append([kind, f"{base:.4f}", above["nudged"], fp8])
    return grid(["", "without FP8", "the same, nudged", "FP8"], rows, origin("float8_training"))


# ------------------------------------------------------------------ unit scaling


@figures
def umup_slopes() -> str:
    found = numbers("umup_slopes")
    header = ["rule", *next(iter(found.values()))]
    rows = [
        [rule, *(bold(f"{slope:+.2f}", abs(slope) > 0.1) for slope in slopes.values())]
        for rule, slopes in found.items()
    ]
    return grid(header, rows, origin("umup_slopes"))


@figures
def umup_transfer() -> str:
    found = numbers("umup_transfer")
    rows: list[list[str]] = []
    before = ["", ""]
    for key, row in found.items():
        task, optimizer, kind = key.split("; ")
        both = [found[f"{task}; {optimizer}; {each}"] for each in ("unit-scaled", "standard")]
        best = row["loss"] == min(each["loss"] for each in both)
        rows.append(
            [
                task if task != before[0] else "",
                optimizer if [task, optimizer] != before else "",
                kind,
                " ".join(map(str, row["best"])),
                str(row["octaves"]),
                f"{bold(format(row['loss'], '.3f'), best)} ({row['own']:.3f})",
            ]
        )
        before = [task, optimizer]
    header = ["task", "optimizer", "", "best log2 rate", "octaves"]
    header.append("loss at 512 with the rate of 64 (with its own)")
    return grid(header, rows, origin("umup_transfer"))


@figures
def umup_flush() -> str:
    rows: list[list[str]] = []
    for kind, ((low, high), five, four, (least_w, most_w)) in numbers("umup_flush").items():
        name = "standard, mean loss" if kind == "standard" else kind
        shares = [
            among(share, lambda s: f"{s:.0f} %" if s == 0 or s > 99 else f"{s:.2g} %")
            for share in (five, four)
        ]
        rows.append([name, f"{low:.2g} to {high:.2g}", *shares, f"{least_w:.2g} to {most_w:.2g}"])
    header = ["", "RMS", "E5M2 to 0", "E4M3 to 0", "RMS of weight gradients"]
    return grid(header, rows, origin("umup_flush"))


@figures
def umup_groups() -> str:
    found = numbers("umup_groups")
    umup, each = (found["fused"][way] / found["fused"]["one"] for way in ("umup", "each"))
    return (
        f"an AdamW step over {found['tensors']} tensors in {found['groups']} groups takes "
        f"{umup:.2f} times that in one group, and with a group for each parameter {each:.2f} times"
    )


@figures
def umup_gpu() -> str:
    rows = [
        [
            kind,
            *map(str, row["best"]),
            f"{row['octaves']} octaves",
            f"{row['loss']:.3f} ({row['own']:.3f})",
        ]
        for kind, row in numbers("umup_gpu")["best"].items()
    ]
    header = ["", "128", "256", "512", "1024", "moves by", ""]
    return grid(header, rows, origin("umup_gpu"))


@figures
def umup_host() -> str:
    host = numbers("umup_gpu")["host_us"]
    return f"{host['ours']} us instead of {host['plain']}"


@figures
def umup_errors() -> str:
    ours, apart = (numbers("umup_gpu")["errors"][who].values() for who in ("ours", "apart"))
    listed = " and ".join(", ".join(f"{error:.1e}" for error in apart).rsplit(", ", 1))
    mine = among(ours, lambda error: f"{error:.2e}")
    return f"{mine}, BF16's own rounding; with multipliers apart they are {listed}"


@figures
def umup_cost() -> str:
    rows = [
        [
            name,
            *(
                f"{busy:.3f} ({idle:.2f})" if busy else f"not taken ({idle:.2f})"
                for busy, idle in pairs
            ),
        ]
        for name, pairs in numbers("umup_gpu")["cost"].items()
    ]
    return grid(["", "8192 x 2048, eager", "compiled", "16384 x 4096, eager", "compiled"], rows)


# ------------------------------------------------------------------ demo and watch


@figures
def demo_presumed() -> str:
    rows = [
        [f"2^{exponent} tokens", f"{round(gap, 4) + 0.0:+.4f}", f"{subnormal:.1%}"]
        for exponent, (gap, subnormal) in numbers("demo_variants")["presumed"].items()
    ]
    return grid(["gradients divided by", "above fp32", "subnormal"], rows)


@figures
def demo_kernels() -> str:
    found = numbers("demo_variants")["kernels"]
    rows = [[run, *(f"{round(gap, 4) + 0.0:+.4f}" for gap in pair)] for run, pair in found.items()]
    return grid(["run", "emulated", "own kernels"], rows)


@figures
def demo_without_logits() -> str:
    gaps = numbers("demo_variants")["without logits"]
    return f"{gaps['18']:.4f} above fp32 at 2^18 tokens and {gaps['20']:.4f} at 2^20"


@figures
def demo_origin() -> str:
    return f"Both small tables, and the losses without logits: {origin('demo_variants')}"


@figures
def watch_cost() -> str:
    def cells(found: dict[str, Any]) -> list[str]:
        ratios = found.get("times") or {
            every: ms / found["ms"]["None"] for every, ms in found["ms"].items() if every != "None"
        }
        size = f"{found['blocks']} blocks of {found['tokens']} x {found['width']}"
        dtype = {"torch.float32": "FP32", "torch.bfloat16": "BF16"}[found["dtype"]]
        return [f"{size}, {dtype}", *(f"{ratios[every]:.2f} times" for every in ("1", "10"))]

    rows = [
        ["a CPU, one thread", *cells(numbers("watch_cost"))],
        ["a GPU", *cells(numbers("watch_cost_gpu"))],
    ]
    below = f"CPU: {origin('watch_cost')} GPU: {origin('watch_cost_gpu')}"
    header = ["a step takes, of one that is not watched", "", "`every=1`", "`every=10`"]
    return grid(header, rows, below)


# ------------------------------------------------------------------ pages


def rendered(page: Path) -> str:
    """The page with what the files give, in lines of their own where it is so now."""
    page_text = page.read_text("utf-8")

    def replaced(match: re.Match[str]) -> str:
        text = FIGURES[match["name"]]()
        if page.parent == HERE:
            text = text.replace("](benchmarks/", "](")
        if match["text"].startswith("\n"):
            before = page_text[page_text.rfind("\n", 0, match.start()) + 1 : match.start()]
            within = f"\n\n{indent(text, before)}\n\n" if text else "\n"
            text = within + before  # of a list's item, say
        return match[1] + text + match[4]

    return MARKS.sub(replaced, page_text)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    changed = [page for page in PAGES if rendered(page) != page.read_text("utf-8")]
    done = "written" if args.write else "not as the files say"
    for page in changed:
        print(f"{page.relative_to(DOCS.parent)}: {done}")
        if args.write:
            page.write_text(rendered(page), "utf-8")
    raise SystemExit(bool(changed) and not args.write)


if __name__ == "__main__":
    main()
