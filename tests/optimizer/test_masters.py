"""Where masters live: reading, writing and agreeing with weights, bit by bit."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mixprec import formats
from mixprec.optimizer.masters import (
    MasterStore,
    Scratch,
    agree,
    begin,
    is_rounding,
    nested,
    read,
    write,
)


def patterns() -> Tensor:
    """FP32 values of every exponent, both signs, ties and their neighbours, zeros, infinities."""
    high = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    values = (high[:, None] + low).flatten().view(torch.float32)
    return values[~values.isnan()]


def test_split_master_is_restored_to_the_bit_for_every_exponent() -> None:
    master = patterns()
    weight = torch.zeros_like(master, dtype=torch.bfloat16)
    stored = begin(weight, "split")
    write(weight, stored, master)
    assert torch.equal(read(weight, stored).view(torch.int32), master.view(torch.int32))
    assert torch.equal(weight.view(torch.int16), formats.split(master)[0].view(torch.int16))


def test_full_master_rounds_to_nearest_even() -> None:
    master = patterns()
    for dtype in (torch.bfloat16, torch.float16):
        weight = torch.zeros_like(master, dtype=dtype)
        stored = begin(weight, "full")
        write(weight, stored, master)
        assert torch.equal(stored, master)
        assert torch.equal(weight.view(torch.int16), master.to(dtype).view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_agree_keeps_every_master_whose_rounding_the_weight_is(dtype: torch.dtype) -> None:
    master = patterns()
    kept = agree(master.to(dtype), master)
    assert torch.equal(kept.view(torch.int32), master.view(torch.int32))
    if dtype == torch.bfloat16:
        kept = agree(formats.split(master)[0], master)
        assert torch.equal(kept.view(torch.int32), master.view(torch.int32))


def test_agree_takes_the_weight_where_it_is_another_number_or_sign() -> None:
    weight = torch.tensor([1.0, 2.0, -0.0, 0.0, float("inf")], dtype=torch.bfloat16)
    master = torch.tensor([1.001, 2.1, 0.0, 1e-45, 3.0])
    expected = torch.tensor([1.001, 2.0, -0.0, 1e-45, float("inf")])
    assert torch.equal(agree(weight, master).view(torch.int32), expected.view(torch.int32))


def test_scratch_gives_each_tensor_aligned_room_of_its_own_and_its_strides() -> None:
    scratch = Scratch()
    device = torch.device("cpu")
    tensors = [torch.zeros(3, 5), torch.zeros(7, 2).t(), torch.zeros(()), torch.zeros(0, 4)]
    tensors.append(torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last))
    scratch.reserve(device, "grad", sum(Scratch.padded(t.numel()) for t in tensors))
    rooms = [scratch.take(t, "grad") for t in tensors]
    for number, room in enumerate(rooms):
        room.fill_(number + 1)
    for number, (room, like) in enumerate(zip(rooms, tensors, strict=True)):
        assert room.shape == like.shape and room.stride() == like.stride()
        assert (room == number + 1).all()
        assert room.data_ptr() % 64 == rooms[0].data_ptr() % 64 or not room.numel()


def test_scratch_is_reused_by_the_next_bucket() -> None:
    scratch, device = Scratch(), torch.device("cpu")
    places: set[int] = set()
    for numel in (64, 32, 64):
        scratch.reserve(device, "master", numel)
        places.add(scratch.take(torch.zeros(numel), "master").data_ptr())
    assert len(places) == 1


def test_scratch_never_grows_beside_its_old_room() -> None:
    device = torch.device("cpu")
    scratch = Scratch({device: 4096})
    places: set[int] = set()
    for numel in (64, 4096, 32):
        scratch.reserve(device, "grad", numel)
        places.add(scratch.take(torch.zeros(numel), "grad").data_ptr())
    assert len(places) == 1


def test_store_chooses_by_dtype_rule_and_wish() -> None:
    bf16, fp16 = torch.zeros(1, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.float16)
    fp32 = torch.zeros(1)
    auto, full = MasterStore("auto"), MasterStore("full")
    assert [auto.storage(p) for p in (bf16, fp16, fp32)] == ["split", "full", "none"]
    assert [full.storage(p) for p in (bf16, fp16, fp32)] == ["full", "full", "none"]
    auto.whole = True
    assert auto.storage(bf16) == "full"


def test_master_set_before_any_state_waits_outside_of_it() -> None:
    store, state = MasterStore("auto"), dict[Tensor, Any]()
    weight = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    store.set(state, weight, torch.tensor([1.0001, 2.0]))
    assert not state
    assert store.master(state, weight).tolist() == torch.tensor([1.0001, 2.0]).tolist()
    stored = store.current(state, weight)
    assert stored.dtype == torch.int16
    store.put(defaultdict(dict, state), weight, stored)
    assert not len(store.early)
    assert read(weight, stored).tolist() == torch.tensor([1.0001, 2.0]).tolist()


def test_change_of_storage_between_steps_keeps_the_master() -> None:
    store = MasterStore("auto")
    weight = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    state: dict[Tensor, Any] = {weight: {"exp_avg": torch.zeros(2)}}
    master = torch.tensor([1.0001, 0.9999])
    stored = begin(weight, "split")
    write(weight, stored, master)
    store.put(state, weight, stored)
    store.whole = True
    stored = store.current(state, weight)
    assert torch.equal(stored, master)
    store.put(state, weight, stored)
    store.whole = False
    assert torch.equal(read(weight, store.current(state, weight)), master)


def test_nested_reaches_every_tensor() -> None:
    value = {"a": [torch.ones(1), (torch.ones(1), "text")], "b": 3}
    doubled: Any = nested(value, lambda tensor: tensor * 2)
    assert doubled["a"][0].item() == 2 and doubled["a"][1][0].item() == 2
    assert doubled["a"][1][1] == "text" and doubled["b"] == 3


@pytest.mark.parametrize("offset", range(4))
@pytest.mark.parametrize("numel", [0, 1, 3, 4, 8, 10])
def test_every_bit_of_every_weight_is_compared_with_its_master(numel: int, offset: int) -> None:
    master = torch.randn(numel, generator=torch.Generator().manual_seed(numel))
    weight = torch.zeros(numel + offset, dtype=torch.bfloat16)[offset:]
    weight.copy_(master)
    assert is_rounding(weight, master)
    for element in range(numel):
        for bit in range(16):
            bits = weight.view(torch.int16)
            flipped = torch.tensor(1 << bit if bit < 15 else -(1 << 15), dtype=torch.int16)
            bits[element] ^= flipped
            assert not is_rounding(weight, master)
            bits[element] ^= flipped


def test_weights_that_lie_apart_are_compared_with_their_masters() -> None:
    master = torch.randn(4, 8)
    weight = master.bfloat16().t()
    assert is_rounding(weight, master.t()) and not is_rounding(weight, -master.t())
