"""Where a run begins: the checkpoint's model in every field, its place in the data, and folders that are its own."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.checkpoint import Manifest, check_compatible, read_manifest
from megatron_ext.checkpoint.directory import partial_path, publish
from megatron_ext.errors import RequestError
from megatron_ext.models import ModelConfig, preset
from pretrain.checkpoints import go_back
from pretrain.config import RunConfig
from pretrain.data import DataConfig
from pretrain.data.resume import describe_order, resume_position
from pretrain.flags import parse, to_yaml
from tests.pretrain.support import MODEL, command
from tests.pretrain.test_data import build, write_corpus

UNUSUAL: dict[str, Any] = {
    "rotary_base": 5e5,
    "rope_scaling": "llama3",
    "rope_scaling_factor": 32.0,
    "rope_original_max_position": 64,
    "norm_epsilon": 1e-6,
    "max_position_embeddings": 4096,
    "window_size": 9,
    "activation": "gelu",
    "add_qkv_bias": True,
    "untie_embeddings_and_output_weights": False,
    "parallel_residual": "two-norms",
}


def write(root: Path, iteration: int, model: ModelConfig, **more: Any) -> Path:
    """A checkpoint without weights."""
    partial = partial_path(root, iteration)
    partial.mkdir(parents=True)
    (partial / "data").write_text("weights")
    return publish(root, Manifest(iteration, 8, 128, dataclasses.asdict(model), {}, False, **more))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "base", 0, ModelConfig(**MODEL | UNUSUAL))
    return tmp_path


def check(config: RunConfig) -> None:
    config.checkpoint.validate()
    start = config.checkpoint.start()
    assert start.checkpoint is not None
    overridden = config.checkpoint.overridden
    check_compatible(
        read_manifest(start.checkpoint), config.engine.model, start.checkpoint, None, overridden, start.flag
    )


NOT_GIVEN = dict.fromkeys(MODEL)


@pytest.mark.parametrize("flags", [{}, NOT_GIVEN, {"finetune": True}, {"load": None, "pretrained_checkpoint": "base"}])
def test_what_is_not_given_is_the_checkpoints(here: Path, flags: dict[str, Any]) -> None:
    config = parse(command(**{"load": "base"} | flags))
    check(config)
    expected = MODEL if "num_layers" not in flags else MODEL | {"init_method_std": 0.1}
    assert config.engine.model == ModelConfig(**expected | UNUSUAL)
    (here / "run.yaml").write_text(to_yaml(config))
    check(parse(["--config", "run.yaml"]))


@pytest.mark.parametrize("name", UNUSUAL)
def test_what_is_given_must_be_the_checkpoints_or_named(here: Path, name: str) -> None:
    other = {field.name: field.default for field in dataclasses.fields(ModelConfig)}[name]
    value = {"rope_scaling": "linear", "rope_scaling_factor": 2.0, "window_size": 5, "activation": "relu"}
    given = dataclasses.replace(ModelConfig(**MODEL | UNUSUAL), **{name: value.get(name, other)})
    (here / "given.yaml").write_text(
        "\n".join(f"{k}: {v}" for k, v in dataclasses.asdict(given).items() if v is not None and k not in given.idle())
    )
    words = ["--config", "given.yaml", "--load", "base", "--finetune"]
    with pytest.raises(RequestError, match=f"^--load base/iter_0000000: its model has {name} .*the run asks for "):
        check(parse(words))
    named = parse([*words, "--override-checkpoint-args", name.replace("_", "-")])
    assert named.engine.model.resolved() == given.resolved()
    if name in ("add_qkv_bias", "untie_embeddings_and_output_weights"):  # other tensors
        with pytest.raises(RequestError, match=f"its model has {name} "):
            check(named)
    else:
        check(named)


def test_a_named_field_that_is_not_given_has_its_default(here: Path) -> None:
    config = parse(command(load="base", override_checkpoint_args=["window_size"]))
    check(config)
    assert config.engine.model.window_size is None
    assert config.engine.model.rotary_base == 5e5


@pytest.mark.parametrize("name, value", [("rope_scaling", "none"), ("position_embedding_type", "alibi")])
def test_a_change_leaves_aside_what_has_no_effect_after_it(here: Path, name: str, value: str) -> None:
    words = [*command(load="base", finetune=True), f"--{name.replace('_', '-')}", value]
    with pytest.raises(RequestError, match=f"its model has {name} .*, the run asks for {value}"):
        check(parse(words))
    config = parse([*words, "--override-checkpoint-args", name])
    check(config)
    assert (config.engine.model.rope_scaling_factor, config.engine.model.rope_original_max_position) == (1.0, 8192)
    assert parse(["--model", "llama3.1-8b", "--rope-scaling", "none"]).engine.model.rope_scaling_factor == 1.0
    with pytest.raises(RequestError, match="--rope-scaling-factor 32"):
        parse([*words, "--rope-scaling-factor", "32.0", "--override-checkpoint-args", name]).engine.model.validate()


@pytest.mark.parametrize(
    "stored, asked, fields",
    [
        ("llama2-7b", "llama-7b", ("norm_epsilon 1e-05, the run asks for 1e-06", "max_position_embeddings 4096")),
        ("llama3.1-8b", "llama3-8b", ("rope_scaling llama3, the run asks for none", "max_position_embeddings 131072")),
        ("llama3-8b", "llama3.1-8b", ("rope_scaling none, the run asks for llama3", "rope_scaling_factor 1.0")),
    ],
)
def test_presets_do_not_stand_in_for_each_other(here: Path, stored: str, asked: str, fields: tuple[str, ...]) -> None:
    write(here / "preset", 0, preset(stored))
    check(parse(["--model", stored, "--load", "preset"]))
    with pytest.raises(RequestError) as error:
        check(parse(["--model", asked, "--load", "preset", "--finetune"]))
    assert all(field in str(error.value) for field in fields)
    assert "--override-checkpoint-args " in str(error.value)


def test_what_has_no_effect_does_not_count(here: Path) -> None:
    write(here / "plain", 0, dataclasses.replace(ModelConfig(**MODEL), rope_original_max_position=64))
    lines = [f"{name}: {value}" for name, value in MODEL.items()]
    (here / "given.yaml").write_text("\n".join([*lines, "rope_original_max_position: 8192"]))
    check(parse(["--config", "given.yaml", "--load", "plain"]))


def test_a_command_that_can_be_started_again(here: Path) -> None:
    words = command(save="run", load="run", pretrained_checkpoint="base")
    first = parse(words).checkpoint
    first.validate()
    assert (first.start().checkpoint, first.start().weights_only) == (Path("base/iter_0000000"), True)
    write(here / "run", 4, ModelConfig(**MODEL | UNUSUAL))
    again = parse(words).checkpoint
    again.validate()
    assert (again.start().checkpoint, again.start().weights_only) == (Path("run/iter_0000004"), False)
    os.remove("run/latest")
    assert again.start().checkpoint == Path("run/iter_0000004")
    assert "it has no 'latest'" in again.start().remarks[0]
    (here / "run.yaml").write_text(to_yaml(dataclasses.replace(parse(command(load="base", finetune=True, save="run")),
        checkpoint=parse(command(load="base", finetune=True, save="run")).checkpoint.as_begun())))  # fmt: skip
    later = parse(["--config", "run.yaml", "--load", "run"]).checkpoint
    later.validate()
    assert later.start().checkpoint == Path("run/iter_0000004")


def test_going_back_loses_nothing(here: Path) -> None:
    for iteration in (2, 4, 6):
        write(here / "run", iteration, ModelConfig(**MODEL | UNUSUAL))
    (here / "run/latest").write_text("iter_0000002\n")
    config = parse(command(save="run", load="run")).checkpoint
    config.validate()
    assert config.start().checkpoint == Path("run/iter_0000002")
    (remark,) = go_back(config)
    assert "iter_0000006 as iter_0000006.old, iter_0000004 as iter_0000004.old" in remark
    assert sorted(os.listdir("run")) == ["iter_0000002", "iter_0000004.old", "iter_0000006.old", "latest"]
    assert go_back(config) == []
    assert parse(command(save="new", load="run/iter_0000006.old")).checkpoint.start().checkpoint is not None


REFUSED: dict[str, dict[str, Any]] = {
    "--finetune with --load run where the run saves would begin it anew": {"load": "run", "finetune": True},
    "--finetune with --load new where the run saves": {"load": "new", "finetune": True, "save": "new"},
    "--save run holds checkpoints of another run: continue it with --load run, or": {},
    "--load run --pretrained-checkpoint base, or choose another": {"load": "base", "finetune": True},
    "--save run holds iter_0000004, which comes after --load run/iter_0000002: to": {"load": "run/iter_0000002"},
    "--save run/iter_0000002 is a checkpoint itself": {"load": "run/iter_0000002", "save": "run/iter_0000002"},
    "--load run/iter_0000009: no such directory": {"load": "run/iter_0000009"},
    "--finetune contradicts --pretrained-checkpoint base": {
        "load": "base",
        "finetune": True,
        "pretrained_checkpoint": "base",
    },
    "--override-checkpoint-args ('norm_epsilon',) has no effect without --load": {
        "override_checkpoint_args": ["norm_epsilon"],
        "save": "new",
    },
    "--override-checkpoint-args rotary_bas: must be a field of the model; did you mean rotary_base?": {
        "override_checkpoint_args": ["rotary-bas"]
    },
    "it has no 'latest'; iter_0000003: unreadable manifest.json": {"load": "lost", "save": "lost"},
    "--save odd: its 'latest' is a folder and cannot be written": {"load": "odd", "save": "odd"},
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_folder_with_checkpoints_is_never_begun_anew(here: Path, message: str) -> None:
    for iteration in (2, 4):
        write(here / "run", iteration, ModelConfig(**MODEL | UNUSUAL))
    (here / "lost" / "iter_0000003").mkdir(parents=True)
    write(here / "odd", 1, ModelConfig(**MODEL | UNUSUAL))
    (here / "odd/latest").unlink()
    (here / "odd/latest").mkdir()
    with pytest.raises(RequestError) as error:
        parse(command(**{"save": "run"} | REFUSED[message])).checkpoint.validate()
    assert message in str(error.value)


def test_the_place_in_the_data(tmp_path: Path) -> None:
    prefixes = (write_corpus(tmp_path / "a"), write_corpus(tmp_path / "b", 120, 1))
    here = build(DataConfig(prefixes[:1]))
    stored = Manifest(3, 24, 384, {}, {}, True, data=describe_order(here) | {"position": 24})

    def place(data: Any, manifest: Manifest = stored) -> tuple[int, str]:
        position, said = resume_position(manifest, data)
        return position, said.split(":")[0]

    assert place(here) == (24, "")
    os.rename(tmp_path / "a.bin", tmp_path / "c.bin")
    os.rename(tmp_path / "a.idx", tmp_path / "c.idx")
    moved = (str(tmp_path / "c"),)
    assert place(build(DataConfig(moved), global_batch_size=4)) == (24, "")
    assert place(build(DataConfig(moved), seq_length=32)) == (12, "--seq-length")
    assert place(build(DataConfig(moved), seq_length=7, seed=5)) == (55, "--seq-length, --seed")
    assert place(build(DataConfig(moved, split="1"))) == (24, "--split")
    assert place(build(DataConfig(prefixes[1:]))) == (0, "--data-path")
    older = dataclasses.replace(stored, data=None)
    assert place(build(DataConfig(moved)), older) == (24, "")
    assert place(build(DataConfig(moved), seq_length=8), older) == (48, "--seq-length")
    for unknown in ({"position": "x"}, {"position": -24}, {"seq_length": None}, {"corpora": "a"}):
        strange = dataclasses.replace(stored, data={**describe_order(here), "position": 24} | unknown)
        with pytest.raises(RequestError, match=f"^--load run: .* does not know \\({next(iter(unknown))} "):
            resume_position(strange, here, "--load run")
