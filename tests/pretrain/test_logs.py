"""Logs: what fails in one is said once and ends nothing; restarts double nothing, and nobody's file is lost."""

import json
import math
import os
import resource
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.errors import RequestError
from pretrain.flags import parse
from pretrain.logs import Guarded, open_logs
from pretrain.logs.metrics_file import MetricsFile, trim_metrics
from pretrain.logs.tensorboard import TensorBoard
from tests.pretrain.support import ROOT, command
from tests.pretrain.test_data import write_corpus
from tools.metrics_file import read_metrics
from tools.plot_metrics import draw


def record(iteration: int, **figures: Any) -> dict[str, Any]:
    return {"iteration": iteration, "lm_loss": 2.5, "skipped": False, "mfu_full": None} | figures


def strict(line: str) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(line, parse_constant=refuse)


class Flaky:
    """Fails at the n-th tries named, before or after it has written."""

    def __init__(self, fails: range):
        self.fails, self.tries, self.written, self.closed = fails, 0, [], False

    def write(self, record: dict[str, Any]) -> None:
        self.tries += 1
        if self.tries in self.fails:
            raise ArithmeticError("no\nroom")
        self.written.append(record["iteration"])

    def close(self) -> None:
        self.closed = True
        raise OSError


def test_a_log_that_fails_is_tried_again(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.logs.log._MOST_WAITING", 4)
    log = Flaky(range(3, 6))
    guarded = Guarded("--metrics m", log)
    for iteration in range(1, 8):
        guarded.write(record(iteration))
        guarded._retry_at = 0.0
    assert log.written == [1, 2, 3, 4, 5, 6, 7]
    lost = Flaky(range(3, 12))
    guarded = Guarded("other", lost)
    for iteration in range(1, 8):
        guarded.write(record(iteration))
        guarded._retry_at = 0.0
    guarded.close()
    assert lost.written == [1, 2]
    assert lost.closed
    assert capsys.readouterr().err.splitlines() == [
        "--metrics m: no room; the run goes on, and what is missing is written when it can be",
        "--metrics m: written again, nothing is missing",
        "other: no room; the run goes on, and what is missing is written when it can be",
        "other: 5 records were not written",
    ]


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Any]:
    """Files of at most so many bytes: a write then stops in the middle of a record, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("kind", ["metrics", "tensorboard"])
def test_no_half_records(tmp_path: Path, full_disk: Any, kind: str) -> None:
    log = MetricsFile(str(tmp_path / "m.jsonl")) if kind == "metrics" else TensorBoard(str(tmp_path), 1)
    guarded = Guarded(kind, log)
    guarded.write(record(1, grad_norm=math.nan, loss_scale=math.inf))
    (file,) = tmp_path.iterdir()
    size = file.stat().st_size
    full_disk(size + 20)
    guarded.write(record(2))
    assert file.stat().st_size == size
    full_disk(resource.RLIM_INFINITY)
    guarded._retry_at = 0.0
    guarded.write(record(3))
    shutil.rmtree(tmp_path)  # whoever clears a folder up does not end the run either
    guarded.write(record(4))
    guarded._retry_at = 0.0
    tmp_path.mkdir()
    guarded.write(record(5))
    guarded.close()
    expected = [4, 5]
    if kind == "metrics":
        assert [strict(line)["iteration"] for line in file.read_text("utf-8").splitlines()] == expected
    else:
        assert steps(tmp_path) == expected


def test_figures_that_are_no_numbers(tmp_path: Path) -> None:
    file = MetricsFile(str(tmp_path / "m.jsonl"))
    file.write(record(1, lm_loss=math.nan, grad_norm=-math.inf, learning_rate=1e-3))
    file.close()
    assert strict((tmp_path / "m.jsonl").read_text("utf-8"))["lm_loss"] is None
    with (tmp_path / "m.jsonl").open("a", encoding="utf-8") as torn:
        torn.write('{"iteration": 2, "lm_l')
    (read,) = read_metrics(str(tmp_path / "m.jsonl"), "--metrics")
    assert read == record(1, lm_loss=None, grad_norm=None, learning_rate=1e-3)
    draw({"a run": [read, record(2, grad_norm=1.0, learning_rate=1e-3)]}, str(tmp_path / "m.svg"), [])
    assert (tmp_path / "m.svg").stat().st_size > 0


LINES = [json.dumps(record(iteration)) for iteration in range(1, 6)]


@pytest.mark.parametrize(
    "content, iteration, in_place, left, aside",
    [
        ("\n".join(LINES) + "\n", 2, True, LINES[:2], False),
        ("\n".join(LINES[:2]), 2, True, LINES[:2], False),  # the next record needs a line of its own
        ("\n".join([*LINES[:2], LINES[2][:9]]), 3, True, LINES[:2], False),
        (f"{LINES[0]}{LINES[1]}\n{LINES[2]}\n", 3, True, [LINES[2]], False),
        (LINES[0] + "\n\x00\x00\xff" + "\n", 3, True, LINES[:1], False),
        ("\n".join(LINES) + "\n", 2, False, LINES[:2], True),  # another run's, which went further
        ("\n".join(LINES) + "\n", 0, True, None, True),
        ('{"text": "a corpus"}\n', 0, False, None, True),
        ('{"text": "a corpus"}\n', 3, True, [], True),
    ],
)
def test_a_metrics_file_that_is_there(
    tmp_path: Path, content: str, iteration: int, in_place: bool, left: list[str] | None, aside: bool
) -> None:
    file = tmp_path / "m.jsonl"
    for name in ("m.jsonl", "m.jsonl.old"):
        (tmp_path / name).write_bytes(content.encode("latin-1") if name == "m.jsonl" else b"of an earlier run")
    trim_metrics(str(file), iteration, in_place)
    assert (file.read_text("utf-8").splitlines() if file.exists() else None) == left
    assert (tmp_path / "m.jsonl.old").read_bytes() == b"of an earlier run"
    assert (tmp_path / "m.jsonl.old.1").exists() == aside
    if aside:
        assert (tmp_path / "m.jsonl.old.1").read_bytes() == content.encode("latin-1")


def steps(folder: Path, name: str = "lm_loss") -> list[int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return [event.step for event in EventAccumulator(str(folder)).Reload().Scalars(name)]


def test_tensorboard_after_restarts(tmp_path: Path) -> None:
    for first, last in ((1, 5), (3, 6), (2, 4)):  # within one second, too
        log = TensorBoard(str(tmp_path), first)
        for iteration in range(first, last + 1):
            log.write(record(iteration, lm_loss=math.nan))
        log.close()
    assert steps(tmp_path) == [1, 2, 3, 4]
    for times in (1, 2):
        TensorBoard(str(tmp_path), 1).write(record(1))
        assert steps(tmp_path) == [1]
        assert steps(tmp_path / "old") == ([1, 2, 3, 4] if times == 1 else [1])
    assert steps(tmp_path / "old.old") == [1, 2, 3, 4]


class FakeWandb(types.ModuleType):
    """What of wandb is used: `history` is what the server would have, by the id of a run."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.history: dict[str, list[int]] = {}
        self.fault: Exception | None = None

    def init(self, *, id: str, resume: str, **_: Any) -> Any:
        assert resume == "allow"
        if self.fault is not None:
            raise self.fault
        steps = self.history.setdefault(id, [])

        def log(record: dict[str, Any], step: int, commit: bool) -> None:
            assert commit
            assert step > (steps[-1] if steps else 0), "wandb would drop it in silence"
            steps.append(step)

        return types.SimpleNamespace(log=log, finish=lambda: None, starting_step=steps[-1] + 1 if steps else 0)


