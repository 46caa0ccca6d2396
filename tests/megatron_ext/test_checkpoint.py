"""Checkpoints of engines: complete, hashed and named by `latest`, or not there, whatever fails in a save."""

import dataclasses
import hashlib
import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor

import megatron_ext.checkpoint.directory
import megatron_ext.checkpoint.save
from megatron_ext.checkpoint import CheckpointWriter, Manifest, find_checkpoint, load_checkpoint, read_manifest
from megatron_ext.checkpoint.digest import HashingWriter, sha256_of
from megatron_ext.checkpoint.directory import MANIFEST
from megatron_ext.checkpoint.load import mesh_sizes
from megatron_ext.engine import Engine, EngineConfig
from megatron_ext.errors import RequestError
from megatron_ext.mesh import build_grid
from tests.distributed import Pool
from tests.megatron_ext.test_checkpoint_directory import manifest
from tests.megatron_ext.training import LR, global_batch, share, tiny
from tests.slow import sweep


def build(config: EngineConfig | None = None) -> Engine:
    config = config or tiny()
    return Engine(config, build_grid(config.parallel, torch.device("cpu")))


def manifest_of(engine: Engine, iteration: int) -> Manifest:
    return dataclasses.replace(
        manifest(iteration), model=dataclasses.asdict(engine.config.model), layout=mesh_sizes(engine.grid)
    )


def full(*_: Any) -> Any:
    raise OSError(28, "No space left on device")


FAILURES: dict[str, tuple[int, Any, str]] = {
    "a rank's tensors": (1, dcp.FileSystemWriter, "write_data"),
    "the small files": (0, megatron_ext.checkpoint.save, "write_text"),
    "the manifest": (0, megatron_ext.checkpoint.save, "publish"),
}


def save_on_a_full_disk(root: Path, background: bool, failure: str) -> tuple[str, list[str]]:
    """A checkpoint, one of which a part cannot be written, and another. The refusal, and what was there after it."""
    engine = build()
    writer = CheckpointWriter(root, engine, background)
    writer.save(manifest_of(engine, 1), {})
    writer.wait()
    rank, place, name = FAILURES[failure]
    message = ""
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == rank:
            patch.setattr(place, name, full)
        try:
            writer.save(manifest_of(engine, 2), {"run.yaml": ""})
            writer.wait()
        except RequestError as error:
            message = str(error)
        dist.barrier()
        remains = sorted(os.listdir(root))
        dist.barrier()
    writer.save(manifest_of(engine, 3), {})
    writer.wait()
    load_checkpoint(engine, find_checkpoint(root))
    return message, remains


@pytest.mark.parametrize(
    "failure, background",
    sweep(
        itertools.product(FAILURES, (False, True)),
        {("a rank's tensors", True), ("the small files", False)},
    ),
)
def test_a_failed_write_is_told_to_every_rank_and_leaves_nothing(
    pool: Pool, tmp_path: Path, failure: str, background: bool
) -> None:
    for message, remains in pool.run(save_on_a_full_disk, 2, tmp_path, background, failure, timeout=60):
        assert message.startswith(f"--save {tmp_path}: the checkpoint could not be written (")
        assert "No space left on device" in message
        assert "\n" not in message
        assert remains == ["iter_0000001", "latest"]
    assert find_checkpoint(tmp_path).name == "iter_0000003"


DIGESTED: dict[str, dict[str, Any]] = {
    "tp, ZeRO-3": {"tensor_model_parallel_size": 2, "zero_stage": 3, "vocab_size": 97},
    "pp, tied": {"pipeline_model_parallel_size": 2, "untie_embeddings_and_output_weights": False},
}


def save_and_watch_hashing(root: Path, config: EngineConfig, background: bool) -> list[str]:
    """Save; which files this rank read again, in order to hash them."""
    engine = build(config)
    read_again = []

    def watched(path: Path) -> str:
        read_again.append(path.name)
        return sha256_of(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(megatron_ext.checkpoint.directory, "sha256_of", watched)
        writer = CheckpointWriter(root, engine, background)
        writer.save(manifest_of(engine, 1), {"run.yaml": "seed: 1\n"})
        writer.wait()
    return read_again


@pytest.mark.parametrize(
    "layout, background",
    sweep(itertools.product(DIGESTED, (False, True)), {("tp, ZeRO-3", True), ("pp, tied", False)}),
)
def test_every_rank_hashes_what_it_writes(pool: Pool, tmp_path: Path, layout: str, background: bool) -> None:
    read_again = pool.run(save_and_watch_hashing, 4, tmp_path, tiny(**DIGESTED[layout]), background, timeout=60)
    assert read_again == [[".metadata", "run.yaml"], [], [], []]
    checkpoint = find_checkpoint(tmp_path)
    files = {path.name: path.read_bytes() for path in checkpoint.iterdir() if path.name != MANIFEST}
    assert len(list(checkpoint.glob("*.distcp"))) == 4
    found = read_manifest(checkpoint)
    assert found.files == {name: len(content) for name, content in files.items()}
    assert found.sha256 == {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


def test_a_file_that_is_hashed_while_it_is_written_cannot_be_changed(tmp_path: Path) -> None:
    files = HashingWriter(tmp_path).fs
    with files.create_stream(tmp_path / "file", "wb") as stream:
        stream.write(b"some")
        assert stream.tell() == 4
        with pytest.raises(OSError):
            stream.seek(0)
    with files.create_stream(tmp_path / "file", "rb") as stream:
        assert stream.read() == b"some"
    assert files.sha256 == {"file": hashlib.sha256(b"some").hexdigest()}


OFFLOADED: dict[str, Any] = {"zero_stage": 2, "offload_optimizer": "cpu"}
RESIDENT: dict[str, Any] = {"zero_stage": 3}


def save_then_load(root: Path, saved: EngineConfig, loaded: EngineConfig) -> tuple[list[float], list[float]]:
    """Figures of two steps after a save, and of the same steps after a load into another engine."""

    def train(engine: Engine, steps: range) -> list[float]:
        batches = (share(global_batch(saved, i), engine.grid, saved.batch.micro_batch_size) for i in steps)
        return torch.stack([engine.train_step(batch, LR) for batch in batches]).flatten().tolist()

    engine = build(saved)
    train(engine, range(2))
    writer = CheckpointWriter(root, engine)
    writer.save(manifest_of(engine, 2), {})
    other = build(loaded)
    load_checkpoint(other, find_checkpoint(root))
    ours, theirs = whole_states(engine), whole_states(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    return train(engine, range(2, 4)), train(other, range(2, 4))


def whole_states(engine: Engine) -> dict[tuple[str, str], torch.Tensor]:
    states = engine.state_dict()
    tensors = {"weight": states.weights, **states.optimizer}
    return {
        (kind, name): tensor.full_tensor()
        for kind, part in tensors.items()
        for name, tensor in part.items()
        if isinstance(tensor, DTensor)
    }


@pytest.mark.parametrize(
    "saved, loaded",
    sweep([(OFFLOADED, RESIDENT), (RESIDENT, OFFLOADED)], [(RESIDENT, OFFLOADED)]),
    ids=["to host", "from host"],
)
def test_a_checkpoint_does_not_know_where_the_states_were(
    pool: Pool, tmp_path: Path, saved: dict[str, Any], loaded: dict[str, Any]
) -> None:
    another = dataclasses.replace(tiny(**loaded), seed=9)
    for straight, resumed in pool.run(save_then_load, 2, tmp_path, tiny(**saved), another):
        assert resumed == straight
