"""The folder of a conversion: one process fills it, and it appears whole or not at all."""

import os
import pickle
import shutil
import signal
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.checkpoint import write
from megatron_ext.checkpoint.read import StoredPiece
from megatron_ext.errors import RequestError
from tests.tools.test_convert_checkpoint import convert, hf_model
from tests.weights import InMemory
from tools import convert_checkpoint, output_folder
from tools.conversion.formats import hf_folder
from tools.output_folder import appearing, check_new


def test_only_one_at_a_time_fills_a_folder(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with appearing(output) as folder:
        (folder / "file").write_text("first")
        with pytest.raises(RequestError, match="out: another conversion is writing it"), appearing(output):
            pass
        assert not output.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (output / "file").read_text() == "first"


def test_what_was_published_between_opening_and_locking_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, lock = tmp_path / "out", output_folder.fcntl.flock

    def lock_late(descriptor: int, operation: int) -> None:
        os.rename(tmp_path / ".out.tmp", output)  # as the process does that held the lock until now
        (output / "file").write_text("first")
        lock(descriptor, operation)

    monkeypatch.setattr(output_folder.fcntl, "flock", lock_late)
    with pytest.raises(RequestError, match="another conversion is writing it"), appearing(output):
        pass
    assert (output / "file").read_text() == "first"


@pytest.mark.parametrize("locks", [True, False])
def test_what_a_killed_run_left_is_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locks: bool) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(output_folder.errno.ENOTSUP, "Operation not supported")

    if not locks:
        monkeypatch.setattr(output_folder.fcntl, "flock", no_locks)
    (tmp_path / ".out.tmp" / "deep").mkdir(parents=True)
    (tmp_path / ".out.tmp" / "deep" / "stale").touch()
    (tmp_path / ".out.tmp" / "link").symlink_to(tmp_path)
    with appearing(tmp_path / "out") as folder:
        assert list(folder.iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    output, theirs = tmp_path / "out", tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "file").touch()
    with pytest.raises(RequestError, match=r"out: cannot be written \(.*not empty"), appearing(output):
        theirs.rename(output)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "file"]


def test_names_that_cannot_be_made_are_refused(tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    refused = {
        "dangling": "exists already",
        "loop": "exists already",
        "loop/out": "is not a directory",
        "no/out": "is not a directory",
        "x" * 300: "File name too long",
        "x" * 252: "File name too long",  # the temporary name is longer
        "x" * 300 + "/out": "File name too long|is not a directory",
    }
    for name, message in refused.items():
        with pytest.raises(RequestError, match=message):
            check_new(tmp_path / name)
    check_new(tmp_path / "new")


def test_too_little_room_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hf_model(tmp_path / "hf")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert convert("--from", "hf", "--to", "native", "--input", tmp_path / "hf", "--output", tmp_path / "out") == 2
    assert f"--output {tmp_path / 'out'}: needs 407kB, and 1.00kB are free on its disk" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("target", ["hf", "native"])
def test_a_full_disk_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], target: str
) -> None:
    hf_model(tmp_path / "hf")

    def full(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf_folder, "write_safetensors", full)
    monkeypatch.setattr(write.torch, "save", full)
    capsys.readouterr()
    names = ("--input", tmp_path / "hf", "--output", tmp_path / "out", "--dtype", "bfloat16")
    assert convert("--from", "hf", "--to", target, *names) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: --output {tmp_path / 'out'}: cannot be written (")
    assert "No space left on device" in line
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A process that was started in the background ignores SIGINT; as if in the foreground."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("target", ["hf", "native"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_conversion_leaves_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    target: str,
    number: signal.Signals,
) -> None:
    hf_model(tmp_path / "hf")
    monkeypatch.setattr(hf_folder, "write_safetensors", lambda *_: signal.raise_signal(number))
    monkeypatch.setattr(write.torch, "save", lambda *_: signal.raise_signal(number))
    capsys.readouterr()
    names = ("--input", str(tmp_path / "hf"), "--output", str(tmp_path / "out"), "--dtype", "bfloat16")
    assert convert_checkpoint.main(["--from", "hf", "--to", target, *names]) == 130
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == "interrupted: nothing was written"
    assert not [line for line in lines if line.startswith(("error", "Traceback"))]
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_an_interrupt_within_a_write_of_torch_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.save closes its archive on the way out, which may fail in turn."""

    def interrupted(*_: Any) -> None:
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("unexpected pos 64 vs 0")

    monkeypatch.setattr(write.torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write.write_weights(tmp_path, InMemory({"w": torch.ones(2)}))


def test_advice_to_trust_a_damaged_piece_is_not_repeated(tmp_path: Path) -> None:
    file = tmp_path / "piece"
    torch.save(torch.ones(3), file)
    with zipfile.ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, pickle.dumps(os.getcwd, 2) if name.endswith("data.pkl") else content)
    with pytest.raises(RequestError, match="damaged, w cannot be read") as raised:
        StoredPiece(file, 0, file.stat().st_size, "w")
    assert "weights_only" not in str(raised.value)
