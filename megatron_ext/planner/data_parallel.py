"""Seconds of data parallelism's messages: which there are at each ZeRO stage, and what computation hides of them.

See `zero.data_parallel` for who sends what when; messages of a step by stage are counted in docs/zero.md.
"""

import dataclasses

from megatron_ext.engine import EngineConfig
from megatron_ext.pipeline import SCHEDULES
from megatron_ext.planner.cluster import Cluster
from megatron_ext.planner.program import Program
from megatron_ext.planner.states import is_sharded, shards


@dataclasses.dataclass(frozen=True)
class GradientTraffic:
    """Seconds of messages on one rank: with every forward and every backward pass of a microbatch, and once a step
    under the first forward pass, under the last backward pass, and at the end with nothing to hide behind."""

    each_forward: float = 0.0
    each_backward: float = 0.0
    first_forward: float = 0.0
    last_backward: float = 0.0
    end: float = 0.0


def gradient_traffic(
    config: EngineConfig, cluster: Cluster, program: Program, elements: float, trained: float
) -> GradientTraffic:
    """elements, trained: parameters of the rank before ZeRO cuts them, and those of them with a gradient."""
    tp, zero = config.parallel.tensor_model_parallel_size, config.zero
    dp, n = config.parallel.data_parallel_size(cluster.gpus), shards(config, cluster.gpus)
    size = config.precision.compute.itemsize
    in_message = 2 if zero.grad_reduce_in_bf16 else min(program.gradient_bytes, config.precision.stored.itemsize)
    gradients = trained * in_message
    if not is_sharded(config, cluster.gpus):
        return GradientTraffic(end=cluster.all_reduce(dp, tp, gradients))
    gather = cluster.ring(n, tp, elements * size)
    reduce = cluster.ring(n, tp, gradients)
    replicas = cluster.all_reduce(dp // n, tp * n, gradients / n)
    reduces_each = zero.zero_stage >= 2 and not zero.accumulate_then_reduce
    schedule = config.pipeline.pipeline_schedule
    halves = 2 if schedule is not None and SCHEDULES[schedule].splits_backward else 1  # each gathers for itself
    gathers = gather if zero.zero_stage == 3 else 0.0
    return GradientTraffic(
        each_forward=gathers,
        each_backward=halves * gathers + (reduce if reduces_each else 0.0),
        first_forward=0.0 if zero.zero_stage == 3 else gather,
        last_backward=replicas + (0.0 if reduces_each else reduce),
    )
