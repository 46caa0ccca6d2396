"""Adapters for peft: on the exported base, peft computes what our decoder computes with them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.checkpoint import Manifest
from megatron_ext.checkpoint.directory import partial_path, publish
from megatron_ext.checkpoint.write import write_weights
from megatron_ext.models import Decoder, ModelConfig, parameter_shapes
from megatron_ext.models.decoder import whole_model
from megatron_ext.models.names import EMBEDDING, HEAD
from megatron_ext.tensor_parallel import LoraConfig, add_adapters
from tests.megatron_ext.training import tiny
from tests.tools.test_convert_checkpoint import convert
from tests.weights import InMemory
from tools.conversion.families import FAMILIES

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

ALL = LoraConfig(lora_rank=5, lora_alpha=20.0)  # odd, and a scale that is not 1
ATTENTION = LoraConfig(lora_rank=8, lora_alpha=12.5, lora_target_modules=("q_proj", "k_proj", "v_proj", "o_proj"))
CASES: dict[str, tuple[LoraConfig, dict[str, Any]]] = {
    "all": (ALL, {}),
    "attention": (ATTENTION, {}),
    "tied": (ALL, {"untie_embeddings_and_output_weights": False}),
    "grouped with biases": (ATTENTION, {"num_query_groups": 2, "add_bias_linear": True}),
}
FAMILY_SHAPES: dict[str, dict[str, Any]] = {
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96},
    "opt": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 96,
        "ffn_dim": 48,
        "word_embed_proj_dim": 32,
        "max_position_embeddings": 64,
    },
}
FAMILY_CASES = [("bloom", ("o_proj", "up_proj", "down_proj")), ("opt", ("q_proj", "o_proj", "up_proj", "down_proj"))]
IDS = torch.arange(40).view(2, 20) * 7 % 90


def save(root: Path, model: ModelConfig, tensors: dict[str, torch.Tensor], lora: LoraConfig | None) -> Path:
    described = None if lora is None else dataclasses.asdict(lora)
    partial_path(root, 0).mkdir(parents=True)
    write_weights(partial_path(root, 0), InMemory(tensors))
    publish(root, Manifest(0, 0, 0, dataclasses.asdict(model), {}, has_optimizer=False, lora=described))
    return root


def draw(model: ModelConfig, lora: LoraConfig | None = None) -> dict[str, torch.Tensor]:
    shapes = parameter_shapes(model, lora)
    return {name: 0.2 * torch.randn(shape) for name, shape in shapes.items()}


def logits(model: ModelConfig, tensors: dict[str, torch.Tensor], lora: LoraConfig) -> torch.Tensor:
    """Of our decoder with its adapters."""
    decoder: Decoder = whole_model(model)
    add_adapters(decoder, lora)
    head = {HEAD: tensors[EMBEDDING]} if model.tied else {}
    decoder.load_state_dict(tensors | head, assign=True)
    return decoder.eval()(IDS)


@dataclasses.dataclass
class Trained:
    """Checkpoints of a base model and of adapters trained on it, the base's export, and the logits of both together."""

    model: ModelConfig
    lora: LoraConfig
    tensors: dict[str, torch.Tensor]
    base: Path
    native: Path

    def __post_init__(self) -> None:
        self.logits = logits(self.model, self.tensors, self.lora)


def train(folder: Path, lora: LoraConfig, base_rows: int = 96, **options: Any) -> Trained:
    """A base model, and what training might have made of it: other adapters and vocabulary matrices."""
    torch.manual_seed(0)
    model = tiny(**{"num_layers": 2} | options).model
    frozen = draw(model)
    base = {name: value[:base_rows] if name in (EMBEDDING, HEAD) else value for name, value in frozen.items()}
    save(folder / "base", dataclasses.replace(model, vocab_size=base_rows), base, None)
    assert convert("--from", "native", "--to", "hf", "--input", folder / "base", "--output", folder / "hf") == 0
    trained = draw(model, lora)
    trained |= {name: value for name, value in frozen.items() if name not in (EMBEDDING, HEAD)}
    return Trained(model, lora, trained, folder / "hf", save(folder / "native", model, trained, lora))


def export(trained: Trained, folder: Path) -> Path:
    way = ("--from", "native", "--to", "peft", "--input", trained.native, "--output", folder)
    assert convert(*way, "--base-model", trained.base) == 0
    return folder


def base_of(trained: Trained) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(trained.base, dtype=torch.float32)


def distance(model: Any, expected: torch.Tensor) -> float:
    with torch.no_grad():
        return (model(input_ids=IDS).logits - expected).abs().max().item()


