"""A checkpoint in the form in which Meta publishes LLaMA, as the source of a conversion.

params.json, consolidated.00.pth and so on (one for each rank of tensor parallelism), tokenizer.model. Names, shapes,
cuts and the rotation are those of Meta's own code: https://github.com/meta-llama/llama (llama/model.py) and
https://github.com/meta-llama/llama-models (models/llama3/model.py).
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

import torch

from megatron_ext.checkpoint.read import Weights
from megatron_ext.errors import RequestError
from megatron_ext.models import ModelConfig, preset, preset_names
from megatron_ext.models.names import EMBEDDING, HEAD
from tools.conversion.families.llama import LLAMA
from tools.conversion.formats.hf_folder import CONFIG
from tools.conversion.formats.torch_files import TorchFiles
from tools.conversion.source import Source, read_table

_ROWS, _COLUMNS, _WHOLE = 0, 1, None  # the axis along which a weight is cut into shards

# Meta's names of modules, within a layer or the model: ours, and the cut of their weight
_MODULES: dict[str, tuple[str, int | None]] = {
    "tok_embeddings": ("embed_tokens", _COLUMNS),  # of rows since Llama 3
    "attention_norm": ("input_layernorm", _WHOLE),
    "attention.wq": ("self_attn.q_proj", _ROWS),
    "attention.wk": ("self_attn.k_proj", _ROWS),
    "attention.wv": ("self_attn.v_proj", _ROWS),
    "attention.wo": ("self_attn.o_proj", _COLUMNS),
    "ffn_norm": ("post_attention_layernorm", _WHOLE),
    "feed_forward.w1": ("mlp.gate_proj", _ROWS),
    "feed_forward.w2": ("mlp.down_proj", _COLUMNS),
    "feed_forward.w3": ("mlp.up_proj", _ROWS),
    "norm": ("norm", _WHOLE),
    "output": ("lm_head", _ROWS),
}
_NAME = re.compile(r"(layers\.\d+\.)?(.+)\.weight")
_EMBEDDING, _OUTPUT = "tok_embeddings.weight", "output.weight"
_GATE = "layers.0.mlp.gate_proj.weight"  # whose rows are the width of the feed-forward network

_REQUIRED = {"dim", "n_layers", "n_heads", "norm_eps"}
_OPTIONAL = {"n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "rope_theta"}
_SCALING = {"use_scaled_rope", "rope_scaling_factor"}
_OF_INFERENCE = {"max_batch_size", "max_seq_len"}  # sizes of caches

# Llama 3's tokenizer has 128000 pieces and 256 special ones, of which begin and end of text are the first
# (llama-models, models/llama3/tokenizer.py). It is a file of tiktoken: lines of a piece in base64 and its rank.
_LLAMA3_VOCABULARY = 128256
_LLAMA3_IDS = {"bos_token_id": 128000, "eos_token_id": 128001}
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")


def open_meta(folder: Path, max_position_embeddings: int | None = None) -> Source:
    """Open the model in `folder`.

    Args:
        folder: with params.json and consolidated.NN.pth; tokenizer.model lies there, beside it, or nowhere.
        max_position_embeddings: the longest sequence that the model is meant for, which its files do not say. If it
            is not given, that of the published model of this shape, or else of LLaMA's generation with this rotation; a
            line on stdout says so.

    Raises:
        RequestError: a file is missing or broken, or params.json and the tensors disagree.
    """
    where = f"--input {folder}"
    if max_position_embeddings is not None and max_position_embeddings < 1:
        raise RequestError(f"--max-position-embeddings {max_position_embeddings}: must be at least 1")
    params = _read_params(where, folder)
    shards = [TorchFiles(folder, [file]) for file in _files(where, folder)]
    joined = _JoinedShards(where, shards, params["dim"])
    model = _complete(params, _model(params, joined.shapes), max_position_embeddings)
    try:
        model.validate()
    except RequestError as error:
        raise RequestError(f"{where}: params.json: {error}") from error
    llama3 = model.vocab_size == _LLAMA3_VOCABULARY
    source = Source(
        model,
        _HalvesTurned(joined, model.head_dim),
        tokenizer=_tokenizer(folder),
        origin="meta",
        hugging_face=_llama3_config(model, joined.dtypes[EMBEDDING]) if llama3 else None,
    )
    return source.check(f"{where}, consolidated.00 to {len(shards) - 1:02d}.pth", "params.json")


def _read_params(where: str, folder: Path) -> dict[str, Any]:
    """The fields of params.json that are not null, all of them known, and numbers."""
    params = {field: value for field, value in read_table(folder, "params.json").items() if value is not None}
    allowed = _REQUIRED | _OPTIONAL | _SCALING | _OF_INFERENCE
    for problem, fields in (("lacks", _REQUIRED - params.keys()), ("has an unknown field", params.keys() - allowed)):
        if fields:
            raise RequestError(f"{where}: params.json {problem} {min(fields)}; known are {', '.join(sorted(allowed))}")
    for field, value in params.items():
        whole = field.startswith(("n_", "dim", "vocab", "multiple"))
        kind = bool if field == "use_scaled_rope" else int if whole else int | float
        right = isinstance(value, kind) and (kind is bool or (not isinstance(value, bool) and value > 0))
        if not right and (field, value) != ("vocab_size", -1):
            raise RequestError(f"{where}: params.json: {field} cannot be {value!r}")
    if "rope_scaling_factor" in params and not params.get("use_scaled_rope"):
        raise RequestError(f"{where}: params.json: rope_scaling_factor has no effect unless use_scaled_rope is true")
    return params


def _files(where: str, folder: Path) -> list[str]:
    """The shards in order. Raises RequestError where their numbers are not 00, 01, ..."""
    found = {path.name for path in folder.glob("consolidated.*.pth")}
    wanted = [f"consolidated.{number:02d}.pth" for number in range(max(len(found), 1))]
    for file in wanted:
        if file not in found:
            others = f" (there are {', '.join(sorted(found))})" if found else ""
            raise RequestError(f"{where}: {file} is missing{others}")
    return wanted


class _JoinedShards:
    """`Weights` of all shards together, by our names. Raises RequestError where the shards do not fit together.

    hidden_size: tells how the embedding is cut.
    """

    def __init__(self, where: str, shards: list[TorchFiles], hidden_size: int):
        self._shards = shards
        self.shapes: dict[str, torch.Size] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._places: dict[str, tuple[str, int | None]] = {}
        names = {name for shard in shards for name in shard.shapes}
        for number, shard in enumerate(shards):
            if names - shard.shapes.keys():
                lacking = min(names - shard.shapes.keys())
                raise RequestError(f"{where}: consolidated.{number:02d}.pth lacks {lacking}, which others have")
        if _EMBEDDING not in names:
            raise RequestError(f"{where}: consolidated.00.pth lacks {_EMBEDDING}")
        # Llama 3.2's smaller models store one matrix under both names; it is one parameter then
        tied = _OUTPUT in names and all(shard.same_place(_EMBEDDING, _OUTPUT) for shard in shards)
        for theirs in shards[0].shapes:
            if theirs.endswith("rope.freqs") or (tied and theirs == _OUTPUT):  # the former follow from params.json
                continue
            ours, cut = _translate(theirs)
            shapes = [shard.shapes[theirs] for shard in shards]
            if theirs == _EMBEDDING and shapes[0][-1:] == (hidden_size,):
                cut = _ROWS
            self.shapes[ours] = _join(where, theirs, shapes, cut)
            self.dtypes[ours] = shards[0].dtypes[theirs]
            self._places[ours] = theirs, cut
            if any(shard.dtypes[theirs] != self.dtypes[ours] for shard in shards):
                raise RequestError(f"{where}: {theirs} has not the same dtype in every consolidated.NN.pth")

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        theirs, cut = self._places[name]
        if cut is _WHOLE:
            return self._shards[0].read_rows(theirs, start, stop)
        if cut == _COLUMNS:
            return torch.cat([shard.read_rows(theirs, start, stop) for shard in self._shards], dim=1)
        pieces = []
        for shard in self._shards:
            rows = shard.shapes[theirs][0]
            pieces.append(shard.read_rows(theirs, min(max(start, 0), rows), min(max(stop, 0), rows)))
            start, stop = start - rows, stop - rows
        return torch.cat(pieces)


def _translate(name: str) -> tuple[str, int | None]:
    """Our name of a weight, and its cut; the same name if it is unknown."""
    match = _NAME.fullmatch(name)
    if match is None or match[2] not in _MODULES:
        return name, _WHOLE
    ours, cut = _MODULES[match[2]]
    return f"{match[1] or ''}{ours}.weight", cut


def _join(where: str, name: str, shapes: list[torch.Size], cut: int | None) -> torch.Size:
    """The shape of all shards together."""
    uncut = {tuple(size for axis, size in enumerate(shape) if axis != cut) for shape in shapes}
    if len(uncut) > 1 or (cut is not _WHOLE and len(shapes[0]) != 2):
        found = ", ".join(str(tuple(shape)) for shape in shapes)
        raise RequestError(f"{where}: the shapes of {name} in consolidated.NN.pth do not fit together: {found}")
    joined = list(shapes[0])
    if cut is not _WHOLE:
        joined[cut] = sum(shape[cut] for shape in shapes)
    return torch.Size(joined)


class _HalvesTurned:
    """`Weights` whose rotary embedding turns halves of a head, of such where it turns neighbours.

    Meta's turns rows 2i and 2i + 1 of a head by the i-th angle (`apply_rotary_emb`), ours rows i and i + head_dim / 2.
    """

    def __init__(self, weights: Weights, head_dim: int):
        self._weights, self._head_dim = weights, head_dim
        self.shapes, self.dtypes = weights.shapes, weights.dtypes

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        if not name.endswith(("q_proj.weight", "k_proj.weight")):
            return self._weights.read_rows(name, start, stop)
        size = self._head_dim
        first, end = start // size * size, -(-stop // size) * size  # whole heads
        rows = self._weights.read_rows(name, first, end)
        pairs = rows.view(-1, size // 2, 2, rows.shape[1])
        return pairs.transpose(1, 2).reshape(rows.shape)[start - first : stop - first]


def _model(params: dict[str, Any], shapes: dict[str, torch.Size]) -> ModelConfig:
    """What params.json says, and the tensors of what it leaves open."""
    vocab_size = params.get("vocab_size", -1)
    return ModelConfig(
        num_layers=params["n_layers"],
        hidden_size=params["dim"],
        ffn_hidden_size=shapes[_GATE][0] if _GATE in shapes else 1,
        num_attention_heads=params["n_heads"],
        num_query_groups=params.get("n_kv_heads", params["n_heads"]),
        vocab_size=shapes[EMBEDDING][0] if vocab_size == -1 else vocab_size,
        norm_epsilon=params["norm_eps"],
        rotary_base=float(params.get("rope_theta", 10000.0)),
        rope_scaling="llama3" if params.get("use_scaled_rope") else "none",
        untie_embeddings_and_output_weights=HEAD in shapes,
    )


def _complete(params: dict[str, Any], model: ModelConfig, length: int | None) -> ModelConfig:
    """The model with what its files do not say: the length it is meant for, the factor of a scaled rotation.

    Both are those of the published model of this shape, or of the generation whose rotation it has; a line says so.
    """
    name = next((name for name in preset_names() if _comparable(preset(name)) == _comparable(model)), None)
    published, source = _generation(model), "of LLaMA's generations the one with its rotation"
    if name is not None:
        published, source = preset(name), f"the published {name}"
    factor = params.get("rope_scaling_factor") if model.rope_scaling != "none" else 1.0
    assumed = []
    if length is None:
        length = published.max_position_embeddings
        assumed.append(f"--max-position-embeddings {length}")
    if factor is None:
        factor = published.rope_scaling_factor
        assumed.append(f"rope_scaling_factor {factor:g}")
    if assumed:
        print(f"params.json does not say all: {' and '.join(assumed)}, as {source} has")
    return dataclasses.replace(model, max_position_embeddings=length, rope_scaling_factor=float(factor))


def _generation(model: ModelConfig) -> ModelConfig:
    if model.rope_scaling != "none":
        return preset("llama3.1-8b")
    return preset("llama3-8b" if model.rotary_base == preset("llama3-8b").rotary_base else "llama-7b")


def _comparable(model: ModelConfig) -> ModelConfig:
    """Without what a model of the same shape may have otherwise, or params.json does not say."""
    return dataclasses.replace(
        model.resolved(),
        vocab_size=1,
        untie_embeddings_and_output_weights=True,
        max_position_embeddings=1,
        rope_scaling_factor=1.0,
    )


def _llama3_config(model: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """config.json with Llama 3's ids of special tokens; those before it have the ones of Hugging Face's default."""
    dtypes = dict.fromkeys(("dtype", "torch_dtype"), str(dtype).removeprefix("torch."))
    return {CONFIG: LLAMA.write(model) | dtypes | _LLAMA3_IDS}


def _tokenizer(folder: Path) -> Path | None:
    """tokenizer.model in `folder` or above it; not tiktoken's, which nothing here reads."""
    for path in (folder / "tokenizer.model", folder.resolve().parent / "tokenizer.model"):
        if path.is_file():
            with path.open("rb") as stream:
                if _TIKTOKEN.fullmatch(stream.readline()) is None:
                    return path
            print(f"{path} is a file of tiktoken and is left out: give the tokenizer.json of Hugging Face")
            return None
    return None
