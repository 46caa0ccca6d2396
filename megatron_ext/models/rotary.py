"""Rotary position embedding (Su et al., arXiv 2104.09864) in the half-split layout that Hugging Face stores.

Position p turns the pair (x_i, x_{i + d/2}) by the angle p * theta^(-2i/d).
"""

import math

import torch

from megatron_ext.models.config import ModelConfig


def inverse_frequencies(config: ModelConfig, device: torch.device) -> torch.Tensor:
    """Angle per position of each of the head_dim / 2 pairs, float32, scaled as `rope_scaling` says.

    linear: every position divided by the factor (arXiv 2306.15595). llama3: only wavelengths longer than
    original / low_freq_factor, with a smooth passage up to original / high_freq_factor (Llama 3.1's code).
    """
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    frequencies = 1.0 / config.rotary_base**exponent
    if config.rope_scaling == "linear":
        return frequencies / config.rope_scaling_factor
    if config.rope_scaling == "llama3":
        low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
        wavelength = 2 * math.pi / frequencies
        keep = ((config.rope_original_max_position / wavelength - low) / (high - low)).clamp(0, 1)
        return keep * frequencies + (1 - keep) * frequencies / config.rope_scaling_factor
    return frequencies


def rotation(config: ModelConfig, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of the angles at `positions` [s] or [b, s] -> two of [1 or b, 1, s, head_dim] in `dtype`.

    Angles are taken in float32, as Hugging Face does, so that both agree to the last bit of the rotation.
    """
    angles = positions.float()[..., None] * inverse_frequencies(config, positions.device)
    angles = torch.cat([angles, angles], dim=-1)
    angles = angles[:, None] if angles.ndim == 3 else angles[None, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the heads x [b, heads, s, head_dim]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
