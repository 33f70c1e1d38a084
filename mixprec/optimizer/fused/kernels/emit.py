"""Triton source for a program: one kernel that steps every element of every tensor of a launch.

For each element the kernel loads the weight's bits, the remainder, the gradient and the states,
runs the rule, and stores what it changed:

    master = join(weight, remainder)          or the FP32 master
    grad   = FP32(grad) * factor              unscale, token count and clip, all one number
    master', states' = rule(master, grad, states, scalars)
    weight, remainder = split(master')        or the FP32 master, and its rounding

so a step moves each byte once. What a launch works on comes from tables on the device:

    table    one row a tensor: elements, row of scalars, then addresses in the order of `columns`
    grads    the gradients' addresses, apart because they change from step to step
    chunks   one row a program of the grid: which tensor, which chunk of it
    scalars  FP32, one row for each set of numbers that the rule came to

Addresses are known to be multiples of 16 bytes, and masks to change at multiples of 32 elements, so
loads and stores are 16 bytes wide; the odd elements at a tensor's end are a small block of their
own. Offsets are 64 bits. All bit work is on integers, and every
product that torch's own kernels add without rounding is an explicit `fma`; nothing else may be
contracted, so a kernel gives the bits of torch's kernels, one after the other.

The source is for reading as well: `explain(source=True)` prints it.
"""

from __future__ import annotations

import builtins
import keyword
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from mixprec.optimizer.fused.kernels.expressions import expression
from mixprec.optimizer.fused.program.operations import BOOLEAN
from mixprec.optimizer.fused.program.program import GRAD, MASTER, NUMEL, Op, Program
from mixprec.optimizer.fused.program.stages import elements_for, kept_numbers, stages
from mixprec.optimizer.masters import Storage
from mixprec.optimizer.state_formats import BLOCK, TOP, scale_key

__all__ = ["Layout", "columns", "source"]


@dataclass(frozen=True)
class Layout:
    """What a launch's tensors are held in; with a program, all that decides a kernel.

    Attributes:
        weight: dtype of the parameters.
        master: where masters are; "none" where the parameter is its own.
        grad: dtype of the gradients.
        states: the states that the program reads or writes, with the dtype each is stored in.
        aligned: whether every address is a multiple of 16 bytes.
        reduced: the states that are one FP32 number of the tensor.
    """

    weight: torch.dtype
    master: Storage
    grad: torch.dtype
    states: tuple[tuple[str, torch.dtype], ...]
    aligned: bool = True
    reduced: tuple[str, ...] = ()

    @cached_property
    def coded(self) -> dict[str, str]:
        """The states that are stored as codes, by the column of their scales."""
        return {scale_key(name): name for name, dtype in self.states if dtype in TOP}


def columns(layout: Layout) -> list[str]:
    """What the addresses in a row of the table are of, in order: a state's name or `scale_key`."""
    names = [WEIGHT, *([MASTER] if layout.master != "none" else [])]
    for name, dtype in layout.states:
        names += [name, scale_key(name)] if dtype in TOP else [name]
    return [*names, *layout.reduced]


WEIGHT = "'weight'"
"""The column of the parameters' addresses; no state has quotes in its name."""

FIRST_COLUMN = 2
"""Columns of the table before the addresses: elements, row of scalars."""


def source(program: Program, layout: Layout) -> str:
    """The kernels' module: `step`, and for each stage `reduce1`, `finish1` before it."""
    names = _Names(program, layout)
    parts = [_HEAD, *_shared(layout)]
    for this in _passes(program):
        parts += _pass(this, layout, names)
    for number, stage in enumerate(stages(program)):
        if stage.reductions or stage.numbers or (number == 0 and program.reduced):
            parts.append(_finish(number, program, layout, names))
    formula = "\n".join(f"# {line}".rstrip() for line in str(program).splitlines())
    return f"{formula}\n\n" + "\n\n\n".join(parts) + "\n"


_TYPES = {
    torch.float32: "tl.float32",
    torch.bfloat16: "tl.bfloat16",
    torch.float16: "tl.float16",
    torch.int8: "tl.int8",
    torch.uint8: "tl.uint8",
}

