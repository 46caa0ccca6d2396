"""The scripts of the Chinese-LLaMA recipe, run as a user runs them, on a tiny model."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_ext.checkpoint import find_checkpoint
from megatron_ext.checkpoint.read import WeightReader
from megatron_ext.models.expand import METHODS
from tests.pretrain.support import metrics
from tests.slow import sweep
from tests.tokenizer.samples import write_jsonl, write_sentencepiece
from tokenizer.merge.chinese_llama import MODES

transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]
EXPAND, EMBEDDINGS, PRETRAIN = "1_expand_vocabulary.sh", "2_train_embeddings.sh", "3_pretrain.sh"
BASE_VOCAB, LAYERS, LENGTH, BATCH = 420, 2, 32, 8
TINY = {
    "SEQ_LENGTH": LENGTH, "GLOBAL_BATCH_SIZE": BATCH, "MICRO_BATCH_SIZE": 1, "PRECISION": "fp32", "LR": "1e-3",
    "EXPORT_DTYPE": "float32", "GPUS_PER_NODE": 2, "TP": 2,
}  # fmt: skip
ALONE = {"GPUS_PER_NODE": 1, "TP": 1, "TRAIN_ITERS": 4}
LATER_STAGES = shutil.ignore_patterns("1-*", "2-*", "huggingface")
MATRICES = {"embed_tokens.weight", "lm_head.weight"}


def start(folder: Path, script: str, *flags: str, **variables: object) -> subprocess.Popen[str]:
    """A script, started in `folder` with these variables and those of TINY."""
    given = {name: str(value) for name, value in (TINY | variables).items()}
    environment = {"MEGATRON_ZH_PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "OUTPUT": "out"}
    return subprocess.Popen(
        ["bash", str(ROOT / "examples" / "chinese_llama" / script), *flags],
        cwd=folder, env=os.environ | environment | given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def run(folder: Path, script: str, *flags: str, **variables: object) -> str:
    """Run a script that must succeed; what it printed."""
    process = start(folder, script, *flags, **variables)
    printed, errors = process.communicate()
    assert process.returncode == 0, errors
    return printed


def weights(checkpoints: Path) -> dict[str, torch.Tensor]:
    reader = WeightReader(find_checkpoint(checkpoints))
    return reader.read(list(reader.shapes))


def exported(out: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(out / "huggingface" / "model.safetensors")
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def changed(tensors: dict[str, torch.Tensor], before: dict[str, torch.Tensor]) -> set[str]:
    assert tensors.keys() == before.keys()
    return {name for name, tensor in tensors.items() if not torch.equal(tensor, before[name])}


def assert_transformers_loads(out: Path) -> None:
    """The exported model, with as many rows as its tokenizer has pieces, continues a text."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(out / "huggingface")
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(out / "huggingface")
    assert model.config.vocab_size == model.get_output_embeddings().weight.shape[0] == len(tokenizer) > BASE_VOCAB
    ids = tokenizer("人工智能", return_tensors="pt").input_ids
    assert ids.max() >= BASE_VOCAB
    assert model(input_ids=ids, labels=ids).loss.isfinite()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a user works: a small LLaMA, texts, and a room of the user's that is called as one of ours."""
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "tools").mkdir()
    (folder / "tools" / "__init__.py").write_text("raise RuntimeError('this is not the tools that were meant')\n")
    english, chinese = ((ROOT / name).read_text("utf-8").splitlines() for name in ("README.md", "README_zh.md"))
    (folder / "zh.txt").write_text("\n".join(chinese), "utf-8")
    write_jsonl(folder / "corpus.jsonl", ["".join(chinese[3 * i : 3 * i + 3]) for i in range(12)])
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=BASE_VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "llama")
    write_sentencepiece(folder / "llama" / "tokenizer.model", english, BASE_VOCAB, hard_vocab_limit=True)
    run(folder, EXPAND, BASE_MODEL="llama", CHINESE_TEXT="zh.txt", VOCAB_SIZE=800, TEXT="zh.*", CORPUS="corpus.jsonl")
    shutil.copytree(folder / "out", folder / "expanded")
    return folder


