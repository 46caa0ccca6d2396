"""--report-memory: what ranks hold and how high memory went, in the metrics and as a table."""

import dataclasses
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.engine import Engine
from megatron_ext.mesh import ParallelConfig, build_grid
from pretrain.flags import parse
from pretrain.memory import memory_figures, memory_table
from tests.distributed import Pool
from tests.pretrain.support import MODEL, command, metrics, train
from tests.pretrain.test_data import VOCAB, write_corpus
from tests.slow import sweep

H = MODEL["hidden_size"]
LAYER = 2 * H * H + 2 * H * H // 2 + 3 * H * MODEL["ffn_hidden_size"] + 2 * H  # two groups of keys for four heads
KEYS = {f"memory_stage{rank}_{name}_bytes" for rank in (0, 1) for name in ("weights", "gradients", "optimizer", "peak")}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "c")


def table(printed: str) -> list[list[str]]:
    """Cells of the rows below the head of the only table."""
    lines = printed.splitlines()
    (head,) = (i for i, line in enumerate(lines) if line.startswith(" pipeline rank"))
    rows = itertools.takewhile(lambda line: re.match(r" +\d+ {2,}", line), lines[head + 1 :])
    return [re.split(r" {2,}", line.strip()) for line in rows]


def bytes_of(cell: str) -> list[float]:
    """The figures in "1.50 MiB (1.48 MiB)"."""
    units = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
    return [float(number) * units[unit] for number, unit in re.findall(r"([\d.]+) (\w+)", cell)]


@pytest.mark.parametrize("stage", sweep(range(4), {3}))
def test_a_pipeline_with_data_parallelism(pool: Pool, corpus: str, tmp_path: Path, stage: int) -> None:
    flags: dict[str, Any] = {"data_path": corpus, "metrics": tmp_path / "m.jsonl", "train_iters": 3}
    layout = {"pipeline_model_parallel_size": 2, "pipeline_layers": "3,1", "zero_stage": stage}
    printed, *others = pool.run(train, 4, command(**flags, **layout, report_memory=True))
    assert others == [""] * 3
    elements = [VOCAB * H + 3 * LAYER, VOCAB * H + LAYER + H]
    shards = 2 if stage else 1
    records = metrics(tmp_path / "m.jsonl")
    assert [record["iteration"] for record in records] == [1, 2, 3]
    for record in records:
        assert {key for key in record if key.startswith("memory_stage")} == KEYS
        for rank, psi in enumerate(elements):
            for name, size in {"weights": 4, "gradients": 4, "optimizer": 8}.items():
                held = record[f"memory_stage{rank}_{name}_bytes"]
                assert isinstance(held, int)
                assert held == pytest.approx(size * psi / shards, rel=0.02)
            assert 50 * 2**20 < record[f"memory_stage{rank}_peak_bytes"] < 4 * 2**30  # of Python and torch
        assert record["memory_stage0_peak_bytes"] >= record["memory_gib"] * 2**30  # of rank 0, which is one of them

    rows = table(printed)
    for rank, psi in enumerate(elements):
        assert rows[rank][:3] == [str(rank), str(rank), f"{psi:,}"]
        for cell, size in zip(rows[rank][3:7], (4, 4, 8, 16), strict=True):
            measured, predicted = bytes_of(cell)
            assert predicted == pytest.approx(size * psi / shards, rel=0.01)
            assert measured == predicted
        assert bytes_of(rows[rank][7]) == [pytest.approx(records[0][f"memory_stage{rank}_peak_bytes"], rel=0.01)]


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param({"train_only": "lora", "tensor_model_parallel_size": 2}, marks=pytest.mark.slow),
        {"no_untie_embeddings_and_output_weights": True, "bf16": True},
        {"train_only": "new-rows", "base_vocab_size": 64, "zero_stage": 0},
    ],
)
def test_rows_are_pipeline_ranks_with_all_their_stages(pool: Pool, corpus: str, layout: dict[str, Any]) -> None:
    """To what is printed, with adapters, frozen parameters, untrained rows and the copy of a tied matrix."""
    flags: dict[str, Any] = {"data_path": corpus, "train_iters": 3, "pipeline_schedule": "interleaved"}
    printed, *_ = pool.run(train, 4, command(**flags, **layout, pipeline_model_parallel_size=2, report_memory=True))
    rows = table(printed)
    assert [row[:2] for row in rows] == [["0", "0, 2"], ["1", "1, 3"]]
    for cell in (cell for row in rows for cell in row[3:7]):
        measured, predicted = bytes_of(cell)
        assert measured == predicted


