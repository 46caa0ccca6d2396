"""`--dry-run`: one process is one rank after the other, of every pipeline rank, and builds what that rank would.

Nothing is sent, written, or given memory: parameters have shapes alone. What the built ranks would hold from step to
step must be what the planner predicts, to the byte; what a step needs beside it is the planner's word.
"""

import contextlib
import dataclasses
import os
from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from megatron_ext.engine import Engine, EngineConfig
from megatron_ext.errors import RequestError
from megatron_ext.fake_world import destroy_fake_world, init_fake_world
from megatron_ext.footprint import ModelStates, nbytes
from megatron_ext.mesh import ProcessGrid, build_grid
from megatron_ext.models import StageSpec, parameter_shapes
from megatron_ext.models.names import EMBEDDING
from megatron_ext.pipeline import StageLayout
from megatron_ext.planner.memory import RankMemory, pipeline_memory
from megatron_ext.planner.states import pp_rank_elements, rank_states, stage_layout
from megatron_ext.torch_private import compute_local_shape_and_global_offset
from megatron_ext.zero import ZeroConfig
from pretrain.config import RunConfig
from pretrain.describe import describe
from pretrain.validate import devices
from tokenizer.output import text_table

_STATES = tuple(field.name for field in dataclasses.fields(ModelStates))
_BESIDE = ("working", "activations", "head", "buffers", "total")
Shapes = dict[str, torch.Size]


