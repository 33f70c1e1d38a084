"""Errors of memory and devices, which say nothing about the code that met them."""

from __future__ import annotations

import errno
import sys
from types import FrameType

import torch

__all__ = ["is_of_the_machine"]

_MACHINE = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "CUDA error",
    "HIP error",
    "CUBLAS_STATUS_",
    "CUDNN_STATUS_",
    "CUSOLVER_STATUS_",
    "NCCL error",
)
"""What torch writes into a plain RuntimeError where the device or the host gave up."""

_FULL = (errno.ENOMEM, errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.EIO)


def is_of_the_machine(error: BaseException) -> bool:
    """Whether an error tells of memory or a device, and so nothing about the rule that was tried.

    What is found in a trial decides for a whole run, and the same rule may pass a moment later.
    Errors that a rule made of such an error count too.

    >>> is_of_the_machine(MemoryError()), is_of_the_machine(KeyError())
    (True, False)
    """
    device_error: type[Exception] = getattr(torch, "AcceleratorError", MemoryError)
    kinds = (MemoryError, torch.OutOfMemoryError, device_error)
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen and not _is_outer(cause):
        seen.add(id(cause))
        told = isinstance(cause, RuntimeError) and any(text in str(cause) for text in _MACHINE)
        full = isinstance(cause, OSError) and cause.errno in _FULL
        if told or full or isinstance(cause, kinds):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def _is_outer(error: BaseException) -> bool:
    """Whether somebody around us is handling this error: it was there before, and is no cause.

    Its traceback then begins in a frame that has not ended yet.
    """
    if error is sys.exc_info()[1] or error.__traceback__ is None:
        return False
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame is not error.__traceback__.tb_frame:
        frame = frame.f_back
    return frame is not None