_HEAD = """\
import triton
import triton.language as tl
from triton.language.extra import libdevice

ALL = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def larger(a, b):
    return tl.maximum(a, b, ALL)


@triton.jit
def smaller(a, b):
    return tl.minimum(a, b, ALL)"""


class _Names:
    """Identifiers for a program's values, whose names may hold anything, and for what is theirs.

    No two things have one identifier, and none has one that the templates here use.
    """

    def __init__(self, program: Program, layout: Layout) -> None:
        self._known: dict[tuple[str, str], str] = {}
        self._taken: set[str] = set()
        self.scalars = [f"s{index}" for index in range(program.num_scalars)]
        self.kept = kept_numbers(program)
        """Numbers of each tensor that kernels hand on to each other, in order."""
        self.numbers = {*self.scalars, *self.kept, NUMEL}
        self.near = any(dtype in TOP for _, dtype in layout.states)
        self.truths = {op.output for op in program.ops if op.name in BOOLEAN}
        for name in (MASTER, GRAD, *(state for state, _ in layout.states), *self.scalars):
            self(name)

    def __call__(self, value: str, role: str = "{}") -> str:
        """The identifier of a value, or of what has this role for it, as in `{}_pointer`."""
        if (value, role) not in self._known:
            prefix = "next_" if value.endswith("'") else ""
            plain = prefix + re.sub(r"[^0-9A-Za-z_]", "_", value.removesuffix("'"))
            found = role.format(plain if re.match("[A-Za-z_]", plain) else f"v{plain}")
            while found in self._taken or found in _RESERVED or _KERNEL.fullmatch(found):
                found += "_"
            self._known[value, role] = found
            self._taken.add(found)
        return self._known[value, role]


_KERNEL = re.compile(r"(reduce[0-9]+|finish[0-9]+|step)(_rule|_block)?")

_RESERVED = {
    *("weight", "row", "table", "chunks", "scalars", "factor", "found_inf", "lane", "mask", "tl"),
    *("start", "stop", "even", "last", "size", "triton", "libdevice", "split", "join", "code"),
    *("grads", "tensor", "first", "values", "scale", "remainder", "multiplier", "decode"),
    *("program", "part", "begin", "go", "numbers", "partial", "spans", "larger", "smaller"),
    *("encode", "follow", "ALL", "BLOCK", "BLOCKS", "PART", "scale_lane", "scale_mask"),
    *("weight_pointer", "grad_pointer"),
    *keyword.kwlist,
    *dir(builtins),
}
"""What the templates call something else."""


# ---------------------------------------- a pass over elements


@dataclass(frozen=True)
class _Pass:
    """One kernel that goes over all elements: a stage's sums, or the step that writes.

    Attributes:
        name: of the kernel.
        ops: on elements.
        results: pairs of what a value is for and the value.
        reductions: how each result becomes one number of the tensor; empty for the step.
    """

    name: str
    ops: Sequence[Op]
    results: Sequence[tuple[str, str]]
    reductions: Sequence[str] = ()

    def reads(self) -> list[str]:
        """What the pass begins with, in order of first use."""
        made = {op.output for op in self.ops}
        used = [name for op in self.ops for name in op.inputs]
        used += [value for _, value in self.results]
        return [name for name in dict.fromkeys(used) if name not in made]


def _passes(program: Program) -> list[_Pass]:
    found: list[_Pass] = []
    for number, stage in enumerate(stages(program)):
        if stage.reductions:
            results = [(op.output, op.inputs[0]) for op in stage.reductions]
            ops = elements_for(program, [value for _, value in results])
            kinds = [op.name for op in stage.reductions]
            found.append(_Pass(f"reduce{number}", ops, results, kinds))
    results = [(n, v) for n, v in program.outputs if n not in program.reduced]
    ops = elements_for(program, [value for _, value in results])
    return [*found, _Pass("step", ops, results)]


def _pass(this: _Pass, layout: Layout, names: _Names) -> list[str]:
    return [_rule(this, names), _block(this, layout, names), _kernel(this, layout, names)]


