"""Rotary position embedding (Su et al., arXiv 2104.09864) in the layouts that Hugging Face stores.

Of a head's first d elements, position p turns the pair (x_i, x_{i + d/2}), or interleaved (x_{2i}, x_{2i + 1}), by the
angle p * theta^(-2i/d).
"""

import math
from typing import NamedTuple

import torch

from megatron_ext.models.config import ModelConfig

MOVED = 10  # elements that `rotate` reads and writes for each of its input's: x cos + (second, first) sin, eager


class Rotation(NamedTuple):
    """cos and sin of every element's angle, [1 or b, 1, s, rotary_dim] each."""

    cos: torch.Tensor
    sin: torch.Tensor
    interleaved: bool


def inverse_frequencies(config: ModelConfig, device: torch.device) -> torch.Tensor:
    """Angle per position of each of the rotary_dim / 2 pairs, float32, scaled as `rope_scaling` says.

    linear: every position divided by the factor (arXiv 2306.15595). llama3: only wavelengths longer than
    original / low_freq_factor, with a smooth passage up to original / high_freq_factor (Llama 3.1's code).
    """
    exponent = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32, device=device) / config.rotary_dim
    frequencies = 1.0 / config.rotary_base**exponent
    if config.rope_scaling == "linear":
        return frequencies / config.rope_scaling_factor
    if config.rope_scaling == "llama3":
        low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
        wavelength = 2 * math.pi / frequencies
        keep = ((config.rope_original_max_position / wavelength - low) / (high - low)).clamp(0, 1)
        return keep * frequencies + (1 - keep) * frequencies / config.rope_scaling_factor
    return frequencies


def rotation(config: ModelConfig, positions: torch.Tensor, frequencies: torch.Tensor, dtype: torch.dtype) -> Rotation:
    """The angles at `positions` [s] or [b, s], in `dtype`. frequencies: `inverse_frequencies`, on the same device.

    Angles are taken in float32, as Hugging Face does, so that both agree to the last bit of the rotation.
    """
    angles = positions.float()[..., None] * frequencies
    interleaved = config.rotary_interleaved
    angles = angles.repeat_interleave(2, dim=-1) if interleaved else torch.cat([angles, angles], dim=-1)
    angles = angles[:, None] if angles.ndim == 3 else angles[None, None]
    return Rotation(angles.cos().to(dtype), angles.sin().to(dtype), interleaved)


def rotate(x: torch.Tensor, rope: Rotation) -> torch.Tensor:
    """Turn the heads x [b, heads, s, head_dim]; elements beyond rotary_dim stay as they are."""
    width = rope.cos.shape[-1]
    if width < x.shape[-1]:
        return torch.cat([rotate(x[..., :width], rope), x[..., width:]], dim=-1)
    if rope.interleaved:
        first, second = x[..., 0::2], x[..., 1::2]
        return x * rope.cos + torch.stack([-second, first], dim=-1).flatten(-2) * rope.sin
    first, second = x.chunk(2, dim=-1)
    return x * rope.cos + torch.cat([-second, first], dim=-1) * rope.sin
