"""Who may attend to whom, and what computes it: a pattern, and backends of which one is chosen.

A backend of your own is a file with an `AttentionBackend` and an entry in `BACKENDS`.
"""

from typing import NamedTuple

import torch

from megatron_ext.attention.backend import Attend, AttentionBackend, AttentionSizes, AttentionWork, Prepared
from megatron_ext.attention.dense import DenseBackend
from megatron_ext.attention.pattern import Pattern
from megatron_ext.attention.sdpa import SDPA_KERNELS, SdpaBackend
from megatron_ext.errors import RequestError

BACKENDS: dict[str, AttentionBackend] = {
    **{kernel: SdpaBackend((kernel,)) for kernel in SDPA_KERNELS},
    "dense": DenseBackend(),
}


class Choice(NamedTuple):
    backend: AttentionBackend
    why: str


def choose_attention(
    name: str, pattern: Pattern, heads: int, kv_heads: int, head_dim: int, device: torch.device, dtype: torch.dtype
) -> Choice:
    """The backend called `name`, of "auto" the fastest that takes the pattern; see `AttentionBackend.supports`.

    Raises RequestError where the one that was named cannot.
    """
    shape = pattern, heads, kv_heads, head_dim, device, dtype
    if name != "auto":
        reason = BACKENDS[name].supports(*shape)
        if reason is not None:
            others = [other for other, backend in BACKENDS.items() if backend.supports(*shape) is None]
            raise RequestError(f"--attention-backend {name} {reason}: use {', '.join(('auto', *others))}")
        return Choice(BACKENDS[name], f"{name}, as asked")
    if device.type != "cuda":
        return Choice(SdpaBackend(), f"torch's kernels for {device.type}")
    refused = {}
    for kernel in ("flash", "efficient"):
        reason = BACKENDS[kernel].supports(*shape)
        if reason is None:
            break
        refused[kernel] = reason
    else:
        return Choice(BACKENDS["math"], f"math, with all scores in memory{_because(refused)}")
    why, backend = kernel, SdpaBackend((kernel,))
    if BACKENDS["cudnn"].supports(*shape) is None:
        why, backend = f"{kernel}, or cudnn where torch prefers it", SdpaBackend((kernel, "cudnn"))
    if backend.repeats_heads and heads != kv_heads:
        why += f", with key and value heads repeated {heads // kv_heads} times"
    return Choice(backend, why + _because(refused))


def _because(refused: dict[str, str]) -> str:
    return f" ({'; '.join(f'{kernel} {reason}' for kernel, reason in refused.items())})" if refused else ""


__all__ = [
    "BACKENDS",
    "Attend",
    "AttentionBackend",
    "AttentionSizes",
    "AttentionWork",
    "Choice",
    "Pattern",
    "Prepared",
    "choose_attention",
]
