"""The proof of a conversion: nothing was lost on the way to disk, and both ends compute the same.

Two checks that find different mistakes. `difference_of_weights` finds what was lost between memory and disk, in any
tensor, to the last bit; a wrong mapping it cannot see, for both sides went through it. `compare_outputs` finds it:
of two programs that ran the two forms of the model on one prompt.
"""

import dataclasses
from pathlib import Path

import torch
from tqdm import tqdm

from megatron_ext.checkpoint.read import Weights
from megatron_ext.checkpoint.write import row_pieces
from tools.conversion.changes.weights import CastWeights
from tools.conversion.formats.hf_folder import open_tensors
from tools.conversion.proof.outputs import LOGITS, Outputs, prompt, run_ours
from tools.conversion.proof.run_transformers import NotRunnable, run_transformers
from tools.conversion.source import Source, bytes_of

# Rounding alone made 1e-6 of a difference in 80 layers as they are initialised, and 1e-5 in 32 layers of ten times
# larger weights. (A model of use in bfloat16 cannot amplify rounding much: there it is 65536 times larger.) The
# smallest mistake that was tried, a rotation stretched by 32 instead of 8, makes 5e-4.
TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How far two runs of a model are apart after each step, in the order of computation.

    Attributes:
        differences: after each step the largest over the positions of: difference / largest value of the reference at
            that position. Infinite where either is not finite, or where they cannot be compared.
    """

    differences: dict[str, float]

    @property
    def passed(self) -> bool:
        return all(difference <= TOLERANCE for difference in self.differences.values())

    def __str__(self) -> str:
        """One line: by how much the logits differ, or where the first difference arose."""
        if self.passed:
            return f"logits differ by at most {self.differences[LOGITS]:.1e} of the largest"
        names = list(self.differences)
        first = next(number for number, name in enumerate(names) if self.differences[name] > TOLERANCE)
        before = f" ({names[first - 1]}: {self.differences[names[first - 1]]:.1e})" if first else ""
        verb = "are" if names[first] == LOGITS else "is"
        figure = self.differences[names[first]]
        return f"{names[first]} {verb} the first that differs: {figure:.1e} of its largest value{before}"


def compare_outputs(reference: Outputs, result: Outputs, rows: int | None = None) -> Comparison:
    """Compare two runs on the same ids. rows: how many of the logits, where the result has a larger vocabulary."""
    differences = {}
    for name in reference | result:  # in this order, and none left out
        expected, found = (outputs.get(name, torch.empty(0)) for outputs in (reference, result))
        if name == LOGITS:
            expected, found = expected[..., :rows], found[..., :rows]
        differences[name] = _relative(expected, found)
    return Comparison(differences)


def _relative(expected: torch.Tensor, found: torch.Tensor) -> float:
    if expected.shape != found.shape or not (expected.isfinite().all() and found.isfinite().all()):
        return torch.inf
    tiny = torch.finfo(torch.float32).tiny  # nothing but zeros differs by 0
    differences, largest = (values.abs().amax(-1) for values in (found - expected, expected))
    return (differences / largest.clamp(min=tiny)).max().item()


def difference_of_weights(source: Weights, result: Weights) -> str | None:
    """Find the first tensor of `result` that is not `source`'s to the last bit, in words; None if there is none.

    source: the chain that was written, read once more from its beginning. result: what was written, opened anew and
    under the same names. Memory: a piece of each.
    """
    for problem, names in (
        ("lacks", source.shapes.keys() - result.shapes.keys()),
        ("has an unknown", result.shapes.keys() - source.shapes.keys()),
    ):
        if names:
            return f"{problem} weight {min(names)} ({len(names)} in all)"
    total = sum(bytes_of(source, name) for name in source.shapes)
    with tqdm(total=total, desc="reading back", unit="B", unit_scale=True) as bar:
        for name, shape in source.shapes.items():
            for what, wanted, found in (
                ("shape", tuple(shape), tuple(result.shapes[name])),
                ("dtype", source.dtypes[name], result.dtypes[name]),
            ):
                if wanted != found:
                    return f"{name} is of {what} {found} instead of {wanted}"
            for start, stop in row_pieces(source, name):
                expected = source.read_rows(name, start, stop)
                if not _same_bits(expected, result.read_rows(name, start, stop)):
                    return f"{name} differs between rows {start} and {stop - 1}"
                bar.update(expected.nbytes)
    return None


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Also of what is not a number, which is not equal to itself."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.itemsize]
    return torch.equal(a.view(integers), b.view(integers))


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
    comparison = compare_outputs(reference, result, rows=model.vocab_size)
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
