"""Token counts: of one micro-batch, of a window, and of a window over all ranks.

A count is an int where the host can read it for free, else a 0-d int64 tensor that nobody waits
for. Over ranks, counts and losses are added up by one reduction, in FP64, which holds every integer
below 2^53.

A count that was declared before the window has to be the count of all ranks, and the same on each:
every micro-batch was divided by it. So the reduction also adds up `d` and `d * d` of the declared
counts (-1 where there is none): over R ranks their sums are `R * d` and `R * d * d` of one's own d
only if all are equal, because then their variance is 0. So every rank finds out, or none.
"""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any, cast

import torch
from torch import Tensor

__all__ = ["Count", "add_up", "check_declared", "count_of", "sum_over_ranks"]

Count = int | Tensor

_COARSE = (torch.bfloat16, torch.float16)

_LARGEST = 2**53
_SQUARES = 2**40
"""Squares are kept modulo this, so that 2^13 ranks' add up exactly."""


def count_of(num_tokens: Any) -> Count:
    """The count as an int where the host can read it for free, else as 0-d int64.

    Whole numbers in floating point are counts too: trainers divide theirs.
    """
    if not isinstance(num_tokens, Tensor):
        return _host_count(num_tokens)
    if num_tokens.numel() != 1 or num_tokens.dtype in (torch.bool, *_COARSE):
        raise TypeError(
            f"num_tokens is {num_tokens.dtype} of shape {list(num_tokens.shape)}; it must be one "
            f"integer, such as (targets != ignore_index).sum()"
            + (", and 16 bits round counts above 256" if num_tokens.dtype in _COARSE else "")
        )
    if num_tokens.device.type == "cpu":
        return _host_count(num_tokens.item())
    given = num_tokens.detach().reshape(())
    count = given.to(torch.int64)
    whole = count >= 0
    if given.dtype.is_floating_point:
        whole = whole & (count == given)
    torch._assert_async(whole, "num_tokens is negative or no whole number")  # by the device, later
    return count


def _host_count(num_tokens: Any) -> int:
    if isinstance(num_tokens, bool) or not isinstance(num_tokens, Real):
        raise TypeError(
            f"num_tokens is {num_tokens!r}; it must be the integer count of targets in loss_sum, "
            f"such as (targets != ignore_index).sum()"
        )
    whole = isinstance(num_tokens, Integral) or float(num_tokens).is_integer()
    if not whole:
        raise ValueError(
            f"num_tokens is {num_tokens!r}, which is no whole number of tokens. Give the count of "
            f"targets as the loss counts them; if yours was divided (by ranks, by micro-batches), "
            f"give it undivided."
        )
    count = int(cast(Any, num_tokens))
    if count < 0:
        raise ValueError(f"num_tokens is {count}; a micro-batch has 0 tokens or more")
    if count >= _LARGEST:
        raise ValueError(f"num_tokens is {count}; counts from 2^53 on are not exact in FP64")
    return count


def add_up(counts: list[Count], device: torch.device) -> Tensor:
    """Their sum, 0-d int64 on `device`."""
    on_host = sum(count for count in counts if isinstance(count, int))
    on_device = [count.to(device) for count in counts if isinstance(count, Tensor)]
    if on_device:
        return torch.stack(on_device).sum() + on_host
    return torch.full((), on_host, dtype=torch.int64, device=device)


def check_declared(tokens: Tensor, declared: Count | None) -> None:
    """Raise ValueError if the window holds other than the declared tokens.

    On a device other than the CPU it is the device that raises, later.
    """
    if declared is None:
        return
    if tokens.device.type == "cpu":
        if int(tokens) != int(declared):
            raise ValueError(
                f"start() was given {int(declared)} tokens, but the window's micro-batches hold "
                f"{int(tokens)}, over all ranks if there are several; all were divided by the "
                f"former. The step was not taken."
            )
        return
    torch._assert_async(
        tokens == (declared if isinstance(declared, int) else declared.to(tokens.device)),
        "start() was given another number of tokens than the window's micro-batches hold, over all "
        "ranks if there are several; all were divided by it",
    )


def sum_over_ranks(
    tokens: Tensor, total: Tensor, declared: Count | None, group: Any
) -> tuple[Tensor, Tensor]:
    """Tokens and loss, added up over the ranks. `declared` must be the same on each.

    Raises:
        ValueError: if it is not; on a device other than the CPU by the device, later.
    """
    mine = -1 if declared is None else declared
    own = torch.full_like(tokens, mine) if isinstance(mine, int) else mine.to(tokens.device)
    declarations = torch.stack((own, own * own % _SQUARES)).to(total.dtype)
    here = torch.stack((tokens.to(total.dtype), total))
    everything = torch.cat((here, declarations))
    torch.distributed.all_reduce(everything, group=group)
    ranks = torch.distributed.get_world_size(group)
    agreed = (everything[2:] == ranks * declarations).all()
    if agreed.device.type != "cpu":
        torch._assert_async(agreed, "ranks gave start() different token counts")
    elif not bool(agreed):
        given = "was not called" if declared is None else f"was given {int(declared)} tokens"
        raise ValueError(
            f"start() {given} on this rank, and something else on another: each divided its "
            f"micro-batches by its own count, and the sum over ranks is the gradient of no mean. "
            f"Add up the counts of all {ranks} ranks and give start() that number on each, or "
            f"leave start() out on all. The step was not taken."
        )
    return everything[0].to(torch.int64), everything[1]
