"""Which layers stand on which stage, and which stages on which rank."""

import dataclasses
import functools

from megatron_ext.errors import RequestError
from megatron_ext.models import ModelConfig, StageSpec
from megatron_ext.models.count import matmul_parameters_per_layer, parameters_per_layer
from megatron_ext.option import flag_of, option
from megatron_ext.pipeline.schedules import DEFAULT, SCHEDULES, Schedule


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    pipeline_schedule: str | None = option(
        None, f"order of the microbatches (default: {DEFAULT})", choices=tuple(SCHEDULES)
    )
    num_virtual_stages_per_pipeline_rank: int | None = option(
        None, "model chunks on every rank (interleaved: 2 by default; zero-bubble: 1)"
    )
    pipeline_layers: tuple[int, ...] | None = option(
        None, "layers of every stage in order, such as 22,21,21 (default: balanced, head and embedding counted)"
    )


@dataclasses.dataclass(frozen=True)
class StageLayout:
    """The cut of the model. `stages[i]` is stage i of the whole pipeline; `rank_of[i]` the pp rank that runs it."""

    schedule: str
    stages: tuple[StageSpec, ...]
    rank_of: tuple[int, ...]

    @property
    def order(self) -> Schedule:
        """What its schedule is; of a single stage, which has none, 1F1B: forward and backward by turns."""
        return SCHEDULES.get(self.schedule, SCHEDULES["1f1b"])

    def on_rank(self, pp_rank: int) -> list[int]:
        return [i for i, rank in enumerate(self.rank_of) if rank == pp_rank]


def plan_stages(config: PipelineConfig, model: ModelConfig, pp: int, n_microbatches: int) -> StageLayout:
    """The layout that `config` asks for. Raises RequestError where it cannot be."""
    if pp == 1:
        for name in ("pipeline_schedule", "num_virtual_stages_per_pipeline_rank", "pipeline_layers"):
            if getattr(config, name) is not None:
                raise RequestError(f"{flag_of(name)} needs --pipeline-model-parallel-size of at least 2")
        return StageLayout("none", (StageSpec(0, model.num_layers, True, True),), (0,))
    schedule = config.pipeline_schedule or DEFAULT
    per_rank = stages_per_rank(schedule, config.num_virtual_stages_per_pipeline_rank)
    num_stages = pp * per_rank
    if num_stages > model.num_layers:
        raise RequestError(
            f"--pipeline-model-parallel-size {pp} x {per_rank} stages per rank = {num_stages} stages for "
            f"--num-layers {model.num_layers}: every stage needs a layer"
        )
    counts = config.pipeline_layers or balanced_layers(model, num_stages)
    if len(counts) != num_stages:
        raise RequestError(
            f"--pipeline-layers {_list(counts)} names {len(counts)} stages, but PP {pp} x {per_rank} per rank makes "
            f"{num_stages}"
        )
    if min(counts) < 1 or sum(counts) != model.num_layers:
        raise RequestError(
            f"--pipeline-layers {_list(counts)} sums to {sum(counts)}, but --num-layers is {model.num_layers} "
            "(and every stage needs at least one)"
        )
    if wrong := SCHEDULES[schedule].lacks(pp, num_stages, n_microbatches):
        hint = "raise --global-batch-size or lower --micro-batch-size"
        raise RequestError(f"--pipeline-schedule {schedule} {wrong}; {hint}")
    firsts = [sum(counts[:i]) for i in range(num_stages)]
    stages = tuple(
        StageSpec(first, first + count, i == 0, i == num_stages - 1)
        for i, (first, count) in enumerate(zip(firsts, counts, strict=True))
    )
    if SCHEDULES[schedule].v_shaped:
        rank_of = (*range(pp), *reversed(range(pp)))
    else:
        rank_of = tuple(i % pp for i in range(num_stages))
    return StageLayout(schedule, stages, rank_of)


def stages_per_rank(schedule: str, asked: int | None) -> int:
    """Stages on every rank. asked: by --num-virtual-stages-per-pipeline-rank. Raises RequestError."""
    fixed, least = SCHEDULES[schedule].stages_per_rank, SCHEDULES[schedule].least_stages
    if fixed is not None:
        if asked not in (None, fixed):
            raise RequestError(
                f"--num-virtual-stages-per-pipeline-rank {asked}: --pipeline-schedule {schedule} always has {fixed}"
            )
        return fixed
    per_rank = least if asked is None else asked
    if per_rank < least:
        raise RequestError(
            f"--num-virtual-stages-per-pipeline-rank {per_rank}: --pipeline-schedule {schedule} needs at least {least}"
        )
    return per_rank


@functools.lru_cache(maxsize=256)
def balanced_layers(model: ModelConfig, num_stages: int) -> tuple[int, ...]:
    """Layers per stage such that the slowest stage is as fast as can be.

    Layers are handed out one by one to the stage that would be lightest with one more: by matrix products first,
    where the head counts for what it costs, then by parameters, where the embedding counts too.
    """
    vocabulary = model.vocab_size * model.hidden_size
    compute_layer, memory_layer = matmul_parameters_per_layer(model), parameters_per_layer(model)
    counts = [1] * num_stages

    def load_with_one_more(stage: int) -> tuple[int, int, int]:
        head = vocabulary if stage == num_stages - 1 else 0
        embedding = vocabulary if stage == 0 else 0
        layers = counts[stage] + 1
        return head + layers * compute_layer, head + embedding + layers * memory_layer, stage

    for _ in range(model.num_layers - num_stages):
        counts[min(range(num_stages), key=load_with_one_more)] += 1
    return tuple(counts)


def _list(counts: tuple[int, ...]) -> str:
    return ",".join(map(str, counts))