OFFLOAD, BF16 = {"offload_optimizer": "cpu"}, {"bf16": True}


@pytest.mark.parametrize(
    "flags",
    sweep(
        [{"zero_stage": stage, **more} for stage in (1, 2, 3) for more in ({}, BF16, OFFLOAD)],
        [{"zero_stage": 3, **BF16}],
    ),
    ids=str,
)
def test_deepspeed(pool: Pool, corpus: str, tmp_path: Path, flags: dict[str, Any]) -> None:
    """Where the ranks' shards meet between two parameters: of one that lies in both, both keep the whole gradient."""
    pytest.importorskip("deepspeed")
    run: dict[str, Any] = {"data_path": corpus, "train_iters": 3, "report_memory": True}
    if flags["zero_stage"] == 3:
        settings = {"stage3_param_persistence_threshold": 0}  # else small parameters stay whole
        (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": settings}))
        run["deepspeed_config"] = tmp_path / "ds.json"
    printed, *_ = pool.run(train, 2, command(zero_engine="deepspeed", **run, **flags))
    (row,) = table(printed)
    for cell in row[3:7]:
        measured, predicted = bytes_of(cell)
        assert measured == pytest.approx(predicted, rel=0.02)


def test_a_continued_run_shows_it_after_its_own_first_step(pool: Pool, corpus: str, tmp_path: Path) -> None:
    """And without the flag there is nothing of it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags: dict[str, Any] = {"data_path": corpus, "metrics": tmp_path / "m.jsonl", "save": tmp_path / "save"}
    flags["lr_decay_style"] = "constant"
    (printed,) = pool.run(train, 1, command(**flags, train_iters=3))
    assert "memory of" not in printed
    flags |= {"load": tmp_path / "save", "tensorboard_dir": tmp_path / "events", "report_memory": True}
    (printed,) = pool.run(train, 1, command(**flags, train_iters=5))
    assert printed.count("memory of") == 1
    records = metrics(tmp_path / "m.jsonl")
    assert [any(key.startswith("memory_stage") for key in record) for record in records] == [False] * 3 + [True] * 2
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    shown = [(event.step, event.value) for event in events.Scalars("memory_stage0_optimizer_bytes")]
    assert shown == [(record["iteration"], record["memory_stage0_optimizer_bytes"]) for record in records[3:]]


def on_a_gpu(arguments: list[str], offload: str | None) -> tuple[dict[str, int], list[str]]:
    """What a run on a GPU would show that has 3 GiB allocated and 5 GiB reserved at most."""
    config = parse(arguments).engine
    engine = Engine(config, build_grid(ParallelConfig(), torch.device("cpu")))
    engine.grid = dataclasses.replace(engine.grid, device=torch.device("cuda"))
    engine.config = dataclasses.replace(engine.config, zero=dataclasses.replace(config.zero, offload_optimizer=offload))
    torch.cuda.max_memory_allocated = lambda device: 3 * 2**30
    torch.cuda.max_memory_reserved = lambda device: 5 * 2**30
    figures = memory_figures(engine)
    return figures, memory_table(engine, figures)


@pytest.mark.parametrize("offload", [None, "cpu"])
def test_peaks_of_a_gpu_and_of_its_host(pool: Pool, offload: str | None) -> None:
    ((figures, lines),) = pool.run(on_a_gpu, 1, command(), offload)
    assert figures["memory_stage0_peak_bytes"] == 3 * 2**30
    assert figures["memory_stage0_peak_reserved_bytes"] == 5 * 2**30
    assert lines[0].endswith("peak: allocated by torch")
    ends = ["3.00 GiB", "5.00 GiB"]
    if offload is None:
        assert "memory_stage0_host_peak_bytes" not in figures
    else:
        ends.append(f"{figures['memory_stage0_host_peak_bytes'] / 2**20:.2f} MiB")
    assert re.split(r" {2,}", lines[2])[-len(ends) :] == ends
