"""What a step sends and holds, against the formulas of the ZeRO and Megatron papers.

Psi is the number of parameters, m the microbatches of a rank, N the ranks that ZeRO shards over. Messages are
counted as the papers do: an all-gather by its output, a reduce-scatter by its input, and an all-reduce of n, which
travels as both, once as n. They are counted where they reach torch.distributed, whoever calls it.
"""

import gc
import itertools
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ext.engine import Engine, EngineConfig
from megatron_ext.kernels.linear import column_parallel_linear
from megatron_ext.mesh import AXES, ProcessGrid, build_grid
from megatron_ext.models.count import parameters, parameters_per_layer
from megatron_ext.models.decoder import DecoderLayer
from megatron_ext.pipeline import SCHEDULES
from megatron_ext.tensor_parallel import TensorParallel
from megatron_ext.zero import DataParallel
from tests.distributed import Pool
from tests.megatron_ext.recording import Issued
from tests.megatron_ext.training import LR, global_batch, share, tiny
from tests.slow import sweep

GATHER, SCATTER, REDUCE, SEND = "all-gather", "reduce-scatter", "all-reduce", "send"
_OPERATORS: dict[str, tuple[str, int]] = {  # what it is, and which argument is the whole message
    "allreduce_": (REDUCE, 0),
    "_allgather_base_": (GATHER, 0),
    "_reduce_scatter_base_": (SCATTER, 1),
    "send": (SEND, 0),
    "all_reduce": (REDUCE, 0),
}
_SILENT = ("recv_", "wait_tensor")  # what another rank sends; what waits for a collective

CPU = torch.device("cpu")
Messages = Counter[tuple[str, str, tuple[int, ...]]]  # (axis, collective, shape of the message) -> how many


class Collectives(TorchDispatchMode):
    """Counts the messages that this rank passes to torch.distributed."""

    def __init__(self, grid: ProcessGrid):
        super().__init__()
        self.axes = {grid.mesh[axis].get_group().group_name: axis for axis in AXES if grid.size(axis) > 1}
        self.messages: Messages = Counter()
        self.bytes: Messages = Counter()  # the same, in bytes of all of them together

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional") and func._opname not in _SILENT:
            kind, position = _OPERATORS[func._opname]  # an operator that is not known is an error, not a zero
            message = args[position][0] if isinstance(args[position], list) else args[position]
            key = self._axis(func, args), kind, tuple(message.shape)
            self.messages[key] += 1
            self.bytes[key] += message.nbytes
        return func(*args, **(kwargs or {}))

    def _axis(self, func: Any, args: Any) -> str:
        if func.namespace == "_c10d_functional":
            return self.axes.get(args[-1], "world")
        argument = [a.name for a in func._schema.arguments].index("process_group")
        return self.axes.get(dist.ProcessGroup.unbox(args[argument]).group_name, "world")


def collectives_of_a_step(config: EngineConfig) -> tuple[Messages, Messages]:
    """Messages of the second step (the first also sets things up), and their bytes."""
    grid = build_grid(config.parallel, CPU)
    engine = Engine(config, grid)
    for step in range(2):
        batch = share(global_batch(config, step), grid, config.batch.micro_batch_size)
        with Collectives(grid) as collectives:
            engine.train_step(batch, LR)
    messages = collectives.messages
    (scalars,) = (key for key in messages if key[1:] == (REDUCE, (3,)))  # loss, norm, wish to stop: of the whole world
    assert messages.pop(scalars) == 1
    assert collectives.bytes.pop(scalars) == 3 * 8
    return messages, collectives.bytes


def messages_of_a_step(config: EngineConfig) -> Messages:
    return collectives_of_a_step(config)[0]


def bytes_of_a_step(config: EngineConfig) -> Counter[tuple[str, str]]:
    """By axis and collective."""
    total: Counter[tuple[str, str]] = Counter()
    for (axis, kind, _), size in collectives_of_a_step(config)[1].items():
        total[axis, kind] += size
    return total


