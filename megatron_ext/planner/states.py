"""What a rank holds of the model from step to step: counted in shapes, without building more than one layer.

Shapes are cut as `tensor_parallel.storage` and `zero.sharding` cut them: chunks of ceil(n / ranks), of which the last
ones may be smaller or empty. FSDP pads every shard to the size of the first, in weights and gradients; the optimizer
keeps what its algorithm declares of what is not padding, where there is something, and a step count of its own.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterator

import torch

from megatron_ext.engine import EngineConfig
from megatron_ext.footprint import ModelStates, deepspeed
from megatron_ext.kernels import KernelConfig, load_kernels
from megatron_ext.models import Decoder, ModelConfig, StageSpec
from megatron_ext.models.names import EMBEDDING, HEAD
from megatron_ext.optim import TrainableConfig, algorithm_named
from megatron_ext.pipeline import StageLayout, plan_stages
from megatron_ext.tensor_parallel import LoraConfig, TensorParallel, add_adapters, tp_shard_range
from megatron_ext.tensor_parallel.storage import parameter_shard_dim

_STEP_COUNT = torch.float32.itemsize


@dataclasses.dataclass(frozen=True)
class Coordinate:
    """Where a rank stands in the grid; see `mesh`."""

    pp: int
    shard: int
    tp: int


@dataclasses.dataclass(frozen=True)
class ParameterKind:
    """A parameter's global shape and what happens to it: the dimension that TP cuts (None: none of them), and from
    which row on it is trained (None: not at all)."""

    shape: tuple[int, ...]
    tp_dim: int | None
    first_row: int | None

    def of_tp_rank(self, tp: int, rank: int) -> tuple[list[int], int]:
        """This rank's shape, and how many of its rows are not trained."""
        shape, skipped = list(self.shape), self.first_row or 0
        if self.tp_dim is not None:
            start, stop = tp_shard_range(shape[self.tp_dim], tp, rank)
            shape[self.tp_dim] = stop - start
            if self.tp_dim == 0:
                skipped = min(max(skipped - start, 0), stop - start)
        return shape, skipped


def stage_layout(config: EngineConfig, world_size: int) -> StageLayout:
    """The stages of a validated configuration."""
    microbatches = config.batch.microbatches(config.parallel.data_parallel_size(world_size))
    return _layout(config.pipeline, config.model, config.parallel.pipeline_model_parallel_size, microbatches)


_layout = functools.lru_cache(maxsize=1024)(plan_stages)


def shards(config: EngineConfig, world_size: int) -> int:
    """Ranks that ZeRO shards over."""
    return config.parallel.zero_shard_size or config.parallel.data_parallel_size(world_size)


def is_sharded(config: EngineConfig, world_size: int) -> bool:
    """Whether there are shards at all: as `DataParallel` decides it."""
    zero = config.zero
    return zero.zero_stage > 0 and (zero.offload_optimizer is not None or shards(config, world_size) > 1)


