"""Command line and YAML: what is asked for later wins, and what a run was asked for can be asked for again."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from megatron_ext.errors import RequestError
from megatron_ext.models import preset, preset_names
from pretrain.__main__ import main
from pretrain.flags import all_flags, build_parser, parse, read_yaml, resolve, to_yaml
from pretrain.megatron_flags import ADVICE
from tests.pretrain.support import MODEL, command

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def yaml(tmp_path: Path):
    def write(content: str) -> str:
        file = tmp_path / "given.yaml"
        file.write_text(content)
        return str(file)

    return write


def test_the_command_line_wins_over_yaml_and_yaml_over_the_preset(yaml) -> None:
    file = yaml("model: tinyllama-1.1b\nnum-layers: 3\nlr: 0.5\nmin_lr: 0.25")
    config = parse(["--num-layers", "2", "--config", file])
    expected = dataclasses.replace(preset("tinyllama-1.1b"), num_layers=2)
    assert config.engine.model == expected
    assert (config.engine.optimizer.lr, config.engine.optimizer.min_lr) == (0.5, 0.25)
    assert parse(["--config", file, "--model", "tiny"]).engine.model == dataclasses.replace(
        preset("tiny"), num_layers=3
    )


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_models(name: str) -> None:
    config = parse(["--model", name])
    config.engine.model.validate()
    assert config.engine.model == preset(name)


@pytest.mark.parametrize(
    "content, field, value",
    [
        ("lr: 1e-5", "lr", 1e-5),  # a string to PyYAML
        ("lr: 1", "lr", 1.0),
        ("lr: '0.5'", "lr", 0.5),
        ("train-iters: 7.0", "train_iters", 7),
        ("train_iters: '7'", "train_iters", 7),
        ("min_lr: null", "min_lr", 0.0),
        ("save: null", "save", None),
        ("sequence-parallel: true", "sequence_parallel", True),
        ("sequence_parallel: no", "sequence_parallel", False),
        ("pipeline_layers: [22, 21, 21]", "pipeline_layers", (22, 21, 21)),
        ("pipeline-layers: 22,21,21", "pipeline_layers", (22, 21, 21)),
        ("pipeline_layers: 22", "pipeline_layers", (22,)),
        ("data_path: corpus", "data_path", ("corpus",)),
        ("data-path: [0.3, a, 0.7, b]", "data_path", ("0.3", "a", "0.7", "b")),
        ("split: 969,30,1", "split", "969,30,1"),
    ],
)
def test_yaml_values(yaml, content: str, field: str, value: Any) -> None:
    config = parse(["--model", "tiny", "--config", yaml(content)])
    found = getattr(config.groups()[all_flags()[field].group], field)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("given", ["no", "false", "null", "~"])
def test_a_yaml_that_does_not_use_the_checkpoints_shape(yaml, given: str) -> None:
    assert parse(["--config", yaml(f"model: tiny\nuse-checkpoint-args: {given}")]).engine.model == preset("tiny")


def test_command_line_values(yaml) -> None:
    words = ["--model", "tiny", "--data-path", "0.3", "a", "0.7", "b", "--pipeline-layers=3,2,2", "--lr=2e-3", "--bf16"]
    config = parse(words)
    assert config.data.data_path == ("0.3", "a", "0.7", "b")
    assert config.engine.pipeline.pipeline_layers == (3, 2, 2)
    assert config.engine.optimizer.lr == 2e-3
    assert config.engine.precision.bf16
    assert parse(["--model", "tiny"]).engine.model.untie_embeddings_and_output_weights
    assert parse(["--model", "tiny", "--no-untie-embeddings-and-output-weights"]).engine.model.tied
    assert not parse([*words, "--config", yaml("fp16: true"), "--no-fp16"]).engine.precision.fp16


def test_every_flag_is_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    shown = set(re.findall(r"--[a-z0-9-]+", capsys.readouterr().out))
    assert shown >= {flag.spelled for flag in all_flags().values()} | {"--config", "--model"}
    assert all(flag.help for flag in all_flags().values())


def test_no_advice_against_a_flag_of_ours() -> None:
    known = {spelled.removeprefix("--") for spelled in build_parser()._option_string_actions}
    assert not known & set(ADVICE)
    for advice in ADVICE.values():  # and it only names flags that there are
        assert set(re.findall(r"--([a-z0-9-]+)", advice)) <= known


def test_a_name_belongs_to_one_group() -> None:
    names = [f.name for group in parse(["--model", "tiny"]).groups().values() for f in dataclasses.fields(group)]
    assert sorted(names) == sorted(all_flags())


def test_the_vocabulary_is_the_tokenizers_unless_given(tmp_path: Path) -> None:
    with (tmp_path / "t.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["some text"]),
            model_writer=file,
            vocab_size=300,
            model_type="bpe",
            byte_fallback=True,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "t.model")).vocab_size()
    tokenizer = ["--tokenizer-model", str(tmp_path / "t.model")]
    assert parse(["--model", "tiny", *tokenizer]).engine.model.vocab_size == pieces != preset("tiny").vocab_size
    assert parse([*command(vocab_size=None), *tokenizer]).engine.model.vocab_size == pieces
    assert parse(["--model", "tiny", *tokenizer, "--vocab-size", "5000"]).engine.model.vocab_size == 5000


def test_to_yaml_and_back(yaml) -> None:
    config = parse(
        command(
            data_path=["0.3", "a", "0.7", "b"],
            pipeline_layers="2,1,1",
            tensor_model_parallel_size=2,
            bf16=True,
            lr=1e-5,
            adam_eps=1e-12,
            save="save 'here'",
            split="98,2",
            wandb_project="3",
            rope_scaling="llama3",
            recompute_granularity="full",
            zero_shard_size=4,
            async_save=True,
            loss_scale=128,
        )
    )
    file = yaml(to_yaml(config))
    assert parse(["--config", file]) == config
    assert resolve(read_yaml(file)) == config
    assert set(read_yaml(file)) == set(all_flags())


def test_a_file_of_the_first_release() -> None:
    """first_release.run.yaml: what it wrote for this command."""
    words = "--model llama3.1-8b --vocab-size 1000 --data-path 0.3 a 0.7 b --pipeline-layers 2,1,1 --bf16 --lr 1e-5"
    words += " --tensor-model-parallel-size 2 --save x --train-iters 5 --seed 7 --zero-stage 2"
    asked = parse(words.split())
    assert parse(["--config", str(Path(__file__).with_name("first_release.run.yaml"))]) == asked
    assert asked.engine.seed == asked.training.seed == 7


def test_shape_by_flags() -> None:
    model = parse(command()).engine.model
    assert {name: getattr(model, name) for name in MODEL} == MODEL
    with pytest.raises(RequestError, match=r"^--ffn-hidden-size missing: give them, or --model"):
        parse(command(ffn_hidden_size=None))


@pytest.mark.parametrize("page", ["docs/flags.md", "docs/zh/flags.md"])
def test_the_documentation_knows_every_flag_and_its_default(page: str) -> None:
    rows = [line for line in (ROOT / page).read_text(encoding="utf-8").splitlines() if line.startswith("| `--")]
    documented = {row.split("`")[1].removeprefix("--").replace("-", "_"): row for row in rows}
    flags = all_flags()
    assert set(documented) >= set(flags)
    for name, flag in flags.items():
        if flag.kind in (int, float) and flag.default is not None:
            assert any(_is_number(word, flag.default) for word in documented[name].split("`")), name


def _is_number(word: str, value: float) -> bool:
    try:
        return float(word.replace(",", "")) == value
    except ValueError:
        return False