def volume(messages: Messages, axis: str) -> dict[str, int]:
    """Elements by collective."""
    total: Counter[str] = Counter()
    for (where, kind, shape), count in messages.items():
        if where == axis:
            total[kind] += count * torch.Size(shape).numel()
    return dict(total)


def zero_volume(stage: int, psi: int, m: int) -> dict[str, int]:
    """Elements a step over the sharding ranks. 2 Psi where gradients are reduced once a step; the papers' 2 and
    3 Psi hold for each *reduced microbatch*, and stages 2 and 3 reduce all of them."""
    return {
        0: {REDUCE: psi},
        1: {GATHER: psi, SCATTER: psi},
        2: {GATHER: psi, SCATTER: m * psi},
        3: {GATHER: 2 * m * psi, SCATTER: m * psi},
    }[stage]


@pytest.mark.parametrize("dp, stage", sweep(itertools.product((2, 4, 8), range(4)), {(4, 1), (2, 3)}))
def test_zero_volume(pool: Pool, dp: int, stage: int) -> None:
    config = tiny(zero_stage=stage)
    m = config.batch.microbatches(dp)
    for messages in pool.run_fake(messages_of_a_step, dp, config):
        assert volume(messages, "dp_shard") == zero_volume(stage, parameters(config.model), m)
        assert {axis for axis, _, _ in messages} == {"dp_shard"}


def gathers_before_each_layer(config: EngineConfig) -> list[int]:
    """How many gathers had been issued when each layer of the first microbatch began to compute."""
    grid = build_grid(config.parallel, CPU)
    engine = Engine(config, grid)
    issued = []
    compute = DecoderLayer._layer

    def watched(self: DecoderLayer, *args: Any) -> torch.Tensor:
        issued.append(sum(count for (_, kind, _), count in collectives.messages.items() if kind == GATHER))
        return compute(self, *args)

    DecoderLayer._layer = watched  # type: ignore[method-assign]
    with Collectives(grid) as collectives:
        engine.train_step(share(global_batch(config, 0), grid, config.batch.micro_batch_size), LR)
    return issued[: config.model.num_layers]


@pytest.mark.parametrize("stage", sweep([1, 3], {3}))
def test_the_next_group_is_gathered_while_a_layer_computes(pool: Pool, stage: int) -> None:
    """Before layer k computes: the embedding, the layers up to k, and one more: layer k + 1, or at last the head."""
    config = tiny(zero_stage=stage)
    for issued in pool.run_fake(gathers_before_each_layer, 2, config):
        assert issued == [1 + (k + 1) + 1 for k in range(config.model.num_layers)]


