"""Every family of models: to the native form and back without a trace, and what is not supported is refused by name."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ext.checkpoint import CheckpointWriter, Manifest, find_checkpoint
from megatron_ext.checkpoint.load import load_checkpoint, mesh_sizes
from megatron_ext.engine import BatchConfig, Engine, EngineConfig
from megatron_ext.errors import RequestError
from megatron_ext.mesh import ParallelConfig, build_grid
from megatron_ext.models import ModelConfig
from tests.distributed import Pool
from tests.families import MODELS, make_model, save_model, transformers
from tests.slow import sweep
from tests.tools.test_convert_checkpoint import convert
from tools.conversion.families import FAMILIES, family_for
from tools.conversion.formats.hf_folder import open_hf
from tools.conversion.formats.native import open_native, write_native
from tools.conversion.rows import Rule


def to_native(folder: Path, output: Path) -> int:
    return convert("--from", "hf", "--to", "native", "--input", folder, "--output", output)


def to_hf(folder: Path, output: Path, *more: object) -> int:
    return convert("--from", "native", "--to", "hf", "--input", folder, "--output", output, *more)


def only_error(captured: Any) -> str:
    (line,) = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    return str(line)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


# Every model is in one of the two tests that follow, and a variant of every family in this one.
THERE_AND_BACK = ("llama tied", "mistral", "qwen3", "glm", "bloom of six heads", "opt", "gpt2", "falcon 40b")


@pytest.mark.parametrize("name", sweep(MODELS, THERE_AND_BACK))
def test_there_and_back_is_bitwise_equal(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model(name, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "hf", max_shard_size="40KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    assert to_native(tmp_path / "hf", tmp_path / "native") == 0
    assert to_hf(tmp_path / "native", tmp_path / "back", "--max-shard-gb", 4e-5) == 0
    printed = capsys.readouterr().out
    assert "(source by transformers, result by this project)" in printed
    assert "(source by this project, result by transformers)" in printed

    for file in ("config.json", "generation_config.json"):
        first, last = (tmp_path / folder / file for folder in ("hf", "back"))
        if first.exists():
            assert json.loads(last.read_text()) == json.loads(first.read_text())
    expected, found = tensors(tmp_path / "hf"), tensors(tmp_path / "back")
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype == torch.bfloat16
        assert torch.equal(found[key], tensor), key
    original, returned = (transformers.AutoModelForCausalLM.from_pretrained(tmp_path / x) for x in ("hf", "back"))
    start = torch.tensor([[5, 6, 7]])
    options = {"attention_mask": torch.ones_like(start), "max_new_tokens": 5, "do_sample": False, "pad_token_id": 4}
    assert torch.equal(returned.generate(start, **options), original.generate(start, **options))


def test_config_json_travels_through_megatron_core(tmp_path: Path) -> None:
    save_model("qwen3", tmp_path / "hf")
    for source, target in (("hf", "megatron-core"), ("megatron-core", "hf")):
        names = ("--from", source, "--to", target, "--input", tmp_path / source, "--output", tmp_path / f"to-{target}")
        assert convert(*names, "--no-verify") == 0
        (tmp_path / f"to-{target}").rename(tmp_path / target if target != "hf" else tmp_path / "back")
    assert json.loads((tmp_path / "back/config.json").read_text()) == json.loads(
        (tmp_path / "hf/config.json").read_text()
    )
    assert all(torch.equal(tensor, tensors(tmp_path / "back")[key]) for key, tensor in tensors(tmp_path / "hf").items())


@pytest.mark.parametrize("name", sweep(MODELS, MODELS.keys() - set(THERE_AND_BACK)))
def test_a_model_that_did_not_come_from_there_goes_there(name: str, tmp_path: Path) -> None:
    """Written afresh, config.json makes the same model of the same class in transformers."""
    model = save_model(name, tmp_path / "hf")
    source = dataclasses.replace(open_hf(tmp_path / "hf"), hugging_face=None)
    (tmp_path / "native").mkdir()
    write_native(source, tmp_path / "native")
    assert to_hf(tmp_path / "native", tmp_path / "back", "--no-verify") == 0
    returned = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert type(returned) is type(model)
    ids = torch.arange(90).view(2, 45) % 97
    assert torch.equal(returned(ids).logits, model(ids).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_absent_fields_mean_what_transformers_takes_them_for(family: str) -> None:
    config = transformers.AutoConfig.for_model(family).to_dict()
    needed = {"model_type", *FAMILIES[family].fields}
    short = {name: value for name, value in config.items() if name in needed and not name.startswith("tie")}
    optional = ("num_key_value_heads", "max_position_embeddings", "head_dim", "sliding_window", "rms_norm_eps")
    for name in (*optional, "initializer_range", "init_std", "layer_norm_epsilon", "bias"):
        short.pop(name, None)
    assert FAMILIES[family].read(short).resolved() == FAMILIES[family].read(config).resolved()


def test_a_field_by_another_name_is_changed_too() -> None:
    config = {"model_type": "gpt2", "max_position_embeddings": 64}
    changed = dataclasses.replace(FAMILIES["gpt2"].read(config), max_position_embeddings=77)
    assert FAMILIES["gpt2"].read(FAMILIES["gpt2"].update(config, changed)) == changed


def test_buffers_of_older_folders_are_no_weights(tmp_path: Path) -> None:
    save_model("gpt2", tmp_path / "hf")
    weights = tensors(tmp_path / "hf")
    weights |= {"transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    save_file(weights, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    assert to_native(tmp_path / "hf", tmp_path / "native") == 0


@pytest.mark.parametrize("name", MODELS)
def test_what_changed_is_said_and_the_rest_stays(name: str) -> None:
    config = make_model(name).config.to_dict() | {"a_field_of_its_own": 7}
    family = FAMILIES[config["model_type"]]
    model = family.read(config)
    changes: dict[str, Any] = {"vocab_size": 101, "max_position_embeddings": 77}
    if family.rotary:
        changes |= {"rotary_base": 5e4, "rope_scaling": "linear", "rope_scaling_factor": 4.0}
        changes["rope_original_max_position"] = 8192  # means nothing there
    if config["model_type"] == "glm":
        changes["rotary_percent"] = 0.25
    changed = dataclasses.replace(model, **changes)
    updated = family.update(config, changed)
    assert family.read(updated) == changed
    assert family.update(config, model) == config
    rope = {"rope_parameters", "rope_theta", "rope_scaling"}
    differ = {key for key in config.keys() | updated.keys() if config.get(key) != updated.get(key)} - rope
    assert differ <= {"vocab_size", "max_position_embeddings", "n_positions", "seq_length", "partial_rotary_factor"}
    theirs = transformers.AutoConfig.for_model(**updated)  # and transformers understands it so
    if family.rotary:
        assert (theirs.rope_parameters["rope_theta"], theirs.rope_parameters["factor"]) == (5e4, 4.0)


def test_the_words_of_bigscience(tmp_path: Path) -> None:
    """config.json as the published BLOOM models have it, and names without the prefix."""
    model = save_model("bloom", tmp_path / "hf")
    file = tmp_path / "hf" / "config.json"
    config = json.loads(file.read_text())
    words = {"n_embed": config.pop("hidden_size"), "num_attention_heads": config.pop("n_head"), "seq_length": 2048}
    file.write_text(json.dumps(config | words | {"attention_softmax_in_fp32": True, "n_inner": None}))
    assert transformers.AutoConfig.from_pretrained(tmp_path / "hf").hidden_size == model.config.hidden_size
    assert to_native(tmp_path / "hf", tmp_path / "native") == 0
    assert to_hf(tmp_path / "native", tmp_path / "back") == 0
    assert json.loads((tmp_path / "back/config.json").read_text()) == json.loads(file.read_text())


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "scaling": ("qwen2", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope scaling 'yarn'"),
    "windows on some layers": ("qwen2", {"use_sliding_window": True}, "use_sliding_window True of a qwen2 model"),
    "windows on some layers in other words": ("qwen3", {"layer_types": ["sliding_attention"] * 4}, "layer_types"),
    "no type": ("llama", {"model_type": []}, "model_type [] is not supported"),
    "a fraction": ("llama", {"hidden_size": 32.5}, "config.json: "),
    "a word for a number": ("llama", {"rms_norm_eps": "small"}, "config.json: "),
    "norms after": ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before False of a opt model"),
    "narrow embedding": ("opt", {"word_embed_proj_dim": 16}, "word_embed_proj_dim 16 of an opt model"),
    "ALiBi of Falcon-RW": ("falcon 7b", {"alibi": True}, "alibi True of a falcon model is not supported"),
    "residual after the norm": ("bloom", {"apply_residual_connection_post_layernorm": True}, "apply_residual"),
    "biases of attention alone": ("llama", {"attention_bias": True}, "attention_bias and mlp_bias differ"),
    "another type": ("llama", {"model_type": "gemma"}, "model_type 'gemma' is not supported; llama, mistral"),
    "no number": ("llama", {"num_hidden_layers": "four"}, "config.json: "),
    "a shape that is none": ("llama", {"num_key_value_heads": 3}, "does not divide"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_supported_is_refused_by_name(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, fields, message = REFUSED[case]
    save_model(name, tmp_path / "hf")
    file = tmp_path / "hf" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    capsys.readouterr()
    assert to_native(tmp_path / "hf", tmp_path / "native") == 2
    assert message in only_error(capsys.readouterr())
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_model_without_a_like_is_told_why(tmp_path: Path) -> None:
    model = ModelConfig(2, 32, 64, 4, 97, qk_layernorm=True, position_embedding_type="alibi")
    with pytest.raises(RequestError, match=r"a qwen3 model of Hugging Face cannot have position_embedding_type alibi"):
        family_for(model)


def test_names_without_the_prefix_of_the_model(tmp_path: Path) -> None:
    """bigscience/bloom holds the model without its head, and so without `transformer.`."""
    save_model("bloom", tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    save_file({name.removeprefix("transformer."): t for name, t in load_file(file).items()}, file, {"format": "pt"})
    assert to_native(tmp_path / "hf", tmp_path / "native") == 0


@pytest.mark.parametrize("equal", [True, False])
def test_a_tied_model_may_hold_its_head_once_more_but_no_other(
    equal: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model("qwen2 tied", tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    weights = load_file(file)
    head = weights["model.embed_tokens.weight"].clone()
    if not equal:
        head[96, 31] += 1
    save_file(weights | {"lm_head.weight": head}, file, {"format": "pt"})
    assert to_native(tmp_path / "hf", tmp_path / "native") == (0 if equal else 2)
    assert ("lm_head.weight differs from model.embed_tokens.weight" in capsys.readouterr().err) == (not equal)


def test_what_torch_saved_is_read_too(tmp_path: Path) -> None:
    model = save_model("falcon 40b", tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "hf" / "pytorch_model.bin")  # with the tied head
    assert to_native(tmp_path / "hf", tmp_path / "native") == 0
    source = open_native(tmp_path / "native")
    whole = source.weights.read_rows("layers.3.mlp.up_proj.weight", 0, 128)
    assert torch.equal(whole, model.state_dict()["transformer.h.3.mlp.dense_h_to_4h.weight"])


def resave(folder: Path, change: dict[str, torch.Tensor]) -> None:
    file = folder / "model.safetensors"
    save_file(load_file(file) | change, file, {"format": "pt"})


def test_values_that_a_dtype_cannot_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model("llama", tmp_path / "hf")
    name = "model.layers.1.mlp.up_proj.weight"
    large = load_file(tmp_path / "hf" / "model.safetensors")[name].clone()
    large[3, 3] = 1e6
    resave(tmp_path / "hf", {name: large})
    for target in ("hf", "native"):
        names = ("--from", "hf", "--to", target, "--input", tmp_path / "hf", "--output", tmp_path / "out")
        assert convert(*names, "--dtype", "float16") == 2
        ours = "layers.1.mlp.up_proj.weight"
        said = f"--dtype float16: {ours} has values that it cannot hold, such as 1e+06"
        assert said in only_error(capsys.readouterr())
        assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert convert(*names, "--dtype", "bfloat16") == 0


def test_dtypes_that_do_not_go_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model("llama", tmp_path / "hf")
    name = "model.layers.1.self_attn.k_proj.weight"
    half = load_file(tmp_path / "hf" / "model.safetensors")[name].bfloat16()
    resave(tmp_path / "hf", {name: half})
    names = ("--from", "hf", "--to", "megatron-core", "--input", tmp_path / "hf", "--output", tmp_path / "out")
    assert convert(*names) == 2
    assert "they lie in one tensor" in only_error(capsys.readouterr())
    assert convert(*names, "--dtype", "float32") == 0
    resave(tmp_path / "hf", {name: half.to(torch.int8)})
    assert to_native(tmp_path / "hf", tmp_path / "native") == 2
    assert f"{name} is stored as int8, which cannot be converted" in only_error(capsys.readouterr())


def test_one_weight_under_two_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model("llama", tmp_path / "hf")
    resave(tmp_path / "hf", {"norm.weight": torch.zeros(32)})
    assert to_native(tmp_path / "hf", tmp_path / "native") == 2
    assert "model.norm.weight and norm.weight are one weight" in only_error(capsys.readouterr())


@pytest.mark.parametrize("name", ["llama", "glm", "bloom"])
def test_a_wrong_mapping_is_caught_and_placed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Gate and up exchanged in the second half of the model's layers would go unnoticed: shapes are equal."""
    save_model(name, tmp_path / "hf")
    family = FAMILIES[name]
    one, other = ("gate_proj", "up_proj") if name != "bloom" else ("k_proj", "v_proj")

    def exchanged(rule: Rule) -> Rule:
        ours = tuple(part.replace(one, "?").replace(other, one).replace("?", other) for part in rule.ours)
        return dataclasses.replace(rule, ours=ours)

    wrong = dataclasses.replace(family, rules=tuple(exchanged(rule) for rule in family.rules))
    monkeypatch.setitem(FAMILIES, name, wrong)
    assert to_native(tmp_path / "hf", tmp_path / "native") == 1
    line = only_error(capsys.readouterr())
    assert "the result is not the source, and was removed" in line
    assert "layer 0 is the first that differs" in line
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert (
        convert(
            *("--from", "hf", "--to", "native", "--input", tmp_path / "hf", "--output", tmp_path / "n", "--no-verify")
        )
        == 0
    )


