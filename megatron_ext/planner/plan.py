"""One layout, predicted: does it fit, how long does a step take, where does the time go."""

import dataclasses
import functools

from megatron_ext.engine import EngineConfig
from megatron_ext.pipeline import StageLayout
from megatron_ext.planner.cluster import Cluster
from megatron_ext.planner.memory import RankMemory, pipeline_memory
from megatron_ext.planner.program import Program
from megatron_ext.planner.states import stage_layout
from megatron_ext.planner.step import StepTime, step_time


@dataclasses.dataclass(frozen=True)
class Plan:
    """config: validated for `cluster.gpus` ranks."""

    config: EngineConfig
    cluster: Cluster
    program: Program

    @functools.cached_property
    def layout(self) -> StageLayout:
        """Which layers stand where."""
        return stage_layout(self.config, self.cluster.gpus)

    @functools.cached_property
    def memory(self) -> list[RankMemory]:
        """By pipeline rank."""
        return pipeline_memory(self.config, self.cluster.gpus)

    @functools.cached_property
    def step(self) -> StepTime:
        return step_time(self.config, self.cluster, self.program)

    @property
    def fullest(self) -> float:
        """Bytes of the rank that needs most."""
        return max(rank.total for rank in self.memory)

    @property
    def memory_share(self) -> float:
        """The same over what a GPU has."""
        return self.fullest / self.cluster.gpu.memory

    @property
    def tokens_per_second(self) -> float:
        batch = self.config.batch
        assert batch.global_batch_size is not None
        return batch.global_batch_size * batch.seq_length / self.step.seconds

    def tflops_per_gpu(self, causal: bool = False) -> float:
        """Model TFLOP/s: recomputation is not counted, all attention scores are (or, `causal`, half of them)."""
        return self.tokens_per_second * self.config.flops_per_token(causal) / self.cluster.gpus / 1e12

    def mfu(self, causal: bool = False) -> float:
        return self.tflops_per_gpu(causal) / self.cluster.gpu.peak_tflops
