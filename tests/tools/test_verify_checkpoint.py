"""A whole checkpoint is called whole, and whatever is done to one is found, all of it at once."""

import dataclasses
import hashlib
import json
import math
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_ext.checkpoint import CheckpointWriter, Manifest, find_checkpoint
from megatron_ext.checkpoint.directory import LATEST, MANIFEST
from megatron_ext.checkpoint.load import mesh_sizes
from megatron_ext.checkpoint.metadata import read_metadata
from megatron_ext.checkpoint.read import StoredPiece
from megatron_ext.engine import Engine, EngineConfig
from megatron_ext.mesh import build_grid
from megatron_ext.models import preset, preset_names
from tests.distributed import Pool
from tests.megatron_ext.training import tiny
from tests.tools.test_convert_checkpoint import convert, hf_model
from tools import verify_checkpoint
from tools.command import run
from tools.verify_checkpoint import preset_of

RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp": (4, {"tensor_model_parallel_size": 2, "zero_stage": 3, "vocab_size": 97, "num_layers": 3}),
    "pp": (2, {"pipeline_model_parallel_size": 2, "untie_embeddings_and_output_weights": False}),
    "lora": (2, {"train_only": "lora"}),
    "rows": (2, {"train_only": "new-rows", "base_vocab_size": 90, "zero_stage": 2}),
}
WEIGHTS = "__0_0.distcp"


def save(config: EngineConfig, root: Path) -> None:
    engine = Engine(config, build_grid(config.parallel, torch.device("cpu")))
    writer = CheckpointWriter(root, engine)
    for iteration in (1, 2):
        manifest = Manifest(
            iteration,
            8 * iteration,
            128 * iteration,
            dataclasses.asdict(config.model),
            mesh_sizes(engine.grid),
            has_optimizer=True,
            trainable=dataclasses.asdict(config.trainable),
            lora=None if config.adapters is None else dataclasses.asdict(config.adapters),
        )
        writer.save(manifest, {"run.yaml": "seed: 1\n"})


