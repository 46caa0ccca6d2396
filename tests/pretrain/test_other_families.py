"""A model of another family through a run: in from Hugging Face, trained in 3D, and out again."""

import json
from pathlib import Path

import pytest

from megatron_ext.checkpoint import find_checkpoint, read_manifest
from megatron_ext.errors import RequestError
from pretrain.flags import parse, to_yaml
from tests.distributed import Pool
from tests.families import save_model, transformers
from tests.pretrain.support import metrics, train
from tests.pretrain.test_data import VOCAB, write_corpus
from tests.slow import sweep
from tests.tools.test_convert_families import to_hf, to_native

RUN = [
    "--use-checkpoint-args",
    "--finetune",
    "--seq-length",
    "16",
    "--micro-batch-size",
    "1",
    "--global-batch-size",
    "4",
    "--lr",
    "1e-3",
    "--lr-warmup-iters",
    "0",
    "--train-iters",
    "4",
]
LAYOUT = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]


@pytest.mark.parametrize("name", sweep(("bloom", "glm", "falcon 40b"), set()))
def test_in_trained_and_out(name: str, pool: Pool, tmp_path: Path) -> None:
    write_corpus(tmp_path / "c")
    before = save_model(name, tmp_path / "hf", vocab_size=VOCAB)
    assert to_native(tmp_path / "hf", tmp_path / "native") == 0
    words = [*RUN, "--load", str(tmp_path / "native"), "--data-path", str(tmp_path / "c")]
    alone, together = tmp_path / "alone.jsonl", tmp_path / "together.jsonl"
    pool.run(train, 1, [*words, "--metrics", str(alone)])
    pool.run(train, 4, [*words, *LAYOUT, "--metrics", str(together), "--save", str(tmp_path / "run")])
    for expected, found in zip(metrics(alone), metrics(together), strict=True):
        assert found["lm_loss"] == pytest.approx(expected["lm_loss"], rel=1e-5)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    assert to_hf(tmp_path / "run", tmp_path / "back") == 0
    for file in ("config.json", "generation_config.json"):
        if (tmp_path / "hf" / file).is_file():
            assert json.loads((tmp_path / "back" / file).read_text()) == json.loads(
                (tmp_path / "hf" / file).read_text()
            )
    after = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    changed = [not a.equal(b) for a, b in zip(before.parameters(), after.parameters(), strict=True)]
    assert all(changed)


def test_the_shape_of_the_checkpoint(tmp_path: Path) -> None:
    save_model("qwen3", tmp_path / "hf")
    assert to_native(tmp_path / "hf", tmp_path / "native") == 0
    words = ["--load", str(tmp_path / "native"), "--use-checkpoint-args"]
    config = parse(words)
    assert config.engine.model.qk_layernorm
    assert config.engine.model.vocab_size == 97
    assert (
        read_manifest(find_checkpoint(tmp_path / "native")).model["kv_channels"]
        == config.engine.model.kv_channels
        == 16
    )
    assert parse([*words, "--rotary-base", "5e5"]).engine.model.rotary_base == 5e5
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    assert parse(["--config", str(tmp_path / "run.yaml")]) == config  # needs the checkpoint no more
    for wrong, message in (
        (["--use-checkpoint-args"], "--use-checkpoint-args needs --load"),
        ([*words, "--model", "tiny"], "--use-checkpoint-args contradicts --model tiny"),
        (["--use-checkpoint-args", "--load", str(tmp_path / "no")], "no such directory"),
    ):
        with pytest.raises(RequestError, match=message):
            parse(wrong)