def _rule(this: _Pass, names: _Names) -> str:
    lines = [f"    {_assignment(op, names)}" for op in this.ops]
    lines.append(f"    return {', '.join(names(value) for _, value in this.results)}")
    given = ", ".join(_given(this, names))
    return "\n".join([f"@triton.jit\ndef {this.name}_rule({given}, BLOCK: tl.constexpr):", *lines])


def _assignment(op: Op, names: _Names) -> str:
    operands = [names(name) for name in op.inputs]
    right = expression(op.name, op.inputs, operands, near=names.near)
    return f"{names(op.output)} = {right}"


def _given(this: _Pass, names: _Names) -> list[str]:
    """Arguments of a pass's rule: what it reads, whatever it is."""
    return [names(name) for name in this.reads()] or [names(GRAD)]


def _block(this: _Pass, layout: Layout, names: _Names) -> str:
    reads = this.reads()
    pointers = [_pointer(column, layout, names) for column in columns(layout)]
    given = ["start", "stop", *pointers, "grad_pointer", "factor", *_numbers(this, names)]
    results = ", ".join(names(name, _NEW) for name, _ in this.results)
    lines = [
        "lane = tl.arange(0, BLOCK)",
        "mask = start + lane < stop",
        *_scale_lanes(layout),
        *(_load_master(layout, names) if MASTER in reads else []),
    ]
    if GRAD in reads or not reads:
        lines += [
            f"{names(GRAD)} = {_loaded('grad_pointer')}.to(tl.float32)",
            "if factor is not None:",
            f"    {names(GRAD)} = {names(GRAD)} * factor",
        ]
    lines += [_load(*item, names) for item in layout.states if item[0] in reads]
    lines += [f"{results} = {this.name}_rule({', '.join(_given(this, names))}, BLOCK)"]
    if this.reductions:
        pairs = zip(this.reductions, this.results, strict=True)
        parts = [_REDUCE[kind].format(names(name, _NEW), "mask") for kind, (name, _) in pairs]
        lines.append(f"return {', '.join(parts)}")
    else:
        lines += [line for name, _ in this.results for line in _store(name, layout, names)]
    head = f"@triton.jit\ndef {this.name}_block({', '.join(given)}, BLOCK: tl.constexpr):"
    return "\n".join([head, *(f"    {line}" for line in lines)])


_REDUCE = {
    "sum": "tl.sum(tl.where({1}, {0}, 0.0), 0)",
    "amax": 'tl.reduce(tl.where({1}, {0}, float("-inf")), 0, larger)',
    "amin": 'tl.reduce(tl.where({1}, {0}, float("inf")), 0, smaller)',
}
_JOIN = {
    "sum": "{0} + {1}",
    "amax": "tl.maximum({0}, {1}, ALL)",
    "amin": "tl.minimum({0}, {1}, ALL)",
}
_NOTHING = {"sum": "0.0", "amax": 'float("-inf")', "amin": 'float("inf")'}


def _numbers(this: _Pass, names: _Names) -> list[str]:
    """What a pass reads that is the same for all elements of a tensor."""
    return [names(name) for name in this.reads() if name in names.numbers]


_NEW, _POINTER, _SCALE_POINTER = "new_{}", "{}_pointer", "{}_scale_pointer"


def _pointer(column: str, layout: Layout, names: _Names) -> str:
    if column == WEIGHT:
        return "weight_pointer"
    if column in layout.coded:
        return names(layout.coded[column], _SCALE_POINTER)
    return names(column, _POINTER)


def _loaded(pointer: str) -> str:
    return f"tl.load({pointer} + start + lane, mask=mask)"


def _stored(pointer: str, value: str) -> str:
    return f"tl.store({pointer} + start + lane, {value}, mask=mask)"


def _scale_lanes(layout: Layout) -> list[str]:
    if not any(dtype in TOP for _, dtype in layout.states):
        return []
    return [
        f"scale_lane = start // {BLOCK} + tl.arange(0, BLOCK // {BLOCK})",
        f"scale_mask = scale_lane * {BLOCK} < stop",
    ]


