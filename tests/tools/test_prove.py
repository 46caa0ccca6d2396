"""The proof of a conversion: quiet where both are one model, and right about where they are not."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.checkpoint.write import write_weights
from megatron_ext.errors import RequestError
from megatron_ext.models import ModelConfig, parameter_shapes
from megatron_ext.models.decoder import whole_model
from tests.families import MODELS, save_model
from tests.megatron_ext.hugging_face import llama_like
from tests.weights import InMemory
from tools.conversion.changes.weights import CastWeights
from tools.conversion.formats.hf_folder import open_hf, open_tensors
from tools.conversion.proof.outputs import EMBEDDED, LOGITS, Outputs, prompt, run_ours
from tools.conversion.proof.prove import TOLERANCE, compare_outputs, difference_of_weights
from tools.conversion.proof.run_transformers import NotRunnable, run_transformers

transformers = pytest.importorskip("transformers")

MODEL = ModelConfig(
    num_layers=4,
    hidden_size=64,
    ffn_hidden_size=88,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=997,
    max_position_embeddings=256,
)
IDS = prompt(997, 256)
Tensors = dict[str, torch.Tensor]


def random_weights(model: ModelConfig) -> Tensors:
    torch.manual_seed(0)
    shapes = parameter_shapes(model)
    return {name: torch.rand(s) + 0.5 if len(s) == 1 else torch.randn(s) * 0.1 for name, s in shapes.items()}


@pytest.fixture(scope="module")
def weights() -> Tensors:
    return random_weights(MODEL)


@pytest.fixture(scope="module")
def theirs(weights: Tensors, tmp_path_factory: pytest.TempPathFactory) -> Outputs:
    folder = tmp_path_factory.mktemp("hf")
    llama_like(MODEL, weights).save_pretrained(folder)
    return run_transformers(folder, open_tensors(folder), IDS)


def test_prompt_reaches_both_ends_and_spreads() -> None:
    ids = prompt(1000, 4096)
    assert ids.shape == (1, 128)
    assert set(prompt(1000, 2)[0].tolist()) == {0, 999}
    gaps = ids[0].sort().values.diff()
    assert gaps.max() <= 20  # any 1/50 of the vocabulary has a row in it
    assert prompt(1000, 20).shape == (1, 20)
    assert prompt(3, 128).max() == 2


@pytest.mark.parametrize("change", [{}, {"untie_embeddings_and_output_weights": False}, {"add_bias_linear": True}])
def test_the_same_model_passes(change: dict[str, Any], tmp_path: Path) -> None:
    model = dataclasses.replace(MODEL, **change)
    weights = random_weights(model)
    llama_like(model, weights).save_pretrained(tmp_path)
    ours = run_ours(model, InMemory(weights), IDS)
    comparison = compare_outputs(run_transformers(tmp_path, open_tensors(tmp_path), IDS), ours)
    assert list(comparison.differences) == [EMBEDDED, "layer 0", "layer 1", "layer 2", "layer 3", LOGITS]
    assert max(comparison.differences.values()) < TOLERANCE / 10
    assert comparison.passed
    assert str(comparison).startswith("logits differ by at most")


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"untie_embeddings_and_output_weights": False},
        {"position_embedding_type": "alibi", "embed_layernorm": True, "normalization": "LayerNorm"},
        {"position_embedding_type": "learned_absolute", "parallel_residual": "one-norm"},
    ],
)
@torch.no_grad()
def test_layer_by_layer_is_the_whole_decoder(change: dict[str, Any]) -> None:
    model = dataclasses.replace(MODEL, **change)
    weights = random_weights(model)
    decoder = whole_model(model)
    head = {"lm_head.weight": weights["embed_tokens.weight"]} if model.tied else {}
    decoder.load_state_dict(weights | head, assign=True)
    assert torch.equal(run_ours(model, InMemory(weights), IDS)[LOGITS], decoder(IDS))


def interleaved(matrix: torch.Tensor) -> torch.Tensor:
    """Rows of heads of 16 in the other order of the rotation's pairs: (0, 8, 1, 9, ...)."""
    return matrix.view(-1, 2, 8, matrix.shape[1]).transpose(1, 2).reshape(matrix.shape)


def shifted(matrix: torch.Tensor, first: int) -> torch.Tensor:
    return torch.cat([matrix[:first], matrix[first:].roll(1, 0)])


def of_layer(number: int, *names: str, by: Callable[..., Any]) -> Callable[[Tensors], Tensors]:
    """What replaces those weights of a layer by a function of them."""
    full = [f"layers.{number}.{name}.weight" for name in names]

    def change(weights: Tensors) -> Tensors:
        made = by(*(weights[name] for name in full))
        return dict(zip(full, made if isinstance(made, tuple) else (made,), strict=True))

    return change


