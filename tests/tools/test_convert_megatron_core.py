"""Conversion against megatron-core itself: its GPTModel, its loader, its writer; and a clear word about bad input."""

import dataclasses
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron_ext.checkpoint import write
from megatron_ext.errors import RequestError
from megatron_ext.models import ModelConfig, parameter_shapes
from megatron_ext.models.decoder import whole_model
from tests.distributed import Pool
from tests.malice import Deed
from tests.tools.megatron_gpt import OnCpu, expected, load, save, without_gpu
from tests.weights import InMemory
from tools.conversion.formats.megatron_args import from_args, to_args
from tools.conversion.formats.megatron_core import open_megatron, write_megatron
from tools.conversion.source import Source

BASE = ModelConfig(
    num_layers=3,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=997,
    max_position_embeddings=64,
)
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one key each": {"num_query_groups": None, "kv_channels": 16, "norm_epsilon": 1e-6},
    "tied, 49953": {"untie_embeddings_and_output_weights": False, "vocab_size": 49953},
    "biases of queries, norms of heads": {"add_qkv_bias": True, "qk_layernorm": True},
    "biases": {"add_bias_linear": True},
    "llama3": {"rope_scaling": "llama3", "rope_scaling_factor": 32.0, "rotary_base": 500000.0},
    "linear": {"rope_scaling": "linear", "rope_scaling_factor": 4.0},
    "partial": {"rotary_percent": 0.5, "rotary_interleaved": True},
    "window": {"window_size": 5},
    "GPT-2": {
        "normalization": "LayerNorm",
        "activation": "gelu-tanh",
        "add_bias_linear": True,
        "position_embedding_type": "learned_absolute",
        "untie_embeddings_and_output_weights": False,
        "qk_layernorm": True,
    },
    "GELU": {"normalization": "LayerNorm", "activation": "gelu", "rotary_base": 12345.5},
}
IDS = (torch.arange(2 * 40).view(2, 40) * 7) % 997


def model_of(variant: str) -> ModelConfig:
    return dataclasses.replace(BASE, **VARIANTS[variant])


def source_of(model: ModelConfig, dtype: torch.dtype = torch.float32) -> Source:
    """Random weights, by the name alone."""
    torch.manual_seed(0)
    tensors = {
        name: (torch.randn(shape) * 0.2 + ("norm" in name and name.endswith("weight"))).to(dtype)
        for name, shape in parameter_shapes(model).items()
    }
    return Source(model, InMemory(tensors), tokenizer=None, origin="test")


def read_all(source: Source) -> dict[str, torch.Tensor]:
    return {name: source.weights.read_rows(name, 0, shape[0]) for name, shape in source.weights.shapes.items()}


