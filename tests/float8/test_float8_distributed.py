"""FP8 layers on two ranks: FSDP2, DDP and tensor parallelism give what one process gives."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from fp8 import RECIPES
from ranks import on_ranks
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from mixprec import Precision, float8, formats
from mixprec.float8.sharded import all_gather
from mixprec.float8.sharded.all_gather import GatheredWeight, WeightShard
from mixprec.umup import layers

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")

BF16 = torch.bfloat16
WIDTH, HIDDEN, TOKENS, STEPS, MICRO = 64, 96, 24, 3, 2


# ------------------------------------------------------------------ a model, and one process


class Block(nn.Module):
    def __init__(self, recompute: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        self.gate = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.up = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        if self.recompute:
            out: Any = checkpoint(self.inner, x, use_reentrant=False)
            return out
        return self.inner(x)

    def inner(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


def build(recipe: str, *, recompute: bool = False, convert: bool = True) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(Block(recompute), Block(recompute))
    if convert:
        Precision("fp8", recipe=recipe).convert(model, min_dim=16)
    return model


def data(step: int, rank: int, micro: int = 0) -> tuple[Tensor, Tensor]:
    """An input and the gradient of its output; the second rank's are larger, and grow."""
    generator = torch.Generator().manual_seed(1000 * step + 10 * rank + micro)
    x, dy = torch.randn(2, TOKENS, WIDTH, generator=generator)
    grows = 4.0 ** (step * rank)
    return (x * grows).to(BF16), (dy * grows).to(BF16)


def optimizer_for(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=True)


@cache
def replicas(recipe: str, ranks: int = 2) -> list[tuple[list[Tensor], Any]]:
    """Outputs and last model of one process a rank, which average gradients by hand."""
    models = [build(recipe) for _ in range(ranks)]
    steppers = [optimizer_for(model) for model in models]
    outputs: list[list[Tensor]] = [[] for _ in models]
    for step in range(STEPS):
        sums: list[list[Tensor]] = []
        for rank, model in enumerate(models):
            sums.append([torch.zeros(p.shape) for p in model.parameters()])
            for micro in range(MICRO):
                x, dy = data(step, rank, micro)
                y = model(x)
                outputs[rank].append(y.detach())
                y.backward(dy)
                for total, param in zip(sums[-1], model.parameters(), strict=True):
                    total += param.grad
                    param.grad = None
        for model in models:
            for param, *addends in zip(model.parameters(), *sums, strict=True):
                param.grad = (torch.stack(addends).sum(0) / ranks).to(BF16)
        for stepper in steppers:
            stepper.step()
            stepper.zero_grad()
    return list(zip(outputs, models, strict=True))


def train(model: Any, rank: int, last_of_step: Callable[[bool], None] = lambda last: None) -> Any:
    stepper = optimizer_for(model)
    outputs: list[Tensor] = []
    for step in range(STEPS):
        for micro in range(MICRO):
            x, dy = data(step, rank, micro)
            last_of_step(micro == MICRO - 1)
            y = model(x)
            outputs.append(y.detach())
            y.backward(dy)
        stepper.step()
        stepper.zero_grad()
    return outputs


def whole(tensor: Any) -> Tensor:
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach()


def assert_same(outputs: list[Tensor], model: Any, expected: tuple[list[Tensor], Any]) -> None:
    for found, right in zip(outputs, expected[0], strict=True):
        torch.testing.assert_close(found, right, rtol=0, atol=0)
    ours, theirs = model.state_dict(), expected[1].state_dict()
    assert list(ours) == list(theirs)
    for name, param in ours.items():
        torch.testing.assert_close(whole(param), theirs[name], rtol=0, atol=0, msg=name)


def float8_states(model: nn.Module) -> list[Any]:
    return [module._float8 for module in model.modules() if hasattr(module, "_float8")]


def assert_same_exponents(model: nn.Module, right: nn.Module) -> None:
    for ours, theirs in zip(float8_states(model), float8_states(right), strict=True):
        for name, operand in ours.operands().items():
            scale = theirs.operands()[name].scale
            torch.testing.assert_close(operand.scale, scale, rtol=0, atol=0, msg=name)
            assert operand.settled


