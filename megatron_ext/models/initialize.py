"""Initial weights that depend on the seed and the parameter's name only, never on the layout.

Every parameter is drawn in blocks of rows, each block from a generator seeded by (seed, name, block); a rank
draws the blocks that its rows touch and keeps its columns. Values are drawn in float32 and cast. On a CUDA
device the generator is CUDA's: the same seed gives the same weights at every layout on one kind of device.
"""

import hashlib
import math

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from megatron_ext.models.config import ModelConfig
from megatron_ext.models.names import EMBEDDING, HEAD
from megatron_ext.torch_private import compute_local_shape_and_global_offset

_ROWS_PER_BLOCK = 1024


def _block_seed(seed: int, name: str, block: int) -> int:
    digest = hashlib.sha256(f"{seed}/{name}/{block}".encode()).digest()
    return int.from_bytes(digest[:7], "little")


def _standard_deviation(name: str, shape: torch.Size, config: ModelConfig) -> float:
    """Radford et al. 2019 (GPT-2), as in Megatron-LM: what writes to the residual stream starts smaller.

    An adapter's first matrix has the variance of peft's (uniform within 1 / sqrt(in)), its second is zero.
    """
    if name.endswith(".lora.a"):
        return (3 * shape[1]) ** -0.5
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        return config.init_method_std / math.sqrt(2 * config.num_layers)
    return config.init_method_std


def normal_slice(
    shape: torch.Size,
    offset: tuple[int, ...],
    local: torch.Tensor,
    std: float,
    name: str,
    seed: int,
    device: torch.device | None = None,
) -> None:
    """Fill `local`, the part at `offset` of a matrix of global `shape`. device: where to draw (default: `local`'s)."""
    device = device or local.device
    if local.numel() == 0:
        return
    if device.type == "meta":  # has no values to draw
        local.zero_()
        return
    rows, columns = shape
    first, last = offset[0], offset[0] + local.shape[0]
    for block in range(first // _ROWS_PER_BLOCK, -(-last // _ROWS_PER_BLOCK)):
        start = block * _ROWS_PER_BLOCK
        stop = min(start + _ROWS_PER_BLOCK, rows)
        generator = torch.Generator(device).manual_seed(_block_seed(seed, name, block))
        values = torch.empty(stop - start, columns, device=device)
        values.normal_(0.0, std, generator=generator)
        low, high = max(first, start), min(last, stop)
        wanted = values[low - start : high - start, offset[1] : offset[1] + local.shape[1]]
        local[low - first : high - first].copy_(wanted)


@torch.no_grad()
def initialize_weights(model: nn.Module, config: ModelConfig, seed: int, device: torch.device) -> None:
    """Give every parameter of a stage (DTensors with storage) its initial values, drawn on `device`."""
    for name, param in model.named_parameters():
        assert isinstance(param, DTensor)
        initialize_parameter(name, param, param.to_local(), config, seed, device)


def initialize_parameter(
    name: str, placed: DTensor, local: torch.Tensor, config: ModelConfig, seed: int, device: torch.device
) -> None:
    """Fill `local`, this rank's part: norms 1, biases 0, matrices normal, adapters no effect.

    placed: says which part of the whole parameter that is. Tied output weights draw the embedding's.
    """
    if name.endswith(("bias", ".lora.b")):
        local.zero_()
    elif placed.ndim == 1:
        local.fill_(1.0)
    else:
        _, offset = compute_local_shape_and_global_offset(placed.shape, placed.device_mesh, placed.placements)
        if config.tied and name == HEAD:
            name = EMBEDDING
        std = _standard_deviation(name, placed.shape, config)
        normal_slice(placed.shape, offset, local, std, name, seed, device)
