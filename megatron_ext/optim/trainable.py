"""Which parameters are trained: all, the embeddings, their new rows, adapters, or what a pattern names."""

import dataclasses
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

import torch
from torch import nn

from megatron_ext.errors import RequestError
from megatron_ext.models.names import EMBEDDING, HEAD, POSITIONS, is_adapter
from megatron_ext.option import option, refuse_unused

MODES = ("embeddings", "new-rows", "lora")


@dataclasses.dataclass(frozen=True)
class TrainableConfig:
    train_only: str | None = option(
        None,
        "train only the embeddings, their new-rows, lora adapters with the embeddings, or the parameters that a "
        "pattern names, such as layers.*.mlp.* (several: with commas); all else is frozen",
        metavar="{embeddings,new-rows,lora,GLOB}",
    )
    train_output_embeddings: bool = option(
        False, "with --train-only embeddings or new-rows: train the output matrix too, not the input matrix alone"
    )
    base_vocab_size: int | None = option(
        None, "with --train-only new-rows: rows of the vocabulary before it was expanded, which stay as they are"
    )

    def validate(self, vocab_size: int, tied: bool, names: Iterable[str]) -> None:
        """Raise RequestError where this selects nothing of a model with parameters `names`, or contradicts itself."""
        if self.train_only not in ("embeddings", "new-rows"):
            refuse_unused(self, ("train_output_embeddings",), "--train-only embeddings or new-rows")
        if self.train_only != "new-rows":
            refuse_unused(self, ("base_vocab_size",), "--train-only new-rows")
        elif self.base_vocab_size is None:
            raise RequestError("--train-only new-rows needs --base-vocab-size: the rows there were before the new ones")
        elif not 0 < self.base_vocab_size < vocab_size:
            raise RequestError(
                f"--base-vocab-size {self.base_vocab_size}: must be from 1 to {vocab_size - 1}, "
                f"for the vocabulary has {vocab_size} rows and the new ones come last"
            )
        if tied and self.train_output_embeddings:
            raise RequestError("--train-output-embeddings has no effect on a tied model: its two matrices are one")
        known = list(names)
        for pattern in self._patterns:
            if not any(fnmatchcase(name, pattern) for name in known):
                raise RequestError(
                    f"--train-only {pattern}: no parameter has such a name; give one of {', '.join(MODES)}, "
                    "or a pattern such as layers.*.mlp.*"
                )

    @property
    def _patterns(self) -> list[str]:
        return [] if self.train_only is None or self.train_only in MODES else self.train_only.split(",")

    @property
    def tells_layers_apart(self) -> bool:
        """Whether a parameter may be trained in one layer and frozen in another."""
        return bool(self._patterns)

    def trains(self, name: str) -> bool:
        """Whether the parameter of this global name is trained, at least some of its rows."""
        if self.train_only is None:
            return True
        if self.train_only == "lora":
            return is_adapter(name) or name in (EMBEDDING, HEAD)
        if self.train_only in MODES:
            return name == EMBEDDING or (self.train_output_embeddings and name == HEAD)
        return any(fnmatchcase(name, pattern) for pattern in self._patterns)

    def first_row(self, name: str) -> int:
        """The first row of a trained parameter that is trained."""
        return self.base_vocab_size or 0 if name in (EMBEDDING, HEAD) else 0

    def freeze(self, module: nn.Module, tied: bool) -> None:
        """Let autograd leave the frozen parameters of a stage alone. A tied head stands for the embedding."""
        for name, param in module.named_parameters():
            param.requires_grad_(self.trains(EMBEDDING if tied and name == HEAD else name))


@dataclasses.dataclass(frozen=True)
class Selection:
    """Parameters that differ only in the number of their layer and share one fate.

    trained, frozen: elements of all of them together; both where only rows from `first_row` on are trained.
    """

    name: str
    count: int
    shape: torch.Size
    first_row: int
    trained: int
    frozen: int


def select(config: TrainableConfig, shapes: dict[str, torch.Size]) -> list[Selection]:
    """Every parameter of the model once, as trained or frozen. shapes: by global name, in the model's order."""
    groups: dict[tuple[str, bool], list[str]] = {}
    for name in shapes:
        groups.setdefault((re.sub(r"^layers\.\d+\.", "layers.{}.", name), config.trains(name)), []).append(name)
    selections = []
    for (pattern, trains), names in groups.items():
        shape = shapes[names[0]]
        first_row = config.first_row(names[0]) if trains else shape[0]
        total, row = len(names) * shape.numel(), shape[1:].numel()
        trained = total - len(names) * first_row * row
        layers = _ranges([int(name.split(".")[1]) for name in names]) if "{}" in pattern else ""
        selections.append(Selection(pattern.format(layers), len(names), shape, first_row, trained, total - trained))
    return selections


def trained_in_products(selections: list[Selection], tied: bool) -> int:
    """Trained weights that are factors of a matrix product: not biases, norms, or an embedding that is only read."""
    looked_up = (POSITIONS,) if tied else (POSITIONS, EMBEDDING)
    return sum(s.trained for s in selections if len(s.shape) == 2 and s.name not in looked_up)


def describe(selections: list[Selection]) -> list[str]:
    """A line for every selection, and the totals. Nothing where all is trained."""
    trained, frozen = sum(s.trained for s in selections), sum(s.frozen for s in selections)
    if not frozen:
        return []
    width = max(len(s.name) for s in selections)
    lines = []
    for s in selections:
        fate = "frozen" if not s.trained else f"trainable from row {s.first_row}" if s.first_row else "trainable"
        shape = " x ".join(map(str, s.shape)) + (f", {s.count} times" if s.count > 1 else "")
        lines.append(f"{s.name:{width}}  {s.trained or s.frozen:>16,}  {fate} ({shape})")
    share = trained / (trained + frozen)
    return [*lines, f"{trained:,} of {trained + frozen:,} parameters are trainable ({share:.2%}), {frozen:,} frozen"]


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5"."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
