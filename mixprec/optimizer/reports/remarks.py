"""What a step says once: that it trains nothing, and why that may be.

None of these is an error by itself. A rank may hold nothing, a margin may be reached, a file may be
all padding. But each is what a mistake looks like, and none shows in a loss that merely stands
still. So each is said at the first step that it is true of, or at the fiftieth in a row.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

__all__ = ["EMPTY_IN_A_ROW", "no_gradient", "no_tokens", "only_zeros"]

EMPTY_IN_A_ROW = 50
"""Windows of padding alone, one after the other, after which a run is told of them."""


def no_gradient(params: Iterable[Tensor]) -> str:
    """For a step that finds no gradient on any of its parameters, of which there are some."""
    params = list(params)
    frozen = sum(not param.requires_grad for param in params)
    begin = (
        f"none of the optimizer's {len(params)} parameters has a gradient, so this step changed "
        f"nothing. "
    )
    if frozen == len(params):
        return begin + "All of them are frozen (requires_grad=False): give it those that train."
    return begin + (
        "Either backward() was not called since gradients were cleared, or the loss does not "
        "reach them: fully_shard(model), load_state_dict(assign=True), adapters that are added "
        "and to_empty() give a model new parameters, and the optimizer goes on holding the old "
        "ones. Make it after these: call fully_shard(model) first, then "
        "torch.optim.AdamW(model.parameters()), then wrap that."
    )


def only_zeros(*, scaled: bool) -> str:
    """For a step that went through with gradients of exactly 0."""
    begin = "every gradient of this step is exactly 0, so nothing was learned from it. "
    clipped = (
        "Most likely somebody clipped gradients that still carry the loss scale: torch's norm of "
        "them is inf, and a gradient over inf is 0. Pass max_grad_norm= to MixedPrecision, which "
        "clips after unscaling, and take the other clipping out. "
        if scaled
        else "If somebody clips gradients before step(), their norm was inf, and a gradient over "
        "inf is 0: pass max_grad_norm= to MixedPrecision instead. "
    )
    return (
        begin
        + clipped
        + (
            "Else they were too small for 16 bits, which a loss scale helps, or the loss does not "
            "depend on the parameters."
            if not scaled
            else "Else they were too small even so, or the loss does not depend on the parameters."
        )
    )


def no_tokens(windows: int) -> str:
    """For a row of windows in which nothing was counted."""
    return (
        f"{windows} windows in a row held no tokens (grad_factor was 0), so nothing has changed "
        f"since. Look at the targets: are all of them ignore_index? metrics()['empty_steps'] "
        f"counts such windows."
    )
