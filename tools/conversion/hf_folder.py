"""A Hugging Face model folder: config.json, safetensors in shards with an index, tokenizer files."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_ext.errors import RequestError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def read_config(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(f"--input {folder}: config.json cannot be read ({error})") from error


def read_weights(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor by its Hugging Face name, one at a time. RequestError where a shard is missing or broken."""
    if (folder / INDEX).is_file():
        try:
            files = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError) as error:
            raise RequestError(f"--input {folder}: {INDEX} cannot be read ({error})") from error
    else:
        files = [SINGLE]
    for name in files:
        if not (folder / name).is_file():
            raise RequestError(f"--input {folder}: {name} is missing")
        try:
            with safe_open(folder / name, framework="pt") as shard:
                for key in shard.keys():  # noqa: SIM118  # safe_open is no mapping
                    yield key, shard.get_tensor(key)
        except SafetensorError as error:
            raise RequestError(f"--input {folder}: {name} is not a whole safetensors file ({error})") from error


def write_model(
    folder: Path,
    config: dict[str, Any],
    sizes: dict[str, int],
    read: Callable[[list[str]], dict[str, torch.Tensor]],
    shard_bytes: int,
) -> None:
    """Write config.json and the weights in shards of at most `shard_bytes` (a larger tensor has its own).

    sizes: bytes of every tensor, in the order to write; read(names): those tensors.
    """
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    shards = _fill_shards(sizes, shard_bytes)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(read(names), folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


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


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Put a tokenizer beside the weights: a folder's tokenizer files, or one tokenizer.model."""
    if source.is_file():
        shutil.copyfile(source, folder / "tokenizer.model")
        return
    names = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    found = [name for name in names if (source / name).is_file()]
    if not found:
        raise RequestError(f"--tokenizer {source}: no tokenizer files there")
    for name in found:
        shutil.copyfile(source / name, folder / name)
