"""The few operations worth a hand-tuned kernel, behind one narrow interface.

A backend is a `Kernels`: attention, norm and activation as functions of plain tensors. `torch` is built in.
"""

import dataclasses
from collections.abc import Callable

import torch

from megatron_ext.errors import RequestError
from megatron_ext.kernels import torch_kernels
from megatron_ext.kernels.apex import check_apex
from megatron_ext.option import option

TRANSFORMER_IMPLS = ("torch", "transformer_engine", "apex")


@dataclasses.dataclass(frozen=True)
class KernelConfig:
    transformer_impl: str = option("torch", "where norm, attention and activation come from", choices=TRANSFORMER_IMPLS)
    attention_backend: str = option(
        "auto", "which of torch's attention kernels", choices=("auto", *torch_kernels.ATTENTION_BACKENDS)
    )


@dataclasses.dataclass(frozen=True)
class Kernels:
    """rms_norm(x, weight, eps); layer_norm(x, weight, bias, eps); swiglu(gate, up); attention(q, k, v, mask) with q
    [b, heads, s, d], k and v [b, kv heads, s, d] -> [b, heads, s, d]; mask: None (causal), or what is added to the
    scores, [b or 1, 1 or heads, s, s] in their dtype."""

    rms_norm: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
    layer_norm: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]
    swiglu: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    attention: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


def load_kernels(config: KernelConfig) -> Kernels:
    """The backend that was asked for, or RequestError: nothing degrades silently."""
    if config.transformer_impl == "apex":
        check_apex()
    if config.transformer_impl != "torch":
        raise RequestError(
            f"--transformer-impl {config.transformer_impl}: this backend is not built yet; use --transformer-impl torch"
        )
    return Kernels(
        rms_norm=torch_kernels.rms_norm,
        layer_norm=torch_kernels.layer_norm,
        swiglu=torch_kernels.swiglu,
        attention=torch_kernels.attention(config.attention_backend),
    )