def dry_run(config: RunConfig) -> None:
    """Build every pipeline rank of a validated run, and print what was found.

    Raises RuntimeError where what was built is not the model, or does not hold what is predicted. Of several
    processes the first works, for all of them would find the same.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    world_size = config.dry.ranks
    resolved = config.engine.validate(world_size)
    shapes = parameter_shapes(resolved.model, resolved.adapters)
    ranks = ranks_to_build(resolved, world_size)
    built = [build_rank(resolved, world_size, rank, shapes) for rank in tqdm(ranks, unit="rank", leave=False, delay=2)]
    pp = resolved.parallel.pipeline_model_parallel_size
    check_names(built[:: len(built) // pp], shapes)

    with _fake_grid(resolved, world_size, 0) as grid:
        attention = resolved.attention(*devices(config), documents=config.data.reset_attention_mask)
        introduction = describe(resolved, grid, attention)
    memory = pipeline_memory(resolved, world_size)
    parameters = [pp_rank_elements(resolved, world_size, pp_rank).weights for pp_rank in range(pp)]
    most = max(of_rank.total for of_rank in memory)
    lines = (
        *introduction,
        *table(stage_layout(resolved, world_size), parameters, memory),
        *remarks(config, len(built), most),
    )
    print(f"dry run of {world_size} {'rank' if world_size == 1 else 'ranks'}: nothing is sent, written or trained")
    for line in lines:
        print(f" {line}")


def ranks_to_build(config: EngineConfig, world_size: int) -> list[int]:
    """The first rank of every pipeline rank; and the last one of its tensor-parallel group, if that holds less."""
    tp, pp = config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size
    places = (0, tp - 1) if config.model.vocab_size % tp else (0,)
    return [pp_rank * (world_size // pp) + place for pp_rank in range(pp) for place in places]


@contextlib.contextmanager
def _fake_grid(config: EngineConfig, world_size: int, rank: int) -> Iterator[ProcessGrid]:
    device = init_fake_world(rank, world_size)
    try:
        yield build_grid(config.parallel, device)
    finally:
        destroy_fake_world()


def build_rank(config: EngineConfig, world_size: int, rank: int, shapes: Shapes) -> set[str]:
    """Build the engine of one rank (stages, cut and sharded, their schedule and their optimizer), and check it.

    shapes: of the whole model. Returns the names of the rank's parameters, without copies of another rank's.
    """
    with _fake_grid(config, world_size, rank) as grid:
        engine = Engine(_without_host(config), grid)
        check_shapes(engine, shapes)
        if config.zero.zero_engine == "torch":
            check_states(engine, rank_states(config, world_size, rank))
        return set(engine.parameters) - engine.copies()


def _without_host(config: EngineConfig) -> EngineConfig:
    """What can be built where there is nothing: with states on the device, which are as large there as on the host.

    DeepSpeed shards when it starts, with all ranks; up to there its ranks are as without ZeRO.
    """
    zero = dataclasses.replace(config.zero, offload_optimizer=None)
    return dataclasses.replace(config, zero=zero if zero.zero_engine == "torch" else ZeroConfig(zero_stage=0))


def check_shapes(engine: Engine, shapes: Shapes) -> None:
    """Raise RuntimeError where a parameter is not the model's, or the rank's part of it not what its placement says."""
    for name, param in engine.parameters.items():
        shape = shapes.get(EMBEDDING if param is engine.tied.copy else name)
        if param.shape != shape:
            raise RuntimeError(f"{name} was built as {tuple(param.shape)}, the model has {shape and tuple(shape)}")
        assert isinstance(param, DTensor)
        local = param.to_local()
        expected, _ = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
        if local.shape != torch.Size(expected):
            raise RuntimeError(f"{name} is cut to {tuple(local.shape)}, its placement says {tuple(expected)}")


def check_states(engine: Engine, predicted: ModelStates) -> None:
    """Raise RuntimeError where the rank would not hold what is predicted, to the byte."""
    # before the first step there are no gradients; they are cut and padded as their weights are
    gradients = nbytes(p for p in engine.parameters.values() if p.requires_grad)
    states = dataclasses.replace(engine.model_states(), gradients=gradients)
    if states != predicted:
        raise RuntimeError(f"rank {engine.grid.mesh.get_rank()} holds {states}, predicted is {predicted}")


def check_names(pp_ranks: Sequence[set[str]], shapes: Shapes) -> None:
    """Raise RuntimeError unless every parameter of the model stands on one pipeline rank. pp_ranks: names on each."""
    found = Counter(name for names in pp_ranks for name in names)
    wrong = [name for name in shapes if found[name] != 1]
    if wrong:
        raise RuntimeError(f"{wrong[0]} stands on {found[wrong[0]]} pipeline ranks; {len(wrong)} parameters not on one")


def table(layout: StageLayout, parameters: Sequence[float], memory: Sequence[RankMemory]) -> list[str]:
    """A row for every pipeline rank: what stands there, and the memory of its fullest rank in GiB.

    parameters: of a rank, before ZeRO. Both by pipeline rank.
    """
    rows = []
    for pp_rank, of_rank in enumerate(memory):
        stages = layout.on_rank(pp_rank)
        sizes = [getattr(of_rank.states, name) for name in _STATES] + [getattr(of_rank, name) for name in _BESIDE]
        rows.append(
            [
                str(pp_rank),
                ", ".join(map(str, stages)),
                ", ".join(_contents(layout.stages[stage]) for stage in stages),
                f"{parameters[pp_rank]:,.0f}",
                *(f"{size / 2**30:.2f}" for size in sizes),
            ]
        )
    title = "GiB on the fullest rank of each pipeline rank, predicted"
    if layout.schedule != "none":
        title = f"{layout.schedule}; {title}"
    offloaded = max(of_rank.offloaded for of_rank in memory)
    if offloaded:
        title += f"; up to {offloaded / 2**30:.2f} of the states are on the host or on disks, and not in the total"
    return [f"{title}:", *text_table(["rank", "stages", "layers", "parameters", *_STATES, *_BESIDE], rows).splitlines()]


def _contents(stage: StageSpec) -> str:
    layers = f"{stage.first}-{stage.last - 1}" if stage.last - stage.first > 1 else str(stage.first)
    return "embedding, " * stage.has_embedding + layers + ", head" * stage.has_head


def remarks(config: RunConfig, n_built: int, most: float) -> list[str]:
    """What was checked and what was not; whether `most`, the fullest rank's bytes, fits, if there is a GPU to ask."""
    if config.engine.zero.zero_engine == "torch":
        checked = f"built {n_built} of the ranks: shapes and cuts are right, states as predicted to the byte"
    else:
        checked = f"built {n_built} of the ranks without ZeRO, shapes and cuts are right; DeepSpeed's states by formula"
    lines = [checked]
    if not config.data.data_path:
        lines.append("data: not given, not checked")
    if not torch.cuda.is_available():
        try:
            config.engine.attention(torch.device("cpu"))
        except RequestError:
            backend = config.engine.kernels.attention_backend
            lines.append(f"--attention-backend {backend}: not checked, there is no CUDA device here")
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        fits = "fits into" if most <= gpu.total_memory else "does not fit into"
        lines.append(f"{most / 2**30:.2f} GiB {fits} this machine's {gpu.name} of {gpu.total_memory / 2**30:.2f} GiB")
    return lines