MISTAKES: dict[str, tuple[str, Callable[[Tensors], Tensors]]] = {
    "pairs of the rotation": (
        "layer 1",
        of_layer(1, "self_attn.q_proj", "self_attn.k_proj", by=lambda q, k: (interleaved(q), interleaved(k))),
    ),
    "heads of the keys": ("layer 2", of_layer(2, "self_attn.k_proj", by=lambda k: k.roll(16, 0))),
    "gate and up swapped": ("layer 0", of_layer(0, "mlp.gate_proj", "mlp.up_proj", by=lambda gate, up: (up, gate))),
    "transposed": ("layer 3", of_layer(3, "self_attn.o_proj", by=lambda o: o.T.contiguous())),
    "a norm left out": ("layer 2", of_layer(2, "post_attention_layernorm", by=torch.ones_like)),
    "one norm off by 1 %": ("layer 2", of_layer(2, "input_layernorm", by=lambda norm: norm * 1.01)),
    "a layer of its neighbour": (
        "layer 1",
        lambda w: {"layers.1.mlp.up_proj.weight": w["layers.2.mlp.up_proj.weight"]},
    ),
    "last norm": (LOGITS, lambda w: {"norm.weight": torch.ones(64)}),
    "embedding's rows shifted": (EMBEDDED, lambda w: {"embed_tokens.weight": w["embed_tokens.weight"].roll(1, 0)}),
    "the last rows shifted": (EMBEDDED, lambda w: {"embed_tokens.weight": shifted(w["embed_tokens.weight"], 980)}),
    "the head's last rows": (LOGITS, lambda w: {"lm_head.weight": shifted(w["lm_head.weight"], 995)}),
    "not a number": ("layer 3", of_layer(3, "mlp.up_proj", by=lambda up: up * torch.nan)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_found_where_they_are(mistake: str, weights: Tensors, theirs: Outputs) -> None:
    where, change = MISTAKES[mistake]
    comparison = compare_outputs(theirs, run_ours(MODEL, InMemory(weights | change(weights)), IDS))
    assert not comparison.passed
    line = str(comparison)
    assert line.startswith(f"{where} "), line
    assert "first that differs" in line
    assert "\n" not in line
    names = list(comparison.differences)
    for name in names[: names.index(where)]:
        assert comparison.differences[name] < TOLERANCE / 10


@pytest.mark.parametrize(
    "change",
    [
        {"rotary_base": 10500.0},
        {"norm_epsilon": 1e-3},
        {"rope_scaling": "linear", "rope_scaling_factor": 2.0},
        {"rope_scaling": "llama3", "rope_scaling_factor": 8.0, "rope_original_max_position": 8192},
    ],
)
def test_mistakes_of_the_configuration(change: dict[str, Any], weights: Tensors, theirs: Outputs) -> None:
    comparison = compare_outputs(theirs, run_ours(dataclasses.replace(MODEL, **change), InMemory(weights), IDS))
    assert str(comparison).startswith("layer 0 is the first that differs")
    assert str(comparison).endswith("(embedding: 0.0e+00)")


def test_runs_that_cannot_be_compared_do_not_pass(weights: Tensors, theirs: Outputs) -> None:
    for number in (3, 5):
        model = dataclasses.replace(MODEL, num_layers=number)
        comparison = compare_outputs(theirs, run_ours(model, InMemory(random_weights(model) | weights), IDS))
        assert not comparison.passed
    broken = theirs | {LOGITS: theirs[LOGITS] * torch.inf}
    assert not compare_outputs(broken, broken).passed


def test_a_larger_vocabulary_is_compared_in_the_old_rows(weights: Tensors, theirs: Outputs) -> None:
    grown = {
        name: torch.cat([weights[name], torch.randn(50, 64)]) for name in ("embed_tokens.weight", "lm_head.weight")
    }
    ours = run_ours(dataclasses.replace(MODEL, vocab_size=1047), InMemory(weights | grown), IDS)
    assert compare_outputs(theirs, ours, rows=997).passed
    assert not compare_outputs(theirs, ours).passed


def test_rounded_weights_are_compared_with_rounded_weights(weights: Tensors, tmp_path: Path) -> None:
    half = {name: tensor.bfloat16() for name, tensor in weights.items()}
    llama_like(MODEL, weights).save_pretrained(tmp_path)
    ours = run_ours(MODEL, InMemory(half), IDS)
    stored = open_tensors(tmp_path)
    assert compare_outputs(run_transformers(tmp_path, CastWeights(stored, torch.bfloat16), IDS), ours).passed
    assert not compare_outputs(run_transformers(tmp_path, stored, IDS), ours).passed


@pytest.mark.parametrize("family", MODELS)
@torch.no_grad()
def test_every_family_module_by_module(family: str, tmp_path: Path) -> None:
    """What is put together of modules is transformers' model to the last bit, and ours agrees with it."""
    save_model(family, tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    ids = prompt(97, 64)
    expected = model(input_ids=ids, output_hidden_states=True, use_cache=False)
    outputs = run_transformers(tmp_path, open_tensors(tmp_path), ids)
    # transformers' last hidden state is after the last norm
    steps = [EMBEDDED, "layer 0", "layer 1", "layer 2", LOGITS]
    assert list(outputs) == [*steps[:-1], "layer 3", LOGITS]
    for name, tensor in zip(steps, [*expected.hidden_states[:-1], expected.logits], strict=True):
        assert torch.equal(outputs[name], tensor)

    source = open_hf(tmp_path)
    comparison = compare_outputs(outputs, run_ours(source.model, source.weights, ids))
    assert comparison.passed, str(comparison)


def test_names_without_the_prefix_of_the_base_model(tmp_path: Path) -> None:
    model = save_model("bloom", tmp_path)
    stored = {name.removeprefix("transformer."): tensor for name, tensor in model.state_dict().items()}
    del stored["lm_head.weight"]  # as the published ones are
    ids = prompt(97, 64)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    comparison = compare_outputs(
        {LOGITS: expected}, {LOGITS: run_transformers(tmp_path, InMemory(stored), ids)[LOGITS]}
    )
    assert comparison.passed


def test_a_folder_that_transformers_would_not_take(tmp_path: Path) -> None:
    stored = dict(save_model("llama", tmp_path).state_dict())
    name = "model.layers.1.mlp.up_proj.weight"
    ids = prompt(97, 64)
    for wrong in (
        {key: tensor for key, tensor in stored.items() if key != name},
        stored | {name: stored[name][:-1]},
    ):
        with pytest.raises(RequestError, match=name.replace(".", r"\.")):
            run_transformers(tmp_path, InMemory(wrong), ids)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": "wide"}))
    with pytest.raises(RequestError, match="cannot build"):
        run_transformers(tmp_path, InMemory(stored), ids)


def test_what_transformers_cannot_run_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "baichuan", "auto_map": {"AutoConfig": "x.Y"}}))
    with pytest.raises(NotRunnable, match="baichuan"):
        run_transformers(tmp_path, InMemory({}), IDS)
    monkeypatch.setattr(transformers, "__version__", "4.44.2")
    with pytest.raises(NotRunnable, match="too old"):
        run_transformers(tmp_path, InMemory({}), IDS)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(NotRunnable, match="pip install transformers"):
        run_transformers(tmp_path, InMemory({}), IDS)


