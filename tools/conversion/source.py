"""What is converted: a model's shape and its weights, to be read as they are needed.

A conversion is a chain of `Weights`: the source's, wrapped once for everything that changes on the way.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megatron_ext.checkpoint.read import Weights
from megatron_ext.errors import RequestError
from megatron_ext.models import ModelConfig, parameter_shapes
from tokenizer.formats.record import TokenizerRecord

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CONFIG, GENERATION = "config.json", "generation_config.json"


@dataclasses.dataclass(frozen=True)
class Source:
    """A model on its way.

    Attributes:
        weights: by our global names; all that `model` has, and no others.
        tokenizer: file or folder of the tokenizer that lies beside the weights, if one does.
        record: which tokenizer's ids the model was trained on; None where that is not known.
        origin: where it comes from, for the manifest.
        hugging_face: contents of config.json and generation_config.json by file name, as they came: what they say
            beyond the shape is to arrive with the weights. None where neither did.
        merged_adapters: how many low-rank adapters of the source have become part of the weights.
        has_optimizer: an optimizer's state lies beside the weights, which stays behind.
    """

    model: ModelConfig
    weights: Weights
    tokenizer: Path | None
    origin: str
    hugging_face: dict[str, Any] | None = None
    record: TokenizerRecord | None = None
    merged_adapters: int = 0
    has_optimizer: bool = False

    def check(self, where: str, description: str) -> "Source":
        """Return itself, or raise RequestError naming the first weight that is missing, left over or of another shape.

        where: starts the message; description: the file that says what the shapes should be.
        """
        check_shapes(self.weights.shapes, parameter_shapes(self.model), where, description)
        check_dtypes(self.weights.dtypes, where)
        return self


def check_shapes(
    found: dict[str, torch.Size],
    wanted: dict[str, torch.Size],
    where: str,
    description: str,
    longer: Sequence[str] = (),
) -> None:
    """Raise RequestError naming the first weight that is missing, left over or of another shape.

    where: starts the message; description: the file that says what the shapes should be. longer: weights that may have
    more rows.
    """
    for problem, names in (("lacks", wanted.keys() - found.keys()), ("has an unknown", found.keys() - wanted.keys())):
        if names:
            raise RequestError(f"{where}: {problem} weight {min(names)} ({len(names)} in all)")
    for name, shape in wanted.items():
        padded = name in longer and found[name][0] >= shape[0] and found[name][1:] == shape[1:]
        if found[name] != shape and not padded:
            raise RequestError(f"{where}: {name} is {tuple(found[name])}, {description} asks for {tuple(shape)}")


def check_dtypes(found: dict[str, torch.dtype], where: str) -> None:
    """Raise RequestError naming the first weight that is no matrix of real numbers, such as a quantized one."""
    for name, dtype in found.items():
        if dtype not in _DTYPES:
            raise RequestError(
                f"{where}: {name} is stored as {str(dtype).removeprefix('torch.')}, which cannot be converted; "
                f"{', '.join(str(dtype).removeprefix('torch.') for dtype in _DTYPES)} can"
            )


class WatchedWeights:
    """`Weights` that move a bar of bytes as they are read."""

    def __init__(self, weights: Weights):
        self._weights = weights
        self.shapes, self.dtypes = weights.shapes, weights.dtypes
        self.bar = tqdm(total=sum(bytes_of(weights, name) for name in self.shapes), unit="B", unit_scale=True)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        rows = self._weights.read_rows(name, start, stop)
        self.bar.update(rows.nbytes)
        return rows


def bytes_of(weights: Weights, name: str) -> int:
    return weights.shapes[name].numel() * weights.dtypes[name].itemsize


def read_table(folder: Path, name: str, flag: str = "--input") -> dict[str, Any]:
    """Read the fields of a file. Raises RequestError, a line that starts with the flag, unless it is one such table."""
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RequestError(f"{flag} {folder}: {name} cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise RequestError(f"{flag} {folder}: {name} cannot be read (it is no table of fields)")
    return content
