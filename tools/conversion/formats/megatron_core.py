"""megatron-core's distributed checkpoints (format torch_dist) as the source of a conversion, and as its result.

DIR/latest_checkpointed_iteration.txt    "release", or the number of an iteration
DIR/release/, DIR/iter_0000100/
    metadata.json         the format
    common.pt             the arguments of the run, the iteration
    .metadata, *.distcp   torch DCP: the tensors of all layers stacked, or numbered by layer; optimizer states

Read: weights and shape; optimizer states, pickled objects and `_extra_state` of Transformer Engine are passed over.
Written: weights and shape, as a release, which Megatron-LM's --load takes.
"""

import argparse
import json
import pickle
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from megatron_ext.checkpoint.read import StoredSlice, WeightReader
from megatron_ext.checkpoint.write import write_weights
from megatron_ext.errors import RequestError
from megatron_ext.models import ModelConfig
from megatron_ext.models.names import EMBEDDING, HEAD, POSITIONS
from tokenizer.formats.record import stored_record
from tools.conversion.formats.megatron_args import from_args, to_args
from tools.conversion.rows import Rule, bind, key_value_heads, theirs_shapes, to_ours, to_theirs
from tools.conversion.source import Source, check_dtypes, check_shapes

_TRACKER, _RELEASE = "latest_checkpointed_iteration.txt", "release"
_FORMAT, _COMMON = "metadata.json", "common.pt"
_BACKEND = "torch_dist"
_CARRIED, _TOKENIZER = "hugging_face", "tokenizer"  # keys of ours in common.pt, which Megatron-LM passes over
_WORDS, _OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
_LAYER = "decoder.layers.{}."
_STACKED = re.compile(r"decoder\.layers\.(?!\d)")
_NO_WEIGHT = re.compile(r"(chained_\d+\.)?optimizer\.|.*\._extra_state|.*/shard_")  # the last: of objects
_GATE_APART = "mlp.linear_fc1.weight_w"
# what of Python's own library arguments may be made of; any class of other packages may be among them
_OF_PYTHON = frozenset(
    {"_codecs", "argparse", "collections", "copyreg", "datetime", "enum", "functools", "pathlib", "signal", "types"}
)
_BUILTINS = frozenset(f"builtins.{name}" for name in ("bytearray", "complex", "frozenset", "getattr", "set", "slice"))


def _rules(model: ModelConfig, gate_apart: bool) -> Iterator[Rule]:
    """Tensors' names with layers numbered. gate_apart: the gate and what it multiplies are tensors of their own."""
    yield Rule(_WORDS, (EMBEDDING,))
    yield Rule("embedding.position_embeddings.weight", (POSITIONS,))
    for kind in ("weight", "bias"):
        q, k, v, o = (f"layers.{{}}.self_attn.{name}_proj.{kind}" for name in "qkvo")
        gate, up, down = (f"layers.{{}}.mlp.{name}_proj.{kind}" for name in ("gate", "up", "down"))
        yield Rule(f"{_LAYER}self_attention.linear_qkv.layer_norm_{kind}", (f"layers.{{}}.input_layernorm.{kind}",))
        yield Rule(f"{_LAYER}self_attention.linear_qkv.{kind}", (q, k, v), key_value_heads)
        for name in "qk":
            yield Rule(
                f"{_LAYER}self_attention.{name}_layernorm.{kind}", (f"layers.{{}}.self_attn.{name}_norm.{kind}",)
            )
        yield Rule(f"{_LAYER}self_attention.linear_proj.{kind}", (o,))
        yield Rule(f"{_LAYER}mlp.linear_fc1.layer_norm_{kind}", (f"layers.{{}}.post_attention_layernorm.{kind}",))
        if model.activation != "swiglu":
            yield Rule(f"{_LAYER}mlp.linear_fc1.{kind}", (up,))
        elif gate_apart:
            yield Rule(f"{_LAYER}mlp.linear_fc1.{kind}_w", (gate,))
            yield Rule(f"{_LAYER}mlp.linear_fc1.{kind}_v", (up,))
        else:
            yield Rule(f"{_LAYER}mlp.linear_fc1.{kind}", (gate, up))
        yield Rule(f"{_LAYER}mlp.linear_fc2.{kind}", (down,))
    for kind in ("weight", "bias"):
        yield Rule(f"decoder.final_layernorm.{kind}", (f"norm.{kind}",))
    yield Rule(_OUTPUT, (HEAD,))


def write_megatron(source: Source, folder: Path) -> None:
    """Write a release into an existing, empty folder. Raises RequestError before that for what cannot be expressed.

    Layers are stacked and nothing is padded: megatron-core pads the vocabulary as it loads, for its own layout.
    """
    model = source.model
    common = {"args": to_args(model), "checkpoint_version": 3.0, "iteration": 0, _CARRIED: source.hugging_face}
    common[_TOKENIZER] = None if source.record is None else source.record.plain()
    release = folder / _RELEASE
    release.mkdir()
    theirs = to_theirs(source.weights, bind(list(_rules(model, gate_apart=False)), model))
    write_weights(release, theirs, _stacked(model.num_layers))
    torch.save(common, release / _COMMON)
    (release / _FORMAT).write_text(
        json.dumps(
            {
                "sharded_backend": _BACKEND,
                "sharded_backend_version": 1,
                "common_backend": "torch",
                "common_backend_version": 1,
            }
        ),
        encoding="utf-8",
    )
    (folder / _TRACKER).write_text(_RELEASE, encoding="utf-8")


def _stacked(layers: int) -> Callable[[str], StoredSlice]:
    """Numbered names -> a slice of the tensor of all layers."""

    def place(name: str) -> StoredSlice:
        layer = re.match(r"decoder\.layers\.(\d+)\.", name)
        if layer is None:
            return StoredSlice(name)
        return StoredSlice("decoder.layers." + name[layer.end() :], int(layer[1]), layers)

    return place


