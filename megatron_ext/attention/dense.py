"""Attention as it is written down, with all scores in memory: for every pattern, device and dtype. Tests' oracle."""

import dataclasses

import torch

from megatron_ext.attention.backend import Attend, AttentionSizes, AttentionWork, Prepared
from megatron_ext.attention.pattern import Pattern


@torch.no_grad()
def dense_bias(pattern: Pattern, length: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """What the pattern adds to the scores, but for documents: -inf where a token may not attend.

    Returns [1, 1, s, s], with ALiBi [1, this rank's heads, s, s]. (Of a bool mask torch's kernels would make this in
    every layer, and keep it for the backward pass.)
    """
    positions = torch.arange(length, device=device)
    behind = positions[:, None] - positions[None, :]  # how far the key lies behind the query
    forbidden = behind < 0 if pattern.causal else torch.zeros_like(behind, dtype=torch.bool)
    if pattern.window is not None:
        forbidden = forbidden | (behind.abs() >= pattern.window)
    if pattern.slopes is None:
        return torch.zeros_like(behind, dtype=dtype).masked_fill_(forbidden, -torch.inf)[None, None]
    slopes = torch.tensor(pattern.slopes, dtype=torch.float32).to(device)
    bias = (-slopes[:, None, None] * behind.abs()).to(dtype)
    return bias.masked_fill_(forbidden, -torch.inf)[None]


def within_documents(pattern: Pattern, bias: torch.Tensor, document_ids: torch.Tensor | None) -> torch.Tensor:
    """`bias`; of a pattern with documents only where both tokens are of one, else -inf: [b, 1 or heads, s, s].

    document_ids: int64 [b, s], just if the pattern has documents.
    """
    assert pattern.documents == (document_ids is not None)
    if document_ids is None:
        return bias
    return bias.masked_fill(document_ids[:, None, :, None] != document_ids[:, None, None, :], -torch.inf)


def bias_bytes(pattern: Pattern, length: int, element: int) -> float:
    """Of `dense_bias`."""
    return float(len(pattern.slopes or (0,)) * length * length * element)


@dataclasses.dataclass(frozen=True)
class DenseBackend:
    def supports(
        self, pattern: Pattern, heads: int, kv_heads: int, head_dim: int, device: torch.device, dtype: torch.dtype
    ) -> str | None:
        return None

    def prepare(self, pattern: Pattern, length: int, device: torch.device, dtype: torch.dtype) -> Prepared:
        bias = dense_bias(pattern, length, device, dtype)

        def of_batch(document_ids: torch.Tensor | None) -> Attend:
            here = within_documents(pattern, bias, document_ids)
            return lambda q, k, v: dense_attention(q, k, v, here)

        return of_batch

    def prepared_bytes(self, pattern: Pattern, length: int, element: int) -> float:
        return bias_bytes(pattern, length, element)

    def kept(self, pattern: Pattern, sizes: AttentionSizes, element: int, wide: int) -> dict[str, float]:
        scores = sizes.rows * sizes.length
        return {
            "queries": sizes.queries * element,
            "keys and values": 2 * sizes.keys * element,
            "weights": scores * (wide + (element if element < wide else 0)),
            "output": sizes.queries * element,
        }

    def work(self, pattern: Pattern, sizes: AttentionSizes) -> AttentionWork:
        return work_on_scores(sizes)


def work_on_scores(sizes: AttentionSizes) -> AttentionWork:
    """Two products, and a softmax that reads and writes: twice over the scores forward, three times backward."""
    s, d, heads = sizes.length, sizes.head_dim, sizes.batch * sizes.heads
    scores = sizes.rows * s
    return AttentionWork(products=((s, s, d, heads), (s, d, s, heads)), moved=(2 * scores, 3 * scores))


def dense_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(d) + bias) v, where neighbouring heads of q share one of k and v. See `Attend` for shapes.

    The softmax is taken in at least float32.
    """
    (b, heads, s, d), kv_heads = q.shape, k.shape[1]
    scores = (q * d**-0.5).reshape(b, kv_heads, -1, d) @ k.transpose(-1, -2)
    wide = torch.promote_types(q.dtype, torch.float32)
    weights = (scores.view(b, heads, s, s).to(wide) + bias).softmax(-1).to(q.dtype)
    return (weights.view(b, kv_heads, -1, s) @ v).view(b, heads, s, d)
