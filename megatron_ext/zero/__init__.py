"""ZeRO stages 0-3 and hybrid sharding (Rajbhandari et al., arXiv 1910.02054) as policies over FSDP2."""

from megatron_ext.zero.config import DeepSpeedSettings, ZeroConfig
from megatron_ext.zero.data_parallel import DataParallel
from megatron_ext.zero.protocols import DataParallelStage, Optimizer

__all__ = ["DataParallel", "DataParallelStage", "DeepSpeedSettings", "Optimizer", "ZeroConfig"]
