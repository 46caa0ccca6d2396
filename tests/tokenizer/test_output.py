"""A program whose output is lost goes on; what it prints does not depend on the locale."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
from tokenizer.output import begin_in_utf8, keep_streams_open, output_is_incomplete
begin_in_utf8()
keep_streams_open(tell_closed=True)
for _ in range(20_000):
    print("中文")
    print("中文", file=sys.stderr)
sys.exit(3 + output_is_incomplete())
"""


@pytest.mark.parametrize(
    "redirection, code, said",
    [
        ("2>err | head -1 >/dev/null", 3, 1),
        ("2>err >/dev/full", 4, 1),
        ("2>&1 >/dev/null | head -1 >err", 3, 0),
        ("2>err >&-", 3, 0),
        (">&- 2>&- <&-", 3, 0),
    ],
)
@pytest.mark.parametrize("unbuffered", ["", "-u"])
def test_output_that_is_lost(tmp_path: Path, redirection: str, code: int, said: int, unbuffered: str) -> None:
    (tmp_path / "program.py").write_text(PROGRAM, "utf-8")
    line = f"PYTHONPATH={ROOT} {sys.executable} {unbuffered} program.py {redirection}"
    result = subprocess.run(["bash", "-c", f"{line}; exit ${{PIPESTATUS[0]}}"], cwd=tmp_path, check=False)
    assert result.returncode == code
    if (tmp_path / "err").exists():
        errors = (tmp_path / "err").read_text("utf-8").splitlines()
        assert sum("the program goes on without it" in line for line in errors) == said
        assert set(errors) - {"中文"} == {line for line in errors if "goes on without it" in line}


@pytest.mark.parametrize("encoding, expected", [("ascii", b"\\u4e2d\\u6587"), ("gb18030", "中文".encode("gb18030"))])
def test_a_terminal_of_another_encoding(tmp_path: Path, encoding: str, expected: bytes) -> None:
    (tmp_path / "program.py").write_text(PROGRAM, "utf-8")
    environment = {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding}
    result = subprocess.run([sys.executable, "program.py"], cwd=tmp_path, env=environment, capture_output=True)
    assert result.returncode == 3
    assert result.stdout.splitlines()[0] == result.stderr.splitlines()[0] == expected
