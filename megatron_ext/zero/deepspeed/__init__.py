"""DeepSpeed's ZeRO as the second engine (`--zero-engine deepspeed`): only imported when asked for.

Tensor parallelism, pipeline schedules and checkpoints stay ours; DeepSpeed shards, reduces, offloads and updates.
Sources: ZeRO (arXiv 1910.02054), ZeRO-Offload (2101.06840), ZeRO-Infinity (2104.07857), ZeRO++ (2306.10209).
"""

from megatron_ext.zero.deepspeed.optimizer import DeepSpeedOptimizer
from megatron_ext.zero.deepspeed.stage import DeepSpeedStage

__all__ = ["DeepSpeedOptimizer", "DeepSpeedStage"]