def _load_master(layout: Layout, names: _Names) -> list[str]:
    master = names(MASTER)
    if layout.master == "none":
        return [f"{master} = {_loaded('weight_pointer')}"]
    if layout.master == "full":
        rounded = f"{master}.to({_TYPES[layout.weight]})"
        ties = layout.weight == torch.bfloat16
        return [
            f"{master} = {_loaded(names(MASTER, _POINTER))}",
            f"{master} = follow({master}, {_loaded('weight_pointer')}, {rounded}, {ties})",
        ]
    stored = _loaded(names(MASTER, _POINTER))
    return [f"{master} = join({_loaded('weight_pointer')}, {stored})"]


def _load(name: str, dtype: torch.dtype, names: _Names) -> str:
    plain = names(name)
    loaded = _loaded(names(name, _POINTER))
    if dtype in TOP:
        scale = f"tl.load({names(name, _SCALE_POINTER)} + scale_lane, mask=scale_mask)"
        return f"{plain} = decode({loaded}, {scale}, {TOP[dtype]}, BLOCK)"
    return f"{plain} = {loaded}" + ("" if dtype == torch.float32 else ".to(tl.float32)")


def _store(name: str, layout: Layout, names: _Names) -> list[str]:
    new, pointer = names(name, _NEW), names(name, _POINTER)
    if name == MASTER:
        return _store_master(new, pointer, layout)
    dtype = dict(layout.states)[name]
    if dtype not in TOP:
        cast = "" if dtype == torch.float32 else f".to({_TYPES[dtype]})"
        return [_stored(pointer, f"{new}{cast}")]
    return [
        f"code, scale = encode({new}, mask, {TOP[dtype]}, BLOCK)",
        _stored(pointer, "code"),
        f"tl.store({names(name, _SCALE_POINTER)} + scale_lane, scale, mask=scale_mask)",
    ]


def _store_master(new: str, pointer: str, layout: Layout) -> list[str]:
    if layout.master == "none":
        return [_stored("weight_pointer", new)]
    if layout.master == "full":
        rounded = f"{new}.to({_TYPES[layout.weight]})"
        return [_stored(pointer, new), _stored("weight_pointer", rounded)]
    return [
        f"weight, remainder = split({new})",
        _stored("weight_pointer", "weight"),
        _stored(pointer, "remainder"),
    ]


# ---------------------------------------- what kernels share

_SPLIT = """\
@triton.jit
def join(weight, remainder):
    high = weight.to(tl.int32) << 16
    master = (high + remainder.to(tl.int32)).to(tl.float32, bitcast=True)
    # The bits of an impossible pair, and of no possible one, form a NaN.
    return tl.where(master != master, high.to(tl.float32, bitcast=True), master)


@triton.jit
def split(master):
    # Nearest, ties away from zero; every NaN becomes 0x7FC0 with remainder 0.
    bits = tl.where(master != master, 0x7FC00000, master.to(tl.int32, bitcast=True))
    high = (bits + 0x8000) >> 16
    return high.to(tl.int16), (bits - (high << 16)).to(tl.int16)"""

_FOLLOW = """\
@triton.jit
def follow(master, weight, rounded, TIES_AWAY: tl.constexpr):
    # A weight that is neither rounding of its master was written by somebody: it wins.
    bits = weight.to(tl.int16, bitcast=True)
    same = rounded.to(tl.int16, bitcast=True) == bits
    if TIES_AWAY:
        away = (master.to(tl.int32, bitcast=True) + 0x8000) >> 16
        same = same | (away.to(tl.int16) == bits)
    return tl.where(same, master, weight.to(tl.float32))"""