def parameters_and_logits(root: Path, variants: list[str]) -> dict[str, tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """Of every variant's checkpoint in megatron-core's model; what it loaded is also written again by it."""
    from megatron.core import parallel_state
    from megatron.core.transformer.enums import AttnBackend

    without_gpu()
    parallel_state.initialize_model_parallel()
    found = {}
    for variant in variants:
        model, args = load(root / variant / "ours" / "release")
        args.attention_backend, args.unknown = AttnBackend.auto, Path("x")
        metadata = {"plain": {"non_homogeneous_layers": True}, "biases": {"singleton_local_shards": True}}
        save(model, args, root / variant / "theirs" / "iter_0000007", metadata.get(variant, {}))
        (root / variant / "theirs" / "latest_checkpointed_iteration.txt").write_text("7")
        positions = torch.arange(IDS.shape[1]).expand_as(IDS)
        mask = torch.ones(1, 1, IDS.shape[1], IDS.shape[1]).tril() < 0.5
        with torch.no_grad(), OnCpu():
            logits = model(IDS, positions, mask)
        found[variant] = {name: parameter.detach() for name, parameter in model.named_parameters()}, logits
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every variant as we write it: VARIANT/ours."""
    root = tmp_path_factory.mktemp("megatron")
    for variant in VARIANTS:
        (root / variant / "ours").mkdir(parents=True)
        write_megatron(source_of(model_of(variant)), root / variant / "ours")
    return root


@pytest.fixture(scope="module")
def theirs(pool: Pool, root: Path) -> dict[str, tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """What megatron-core makes of them; it also writes VARIANT/theirs."""
    return pool.run(parameters_and_logits, 1, root, list(VARIANTS))[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_megatron_core_loads_what_we_write(variant: str, theirs: Any) -> None:
    model = model_of(variant)
    parameters, logits = theirs[variant]
    ours = read_all(source_of(model))
    wanted = expected(model, ours)
    assert parameters.keys() == wanted.keys()
    for name, tensor in parameters.items():
        assert torch.equal(tensor, wanted[name]), name
    decoder = whole_model(model)
    decoder.load_state_dict(ours | ({"lm_head.weight": ours["embed_tokens.weight"]} if model.tied else {}), assign=True)
    with torch.no_grad():
        assert (decoder(IDS) - logits).abs().max() <= 1e-4 * logits.abs().max()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("inner", ["", "iter_0000007"])
def test_we_load_what_megatron_core_writes(variant: str, inner: str, root: Path, theirs: Any) -> None:
    model = model_of(variant)
    source = open_megatron(root / variant / "theirs" / inner)
    assert source.model.resolved() == model.resolved()
    back, ours = read_all(source), read_all(source_of(model))
    assert list(back) == list(parameter_shapes(model))
    for name, tensor in back.items():
        assert torch.equal(tensor, ours[name]), name


def at_tp2(root: Path, name: str) -> dict[str, torch.Tensor]:
    """One rank's parameters, of a vocabulary padded to a multiple of 256; they are also written, without a size."""
    from megatron.core import parallel_state

    without_gpu()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    model, args = load(root / name / "release", divisible_by=256)
    args.vocab_size, args.padded_vocab_size = None, model.vocab_size
    save(model, args, root / f"{name} padded", {})
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("vocab_size", [997, 49953])
def test_two_ranks_pad_the_vocabulary_and_we_cut_it(vocab_size: int, pool: Pool, tmp_path: Path) -> None:
    model = dataclasses.replace(BASE, vocab_size=vocab_size, add_bias_linear=True)
    source = source_of(model)
    (tmp_path / "ours").mkdir()
    write_megatron(source, tmp_path / "ours")
    ranks = pool.run(at_tp2, 2, tmp_path, "ours")
    padded = -(-vocab_size // 256) * 256
    for name, whole in expected(model, read_all(source)).items():
        parts = [rank[name] for rank in ranks]
        if "word_embeddings" in name or "output_layer" in name:
            assert torch.equal(torch.cat(parts), F.pad(whole, (0, 0, 0, padded - vocab_size))), name
        elif "linear_fc1" in name:  # each rank has its half of the gate over its half of the other
            halves = [torch.cat(half) for half in zip(*(part.chunk(2) for part in parts), strict=True)]
            assert torch.equal(torch.cat(halves), whole), name
        elif "linear_qkv" in name:
            assert torch.equal(torch.cat(parts), whole), name
        elif name.endswith(("linear_proj.weight", "linear_fc2.weight")):
            assert torch.equal(torch.cat(parts, dim=1), whole), name
        else:
            assert all(torch.equal(part, whole) for part in parts), name

    back = tmp_path / "ours padded"
    with pytest.raises(
        RequestError, match=f"the embedding's {padded} rows are tokens and not padding: give --vocab-size"
    ):
        open_megatron(back)
    with pytest.raises(
        RequestError, match=f"a vocabulary of {padded + 1} does not go with an embedding of {padded} rows"
    ):
        open_megatron(back, padded + 1)
    returned = open_megatron(back, vocab_size)
    assert returned.model.resolved() == model.resolved()
    ours = read_all(source)
    for name, tensor in read_all(returned).items():
        assert torch.equal(tensor, ours[name]), name


def test_a_piece_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every byte is asked for once, in requests no larger than a piece, however rows alternate; the dtype stays."""
    monkeypatch.setattr(write, "_PIECE_BYTES", 512)
    model = dataclasses.replace(BASE, add_qkv_bias=True)
    source = source_of(model, torch.bfloat16)
    (tmp_path / "ours").mkdir()
    write_megatron(source, tmp_path / "ours")
    asked = source.weights
    assert isinstance(asked, InMemory)
    assert asked.largest <= 512
    assert asked.total == sum(tensor.nbytes for tensor in asked.tensors.values())

    back = InMemory(read_all(open_megatron(tmp_path / "ours")))
    assert set(back.dtypes.values()) == {torch.bfloat16}
    assert all(torch.equal(tensor, asked.tensors[name]) for name, tensor in back.tensors.items())


UNKNOWN: dict[str, dict[str, Any]] = {
    "position_embedding_type 'alibi'": {"position_embedding_type": "alibi"},
    "embed_layernorm True": {"embed_layernorm": True},
    "parallel_residual one-norm": {"parallel_residual": "one-norm"},
    "parallel_residual two-norms": {"parallel_residual": "two-norms"},
    "position_embedding_offset 2": {"position_embedding_type": "learned_absolute", "position_embedding_offset": 2},
    "activation relu": {"activation": "relu"},
    "activation gelu-tanh": {"activation": "gelu-tanh"},
    "rope_low_freq_factor 2.0": {"rope_scaling": "llama3", "rope_scaling_factor": 8.0, "rope_low_freq_factor": 2.0},
}


@pytest.mark.parametrize("word", UNKNOWN)
def test_what_megatron_core_has_no_word_for_is_refused(word: str, tmp_path: Path) -> None:
    source = source_of(dataclasses.replace(BASE, **UNKNOWN[word]))
    with pytest.raises(RequestError, match=f"^megatron-core cannot have .*{word}") as refusal:
        write_megatron(source, tmp_path)
    assert "\n" not in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


def _common(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def breakage(release: Path) -> None:
        common = torch.load(release / "common.pt", weights_only=False)
        change(common)
        torch.save(common, release / "common.pt")

    return breakage


def _args(**values: Any) -> Callable[[Path], None]:
    return _common(lambda common: vars(common["args"]).update(values))


def _truncate(name: str) -> Callable[[Path], None]:
    def breakage(release: Path) -> None:
        (release / name).write_bytes((release / name).read_bytes()[:-1000])

    return breakage


def _lose_a_piece(release: Path) -> None:
    metadata = pickle.loads((release / ".metadata").read_bytes())
    metadata.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"].chunks.pop()
    (release / ".metadata").write_bytes(pickle.dumps(metadata))


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no tracker": (
        lambda r: (r.parent / "latest_checkpointed_iteration.txt").unlink(),
        r"neither a checkpoint of megatron-core \(metadata.json\) nor a folder of them \(latest_",
    ),
    "strange tracker": (
        lambda r: (r.parent / "latest_checkpointed_iteration.txt").write_text("../x"),
        "latest_checkpointed_iteration.txt says '../x'; 'release' or a number is expected",
    ),
    "absent iteration": (
        lambda r: (r.parent / "latest_checkpointed_iteration.txt").write_text("12"),
        "iter_0000012/metadata.json cannot be read",
    ),
    "older format": (
        lambda r: (r / "metadata.json").rename(r / "mp_rank_00"),
        r"release is of Megatron-LM's older format \(mp_rank_\*\): save it once with --ckpt-format torch_dist",
    ),
    "no format": (lambda r: (r / "metadata.json").unlink(), "release/metadata.json cannot be read"),
    "broken format": (lambda r: (r / "metadata.json").write_text("{"), "release/metadata.json cannot be read"),
    "another format": (
        lambda r: (r / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr"})),
        "a checkpoint of format 'zarr' is not supported; 'torch_dist' is",
    ),
    "no arguments file": (lambda r: (r / "common.pt").unlink(), "common.pt cannot be read"),
    "truncated arguments": (_truncate("common.pt"), "common.pt cannot be read"),
    "no arguments": (_common(lambda common: common.pop("args")), "common.pt has no args, which say"),
    "missing arguments": (
        _args(num_layers=None, normalization=None),
        "common.pt: args lacks num_layers, normalization$",
    ),
    "an argument of another type": (
        _args(num_layers="3"),
        "common.pt: args.num_layers is '3', which is not of type int",
    ),
    "another activation": (_args(squared_relu=True), "common.pt: args.squared_relu True is not supported"),
    "experts": (_args(num_experts=8), "common.pt: args.num_experts 8 is not supported"),
    "another softmax": (_args(softmax_type="learnable"), "args.softmax_type 'learnable' is not supported"),
    "other positions": (_args(position_embedding_type="yarn"), "args.position_embedding_type 'yarn' is not supported"),
    "another norm": (_args(normalization="L2Norm"), "args.normalization 'L2Norm' is not supported"),
    "an open window": (_args(window_size=(4, 4)), r"args.window_size \(4, 4\) is not supported"),
    "impossible heads": (
        _args(num_attention_heads=5),
        "common.pt: --num-query-groups 2 does not divide --num-attention-heads 5",
    ),
    "a null tokenizer": (_args(tokenizer_type="NullTokenizer"), "give --vocab-size"),
    "wrong width": (
        _args(hidden_size=64, kv_channels=8),
        r"embedding.word_embeddings.weight is \(997, 32\), common.pt asks for \(997, 64\)",
    ),
    "a layer too many": (_args(num_layers=4), "lacks weight decoder.layers.3."),
    "a layer too few": (_args(num_layers=2), "has an unknown weight decoder.layers.2."),
    "tied in words": (
        _args(untie_embeddings_and_output_weights=False),
        "has an unknown weight output_layer.weight",
    ),
    "no metadata": (lambda r: (r / ".metadata").unlink(), ".metadata cannot be read"),
    "truncated metadata": (_truncate(".metadata"), ".metadata cannot be read"),
    "no weights": (lambda r: (r / "__0_0.distcp").unlink(), "incomplete checkpoint, __0_0.distcp is missing"),
    "truncated weights": (_truncate("__0_0.distcp"), "incomplete checkpoint, __0_0.distcp has [0-9]+ bytes instead of"),
    "a lost piece": (_lose_a_piece, "incomplete checkpoint, parts of decoder.layers.mlp.linear_fc2.weight are missing"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_input_is_refused(case: str, tmp_path: Path) -> None:
    breakage, message = BROKEN[case]
    write_megatron(source_of(BASE), tmp_path)
    breakage(tmp_path / "release")
    with pytest.raises(RequestError, match=message) as refusal:
        open_megatron(tmp_path)
    assert str(refusal.value).startswith(f"--input {tmp_path}: ")
    assert "\n" not in str(refusal.value)


def test_foreign_objects_beside_the_arguments_do_nothing(tmp_path: Path) -> None:
    """Of another package, whatever they would do. (What Python's own library would do: test_untrusted_files.)"""
    write_megatron(source_of(BASE), tmp_path)
    _args(deed=Deed(torch.save, 1, str(tmp_path / "mark")), dtype=torch.bfloat16)(tmp_path / "release")
    torch.load(tmp_path / "release" / "common.pt", weights_only=False)
    assert (tmp_path / "mark").exists()
    (tmp_path / "mark").unlink()
    assert open_megatron(tmp_path).model == BASE.resolved()
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("variant", VARIANTS)
def test_arguments_say_the_shape(variant: str) -> None:
    model = model_of(variant).resolved()
    assert from_args(to_args(model), model.vocab_size).resolved() == model
