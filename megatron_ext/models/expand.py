"""Values for the rows that a larger vocabulary adds to the embedding and to the head.

    mean-subtoken      mean of the old rows that stood for the piece before (Colossal-LLaMA-2)
    weighted-subtoken  the same, each old row counted by the characters that it stood for
    mean-normal        mean of all old rows plus normal noise of their covariance times 1e-9, as transformers'
                       `resize_token_embeddings` draws it
    mean               mean of all old rows: predictions change by at most KL = ln(1 + new / old) (Hewitt 2021,
                       "Initializing New Word Embeddings for Pretrained Language Models")
    random             normal with the model's initial standard deviation: the values of a matrix that starts at this
                       size

Means of sub-tokens repeat: 的人 and 人的 are made of the same rows. Of equal rows all but the first get normal noise
of 2^-8 of their norm, half a unit in the last place of bfloat16: as much as it takes for them to differ in the
coarsest precision that computes with them.

Values depend on the old matrix, the seed and the matrix' name only. They are computed on the CPU in float64 from
fixed blocks, sums over many rows are rounded to float32 (so that the number of threads cannot show), and the result is
rounded to the old matrix' dtype.
"""

import dataclasses
import functools
import hashlib
import math
from collections import defaultdict
from collections.abc import Callable
from fractions import Fraction

import torch
from tqdm import tqdm

from megatron_ext.errors import RequestError
from megatron_ext.models.initialize import normal_slice

METHODS = ("mean-subtoken", "weighted-subtoken", "mean-normal", "mean", "random")

# The old rows of a new one in the order of its text, and how many characters each stands for; the same row may return.
Parts = tuple[tuple[int, Fraction], ...]
# Old rows and whole weights without a common divisor, ids ascending; nothing: the mean of all old rows.
Mixture = tuple[tuple[int, int], ...]
ReadRows = Callable[[int, int], torch.Tensor]

_BLOCK_READ = 4096  # old rows read at once
_BLOCK = 1024  # new rows finished at once
_COVARIANCE_SCALE = 1e-9
_TIE_NOISE = 2.0**-8


