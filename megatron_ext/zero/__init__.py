"""ZeRO stages 0-3 and hybrid sharding (Rajbhandari et al., arXiv 1910.02054) as policies over FSDP2."""

from megatron_ext.zero.config import ZeroConfig
from megatron_ext.zero.data_parallel import DataParallel

__all__ = ["DataParallel", "ZeroConfig"]
