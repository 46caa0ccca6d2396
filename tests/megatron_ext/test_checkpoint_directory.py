"""Folders of checkpoints: names, manifests, `latest`, and what is left wherever a run is killed in one."""

import dataclasses
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.checkpoint import Manifest, find_checkpoint, model_of, read_manifest
from megatron_ext.checkpoint.directory import (
    LATEST,
    MANIFEST,
    later_checkpoints,
    locate_checkpoint,
    partial_path,
    publish,
    remove_partials,
    write_text,
)
from megatron_ext.checkpoint.save import check_writable
from megatron_ext.errors import RequestError
from megatron_ext.models import ModelConfig
from megatron_ext.tensor_parallel import LoraConfig


def manifest(iteration: int) -> Manifest:
    return Manifest(iteration, 8 * iteration, 128 * iteration, {"num_layers": 4}, {"world_size": 1}, True)


def write(root: Path, iteration: int, content: str = "weights") -> Path:
    """What CheckpointWriter does but for the tensors."""
    partial = partial_path(root, iteration)
    partial.mkdir(parents=True)
    (partial / "data").write_text(content)
    return publish(root, manifest(iteration))


def edit(checkpoint: Path, **fields: object) -> None:
    file = checkpoint / MANIFEST
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_a_published_checkpoint_is_found_and_complete(tmp_path: Path) -> None:
    assert write(tmp_path, 5) == tmp_path / "iter_0000005"
    newest = write(tmp_path, 10)
    assert sorted(os.listdir(tmp_path)) == ["iter_0000005", "iter_0000010", "latest"]
    assert find_checkpoint(tmp_path) == newest
    assert find_checkpoint(tmp_path / "iter_0000005") == tmp_path / "iter_0000005"
    digest = hashlib.sha256(b"weights").hexdigest()
    assert read_manifest(newest) == dataclasses.replace(manifest(10), files={"data": 7}, sha256={"data": digest})


