"""How fast a step was: tokens and model FLOPs per second, and the share of the device's peak (MFU)."""

import torch

from megatron_ext.engine import EngineConfig
from megatron_ext.mesh import ProcessGrid
from megatron_ext.models import parameter_shapes
from megatron_ext.models.count import flops_per_token
from megatron_ext.models.names import is_adapter
from megatron_ext.optim.trainable import select, trained_in_products
from pretrain.memory import peak_memory

# dense bf16 peak in TFLOP/s by a part of the device's name; sources: the vendors' datasheets
_PEAK_TFLOPS = {
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "H800": 989.0,
    "H20": 148.0,
    "B200": 2250.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "V100": 125.0,
    "4090": 165.2,
    "3090": 71.0,
}


def peak_tflops(device: torch.device) -> float | None:
    """Dense bf16 peak of a known GPU, None for anything else."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAK_TFLOPS.items() if part in name), None)


def run_flops(config: EngineConfig, causal: bool) -> float:
    """Model FLOPs per token of what is trained, adapters included; see `flops_per_token`."""
    shapes = parameter_shapes(config.model, config.adapters)
    trained = trained_in_products(select(config.trainable, shapes), config.model.tied)
    adapters = sum(shape.numel() for name, shape in shapes.items() if is_adapter(name))
    return flops_per_token(config.model, config.batch.seq_length, causal, trained, adapters)


class Throughput:
    """Figures of a step from the seconds it took."""

    def __init__(self, config: EngineConfig, grid: ProcessGrid, peak: float | None):
        batch = config.batch
        self._flops = {name: run_flops(config, causal) for name, causal in (("full", False), ("causal", True))}
        assert batch.global_batch_size is not None
        self._tokens, self._grid = batch.global_batch_size * batch.seq_length, grid
        self._peak = peak if peak is not None else peak_tflops(grid.device)

    def figures(self, seconds: float) -> dict[str, float | None]:
        """Of one step. MFU counts all attention scores (full) or half of them (causal)."""
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