def test_expanding_keeps_the_model_and_says_what_it_did(folder: Path) -> None:
    out = folder / "out"
    before = load_file(folder / "llama" / "model.safetensors")
    grown = weights(out / "0-expanded")
    for name, tensor in grown.items():
        old = before[name if name == "lm_head.weight" else f"model.{name}"]
        assert torch.equal(tensor[: len(old)], old), name
        assert (len(tensor) > len(old)) == (name in MATRICES), name
    assert json.loads((out / "audit.json").read_text())
    assert "zh.txt" in (out / "compare.md").read_text()
    assert json.loads((out / "corpus.json").read_text())["append_eod"] is True


def test_a_failure_on_the_way_leaves_nothing(folder: Path) -> None:
    process = start(folder, EXPAND, OUTPUT="failed", BASE_MODEL="llama", CHINESE_MODEL="llama/tokenizer.model")
    _, errors = process.communicate()
    assert process.returncode == 2
    assert "error: --extra" in errors
    assert not (folder / "failed").exists()


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [1, 2])
def test_both_stages(folder: Path, nodes: int) -> None:
    """A pass over the corpus each: with one rank, or with two tensor-parallel ones and as a pipeline of two nodes."""
    out = folder / f"on-{nodes}"
    shutil.copytree(folder / "expanded", out, ignore=LATER_STAGES)
    run(folder, EMBEDDINGS, OUTPUT=out, GPUS_PER_NODE=nodes, TP=nodes)
    tokens = json.loads((out / "corpus.json").read_text())["tokens"]
    steps = int(tokens * 0.969 / (LENGTH * BATCH)) + 1
    assert [record["iteration"] for record in metrics(out / "1-embeddings.jsonl")] == [*range(1, steps + 1)]
    expanded, first = weights(out / "0-expanded"), weights(out / "1-embeddings")
    assert changed(first, expanded) == MATRICES

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    several = {"NNODES": nodes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if nodes > 1 else {}
    layout = several | {"GPUS_PER_NODE": 1, "TP": 1, "PP": nodes, "OUTPUT": out}
    processes = [start(folder, PRETRAIN, **layout, NODE_RANK=rank) for rank in range(nodes)]
    outcomes = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0] * nodes, outcomes
    linears = {name.removesuffix(".lora.a") for name in weights(out / "2-pretrain") if name.endswith(".lora.a")}
    assert len(linears) == 7 * LAYERS
    assert changed(exported(out), first) == MATRICES | {f"{name}.weight" for name in linears}
    assert_transformers_loads(out)


@pytest.mark.slow
def test_new_rows_alone_and_the_whole_model_without_a_first_stage(folder: Path) -> None:
    out = folder / "expanded"
    expanded = weights(out / "0-expanded")
    run(folder, EMBEDDINGS, **ALONE, OUTPUT=out, TRAIN_ONLY="new-rows")
    first = weights(out / "1-embeddings")
    assert changed(first, expanded) == MATRICES
    for name in MATRICES:
        assert torch.equal(first[name][:BASE_VOCAB], expanded[name][:BASE_VOCAB])

    run(folder, PRETRAIN, **ALONE, OUTPUT=out, LOAD=out / "0-expanded", TRAIN_ONLY="")
    assert changed(exported(out), expanded) == set(expanded)
    assert_transformers_loads(out)


@pytest.mark.parametrize("script", sweep((EMBEDDINGS, PRETRAIN), {PRETRAIN}))
def test_a_dry_run_is_one_process_and_leaves_nothing(folder: Path, script: str) -> None:
    out = folder / f"rehearsed-{script}"
    shutil.copytree(folder / "expanded", out, ignore=LATER_STAGES)
    before = sorted(folder.rglob("*"))
    printed = run(folder, script, "--dry-run", NNODES=2, OUTPUT=out, LOAD=out / "0-expanded")
    assert printed.startswith("dry run of 4 ranks")
    assert "PP 1 x DP 2 x TP 2" in printed
    assert "data: not given" not in printed
    assert sorted(folder.rglob("*")) == before


@pytest.mark.slow
def test_a_stage_goes_on_where_it_was(folder: Path) -> None:
    shutil.copytree(folder / "expanded", folder / "stopped", ignore=LATER_STAGES)
    assert "stopping at iteration 2" in run(folder, EMBEDDINGS, "--exit-interval", "2", **ALONE, OUTPUT="stopped")
    assert "continuing from iteration 2" in run(folder, EMBEDDINGS, **ALONE, OUTPUT="stopped")
    assert [record["iteration"] for record in metrics(folder / "stopped" / "1-embeddings.jsonl")] == [1, 2, 3, 4]