def test_saving_an_iteration_again_keeps_what_was_there(tmp_path: Path) -> None:
    for content in ("first", "second", "third"):
        write(tmp_path, 5, content)
    assert (find_checkpoint(tmp_path) / "data").read_text() == "third"
    assert sorted(os.listdir(tmp_path)) == ["iter_0000005", "iter_0000005.old", "iter_0000005.old.1", "latest"]
    assert [(tmp_path / f"iter_0000005.old{n}" / "data").read_text() for n in ("", ".1")] == ["first", "second"]


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda c: (c / "data").unlink(), "incomplete checkpoint, data is missing"),
        (lambda c: (c / "data").write_text("half"), "incomplete checkpoint, data has 4 bytes instead of 7"),
        (lambda c: (c / MANIFEST).write_text("{"), "unreadable manifest.json"),
        (lambda c: (c / MANIFEST).write_text("[1]"), "unreadable manifest.json"),
        (lambda c: (c / MANIFEST).write_text('{"iteration": 5}'), "unreadable manifest.json"),
        (lambda c: edit(c, files=["data"]), "unreadable manifest.json (its files is no table)"),
        (lambda c: edit(c, lora=[8]), "unreadable manifest.json (its lora is no table)"),
        (lambda c: edit(c, trainable="lora"), "unreadable manifest.json (its trainable is no table)"),
        (lambda c: edit(c, hugging_face=1), "unreadable manifest.json (its hugging_face is no table)"),
        (
            lambda c: edit(c, hugging_face={"config.json": None}),
            "unreadable manifest.json (its hugging_face.config.json is no table)",
        ),
        (
            lambda c: edit(c, consumed_samples="8"),
            "unreadable manifest.json (its consumed_samples is no whole number of at least 0)",
        ),
        (lambda c: edit(c, iteration=-4), "unreadable manifest.json (its iteration is no whole number of at least 0)"),
        (lambda c: (c / MANIFEST).unlink(), "names 'iter_0000005', which is not a complete checkpoint there"),
        (lambda c: shutil.rmtree(c), "nor a folder of checkpoints (latest): its 'latest' names 'iter_0000005', which"),
        (lambda c: edit(c, iteration=7), "its manifest.json is of iteration 7; no checkpoint there is whole"),
    ],
)
def test_damage_is_named(tmp_path: Path, spoil: Callable[[Path], object], message: str) -> None:
    spoil(write(tmp_path, 5))
    with pytest.raises(RequestError) as error:
        read_manifest(find_checkpoint(tmp_path))
    assert message in str(error.value)
    assert str(error.value).startswith(f"--load {tmp_path}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "spoil, reason",
    [
        (lambda root: (root / LATEST).unlink(), "it has no 'latest'"),
        (
            lambda root: (root / LATEST).write_text(""),
            "its 'latest' names '', which is not a complete checkpoint there",
        ),
        (lambda root: (root / LATEST).write_text("iter_1"), "its 'latest' names 'iter_1', which is not a complete"),
        (lambda root: (root / LATEST).write_text("../root/iter_0000005"), "names '../root/iter_0000005', which is not"),
        (lambda root: (root / LATEST).write_bytes(b"\xff\xfe"), "its 'latest' names no checkpoint ('utf-8' codec"),
        (lambda root: (root / LATEST).write_text("x" * 5000), "its 'latest' names no checkpoint (File name too long)"),
        (lambda root: shutil.rmtree(root / "iter_0000010"), "iter_0000010', which is not a complete checkpoint there"),
        (
            lambda root: (root / "iter_0000010" / "data").unlink(),
            "iter_0000010: incomplete checkpoint, data is missing",
        ),
        (lambda root: os.truncate(root / "iter_0000010" / MANIFEST, 9), "iter_0000010: unreadable manifest.json ("),
        (lambda root: edit(root / "iter_0000010", iteration=5), "iter_0000010: its manifest.json is of iteration 5"),
    ],
)
def test_a_wrong_latest_falls_back_to_the_newest_whole_checkpoint(
    tmp_path: Path, spoil: Callable[[Path], object], reason: str
) -> None:
    root = tmp_path / "root"
    for iteration in (5, 10):
        write(root, iteration)
    spoil(root)
    newest = "iter_0000005" if reason.startswith("iter_0000010") else "iter_0000010"
    checkpoint, remark = locate_checkpoint(root)
    assert checkpoint == root / newest
    assert remark.startswith(f"--load {root}: ")
    assert reason in remark
    assert remark.endswith(f"; {newest} is the newest whole checkpoint there")


def test_an_older_latest_is_meant(tmp_path: Path) -> None:
    for iteration in (5, 10, 20):
        write(tmp_path, iteration)
    (tmp_path / LATEST).write_text("iter_0000005")
    (tmp_path / "iter_0000020" / "data").unlink()
    assert locate_checkpoint(tmp_path) == (tmp_path / "iter_0000005", "")
    assert later_checkpoints(tmp_path, 5) == [tmp_path / "iter_0000010"]


def test_no_falling_back_behind_another_programs_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, 5)
    edit(write(tmp_path, 10), format_version=2)
    with pytest.raises(RequestError, match="iter_0000010: format version 2, this program reads 1"):
        find_checkpoint(tmp_path)


MODEL = {"num_layers": 2, "hidden_size": 8, "ffn_hidden_size": 16, "num_attention_heads": 2, "vocab_size": 9}


def test_the_model_of_a_manifest() -> None:
    described = dataclasses.replace(manifest(5), model=MODEL)
    assert model_of(described) == (ModelConfig(**MODEL), None)
    described = dataclasses.replace(described, lora={"lora_rank": 4, "lora_target_modules": ["q_proj"]})
    assert model_of(described) == (ModelConfig(**MODEL), LoraConfig(4, lora_target_modules=["q_proj"]))


