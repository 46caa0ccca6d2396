"""How long an optimizer step takes, and where the time goes."""

import dataclasses
from collections.abc import Sequence

from megatron_ext.engine import EngineConfig
from megatron_ext.errors import RequestError
from megatron_ext.pipeline import SCHEDULES, StageLayout
from megatron_ext.planner.cluster import Cluster
from megatron_ext.planner.data_parallel import GradientTraffic, gradient_traffic
from megatron_ext.planner.layer import Microbatch, PassTimes, Seconds, plus, stage_times
from megatron_ext.planner.program import Program
from megatron_ext.planner.states import layout_of, local_elements, stage_parameters
from megatron_ext.planner.timeline import StageTimes, Timeline, simulate

_HALF = 2


@dataclasses.dataclass(frozen=True)
class StepTime:
    """A step of the rank that computes longest. parts: seconds by what they go to; they sum up to `seconds`."""

    seconds: float
    parts: dict[str, float]
    timeline: Timeline


@dataclasses.dataclass(frozen=True)
class _Stage:
    """A stage's seconds for a microbatch, by pass, and with its messages.

    forward, inputs, weights: as the pipeline waits for them. once: messages of a step that nothing hides. beside:
    data parallelism's messages in every microbatch, as far as they take longer than what hides them.
    """

    passes: PassTimes
    forward: float
    inputs: float
    weights: float
    once: float
    beside: float
    hand_over: float

    @property
    def whole(self) -> float:
        return self.forward + self.inputs + self.weights


def _stage(passes: PassTimes, traffic: GradientTraffic, program: Program, hand_over: float) -> _Stage:
    forward, inputs, weights = passes.forward.total, plus(passes.inputs, passes.again).total, passes.weights.total
    beside_forward = _not_hidden(traffic.each_forward, forward, program)
    beside_backward = _not_hidden(traffic.each_backward, inputs + weights, program)
    return _Stage(
        passes,
        forward + beside_forward + hand_over,
        inputs + beside_backward + hand_over,
        weights,
        once=_not_hidden(traffic.first_forward, forward, program)
        + _not_hidden(traffic.last_backward, inputs + weights, program)
        + traffic.end,
        beside=beside_forward + beside_backward,
        hand_over=hand_over,
    )


def _not_hidden(message: float, work: float, program: Program) -> float:
    """What a message adds to the work it travels under: it takes some of its bandwidth, and may take longer."""
    hidden = min(message * program.hidden_share, work)
    return message - hidden


def microbatch_of(config: EngineConfig) -> Microbatch:
    train_only = config.trainable.train_only
    return Microbatch(
        config.model,
        config.batch.micro_batch_size,
        config.batch.seq_length,
        config.parallel.tensor_model_parallel_size,
        config.parallel.sequence_parallel,
        config.recompute.recompute_granularity,
        trains_layers=train_only not in ("embeddings", "new-rows", "lora"),
    )


def step_time(config: EngineConfig, cluster: Cluster, program: Program) -> StepTime:
    """config: validated for `cluster.gpus` ranks. Raises RequestError where the time depends on a host or a disk."""
    if config.zero.offload_optimizer is not None or config.zero.offload_param is not None:
        raise RequestError("--offload-optimizer, --offload-param: how fast hosts and disks are is not in the planner")
    layout = layout_of(config, cluster.gpus)
    dp = config.parallel.data_parallel_size(cluster.gpus)
    microbatches = config.batch.microbatches(dp)
    stages = _stages(config, layout, cluster, program)
    times = [StageTimes(stage.forward, stage.inputs, stage.weights) for stage in stages]
    timeline = simulate(layout, microbatches, times, _send(config, cluster, program))
    slowest = max(range(len(timeline.busy)), key=timeline.busy.__getitem__)
    mine = [stages[i] for i in layout.on_rank(slowest)]
    gradients = max(sum(stages[i].once for i in layout.on_rank(r)) for r in range(len(timeline.busy)))
    update = max(_update(config, layout.on_rank(r), layout, cluster, program) for r in range(len(timeline.busy)))
    fixed = cluster.gpu.measured.step_ms * 1e-3
    parts = _parts(mine, microbatches) | {
        "pipeline bubble": timeline.seconds - timeline.busy[slowest],
        "gradients and weights, once": gradients,
        "update": update + fixed,
    }
    return StepTime(timeline.seconds + gradients + update + fixed, parts, timeline)


