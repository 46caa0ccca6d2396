"""The proof of a conversion: nothing was lost on the way to disk, and both ends compute the same."""

import dataclasses
from pathlib import Path

import torch

from megatron_ext.checkpoint.read import Weights
from tools.conversion.changes.cast import CastWeights
from tools.conversion.formats.hf_folder import open_tensors
from tools.conversion.proof.outputs import Outputs, prompt
from tools.conversion.proof.run_ours import run_ours
from tools.conversion.proof.run_transformers import NotRunnable, run_transformers
from tools.conversion.proof.self_check import compare, difference_of_weights
from tools.conversion.source import Source


class NotEqual(Exception):
    """The result of a conversion is not its source; the text says where they differ."""


@dataclasses.dataclass(frozen=True)
class Form:
    """A model as it lies on disk.

    Attributes:
        source: through our reading of it.
        folder: where transformers can read it by itself, if it can.
    """

    source: Source
    folder: Path | None


def prove(before: Form, dtype: torch.dtype | None, sent: Source, after: Form) -> str:
    """Say in a line how `after` was found equal to `before`, or raise NotEqual.

    Args:
        dtype: that the weights were rounded to on the way.
        sent: what was written: `before` after all that was to be changed.
    """
    count = prove_weights(sent.weights, after.source.weights)
    model = before.source.model
    ids = prompt(model.vocab_size, model.max_position_embeddings)
    (one, reference), (other, result) = _run(before, dtype, ids), _run(after, None, ids)
    comparison = compare(reference, result, rows=model.vocab_size)
    if not comparison.passed:
        raise NotEqual(f"of {ids.shape[1]} tokens, source by {one}, result by {other}: {comparison}")
    return f"{count}; {comparison} (source by {one}, result by {other})"


def prove_weights(sent: Weights, written: Weights) -> str:
    """Say in words that what was written is what was sent, or raise NotEqual."""
    problem = difference_of_weights(sent, written)
    if problem is not None:
        raise NotEqual(f"read back, {problem}")
    return f"verified: {len(sent.shapes)} tensors read back, equal bit by bit"


def _run(form: Form, dtype: torch.dtype | None, ids: torch.Tensor) -> tuple[str, Outputs]:
    """By whom the model was run, and what came out; by transformers wherever it can."""
    reason = ""
    if form.folder is not None:
        tensors = open_tensors(form.folder)
        try:
            rounded = tensors if dtype is None else CastWeights(tensors, dtype)
            return "transformers", run_transformers(form.folder, rounded, ids)
        except NotRunnable as error:
            reason = f" ({error})"
    weights = form.source.weights if dtype is None else CastWeights(form.source.weights, dtype)
    return f"this project{reason}", run_ours(form.source.model, weights, ids)