def test_weights_are_compared_to_the_last_bit(weights: Tensors) -> None:
    name = "layers.3.mlp.up_proj.weight"
    half = {key: tensor.bfloat16() for key, tensor in weights.items()}
    half[name][7, 5] = torch.nan
    copy = {key: tensor.clone() for key, tensor in half.items()}
    assert difference_of_weights(InMemory(half), InMemory(copy)) is None
    changed = copy[name].clone()
    changed.view(torch.int16)[-1, -1] ^= 1
    found = {
        "rows": copy | {name: changed},
        "shape": copy | {name: copy[name][:-1]},
        "dtype": copy | {name: copy[name].half()},
        "lacks": {key: tensor for key, tensor in copy.items() if key != name},
    }
    for word, result in found.items():
        said = difference_of_weights(InMemory(half), InMemory(result))
        assert said is not None
        assert word in said
        assert name in said
    said = difference_of_weights(InMemory(half), InMemory(copy | {"more": changed}))
    assert said == "has an unknown weight more (1 in all)"


MEMORY = """
import sys
from pathlib import Path
from megatron_ext.checkpoint.read import WeightReader
from tests.tools.test_prove import deep
from tools.conversion.proof.outputs import prompt
from tools.conversion.proof.outputs import run_ours
from tools.conversion.proof.run_transformers import run_transformers
from tools.conversion.formats.hf_folder import open_tensors

def run(layers):
    folder = Path(sys.argv[1], str(layers))
    run_ours(deep(layers), WeightReader(folder / "native"), prompt(512, 16))
    run_transformers(folder / "hf", open_tensors(folder / "hf"), prompt(512, 16))
    # not getrusage: to that, what the parent process held before exec is this one's
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1024

print(run(2), run(12))
"""


def deep(layers: int) -> ModelConfig:
    """11 MiB a layer in float32."""
    return dataclasses.replace(MODEL, num_layers=layers, hidden_size=512, ffn_hidden_size=1344, vocab_size=512)


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the peak is read from Linux")
@pytest.mark.slow
def test_memory_does_not_grow_with_layers(tmp_path: Path) -> None:
    for layers in (2, 12):
        weights = random_weights(deep(layers))
        (tmp_path / str(layers) / "native").mkdir(parents=True)
        write_weights(tmp_path / str(layers) / "native", InMemory(weights))
        llama_like(deep(layers), weights).save_pretrained(tmp_path / str(layers) / "hf")
    root = Path(__file__).parents[2]
    growth = []
    while len(growth) < 3 and (not growth or growth[-1] >= 32):  # now and then an allocator keeps more than it must
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, tmp_path], cwd=root, capture_output=True, text=True, check=True
        )
        shallow, full = map(float, done.stdout.split())
        growth.append(full - shallow)
    assert growth[-1] < 32, "the whole model is 130 MiB"
