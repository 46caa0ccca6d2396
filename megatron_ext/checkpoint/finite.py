"""Values that are no numbers, or infinite: what a run that has gone wrong leaves in its weights and moments."""

from collections.abc import Callable

from megatron_ext.checkpoint.read import Weights
from megatron_ext.checkpoint.write import row_pieces


def count_not_finite(weights: Weights, name: str, advance: Callable[[int], object] = lambda _: None) -> int:
    """How many values of a tensor are NaN or infinite; reads it a piece at a time. `advance` is told of its bytes."""
    count = 0
    for rows in row_pieces(weights, name):
        piece = weights.read_rows(name, *rows)
        count += piece.numel() - int(piece.isfinite().sum())
        advance(piece.nbytes)
    return count


def not_finite(count: int, weights: Weights, name: str) -> str:
    """In words, after the tensor's name."""
    return f"has {count:,} of {weights.shapes[name].numel():,} values that are not finite (NaN or infinite)"