@dataclasses.dataclass(frozen=True)
class NewRows:
    """The rows that one matrix gets.

    Attributes:
        values: [new, h] in the old matrix' dtype, on the CPU.
        ties: rows that would have been equal to an earlier one.
        equal: rows that are, compared in bfloat16.
        old_norm: mean norm of the old rows.
        norm, smallest_norm, largest_norm: of the new rows.
    """

    values: torch.Tensor
    ties: int
    equal: int
    old_norm: float
    norm: float
    smallest_norm: float
    largest_norm: float

    def figures(self) -> dict[str, float]:
        """Everything but the values."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "values"}


@dataclasses.dataclass(frozen=True)
class Expansion:
    """How a vocabulary of `old_size` grows by `len(parts)` rows.

    Attributes:
        parts: of every new row, used by the sub-token methods. A row without parts becomes the mean of all old rows.
        method: one of METHODS.
        std: of the method "random".
        norm_correction: scale every new row to the mean norm of the old ones (Nemotron's tokenizer extension).
    """

    old_size: int
    parts: tuple[Parts, ...]
    method: str
    seed: int
    std: float
    norm_correction: bool = False

    @property
    def new_size(self) -> int:
        return self.old_size + len(self.parts)

    def check_vocabulary(self, found: int, where: str) -> None:
        """Raise RequestError where a model's vocabulary of `found` is not the one that grows. where: starts the line.

        A matrix padded or cut to another size than the tokenizer's is neither: which row is whose would be a guess.
        """
        if found == self.new_size:
            raise RequestError(f"{where}: has the new tokenizer's {found} pieces already, leave out --embedding-init")
        if found != self.old_size:
            raise RequestError(
                f"{where}: its vocabulary of {found} matches neither tokenizer, the base has {self.old_size} pieces "
                f"and the new one {self.new_size}: give the model's own tokenizer as the base"
            )

    @torch.no_grad()
    def new_rows(self, name: str, read_rows: ReadRows, progress: bool = False) -> NewRows:
        """The new rows of the matrix called `name`. Goes through the old rows once.

        Args:
            read_rows: (start, stop) to those old rows [stop - start, h], in one dtype.
            progress: show a bar.
        """
        old = _Survey(self, name, read_rows, progress)
        values = torch.empty(len(self.parts), old.mean.numel(), dtype=old.dtype)
        tied = torch.tensor(self._ties(), dtype=torch.float64)
        seen: set[bytes] = set()
        norms = []
        for start in range(0, len(values), _BLOCK):
            stop = min(start + _BLOCK, len(values))
            rows = self._block(name, old, start, stop)
            noise = _normal(self.seed, f"{name}/ties", values.shape, start, stop)
            rows += noise * (_TIE_NOISE * tied[start:stop, None] * _norms(rows) / noise.shape[1] ** 0.5)
            if self.norm_correction:
                rows *= old.norm / _norms(rows).clamp_min(torch.finfo(torch.float32).tiny)
            values[start:stop] = rows
            norms.append(_norms(values[start:stop].double()))
            coarse = values[start:stop].bfloat16().view(torch.int16).numpy()
            seen.update(hashlib.sha256(row.tobytes()).digest() for row in coarse)
        all_norms = torch.cat(norms)
        return NewRows(
            values,
            ties=int(tied.sum()),
            equal=len(values) - len(seen),
            old_norm=old.norm,
            norm=all_norms.mean().item(),
            smallest_norm=all_norms.min().item(),
            largest_norm=all_norms.max().item(),
        )

    @functools.cached_property
    def mixtures(self) -> tuple[Mixture, ...]:
        """Of every new row. Equal mixtures give equal rows, whatever the order of their parts."""
        if not self.method.endswith("subtoken"):
            return ((),) * len(self.parts)
        return tuple(_mixture(parts, weighted=self.method == "weighted-subtoken") for parts in self.parts)

    def _ties(self) -> list[bool]:
        """Which rows would be equal to an earlier one."""
        if self.method in ("mean-normal", "random"):
            return [False] * len(self.parts)
        first: dict[Mixture, int] = {}
        return [first.setdefault(mixture, row) != row for row, mixture in enumerate(self.mixtures)]

    def _block(self, name: str, old: "_Survey", start: int, stop: int) -> torch.Tensor:
        """New rows `start` to `stop` before ties are broken: float64 [stop - start, h]."""
        h = old.mean.numel()
        if self.method == "random":
            first, last = self.old_size + start, self.old_size + stop
            return _normal(self.seed, name, torch.Size([self.new_size, h]), first, last, self.std)
        if old.deviations is not None:
            return old.mean + old.deviations[start:stop]
        rows = torch.zeros(stop - start, h, dtype=torch.float64)
        mixtures = self.mixtures[start:stop]
        for slot in range(max(map(len, mixtures))):  # one old row after the other: a fixed order of additions
            longer = [i for i, mixture in enumerate(mixtures) if len(mixture) > slot]
            ids = torch.tensor([mixtures[i][slot][0] for i in longer])
            weights = torch.tensor([mixtures[i][slot][1] for i in longer], dtype=torch.float64)
            rows[longer] += weights[:, None] * old.sources[torch.searchsorted(old.ids, ids)]
        totals = torch.tensor([sum(weight for _, weight in mixture) for mixture in mixtures], dtype=torch.float64)
        return torch.where(totals[:, None] > 0, rows / totals[:, None], old.mean)


class _Survey:
    """What the new rows take from the old ones, gathered in one pass.

    Attributes:
        dtype: of the old matrix.
        mean: of all rows, float64 [h].
        norm: mean of the rows' norms.
        ids, sources: the rows that are part of a mixture, int64 [n] ascending and float64 [n, h].
        deviations: for "mean-normal", what to add to the mean, float64 [new, h].
    """

    def __init__(self, plan: Expansion, name: str, read_rows: ReadRows, progress: bool):
        nothing = read_rows(0, 0)
        self.dtype, columns = nothing.dtype, nothing.shape[1]
        used = {index for mixture in plan.mixtures for index, _ in mixture}
        self.ids = torch.tensor(sorted(used), dtype=torch.int64)
        self.sources = torch.empty(len(used), columns, dtype=torch.float64)
        total, norms = torch.zeros(columns, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        spread = _Spread(plan, name, columns) if plan.method == "mean-normal" else None
        with tqdm(total=plan.old_size, unit=" rows", desc=name, disable=not progress) as bar:
            for start in range(0, plan.old_size, _BLOCK_READ):
                stop = min(start + _BLOCK_READ, plan.old_size)
                rows = read_rows(start, stop).double()
                total += rows.sum(0)
                norms += _norms(rows).sum()
                here = (self.ids >= start) & (self.ids < stop)
                self.sources[here] = rows[self.ids[here] - start]
                if spread is not None:
                    spread.add(rows, start)
                bar.update(stop - start)
        self.mean = _rounded(total / plan.old_size)
        self.norm = _rounded(norms / plan.old_size).item()
        self.deviations = None if spread is None else spread.deviations(self.mean)


class _Spread:
    """Z (E - mean) sqrt(scale / old), with Z standard normal [new, old], while the old rows E pass by.

    It is normal with the covariance of the old rows times the scale, whatever its rank, and asks for no [h, h] matrix.
    """

    def __init__(self, plan: Expansion, name: str, columns: int):
        self._plan, self._name = plan, name
        self._products = torch.zeros(len(plan.parts), columns, dtype=torch.float64)
        self._sums = torch.zeros(len(plan.parts), 1, dtype=torch.float64)

    def add(self, rows: torch.Tensor, start: int) -> None:
        shape = torch.Size([self._plan.old_size, len(self._plan.parts)])
        for low in range(0, len(rows), _BLOCK):
            block = rows[low : low + _BLOCK]
            z = _normal(self._plan.seed, f"{self._name}/deviations", shape, start + low, start + low + len(block)).T
            self._products.addmm_(z, block)
            self._sums += z.sum(1, keepdim=True)

    def deviations(self, mean: torch.Tensor) -> torch.Tensor:
        scale = (_COVARIANCE_SCALE / self._plan.old_size) ** 0.5
        return (self._products - self._sums * mean) * scale


def _normal(seed: int, name: str, shape: torch.Size, start: int, stop: int, std: float = 1.0) -> torch.Tensor:
    """Rows of a normal matrix of this shape that the seed and the name determine: float64 [stop - start, columns]."""
    rows = torch.empty(stop - start, shape[1])
    normal_slice(shape, (start, 0), rows, std, name, seed)
    return rows.double()


def _mixture(parts: Parts, weighted: bool) -> Mixture:
    sums: defaultdict[int, Fraction] = defaultdict(Fraction)
    for index, characters in parts:
        sums[index] += characters if weighted else 1
    unit = math.lcm(*(value.denominator for value in sums.values()))
    whole = {index: int(value * unit) for index, value in sums.items()}
    divisor = math.gcd(*whole.values()) or 1
    return tuple((index, whole[index] // divisor) for index in sorted(whole))


def _norms(rows: torch.Tensor) -> torch.Tensor:
    """[n, h] -> [n, 1]"""
    return _rounded(torch.linalg.vector_norm(rows, dim=1, keepdim=True))


def _rounded(sums: torch.Tensor) -> torch.Tensor:
    return sums.float().double()