def test_wandb_after_restarts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", wandb := FakeWandb())
    save = tmp_path / "save"
    config = parse(command(data_path="c", save=save, load=save, wandb_project="p"))
    for iteration, last in ((0, 5), (2, 8), (0, 2)):
        _, (_, log) = open_logs(config, "", iteration, True)
        for step in range(iteration + 1, last + 1):
            log.write(record(step))
        log.close()
    assert list(wandb.history.values()) == [[*range(1, 9)], [1, 2]]
    (identifier, last) = (save / "wandb-run.txt").read_text("utf-8").split()
    assert (identifier, int(last)) == (list(wandb.history)[1], 2)
    wandb.fault = RuntimeError("api_key not configured (no-tty).\ncall wandb.login()")
    with pytest.raises(RequestError, match=r"--wandb-project p: api_key not configured.*WANDB_MODE=offline"):
        open_logs(config, "", 0, True)


def test_settings_of_another_run_are_set_aside(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("lr: 1e-3  # mine", "utf-8")
    config = parse(command(data_path="c", save=tmp_path, load=tmp_path))
    for iteration, resolved in ((0, "first"), (0, "first"), (3, "continued")):
        open_logs(config, resolved, iteration, True)
    assert file.read_text("utf-8") == "continued"
    assert {path.name for path in tmp_path.iterdir()} == {"run.yaml", "run.yaml.old"}
    assert (tmp_path / "run.yaml.old").read_text("utf-8") == "lr: 1e-3  # mine"


def test_what_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    config = parse(command(data_path="c", metrics=tmp_path / "missing/m.jsonl"))
    with pytest.raises(RequestError, match=r"--metrics .*m\.jsonl: cannot be written: No such file"):
        open_logs(config, "", 0, True)


@pytest.mark.slow
def test_a_run_outlives_its_logs(tmp_path: Path) -> None:
    """Metrics on a full disk, and standard output closed."""
    flags = {"data_path": write_corpus(tmp_path / "c"), "save": tmp_path / "save", "log_interval": 1}
    words = [sys.executable, "-m", "pretrain", *command(**flags, train_iters=4, metrics="/dev/full")]
    done = subprocess.run(
        ["bash", "-c", '"$@" | head -1; exit ${PIPESTATUS[0]}', "bash", *words],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stderr.splitlines()) == [
        "--metrics /dev/full: 4 records were not written",
        "--metrics /dev/full: No space left on device; the run goes on, and what is missing is written when it can be",
        "standard output: Broken pipe; the program goes on without it",
    ]
    assert (tmp_path / "save/latest").read_text("utf-8") == "iter_0000004\n"