SIZES = (49953, 55296, 69104, 997)


def save_again(jobs: list[tuple[ModelConfig, Path, Path]], tp: int) -> None:
    """Load every checkpoint into an engine at this degree of tensor parallelism, and save what is in it."""
    parallel = ParallelConfig(tensor_model_parallel_size=tp)
    grid = build_grid(parallel, torch.device("cpu"))
    for model, start, end in jobs:
        engine = Engine(EngineConfig(model, batch=BatchConfig(seq_length=8), parallel=parallel), grid)
        load_checkpoint(engine, start, weights_only=True)
        for name, parameter in engine.parameters.items():
            if name in ("embed_tokens.weight", "lm_head.weight"):
                assert parameter.shape[0] == model.vocab_size
        manifest = Manifest(1, 1, 8, dataclasses.asdict(model), mesh_sizes(grid), has_optimizer=True)
        CheckpointWriter(end, engine).save(manifest, {})


@pytest.mark.parametrize("tp", sweep((1, 2, 3, 8), {3}))
def test_any_vocabulary_at_any_degree_without_padding(tp: int, pool: Pool, tmp_path: Path) -> None:
    jobs = []
    for size in SIZES:
        config = transformers.LlamaConfig(
            vocab_size=size, hidden_size=48, intermediate_size=24, num_hidden_layers=1, num_attention_heads=24
        )
        transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / f"hf{size}")
        assert to_native(tmp_path / f"hf{size}", tmp_path / f"native{size}") == 0
        start = find_checkpoint(tmp_path / f"native{size}")
        jobs.append((open_native(start).model, start, tmp_path / f"trained{size}"))
    pool.run(save_again, tp, jobs, tp)
    for size in SIZES:
        assert to_hf(tmp_path / f"trained{size}", tmp_path / f"back{size}", "--no-verify") == 0
        expected, found = tensors(tmp_path / f"hf{size}"), tensors(tmp_path / f"back{size}")
        assert found["lm_head.weight"].shape == (size, 48)
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            assert torch.equal(found[key], tensor), key