@pytest.mark.parametrize("stage", sweep([1, 2, 3], {3}))
def test_hybrid_volume(pool: Pool, stage: int) -> None:
    """As ZeRO within a group of two; between the two groups every gradient shard is reduced once a step."""
    config = tiny(zero_stage=stage, zero_shard_size=2)
    psi, m = parameters(config.model), config.batch.microbatches(4)
    for messages in pool.run_fake(messages_of_a_step, 4, config):
        assert volume(messages, "dp_shard") == zero_volume(stage, psi, m)
        assert volume(messages, "dp_replicate") == {REDUCE: psi // 2}


@pytest.mark.parametrize("schedule", sweep(SCHEDULES, {"dualpipev"}))
def test_zero_1_communicates_once_a_step_in_every_schedule(pool: Pool, schedule: str) -> None:
    config = tiny(pipeline_model_parallel_size=2, pipeline_schedule=schedule, zero_stage=1)
    ranks = [volume(messages, "dp_shard") for messages in pool.run_fake(messages_of_a_step, 4, config)]
    for rank in ranks:
        assert rank[GATHER] == rank[SCATTER]
    psi = parameters(config.model)
    assert sum(rank[GATHER] for rank in ranks) == psi  # the first stages on the first rank, the others on the last
    assert sum(rank[SCATTER] for rank in ranks) == psi


def test_gradients_accumulated_whole_are_reduced_once_a_step(pool: Pool) -> None:
    config = tiny(zero_stage=3, zero_shard_size=2, accumulate_then_reduce=True)
    psi, m = parameters(config.model), config.batch.microbatches(4)
    for messages in pool.run_fake(messages_of_a_step, 4, config):
        assert volume(messages, "dp_shard") == {GATHER: 2 * m * psi, SCATTER: psi}
        assert volume(messages, "dp_replicate") == {REDUCE: psi // 2}


@pytest.mark.parametrize("schedule", sweep(["1f1b", "interleaved", "zbv"], ()))
def test_gradients_accumulated_whole_are_reduced_once_in_a_pipeline(pool: Pool, schedule: str) -> None:
    options = {"pipeline_model_parallel_size": 2, "pipeline_schedule": schedule, "zero_stage": 3}
    config = tiny(accumulate_then_reduce=True, **options)
    psi, m = parameters(config.model), config.batch.microbatches(2)
    ranks = [volume(messages, "dp_shard") for messages in pool.run_fake(messages_of_a_step, 4, config)]
    assert sum(rank[SCATTER] for rank in ranks) == psi  # the first stages on the first rank, the others on the last
    if schedule != "zbv":  # which gathers a whole stage for each half of a backward pass
        assert sum(rank[GATHER] for rank in ranks) == 2 * m * psi


@pytest.mark.parametrize("stage, shard", sweep([(0, None), (1, 2), (2, 2), (3, 2)], {(2, 2)}))
def test_gradients_in_bfloat16_are_half_the_bytes(pool: Pool, stage: int, shard: int | None) -> None:
    for flag, size in ((False, 4), (True, 2)):
        config = tiny(bf16=True, zero_stage=stage, zero_shard_size=shard, grad_reduce_in_bf16=flag)
        psi = parameters(config.model)
        elements = zero_volume(stage, psi, config.batch.microbatches(4))
        expected = {("dp_shard", kind): n * (2 if kind == GATHER else size) for kind, n in elements.items()}
        if shard is not None:
            expected["dp_replicate", REDUCE] = psi // shard * size
        assert pool.run_fake(bytes_of_a_step, 4, config) == [expected] * 2


@pytest.mark.parametrize(
    "layers, recompute", sweep(itertools.product((1, 2), (None, "full")), {(1, None), (2, "full")})
)
def test_tensor_parallel_messages(pool: Pool, layers: int, recompute: str | None) -> None:
    """Two all-reduces of [b, s, h] a layer forward, two backward (arXiv 1909.08053, figure 4); the embedding adds one
    forward, the head one backward. Recomputing a layer repeats its first."""
    config = tiny(tensor_model_parallel_size=2, micro_batch_size=8, num_layers=layers, recompute_granularity=recompute)
    m, hidden = config.batch.microbatches(1), (8, 16, 32)
    # The last all-reduce of a layer's forward has nothing after it that backward needs: recomputation stops before.
    forwards = 2 if recompute is None else 3
    for messages in pool.run_fake(messages_of_a_step, 2, config):
        assert messages == {
            ("tp", REDUCE, hidden): m * ((forwards + 2) * layers + 1 + 1),
            ("tp", REDUCE, (8 * 16, 1)): m,  # cross entropy: the maximum,
            ("tp", REDUCE, (2, 8 * 16)): m,  # the sum of exponentials and the target's logit
        }


@pytest.mark.parametrize("layers", sweep([1, 2], {2}))
def test_sequence_parallel_messages(pool: Pool, layers: int) -> None:
    """A reduce-scatter and an all-gather for every all-reduce, and the input of a column-parallel layer gathered
    again in backward instead of kept (arXiv 2205.05198, 4.2.2)."""
    config = tiny(tensor_model_parallel_size=2, sequence_parallel=True, micro_batch_size=8, num_layers=layers)
    m = config.batch.microbatches(1)
    gathered, scattered = (2 * 8, 16 // 2, 32), (2 * 8, 16 // 2, 32)
    embedding_backward, head_forward, head_again = 1, 1, 1
    embedding_forward, head_backward = 1, 1
    norms = (2 * layers + 1) * 32
    for messages in pool.run_fake(messages_of_a_step, 2, config):
        assert messages == {
            ("tp", GATHER, gathered): m * ((2 + 2 + 2) * layers + embedding_backward + head_forward + head_again),
            ("tp", SCATTER, scattered): m * ((2 + 2) * layers + embedding_forward + head_backward),
            ("tp", REDUCE, (8 * 16, 1)): m,
            ("tp", REDUCE, (2, 8 * 16)): m,
            ("tp", REDUCE, (norms,)): 1,  # gradients of the norms: every rank saw its own tokens
        }


def issued_in_backward() -> tuple[list[str], list[str], list[str]]:
    """By a whole backward pass through a column-parallel product of two weights, and by its two halves."""
    tp = TensorParallel(dist.get_world_size(), dist.get_rank(), dist.group.WORLD, sequence_parallel=True)
    x = torch.ones(2, 4, 8, requires_grad=True)
    weights = [torch.ones(6, 8, requires_grad=True) for _ in range(2)]
    found = []
    for asked in ([x, *weights], [x], weights):
        outputs = column_parallel_linear(x, weights, tp)
        with Issued() as issued:
            torch.autograd.grad(outputs, asked, [torch.ones_like(y) for y in outputs])
        found.append(issued.names)
    whole, inputs, of_weights = found
    return whole, inputs, of_weights


def test_the_input_is_gathered_while_its_gradient_is_computed(pool: Pool) -> None:
    """Under sequence parallelism: gather begun, products of dx, reduce-scatter begun, products of the weights."""
    gather, scatter, product = "allgather_base", "reduce_scatter_base", "product"
    inputs, of_weights = [product, product, scatter], [gather, product, product]
    for found in pool.run(issued_in_backward, 2):
        assert found == ([gather, *inputs, product, product], inputs, of_weights)


@pytest.mark.parametrize("stage", sweep(range(4), {2}))
def test_shares_of_gradients_are_summed_once_a_step(pool: Pool, stage: int) -> None:
    """What a tensor-parallel rank has computed from its own tokens or heads alone: of norms, of biases behind a
    row-parallel product, of keys and values with fewer heads than ranks. On shards, from stage 1 on."""
    options = {"num_query_groups": 1, "qk_layernorm": True, "add_bias_linear": True, "zero_stage": stage}
    config = tiny(tensor_model_parallel_size=2, sequence_parallel=True, micro_batch_size=4, **options)
    model = config.model
    h, d, layers = model.hidden_size, model.head_dim, model.num_layers
    elements = h + layers * (2 * h + 2 * d + 2 * h + 2 * (d * h + d))
    for messages in pool.run_fake(messages_of_a_step, 4, config):
        sums = {key: n for key, n in messages.items() if key[:2] == ("tp", REDUCE) and len(key[2]) == 1}
        assert sums == {("tp", REDUCE, (elements // (2 if stage else 1),)): 1}


@pytest.mark.parametrize("tp", sweep([1, 2], {2}))
def test_pipeline_messages(pool: Pool, tp: int) -> None:
    """Hidden states forward and their gradients backward, once for every microbatch and boundary."""
    config = tiny(tensor_model_parallel_size=tp, sequence_parallel=tp > 1, pipeline_model_parallel_size=2)
    m = config.batch.microbatches(1)
    for messages in pool.run_fake(messages_of_a_step, 2 * tp, config):
        sent = {key: count for key, count in messages.items() if key[0] == "pp"}
        assert sent == {("pp", SEND, (2, 16 // tp, 32)): m}


def resident_bytes(device: torch.device) -> int:
    """Bytes of all storages on the device that any tensor of this process refers to."""
    storages = {}
    for item in gc.get_objects():
        if not issubclass(type(item), torch.Tensor):
            continue
        for tensor in (item, item.grad if item.is_leaf else None):
            if isinstance(tensor, DTensor):  # whose own storage is of the global size, and has no memory
                tensor = tensor.to_local()
            if tensor is not None and tensor.device == device:
                storage = tensor.untyped_storage()
                storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def memory(config: EngineConfig, device: torch.device = CPU) -> tuple[float, float, float]:
    """Bytes per parameter of the model that this rank holds on its device between steps, before the optimizer's step,
    and between two microbatches."""
    grid = build_grid(config.parallel, device)
    batch = share(global_batch(config, 0), grid, config.batch.micro_batch_size)
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    before = resident_bytes(device)

    def held() -> float:
        gc.collect()
        return (resident_bytes(device) - before) / parameters(config.model)

    engine = Engine(config, grid)
    built = resident_bytes(device)
    attention_inputs = next(iter(engine.stages.values())).decoder.inputs
    attention_inputs.rotation(config.batch.seq_length, None, device)  # made once a run: no state of a parameter
    before += resident_bytes(device) - built
    engine.train_step(batch, LR)
    between_steps = held()

    inside = []
    after_backward = DataParallel.after_backward

    def watched(self: DataParallel, kind: str, last: bool) -> None:
        after_backward(self, kind, last)
        inside.append(held())

    DataParallel.after_backward = watched  # type: ignore[method-assign]
    engine.pipeline.forward_backward(batch)
    return between_steps, held(), inside[0]


@pytest.mark.parametrize(
    "stage, shard, accumulate",
    sweep(
        [(0, None, False), *itertools.product((1, 2, 3), (4, 2), [False]), (3, 4, True)],
        {(1, 4, False), (2, 2, False), (3, 4, True)},
    ),
)
def test_zero_memory(pool: Pool, stage: int, shard: int | None, accumulate: bool) -> None:
    """fp32: weights 4, gradients 4, Adam's moments 8 bytes a parameter, together the paper's 2 + 2 + K with K = 12:
    its fp32 copy of the weights, here the only one, is part of its K. All three are sharded between steps at every
    stage from 1; stages 1 and 2 hold more inside one."""
    config = tiny(zero_stage=stage, zero_shard_size=shard, accumulate_then_reduce=accumulate)
    n = shard or 1
    whole_weights = 4 if stage in (1, 2) else 0  # gathered once a step, beside the shards
    gradients = 4 if stage == 1 or accumulate else 4 / n  # accumulated whole, until the last microbatch
    if (
        stage in (2, 3) and not accumulate
    ):  # FSDP keeps the input of its last reduce-scatter, the embedding's, until the next one
        model = config.model
        gradients += 4 * model.vocab_size * model.hidden_size / parameters(model)
    for between_steps, before_update, between_microbatches in pool.run_fake(memory, 4, config):
        # 1 %: step counts of AdamW, scalars
        assert between_steps == pytest.approx((4 + 8) / n, rel=0.01)
        assert before_update == pytest.approx((4 + 4 + 8) / n, rel=0.01)
        assert between_microbatches == pytest.approx((4 + 8) / n + whole_weights + gradients, rel=0.01)


def test_memory_is_divided_by_pipeline_and_tensor_parallelism(pool: Pool) -> None:
    config = tiny(pipeline_model_parallel_size=2, tensor_model_parallel_size=2, micro_batch_size=4)
    psi, norms = parameters(config.model), (2 * config.model.num_layers + 1) * config.model.hidden_size
    ranks = [between_steps * psi for between_steps, _, _ in pool.run_fake(memory, 4, config)]
    assert 2 * sum(ranks) == pytest.approx(12 * (psi + norms), rel=0.01)  # every tp rank has all of the norms
    assert max(ranks) - min(ranks) < 12 * parameters_per_layer(config.model)
