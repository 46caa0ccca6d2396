"""Pipeline parallelism: which layers stand on which stage, the schedules, and weights tied across stages."""

from megatron_ext.pipeline.layout import SCHEDULES, PipelineConfig, StageLayout, plan_stages
from megatron_ext.pipeline.schedule import Pipeline
from megatron_ext.pipeline.tied import TiedEmbedding

__all__ = ["SCHEDULES", "Pipeline", "PipelineConfig", "StageLayout", "TiedEmbedding", "plan_stages"]
