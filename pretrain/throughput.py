"""How fast a step was: tokens and model FLOPs per second, and the share of the device's peak (MFU)."""

import torch

from megatron_ext.engine import EngineConfig
from megatron_ext.mesh import ProcessGrid
from megatron_ext.planner.gpus import gpu_reported_as
from pretrain.memory import peak_memory


def peak_tflops(device: torch.device) -> float | None:
    """Dense bf16 peak of a known GPU, None for anything else."""
    gpu = gpu_reported_as(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return None if gpu is None else gpu.peak_tflops


class Throughput:
    """Figures of a step from the seconds it took."""

    def __init__(self, config: EngineConfig, grid: ProcessGrid, peak: float | None):
        batch = config.batch
        self._flops = {name: config.flops_per_token(causal) for name, causal in (("full", False), ("causal", True))}
        assert batch.global_batch_size is not None
        self._tokens, self._grid = batch.global_batch_size * batch.seq_length, grid
        self._peak = peak if peak is not None else peak_tflops(grid.device)

    def figures(self, seconds: float) -> dict[str, float | None]:
        """Of one step. MFU counts all attention scores (full) or half of them (causal)."""
        seconds = max(seconds, 1e-6)  # no clock tells less
        rate = self._tokens / seconds
        per_device = rate / self._grid.world_size / 1e12
        mfu = {name: per_device * flops / self._peak if self._peak else None for name, flops in self._flops.items()}
        return {
            "elapsed_ms": seconds * 1e3,
            "tokens_per_second": rate,
            "tflops_per_device": per_device * self._flops["full"],
            "mfu_full": mfu["full"],
            "mfu_causal": mfu["causal"],
            "memory_gib": peak_memory(self._grid.device) / 2**30,
        }
