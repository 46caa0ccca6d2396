"""Folders that hold more than one model's files: what is read is what transformers reads, or nothing is."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ext.errors import RequestError
from tests.tools.test_convert_checkpoint import convert, hf_model
from tools.conversion.formats.hf_folder import open_tensors

transformers = pytest.importorskip("transformers")

NAME = "model.norm.weight"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model in a file, `one`, and in shards, `many`; the norm of `many` is other than that of `one`."""
    folder = tmp_path_factory.mktemp("made")
    model = hf_model(folder / "one")
    with torch.no_grad():
        model.model.norm.weight.fill_(2.0)
    model.save_pretrained(folder / "many", max_shard_size="40KB")
    return folder


@pytest.fixture
def many(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "many", tmp_path / "many"))


def edit(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    content = json.loads((folder / INDEX).read_text())
    change(content["weight_map"])
    (folder / INDEX).write_text(json.dumps(content))


REFUSED: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "single file": (
        lambda many, one: shutil.copy(one / "model.safetensors", many),
        f"model.safetensors lies beside {INDEX}, which does not mean it; transformers would read it alone",
    ),
    "an adapter": (
        lambda many, _: (many / "adapter_config.json").write_text("{}"),
        "with adapter_config.json there transformers reads an adapter on top of the weights: move it away",
    ),
    "distributed": (
        lambda many, one: shutil.copy(one / "model.safetensors", many / "shard-00000-model-00001-of-00001.safetensors"),
        "there transformers reads a distributed checkpoint instead: move it away",
    ),
    "another folder's shard": (
        lambda many, one: edit(many, lambda places: places.update({NAME: str(one / "model.safetensors")})),
        "which is not in this folder",
    ),
    "a shard above": (
        lambda many, _: edit(many, lambda places: places.update({NAME: "../one/model.safetensors"})),
        f"{INDEX} names '../one/model.safetensors', which is not in this folder",
    ),
    "twice": (
        lambda many, _: save_file({NAME: torch.ones(32)}, _spare(many), {"format": "pt"}),
        f"{NAME} is both in ",
    ),
    "other bins": (
        lambda many, _: _as_bins(many),
        "pytorch_model.bin lies beside pytorch_model.bin.index.json, which does not mean it",
    ),
}


def _spare(folder: Path) -> Path:
    edit(folder, lambda places: places.update({NAME: "model-spare.safetensors"}))
    return folder / "model-spare.safetensors"


def _as_bins(folder: Path) -> None:
    """The same as torch files, and one of them under the name of a whole model too."""
    for file in folder.glob("*.safetensors"):
        torch.save(load_file(file), file.with_suffix(".bin"))
        shutil.copy(file.with_suffix(".bin"), folder / "pytorch_model.bin")
        file.unlink()
    edit(
        folder, lambda places: places.update({key: file.replace("safetensors", "bin") for key, file in places.items()})
    )
    (folder / INDEX).rename(folder / "pytorch_model.bin.index.json")


@pytest.mark.parametrize("kind", REFUSED)
def test_ambiguous_folders_are_refused(
    made: Path, many: Path, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, reason = REFUSED[kind]
    spoil(many, made / "one")
    assert convert("--from", "hf", "--to", "native", "--input", many, "--output", tmp_path / "out") == 2
    assert f"error: --input {many}: " in (errors := capsys.readouterr().err)
    assert reason in errors
    assert errors.count("\n") == 1
    assert not (tmp_path / "out").exists()


READ: dict[str, Callable[[Path, Path], object]] = {
    "nothing more": lambda many, _: None,
    "bin beside": lambda many, one: torch.save(load_file(one / "model.safetensors"), many / "pytorch_model.bin"),
    "a variant": lambda many, one: shutil.copy(one / "model.safetensors", many / "model.fp16.safetensors"),
    "Mistral's own": lambda many, one: shutil.copy(one / "model.safetensors", many / "consolidated.safetensors"),
    "not in the index": lambda many, one: shutil.copy(
        one / "model.safetensors", many / "model-00009-of-00009.safetensors"
    ),
    "an index of one": lambda many, one: (
        shutil.copy(one / "model.safetensors", many),
        edit(many, lambda places: places.update(dict.fromkeys(places, "model.safetensors"))),
    ),
}


@pytest.mark.parametrize("kind", READ)
def test_what_is_read_is_what_transformers_reads(made: Path, many: Path, kind: str) -> None:
    READ[kind](many, made / "one")
    theirs = transformers.LlamaForCausalLM.from_pretrained(many).state_dict()[NAME]
    assert torch.equal(open_tensors(many).read_rows(NAME, 0, 32), theirs)
    assert float(theirs[0]) == (1.0 if kind == "an index of one" else 2.0)


def test_only_a_variant_is_no_model(made: Path, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    shutil.copy(made / "one" / "model.safetensors", tmp_path / "hf" / "model.fp16.safetensors")
    with pytest.raises(RequestError, match=r"model.safetensors is missing"):
        open_tensors(tmp_path / "hf")
