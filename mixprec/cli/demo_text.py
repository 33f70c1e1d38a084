"""The text that `mixprec demo` reads: help topics that every CPython carries, half of it padding.

Nothing is downloaded or shipped. Topics are cut into sentences, and sentences are padded to one
length, as batches of unequal documents are; a loss that is averaged carelessly goes wrong on them.
"""

from __future__ import annotations

import importlib
import inspect
import math
import random
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["PADDING", "VOCAB", "Corpus", "Text", "encode", "model_input", "read_text"]

START = 256  # stands before the first byte and, as the model's input, in every padded place
VOCAB = 257
PADDING = -100  # the target that torch's cross entropy skips

# Read only where a build left `pydoc_data` out: long docstrings, and no effect on import.
_FALLBACK_MODULES = (
    *("argparse", "collections", "decimal", "difflib", "doctest", "email.message", "json"),
    *("inspect", "logging", "os", "statistics", "subprocess", "tarfile", "threading"),
)
_BLANK_LINE = re.compile(r"\n\s*\n")
_SENTENCE_END = re.compile(r"(?<=[.:;!?])\s+(?=[A-Z*\"`>])")


class Text(NamedTuple):
    """Where sentences come from, and the sentences: UTF-8, none twice."""

    source: str
    sentences: list[bytes]


def read_text() -> Text:
    """The interpreter's own help topics or, where a build left them out, its docstrings.

    Raises:
        RuntimeError: if there are neither, as in an embedded interpreter run with `-OO`.
    """
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
        text = Text("pydoc_data.topics", _sentences(topics.values()))
    except ImportError:
        text = Text("docstrings of the standard library", _sentences(_docstrings()))
    if len(text.sentences) < 500:
        raise RuntimeError(
            f"found {len(text.sentences)} sentences in {text.source}, too few to train on: this "
            f"interpreter has no pydoc_data, or -OO removed its docstrings. Use a full CPython "
            f"without -OO."
        )
    return text


def _sentences(texts: Iterable[str]) -> list[bytes]:
    found = (
        sentence.strip()
        for text in texts
        for paragraph in _BLANK_LINE.split(text)
        for sentence in _SENTENCE_END.split(paragraph.strip())
    )
    return [sentence.encode() for sentence in dict.fromkeys(found) if len(sentence) > 8]


def _docstrings() -> Iterable[str]:
    for module in map(importlib.import_module, _FALLBACK_MODULES):
        for item in [module, *vars(module).values()]:
            methods = list(vars(item).values()) if inspect.isclass(item) else []
            for owner in [item, *methods]:
                if inspect.ismodule(owner) or inspect.isclass(owner) or inspect.isroutine(owner):
                    yield inspect.getdoc(owner) or ""


class Corpus:
    """Targets of all sentences, shuffled by `seed`; the first `held_out` are never trained on.

    Args:
        sentences: one row each.
        context: length of a row; longer sentences are cut, shorter ones padded.
        held_out: how many to keep apart.
        seed: what a step reads depends on it and on the step's number alone.
        device: of the targets.

    Attributes:
        held_out: targets `[held_out, context]`, int64.
        training: all others.
    """

    def __init__(
        self,
        sentences: Sequence[bytes],
        *,
        context: int,
        held_out: int,
        seed: int,
        device: torch.device | None = None,
    ) -> None:
        shuffled = random.Random(seed).sample(sentences, len(sentences))
        targets = encode(shuffled, context).to(device)
        self.held_out, self.training = targets.tensor_split([held_out])
        self._seed = seed

    def micro_batches(self, step: int, shape: tuple[int, int]) -> Tensor:
        """Targets of one step, `[micro-batches, sentences, context]`; no sentence twice."""
        choice = random.Random(f"{self._seed} {step}")
        rows = choice.sample(range(len(self.training)), math.prod(shape))
        return self.training[rows].unflatten(0, shape)

    def padding(self, steps: int, shape: tuple[int, int]) -> float:
        """Share of places in the batches of the first `steps` steps that hold no byte."""
        batches = torch.stack([self.micro_batches(step + 1, shape) for step in range(steps)])
        return (batches == PADDING).double().mean().item()


def encode(sentences: Sequence[bytes], context: int) -> Tensor:
    """Targets `[sentences, context]`, int64: the bytes of each, cut or padded with -100.

    >>> encode([b"ab", b"cdef"], 3)
    tensor([[  97,   98, -100],
            [  99,  100,  101]])
    """
    targets = torch.full((len(sentences), context), PADDING)
    for row, sentence in zip(targets, sentences, strict=True):
        kept = sentence[:context]
        row[: len(kept)] = torch.tensor(list(kept))
    return targets


def model_input(targets: Tensor) -> Tensor:
    """What the model reads to predict `targets`: the same bytes one place later, 256 before them.

    >>> import torch
    >>> model_input(torch.tensor([[97, 98, -100, -100]]))
    tensor([[256,  97,  98, 256]])
    """
    shifted = F.pad(targets[:, :-1], (1, 0), value=START)
    return shifted.masked_fill(shifted == PADDING, START)