def on_mesh(*shape: int, names: tuple[str, ...] | None = None) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", shape or (dist.get_world_size(),), mesh_dim_names=names)


# ------------------------------------------------------------------ FSDP2


def shard(model: Any, **options: Any) -> Any:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    mesh = on_mesh()
    for block in model:
        fully_shard(block, mesh=mesh, mp_policy=policy, **options)
    return fully_shard(model, mesh=mesh, mp_policy=policy, **options)


def sync_on_last(model: Any) -> Callable[[bool], None]:
    return model.set_requires_gradient_sync


def check_fsdp(rank: int) -> None:
    for recipe in RECIPES:
        expected = replicas(recipe)[rank]
        for recompute, reshard in ((False, True), (True, False)):
            model = shard(build(recipe, recompute=recompute), reshard_after_forward=reshard)
            assert_same(train(model, rank, sync_on_last(model)), model, expected)
            assert_same_exponents(model, expected[1])


def check_fsdp_memory(rank: int) -> None:
    """Between a forward pass and its backward pass no FP8 copy of a weight is alive."""
    model = build("static")
    states = float8_states(model)
    assert all(state.weight.held is not None for state in states)
    model = shard(model)
    x, dy = data(0, rank)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    assert all(state.weight.held is None for state in states)
    for tensor in saved:
        if tensor.dtype.itemsize == 1:
            assert tensor.shape[-1] == -(-TOKENS // 16) * 16, f"{tensor.shape} is no input"
    y.backward(dy)


def check_fsdp_edits(rank: int) -> None:
    """Weights that change behind FSDP2's gathered parameter are read as they are."""
    from torch.distributed.tensor import distribute_tensor

    x, _ = data(0, 0)
    for recipe in ("static", "rowwise"):
        model = shard(build(recipe))
        y = model(x).detach()
        saved = {name: param.clone() for name, param in model.state_dict().items()}
        with torch.no_grad():
            for param in model.parameters():
                param.mul_(2)
        assert not torch.equal(model(x), y)
        model.load_state_dict(saved)
        torch.testing.assert_close(model(x).detach(), y, rtol=0, atol=0)
        for param in model.parameters():
            param.to_local().data.zero_()
        torch.testing.assert_close(model(x), x, rtol=0, atol=0)
        model.load_state_dict(saved, assign=True)
        torch.testing.assert_close(model(x).detach(), y, rtol=0, atol=0)
        fresh = build(recipe).state_dict()
        placed = {
            name: distribute_tensor(fresh[name], param.device_mesh, param.placements)
            for name, param in model.state_dict().items()
        }
        model.load_state_dict(placed)
        torch.testing.assert_close(model(x).detach(), y, rtol=0, atol=0)


def check_fsdp_from_meta(rank: int) -> None:
    """Ranks that begin with other weights agree on exponents once they share one model."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    x, _ = data(0, 0)
    right = build("adaptive")
    for on_meta, way in ((False, shard), (False, shard_bytes), (True, shard), (True, shard_bytes)):
        with torch.device("meta" if on_meta else "cpu"):
            model: Any = nn.Sequential(Block(), Block())
        if not on_meta:
            for param in model.parameters():
                param.data *= 8.0**rank
        Precision("fp8", recipe="adaptive").convert(model, min_dim=16)
        model = way(model)
        if on_meta:
            model.to_empty(device="cpu")
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(model, right.state_dict(), options=options)
        torch.testing.assert_close(model(x).detach(), right(x).detach(), rtol=0, atol=0)


def saving_into(saved: set[tuple[torch.dtype, int]]) -> Any:
    """A backend that runs graphs as they are, and notes what a forward graph returns or saves."""
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    def forward(graph: Any, inputs: Any) -> Any:
        (output,) = (node for node in graph.graph.nodes if node.op == "output")
        held = [node.meta["val"] for node in output.all_input_nodes if "val" in node.meta]
        saved.update((val.dtype, val.numel()) for val in held if isinstance(val, Tensor))
        return make_boxed_func(graph.forward)

    return aot_autograd(
        fw_compiler=forward,
        bw_compiler=lambda graph, inputs: make_boxed_func(graph.forward),
        partition_fn=min_cut_rematerialization_partition,
    )


def check_fsdp_compiled_memory(rank: int) -> None:
    """The compiler does not make FP8 weights before it must, which it then would save."""
    torch._dynamo.reset()
    x, dy = data(0, rank)
    for sharded in (shard, shard_bytes):
        saved: set[tuple[torch.dtype, int]] = set()
        model = build("static")
        for block in model:
            block.compile(backend=saving_into(saved), fullgraph=True)
        sharded(model)(x).backward(dy)
        in_fp8 = {numel for dtype, numel in saved if dtype.itemsize == 1}
        rows = -(-TOKENS // 16) * 16
        whole_in_bytes = {HIDDEN * WIDTH} if sharded is shard_bytes else set[int]()
        assert in_fp8 == {rows * WIDTH, rows * HIDDEN} | whole_in_bytes


def check_fsdp_compiled(rank: int) -> None:
    torch._dynamo.reset()
    for recipe in ("adaptive", "rowwise"):
        expected = replicas(recipe)[rank]
        model = build(recipe)
        for block in model:
            block.compile(backend="aot_eager", fullgraph=True)
        model = shard(model)
        outputs = train(model, rank, sync_on_last(model))
        if recipe == "rowwise":
            assert_same(outputs, model, expected)
        else:  # exponents of inputs are fitted by eager passes only
            torch.testing.assert_close(outputs[0], expected[0][0], rtol=0.1, atol=0.2)


def test_fsdp2_gives_what_one_process_gives_keeps_no_copies_and_finds_edits() -> None:
    on_ranks(
        check_fsdp, check_fsdp_memory, check_fsdp_edits, check_fsdp_from_meta, check_fsdp_compiled
    )


# ------------------------------------------------------------------ FSDP2, gathering bytes


def shard_bytes(model: Any, **options: Any) -> Any:
    float8.enable_fsdp_float8_all_gather(model)
    return shard(model, **options)


def check_bytes(rank: int) -> None:
    for recipe in ("static", "adaptive"):
        expected = replicas(recipe)[rank]
        for recompute, reshard in ((False, True), (True, False)):
            model = build(recipe, recompute=recompute)
            gathered = watch_weights(model)
            model = shard_bytes(model, reshard_after_forward=reshard)
            assert_same(train(model, rank, sync_on_last(model)), model, expected)
            assert_same_exponents(model, expected[1])
            assert gathered == {("GatheredWeight", BF16, HIDDEN * WIDTH)}
            for param in model.parameters():
                assert param.grad is None or type(param.grad.to_local()) is Tensor


def watch_weights(model: Any) -> set[tuple[str, torch.dtype, int]]:
    """Kind, dtype and bytes of each weight that a layer computes with."""
    seen: set[tuple[str, torch.dtype, int]] = set()

    def look(layer: Any, args: Any) -> None:
        weight = layer.weight
        nbytes = getattr(weight, "rows", weight).untyped_storage().nbytes()
        seen.add((type(weight).__name__, weight.dtype, nbytes))

    for module in model.modules():
        if isinstance(module, float8.Float8Linear):
            module.register_forward_pre_hook(look)
    return seen


class Grow(torch.optim.Optimizer):
    """Multiplies weights by 2^5, 2^10, 2^-15, ...: out of any range that was fitted before."""

    def step(self, closure: Any = None) -> Any:
        state = self.param_groups[0]
        state["steps"] = state.get("steps", 0) + 1
        with torch.no_grad():
            for param in state["params"]:
                param.mul_(2.0 ** (-15 if state["steps"] == 3 else 5 * state["steps"]))


def check_bytes_of_uneven_and_empty_shards(rank: int) -> None:
    """Rows of 64, 16 and 96 over five ranks: 13 and 12, 4 and none, 20 and 16."""
    for recipe in ("static", "adaptive"):
        torch.manual_seed(0)
        alone: Any = nn.Sequential(nn.Linear(64, 16), nn.Linear(16, 96), nn.Linear(96, 64))
        Precision("fp8", recipe=recipe).convert(alone, min_dim=16)
        torch.manual_seed(0)
        model: Any = nn.Sequential(nn.Linear(64, 16), nn.Linear(16, 96), nn.Linear(96, 64))
        Precision("fp8", recipe=recipe).convert(model, min_dim=16)
        float8.enable_fsdp_float8_all_gather(model)
        from torch.distributed.fsdp import fully_shard

        model = fully_shard(model, mesh=on_mesh())
        growers = [Grow(one.parameters(), {}) for one in (alone, model)]
        x = torch.randn(32, 64).to(BF16)
        moved: set[float] = set()
        for step in range(5):
            assert torch.equal(model(x), alone(x)), f"{recipe} in step {step}"
            model.reshard()  # no backward pass does it here
            for grower in growers:
                grower.step()
            assert_same_weight_exponents(model, alone)
            moved.add(model[0]._float8.weight.operand.scale[0].item())
        assert (len(moved) > 3) == (recipe == "adaptive")
        assert all(state.weight.operand.settled for state in float8_states(model))
        y = model(x).detach()
        model.reshard()
        saved = {name: param.clone() for name, param in model.state_dict().items()}
        for way in ("assign", "to_empty"):  # both make FSDP2 pad shards anew
            if way == "to_empty":
                model.to_empty(device="cpu")
            model.load_state_dict(saved, assign=way == "assign")
            assert all(isinstance(layer.weight.to_local(), Tensor) for layer in model)
            assert all(type(layer.weight._local_tensor) is WeightShard for layer in model)
            assert torch.equal(model(x), y), way
            model.reshard()


def assert_same_weight_exponents(model: nn.Module, right: nn.Module) -> None:
    for ours, theirs in zip(float8_states(model), float8_states(right), strict=True):
        found, expected = ours.weight.operand, theirs.weight.operand
        assert torch.equal(found.scale, expected.scale)
        if found.cast.scaling == "adaptive":
            assert torch.equal(found.last, expected.last)


def check_bytes_and_not_of_other_layers(rank: int) -> None:
    """Unit-scaled layers, whose multipliers lie in the scales; frozen weights; and no tokens."""
    x, dy = data(0, 0)
    for way in (shard, shard_bytes):
        found: list[dict[str, Tensor]] = []
        for place in (lambda model: model, way):
            torch.manual_seed(0)
            one: Any = nn.Sequential(layers.Linear(WIDTH, HIDDEN), layers.Linear(HIDDEN, WIDTH))
            Precision("fp8", recipe="static").convert(one, min_dim=16)
            one[0].weight.requires_grad_(False)
            whole_model = nn.Sequential(one)
            results(place(whole_model), x[:0], dy[:0])
            found.append(results(whole_model, x, dy))
        assert "0.1.weight" in found[0] and "0.0.weight" not in found[0]
        for name, right in found[0].items():
            assert right.any() and torch.equal(found[1][name], right), name


def check_bytes_in_checkpoints(rank: int) -> None:
    import torch.distributed.checkpoint as dcp

    x, dy = data(0, 0)
    model = shard_bytes(build("static"))
    stepper = optimizer_for(model)
    for _ in range(2):
        model(x).backward(dy)
        stepper.step()
        stepper.zero_grad()
    y = model(x).detach()
    model.reshard()
    assert isinstance(model[0].up.weight._local_tensor, WeightShard)
    saved = model.state_dict()
    for held in (*saved.values(), *held_tensors(stepper.state_dict()["state"])):
        assert type(getattr(held, "_local_tensor", held)) is Tensor

    folder = [tempfile.mkdtemp() if rank == 0 else ""]
    dist.broadcast_object_list(folder)
    dcp.save(saved, checkpoint_id=folder[0])
    with torch.device("meta"):
        empty: Any = nn.Sequential(Block(), Block())
    Precision("fp8", recipe="static").convert(empty, min_dim=16)
    empty = shard_bytes(empty)
    empty.to_empty(device="cpu")
    loaded = empty.state_dict()
    dcp.load(loaded, checkpoint_id=folder[0])
    empty.load_state_dict(loaded)
    assert torch.equal(empty(x), y)
    torch.save(model[0].up.weight, f"{folder[0]}/{rank}")
    again = torch.load(f"{folder[0]}/{rank}", weights_only=False)
    assert type(again._local_tensor) is Tensor
    empty.load_state_dict({name: held.clone() for name, held in saved.items()}, assign=True)
    assert isinstance(empty[0].up.weight._local_tensor, WeightShard)
    assert torch.equal(empty(x), y)


def held_tensors(nested: Any) -> list[Any]:
    return [held for held in tree_leaves(nested) if isinstance(held, Tensor)]


def check_bytes_from_fp32(rank: int) -> None:
    """FP32 shards are rounded once, to FP8, as autocast does in one process."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    x, dy = data(0, 0)
    precision = Precision("fp8", recipe="static", params=formats.FP32, compute=formats.BF16)
    alone, model = build("static", convert=False)[0], build("static", convert=False)[0]
    for one in (alone, model):
        precision.convert(one, min_dim=16)
    float8.enable_fsdp_float8_all_gather(model)
    policy = MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=torch.float32)
    fully_shard(model, mesh=on_mesh(), mp_policy=policy)
    with torch.autocast("cpu", BF16):
        expected = alone(x)
    found = model(x)
    assert torch.equal(found, expected)
    found.backward(dy)
    assert model.up.weight.grad.dtype == torch.float32