_CODECS = f"""\
@triton.jit
def decode(code, scale, TOP: tl.constexpr, BLOCK: tl.constexpr):
    code = tl.reshape(code.to(tl.float32), (BLOCK // {BLOCK}, {BLOCK}))
    value = code * tl.abs(code) * scale.to(tl.float32)[:, None]
    # The quotient, rounded once (Markstein 1990): the last code stands for the scale itself.
    near = value * (1.0 / (TOP * TOP))
    near = tl.fma(tl.fma(-near, 1.0 * TOP * TOP, value), 1.0 / (TOP * TOP), near)
    return tl.reshape(near, (BLOCK,))


@triton.jit
def encode(value, mask, TOP: tl.constexpr, BLOCK: tl.constexpr):
    size = tl.reshape(tl.where(mask, tl.abs(value), 0.0), (BLOCK // {BLOCK}, {BLOCK}))
    scale = tl.max(size, 1).to(tl.bfloat16)
    wide = scale.to(tl.float32)
    unit = tl.where(wide > 0, tl.div_rn(1.0 * TOP * TOP, wide), 0.0)
    code = (tl.sqrt(size * unit[:, None]) + 0.5).to(tl.int32)
    code = tl.reshape(tl.minimum(code, TOP), (BLOCK,))
    if TOP > 127:
        code = tl.where((code == 0) & (value > 0), 1, code).to(tl.uint8)
    else:
        code = tl.where(value < 0, -code, code).to(tl.int8)
    return code, scale"""


def _shared(layout: Layout) -> list[str]:
    dtypes = {dtype for _, dtype in layout.states}
    parts = [{"split": _SPLIT, "full": _FOLLOW}[layout.master]] if layout.master != "none" else []
    return parts + ([_CODECS] if dtypes & TOP.keys() else [])


# ---------------------------------------- kernels


def _kernel(this: _Pass, layout: Layout, names: _Names) -> str:
    align = "tl.multiple_of({}, 16)" if layout.aligned else "{}"
    pointers = {
        _pointer(column, layout, names): (f"row + {place}", _type(column, layout))
        for place, column in enumerate(columns(layout), start=FIRST_COLUMN)
    }
    pointers["grad_pointer"] = ("grads + tensor", _TYPES[layout.grad])
    loads = [
        f"{name} = " + align.format(f"tl.load({place}).to(tl.pointer_type({kind}))")
        for name, (place, kind) in pointers.items()
    ]
    arguments = [*pointers, "multiplier", *_numbers(this, names)]
    call = f"{this.name}_block({{}}, {{}}, {', '.join(arguments)}, {{}})"
    results = [names(name, "{}_part") for name, _ in this.results]
    sums = [names(name, "{}_all") for name, _ in this.results]
    pairs = list(zip(this.reductions, sums, results, strict=True)) if this.reductions else []
    joins = [f"{whole} = {_JOIN[kind].format(whole, part)}" for kind, whole, part in pairs]
    calls = [f"{', '.join(results)} = {call}", *joins] if pairs else [call]
    body = [
        "if found_inf is not None:",
        "    if tl.load(found_inf) != 0:",
        "        return",
        "multiplier = None",
        "if factor is not None:",
        "    multiplier = tl.load(factor)",
        "program = tl.program_id(0).to(tl.int64)",
        "tensor = tl.load(chunks + 2 * program).to(tl.int64)",
        "first = tl.load(chunks + 2 * program + 1).to(tl.int64) * (BLOCK * BLOCKS)",
        f"row = table + {_width(layout)} * tensor",
        "size = tl.load(row)",
        *_load_numbers(this.reads(), names),
        *loads,
        *(f"{whole} = {_NOTHING[kind]}" for kind, whole, _ in pairs),
        f"even = size // {BLOCK} * {BLOCK}",
        "last = tl.minimum(first + BLOCK * BLOCKS, even)",
        "for start in range(first, last, BLOCK):",
        *(f"    {line.format('start', 'even', 'BLOCK')}" for line in calls),
        "if (even < size) & (even >= first) & (even < first + BLOCK * BLOCKS):",
        *(f"    {line.format('even', 'size', BLOCK)}" for line in calls),
        *(
            f"tl.store(partial + {len(pairs)} * program + {place}, {whole})"
            for place, (_, whole, _) in enumerate(pairs)
        ),
    ]
    given = "table, grads, chunks, scalars, numbers, partial, factor, found_inf"
    sizes = "BLOCK: tl.constexpr, BLOCKS: tl.constexpr"
    head = f"@triton.jit\ndef {this.name}({given}, {sizes}):"
    return "\n".join([head, *(f"    {line}" for line in body)])


