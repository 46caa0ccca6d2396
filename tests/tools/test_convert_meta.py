"""Meta's form of LLaMA: against a model written here from Meta's formulas, in Meta's order of rows."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_ext.errors import RequestError
from megatron_ext.models import preset
from tests.slow import sweep
from tools.conversion.formats.hf_folder import write_hf
from tools.conversion.formats.meta import open_meta
from tools.conversion.formats.native import open_native, write_native
from tools.conversion.source import Source

Tensors = dict[str, torch.Tensor]

DIM, LAYERS, HEADS, KV_HEADS, FFN, VOCABULARY = 64, 2, 8, 4, 192, 100
HEAD = DIM // HEADS
PARAMS = {
    "dim": DIM,
    "n_layers": LAYERS,
    "n_heads": HEADS,
    "n_kv_heads": KV_HEADS,
    "multiple_of": 32,
    "norm_eps": 1e-5,
    "vocab_size": -1,
}
SCALED = {"use_scaled_rope": True, "rope_scaling_factor": 32, "rope_theta": 500000.0}


def layer_shapes(dim: int, kv_rows: int, ffn: int, shards: int = 1) -> dict[str, tuple[int, ...]]:
    """Of the modules of a layer in one of `shards` files."""
    return {
        "attention.wq": (dim // shards, dim),
        "attention.wk": (kv_rows // shards, dim),
        "attention.wv": (kv_rows // shards, dim),
        "attention.wo": (dim, dim // shards),
        "feed_forward.w1": (ffn // shards, dim),
        "feed_forward.w2": (dim, ffn // shards),
        "feed_forward.w3": (ffn // shards, dim),
        "attention_norm": (dim,),
        "ffn_norm": (dim,),
    }


def meta_tensors(vocabulary: int = VOCABULARY) -> Tensors:
    """A checkpoint's tensors, whole, with Meta's names."""
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    tensors = {"tok_embeddings.weight": draw(vocabulary, DIM), "norm.weight": draw(DIM) + 1}
    tensors |= {"output.weight": draw(vocabulary, DIM), "rope.freqs": torch.ones(HEAD // 2)}
    for layer in range(LAYERS):
        for module, shape in layer_shapes(DIM, KV_HEADS * HEAD, FFN).items():
            tensors[f"layers.{layer}.{module}.weight"] = draw(*shape) + (len(shape) == 1)
    return tensors


def write_meta(folder: Path, tensors: Tensors, shards: int = 1, embedding_axis: int = 1, **params: Any) -> Path:
    """The files of `shards` ranks: ColumnParallelLinear has a share of the rows, RowParallelLinear of the columns."""
    folder.mkdir(parents=True)
    (folder / "params.json").write_text(json.dumps(PARAMS | params))
    for rank in range(shards):
        state = {}
        for name, tensor in tensors.items():
            if name == "tok_embeddings.weight":
                axis = embedding_axis
            elif name.endswith(("wo.weight", "w2.weight")):
                axis = 1
            else:
                axis = 0
            whole = tensor.ndim == 1
            state[name] = tensor if whole else tensor.tensor_split(shards, dim=axis)[rank].clone()
        if shards == 1:
            state = tensors  # with tied tensors tied
        torch.save(state, folder / f"consolidated.{rank:02d}.pth")
    return folder


def meta_logits(tensors: Tensors, ids: torch.Tensor, positions: torch.Tensor, params: dict[str, Any]) -> torch.Tensor:
    """LLaMA as its code computes it, for one sequence: neighbouring elements of a head are a complex number that is
    multiplied by e^(i m theta_j) at position m (RoFormer, arXiv 2104.09864, equation 12 in complex form)."""
    weights = {name: tensor.double() for name, tensor in tensors.items()}
    frequencies = params.get("rope_theta", 10000.0) ** -(torch.arange(0, HEAD, 2).double() / HEAD)
    if params.get("use_scaled_rope"):
        scaled = []
        for frequency in frequencies.tolist():  # Llama 3.1's apply_scaling
            wavelength, factor = 2 * torch.pi / frequency, params["rope_scaling_factor"]
            if wavelength < 8192 / 4:
                scaled.append(frequency)
            elif wavelength > 8192 / 1:
                scaled.append(frequency / factor)
            else:
                smooth = (8192 / wavelength - 1) / (4 - 1)
                scaled.append((1 - smooth) * frequency / factor + smooth * frequency)
        frequencies = torch.tensor(scaled, dtype=torch.float64)
    turns = torch.polar(torch.ones(len(positions), HEAD // 2).double(), torch.outer(positions.double(), frequencies))

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + params["norm_eps"]) * weights[f"{name}.weight"]

    def heads(x: torch.Tensor, name: str, rotated: bool) -> torch.Tensor:
        x = (x @ weights[f"{name}.weight"].T).view(len(ids), -1, HEAD)
        if rotated:
            pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
            x = torch.view_as_real(pairs * turns[:, None]).flatten(2)
        return x.repeat_interleave(HEADS // x.shape[1], dim=1).transpose(0, 1)

    mask = torch.full((len(ids), len(ids)), -torch.inf).triu(1)
    x = weights["tok_embeddings.weight"][ids]
    for layer in range(params["n_layers"]):
        name = f"layers.{layer}."
        y = norm(x, name + "attention_norm")
        q, k = heads(y, name + "attention.wq", rotated=True), heads(y, name + "attention.wk", rotated=True)
        scores = (q @ k.transpose(1, 2) / HEAD**0.5 + mask).softmax(-1)
        mixed = scores @ heads(y, name + "attention.wv", rotated=False)
        x = x + mixed.transpose(0, 1).flatten(1) @ weights[name + "attention.wo.weight"].T
        y = norm(x, name + "ffn_norm")
        gate, up = (y @ weights[f"{name}feed_forward.{part}.weight"].T for part in ("w1", "w3"))
        x = x + (torch.nn.functional.silu(gate) * up) @ weights[name + "feed_forward.w2.weight"].T
    return norm(x, "norm") @ weights["output.weight"].T


VARIANTS: dict[str, dict[str, Any]] = {
    "one file": {},
    "two files": {"shards": 2},
    "four files": {"shards": 4},
    "four files of vocabulary rows": {"shards": 4, "embedding_axis": 0, "vocab_size": VOCABULARY},
    "scaled rotation": {"shards": 2} | SCALED,
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_computes_what_meta_does(tmp_path: Path, variant: str) -> None:
    transformers = pytest.importorskip("transformers")
    tensors = meta_tensors()
    source = open_meta(write_meta(tmp_path / "meta", tensors, **VARIANTS[variant]), max_position_embeddings=32768)
    (tmp_path / "hf").mkdir()
    write_hf(source, tmp_path / "hf", shard_bytes=10**9)
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float64)

    ids = torch.arange(20) * 37 % VOCABULARY
    for spread in (1, 500):  # the latter is what the scaling of long waves shows in
        positions = torch.arange(20) * spread
        expected = meta_logits(tensors, ids, positions, PARAMS | VARIANTS[variant])
        found = model(input_ids=ids[None], position_ids=positions[None]).logits[0]
        # transformers takes angles in float32, which at position 9500 is 5e-4 of a turn
        assert (found - expected).abs().max() <= (1e-5 if spread == 1 else 1e-3)
        assert expected.std() > 0.1


def read(source: Source, name: str) -> torch.Tensor:
    return source.weights.read_rows(name, 0, source.weights.shapes[name][0])


def test_native_checkpoint_is_bitwise_equal_whatever_the_shards(tmp_path: Path) -> None:
    tensors = meta_tensors()
    one = open_meta(write_meta(tmp_path / "1", tensors), max_position_embeddings=128)
    for shards in (1, 2, 4):
        source = open_meta(write_meta(tmp_path / f"of{shards}", tensors, shards), max_position_embeddings=128)
        (tmp_path / f"native{shards}").mkdir()
        write_native(source, tmp_path / f"native{shards}")
        native = open_native(tmp_path / f"native{shards}")
        assert native.model == source.model
        assert native.weights.shapes.keys() == one.weights.shapes.keys()
        for name in one.weights.shapes:
            assert torch.equal(read(native, name), read(one, name)), name


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_rows_are_those_of_the_whole(tmp_path: Path, shards: int) -> None:
    source = open_meta(write_meta(tmp_path / "meta", meta_tensors(), shards), max_position_embeddings=128)
    for name, shape in source.weights.shapes.items():
        whole = read(source, name)
        assert whole.shape == shape
        for start, stop in ((0, 1), (3, 3), (5, 21), (13, shape[0]), (shape[0] - 1, shape[0])):
            assert torch.equal(source.weights.read_rows(name, start, stop), whole[start:stop]), (name, start, stop)


def test_rows_of_a_head_come_in_halves(tmp_path: Path) -> None:
    tensors = meta_tensors()
    source = open_meta(write_meta(tmp_path / "meta", tensors, shards=2), max_position_embeddings=128)
    theirs, ours = tensors["layers.1.attention.wk.weight"], read(source, "layers.1.self_attn.k_proj.weight")
    for head in range(KV_HEADS):
        for pair in range(HEAD // 2):
            for half in range(2):
                assert torch.equal(ours[head * HEAD + half * HEAD // 2 + pair], theirs[head * HEAD + 2 * pair + half])


def test_vocabulary_that_the_files_do_not_share_evenly(tmp_path: Path) -> None:
    tensors = meta_tensors(vocabulary=101)
    source = open_meta(write_meta(tmp_path / "meta", tensors, shards=2), max_position_embeddings=128)
    assert source.model.vocab_size == 101
    assert torch.equal(read(source, "lm_head.weight"), tensors["output.weight"])


@pytest.mark.parametrize("stored", [True, False])
def test_tied_matrices_are_one_parameter(tmp_path: Path, stored: bool) -> None:
    tensors = meta_tensors()
    if stored:
        tensors["output.weight"] = tensors["tok_embeddings.weight"]
    else:
        del tensors["output.weight"]
    source = open_meta(write_meta(tmp_path / "meta", tensors), max_position_embeddings=128)
    assert source.model.tied
    assert "lm_head.weight" not in source.weights.shapes


def test_fields(tmp_path: Path) -> None:
    folder = write_meta(tmp_path / "meta", meta_tensors(), **SCALED, ffn_dim_multiplier=1.01, max_seq_len=2048)
    model = open_meta(folder, max_position_embeddings=4096).model
    assert (model.rope_scaling, model.rope_scaling_factor, model.rope_original_max_position) == ("llama3", 32.0, 8192)
    assert (model.rotary_base, model.norm_epsilon, model.max_position_embeddings) == (500000.0, 1e-5, 4096)
    assert (model.ffn_hidden_size, model.kv_heads, model.vocab_size) == (FFN, KV_HEADS, VOCABULARY)


# params.json as they are published with these models
PUBLISHED: dict[str, tuple[int, dict[str, Any]]] = {
    "llama-7b": (
        1,
        {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-6, "vocab_size": -1},
    ),
    "llama2-13b": (
        2,
        {"dim": 5120, "multiple_of": 256, "n_heads": 40, "n_layers": 40, "norm_eps": 1e-5, "vocab_size": -1},
    ),
    "llama2-70b": (
        8,
        {"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64, "n_kv_heads": 8}
        | {"n_layers": 80, "norm_eps": 1e-5, "vocab_size": -1},
    ),
    "llama3-8b": (
        1,
        {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256, "multiple_of": 1024}
        | {"ffn_dim_multiplier": 1.3, "norm_eps": 1e-5, "rope_theta": 500000.0},
    ),
    "llama3.1-8b": (
        1,
        {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256, "multiple_of": 1024}
        | {"ffn_dim_multiplier": 1.3, "norm_eps": 1e-5, "rope_theta": 500000.0, "use_scaled_rope": True},
    ),
    "llama3.2-1b": (
        1,
        {"dim": 2048, "n_layers": 16, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256, "multiple_of": 256}
        | {"ffn_dim_multiplier": 1.5, "norm_eps": 1e-5, "rope_theta": 500000.0, "use_scaled_rope": True},
    ),
    "llama3.2-3b": (
        1,
        {"dim": 3072, "n_layers": 28, "n_heads": 24, "n_kv_heads": 8, "vocab_size": 128256, "multiple_of": 256}
        | {"ffn_dim_multiplier": 1.0, "norm_eps": 1e-5, "rope_theta": 500000.0, "use_scaled_rope": True},
    ),
}


@pytest.mark.parametrize("name", sweep(PUBLISHED, {"llama2-13b", "llama3.2-3b"}))
def test_published_models_are_known(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Files of the models' own sizes, whose values are holes that take no room."""
    shards, params = PUBLISHED[name]
    dim, kv_heads, head = params["dim"], params.get("n_kv_heads", params["n_heads"]), params["dim"] // params["n_heads"]
    ffn, vocabulary = preset(name).ffn_hidden_size, preset(name).vocab_size
    (tmp_path / "params.json").write_text(json.dumps(params))
    with FakeTensorMode():

        def empty(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.bfloat16)

        state = {"tok_embeddings.weight": empty(vocabulary, dim // shards), "norm.weight": empty(dim)}
        tied = state["tok_embeddings.weight"]
        state["output.weight"] = tied if preset(name).tied else empty(vocabulary // shards, dim)
        for layer in range(params["n_layers"]):
            for module, shape in layer_shapes(dim, kv_heads * head, ffn, shards).items():
                state[f"layers.{layer}.{module}.weight"] = empty(*shape)
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        for rank in range(shards):
            torch.save(state, tmp_path / f"consolidated.{rank:02d}.pth")
    source = open_meta(tmp_path)
    assert source.model.resolved() == preset(name).resolved()
    assert f"--max-position-embeddings {source.model.max_position_embeddings}" in capsys.readouterr().out
    ids = (source.hugging_face or {}).get("config.json", {})
    assert ids.get("bos_token_id") == (128000 if name.startswith("llama3") else None)
    assert open_meta(tmp_path, max_position_embeddings=300).model.max_position_embeddings == 300


@pytest.mark.parametrize("place", ["meta", "."])
def test_tokenizer_of_sentencepiece_comes_along(tmp_path: Path, place: str) -> None:
    folder = write_meta(tmp_path / "meta", meta_tensors())
    (tmp_path / place / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    tokenizer = open_meta(folder, max_position_embeddings=128).tokenizer
    assert tokenizer is not None
    assert tokenizer.samefile(tmp_path / place / "tokenizer.model")


def test_tokenizer_of_tiktoken_is_left_out_with_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_meta(tmp_path / "meta", meta_tensors())
    (folder / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    assert open_meta(folder, max_position_embeddings=128).tokenizer is None
    assert "is a file of tiktoken and is left out" in capsys.readouterr().out


def _params(folder: Path, **fields: Any) -> None:
    (folder / "params.json").write_text(json.dumps(PARAMS | fields))


def _state(folder: Path, rank: int, change: Callable[[Tensors], object]) -> None:
    file = folder / f"consolidated.{rank:02d}.pth"
    state = torch.load(file, weights_only=True)
    change(state)
    torch.save(state, file)


WQ, WK = "layers.0.attention.wq.weight", "layers.0.attention.wk.weight"
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no params": (lambda folder: (folder / "params.json").unlink(), "params.json cannot be read"),
    "no JSON": (lambda folder: (folder / "params.json").write_text("{"), "params.json cannot be read"),
    "a list": (lambda folder: (folder / "params.json").write_text("[]"), "params.json cannot be read"),
    "a missing field": (lambda folder: _params(folder, n_heads=None), "params.json lacks n_heads"),
    "another model's field": (
        lambda folder: _params(folder, sliding_window=4096),
        "params.json has an unknown field sliding_window",
    ),
    "a word": (lambda folder: _params(folder, dim="64"), "params.json: dim cannot be '64'"),
    "a fraction": (lambda folder: _params(folder, n_layers=2.5), "params.json: n_layers cannot be 2.5"),
    "nothing": (lambda folder: _params(folder, n_kv_heads=0), "params.json: n_kv_heads cannot be 0"),
    "less than nothing": (lambda folder: _params(folder, norm_eps=-1), "params.json: norm_eps cannot be -1"),
    "a switch for a number": (lambda folder: _params(folder, dim=True), "params.json: dim cannot be True"),
    "a factor of nothing": (
        lambda folder: _params(folder, rope_scaling_factor=8),
        "rope_scaling_factor has no effect unless use_scaled_rope is true",
    ),
    "a number for a switch": (lambda folder: _params(folder, use_scaled_rope=8), "use_scaled_rope cannot be 8"),
    "heads that do not fit": (lambda folder: _params(folder, n_heads=7), "params.json: --hidden-size 64 is not a"),
    "no files": (
        lambda folder: [path.unlink() for path in folder.glob("*.pth")],
        "consolidated.00.pth is missing",
    ),
    "the first file": (
        lambda folder: (folder / "consolidated.00.pth").unlink(),
        "consolidated.00.pth is missing (there are consolidated.01.pth)",
    ),
    "the last file": (
        lambda folder: (folder / "consolidated.01.pth").unlink(),
        "consolidated.00 to 00.pth: embed_tokens.weight is (100, 32), params.json asks for (100, 64)",
    ),
    "another name": (
        lambda folder: (folder / "consolidated.01.pth").rename(folder / "consolidated.01-of-02.pth"),
        "consolidated.01.pth is missing (there are consolidated.00.pth, consolidated.01-of-02.pth)",
    ),
    "a broken file": (
        lambda folder: (folder / "consolidated.01.pth").write_bytes(
            (folder / "consolidated.01.pth").read_bytes()[:-100]
        ),
        "consolidated.01.pth is not a whole file of torch.save",
    ),
    "another hidden size": (
        lambda folder: _params(folder, dim=128),
        "embed_tokens.weight is (100, 64), params.json asks for (100, 128)",
    ),
    "another vocabulary": (
        lambda folder: _params(folder, vocab_size=32000),
        "embed_tokens.weight is (100, 64), params.json asks for (32000, 64)",
    ),
    "fewer layers": (lambda folder: _params(folder, n_layers=1), "has an unknown weight layers.1."),
    "more layers": (lambda folder: _params(folder, n_layers=3), "lacks weight layers.2."),
    "a tensor of one file only": (
        lambda folder: _state(folder, 1, lambda state: state.pop(WQ)),
        f"consolidated.01.pth lacks {WQ}, which others have",
    ),
    "no embedding": (
        lambda folder: [_state(folder, rank, lambda state: state.pop("tok_embeddings.weight")) for rank in (0, 1)],
        "lacks tok_embeddings.weight",
    ),
    "a tensor of another model": (
        lambda folder: [_state(folder, rank, lambda state: state.update(gate=torch.ones(2))) for rank in (0, 1)],
        "has an unknown weight gate",
    ),
    "shapes": (
        lambda folder: _state(folder, 1, lambda state: state.update({WQ: torch.ones(32, 60)})),
        f"the shapes of {WQ} in consolidated.NN.pth do not fit together: (32, 64), (32, 60)",
    ),
    "dimensions": (
        lambda folder: [_state(folder, rank, lambda state: state.update({WQ: torch.ones(32)})) for rank in (0, 1)],
        f"the shapes of {WQ} in consolidated.NN.pth do not fit together: (32,), (32,)",
    ),
    "dtypes": (
        lambda folder: _state(folder, 1, lambda state: state.update({WQ: state[WQ].half()})),
        f"{WQ} has not the same dtype in every consolidated.NN.pth",
    ),
    "heads held twice": (
        lambda folder: [_state(folder, rank, lambda state: state.update({WK: torch.ones(32, 64)})) for rank in (0, 1)],
        "layers.0.self_attn.k_proj.weight is (64, 64), params.json asks for (32, 64)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_input_is_refused_in_one_line(tmp_path: Path, case: str) -> None:
    folder = write_meta(tmp_path / "meta", meta_tensors(), shards=2)
    assert open_meta(folder, max_position_embeddings=128)
    spoil, reason = REFUSED[case]
    spoil(folder)
    with pytest.raises(RequestError) as refusal:
        open_meta(folder, max_position_embeddings=128)
    assert str(refusal.value).startswith(f"--input {folder}")
    assert reason in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "params, length, factor",
    [
        ({}, 2048, 1.0),
        ({"rope_theta": 500000.0}, 8192, 1.0),
        ({"rope_theta": 500000.0, "use_scaled_rope": True}, 131072, 8.0),
    ],
)
def test_what_nobody_tells_is_that_of_the_generation(
    tmp_path: Path, params: dict[str, Any], length: int, factor: float, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_meta(tmp_path / "meta", meta_tensors(), **params)
    model = open_meta(folder).model
    assert (model.max_position_embeddings, model.rope_scaling_factor) == (length, factor)
    printed = capsys.readouterr().out
    assert f"--max-position-embeddings {length}" in printed
    assert ("rope_scaling_factor 8" in printed) == (factor == 8)
    with pytest.raises(RequestError, match="--max-position-embeddings 0: must be at least 1"):
        open_meta(folder, max_position_embeddings=0)


def test_the_feed_forward_size_is_that_of_the_tensors(tmp_path: Path) -> None:
    """multiple_of and ffn_dim_multiplier say how it was chosen, and are wrong in files that others have written."""
    assert open_meta(write_meta(tmp_path / "meta", meta_tensors(), multiple_of=256)).model.ffn_hidden_size == 192