@pytest.fixture(scope="module")
def saved(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of checkpoints for each of RUNS."""
    root = tmp_path_factory.mktemp("saved")
    for name, (ranks, options) in RUNS.items():
        pool.run(save, ranks, tiny(**options), root / name)
    return root


@pytest.fixture
def checkpoint(saved: Path, tmp_path: Path) -> Path:
    """One to be spoiled."""
    return Path(shutil.copytree(saved / "tp" / "iter_0000002", tmp_path / "iter_0000002"))


def verify(*arguments: object) -> int:
    return run(verify_checkpoint.build_parser(), verify_checkpoint.work, [str(word) for word in arguments])


def verified(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any]]:
    code = verify(*arguments, "--json")
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", RUNS)
def test_what_a_run_saved_is_whole(saved: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, report = verified(capsys, saved / name)
    assert (code, report["whole"], report["problems"], report["notes"]) == (0, True, [], [])
    assert (report["iteration"], report["consumed_samples"], report["consumed_tokens"]) == (2, 16, 256)
    assert report["path"] == str(saved / name / "iter_0000002")
    assert report["dtypes"] == ["float32"]
    assert report["digests_compared"]
    files = {path.name: path.read_bytes() for path in (saved / name / "iter_0000002").iterdir()}
    del files[MANIFEST]
    assert report["bytes"] == sum(map(len, files.values()))
    assert report["files"] == {
        file: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()} for file, content in files.items()
    }
    assert (report["lora"] is not None) == (report["adapter_parameters"] > 0) == (name == "lora")


def test_it_says_what_it_is(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(saved / "rows") == 0
    out, progress = capsys.readouterr()
    for words in (
        "iteration 2, 16 samples, 256 tokens consumed",
        "4 layers, hidden 32, 4 heads (4 of keys and values), ffn 48, vocabulary 96",
        "41,248",
        "train_only new-rows, base_vocab_size 90",
        "world_size 2, pp 1, dp_replicate 1, dp_shard 2, tp 1",
        "whole: all 4 files have their full size, digests equal, every tensor is there",
    ):
        assert words in out
    assert "100%" in progress


def flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


def edit(checkpoint: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    change(manifest)
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))


DIFFERS = f"{WEIGHTS} differs from its digest"


@pytest.mark.parametrize(
    "spoil, problem",
    [
        (lambda c: flip(c / WEIGHTS, -1), DIFFERS),
        (lambda c: flip(c / WEIGHTS, 0), DIFFERS),
        (lambda c: flip(c / ".metadata", 5000), ".metadata differs from its digest"),
        (lambda c: os.truncate(c / WEIGHTS, 100), f"{WEIGHTS} has 100 bytes instead of "),
        (lambda c: (c / WEIGHTS).unlink(), f"{WEIGHTS} is missing"),
        (lambda c: (c / ".metadata").unlink(), ".metadata is missing"),
        (lambda c: (c / "run.yaml").write_text("seed: 1\nlr: 1\n"), "run.yaml has 14 bytes instead of 8"),
        (lambda c: (c / MANIFEST).write_text("{"), "unreadable manifest.json (Expecting"),
        (lambda c: edit(c, lambda m: m.update(format_version=2)), "format version 2, this program reads 1"),
        (lambda c: edit(c, lambda m: m["sha256"].update({WEIGHTS: "0" * 64})), DIFFERS),
        (lambda c: edit(c, lambda m: m["sha256"].pop(WEIGHTS)), f"{WEIGHTS} has only one of size and digest in"),
        (lambda c: edit(c, lambda m: m["model"].update(heads=1)), "manifest.json describes a model that this program"),
        (lambda c: edit(c, lambda m: m["model"].update(num_layers=0)), "--num-layers 0: must be at least 1"),
        (lambda c: edit(c, lambda m: m.update(files={}, sha256={})), ".metadata is not in the list of manifest.json"),
        (
            lambda c: edit(c, lambda m: m["model"].update(num_layers=4)),
            "weight and 26 more",  # nine weights to a layer, each with two moments
        ),
        (
            lambda c: edit(c, lambda m: m["model"].update(num_layers=2)),
            "weight and 26 more, which the model does not",
        ),
        (
            lambda c: edit(c, lambda m: m["layout"].update(world_size=5)),
            ".metadata lacks random.4",
        ),
        (
            lambda c: edit(c, lambda m: m["trainable"].update(train="all")),
            "manifest.json describes a run that this program does not know",
        ),
        (
            lambda c: edit(c, lambda m: m["trainable"].update(train_only="embeddings")),
            "which the model does not",
        ),
    ],
)
def test_damage_is_found(
    checkpoint: Path, spoil: Callable[[Path], object], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(checkpoint)
    code, report = verified(capsys, checkpoint)
    assert (code, report["whole"]) == (1, False)
    assert len(report["problems"]) == 1
    assert problem in report["problems"][0]


def test_another_shape_is_a_line_for_every_tensor(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(checkpoint, lambda manifest: manifest["model"].update(vocab_size=100))
    problems = verified(capsys, checkpoint)[1]["problems"]
    names = ("embed_tokens.weight", "lm_head.weight")
    keys = [f"{kind}.{name}" for kind in ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq") for name in names]
    assert sorted(problems) == sorted(f".metadata {key} is (97, 32), the model asks for (100, 32)" for key in keys)


def test_a_file_that_the_manifest_does_not_know(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkpoint / "notes.txt").write_text("mine")  # harms nothing
    assert verify(checkpoint) == 0
    edit(checkpoint, lambda manifest: (manifest["files"].pop(WEIGHTS), manifest["sha256"].pop(WEIGHTS)))
    capsys.readouterr()
    problems = verified(capsys, checkpoint)[1]["problems"]
    assert problems
    assert all(problem.endswith("is not stored whole in the files of manifest.json") for problem in problems)


def test_all_damage_at_once_is_named(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(checkpoint / WEIGHTS, -1)
    os.truncate(checkpoint / "__1_0.distcp", 1)
    (checkpoint / "__2_0.distcp").unlink()
    size = json.loads((checkpoint / MANIFEST).read_text())["files"]["__1_0.distcp"]
    assert verify(checkpoint) == 1
    assert capsys.readouterr().out.splitlines()[-4:] == [
        "  NOT WHOLE: 3 problems",
        f"    __1_0.distcp has 1 bytes instead of {size}",
        "    __2_0.distcp is missing",
        f"    {DIFFERS}",
    ]


def test_what_is_not_compared_is_said(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(checkpoint / WEIGHTS, -1)
    assert verify(checkpoint, "--no-checksums") == 0
    assert "whole: all 6 files have their full size, digests not compared" in capsys.readouterr().out
    edit(checkpoint, lambda manifest: manifest.pop("sha256"))  # as an older version wrote it
    assert verify(checkpoint) == 0
    out = capsys.readouterr().out
    assert "no digests to compare" in out
    assert "its manifest has no digests (an older version wrote it)" in out
    os.truncate(checkpoint / WEIGHTS, 100)
    assert verify(checkpoint) == 1


def test_metadata_that_is_another_pickle(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(checkpoint, lambda manifest: manifest.pop("sha256"))
    (checkpoint / ".metadata").write_bytes(pickle.dumps(["another"]))
    size = (checkpoint / ".metadata").stat().st_size
    edit(checkpoint, lambda manifest: manifest["files"].update({".metadata": size}))
    code, report = verified(capsys, checkpoint)
    assert code == 1
    assert report["problems"] == [".metadata cannot be read (list where Metadata is expected)"]


def put(checkpoint: Path, key: str, *values: float) -> None:
    """Write the first values of a stored tensor anew."""
    metadata = read_metadata(checkpoint)
    index = MetadataIndex(key, metadata.state_dict_metadata[key].chunks[0].offsets)
    info = metadata.storage_data[index]
    start = StoredPiece(checkpoint / info.relative_path, info.offset, info.length, key)._values
    with (checkpoint / info.relative_path).open("r+b") as file:
        file.seek(start)
        file.write(struct.pack(f"<{len(values)}f", *values))
    edit(checkpoint, lambda manifest: manifest.update(sha256={}))


def test_values_that_are_not_finite(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(checkpoint, "model.layers.1.mlp.up_proj.weight", math.nan, 1.0, -math.inf)
    put(checkpoint, "optimizer.exp_avg_sq.norm.weight", math.inf)
    code, report = verified(capsys, checkpoint)
    words = "values that are not finite (NaN or infinite)"
    assert (code, report["problems"]) == (
        1,
        [
            f"model.layers.1.mlp.up_proj.weight has 2 of 1,536 {words}",
            f"optimizer.exp_avg_sq.norm.weight has 1 of 32 {words}",
        ],
    )
    assert verify(checkpoint, "--no-checksums") == 0
    assert "every tensor is there, values not looked at" in capsys.readouterr().out


def test_the_latest_all_and_what_lies_beside(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = Path(shutil.copytree(saved / "tp", tmp_path / "tp"))
    (root / ".iter_0000003.tmp").mkdir()
    flip(root / "iter_0000001" / WEIGHTS, -1)
    code, report = verified(capsys, root)
    assert code == 0
    assert [note.split()[0] for note in report["notes"]] == [".iter_0000003.tmp"]
    assert verify(root, "--all", "--json") == 1
    reports = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(Path(each["path"]).name, each["whole"]) for each in reports] == [
        ("iter_0000001", False),
        ("iter_0000002", True),
    ]
    (root / LATEST).write_text("iter_0000009\n")
    code, report = verified(capsys, root)
    assert code == 1
    assert "its 'latest' names 'iter_0000009', which is not a complete checkpoint" in report["problems"][0]


def test_a_wrong_request_is_one_line(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    for arguments, message in (
        ((tmp_path / "none",), f"DIR {tmp_path}/none: no such directory"),
        ((tmp_path,), f"DIR {tmp_path}: not a checkpoint (manifest.json), a folder of checkpoints (latest) or a "),
        ((tmp_path, "--all"), f"--all: no checkpoints (iter_*) in DIR {tmp_path}"),
        ((saved / "tp" / "iter_0000001", "--all"), "is a checkpoint itself; give the folder that it is in"),
        ((tmp_path / "bert",), f"DIR {tmp_path}/bert: config.json: model_type 'bert' is not supported"),
        ((), "the following arguments are required: DIR"),
    ):
        assert verify(*arguments) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert message in err


# Hugging Face folders


@pytest.fixture
def hugging_face(tmp_path: Path) -> Path:
    """In several shards, with an index."""
    hf_model(tmp_path / "one", num_key_value_heads=2)
    names = ("--input", tmp_path / "one", "--output", tmp_path / "hf")
    assert convert("--from", "hf", "--to", "hf", *names, "--dtype", "bfloat16", "--max-shard-gb", "0.0001") == 0
    return tmp_path / "hf"


def test_a_hugging_face_model(hugging_face: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    code, report = verified(capsys, hugging_face)
    assert (code, report["kind"], report["model_type"]) == (0, "Hugging Face model", "llama")
    shards = {path.name: path.read_bytes() for path in hugging_face.glob("*.safetensors")}
    assert report["files"] == {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in shards.items()
    }
    code, report = verified(capsys, hugging_face, "--no-checksums")
    assert (code, report["files"]) == (0, {name: {"bytes": len(content)} for name, content in shards.items()})
    assert verify(hugging_face) == 0
    out = capsys.readouterr().out
    assert "3 layers, hidden 32, 4 heads (2 of keys and values), ffn 88, vocabulary 997" in out
    assert "bfloat16" in out
    assert f"whole: all {len(shards)} files of weights, names and shapes as config.json asks, every value is f" in out


def test_its_way_into_a_native_checkpoint(hugging_face: Path, capsys: pytest.CaptureFixture[str]) -> None:
    native = hugging_face.with_name("native")
    assert convert("--from", "hf", "--to", "native", "--input", hugging_face, "--output", native) == 0
    capsys.readouterr()
    code, report = verified(capsys, native)
    assert (code, report["has_optimizer"], report["model_type"]) == (0, False, "llama")
    assert report["layout"] == {"source": "hugging face"}
    flip(find_checkpoint(native) / WEIGHTS, 1000)
    assert verified(capsys, native)[1]["problems"] == [DIFFERS]


def config_with(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def move_in_index(folder: Path) -> None:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["model.norm.weight"] = min(index["weight_map"].values())
    file.write_text(json.dumps(index))


@pytest.mark.parametrize(
    "spoil, problem",
    [
        (lambda f: config_with(f, intermediate_size=96), " is (88, 32), config.json asks for (96, 32)"),
        (lambda f: config_with(f, num_hidden_layers=4), "lacks weight model.layers.3"),
        (lambda f: config_with(f, num_hidden_layers=2), "has an unknown weight model.layers.2"),
        (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda f: (f / "model.safetensors.index.json").write_text("{"), "model.safetensors.index.json cannot be read"),
        (move_in_index, "says that model.norm.weight is in model-00001-of-"),
    ],
)
def test_damage_of_a_hugging_face_model(
    hugging_face: Path, spoil: Callable[[Path], object], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(hugging_face)
    capsys.readouterr()
    code, report = verified(capsys, hugging_face)
    assert (code, report["whole"]) == (1, False)
    assert len(report["problems"]) == 1
    assert problem in report["problems"][0]
    assert not report["problems"][0].startswith("--input")


def test_a_hugging_face_model_that_is_not_finite(hugging_face: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither is it converted, checked or not."""
    words = "values that are not finite (NaN or infinite)"
    for name, value in (("model.norm.weight", math.nan), ("model.layers.2.mlp.up_proj.weight", math.inf)):
        shard = next(file for file in hugging_face.glob("*.safetensors") if name in load_file(file))
        tensors = load_file(shard)
        tensors[name].view(-1)[3:5] = value
        save_file(tensors, shard, {"format": "pt"})
    capsys.readouterr()
    code, report = verified(capsys, hugging_face)
    assert code == 1
    assert sorted(report["problems"]) == [
        f"model.layers.2.mlp.up_proj.weight has 2 of 2,816 {words}",
        f"model.norm.weight has 2 of 32 {words}",
    ]
    for flags in ((), ("--no-verify",)):
        paths = ("--input", hugging_face, "--output", hugging_face.with_name("native"))
        assert convert("--from", "hf", "--to", "native", *paths, *flags) == 2
        assert (
            f"error: --input {hugging_face}: layers.2.mlp.up_proj.weight has 2 of 2,816 {words}; "
            f"norm.weight has 2 of 32 {words}: such a model is of no use\n"
        ) in capsys.readouterr().err
        assert sorted(path.name for path in hugging_face.parent.iterdir()) == ["hf", "one"]


@pytest.mark.parametrize("value", [1.5, math.nan, True, 10**30, "x"])
def test_a_hugging_face_model_of_no_size(hugging_face: Path, value: Any, capsys: pytest.CaptureFixture[str]) -> None:
    config_with(hugging_face, hidden_size=value)
    capsys.readouterr()
    assert verify(hugging_face) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert f"DIR {hugging_face}: config.json: --hidden-size {value}: must be " in err


def test_all_broken_shards_are_named(hugging_face: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, *_ = sorted(hugging_face.glob("*.safetensors"))
    os.truncate(first, first.stat().st_size - 1)
    second.unlink()
    capsys.readouterr()
    code, report = verified(capsys, hugging_face)
    assert code == 1
    assert report["problems"][0].startswith(f"{first.name} is not a whole safetensors file (")
    assert report["problems"][1] == f"{second.name} is missing"


def test_presets_are_recognized() -> None:
    for name in preset_names():
        assert preset_of(preset(name)) == name
        assert preset_of(dataclasses.replace(preset(name).resolved(), max_position_embeddings=16384)) == name
    assert preset_of(dataclasses.replace(preset("llama-7b"), vocab_size=49954)) is None