def _width(layout: Layout) -> int:
    return len(columns(layout)) + FIRST_COLUMN


def _load_numbers(wanted: Sequence[str], names: _Names) -> list[str]:
    """Scalars and numbers of the tensor, where a tensor's row and size are known."""
    lines = [f"values = scalars + {len(names.scalars)} * tl.load(row + 1)"]
    for place, name in enumerate(names.scalars):
        if name in wanted:
            lines.append(f"{names(name)} = tl.load(values + {place})")
    for place, name in enumerate(names.kept):
        if name in wanted:
            line = f"{names(name)} = tl.load(numbers + {len(names.kept)} * tensor + {place})"
            lines.append(f"{line} != 0" if name in names.truths else line)
    if NUMEL in wanted:
        lines.append(f"{names(NUMEL)} = size.to(tl.float32)")
    return lines


def _finish(number: int, program: Program, layout: Layout, names: _Names) -> str:
    """The kernel after a stage's pass: adds up its parts and computes numbers of each tensor."""
    stage, last = stages(program)[number], number == len(stages(program)) - 1
    made = [op.output for op in (*stage.reductions, *stage.numbers)]
    old = [name for name in program.reduced if name in program.reads] if number == 0 else []
    ends = {value: name for name, value in program.outputs if name in program.reduced}
    wanted = {name for op in stage.numbers for name in op.inputs} | (ends.keys() if last else set())
    body = [
        "tensor = tl.program_id(0).to(tl.int64)",
        f"row = table + {_width(layout)} * tensor",
        "size = tl.load(row)",
        *_load_numbers([n for n in wanted if n not in (*made, *old)], names),
        *(f"{names(name)} = tl.load({_reduced(name, layout)})" for name in old),
    ]
    if stage.reductions:
        body += [
            "begin = tl.load(spans + 2 * tensor)",
            "stop = tl.load(spans + 2 * tensor + 1)",
            "lane = tl.arange(0, PART)",
        ]
    for place, op in enumerate(stage.reductions):
        nothing, name = _NOTHING[op.name], names(op.output)
        at = f"partial + {len(stage.reductions)} * (part + lane) + {place}"
        loaded = f"tl.load({at}, mask=part + lane < stop, other={nothing})"
        whole = _REDUCE[op.name].format(name, "lane >= 0")
        body += [
            f"{name} = tl.full([PART], {nothing}, tl.float32)",
            "for part in range(begin, stop, PART):",
            f"    {name} = {_JOIN[op.name].format(name, loaded)}",
            f"{name} = {whole}",
        ]
    body += [_assignment(op, names) for op in stage.numbers]
    width = len(names.kept)
    body += [
        f"tl.store(numbers + {width} * tensor + {names.kept.index(name)}, "
        f"{names(name)}{'.to(tl.float32)' if name in names.truths else ''})"
        for name in (*old, *made)
    ]
    if last and ends:
        body += ["go = size >= 0", "if found_inf is not None:", "    go = tl.load(found_inf) == 0"]
        body += [
            f"tl.store({_reduced(name, layout)}, {names(value)}, mask=go)"
            for value, name in ends.items()
        ]
    given = "table, spans, scalars, numbers, partial, found_inf, PART: tl.constexpr"
    head = f"@triton.jit\ndef finish{number}({given}):"
    return "\n".join([head, *(f"    {line}" for line in body)])


def _reduced(name: str, layout: Layout) -> str:
    place = columns(layout).index(name) + FIRST_COLUMN
    return f"tl.load(row + {place}).to(tl.pointer_type(tl.float32))"


def _type(column: str, layout: Layout) -> str:
    if column in layout.coded:
        return _TYPES[torch.bfloat16]
    if column == WEIGHT:
        return "tl.int16" if layout.master == "split" else _TYPES[layout.weight]
    if column == MASTER:
        return "tl.int16" if layout.master == "split" else "tl.float32"
    return _TYPES[dict(layout.states).get(column, torch.float32)]
