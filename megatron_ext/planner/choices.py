"""Every layout that can run of a model on a cluster."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

from megatron_ext.engine import EngineConfig, RecomputeConfig, require_split_backward
from megatron_ext.errors import RequestError
from megatron_ext.pipeline import SCHEDULES, PipelineConfig, plan_stages
from megatron_ext.pipeline.schedules import DEFAULT
from megatron_ext.planner.cluster import Cluster

_MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
_CHUNKS = (1, 2, 3, 4, 6, 8)
_SCHEDULES = tuple(name for name, schedule in SCHEDULES.items() if schedule.searched)


@dataclasses.dataclass(frozen=True)
class Choice:
    """A point of the search. chunks: stages on every pipeline rank."""

    tp: int
    pp: int
    sequence_parallel: bool
    zero: int
    schedule: str
    chunks: int
    micro_batch: int
    recompute: str | None


def choices(base: EngineConfig, cluster: Cluster, allowed: dict[str, tuple[Any, ...]]) -> Iterator[Choice]:
    """All that can run. base: with the global batch size. allowed: by field of Choice, the only values looked at."""
    size = base.batch.global_batch_size
    assert size is not None
    for tp, pp in _degrees(base, cluster, allowed):
        dp = cluster.gpus // (tp * pp)
        if dp % (base.parallel.zero_shard_size or 1):
            continue
        sizes = [n for n in allowed.get("micro_batch", _MICRO_BATCHES) if size % (n * dp) == 0]
        zeros = [
            zero
            for zero in allowed.get("zero", (1, 2, 3) if dp > 1 else (1,))
            if _accepts(
                dataclasses.replace(base.zero, zero_stage=zero).validate_torch,
                base.model,
                tp,
                base.parallel.zero_shard_size or dp,
            )
        ]
        for schedule, chunks in _schedules(base, pp, allowed):
            if (
                tp > 1
                and pp > 1
                and SCHEDULES[schedule].splits_backward
                and not _accepts(require_split_backward, schedule)
            ):
                continue
            for micro_batch in sizes:
                config = configured(base, Choice(tp, pp, False, 1, schedule, chunks, micro_batch, None))
                if not _accepts(plan_stages, config.pipeline, config.model, pp, size // (micro_batch * dp)):
                    continue
                for sliced, zero, recompute in itertools.product(
                    _slicings(base, tp, allowed), zeros, allowed.get("recompute", (None, "selective", "full"))
                ):
                    yield Choice(tp, pp, sliced, zero, schedule, chunks, micro_batch, recompute)


def configured(base: EngineConfig, choice: Choice) -> EngineConfig:
    """`base` in this layout."""
    free = choice.pp > 1 and SCHEDULES[choice.schedule].stages_per_rank is None
    return dataclasses.replace(
        base,
        batch=dataclasses.replace(base.batch, micro_batch_size=choice.micro_batch),
        parallel=dataclasses.replace(
            base.parallel,
            tensor_model_parallel_size=choice.tp,
            pipeline_model_parallel_size=choice.pp,
            sequence_parallel=choice.sequence_parallel,
        ),
        pipeline=PipelineConfig(
            choice.schedule if choice.pp > 1 else None,
            choice.chunks if free else None,
            base.pipeline.pipeline_layers if choice.pp > 1 else None,
        ),
        zero=dataclasses.replace(base.zero, zero_stage=choice.zero),
        recompute=RecomputeConfig(choice.recompute),
    )


def choice_of(config: EngineConfig) -> Choice:
    """The layout of a configuration as a point of the search."""
    parallel, pipeline = config.parallel, config.pipeline
    schedule = "none" if parallel.pipeline_model_parallel_size == 1 else pipeline.pipeline_schedule or DEFAULT
    kind = SCHEDULES.get(schedule)
    chunks = 1 if kind is None else kind.stages_per_rank or pipeline.num_virtual_stages_per_pipeline_rank or 1
    return Choice(
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.sequence_parallel,
        config.zero.zero_stage,
        schedule,
        chunks,
        config.batch.micro_batch_size,
        config.recompute.recompute_granularity,
    )


def _degrees(base: EngineConfig, cluster: Cluster, allowed: dict[str, tuple[Any, ...]]) -> Iterator[tuple[int, int]]:
    """TP stays within a node, and nodes hold whole groups of it."""
    model = base.model
    node = min(cluster.gpus, cluster.gpus_per_node)
    for tp in allowed.get("tp", _divisors(node)):
        if cluster.gpus % tp or not _accepts(model.validate_tensor_parallel, tp, False, base.batch.seq_length):
            continue
        for pp in allowed.get("pp", _divisors(cluster.gpus // tp)):
            if pp <= model.num_layers and cluster.gpus % (tp * pp) == 0:
                yield tp, pp


def _slicings(base: EngineConfig, tp: int, allowed: dict[str, tuple[Any, ...]]) -> tuple[bool, ...]:
    """Sequence parallelism wherever it can be: it costs no more messages, and less memory."""
    can = tp > 1 and base.batch.seq_length % tp == 0
    return tuple(value for value in allowed.get("sequence_parallel", (can,)) if can or not value)


def _schedules(base: EngineConfig, pp: int, allowed: dict[str, tuple[Any, ...]]) -> Iterator[tuple[str, int]]:
    if pp == 1:
        if base.pipeline.pipeline_layers is None:
            yield "none", 1
        return
    for schedule in allowed.get("schedule", _SCHEDULES):
        fixed, least = SCHEDULES[schedule].stages_per_rank, SCHEDULES[schedule].least_stages
        options = (fixed,) if fixed else tuple(n for n in allowed.get("chunks", _CHUNKS) if n >= least)
        for chunks in options:
            if pp * chunks <= base.model.num_layers:
                yield schedule, chunks


def _divisors(n: int) -> tuple[int, ...]:
    return tuple(d for d in range(1, n + 1) if n % d == 0)


def _accepts(check: Callable[..., Any], *arguments: Any) -> bool:
    try:
        check(*arguments)
    except RequestError:
        return False
    return True
