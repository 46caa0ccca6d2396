"""Callbacks of --callback: what they see and when, how they end a run, and what is refused."""

import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.checkpoint import find_checkpoint
from pretrain.__main__ import main
from pretrain.flags import parse
from tests.distributed import Pool
from tests.pretrain.support import ROOT, command, curve, metrics, train, tree
from tests.pretrain.test_data import write_corpus

MINE = """
import torch.distributed as dist
from stop_below import StopBelow
from pretrain.callbacks import Callback, Stop

class Below(StopBelow):
    threshold, steps = 7.0, 2

class Notes(Callback):
    def __init__(self, run):
        super().__init__(run)
        self.notes = []
    def before_step(self, iteration):
        self.notes.append(f"before {iteration}")
    def due(self, iteration):
        return iteration == 3
    def after_step(self, record):
        self.notes.append(f"{record['iteration']} at {self.run.iteration}")
        if record["iteration"] == 4 and dist.get_rank() == 1:
            raise ArithmeticError("four")
    def on_error(self, error):
        self.notes.append(f"error {error}")
        self.close()
    def close(self):
        with open(f"notes{dist.get_rank()}", "w") as file:
            file.write(", ".join([*self.notes, f"closed at {self.run.iteration}"]))

class OnOneRank(Callback):
    def before_step(self, iteration):
        return Stop("because the second rank asks") if iteration == 3 and dist.get_rank() == 1 else None

not_a_callback = 5
class Other:
    pass
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a corpus `c` and a module of the user's own."""
    write_corpus(tmp_path / "c")
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "broken.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "examples" / "callbacks")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def run(pool: Pool, ranks: int, *callbacks: str, **flags: Any) -> list[str]:
    words = command(data_path="c", lr=1e-2, lr_warmup_iters=0, **flags)
    for name in callbacks:
        words += ["--callback", name]
    return pool.run(train, ranks, words)


def test_the_example_stops_below_a_threshold(pool: Pool, here: Path) -> None:
    (printed,) = run(pool, 1, "mine:Below", save="saved", metrics="m.jsonl")
    losses = [record["lm_loss"] for record in metrics(here / "m.jsonl")]
    reached = next(i for i in range(1, 20) if (losses[i - 1] + losses[i]) / 2 < 7.0)  # a step later it is known,
    last = reached + 4  # the next one that is launched carries the wish, and one more runs until that is heard
    assert len(losses) == last < 20
    mean = (losses[reached - 1] + losses[reached]) / 2
    assert f" stopping at iteration {last} because the loss, {mean:.4f}, is below 7.0\n" in printed
    assert find_checkpoint(here / "saved").name == f"iter_{last:07d}"
    run(pool, 1, train_iters=last, lr_decay_iters=20, metrics="plain.jsonl")
    assert curve(here / "m.jsonl") == curve(here / "plain.jsonl")[:last]


def test_one_rank_stops_all_after_the_same_step(pool: Pool, here: Path) -> None:
    printed, _ = run(pool, 2, "mine:OnOneRank", metrics="m.jsonl")
    assert len(metrics(here / "m.jsonl")) == 4
    assert " stopping at iteration 4 as asked by another rank\n" in printed
    assert (here / "m.run.yaml").read_text().startswith("# with --callback mine:OnOneRank\n")
    assert parse(["--config", "m.run.yaml"]).callbacks == ()


def test_records_come_while_the_next_step_runs(pool: Pool, here: Path) -> None:
    run(pool, 1, "mine:Notes", "mine:OnOneRank", train_iters=4)
    steps = "before 1, before 2, 1 at 2, before 3, 2 at 3, 3 at 3, before 4, 4 at 4, closed at 4"
    assert (here / "notes0").read_text() == steps
    with pytest.raises(Exception, match="four"):
        run(pool, 2, "mine:Notes", train_iters=6)
    assert (here / "notes1").read_text().endswith("before 5, 4 at 5, error four, closed at 5")


@pytest.mark.parametrize(
    "name, message",
    [
        ("mine", "must be MODULE:CLASS"),
        ("mine.py:Below", "mine.py cannot be imported (ModuleNotFoundError"),
        ("nowhere:Below", "nowhere cannot be imported (ModuleNotFoundError: No module named 'nowhere')"),
        ("broken:Below", "broken cannot be imported (SystemExit: 3)"),
        ("mine:Bellow", "mine has no Bellow"),
        ("mine:Other", "Other is no subclass of pretrain.callbacks.Callback"),
        ("mine:not_a_callback", "not_a_callback is no subclass"),
    ],
)
def test_what_is_no_callback_is_refused(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = tree(here)
    assert main([*command(data_path="c", save="new"), "--callback", name]) == 2
    output, errors = capsys.readouterr()
    assert (output, errors.count("\n")) == ("", 1)
    assert f"--callback {name}: " in errors
    assert message in errors
    assert tree(here) == before


def test_a_file_names_no_callback(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever continues with somebody's run.yaml does not run their code."""
    (here / "theirs.yaml").write_text("callback: [broken:Below]")
    assert main([*command(data_path="c"), "--config", "theirs.yaml"]) == 2
    assert "--config theirs.yaml: callback: is not taken from a file: give --callback" in capsys.readouterr().err