def least_time(config: EngineConfig, cluster: Cluster, program: Program) -> float:
    """Seconds that a step takes at least: every rank's own work, and what it waits for at both ends of the step."""
    layout = layout_of(config, cluster.gpus)
    microbatches = config.batch.microbatches(config.parallel.data_parallel_size(cluster.gpus))
    stages = _stages(config, layout, cluster, program)
    splits = layout.schedule in SCHEDULES and SCHEDULES[layout.schedule].splits_backward
    least, waits = 0.0, 0.0
    for rank in range(max(layout.rank_of) + 1):
        least = max(least, waits + microbatches * sum(stages[i].whole for i in layout.on_rank(rank)))
        # the first microbatch comes through the stages before, and the last gradient goes back through them; where
        # backward passes are split, weights' halves fill the latter wait
        waits += stages[rank].forward + (0.0 if splits else stages[rank].inputs + stages[rank].weights)
    return least


def _stages(config: EngineConfig, layout: StageLayout, cluster: Cluster, program: Program) -> list[_Stage]:
    batch, built = microbatch_of(config), dict[tuple[int, bool, bool], _Stage]()
    hand_over = cluster.gpu.measured.hand_over_us * 1e-6 if max(layout.rank_of) > 0 else 0.0
    stages = []
    for spec in layout.stages:
        kind = (spec.last - spec.first, spec.has_embedding, spec.has_head)
        if kind not in built:
            traffic = gradient_traffic(
                config, cluster, program, *local_elements(config, stage_parameters(config, spec))
            )
            built[kind] = _stage(stage_times(batch, *kind, cluster, program), traffic, program, hand_over)
        stages.append(built[kind])
    return stages


def _send(config: EngineConfig, cluster: Cluster, program: Program) -> float:
    """Seconds that the hidden states of a microbatch travel to the next rank of the pipeline."""
    batch, tp = config.batch, config.parallel.tensor_model_parallel_size
    payload = _HALF * batch.micro_batch_size * batch.seq_length * config.model.hidden_size
    cut = config.parallel.sequence_parallel or program.sends_slices
    return cluster.send(payload / (tp if cut else 1))


def _update(
    config: EngineConfig, indices: Sequence[int], layout: StageLayout, cluster: Cluster, program: Program
) -> float:
    """Seconds of the optimizer's step on a rank."""
    trained = sum(local_elements(config, stage_parameters(config, layout.stages[i]))[1] for i in indices)
    n = config.parallel.zero_shard_size or config.parallel.data_parallel_size(cluster.gpus)
    return trained / (n if config.zero.zero_stage else 1) * program.update_bytes / cluster.gpu.traffic


def _parts(stages: Sequence[_Stage], microbatches: int) -> dict[str, float]:
    """Where the time of a rank's own passes goes. Waiting for the host: what starting kernels costs on top."""
    whole, again = Seconds(), Seconds()
    for stage in stages:
        for done in (stage.passes.forward, stage.passes.inputs, stage.passes.weights):
            whole = plus(whole, done)
        again = plus(again, stage.passes.again)
    beside = sum(stage.beside for stage in stages)
    handing_over = sum(2 * stage.hand_over for stage in stages)
    seconds = {
        "matrix products": whole.compute,
        "memory-bound kernels": whole.memory,
        "tensor-parallel messages": whole.messages,
        "recomputation": again.device,
        "waiting for the host": sum(s.whole for s in stages) - beside - handing_over - whole.device - again.device,
        "ZeRO's messages": beside,
        "handing over": handing_over,
    }
    return {name: value * microbatches for name, value in seconds.items()}
