"""Running a program over many tensors: one kernel launch, or its twin in plain torch.

Both take the same tensors and leave the same values in them. The twin runs everywhere and is what
tests compare the kernel with; it works through a tensor in parts that fit a cache.

A tensor is seen as the flat run of its memory, so all tensors of one parameter (weight, master,
gradient, states) must have the same strides and no gaps; see `is_dense`.
"""

from __future__ import annotations

import linecache
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mixprec import formats
from mixprec.devices import is_capturing, on_device
from mixprec.optimizer.fused.kernels.emit import WEIGHT, Layout, columns, source
from mixprec.optimizer.fused.program.program import MASTER, Program
from mixprec.optimizer.fused.program.stages import kept_numbers, stages
from mixprec.optimizer.masters import agree
from mixprec.optimizer.state_formats import BLOCK, decode, encode, num_blocks, scale_key

__all__ = [
    "Addresses",
    "Begun",
    "KernelLaunch",
    "Launch",
    "TwinLaunch",
    "chunk_table",
    "flat",
    "is_dense",
    "module_of",
    "upload",
]

Tensors = Mapping[str, Tensor]
"""What is stored for one parameter, by column of `emit.columns`."""


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one run of memory, in whatever order.

    >>> import torch
    >>> is_dense(torch.zeros(2, 3).T), is_dense(torch.zeros(4)[::2])
    (True, False)
    """
    size = 1
    for stride, length in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if length > 1 and stride != size:
            return False
        size *= length
    return True


def flat(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor in order of memory, as a view."""
    return tensor.as_strided((tensor.numel(),), (1,))


@dataclass
class Begun:
    """Whether a launch may have written to tensors."""

    begun: bool = False


