"""Sums that the host reads late."""

from __future__ import annotations

import copy
import time

import pytest
import torch
from waiting import no_waiting

from mixprec.window.late_sums import LateSums


def test_numbers_of_the_host_and_of_a_cpu_are_known_at_once() -> None:
    sums = LateSums(3)
    numbers = [1, torch.tensor(2), torch.tensor(True), 0, 0, torch.tensor(0)]
    assert [sums.add(n) for n in numbers] == [None, None, 4, None, None, 0]


def test_a_device_without_values_is_never_read() -> None:
    sums = LateSums(2)
    assert [sums.add(torch.tensor(1, device="meta")) for _ in range(6)] == [None] * 6


def test_a_copy_begins_anew() -> None:
    sums = LateSums(2)
    sums.add(1)
    twin = copy.deepcopy(sums)
    assert [twin.add(5), twin.add(5), sums.add(1)] == [None, 10, 2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_sum_comes_later_and_nothing_waits() -> None:
    sums, one = LateSums(2), torch.ones((), dtype=torch.int64, device="cuda")
    with no_waiting():
        assert [sums.add(one), sums.add(one)] == [None, None]
        time.sleep(0.1)
        assert sums.add(one) == 2