@pytest.mark.parametrize(
    "model, lora, reason",
    [
        ({"experts": 8}, None, "unexpected keyword argument 'experts'"),
        ({"hidden_size": 8.5}, None, "--hidden-size 8.5: must be a whole number"),
        ({"activation": "swish"}, None, "--activation swish: must be one of swiglu, "),
        ({}, {"rank": 4}, "unexpected keyword argument 'rank'"),
        ({}, {"lora_rank": 1.5}, "--lora-rank 1.5: must be a whole number"),
        ({}, {"lora_rank": 0}, "--lora-rank 0: must be at least 1"),
        ({}, {"lora_target_modules": 3}, "--lora-target-modules 3: must be a list"),
        ({}, {"lora_target_modules": ["q_proj", 3]}, "--lora-target-modules 3: must be a text"),
    ],
)
def test_a_model_that_is_not_known(model: dict[str, Any], lora: dict[str, Any] | None, reason: str) -> None:
    described = dataclasses.replace(manifest(5), model=MODEL | model, lora=lora)
    with pytest.raises(RequestError) as error:
        model_of(described, "--load x: manifest.json")
    assert str(error.value).startswith("--load x: manifest.json describes a model that this program does not know (")
    assert str(error.value).endswith("): written by a newer version?")
    assert reason in str(error.value)


def test_scaling_by_one_of_an_older_checkpoint_is_none() -> None:
    described = dataclasses.replace(manifest(5), model=MODEL | {"rope_scaling": "linear", "rope_scaling_factor": 1.0})
    assert model_of(described) == model_of(dataclasses.replace(manifest(5), model=MODEL))


def test_a_model_that_lacks_a_size() -> None:
    with pytest.raises(RequestError, match=r"does not know .*missing 4 required"):
        model_of(manifest(5))


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("hidden_size", 8.5, "--hidden-size 8.5: must be a whole number"),
        ("hidden_size", math.nan, "--hidden-size nan: must be a whole number"),
        ("hidden_size", True, "--hidden-size True: must be a whole number"),
        ("hidden_size", "x\ny", "--hidden-size x y: must be a whole number"),
        ("hidden_size", "x" * 500, f"--hidden-size {'x' * 80}...: must be a whole number"),
        ("hidden_size", None, "--hidden-size None: must be a whole number"),
        ("hidden_size", 10**30, f"--hidden-size {10**30}: must be at most 2147483647"),
        ("num_query_groups", [2], "--num-query-groups [2]: must be a whole number"),
        ("position_embedding_offset", -(10**30), f"--position-embedding-offset -{10**30}: must be at most 2147483647"),
        ("num_layers", 10_001, "--num-layers 10001: must be at most 10000"),
        ("max_position_embeddings", 0, "--max-position-embeddings 0: must be at least 1"),
        ("rotary_base", math.inf, "--rotary-base inf: must be a number"),
        ("rotary_base", 10**400, f"--rotary-base {str(10**400)[:80]}...: must be a number"),
        ("rotary_base", 0, "--rotary-base 0: must be above 0"),
        ("norm_epsilon", True, "--norm-epsilon True: must be a number"),
        ("norm_epsilon", "1e-5", "--norm-epsilon 1e-5: must be a number"),
        ("norm_epsilon", 0.0, "--norm-epsilon 0.0: must be above 0"),
        ("rope_scaling_factor", -1.0, "--rope-scaling-factor -1.0: must be above 0"),
        ("rotary_percent", 1e308, "--rotary-percent 1e+308: must be above 0 and at most 1"),
        ("qk_layernorm", 1, "--qk-layernorm 1: must be true or false"),
        ("normalization", "BatchNorm", "--normalization BatchNorm: must be one of RMSNorm, LayerNorm"),
        ("activation", None, "--activation None: must be a text"),
    ],
)
def test_values_that_make_no_model(field: str, value: Any, message: str) -> None:
    with pytest.raises(RequestError) as error:
        ModelConfig(**MODEL | {field: value}).validate()
    assert str(error.value) == message


def test_llama3_scaling_needs_a_passage() -> None:
    model = MODEL | {"rope_scaling": "llama3", "rope_scaling_factor": 8, "rope_low_freq_factor": 4.0}
    with pytest.raises(RequestError, match=r"--rope-low-freq-factor 4.0: must be above 0 and below --rope-high-freq"):
        ModelConfig(**model).validate()


