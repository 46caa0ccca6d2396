"""Is the result of a conversion the model that it was made of? Its weights read back, and what it computes.

Two checks that find different mistakes. `difference_of_weights` finds what was lost between memory and disk, in any
tensor, to the last bit; a wrong mapping it cannot see, for both sides went through it. `compare` finds that one: of two
programs that ran the two forms of the model on one prompt.
"""

import dataclasses

import torch
from tqdm import tqdm

from megatron_ext.checkpoint.read import Weights
from megatron_ext.checkpoint.write import row_pieces
from tools.conversion.proof.outputs import LOGITS, Outputs
from tools.conversion.source import bytes_of

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


def compare(reference: Outputs, result: Outputs, rows: int | None = None) -> Comparison:
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
