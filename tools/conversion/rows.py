"""Names and row orders of another program's tensors against ours: one table, read in both directions.

What differs between checkpoints of one model is how tensors are called and which of them lie in one: a query, key and
value matrix fused into one, say. Both are said by a `Rule`; both directions of a conversion follow from it.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence

import torch

from megatron_ext.checkpoint.read import Weights
from megatron_ext.errors import RequestError
from megatron_ext.models import ModelConfig, parameter_shapes


def one(_: ModelConfig) -> int:
    return 1


def always(_: ModelConfig) -> bool:
    return True


def key_value_heads(model: ModelConfig) -> int:
    """Count groups of a fused attention matrix: a key/value head's queries, its key, its value (Megatron's order)."""
    return model.kv_heads


@dataclasses.dataclass(frozen=True)
class Rule:
    """A tensor there and the parameters here whose rows it holds.

    Attributes:
        theirs, ours: names; "{}" stands for the number of a layer. A rule holds for the models that have `ours`.
        groups: into how many groups theirs is cut; each has an equal share of the rows of every one of ours, in order.
        when: of those models, for which.
        transposed: theirs is stored as [in, out]; its rows are what is said here of its columns.
    """

    theirs: str
    ours: tuple[str, ...]
    groups: Callable[[ModelConfig], int] = one
    when: Callable[[ModelConfig], bool] = always
    transposed: bool = False


@dataclasses.dataclass(frozen=True)
class Binding:
    """A rule applied to one tensor of one model. Names are complete."""

    theirs: str
    ours: tuple[str, ...]
    groups: int
    transposed: bool = False


def bind(rules: Sequence[Rule], model: ModelConfig) -> list[Binding]:
    """Apply the rules of `model`, for every layer, in the order of the rules and layers."""
    shapes = parameter_shapes(model)
    bindings = []
    for layered, block in itertools.groupby(rules, lambda rule: "{}" in rule.theirs):
        block_rules = [rule for rule in block if rule.when(model)]
        for layer in range(model.num_layers if layered else 1):
            for rule in block_rules:
                ours = tuple(name.format(layer) for name in rule.ours)
                if all(name in shapes for name in ours):
                    bindings.append(Binding(rule.theirs.format(layer), ours, rule.groups(model), rule.transposed))
    bound = {name for binding in bindings for name in binding.ours}
    assert bound == shapes.keys(), f"no rule for {sorted(shapes.keys() - bound)}"
    return bindings


# (name, first row, one past the last row) of a tensor that is read
_Segment = tuple[str, int, int]


class RowView:
    """`Weights` whose every tensor is made of rows of others, one range after the other.

    Raises RequestError where those of one tensor differ in dtype.
    """

    def __init__(self, weights: Weights, segments: dict[str, list[_Segment]]):
        self._weights = weights
        self._segments = segments
        self.shapes: dict[str, torch.Size] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for name, parts in segments.items():
            first = parts[0][0]
            rows = sum(stop - start for _, start, stop in parts)
            self.shapes[name] = torch.Size([rows, *weights.shapes[first][1:]])
            self.dtypes[name] = weights.dtypes[first]
            other = next((part for part, _, _ in parts if weights.dtypes[part] != self.dtypes[name]), None)
            if other is not None:
                raise RequestError(
                    f"{first} is of {weights.dtypes[first]} and {other} of {weights.dtypes[other]}, but in the result "
                    f"they lie in one tensor, {name}: give --dtype"
                )

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        pieces, passed = [], 0
        for source, first, last in self._segments[name]:
            low, high = max(start - passed, 0), min(stop - passed, last - first)
            if low < high:
                pieces.append(self._weights.read_rows(source, first + low, first + high))
            passed += last - first
        if not pieces:
            return self._weights.read_rows(self._segments[name][0][0], 0, 0)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


class Transposed:
    """`Weights` of which some matrices are given with rows and columns exchanged."""

    def __init__(self, weights: Weights, names: Iterable[str]):
        self._weights, self._names = weights, frozenset(names)
        self.shapes = {name: self._turned(name, shape) for name, shape in weights.shapes.items()}
        self.dtypes = weights.dtypes

    def _turned(self, name: str, shape: torch.Size) -> torch.Size:
        return torch.Size(reversed(shape)) if name in self._names else shape

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        if name not in self._names:
            return self._weights.read_rows(name, start, stop)
        return self._weights.read_rows(name, 0, self._weights.shapes[name][0])[:, start:stop].T.contiguous()


def _transposed(bindings: Iterable[Binding]) -> Iterable[str]:
    return (binding.theirs for binding in bindings if binding.transposed)


def to_theirs(weights: Weights, bindings: Sequence[Binding]) -> Weights:
    """Give our weights under their names and in their order of rows."""
    segments: dict[str, list[_Segment]] = {}
    for binding in bindings:
        sizes = [(name, weights.shapes[name][0] // binding.groups) for name in binding.ours]
        segments[binding.theirs] = [
            (name, group * size, (group + 1) * size) for group in range(binding.groups) for name, size in sizes
        ]
    return Transposed(RowView(weights, segments), _transposed(bindings))


def to_ours(weights: Weights, bindings: Sequence[Binding], model: ModelConfig) -> Weights:
    """Give their weights, of the shapes that `theirs_shapes` says, under our names, in the order of the model."""
    shapes = parameter_shapes(model)
    segments: dict[str, list[_Segment]] = {name: [] for name in shapes}
    for binding in bindings:
        sizes = [shapes[name][0] // binding.groups for name in binding.ours]
        for name, size, offset in zip(binding.ours, sizes, itertools.accumulate(sizes, initial=0), strict=False):
            segments[name] = [
                (binding.theirs, group * sum(sizes) + offset, group * sum(sizes) + offset + size)
                for group in range(binding.groups)
            ]
    return RowView(Transposed(weights, _transposed(bindings)), segments)


def theirs_shapes(bindings: Iterable[Binding], model: ModelConfig) -> dict[str, torch.Size]:
    """Say what shape every one of their tensors must have."""
    shapes = parameter_shapes(model)
    sizes = {
        binding: torch.Size([sum(shapes[name][0] for name in binding.ours), *shapes[binding.ours[0]][1:]])
        for binding in bindings
    }
    return {
        binding.theirs: torch.Size(reversed(size)) if binding.transposed else size for binding, size in sizes.items()
    }