def check_bytes_compiled(rank: int) -> None:
    torch._dynamo.reset()
    expected = replicas("static")[rank]
    model = build("static")
    for block in model:
        block.compile(backend="aot_eager", fullgraph=True)
    model = shard_bytes(model)
    assert_same(train(model, rank, sync_on_last(model)), model, expected)


def check_bytes_refusals(rank: int) -> None:
    model = build("static")
    with pytest.raises(ValueError, match="no layer of this model runs in FP8"):
        float8.enable_fsdp_float8_all_gather(nn.Linear(4, 4))
    model = shard_bytes(model)
    for call in (float8.enable_fsdp_float8_all_gather, float8.revert):
        with pytest.raises(ValueError, match=r"weight of '0.gate' is a DTensor already"):
            call(model)
    with pytest.raises(ValueError, match=r"weight of '0.gate' is a DTensor already"):
        Precision("fp8").convert(shard(build("static", convert=False).to(BF16)), min_dim=16)
    weight = GatheredWeight(torch.zeros(16, 16).to(torch.float8_e4m3fn), torch.ones(1), BF16)
    assert torch.equal(weight + 1, torch.ones(16, 16, dtype=BF16))
    with pytest.raises(RuntimeError, match="would write to a weight that was gathered in FP8"):
        weight.add_(1)


