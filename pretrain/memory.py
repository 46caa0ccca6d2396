"""What model states take on every pipeline rank, measured beside the formula, and how high memory went."""

import dataclasses
import resource
from typing import Any

import torch
import torch.distributed as dist

from megatron_ext.engine import Engine
from megatron_ext.footprint import ModelStates, deepspeed, one_copy
from megatron_ext.kernels import load_kernels
from megatron_ext.models import Decoder
from megatron_ext.tensor_parallel import TensorParallel, add_adapters
from megatron_ext.tensor_parallel.storage import parameter_shard_dim
from tokenizer.tables import text_table

_PEAKS = {"peak": "peak", "peak_reserved": "peak reserved", "host_peak": "peak on the host"}


def peak_memory(device: torch.device) -> int:
    """Most bytes in use so far: allocated on the GPU, or this process's resident set on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _peak_resident_set()


def _peak_resident_set() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def memory_figures(engine: Engine) -> dict[str, int]:
    """Bytes on pipeline rank R as `memory_stageR_...`: of each figure the largest among the ranks of R.

    States are those of `Engine.model_states`, peaks since the process began. Collective over the world, among the
    hosts alone: no device is waited for.
    """
    grid, zero = engine.grid, engine.config.zero
    mine = dataclasses.asdict(engine.model_states()) | {"peak": peak_memory(grid.device)}
    if grid.device.type == "cuda":
        mine["peak_reserved"] = torch.cuda.max_memory_reserved(grid.device)
        if "cpu" in (zero.offload_optimizer, zero.offload_param):
            mine["host_peak"] = _peak_resident_set()
    largest = torch.zeros(grid.size("pp"), len(mine), dtype=torch.float64)
    largest[grid.rank("pp")] = torch.tensor(list(mine.values()), dtype=torch.float64)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return {
        f"memory_stage{rank}_{name}_bytes": int(value)
        for rank, row in enumerate(largest.tolist())
        for name, value in zip(mine, row, strict=True)
    }


def memory_table(engine: Engine, figures: dict[str, Any]) -> list[str]:
    """Lines that show `memory_figures`, a row for every pipeline rank, and in brackets what the formula says."""
    zero, precision = engine.config.zero, engine.config.precision
    if zero.zero_engine == "torch":
        footprint = one_copy(precision.stored)
    else:
        footprint = deepspeed(precision.compute, zero.zero_stage, zero.offload_optimizer is not None)
    ranks = engine.grid.size("dp_shard")
    states = [field.name for field in dataclasses.fields(ModelStates)]
    peaks = {name: title for name, title in _PEAKS.items() if f"memory_stage0_{name}_bytes" in figures}
    rows = []
    for rank in range(engine.grid.size("pp")):
        elements = _elements(engine, rank)
        expected = footprint.of_rank(elements, zero.zero_stage, ranks)
        measured = ModelStates(*(figures[f"memory_stage{rank}_{name}_bytes"] for name in states))
        rows.append(
            [
                str(rank),
                ", ".join(map(str, engine.layout.on_rank(rank))),
                f"{elements.weights:,.0f}",
                *(
                    f"{_size(getattr(measured, name))} ({_size(getattr(expected, name))})"
                    for name in (*states, "total")
                ),
                *(_size(figures[f"memory_stage{rank}_{name}_bytes"]) for name in peaks),
            ]
        )
    of_each = " + ".join(map(str, dataclasses.astuple(footprint.bytes)))
    peak = "allocated by torch" if engine.grid.device.type == "cuda" else "resident set of the process"
    return [
        f"memory of the fullest rank of each pipeline rank; in brackets by the formula of ZeRO-{zero.zero_stage} with "
        f"N = {ranks}, {of_each} bytes a parameter; peak: {peak}",
        *text_table(["pipeline rank", "stages", "parameters", *states, "total", *peaks.values()], rows).splitlines(),
    ]


def _elements(engine: Engine, pp_rank: int) -> ModelStates:
    """What ZeRO shards at a place of pipeline and tensor parallelism: elements stored, with gradients, and updated.

    Counted in the model's shape, not in what is held. Where tensor parallelism cuts unevenly: the mean.
    """
    config, stored, trained, updated = engine.config, 0.0, 0.0, 0.0
    for index in engine.layout.on_rank(pp_rank):
        with torch.device("meta"):
            stage, kernels = engine.layout.stages[index], load_kernels(config.kernels)
            decoder = Decoder(config.model, stage, TensorParallel(), kernels, config.precision.compute)
            if config.adapters is not None:
                add_adapters(decoder, config.adapters)
        config.trainable.freeze(decoder, config.model.tied)
        for name, param in decoder.named_parameters():
            owner, _, own_name = name.rpartition(".")
            cut = parameter_shard_dim(decoder.get_submodule(owner), own_name) is not None
            part = param.numel() / (engine.grid.size("tp") if cut else 1)
            stored += part
            if param.requires_grad:
                trained += part
                updated += part * (1 - config.trainable.first_row(name) / param.shape[0])
    return ModelStates(stored, trained, updated)


def _size(value: float) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= scale:
            return f"{value / scale:.2f} {unit}"
    return f"{value:.0f} bytes"
