"""What a model makes of one fixed prompt, step by step, and what every way of computing it needs."""

import torch

from megatron_ext.checkpoint.read import Weights
from megatron_ext.checkpoint.write import row_pieces

# By name, in the order of computation, all float32: EMBEDDING (what the first layer reads, [1, s, h]), `layer(0)` and
# on (what each gives, [1, s, h]), LOGITS [1, s, V].
Outputs = dict[str, torch.Tensor]
EMBEDDING, LOGITS = "embedding", "logits"

_LENGTH = 128


def layer(number: int) -> str:
    return f"layer {number}"


def prompt(vocab_size: int, longest: int) -> torch.Tensor:
    """The same ids for every model of this vocabulary: the first, the last, others in between.

    Those in between are multiples of the golden ratio, modulo the vocabulary: they spread evenly however many there
    are (Knuth, The Art of Computer Programming 3, 6.4), so that every shard's rows are looked at. The length is that
    at which a wrong stretch of the rotation shows: after 32 positions Llama 3.2's is like Llama 3.1's.

    longest: the model's longest sequence.
    Returns int64 [1, at most 128].
    """
    ratio = (5**0.5 - 1) / 2
    between = [int(i * ratio % 1 * vocab_size) for i in range(1, _LENGTH - 1)]
    return torch.tensor([[0, vocab_size - 1, *between][:longest]])


def read_float32(weights: Weights, name: str) -> torch.Tensor:
    """A whole weight, beside it a piece at a time of it as it is stored."""
    whole = torch.empty(weights.shapes[name])
    for start, stop in row_pieces(weights, name):
        whole[start:stop] = weights.read_rows(name, start, stop)
    return whole
