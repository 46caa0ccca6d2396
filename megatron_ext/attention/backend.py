"""What computes attention, and what it costs: the protocol of a backend."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

from megatron_ext.attention.pattern import Pattern

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""q [b, heads, s, d], k and v [b, kv heads, s, d] -> [b, heads, s, d], by the pattern it was made for."""

Prepared = Callable[[torch.Tensor | None], Attend]
"""Of a microbatch's document_ids, int64 [b, s]; None of a pattern without documents."""


class AttentionSizes(NamedTuple):
    """Of one microbatch on one rank."""

    batch: int
    heads: float
    kv_heads: float
    length: int
    head_dim: int

    @property
    def rows(self) -> float:
        """Queries of all heads, each of which is compared with `length` keys."""
        return self.batch * self.heads * self.length

    @property
    def queries(self) -> float:
        return self.rows * self.head_dim

    @property
    def keys(self) -> float:
        return self.batch * self.kv_heads * self.length * self.head_dim


class AttentionWork(NamedTuple):
    """operations: in a fused kernel, at its own rate, forward and backward. products: (m, n, k, how many) forward,
    twice as many backward. moved: elements that are read and written beside those, forward and backward."""

    operations: tuple[float, float] = (0.0, 0.0)
    products: tuple[tuple[float, float, float, float], ...] = ()
    moved: tuple[float, float] = (0.0, 0.0)


class AttentionBackend(Protocol):
    def supports(
        self, pattern: Pattern, heads: int, kv_heads: int, head_dim: int, device: torch.device, dtype: torch.dtype
    ) -> str | None:
        """None, or why not: what comes after "--attention-backend NAME". heads: of a rank. A CUDA device with an index
        is asked itself; of one without, and of any where there is none, only rules are known."""

    def prepare(self, pattern: Pattern, length: int, device: torch.device, dtype: torch.dtype) -> Prepared:
        """Make what is the same for all microbatches of sequences of this length."""

    def prepared_bytes(self, pattern: Pattern, length: int, element: int) -> float:
        """Of what `prepare` makes. element: bytes of one as computed."""

    def kept(self, pattern: Pattern, sizes: AttentionSizes, element: int, wide: int) -> dict[str, float]:
        """Bytes by name from forward to backward. wide: bytes of an element where sums are kept."""

    def work(self, pattern: Pattern, sizes: AttentionSizes) -> AttentionWork:
        """What a device has to do."""
