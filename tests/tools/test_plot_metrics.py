import json
from pathlib import Path

import pytest

from tools import plot_metrics
from tools.command import run


def plot(*arguments: object) -> int:
    return run(plot_metrics.build_parser(), plot_metrics.work, [str(word) for word in arguments])


def test_a_curve_becomes_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    record = {"lm_loss": 2.0, "grad_norm": 1.0, "learning_rate": 0.1}
    lines = [json.dumps({"iteration": i, **record} | ({"valid_loss": 2.5} if i == 3 else {})) for i in range(1, 6)]
    (tmp_path / "run.jsonl").write_text("\n".join(lines) + "\n")
    assert plot("--metrics", tmp_path / "run.jsonl", "--output", tmp_path / "loss.png", "--mark", 3) == 0
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("content", ["", "not json\n", '{"loss": 1}\n'])
def test_what_is_no_metrics_file_is_refused(tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.jsonl").write_text(content)
    assert plot("--metrics", tmp_path / "run.jsonl", "--output", tmp_path / "loss.png") == 2
    assert "run.jsonl: not a metrics file" in capsys.readouterr().err
    assert not (tmp_path / "loss.png").exists()