class Launch:
    """One program over the tensors of one layout on one device.

    Args:
        program: the rule.
        layout: what all of the tensors are held in.
        tensors: one mapping a parameter, with every column of the layout.
        rows: for each parameter, its row in the scalars.
    """

    def __init__(
        self, program: Program, layout: Layout, tensors: Sequence[Tensors], rows: Sequence[int]
    ) -> None:
        self.program, self.layout = program, layout
        self.tensors, self.rows = list(tensors), list(rows)

    def run(
        self,
        grads: Sequence[Tensor],
        scalars: Tensor,
        factor: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """Step every tensor.

        Args:
            grads: one a parameter, of the layout's dtype, with the parameter's strides.
            scalars: `[rows, num_scalars]`, FP32, on the device.
            factor: 0-d FP32 on the device; multiplies gradients in FP32. None for 1.
            found_inf: 0-d FP32 on the device; nonzero leaves everything as it is. None for 0.
        """
        self.ready(grads, scalars, factor, found_inf)(Begun())

    def ready(
        self,
        grads: Sequence[Tensor],
        scalars: Tensor,
        factor: Tensor | None,
        found_inf: Tensor | None,
    ) -> Callable[[Begun], None]:
        """Do all that may fail; the rest, which `run` does at once, is to be called.

        It says `begun` before anything is written.
        """
        raise NotImplementedError


# ---------------------------------------- the twin


class TwinLaunch(Launch):
    """The program in plain torch."""

    PART = 2**17
    """Elements at once: 512 KiB in FP32, as long as no operation reduces over the tensor."""

    def ready(
        self,
        grads: Sequence[Tensor],
        scalars: Tensor,
        factor: Tensor | None,
        found_inf: Tensor | None,
    ) -> Callable[[Begun], None]:
        def go(begun: Begun) -> None:
            if found_inf is not None and bool(found_inf != 0):
                return
            for tensors, row, grad in zip(self.tensors, self.rows, grads, strict=True):
                self._step(tensors, grad, scalars[row], factor, begun)

        return go

    def _step(
        self,
        tensors: Tensors,
        grad: Tensor,
        scalars: Tensor,
        factor: Tensor | None,
        begun: Begun,
    ) -> None:
        reduced, coded = self.layout.reduced, self.layout.coded
        runs = {name: flat(tensor) for name, tensor in tensors.items()}
        flat_grad = flat(grad)
        numel = flat_grad.numel()
        size = max(numel, 1) if stages(self.program) else self.PART
        for start in range(0, max(numel, 1 if reduced else 0), size):
            stop = min(start + size, numel)
            spans = {
                k: slice(start // BLOCK, num_blocks(stop)) if k in coded else slice(start, stop)
                for k in runs
            }
            part = {k: r if k in reduced else r[spans[k]] for k, r in runs.items()}
            self._step_part(part, flat_grad[start:stop], scalars, factor, begun)

    def _step_part(
        self,
        part: Tensors,
        grad: Tensor,
        scalars: Tensor,
        factor: Tensor | None,
        begun: Begun,
    ) -> None:
        grad = grad.float()
        if factor is not None:
            grad = grad * factor
        states = {
            name: decode(part[name], part.get(scale_key(name)))
            for name, _ in self.layout.states
            if name in self.program.reads
        }
        states.update((k, part[k]) for k in self.layout.reduced if k in self.program.reads)
        master, made = self.program.run(self._master(part), grad, states, scalars)
        made = {k: v.clone() if len(made) > 1 else v for k, v in made.items()}  # may alias a state
        shaped = {name: value.reshape(part[name].shape) for name, value in made.items()}
        encoded = {name: encode(value, part[name].dtype) for name, value in shaped.items()}
        begun.begun = True
        for name, (codes, scales) in encoded.items():
            part[name].copy_(codes)
            if scales is not None:
                part[scale_key(name)].copy_(scales)
        if MASTER in self.program.writes:
            self._write(part, master)

    def _master(self, part: Tensors) -> Tensor:
        if self.layout.master == "split":
            return formats.join(part[WEIGHT], part[MASTER])
        if self.layout.master == "none":
            return part[WEIGHT]
        return agree(part[WEIGHT], part[MASTER])  # the weight may have been written since

    def _write(self, part: Tensors, master: Tensor) -> None:
        if self.layout.master == "split":
            formats.split(master, out=(part[WEIGHT], part[MASTER]))
            return
        if self.layout.master == "full":
            part[MASTER].copy_(master)
        part[WEIGHT].copy_(master)


# ---------------------------------------- the kernel


@dataclass(frozen=True)
class Tiling:
    """How a kernel's work is cut.

    Attributes:
        block: elements that a program of the grid has in registers at once.
        blocks: blocks that it works through.
        warps: of 32 threads each.
    """

    block: int = 1024
    blocks: int = 4
    warps: int = 4


class KernelLaunch(Launch):
    """The program as one Triton kernel. Its tables stay on the device from step to step."""

    tiling = Tiling()

    def __init__(
        self, program: Program, layout: Layout, tensors: Sequence[Tensors], rows: Sequence[int]
    ) -> None:
        super().__init__(program, layout, tensors, rows)
        self.device = self.tensors[0][WEIGHT].device
        self._kernels = kernels(program, layout)
        self._compiled: set[tuple[bool, bool]] = set()
        self._stages = stages(program)
        names = columns(layout)
        numels = [item[WEIGHT].numel() for item in self.tensors]
        table = [
            [numel, row, *(item[name].data_ptr() for name in names)]
            for item, row, numel in zip(self.tensors, self.rows, numels, strict=True)
        ]
        self._table = upload(table, torch.int64, self.device)
        chunks = chunk_table(numels, self.tiling.block * self.tiling.blocks)
        self._chunks = upload(chunks, torch.int32, self.device)
        self._addresses = Addresses(self.device)
        self._spans = self._numbers = self._partial = None
        if self._stages:
            self._make_room(chunks)

    def _make_room(self, chunks: Tensor) -> None:
        """Room for sums over each chunk and numbers of each tensor."""
        counts = torch.bincount(chunks[:, 0].long(), minlength=len(self.tensors))
        ends = counts.cumsum(0)
        self._spans = upload(torch.stack([ends - counts, ends], 1), torch.int64, self.device)
        width = max(len(stage.reductions) for stage in self._stages)
        kept = len(kept_numbers(self.program))
        options: Any = {"dtype": torch.float32, "device": self.device}
        self._partial = torch.empty(max(len(chunks) * width, 1), **options)
        self._numbers = torch.empty(len(self.tensors) * kept, **options)

    def ready(
        self,
        grads: Sequence[Tensor],
        scalars: Tensor,
        factor: Tensor | None,
        found_inf: Tensor | None,
    ) -> Callable[[Begun], None]:
        grads, addresses = self._addresses.of(grads)
        tables = (self._table, addresses, self._chunks, scalars, self._numbers, self._partial)

        def go(begun: Begun | None, alive: Sequence[Tensor] = grads) -> None:
            with on_device(self.device):
                for number, stage in enumerate(self._stages):
                    if stage.reductions:
                        self._pass(begun, f"reduce{number}", *tables, factor, found_inf)
                    if f"finish{number}" in self._kernels:
                        self._finish(begun, number, scalars, found_inf)
                self._pass(begun, "step", *tables, factor, found_inf)

        given = factor is None, found_inf is None
        if given not in self._compiled:
            go(None)
            self._compiled.add(given)
        return go

    def _pass(self, begun: Begun | None, name: str, *arguments: Tensor | None) -> None:
        """Go over all elements."""
        if len(self._chunks):
            options = {
                "BLOCK": self.tiling.block,
                "BLOCKS": self.tiling.blocks,
                "num_warps": self.tiling.warps,
                "enable_fp_fusion": False,
            }
            _start(begun, self._kernels[name], len(self._chunks), arguments, options)

    def _finish(
        self, begun: Begun | None, number: int, scalars: Tensor, found_inf: Tensor | None
    ) -> None:
        """Add up a pass's sums, tensor by tensor."""
        tables = (self._table, self._spans, scalars, self._numbers, self._partial, found_inf)
        options = {"PART": 1024, "num_warps": 4, "enable_fp_fusion": False}
        kernel = self._kernels[f"finish{number}"]
        _start(begun, kernel, len(self.tensors), tables, options)


def _start(
    begun: Begun | None,
    kernel: Any,
    programs: int,
    arguments: Sequence[Tensor | None],
    options: dict[str, Any],
) -> None:
    """Launch a kernel on a grid of so many programs; without `begun`, compile it only.

    To compile takes a second, in which somebody may interrupt it or memory may run out.
    """
    if begun is None:
        if hasattr(kernel, "warmup"):
            kernel.warmup(*arguments, grid=(programs,), **options)
        return
    begun.begun = True
    kernel[(programs,)](*arguments, **options)


def chunk_table(numels: Sequence[int], size: int) -> Tensor:
    """`[chunks, 2]` int32: which tensor and which chunk of it, for chunks of `size` elements.

    >>> chunk_table([5, 0, 2], 4).tolist()
    [[0, 0], [0, 1], [2, 0]]
    """
    counts = (torch.tensor(numels, dtype=torch.int64) + (size - 1)) // size
    tensor = torch.repeat_interleave(torch.arange(len(counts)), counts)
    begin = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    return torch.stack([tensor, torch.arange(len(tensor)) - begin], 1).to(torch.int32)


class Addresses:
    """Where tensors lie, on the device; uploaded again only when it has changed.

    A tensor that does not begin at a multiple of 16 bytes is copied to one that does. What a CUDA
    graph copies, it copies again at every replay, so what is uploaded during a capture comes from
    memory that was set aside before and is never written again.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._values: list[int] = []
        self._uploaded: Tensor | None = None
        self._spare: Tensor | None = None
        self._captured: list[Tensor] = []

    def of(self, tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Tensor]:
        """The tensors, to be kept alive until the launch, and `[tensors]` int64 addresses."""
        values = list(map(Tensor.data_ptr, tensors))
        if self._uploaded is None or values != self._values:
            on_host = torch.tensor(values, dtype=torch.int64)
            if bool((on_host & 15).any()):
                tensors = [t if t.data_ptr() % 16 == 0 else t.clone() for t in tensors]
                values = list(map(Tensor.data_ptr, tensors))
                on_host = torch.tensor(values, dtype=torch.int64)
            self._values, self._uploaded = values, self._upload(on_host)
        return tensors, self._uploaded

    def _upload(self, values: Tensor) -> Tensor:
        if not is_capturing(self._device):
            if self._spare is None and self._device.type == "cuda":
                self._spare = torch.empty(len(values), dtype=torch.int64, pin_memory=True)
            return upload(values, torch.int64, self._device)
        assert self._spare is not None, "a step before the capture sets it aside"
        source, self._spare = self._spare.copy_(values), None
        uploaded = torch.empty(len(values), dtype=torch.int64, device=self._device)
        self._captured += [source, uploaded]
        return uploaded.copy_(source, non_blocking=True)


def upload(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers of the host on the device, without waiting for it."""
    on_host = torch.as_tensor(values, dtype=dtype)
    if device.type == "cuda":
        on_host = on_host.pin_memory()
    return on_host.to(device, non_blocking=True)


@cache
def kernels(program: Program, layout: Layout) -> dict[str, Any]:
    """What `emit.source` defines; Triton keeps its binaries on disk."""
    return module_of(source(program, layout))


def module_of(text: str) -> dict[str, Any]:
    """The names that a generated module defines. Triton reads a function's source through
    `linecache`, which is told of it here."""
    name = f"<mixprec kernel {hash(text) & 0xFFFFFFFFFFFF:x}>"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    module: dict[str, Any] = {"__name__": "mixprec.optimizer.fused.generated"}
    exec(compile(text, name, "exec"), module)
    return module
