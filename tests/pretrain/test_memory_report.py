"""--report-memory: what ranks hold and how high memory went, in the metrics and as a table."""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import Pool
from tests.pretrain.support import MODEL, command, metrics, train
from tests.pretrain.test_data import VOCAB, write_corpus

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
    return [re.split(r" {2,}", line.strip()) for line in lines[head + 1 : head + 3]]


def bytes_of(cell: str) -> list[float]:
    """The figures in "1.50 MiB (1.48 MiB)"."""
    units = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
    return [float(number) * units[unit] for number, unit in re.findall(r"([\d.]+) (\w+)", cell)]


@pytest.mark.parametrize("stage", range(4))
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
        for cell, size in zip(rows[rank][3:6], (4, 4, 8), strict=True):
            measured, formula = bytes_of(cell)
            assert formula == pytest.approx(size * psi / shards, rel=0.001)
            assert measured == pytest.approx(formula, rel=0.02)
        assert bytes_of(rows[rank][6]) == [pytest.approx(records[0][f"memory_stage{rank}_peak_bytes"], rel=0.01)]