def test_fsdp2_gathers_bytes_and_gives_the_same() -> None:
    on_ranks(
        check_bytes,
        check_bytes_and_not_of_other_layers,
        check_bytes_in_checkpoints,
        check_bytes_from_fp32,
        check_bytes_compiled,
        check_bytes_refusals,
        check_fsdp_compiled_memory,
    )


def test_fsdp2_gathers_bytes_of_uneven_and_of_empty_shards() -> None:
    on_ranks(check_bytes_of_uneven_and_empty_shards, ranks=5)


def test_a_gathered_weight_takes_its_factor_whenever_it_has_moved_and_only_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = GatheredWeight(torch.ones(16, 16).to(torch.float8_e4m3fn), torch.ones(1), BF16)
    scale = torch.tensor([4.0, 0.25])
    weight.take_factor(scale)
    assert weight.factor.item() == 0.25 and weight.factor._version == 0
    weight.factor.fill_(7.0)
    weight.take_factor(scale)
    assert weight.factor.item() == 7.0, "copied, though nothing has moved"
    scale.copy_(torch.tensor([2.0, 0.5]))
    weight.take_factor(scale)
    assert weight.factor.item() == 0.5
    other = torch.zeros(2).copy_(torch.tensor([8.0, 0.125]))
    assert other._version == scale._version
    weight.take_factor(other)
    assert weight.factor.item() == 0.125
    monkeypatch.setattr(all_gather, "is_capturing", lambda device: True)
    weight.take_factor(other)
    monkeypatch.undo()
    weight.factor.fill_(7.0)
    weight.take_factor(other)
    assert weight.factor.item() == 0.125, "a replay may move it and leave its version"


