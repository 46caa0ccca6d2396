"""Conversion against transformers: the same tensors, the same logits, and a clear word about bad input."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ext.checkpoint import find_checkpoint, read_manifest
from megatron_ext.checkpoint.read import WeightReader
from tests.tokenizer.extended import OLD, write_models
from tools import check_export, convert_checkpoint
from tools.command import run
from tools.conversion.formats.native import open_native

transformers = pytest.importorskip("transformers")

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped": {"num_key_value_heads": 2},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "llama3": {"rope_parameters": LLAMA3_ROPE},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
}


def convert(*arguments: object) -> int:
    return run(convert_checkpoint.build_parser(), convert_checkpoint.work, [str(word) for word in arguments])


def hf_model(folder: Path, **options: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **{
            "hidden_size": 32,
            "intermediate_size": 88,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "vocab_size": 997,
            "max_position_embeddings": 128,
        }
        | options
    )
    model = transformers.LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("variant", VARIANTS)
def test_there_and_back_is_bitwise_equal(tmp_path: Path, variant: str) -> None:
    model = hf_model(tmp_path / "hf", **VARIANTS[variant])
    assert convert("--from", "hf", "--to", "native", "--input", tmp_path / "hf", "--output", tmp_path / "native") == 0
    back = ("--from", "native", "--to", "hf", "--input", tmp_path / "native", "--output", tmp_path / "back")
    assert convert(*back, "--max-shard-gb", "0.0001") == 0
    assert len(list((tmp_path / "back").glob("model-*.safetensors"))) > 1

    returned = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "back")
    theirs = model.state_dict()
    assert {name: tensor.dtype for name, tensor in returned.state_dict().items()} == {
        name: tensor.dtype for name, tensor in theirs.items()
    }
    for name, tensor in returned.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name

    ids = torch.arange(100)[None] * 7 % 997
    expected = model(input_ids=ids).logits
    assert torch.equal(returned(input_ids=ids).logits, expected)
    ours = check_export.load_decoder(open_native(tmp_path / "native"))
    assert (ours(ids) - expected).abs().max() <= 1e-5


def test_dtype_and_manifest(tmp_path: Path) -> None:
    hf_model(tmp_path / "hf")
    assert convert("--from", "hf", "--to", "native", "--input", tmp_path / "hf", "--output", tmp_path / "native") == 0
    manifest = read_manifest(find_checkpoint(tmp_path / "native"))
    assert (manifest.iteration, manifest.has_optimizer, manifest.model["vocab_size"]) == (0, False, 997)
    arguments = ("--from", "native", "--to", "hf", "--input", tmp_path / "native", "--output", tmp_path / "half")
    assert convert(*arguments, "--dtype", "bfloat16") == 0
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    half = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "half")
    assert half.dtype == torch.bfloat16


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype="auto").state_dict()


def test_the_same_form_in_another_dtype(tmp_path: Path) -> None:
    model = hf_model(tmp_path / "hf", bos_token_id=5, eos_token_id=[6, 7], pad_token_id=8)
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    steps = [("hf", "hf", "hf", "half"), ("hf", "native", "half", "n"), ("native", "native", "n", "n32")]
    steps.append(("native", "hf", "n32", "back"))
    for source, target, given, made in steps:
        names = ("--from", source, "--to", target, "--input", tmp_path / given, "--output", tmp_path / made)
        dtype = {"half": ("--dtype", "bfloat16"), "n32": ("--dtype", "float32")}.get(made, ())
        assert convert(*names, *dtype) == 0
    expected = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    for name, tensor in tensors(tmp_path / "half").items():
        assert torch.equal(tensor, expected[name])
    for name, tensor in tensors(tmp_path / "back").items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, expected[name].float())
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert [config[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [5, [6, 7], 8]
    assert (tmp_path / "half" / "tokenizer.json").read_text() == "{}"
    checkpoint = find_checkpoint(tmp_path / "n")
    assert set(WeightReader(checkpoint).dtypes.values()) == {torch.bfloat16}


def test_frequencies_of_the_rotation_are_no_weights(tmp_path: Path) -> None:
    hf_model(tmp_path / "hf")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    assert convert("--from", "hf", "--to", "native", "--input", tmp_path / "hf", "--output", tmp_path / "native") == 0


def _truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def _edit(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


BROKEN = {
    "truncated weights": (_truncate, "model.safetensors is not a whole safetensors file"),
    "missing weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json cannot be read"),
    "another architecture": (lambda f: _edit(f, model_type="phi3"), "model_type 'phi3' is not supported"),
    "wrong width": (
        lambda f: _edit(f, hidden_size=64, head_dim=16),
        "embed_tokens.weight is (997, 32), config.json asks for (997, 64)",
    ),
    "a layer too many": (lambda f: _edit(f, num_hidden_layers=4), "lacks weight model.layers.3."),
    "a layer too few": (lambda f: _edit(f, num_hidden_layers=2), "has an unknown weight model.layers.2."),
    "unknown rope": (
        lambda f: _edit(f, rope_parameters={"rope_type": "yarn", "factor": 2.0}),
        "rope scaling 'yarn' is not supported",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_input_is_refused_and_leaves_nothing(
    tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    breakage, message = BROKEN[case]
    hf_model(tmp_path / "hf")
    breakage(tmp_path / "hf")
    capsys.readouterr()
    assert convert("--from", "hf", "--to", "native", "--input", tmp_path / "hf", "--output", tmp_path / "native") == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


NATIVE = ("--from", "hf", "--to", "native", "--input", "x", "--output", "y")
HF = ("--from", "native", "--to", "hf", "--input", "x", "--output", "y")


def test_wrong_requests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "there").mkdir()
    hf_model(tmp_path / "hf")
    requests = {
        ("--from", "hf", "--to", "hf", "--input", tmp_path / "hf", "--output", tmp_path / "y"): (
            "nothing to convert without --dtype, --embedding-init, --max-shard-gb, --model-type or --tokenizer"
        ),
        (*NATIVE, "--max-shard-gb", "1"): "--max-shard-gb has no effect with --to native",
        (*HF, "--max-shard-gb", "0"): "--max-shard-gb 0.0: must be a finite number above 0",
        (*HF, "--max-shard-gb", "inf"): "--max-shard-gb inf: must be a finite number above 0",
        (*HF, "--max-shard-gb", "nan"): "--max-shard-gb nan: must be a finite number above 0",
        (*HF, "--base-tokenizer", "t"): "--base-tokenizer has no effect without --embedding-init",
        (*HF, "--embedding-norm-correction"): "--embedding-norm-correction has no effect without --embedding-init",
        (*NATIVE, "--model-type", "llama"): "--model-type has no effect with --to native: it belongs to --to hf",
        (*NATIVE, "--base-model", "b"): "--base-model has no effect with --to native: it belongs to --to peft",
        (*HF, "--vocab-size", "9"): "--vocab-size has no effect with --from native: it belongs to --from megatron-core",
        (*HF, "--max-position-embeddings", "9"): "--max-position-embeddings has no effect with --from native",
        (*HF[:3], "peft", *HF[4:], "--dtype", "float32"): "--dtype has no effect with --to peft",
        (*NATIVE[:3], "peft", *NATIVE[4:]): "--from hf --to peft: adapters are exported from native checkpoints only",
        (*HF, "--seed", "1"): "--seed has no effect without --embedding-init",
        (*HF, "--change-tokenizer"): "--change-tokenizer needs --tokenizer",
        (*HF, "--embedding-init", "mean"): "--embedding-init mean needs --base-tokenizer",
        (*HF, "--embedding-init", "mean", "--base-tokenizer", "t"): "--embedding-init mean needs --tokenizer",
        (*HF, "--embedding-init", "zero"): "invalid choice",
        ("--from", "hf", "--to", "native", "--input", "x", "--output", tmp_path / "there"): "exists already",
        ("--from", "native", "--to", "hf", "--input", tmp_path / "no", "--output", tmp_path / "y"): "no such directory",
        ("--from", "gguf", "--to", "native", "--input", "x", "--output", "y"): "invalid choice",
    }
    for request, message in requests.items():
        assert convert(*request) == 2
        assert message in capsys.readouterr().err


def test_another_tokenizer_beside_the_same_weights(tmp_path: Path) -> None:
    hf_model(tmp_path / "hf", vocab_size=OLD)
    base, _ = write_models(tmp_path)
    names = ("--from", "hf", "--to", "hf", "--input", tmp_path / "hf", "--output", tmp_path / "out")
    assert convert(*names, "--tokenizer", base) == 0
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == base.read_bytes()


def test_the_same_once_more_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf_model(tmp_path / "hf")
    changes = {
        "native": "--dtype, --embedding-init or --tokenizer",
        "megatron-core": "--dtype, --embedding-init, --vocab-size or --tokenizer",
    }
    for form, flags in changes.items():
        assert convert("--from", "hf", "--to", form, "--input", tmp_path / "hf", "--output", tmp_path / form) == 0
        names = ("--input", tmp_path / form, "--output", tmp_path / "out")
        assert convert("--from", form, "--to", form, *names) == 2
        assert f"nothing to convert without {flags}\n" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["native", "megatron-core"])
@pytest.mark.parametrize("target", ["hf", "native", "megatron-core"])
def test_damage_that_leaves_the_size_alone_is_noticed(
    tmp_path: Path, form: str, target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    hf_model(tmp_path / "hf")
    assert convert("--from", "hf", "--to", form, "--input", tmp_path / "hf", "--output", tmp_path / "stored") == 0
    (file,) = (tmp_path / "stored").rglob("*.distcp")
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 8] = bytes(byte ^ 255 for byte in content[middle : middle + 8])
    file.write_bytes(content)
    capsys.readouterr()
    names = ("--from", form, "--to", target, "--input", tmp_path / "stored", "--output", tmp_path / "back")
    assert convert(*names, "--dtype", "bfloat16") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: {file}: damaged, ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "stored"]


def test_an_unwritable_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf_model(tmp_path / "hf")
    output = Path("/proc/self/out")  # nobody can make a folder there
    assert convert("--from", "hf", "--to", "native", "--input", tmp_path / "hf", "--output", output) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "--output /proc/self/out: " in line


@pytest.mark.slow
def test_a_file_that_cannot_grow_leaves_nothing(tmp_path: Path) -> None:
    """The system's own limit, in a process of its own: it ends a write in the middle, as a full disk does."""
    hf_model(tmp_path / "hf")
    words = f"--from hf --to native --input {tmp_path}/hf --output {tmp_path}/out"
    command = f"ulimit -f 100; exec {sys.executable} -m tools.convert_checkpoint {words}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert f"--output {tmp_path}/out: cannot be written" in line
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_killed_conversion_leaves_no_result_and_the_next_one_starts_clean(tmp_path: Path) -> None:
    hf_model(tmp_path / "hf")
    names = ("--from", "hf", "--to", "native", "--input", tmp_path / "hf", "--output", tmp_path / "out")
    process = subprocess.Popen([sys.executable, "-m", "tools.convert_checkpoint", *names], stderr=subprocess.DEVNULL)
    partial = tmp_path / ".out.tmp"
    while not partial.exists():  # what is killed is at the latest the check, which takes seconds to begin
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.tmp", "hf"]
    (partial / "stale.distcp").write_text("of the killed run")
    assert convert(*names) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out"]
    assert not list((tmp_path / "out").rglob("stale*"))