def rank_states(config: EngineConfig, world_size: int, rank: int) -> ModelStates:
    """Bytes of weights, gradients and optimizer states on a rank, as `Engine.model_states` finds them after a step.

    config: validated. Exact for FSDP2. DeepSpeed's are those of `footprint.deepspeed`: without the padding of its
    flat partitions, the parameters that stage 3 keeps whole, and what the ranks where two parameters' shards meet
    hold twice.
    """
    tp, n = config.parallel.tensor_model_parallel_size, shards(config, world_size)
    dp = config.parallel.data_parallel_size(world_size)
    return states_at(config, world_size, Coordinate(rank // (dp * tp), rank // tp % dp % n, rank % tp))


def fullest_states(config: EngineConfig, world_size: int, pp_rank: int) -> ModelStates:
    """The most that any rank of this pipeline rank holds, of each of the three."""
    coordinates = [Coordinate(pp_rank, 0, 0)]  # has the largest chunk of everything
    if config.trainable.train_only == "new-rows":  # which stand on the last ranks
        tp = config.parallel.tensor_model_parallel_size
        coordinates = [Coordinate(pp_rank, s, t) for s in range(shards(config, world_size)) for t in range(tp)]
    found = [states_at(config, world_size, at) for at in coordinates]
    return ModelStates(*(max(values) for values in zip(*map(dataclasses.astuple, found), strict=True)))


def states_at(config: EngineConfig, world_size: int, at: Coordinate) -> ModelStates:
    """`rank_states` by coordinate."""
    cuts = pp_rank_parameters(config, world_size, at.pp)
    tp, n = config.parallel.tensor_model_parallel_size, shards(config, world_size)
    sharded = is_sharded(config, world_size)
    if config.zero.zero_engine == "deepspeed":
        stage, offload = config.zero.zero_stage, config.zero.offload_optimizer is not None
        footprint = deepspeed(config.precision.compute, stage, offload)
        return footprint.of_rank(pp_rank_elements(config, world_size, at.pp), stage, n)
    weights, gradients, kept = 0, 0, _STEP_COUNT
    for cut, count in cuts.items():
        shape, skipped = cut.of_tp_rank(tp, at.tp)
        dim = 1 if tp > 1 and cut.tp_dim == 0 and len(shape) == 2 else 0  # as in zero.sharding
        whole, rest = shape[dim], _product(shape) // max(shape[dim], 1)
        start, stop = tp_shard_range(whole, n, at.shard) if sharded else (0, whole)
        stored = count * rest * (-(-whole // n) if sharded else whole)
        weights += stored
        if cut.first_row is None:
            continue
        gradients += stored
        if dim == 0:
            updated = max(stop - max(start, skipped), 0) * rest
        else:
            updated = (stop - start) * (rest - skipped)
        kept += count * _kept(config.optimizer.optimizer, updated, config.precision.stored)
    size = config.precision.stored.itemsize
    return ModelStates(weights * size, gradients * size, kept)


@functools.lru_cache(maxsize=4096)
def _kept(optimizer: str, elements: int, stored: torch.dtype) -> int:
    """Bytes that the optimizer keeps of so many elements of a parameter."""
    declared = algorithm_named(optimizer).declare(torch.Size([elements]), stored) if elements else {}
    return sum(spec.nbytes for spec in declared.values())


def pp_rank_elements(config: EngineConfig, world_size: int, pp_rank: int) -> ModelStates:
    """What ZeRO shards on a rank of both pipeline and TP: elements stored, with gradients, and updated.

    Where tensor parallelism cuts unevenly: the mean.
    """
    stored, trained, updated = 0.0, 0.0, 0.0
    for cut, count in pp_rank_parameters(config, world_size, pp_rank).items():
        part = count * _product(cut.shape) / (1 if cut.tp_dim is None else config.parallel.tensor_model_parallel_size)
        stored += part
        if cut.first_row is not None:
            trained += part
            updated += part * (1 - cut.first_row / cut.shape[0])
    return ModelStates(stored, trained, updated)


def pp_rank_parameters(config: EngineConfig, world_size: int, pp_rank: int) -> Counter[ParameterKind]:
    """How many parameters of each kind stand on a pipeline rank."""
    layout = stage_layout(config, world_size)
    total: Counter[ParameterKind] = Counter()
    for index in layout.on_rank(pp_rank):
        total += stage_parameters(config, layout.stages[index])
    return total


def canonical_stage(config: EngineConfig, stage: StageSpec) -> StageSpec:
    """A stage with the same parameters, equal for all such stages: what is counted for one is true of all."""
    if config.trainable.tells_layers_apart:
        return stage
    return StageSpec(0, stage.last - stage.first, stage.has_embedding, stage.has_head)


def stage_parameters(config: EngineConfig, stage: StageSpec) -> Counter[ParameterKind]:
    """How many parameters of each kind stand on a stage. Not to be changed: it is shared."""
    tp = config.parallel.tensor_model_parallel_size
    return _stage_parameters(config.model, config.adapters, config.trainable, tp, stage)


def local_elements(config: EngineConfig, cuts: Counter[ParameterKind]) -> tuple[int, int]:
    """Elements of these parameters on the first rank of tensor parallelism: all, and those that get a gradient."""
    tp = config.parallel.tensor_model_parallel_size
    sizes = [(cut, count * _product(cut.of_tp_rank(tp, 0)[0])) for cut, count in cuts.items()]
    return sum(n for _, n in sizes), sum(n for cut, n in sizes if cut.first_row is not None)


@functools.lru_cache(maxsize=4096)
def _stage_parameters(
    model: ModelConfig, adapters: LoraConfig | None, trainable: TrainableConfig, tp: int, stage: StageSpec
) -> Counter[ParameterKind]:
    found: Counter[ParameterKind] = Counter()
    for name, shape, tp_dim in _parameters(model, adapters, tp, stage):
        global_name = EMBEDDING if model.tied and name == HEAD else name
        found[ParameterKind(shape, tp_dim, trainable.first_row(name) if trainable.trains(global_name) else None)] += 1
    return found


def _parameters(
    model: ModelConfig, adapters: LoraConfig | None, tp: int, stage: StageSpec
) -> Iterator[tuple[str, tuple[int, ...], int | None]]:
    """Name, global shape and TP's dimension of every parameter of a stage."""
    first, rest = "layers.0.", _one_of_each(dataclasses.replace(model, num_layers=1), adapters, tp)
    tied_here = model.tied and stage.has_embedding and stage.has_head
    for name, shape, tp_dim in rest:
        if name.startswith(first):
            for layer in range(stage.first, stage.last):
                yield f"layers.{layer}.{name.removeprefix(first)}", shape, tp_dim
        elif (stage.has_embedding if name.startswith("embed_") else stage.has_head) and not (
            tied_here and name == HEAD
        ):
            yield name, shape, tp_dim


@functools.lru_cache(maxsize=256)
def _one_of_each(
    one_layer: ModelConfig, adapters: LoraConfig | None, tp: int
) -> tuple[tuple[str, tuple[int, ...], int | None], ...]:
    """Of the parameters of a layer, of the embedding and of an untied head."""
    untied = dataclasses.replace(one_layer, untie_embeddings_and_output_weights=True)
    with torch.device("meta"):
        stage = StageSpec(0, 1, has_embedding=True, has_head=True)
        decoder = Decoder(untied, stage, TensorParallel(tp), load_kernels(KernelConfig()), torch.float32)
        if adapters is not None:
            add_adapters(decoder, adapters)
    found = []
    for name, param in decoder.named_parameters():
        owner, _, own_name = name.rpartition(".")
        tp_dim = parameter_shard_dim(decoder.get_submodule(owner), own_name) if tp > 1 else None
        found.append((name, tuple(param.shape), tp_dim))
    return tuple(found)


def _product(shape: list[int] | tuple[int, ...]) -> int:
    return functools.reduce(int.__mul__, shape, 1)