BASE = {"BASE_MODEL": "llama", "CHINESE_TEXT": "zh.txt", "OUTPUT": "new"}
FILES = {"corpus.json": '{\n  "tokens": 5000\n}\n', "model.yaml": ""}


@pytest.mark.parametrize(
    "script, variables, message",
    [
        (EXPAND, {}, "BASE_MODEL is not set: give a folder with a Hugging Face LLaMA"),
        (EXPAND, {"BASE_MODEL": "absent"}, "BASE_MODEL absent: no such file or folder"),
        (EXPAND, BASE | {"CHINESE_TEXT": ""}, "CHINESE_MODEL is not set: give it, or CHINESE_TEXT to train one"),
        (EXPAND, BASE | {"CHINESE_MODEL": "zh.txt"}, "CHINESE_MODEL and CHINESE_TEXT exclude each other"),
        (EXPAND, BASE | {"CORPUS": "zh.txt absent.txt"}, "CORPUS absent.txt: no such file or folder"),
        (EXPAND, BASE | {"VOCAB_SIZE": "20k"}, "VOCAB_SIZE 20k: must be a whole number above 0"),
        (EXPAND, BASE | {"OUTPUT": "llama"}, "OUTPUT llama exists already: remove it or choose another folder"),
        (EXPAND, BASE | {"OUTPUT": "absent/new"}, "OUTPUT absent/new: absent is not a folder"),
        (EXPAND, BASE | {"MODE": "dirty"}, f"MODE dirty: must be one of {' '.join(MODES)}"),
        (EXPAND, BASE | {"EMBEDDING_INIT": "zero"}, f"EMBEDDING_INIT zero: must be one of {' '.join(METHODS)}"),
        (EMBEDDINGS, {"OUTPUT": "absent"}, "OUTPUT absent: has no model.yaml; run 1_expand_vocabulary.sh first"),
        (EMBEDDINGS, {"OUTPUT": "bare"}, "DATA_PATH is not set, and there is no bare/corpus: give encoded corpora"),
        (EMBEDDINGS, {"OUTPUT": "bare", "DATA_PATH": "zh"}, "TRAIN_ITERS is not set: give the number of steps"),
        (EMBEDDINGS, {"TRAIN_ONLY": "lora"}, "TRAIN_ONLY lora: must be one of embeddings new-rows"),
        (EMBEDDINGS, {"TP": "0"}, "TP 0: must be a whole number above 0"),
        (EMBEDDINGS, {"PRECISION": "fp8"}, "PRECISION fp8: must be one of bf16 fp16 fp32"),
        (EMBEDDINGS, {"NNODES": 2}, "NODE_RANK is not set: give the number of this node, from 0"),
        (EMBEDDINGS, {"NNODES": 2, "NODE_RANK": 1}, "MASTER_ADDR is not set: give the address of node 0"),
        (PRETRAIN, {}, "LOAD out/1-embeddings: no such folder; run 2_train_embeddings.sh, or give LOAD=out/0-expanded"),
        (
            PRETRAIN,
            {"LOAD": "out", "EXPORT_DTYPE": "int8"},
            "EXPORT_DTYPE int8: must be one of bfloat16 float16 float32",
        ),
        (PRETRAIN, {"LOAD": "done", "OUTPUT": "done"}, "OUTPUT done: has an exported model already; remove done/hugg"),
    ],
)
def test_a_wrong_request_is_one_line_and_writes_nothing(
    tmp_path: Path, script: str, variables: dict[str, object], message: str
) -> None:
    for name in ("llama", "out", "bare", "done/huggingface"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "zh.txt").write_text("中文\n" * 9, "utf-8")
    (tmp_path / "bare" / "model.yaml").touch()
    for place in ("out", "done"):
        for name, content in FILES.items():
            (tmp_path / place / name).write_text(content)
    before = sorted(tmp_path.rglob("*"))
    process = start(tmp_path, script, **variables)
    _, errors = process.communicate()
    assert process.returncode == 2
    assert errors.startswith(f"error: {message}")
    assert errors.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
