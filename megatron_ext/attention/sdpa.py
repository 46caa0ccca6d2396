"""torch's scaled dot product attention, by one of its kernels.

What these take is torch's to say (aten/src/ATen/native/transformers, `can_use_*_attention` of torch 2.13): flash and
cudnn half precision only, flash no mask, efficient no grouped heads, math everything, with all scores in memory.
"""

import contextlib
import dataclasses
import functools
import warnings

import torch
import torch.nn.functional as F
from torch.backends.cuda import (
    SDPAParams,
    can_use_cudnn_attention,
    can_use_efficient_attention,
    can_use_flash_attention,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_ext.attention.backend import Attend, AttentionSizes, AttentionWork, Prepared
from megatron_ext.attention.dense import bias_bytes, dense_bias, within_documents, work_on_scores
from megatron_ext.attention.pattern import Pattern

_KERNELS = {
    "flash": (SDPBackend.FLASH_ATTENTION, can_use_flash_attention),
    "cudnn": (SDPBackend.CUDNN_ATTENTION, can_use_cudnn_attention),
    "efficient": (SDPBackend.EFFICIENT_ATTENTION, can_use_efficient_attention),
    "math": (SDPBackend.MATH, None),
}
SDPA_KERNELS = tuple(_KERNELS)
_HALF = (torch.bfloat16, torch.float16)
_LARGEST_HEAD = 256


@dataclasses.dataclass(frozen=True)
class SdpaBackend:
    """kernels: the one that `supports` speaks of, then others that take the same, of which torch takes the one that it
    prefers on the device at hand; none: all, as on a CPU, whose own flash kernel takes masks and grouped heads."""

    kernels: tuple[str, ...] = ()

    @property
    def _kernel(self) -> str | None:
        return self.kernels[0] if self.kernels else None

    @property
    def repeats_heads(self) -> bool:
        """Whether each query head gets a copy of its key and value head, where these are fewer."""
        return self._kernel == "efficient"

    def supports(
        self, pattern: Pattern, heads: int, kv_heads: int, head_dim: int, device: torch.device, dtype: torch.dtype
    ) -> str | None:
        kernel = self._kernel
        if kernel is None or kernel == "math":
            return None
        if kernel == "flash" and pattern.masks:
            return f"cannot mask {' and '.join(pattern.masks)}"
        if device.type == "cpu":
            return None if kernel == "flash" else "needs a CUDA device"
        if device.type != "cuda":  # shapes alone
            return None
        if kernel == "efficient" and dtype == torch.float64:
            return "takes no --params-dtype float64"
        if kernel != "efficient" and dtype not in _HALF:
            return "needs --bf16 or --fp16"
        if kernel != "efficient" and head_dim > _LARGEST_HEAD:
            return f"takes heads of at most {_LARGEST_HEAD} elements, not of {head_dim}"
        multiple = {"flash": 1, "cudnn": 8, "efficient": 8 if dtype in _HALF else 4}[kernel]
        if head_dim % multiple:
            return f"takes heads of a multiple of {multiple} elements, not of {head_dim}"
        if device.index is None:
            return None
        return _refused_here(kernel, pattern, heads, heads if self.repeats_heads else kv_heads, head_dim, device, dtype)

    def prepare(self, pattern: Pattern, length: int, device: torch.device, dtype: torch.dtype) -> Prepared:
        bias = dense_bias(pattern, length, device, dtype) if pattern.masks else None

        def of_batch(document_ids: torch.Tensor | None) -> Attend:
            assert bias is not None or document_ids is None
            mask = None if bias is None else within_documents(pattern, bias, document_ids)
            return functools.partial(self._attend, mask=mask, is_causal=pattern.causal and mask is None)

        return of_batch

    def _attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, is_causal: bool
    ) -> torch.Tensor:
        if self.repeats_heads and q.shape[1] != k.shape[1]:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        with sdpa_kernel([_KERNELS[name][0] for name in self.kernels]) if self.kernels else contextlib.nullcontext():
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=q.shape[1] != k.shape[1]
            )

    def prepared_bytes(self, pattern: Pattern, length: int, element: int) -> float:
        return bias_bytes(pattern, length, element) if pattern.masks else 0.0

    def kept(self, pattern: Pattern, sizes: AttentionSizes, element: int, wide: int) -> dict[str, float]:
        """Fused kernels keep no scores (Dao et al., arXiv 2205.14135)."""
        queries, keys = sizes.queries, sizes.queries if self.repeats_heads else sizes.keys
        output = {"output": queries * element}
        if self._kernel == "math":
            scores = sizes.rows * sizes.length
            return {"queries, keys and values": 3 * queries * wide, "scores": scores * wide} | output
        inputs = {"queries": queries * element, "keys and values": 2 * keys * element}
        return inputs | {"log-sum-exp": sizes.rows * wide} | output

    def work(self, pattern: Pattern, sizes: AttentionSizes) -> AttentionWork:
        """Fused kernels that take a mask compute all scores, at about half the rate."""
        if self._kernel == "math":
            return work_on_scores(sizes)
        operations = 4 * sizes.queries * sizes.length * (2 if pattern.masks else 0.5)
        repeated = 2 * (sizes.keys + sizes.queries) if self.repeats_heads and sizes.heads != sizes.kv_heads else 0.0
        return AttentionWork(operations=(operations, 2.5 * operations), moved=(repeated, repeated))


def _refused_here(
    kernel: str, pattern: Pattern, heads: int, kv_heads: int, head_dim: int, device: torch.device, dtype: torch.dtype
) -> str | None:
    """What torch has against the kernel on the device at hand, in its own words; None: nothing."""
    can_use = _KERNELS[kernel][1]
    assert can_use is not None
    q, k = (torch.empty(1, n, 16, head_dim, device=device, dtype=dtype, requires_grad=True) for n in (heads, kv_heads))
    mask = torch.zeros(1, 1, 16, 16, device=device, dtype=dtype) if pattern.masks else None
    params = SDPAParams(q, k, k, mask, 0.0, pattern.causal and mask is None, heads != kv_heads)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if can_use(params, True):
            return None
    words = [str(warning.message).partition(" (Triggered")[0] for warning in said]
    return f"is refused by torch on this device ({' '.join(words) or 'which says no more'})"
