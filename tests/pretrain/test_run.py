"""One run: what it logs, evaluates and writes, and how it ends."""

import dataclasses
import math
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.checkpoint import find_checkpoint, read_manifest
from pretrain.flags import parse
from pretrain.stop import StopRequest
from tests.distributed import Pool
from tests.pretrain.support import assert_equal, command, curve, metrics, rank_main, stored, train, tree
from tests.pretrain.test_data import EOD, write_corpus

PP = "pipeline_model_parallel_size"
DOCUMENTED = {"iteration", "lm_loss", "grad_norm", "learning_rate", "consumed_samples", "tokens_per_second"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "c")


@pytest.fixture(scope="module")
def done(pool: Pool, corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one process with all logs: its folder, with `m.jsonl`, `save`, `events`, `wandb`."""
    folder = tmp_path_factory.mktemp("done")
    pool.run(train_offline, 1, command(**everything(folder, corpus)))
    return folder


def everything(folder: Path, corpus: str) -> dict[str, Any]:
    return {
        "data_path": corpus,
        "train_iters": 6,
        "params_dtype": "float64",
        "split": "80,20",
        "eval_interval": 3,
        "eval_iters": 2,
        "metrics": folder / "m.jsonl",
        "save": folder / "save",
        "tensorboard_dir": folder / "events",
        "wandb_project": "test",
        "wandb_save_dir": folder,
    }


def train_offline(arguments: list[str]) -> str:
    os.environ["WANDB_MODE"] = "offline"
    return train(arguments)


def test_metrics(done: Path) -> None:
    records = metrics(done / "m.jsonl")
    assert [record["iteration"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert [record["consumed_samples"] for record in records] == [8, 16, 24, 32, 40, 48]
    for record in records:
        assert record.keys() >= DOCUMENTED
        assert all(math.isfinite(record[key]) for key in DOCUMENTED)
        assert record["tokens_per_second"] > 0
        assert 0 < record["grad_norm"] < 100
        assert 0 < record["lm_loss"] < 10


def test_tensorboard_and_wandb(done: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(done / "events")).Reload()
    records = metrics(done / "m.jsonl")
    for name in ("lm_loss", "learning_rate", "grad_norm"):
        shown = [(event.step, event.value) for event in events.Scalars(name)]
        assert shown == [(record["iteration"], pytest.approx(record[name])) for record in records]
    assert [event.step for event in events.Scalars("valid_loss")] == [3, 6]
    (file,) = done.glob("wandb/offline-run-*/run-*.wandb")
    assert file.stat().st_size > 0


def test_run_yaml_asks_for_the_same_run(done: Path, corpus: str) -> None:
    asked = parse(command(**everything(done, corpus)))
    for file in (done / "save/run.yaml", done / "save/iter_0000006/run.yaml"):
        assert parse(["--config", str(file)]) == asked


def test_run_yaml_has_the_resolved_batch_size(pool: Pool, corpus: str, tmp_path: Path) -> None:
    flags = command(data_path=corpus, train_iters=3, global_batch_size=None, metrics=tmp_path / "m.jsonl")
    pool.run(train, 2, flags)
    asked = parse(flags)
    again = parse(["--config", str(tmp_path / "m.run.yaml")])
    batch = dataclasses.replace(asked.engine.batch, global_batch_size=4)
    assert again == dataclasses.replace(asked, engine=dataclasses.replace(asked.engine, batch=batch))


def test_validation_loss_is_the_same_at_another_layout(pool: Pool, corpus: str, done: Path, tmp_path: Path) -> None:
    def losses(folder: Path) -> dict[int, float]:
        return {r["iteration"]: r["valid_loss"] for r in metrics(folder / "m.jsonl") if "valid_loss" in r}

    expected = losses(done)
    assert expected.keys() == {3, 6}
    assert expected[3] != expected[6]
    logs = {"save": None, "tensorboard_dir": None, "wandb_project": None, "wandb_save_dir": None}
    flags = everything(tmp_path, corpus) | logs
    pool.run(train, 4, command(**flags, **{PP: 2}, zero_stage=3))
    assert losses(tmp_path) == pytest.approx(expected, rel=1e-9)


def test_an_evaluation_without_a_token_that_counts(pool: Pool, tmp_path: Path) -> None:
    ends = write_corpus(tmp_path / "c", first=EOD, end=EOD + 1)
    flags = {"data_path": ends, "split": "80,20", "eod_mask_loss": True, "eod_token_id": EOD, "lr_warmup_iters": 0}
    flags |= {"train_iters": 1, "eval_interval": 1, "eval_iters": 1, "metrics": tmp_path / "m.jsonl"}
    printed, _ = pool.run(train, 2, command(**flags))
    assert " validation loss at iteration 1 | no token counted\n" in printed
    (record,) = metrics(tmp_path / "m.jsonl")
    assert (record["lm_loss"], record["grad_norm"], record["valid_loss"]) == (0, 0, None)


def test_evaluation_leaves_no_trace_in_training(pool: Pool, corpus: str, done: Path, tmp_path: Path) -> None:
    flags = everything(tmp_path, corpus) | {"eval_interval": None, "eval_iters": None, "tensorboard_dir": None}
    pool.run(train, 1, command(**flags | {"wandb_project": None, "wandb_save_dir": None}))
    assert curve(tmp_path / "m.jsonl") == curve(done / "m.jsonl")
    assert_equal(stored(tmp_path / "save/iter_0000006"), stored(done / "save/iter_0000006"))


def test_nothing_left_to_do(pool: Pool, corpus: str, done: Path) -> None:
    before = tree(done)
    (printed,) = pool.run(train_offline, 1, command(**everything(done, corpus), load=done / "save"))
    assert "nothing to do: iteration 6 of 6 is already reached" in printed
    after = tree(done)
    same = [name for name in before if name.startswith("save/iter_") or name in ("m.jsonl", "save/latest")]
    assert {name: after[name] for name in same} == {name: before[name] for name in same}


def test_finetune_takes_the_weights_and_nothing_else(pool: Pool, corpus: str, done: Path, tmp_path: Path) -> None:
    flags = {"data_path": corpus, "params_dtype": "float64", "train_iters": 1, "lr": 0, "lr_warmup_iters": 0}
    pool.run(train, 1, command(**flags, load=done / "save", finetune=True, save=tmp_path, metrics=tmp_path / "m.jsonl"))
    assert [(r["iteration"], r["consumed_samples"]) for r in metrics(tmp_path / "m.jsonl")] == [(1, 8)]
    before, after = stored(done / "save/iter_0000006"), stored(tmp_path / "iter_0000001")
    weights = [name for name in before if name.startswith("model.")]
    assert weights
    assert_equal({name: after[name] for name in weights}, {name: before[name] for name in weights})
    assert (before["optimizer.steps"], after["optimizer.steps"]) == (6, 1)
    assert read_manifest(find_checkpoint(tmp_path)).consumed_samples == 8
    pool.run(train, 1, command(**flags, metrics=tmp_path / "fresh.jsonl"))
    assert metrics(tmp_path / "fresh.jsonl")[0]["lm_loss"] != metrics(tmp_path / "m.jsonl")[0]["lm_loss"]


@pytest.mark.slow
def test_bf16_on_a_cpu(pool: Pool, corpus: str, tmp_path: Path) -> None:
    flags = {"data_path": corpus, "train_iters": 6}
    pool.run(train, 1, command(**flags, metrics=tmp_path / "float32.jsonl"))
    pool.run(train, 1, command(**flags, metrics=tmp_path / "bf16.jsonl", bf16=True, save=tmp_path))
    half, single = metrics(tmp_path / "bf16.jsonl"), metrics(tmp_path / "float32.jsonl")
    for key, tolerance in (("lm_loss", 2e-3), ("grad_norm", 2e-2)):
        values = [record[key] for record in half]
        assert values == pytest.approx([record[key] for record in single], rel=tolerance)
        assert values != [record[key] for record in single]
    assert stored(find_checkpoint(tmp_path))["model.norm.weight"].dtype == torch.float32  # the master weights


def test_sigterm_saves_and_ends_well(pool: Pool, corpus: str, tmp_path: Path) -> None:
    """To one of two ranks; both stop after the same step, and the run continues from there."""
    flags = {"data_path": corpus, "lr_decay_style": "constant", "save": tmp_path / "save"}
    endless = command(**flags, metrics=tmp_path / "m.jsonl", train_iters=100_000)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        pool.context.Process(target=rank_main, args=(rank, 2, port, endless, tmp_path), daemon=True)
        for rank in range(2)
    ]
    try:
        for rank in ranks:
            rank.start()
        while not (tmp_path / "m.jsonl").is_file() or not (tmp_path / "m.jsonl").read_text():
            assert all(rank.is_alive() for rank in ranks)
            time.sleep(0.05)
        ranks[1].terminate()
        for rank in ranks:
            rank.join(120)
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.exitcode for rank in ranks] == [0, 0], (tmp_path / "stderr0").read_text()
    last = metrics(tmp_path / "m.jsonl")[-1]["iteration"]
    assert f"stopping at iteration {last} as asked by a signal" in (tmp_path / "stdout0").read_text()
    assert find_checkpoint(tmp_path / "save").name == f"iter_{last:07d}"
    assert 1 <= last < 100_000

    pool.run(train, 2, command(**flags, metrics=tmp_path / "m.jsonl", train_iters=last + 3, load=tmp_path / "save"))
    pool.run(train, 2, command(**flags | {"save": None}, metrics=tmp_path / "whole.jsonl", train_iters=last + 3))
    assert curve(tmp_path / "m.jsonl") == curve(tmp_path / "whole.jsonl")


def test_a_second_interrupt_interrupts_at_once() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert not stop
        os.kill(os.getpid(), signal.SIGINT)
        assert stop
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
