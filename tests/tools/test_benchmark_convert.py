"""The benchmark of conversions at a small size: it measures what it says, and refuses what it cannot make."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import convert
from benchmarks.peak import measure
from megatron_ext.errors import RequestError


@pytest.mark.slow
def test_figures_of_a_small_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    code = convert.main(["--gigabytes", "0.05", "--no-peer", "--work-dir", str(tmp_path), "--json", str(file)])
    assert list(tmp_path.iterdir()) == [file]
    figures = json.loads(file.read_text())
    assert figures["bytes"] == pytest.approx(0.05e9, rel=0.1)
    assert figures["largest_tensor"] == 2 * 8000 * 512
    assert code == (0 if all(row["holds"] for row in figures["ways"]) else 1)
    printed = capsys.readouterr().out
    for row in figures["ways"]:
        assert row["name"] in printed
        assert row["holds"] == (row["peak"] <= row["bound"])
        assert figures["bytes"] < row["peak"] < 2e9  # torch alone is more than the model
    assert len(figures["ways"]) == 4


def test_peak_is_the_commands_own() -> None:
    held = bytearray(300 << 20)  # resident here, and not to be counted there
    small = measure([sys.executable, "-c", ""])
    large = measure([sys.executable, "-c", "x = bytearray(100 << 20); x[::4096] = x[::4096]"])
    assert len(held) > small.peak
    assert 90 << 20 < large.peak - small.peak < 110 << 20
    with pytest.raises(RequestError, match=r"exit code 3 \(no disk\)"):
        measure([sys.executable, "-c", "import sys; print('no disk', file=sys.stderr); sys.exit(3)"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--gigabytes", "0.001"], "--gigabytes 0.001: too small"),
        (["--runs", "0"], "--runs 0: must be at least 1"),
        (["--work-dir", "/nowhere/at/all"], "--work-dir /nowhere/at/all: no such directory"),
    ],
)
def test_wrong_requests(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert.main(arguments) == 2
    assert message in capsys.readouterr().err