def _numbered(sizes: dict[str, torch.Size]) -> dict[str, StoredSlice]:
    """Numbered names of all weights, whether their layers are stacked or not."""
    places = {}
    for key, size in sizes.items():
        if _NO_WEIGHT.match(key):
            continue
        stacked = _STACKED.match(key)
        if stacked is None:
            places[key] = StoredSlice(key)
        else:
            for layer in range(size[0]):
                places[_LAYER.format(layer) + key[stacked.end() :]] = StoredSlice(key, layer, size[0])
    return places


def open_megatron(folder: Path, vocab_size: int | None = None) -> Source:
    """Open the model in `folder`: the release or iteration that its tracker names, or itself a checkpoint.

    vocab_size: rows of the embedding that belong to tokens; those above are padding and are left out. By default what
    the checkpoint's arguments say. Raises RequestError where a file is missing, broken or of an unknown model, and
    where the number of tokens is not known.
    """
    where = f"--input {folder}"
    checkpoint = _find(folder, where)
    common = _read_common(checkpoint / _COMMON, where)
    args = common["args"]
    try:
        reader = WeightReader(checkpoint, _numbered, check_values=True)
    except RequestError as error:
        raise RequestError(f"{where}: {error}") from error
    rows = reader.shapes[_WORDS][0] if _WORDS in reader.shapes else 0
    try:
        model = from_args(args, _vocab_size(args, vocab_size, rows))
    except RequestError as error:
        raise RequestError(f"{where}: {_COMMON}: {error}") from error
    gate_apart = any(name.endswith(_GATE_APART) for name in reader.shapes)
    bindings = bind(list(_rules(model, gate_apart)), model)
    check_shapes(reader.shapes, theirs_shapes(bindings, model), where, _COMMON, longer=(_WORDS, _OUTPUT))
    check_dtypes(reader.dtypes, where)
    reader.check_whole(where)
    weights = to_ours(reader, bindings, model)
    record = stored_record(common.get(_TOKENIZER), f"{where}: {_COMMON}")
    return Source(model, weights, None, "megatron-core", hugging_face=common.get(_CARRIED), record=record)


def _find(folder: Path, where: str) -> Path:
    """The folder with the files."""
    checkpoint = folder if (folder / _FORMAT).is_file() else folder / _latest(folder, where)
    if next(checkpoint.glob("mp_rank_*"), None) is not None:
        raise RequestError(
            f"{where}: {checkpoint.name} is of Megatron-LM's older format (mp_rank_*): save it once with --ckpt-format "
            f"{_BACKEND}"
        )
    try:
        backend = json.loads((checkpoint / _FORMAT).read_text(encoding="utf-8"))["sharded_backend"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise RequestError(f"{where}: {checkpoint.name}/{_FORMAT} cannot be read ({error!r})") from error
    if backend != _BACKEND:
        raise RequestError(f"{where}: a checkpoint of format {backend!r} is not supported; {_BACKEND!r} is")
    return checkpoint


def _latest(folder: Path, where: str) -> str:
    """Which of its checkpoints a folder says is to be read."""
    try:
        name = (folder / _TRACKER).read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise RequestError(
            f"{where}: neither a checkpoint of megatron-core ({_FORMAT}) nor a folder of them ({_TRACKER})"
        ) from error
    if name != _RELEASE and not (name.isdecimal() and len(name) < 20):
        raise RequestError(f"{where}: {_TRACKER} says {name!r}; {_RELEASE!r} or a number is expected")
    return name if name == _RELEASE else f"iter_{int(name):07d}"


class _Opaque:
    """Stands for any object of a class of Megatron-LM's or another package's, none of whose code is run."""

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _read_common(file: Path, where: str) -> dict[str, Any]:
    """What is in common.pt: the run's arguments, and where we wrote it, what came from Hugging Face.

    Nothing that it names is run: objects come to nothing, and a file with functions that no argument has any use for is
    refused.
    """
    try:
        foreign = set(get_unsafe_globals_in_checkpoint(str(file))) - {"argparse.Namespace"}
        for name in sorted(foreign - _BUILTINS):
            module = name.partition(".")[0]
            if module in sys.stdlib_module_names and module not in _OF_PYTHON:
                raise RequestError(
                    f"{where}: {_COMMON} asks for {name}, which has no place in a run's arguments: nothing that a file "
                    "names is run"
                )
        with safe_globals([argparse.Namespace, *((_Opaque, name) for name in foreign)]):
            common = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, EOFError, ValueError, RuntimeError, LookupError, pickle.UnpicklingError) as error:
        raise RequestError(f"{where}: {_COMMON} cannot be read ({str(error).strip().splitlines()[0]})") from error
    if not isinstance(common, dict) or not isinstance(common.get("args"), argparse.Namespace):
        raise RequestError(f"{where}: {_COMMON} has no args, which say what the model's shape is")
    return common


def _vocab_size(args: argparse.Namespace, given: int | None, rows: int) -> int:
    """How many of the embedding's rows belong to tokens."""
    size: Any = getattr(args, "vocab_size", None) if given is None else given
    null_tokenizer = str(getattr(args, "tokenizer_type", "")).startswith("Null")  # Megatron-LM's has a token more
    if not isinstance(size, int) or (given is None and null_tokenizer):
        raise RequestError(
            f"args.vocab_size does not say how many of the embedding's {rows} rows are tokens and not padding: give "
            "--vocab-size"
        )
    if not 0 < size <= rows:
        raise RequestError(f"a vocabulary of {size} does not go with an embedding of {rows} rows")
    return size
