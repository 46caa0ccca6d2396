"""What layers compute with: a backend, its kernels, and what each of them costs.

A kernel says beside its code what it keeps from its forward to its backward pass, and what it reads and writes; the
planner asks it, and knows no kernel's figures itself. `moved`: elements read and written, forward and backward, for
each element of what it works on. element: bytes of one as computed; wide: of one where statistics and sums are kept.
"""

from typing import NamedTuple, Protocol

import torch

from megatron_ext.attention import Choice, Pattern
from megatron_ext.tensor_parallel import Products, TensorParallel

Bytes = dict[str, float]
"""By name."""


class Norm(Protocol):
    moved: tuple[int, int]

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
        """x [..., n], weight and bias [n] -> [..., n], in x's dtype."""

    def kept(self, elements: float, rows: float, element: int, wide: int, device_type: str, trained: bool) -> Bytes:
        """Bytes by name besides its output, which is its reader's: its "input", and what comes to it."""


class Activation(Protocol):
    """inputs: 1, or 2 of a gated one. keeps: names of what it keeps, each as large as its output, which is "activated"
    itself. temporary: how many such tensors its backward pass needs at once."""

    inputs: int
    keeps: tuple[str, ...]
    moved: tuple[int, int]
    temporary: int

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """One or two inputs [..., f] -> [..., f]."""


class LossBytes(NamedTuple):
    """tokens: figures of every token. logits, deferred: tensors of the logits' size from forward to backward, and
    between the halves of a split one. temporary: such that either pass needs beside them."""

    tokens: float
    logits: float
    deferred: float
    temporary: float


class LinearCrossEntropy(Protocol):
    """moved_bytes: of a logit in half precision, forward and backward, beside the product."""

    moved_bytes: tuple[int, int]

    def __call__(
        self, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, vocab_size: int, tp: TensorParallel
    ) -> torch.Tensor:
        """hidden [b, s or s/tp, h], weight [this rank's rows, h], labels [b, s] int64 -> losses [b, s].

        Losses are at least float32, and differentiable once."""

    def kept(self, tokens: float, logits: float, element: int, wide: int) -> LossBytes:
        """logits: elements on a rank."""


class Backend(Products, Protocol):
    """The operations worth a hand-tuned kernel. A kind that a backend has no kernel for raises RequestError."""

    linear_cross_entropy: LinearCrossEntropy

    def row_parallel_temporary(
        self, inputs: float, outputs: float, weight: float, element: int, cast: int, sequence_parallel: bool
    ) -> float:
        """Bytes that the backward pass of `row_parallel` needs at once. inputs, outputs, weight: elements on a rank,
        outputs of the whole sequence. cast: bytes of an element of the weight's gradient as stored, or 0."""

    def norm(self, kind: str) -> Norm:
        """kind: as `--normalization` names it."""

    def activation(self, kind: str) -> Activation:
        """kind: as `--activation` names it."""

    def attention(
        self, pattern: Pattern, heads: int, kv_heads: int, head_dim: int, device: torch.device, dtype: torch.dtype
    ) -> Choice:
        """What computes attention, and why; see `megatron_ext.attention`. Raises RequestError where nothing can."""