def test_another_format_version_is_refused(tmp_path: Path) -> None:
    edit(write(tmp_path, 5), format_version=2)
    with pytest.raises(RequestError, match="format version 2, this program reads 1"):
        read_manifest(find_checkpoint(tmp_path))


def test_an_older_checkpoint_has_no_digests(tmp_path: Path) -> None:
    file = write(tmp_path, 5) / MANIFEST
    fields = json.loads(file.read_text())
    del fields["sha256"], fields["hugging_face"]
    file.write_text(json.dumps(fields))
    found = read_manifest(find_checkpoint(tmp_path))
    assert found == dataclasses.replace(manifest(5), files={"data": 7})


def test_refusals_name_the_flag_of_the_program(tmp_path: Path) -> None:
    for refuse in (find_checkpoint, read_manifest):
        with pytest.raises(RequestError, match=f"^--input {tmp_path}/none: "):
            refuse(tmp_path / "none", "--input")


class Killed(BaseException):
    """The process ends here."""


@pytest.fixture
def deaths(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], Iterator[int]]:
    """`deaths(action)`: do the action over and over, dying at its first file system change, its second, ..."""
    changes = [(os, name) for name in ("replace", "fsync", "rmdir", "unlink")]

    def die_at_each(action: Callable[[], object]) -> Iterator[int]:
        for last in range(1000):
            done = 0

            def counted(original: Callable[..., Any]) -> Callable[..., Any]:
                def call(*args: Any, **kwargs: Any) -> Any:
                    nonlocal done
                    if done == last:  # noqa: B023
                        raise Killed
                    done += 1
                    return original(*args, **kwargs)

                return call

            with monkeypatch.context() as patched:
                for module, name in changes:
                    patched.setattr(module, name, counted(getattr(module, name)))
                try:
                    action()
                    return
                except Killed:
                    pass
            yield last

    return die_at_each


def fresh(root: Path, number: int) -> Path:
    return root / f"attempt{number}"


def test_killed_while_publishing_leaves_the_last_or_the_new_one(tmp_path: Path, deaths) -> None:
    attempt = 0

    def save() -> None:
        nonlocal attempt
        attempt += 1
        write(fresh(tmp_path, attempt), 10, "new")

    def prepare(number: int) -> None:
        write(fresh(tmp_path, number), 5, "old")

    prepare(1)
    found = []
    for _ in deaths(save):
        root = fresh(tmp_path, attempt)
        checkpoint = find_checkpoint(root)
        read_manifest(checkpoint)
        found.append((checkpoint / "data").read_text())
        remove_partials(root)
        if found[-1] == "old":
            write(root, 10, "new")  # the run is repeated
        assert sorted(os.listdir(root)) == ["iter_0000005", "iter_0000010", "latest"]
        prepare(attempt + 1)
    assert found == sorted(found, reverse=True)  # old until some moment, new from then on
    assert set(found) == {"old", "new"}


def test_write_text_is_all_or_nothing(tmp_path: Path, deaths) -> None:
    file = tmp_path / "file"
    file.write_text("old")
    for _ in deaths(lambda: write_text(file, "new")):
        assert file.read_text() in ("old", "new")
    assert file.read_text() == "new"
    assert os.listdir(tmp_path) == ["file"]


def test_remove_partials_touches_nothing_else(tmp_path: Path) -> None:
    write(tmp_path, 5)
    (partial_path(tmp_path, 10) / "folder").mkdir(parents=True)
    (tmp_path / "run.yaml").write_text("")
    remove_partials(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["iter_0000005", "latest", "run.yaml"]


def test_check_writable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    check_writable(tmp_path / "new" / "folder")
    assert os.listdir(tmp_path) == ["file"]
    for wrong in ("file", "file/new"):
        with pytest.raises(RequestError, match=r"^--save \S+: \S+file is not a writable directory$"):
            check_writable(tmp_path / wrong)