def check_on_a_gpu(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.cuda.set_device(rank)
    mesh = init_device_mesh("cuda", (1,))
    ways = [(recipe, backend) for recipe in RECIPES for backend in (None, "aot_eager")]
    ways.append(("adaptive", "inductor"))
    for (recipe, backend), by_bytes in itertools.product(ways, (False, True)):
        torch._dynamo.reset()
        alone, model = (build(recipe, recompute=backend is not None).cuda() for _ in range(2))
        if by_bytes and not float8.enable_fsdp_float8_all_gather(model):
            continue
        if backend is not None:
            for block in (*alone, *model):
                block.compile(backend=backend, fullgraph=True)
        for block in (*model, model):
            fully_shard(block, mesh=mesh)
        steppers = [(one, optimizer_for(one)) for one in (alone, model)]
        for step in range(STEPS):
            x, dy = (t.cuda() for t in data(step, 1))
            outputs: list[Tensor] = []
            for one, stepper in steppers:
                outputs.append(one(x))
                outputs[-1].backward(dy)
                stepper.step()
                stepper.zero_grad()
            assert torch.equal(*outputs), f"{recipe}, {backend}, bytes: {by_bytes}, step {step}"
        assert_same([], model, ([], alone))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_fsdp2_on_a_gpu_gives_what_the_layers_give_without_it() -> None:
    on_ranks(check_on_a_gpu, ranks=1)


# ------------------------------------------------------------------ DDP


def check_ddp(rank: int) -> None:
    from torch.nn.parallel import DistributedDataParallel

    class WithIdle(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model, self.idle = model, nn.Linear(16, 16, dtype=BF16)

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x)

    for recipe in RECIPES:
        blocks = build(recipe, convert=False)
        for param in blocks.parameters():
            param.data *= 8.0**rank  # then DDP broadcasts the first rank's
        Precision("fp8", recipe=recipe).convert(blocks, min_dim=16)
        model = WithIdle(blocks)
        wrapped = DistributedDataParallel(model, find_unused_parameters=True, bucket_cap_mb=1)
        found: list[Tensor] = []
        stepper = optimizer_for(model)
        for step in range(STEPS):
            x, dy = data(step, rank)
            if step == 1:
                with wrapped.no_sync():
                    wrapped(x).backward(dy)
            y = wrapped(x)
            y.backward(dy)
            found.append(y.detach())
            stepper.step()
            stepper.zero_grad()
        assert model.idle.weight.grad is None
        mine: list[Tensor] = []
        for state in float8_states(model):
            scale, counters = state.weight.operand.scale, state.weight.operand.last
            mine += [scale.double(), counters.double()]
        mine += [param.detach().double().flatten() for param in model.model.parameters()]
        both = [torch.empty_like(torch.cat(mine)) for _ in range(2)]
        dist.all_gather(both, torch.cat(mine))
        torch.testing.assert_close(both[0], both[1], rtol=0, atol=0)
        assert not torch.equal(found[0], found[-1])


def check_ddp_equals_one_process(rank: int) -> None:
    """Both ranks read the same tokens, so that the mean of their gradients is each of them."""
    from torch.nn.parallel import DistributedDataParallel

    for recipe in RECIPES:
        model, alone = build(recipe), build(recipe)
        wrapped = DistributedDataParallel(model)
        for one in (wrapped, alone):
            stepper = optimizer_for(one)
            for step in range(STEPS):
                x, dy = data(step, 1)
                one(x).backward(dy)
                stepper.step()
                stepper.zero_grad()
        assert_same([], model, ([], alone))


def test_ddp_gives_what_one_process_gives_and_exponents_of_weights_agree() -> None:
    on_ranks(check_ddp, check_ddp_equals_one_process)


# ------------------------------------------------------------------ tensor parallelism


def parallelize(block: Any, mesh: Any, **options: Any) -> Any:
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    plan = {"gate": ColwiseParallel(), "up": ColwiseParallel(), "down": RowwiseParallel()}
    return parallelize_module(block, mesh, {**plan, **options})


def snr(got: Tensor, exact: Tensor) -> float:
    error = got.double() - exact
    return 10 * torch.log10(exact.square().sum() / error.square().sum()).item()


def results(block: Any, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    block.zero_grad()
    y = block(x)
    y.backward(dy)
    held = {name: param.grad for name, param in block.named_parameters()}
    grads = {name: whole(grad) for name, grad in held.items() if grad is not None}
    assert x.grad is not None
    return {"y": y.detach(), "x": x.grad, **grads}


def check_tensor_parallel(rank: int) -> None:
    mesh = on_mesh()
    x, dy = data(0, 0)
    exact = results(build("static", convert=False)[0].double(), x.double(), dy.double())
    for recipe in RECIPES:
        alone = results(build(recipe)[0], x, dy)
        block = parallelize(build(recipe)[0], mesh)
        first = results(block, x, dy)
        states = float8_states(block)
        held = [tuple(state.weight.held[0].shape) for state in states]
        assert held == [(HIDDEN // 2, WIDTH), (HIDDEN // 2, WIDTH), (WIDTH, HIDDEN // 2)]
        kept = [state.weight._made_of for state in states]
        again = results(block, x, dy)
        assert all(k is state.weight._made_of for k, state in zip(kept, states, strict=True))
        for name in exact:
            torch.testing.assert_close(first[name], again[name], rtol=0, atol=0)
            # Sums over ranks are rounded to BF16, and scales fit shards: never 1 dB worse.
            assert snr(first[name], exact[name]) > snr(alone[name], exact[name]) - 1, name
            both = [torch.empty_like(first[name]) for _ in range(2)]
            dist.all_gather(both, first[name].contiguous())
            assert torch.equal(*both), name
        if recipe == "static":  # what crosses no rank is the same to the bit
            for name in ("gate.weight", "up.weight"):
                torch.testing.assert_close(first[name], alone[name], rtol=0.02, atol=0.02)


def check_tensor_parallel_options(rank: int) -> None:
    """Sequence-parallel inputs, outputs that stay DTensors, a replicated layer, other axes."""
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    mesh = on_mesh()
    x, dy = data(0, 0)
    exact = results(build("static", convert=False)[0].double(), x.double(), dy.double())
    block = parallelize(
        build("static")[0],
        mesh,
        gate=ColwiseParallel(input_layouts=Shard(0)),
        up=ColwiseParallel(input_layouts=Shard(0)),
        down=RowwiseParallel(output_layouts=Shard(0)),
    )
    half = slice(rank * TOKENS // 2, (rank + 1) * TOKENS // 2)
    mine = x[half].clone().requires_grad_()
    y = block(mine)
    y.backward(dy[half])
    assert snr(y.detach(), exact["y"][half]) > 25
    assert mine.grad is not None and snr(mine.grad, exact["x"][half]) > 20
    assert snr(whole(block.down.weight.grad), exact["down.weight"]) > 20
    assert snr(whole(block.down.bias.grad), exact["down.bias"]) > 40

    linear = build("static")[0].down
    h, dy = torch.randn(2, 5, HIDDEN).to(BF16), torch.randn(2, 5, WIDTH).to(BF16)
    right = results(linear, h, dy)
    for name, param in list(linear.named_parameters()):
        placed = distribute_tensor(param.detach(), mesh, [Replicate()])
        linear.register_parameter(name, nn.Parameter(placed))
    for placement in (Replicate(), Shard(0), Shard(1), Shard(2)):
        linear.zero_grad()
        placed = distribute_tensor(h, mesh, [placement]).requires_grad_()
        out = linear(placed)
        assert isinstance(out, DTensor) and out.shape == (2, 5, WIDTH)
        assert out.placements == ((Replicate() if placement == Shard(2) else placement),)
        out.backward(distribute_tensor(dy, mesh, [Replicate()]))
        torch.testing.assert_close(whole(out), right["y"], rtol=0, atol=0)
        torch.testing.assert_close(whole(placed.grad), right["x"], rtol=0, atol=0)
        torch.testing.assert_close(whole(linear.weight.grad), right["weight"], rtol=0.02, atol=0.05)
        torch.testing.assert_close(whole(linear.bias.grad), right["bias"], rtol=0.02, atol=0.02)


class ThroughData(torch.optim.Optimizer):
    """Writes zeros past the version counter."""

    def step(self, closure: Any = None) -> Any:
        for param in self.param_groups[0]["params"]:
            param.to_local().data.zero_()


def check_tensor_parallel_trains(rank: int) -> None:
    mesh = on_mesh()
    x, dy = data(0, 0)
    for recipe in ("static", "adaptive"):
        alone, block = build(recipe)[0], parallelize(build(recipe)[0], mesh)
        steppers = [torch.optim.SGD(one.parameters(), lr=1e-3) for one in (alone, block)]
        before = block.up.weight.full_tensor().clone()
        for _ in range(3):
            for one, stepper in zip((alone, block), steppers, strict=True):
                results(one, x, dy)
                stepper.step()
        assert not torch.equal(before, block.up.weight.full_tensor())
        y = results(block, x, dy)["y"]
        assert snr(y, results(alone, x, dy)["y"].double()) > 25
        ThroughData(block.parameters(), {}).step()
        torch.testing.assert_close(block(x), x, rtol=0, atol=0)


def check_tensor_parallel_compiled(rank: int) -> None:
    torch._dynamo.reset()
    mesh = on_mesh()
    x, dy = data(0, 0)
    block = parallelize(build("static")[0], mesh)
    eager = results(block, x, dy)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    found = results(compiled, x, dy)
    for name, value in eager.items():
        key = name if name in found else f"_orig_mod.{name}"
        torch.testing.assert_close(found[key], value, rtol=0, atol=0, msg=name)


def check_fsdp_with_tensor_parallel(rank: int) -> None:
    """A mesh of 1 x 2 and of 2 x 1: one of the two does nothing but wrap."""
    from torch.distributed.fsdp import fully_shard

    x, dy = data(0, 0)
    for shape in ((1, 2), (2, 1)):
        mesh = on_mesh(*shape, names=("data", "tensor"))
        right = parallelize(build("static")[0], mesh["tensor"])
        expected = results(right, x, dy)
        block = parallelize(build("static")[0], mesh["tensor"])
        fully_shard(block, mesh=mesh["data"])
        for _ in range(2):
            found = results(block, x, dy)
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, rtol=0, atol=0, msg=name)
        assert all(state.weight.is_gathered for state in float8_states(block))


def check_refusals(rank: int) -> None:
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = on_mesh()
    x, _ = data(0, 0)
    small: Any = nn.Sequential(nn.Linear(WIDTH, 48, dtype=BF16))
    Precision("fp8", recipe="static").convert(small, min_dim=16)
    weight = small[0].weight.detach()
    small[0].weight = nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)]))
    with pytest.raises(ValueError, match=r"leaves this rank a shard \[24, 64\].*multiples of 16"):
        small[0](DTensor.from_local(x, mesh, [Replicate()]))
    with pytest.raises(TypeError, match=r"weight is a DTensor .* but input is a plain tensor"):
        small[0](x)
    plain = build("static")[0].up
    with pytest.raises(TypeError, match=r"input is a DTensor .* but weight is a plain tensor"):
        plain(DTensor.from_local(x, mesh, [Replicate()]))


