"""How long an optimizer step takes, and where the time goes."""

import dataclasses
from collections.abc import Sequence

from megatron_ext.engine import EngineConfig
from megatron_ext.errors import RequestError
from megatron_ext.models import StageSpec
from megatron_ext.models.names import EMBEDDING, HEAD
from megatron_ext.pipeline import StageLayout
from megatron_ext.planner.activations import attention_backend
from megatron_ext.planner.cluster import Cluster
from megatron_ext.planner.data_parallel import GradientTraffic, gradient_traffic
from megatron_ext.planner.layer import Microbatch, PassTimes, Seconds, plus, stage_times
from megatron_ext.planner.program import Program
from megatron_ext.planner.states import canonical_stage, local_elements, shards, stage_layout, stage_parameters
from megatron_ext.planner.timeline import StageTimes, Timeline, simulate


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
    data parallelism's messages in every microbatch, as far as they take longer than what hides them. trained:
    parameters of a tensor-parallel rank that get a gradient.
    """

    passes: PassTimes
    forward: float
    inputs: float
    weights: float
    once: float
    beside: float
    hand_over: float
    trained: int

    @property
    def whole(self) -> float:
        return self.forward + self.inputs + self.weights


def _stage(passes: PassTimes, traffic: GradientTraffic, program: Program, hand_over: float, trained: int) -> _Stage:
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
        trained=trained,
    )


def _not_hidden(message: float, work: float, program: Program) -> float:
    """What a message adds to the work it travels under: it takes some of its bandwidth, and may take longer."""
    hidden = min(message * program.hidden_share, work)
    return message - hidden


def microbatch_of(config: EngineConfig, stage: StageSpec) -> Microbatch:
    """What a stage computes at once."""
    layers = StageSpec(stage.first, stage.last, has_embedding=False, has_head=False)
    stored, trained = local_elements(config, stage_parameters(config, layers))
    trains = config.trainable.trains
    return Microbatch(
        config.model,
        config.batch.micro_batch_size,
        config.batch.seq_length,
        config.parallel.tensor_model_parallel_size,
        config.parallel.sequence_parallel,
        config.recompute.recompute_granularity,
        attention=attention_backend(config, "cuda"),
        trained=trained / stored,
        trains_head=trains(EMBEDDING if config.model.tied else HEAD),
        trains_embedding=trains(EMBEDDING),
    )


def step_time(config: EngineConfig, cluster: Cluster, program: Program) -> StepTime:
    """config: validated for `cluster.gpus` ranks. Raises RequestError where the time depends on what is not known."""
    if config.precision.compute.itemsize != 2:
        raise RequestError("the planner knows how fast devices are in half precision only: plan with --bf16 or --fp16")
    if config.zero.offload_optimizer is not None or config.zero.offload_param is not None:
        raise RequestError("--offload-optimizer, --offload-param: how fast hosts and disks are is not in the planner")
    layout = stage_layout(config, cluster.gpus)
    dp = config.parallel.data_parallel_size(cluster.gpus)
    microbatches = config.batch.microbatches(dp)
    stages = _stages(config, layout, cluster, program)
    times = [StageTimes(stage.forward, stage.inputs, stage.weights) for stage in stages]
    timeline = simulate(layout, microbatches, times, _send(config, cluster, program))
    busy = timeline.busy
    slowest = max(range(len(busy)), key=busy.__getitem__)
    of_rank = _of_ranks(stages, layout)
    gradients, update = _once(config, of_rank, cluster, program)
    parts = _parts(of_rank[slowest], microbatches) | {
        "pipeline bubble": timeline.seconds - busy[slowest],
        "gradients and weights, once": gradients,
        "update": update,
    }
    return StepTime(timeline.seconds + gradients + update, parts, timeline)


def least_time(config: EngineConfig, cluster: Cluster, program: Program) -> float:
    """Seconds that a step takes at least: every rank's own work, and what it waits for at both ends of the step."""
    layout = stage_layout(config, cluster.gpus)
    microbatches = config.batch.microbatches(config.parallel.data_parallel_size(cluster.gpus))
    stages = _stages(config, layout, cluster, program)
    least, waits = 0.0, 0.0
    of_rank = _of_ranks(stages, layout)
    for rank, mine in enumerate(of_rank):
        least = max(least, waits + microbatches * sum(stage.whole for stage in mine))
        # The first microbatch comes through the stages before, and the last gradient goes back through them; where
        # backward passes are split, weights' halves may fill the latter wait.
        stage = stages[rank]
        waits += stage.forward
        if not layout.order.splits_backward:
            waits += stage.inputs + stage.weights
    return least + sum(_once(config, of_rank, cluster, program))


def _stages(config: EngineConfig, layout: StageLayout, cluster: Cluster, program: Program) -> list[_Stage]:
    hand_over = cluster.gpu.measured.hand_over_us * 1e-6 if max(layout.rank_of) > 0 else 0.0
    kinds = [canonical_stage(config, stage) for stage in layout.stages]
    built = {}
    for kind in set(kinds):
        elements = local_elements(config, stage_parameters(config, kind))
        traffic = gradient_traffic(config, cluster, program, *elements)
        batch = microbatch_of(config, kind)
        passes = stage_times(batch, kind.last - kind.first, kind.has_embedding, kind.has_head, cluster, program)
        built[kind] = _stage(passes, traffic, program, hand_over, elements[1])
    return [built[kind] for kind in kinds]


def _send(config: EngineConfig, cluster: Cluster, program: Program) -> float:
    """Seconds that the hidden states of a microbatch travel to the next rank of the pipeline."""
    batch, tp = config.batch, config.parallel.tensor_model_parallel_size
    payload = config.precision.compute.itemsize * batch.micro_batch_size * batch.seq_length * config.model.hidden_size
    cut = config.parallel.sequence_parallel or program.sends_slices
    return cluster.send(payload / (tp if cut else 1))


def _of_ranks(stages: Sequence[_Stage], layout: StageLayout) -> list[list[_Stage]]:
    return [[stages[i] for i in layout.on_rank(rank)] for rank in range(max(layout.rank_of) + 1)]


def _once(
    config: EngineConfig, of_rank: Sequence[Sequence[_Stage]], cluster: Cluster, program: Program
) -> tuple[float, float]:
    """Seconds of what a step does once, on the rank that takes longest: messages that nothing hides, the update."""
    n = shards(config, cluster.gpus) if config.zero.zero_stage else 1
    trained = max(sum(stage.trained for stage in stages) for stages in of_rank)
    update = trained / n * program.update_bytes / cluster.gpu.traffic + cluster.gpu.measured.step_ms * 1e-3
    return max(sum(stage.once for stage in stages) for stages in of_rank), update


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
