"""Norms over the last dimension."""

import torch
import torch.nn.functional as F

from megatron_ext.kernels.backend import Bytes


class RMSNorm:
    """Zhang and Sennrich, arXiv 1910.07467."""

    moved = (2, 3)

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
        assert bias is None
        return F.rms_norm(x, x.shape[-1:], weight, eps)

    def kept(self, elements: float, rows: float, element: int, wide: int, device_type: str, trained: bool) -> Bytes:
        """On a CPU torch composes it of small steps."""
        if device_type == "cuda":
            return {"input": elements * element, "statistics": rows * wide}
        terms = {"input": elements * wide, "statistics": rows * wide}
        return terms | {"normalized": elements * wide} if trained else terms


class LayerNorm:
    """Ba et al., arXiv 1607.06450."""

    moved = (2, 3)

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)

    def kept(self, elements: float, rows: float, element: int, wide: int, device_type: str, trained: bool) -> Bytes:
        return {"input": elements * element, "statistics": 2 * rows * (wide if device_type == "cuda" else element)}


NORMS: dict[str, RMSNorm | LayerNorm] = {"RMSNorm": RMSNorm(), "LayerNorm": LayerNorm()}
