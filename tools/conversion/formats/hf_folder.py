"""A Hugging Face model folder as the source of a conversion, and as its result.

config.json, generation_config.json, weights in one file or in shards with an index, and tokenizer files.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from megatron_ext.checkpoint.read import Weights
from megatron_ext.checkpoint.write import row_pieces
from megatron_ext.errors import RequestError
from megatron_ext.models import ModelConfig
from megatron_ext.models.names import EMBEDDING, HEAD
from tools.conversion.changes.tokenizer import TOKEN_IDS, token_ids, with_token_ids
from tools.conversion.families import FAMILIES, Family, family_for, family_of
from tools.conversion.formats.safetensors_file import INDEX, SINGLE, SafetensorsFiles, write_safetensors
from tools.conversion.formats.tensor_files import TensorFiles
from tools.conversion.formats.torch_files import TorchFiles
from tools.conversion.rows import Binding, bind, theirs_shapes, to_ours, to_theirs
from tools.conversion.source import CONFIG, GENERATION, Source, bytes_of, check_dtypes, check_shapes, read_table

# files that change what transformers' from_pretrained reads
_ELSEWHERE = {
    "adapter_config.json": "an adapter on top of the weights",
    "shard-?????-model-?????-of-?????.safetensors": "a distributed checkpoint instead",
}


def open_hf(folder: Path) -> Source:
    """Open the model in `folder`; raises RequestError where a file is missing, broken or of an unknown model."""
    files = {CONFIG: read_table(folder, CONFIG)}
    if (folder / GENERATION).is_file():
        files[GENERATION] = read_table(folder, GENERATION)
    try:
        family = family_of(files[CONFIG])
        model = family.read(files[CONFIG])
    except RequestError as error:
        raise RequestError(f"--input {folder}: {error}") from error
    stored = open_tensors(folder)
    bindings = _locate(bind(family.rules, model), stored, family, model, f"--input {folder}")
    weights = to_ours(stored, bindings, model)
    return Source(model, weights, tokenizer=folder, origin="hugging face", hugging_face=files)


def open_tensors(folder: Path) -> TensorFiles:
    """Open all stored tensors by the files' names: safetensors, or else what torch.save wrote; as transformers does.

    Raises RequestError also where transformers would read more, or something else, than these.
    """
    for pattern, what in _ELSEWHERE.items():
        found = next(folder.glob(pattern), None)
        if found is not None:
            raise RequestError(f"--input {folder}: with {found.name} there transformers reads {what}: move it away")
    is_bin = TorchFiles.is_in(folder) and not SafetensorsFiles.is_in(folder)
    return (TorchFiles if is_bin else SafetensorsFiles).open_folder(folder)


def _locate(bindings: list[Binding], stored: Weights, family: Family, model: ModelConfig, where: str) -> list[Binding]:
    """The bindings with names as they are stored. Raises RequestError unless names and shapes are all accounted for."""
    prefix = family.optional_prefix
    wanted = theirs_shapes(bindings, model)
    whole = {name if name in wanted or prefix + name not in wanted else prefix + name: name for name in stored.shapes}
    if len(whole) < len(stored.shapes):
        short = next(name for name in stored.shapes if prefix + name in stored.shapes)
        raise RequestError(f"{where}: {prefix}{short} and {short} are one weight: remove one of them")
    found = {full: name for full, name in whole.items() if not full.endswith(family.derived)}
    spare_head = found.pop(HEAD, None) if HEAD not in wanted else None
    check_shapes({full: stored.shapes[name] for full, name in found.items()}, wanted, where, CONFIG)
    check_dtypes({name: stored.dtypes[name] for name in found.values()}, where)
    located = [dataclasses.replace(binding, theirs=found[binding.theirs]) for binding in bindings]
    if spare_head is not None:
        embedding = next(binding.theirs for binding in located if EMBEDDING in binding.ours)
        _check_copy(stored, spare_head, embedding, where)
    return located


def _check_copy(stored: Weights, head: str, embedding: str, where: str) -> None:
    """Raise RequestError if a tied model's folder holds another head than its embedding: which counts is a guess."""
    equal = stored.shapes[head] == stored.shapes[embedding] and all(
        torch.equal(stored.read_rows(head, *rows), stored.read_rows(embedding, *rows))
        for rows in row_pieces(stored, embedding)
    )
    if not equal:
        raise RequestError(
            f"{where}: {CONFIG} says that the head is the embedding (tie_word_embeddings), but {head} differs from "
            f"{embedding}: set tie_word_embeddings to false, or remove {head}"
        )


def write_hf(source: Source, folder: Path, shard_bytes: int, model_type: str | None = None) -> None:
    """Write config.json and the weights in files of at most `shard_bytes` (a larger tensor has its own).

    model_type: of FAMILIES; by default the one that the model came from, else the first that has words for it.
    """
    family, files = config_files(source, model_type)
    weights = to_theirs(source.weights, bind(family.rules, source.model))
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    sizes = {name: bytes_of(weights, name) for name in weights.shapes}
    shards = _fill_shards(sizes, shard_bytes)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / file, weights, names)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def config_files(source: Source, model_type: str | None) -> tuple[Family, dict[str, Any]]:
    """Choose the family to which a model goes, and make config.json and generation_config.json, by file name.

    What came with the model stays as it was, but for what has changed. Raises RequestError where the family lacks
    words for the model.
    """
    carried = source.hugging_face or {}
    config = carried.get(CONFIG, {})
    if model_type is not None:
        family = FAMILIES[model_type]
    else:
        family = family_of(config) if "model_type" in config else family_for(source.model)
    dtype = str(source.weights.dtypes[EMBEDDING]).removeprefix("torch.")
    ids = token_ids(source.record)
    if config.get("model_type") == family.model_type:
        config = family.update(config, source.model)
        config |= {name: dtype for name in ("dtype", "torch_dtype") if name in config}
    else:
        carried_ids = {name: config[name] for name in TOKEN_IDS if name in config}
        # left out, transformers would take those of the family's own first vocabulary
        config = family.write(source.model) | {"dtype": dtype, "torch_dtype": dtype} | ids | carried_ids
    generation = carried.get(GENERATION)
    if source.record is not None:
        config = with_token_ids(config, ids)
        generation = generation and with_token_ids(generation, {name: i for name, i in ids.items() if i is not None})
    own = {name: config[name] for name in TOKEN_IDS if config.get(name) is not None}
    return family, {CONFIG: config, GENERATION: generation or {"_from_model_config": True} | own}


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