def test_tensor_parallel_layers_are_as_near_as_whole_ones_compile_combine_and_refuse() -> None:
    on_ranks(
        check_tensor_parallel,
        check_tensor_parallel_options,
        check_tensor_parallel_trains,
        check_tensor_parallel_compiled,
        check_fsdp_with_tensor_parallel,
        check_refusals,
    )


def test_placements_and_meshes_that_no_layer_takes_are_refused() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh, other = (init_device_mesh("cpu", (1,) * dims) for dims in (1, 2))
        layer: Any = build("static")[0].up
        weight, (x, _) = layer.weight.detach(), data(0, 0)
        layer.weight = nn.Parameter(DTensor.from_local(weight, mesh, [Partial()]))
        with pytest.raises(ValueError, match=r"has placements .*Partial.*takes Shard\(0\), Shard"):
            layer(DTensor.from_local(x, mesh, [Replicate()]))
        layer.weight = nn.Parameter(DTensor.from_local(weight, mesh, [Replicate()]))
        with pytest.raises(ValueError, match=r"a layer takes its input on the mesh of its weight"):
            layer(DTensor.from_local(x, other, [Replicate(), Replicate()]))
    finally:
        dist.destroy_process_group()


def test_a_gathered_weight_is_where_its_bytes_are() -> None:
    rows, factor = torch.empty(2, 3, dtype=torch.float8_e4m3fn, device="meta"), torch.ones(1)
    assert GatheredWeight(rows, factor, BF16).device.type == "meta"