@pytest.mark.parametrize("case", CASES)
def test_peft_computes_what_was_trained(tmp_path: Path, case: str) -> None:
    lora, options = CASES[case]
    trained = train(tmp_path, lora, **options)
    folder = export(trained, tmp_path / "peft")
    base = base_of(trained)
    assert distance(base, trained.logits) > 0.1  # the adapters do something
    model = peft.PeftModel.from_pretrained(base, folder)
    assert distance(model, trained.logits) < 1e-5

    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    continued = model.generate(input_ids=IDS[:1], **settings)
    merged = model.merge_and_unload()
    assert distance(merged, trained.logits) < 1e-5
    assert torch.equal(merged.generate(input_ids=IDS[:1], **settings), continued)

    whole = tmp_path / "whole"
    assert convert("--from", "native", "--to", "hf", "--input", trained.native, "--output", whole) == 0
    expected = transformers.AutoModelForCausalLM.from_pretrained(whole).state_dict()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("case", ["all", "tied"])
def test_files_are_those_that_peft_writes_itself(tmp_path: Path, case: str) -> None:
    from safetensors.torch import load_file

    lora, options = CASES[case]
    trained = train(tmp_path, lora, **options)
    ours = export(trained, tmp_path / "peft")
    peft.PeftModel.from_pretrained(base_of(trained), ours).save_pretrained(tmp_path / "again")
    theirs = load_file(tmp_path / "again" / "adapter_model.safetensors")
    found = load_file(ours / "adapter_model.safetensors")
    assert found.keys() == theirs.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, theirs[name]), name
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (ours, tmp_path / "again")]
    for key, value in configs[0].items():
        same = sorted(value) == sorted(configs[1][key]) if isinstance(value, list) else value == configs[1][key]
        assert same, key


def test_a_base_from_before_the_vocabulary_grew_is_resized(tmp_path: Path) -> None:
    trained = train(tmp_path, ATTENTION, base_rows=64)
    folder = export(trained, tmp_path / "peft")
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(base_of(trained), folder)
    base = base_of(trained)
    base.resize_token_embeddings(96)
    assert distance(peft.PeftModel.from_pretrained(base, folder), trained.logits) < 1e-5


def test_adapters_find_their_base_by_its_name(tmp_path: Path) -> None:
    trained = train(tmp_path, ATTENTION)
    model = peft.AutoPeftModelForCausalLM.from_pretrained(export(trained, tmp_path / "peft"), dtype=torch.float32)
    assert distance(model, trained.logits) < 1e-5


def of_family(model_type: str) -> dict[str, Any]:
    """Options of a model that only this family has words for."""
    config = transformers.AutoConfig.for_model(model_type, **FAMILY_SHAPES[model_type]).to_dict()
    model = FAMILIES[model_type].read(config)
    return dataclasses.asdict(model)


@pytest.mark.parametrize("model_type, targets", FAMILY_CASES)
def test_other_families(tmp_path: Path, model_type: str, targets: tuple[str, ...]) -> None:
    trained = train(tmp_path, LoraConfig(lora_rank=4, lora_target_modules=targets), **of_family(model_type))
    assert base_of(trained).config.model_type == model_type
    model = peft.PeftModel.from_pretrained(base_of(trained), export(trained, tmp_path / "peft"))
    assert distance(model, trained.logits) < 1e-5


def test_wrong_requests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = train(tmp_path, ATTENTION)
    other = train(tmp_path / "other", ATTENTION, ffn_hidden_size=64)

    def refusal(source: Path, *options: object) -> str:
        capsys.readouterr()
        output = tmp_path / "refused"
        assert convert("--from", "native", "--to", "peft", "--input", source, "--output", output, *options) == 2
        assert not output.exists()
        return capsys.readouterr().err

    assert "there are no LoRA adapters in it; --to hf exports the whole model" in refusal(tmp_path / "base")
    bloom = train(tmp_path / "bloom", ATTENTION, **of_family("bloom"))
    message = refusal(bloom.native)
    assert "layers.0.self_attn.q_proj is a part of transformer.h.0.self_attention.query_key_value.weight" in message
    assert "merge instead, with --to hf" in message
    message = refusal(trained.native, "--base-model", other.base)
    assert "layers.0.mlp.gate_proj.weight is (64, 32) there and (48, 32) beside them" in message
    (other.base / "config.json").write_text("{")
    assert f"--base-model {other.base}: config.json cannot be read" in refusal(
        trained.native, "--base-model", other.base
    )
