"""What model states take on every pipeline rank, measured beside what was predicted, and how high memory went."""

import dataclasses
import resource
from typing import Any

import torch
import torch.distributed as dist

from megatron_ext.engine import Engine
from megatron_ext.footprint import ModelStates
from megatron_ext.planner.states import fullest_states, pp_rank_elements
from tokenizer.output import text_table

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
    """Lines that show `memory_figures`, a row for every pipeline rank, and in brackets what the planner predicts."""
    config, world_size = engine.config, engine.grid.world_size
    states = [field.name for field in dataclasses.fields(ModelStates)]
    peaks = {name: title for name, title in _PEAKS.items() if f"memory_stage0_{name}_bytes" in figures}
    rows = []
    for rank in range(engine.grid.size("pp")):
        elements = pp_rank_elements(config, world_size, rank)
        expected = fullest_states(config, world_size, rank)
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
    peak = "allocated by torch" if engine.grid.device.type == "cuda" else "resident set of the process"
    return [
        f"memory of the fullest rank of each pipeline rank; in brackets as predicted for {config.zero.describe} over "
        f"{engine.grid.size('dp_shard')} ranks; peak: {peak}",
        *text_table(["pipeline rank", "stages", "parameters", *states, "total", *peaks.values()], rows).splitlines(),
    ]


def _size(value: float) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= scale:
            return f"{value / scale:.2f} {unit}"
    return f"{value:.0f} bytes"
