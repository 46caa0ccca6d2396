"""A Hugging Face model folder as the source of a conversion, and as its result.

config.json, weights as safetensors in one file or in shards with an index, and tokenizer files.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_ext.checkpoint.read import Weights
from megatron_ext.checkpoint.write import row_pieces
from megatron_ext.errors import RequestError
from megatron_ext.models import parameter_shapes
from tools.conversion import llama
from tools.conversion.source import Source, bytes_of

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_KINDS = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def open_hf(folder: Path) -> Source:
    """The model in `folder`; raises RequestError where a file is missing, broken or of an unknown model."""
    config = _read_config(folder)
    model = llama.from_hf_config(config)
    weights = FolderWeights(folder, left_out={"lm_head.weight"} if model.tied else set())
    source = Source(model, weights, llama.token_ids(config), tokenizer=folder, origin="hugging face")
    return source.check(f"--input {folder}", "config.json")


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(f"--input {folder}: config.json cannot be read ({error})") from error


class FolderWeights:
    """The `Weights` in a folder's safetensors files, by our names.

    left_out: ours of those to pass over.
    """

    def __init__(self, folder: Path, left_out: set[str]):
        self._folder = folder
        self.shapes: dict[str, torch.Size] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._places: dict[str, tuple[str, str]] = {}
        for file in _files(folder):
            with self._open(file) as shard:
                for key in shard.keys():  # noqa: SIM118  # safe_open is no mapping
                    name = llama.from_hf_name(key)
                    if name in left_out or llama.is_derived(name):
                        continue
                    part = shard.get_slice(key)
                    self.shapes[name], self.dtypes[name] = torch.Size(part.get_shape()), part[0:0].dtype
                    self._places[name] = file, key

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        file, key = self._places[name]
        with self._open(file) as shard:
            return shard.get_slice(key)[start:stop]

    @contextlib.contextmanager
    def _open(self, file: str) -> Iterator[Any]:
        if not (self._folder / file).is_file():
            raise RequestError(f"--input {self._folder}: {file} is missing")
        try:
            with safe_open(self._folder / file, framework="pt") as shard:
                yield shard
        except SafetensorError as error:
            raise RequestError(f"--input {self._folder}: {file} is not a whole safetensors file ({error})") from error


def _files(folder: Path) -> list[str]:
    if not (folder / INDEX).is_file():
        return [SINGLE]
    try:
        return sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError) as error:
        raise RequestError(f"--input {folder}: {INDEX} cannot be read ({error})") from error


def write_hf(source: Source, folder: Path, shard_bytes: int) -> None:
    """Write config.json and the weights in files of at most `shard_bytes` (a larger tensor has its own)."""
    weights = source.weights
    config = llama.to_hf_config(source.model) | source.token_ids
    config["dtype"] = config["torch_dtype"] = str(weights.dtypes["embed_tokens.weight"]).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    sizes = {name: bytes_of(weights, name) for name in parameter_shapes(source.model)}
    shards = _fill_shards(sizes, shard_bytes)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(weights, names, folder / file)
        weight_map |= dict.fromkeys(map(llama.to_hf_name, names), file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_shard(weights: Weights, names: list[str], file: Path) -> None:
    """One safetensors file, a piece of a weight in memory at a time.

    Its format: the length of the header (8 bytes, little endian), the header in JSON, padded with spaces to a multiple
    of 8 bytes, the values (https://huggingface.co/docs/safetensors, "Format").
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        start, end = end, end + bytes_of(weights, name)
        kind, shape = _KINDS[weights.dtypes[name]], list(weights.shapes[name])
        header[llama.to_hf_name(name)] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            for rows in row_pieces(weights, name):
                stream.write(weights.read_rows(name, *rows).contiguous().view(torch.uint8).numpy().data)


def _fill_shards(sizes: dict[str, int], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    return shards
