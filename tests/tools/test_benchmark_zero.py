"""The benchmark of ZeRO at a small size: it measures what it says, and refuses what it cannot measure."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.zero import __main__ as zero
from benchmarks.zero.live import HostMemory
from megatron_ext.models import preset
from megatron_ext.models.count import parameters
from tests.distributed import Pool

_SHAPE = ["--model", "tiny", "--seq-length", "16", "--microbatches", "2", "--rounds", "2"]
_MIB = 2**20


def run(*arguments: object) -> None:
    zero.work(zero.build_parser().parse_args([*_SHAPE, *map(str, arguments)]), torch.device("cpu"))


def figures(pool: Pool, folder: Path) -> dict[str, dict[str, Any]]:
    file = folder / "figures.json"
    pool.run(run, 2, "--json", file)
    return {row["name"]: row for row in json.loads(file.read_text())["rows"]}


@pytest.mark.slow
def test_figures_of_a_small_model(pool: Pool, tmp_path: Path) -> None:
    rows = figures(pool, tmp_path)
    whole = 4 * parameters(preset("tiny"))
    assert rows["DDP"]["ratio"] == 1
    for row in rows.values():
        low, high = row["quartiles"]
        assert 0 < low <= row["ratio"] <= high
        assert row["weights"] + row["optimizer"] < row["peak"] < 40 * whole
    for name in ("DDP", "native ZeRO 0"):
        assert [rows[name][key] for key in ("weights", "gradients")] == [whole, whole]
    for stage in (1, 2, 3):
        row = rows[f"native ZeRO {stage}"]
        assert [row[key] for key in ("weights", "gradients")] == [whole / 2, whole / 2]
        assert row["optimizer"] == pytest.approx(whole, rel=0.01)  # and counts of steps
    peaks = [rows[name]["peak"] for name in ("native ZeRO 3", "native ZeRO 2", "native ZeRO 1", "DDP", "native ZeRO 0")]
    assert peaks == sorted(peaks)
    installed = importlib.util.find_spec("deepspeed") is not None
    assert [name for name in rows if "DeepSpeed" in name] == [f"DeepSpeed ZeRO {n}" for n in (1, 2, 3)] * installed


def test_all_have_to_train_alike() -> None:
    outcomes = {"DDP": torch.tensor([7.0, 2.0]), "same": torch.tensor([7.0001, 2.001])}
    zero.check_alike(outcomes)
    for wrong in ([7.001, 2.0], [7.0, 4.0], [7.0, float("nan")]):
        with pytest.raises(RuntimeError, match="wrong does not train as DDP does"):
            zero.check_alike(outcomes | {"wrong": torch.tensor(wrong)})


def test_memory_is_what_lives_at_once() -> None:
    with HostMemory() as memory:
        kept = torch.zeros(_MIB, dtype=torch.uint8)
        for _ in range(3):
            temporary = torch.zeros(3 * _MIB, dtype=torch.uint8)
            assert temporary.view(3, -1)[1].shape == (_MIB,)  # views have nothing of their own
            del temporary
        assert memory.largest == 4 * _MIB
        memory.restart()
        kept.add_(1)
        assert memory.largest == _MIB
        kept.untyped_storage().resize_(5 * _MIB)
        kept.add_(1)
        assert memory.largest == 5 * _MIB


def test_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    sizes = {"weights": 4e6, "gradients": 4e6, "optimizer": 8e6, "peak": 2e7}
    rows = [{"name": name, "ratio": 1.0, "quartiles": [0.9, 1.2], **sizes} for name in ("DDP", "native ZeRO 0")]
    zero.draw(rows, "two ranks", str(tmp_path / "zero.png"))
    assert (tmp_path / "zero.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--rounds", "0"], "--rounds 0: must be at least 1"),
        (["--microbatches", "0"], "--microbatches 0: must be at least 1"),
        (["--json", "/nowhere/at/all.json"], "--json /nowhere/at/all.json: no such folder"),
        (["--plot", "zero.jpg"], "--plot zero.jpg: must end in .png, .svg or .pdf"),
        (["--num-layers", "0"], "--num-layers"),
    ],
)
def test_wrong_requests(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert zero.main(arguments) == 2
    assert message in capsys.readouterr().err
