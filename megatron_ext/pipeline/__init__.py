"""Pipeline parallelism: which layers stand on which stage, the schedules, and weights tied across stages."""

from megatron_ext.pipeline.layout import PipelineConfig, StageLayout, plan_stages
from megatron_ext.pipeline.schedule import Pipeline
from megatron_ext.pipeline.schedules import SCHEDULES
from megatron_ext.pipeline.tied import TiedEmbedding, copies_of_tied

__all__ = ["SCHEDULES", "Pipeline", "PipelineConfig", "StageLayout", "TiedEmbedding", "copies_of_tied", "plan_stages"]
