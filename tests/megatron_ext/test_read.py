"""Reading rows of a checkpoint's weights in one process, whatever pieces they are stored in."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_ext.checkpoint import write
from megatron_ext.checkpoint.read import WeightReader
from megatron_ext.errors import RequestError
from tests.weights import InMemory

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


def test_any_rows_are_read_from_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "_PIECE_BYTES", 3 * 4 * 4)
    tensors = {"a": torch.randn(10, 4), "b": torch.randn(7), "c": torch.randn(5, 6).bfloat16()}
    write.write_weights(tmp_path, InMemory(tensors))
    reader = WeightReader(tmp_path, check_values=True)
    for name, tensor in tensors.items():
        for start in range(len(tensor) + 1):
            for stop in range(start, len(tensor) + 1):
                assert torch.equal(reader.read_rows(name, start, stop), tensor[start:stop])


def test_what_torch_stored_in_another_order_is_read_too(tmp_path: Path) -> None:
    turned = torch.randn(6, 8).T
    dcp.save({"model.a": turned}, checkpoint_id=tmp_path, no_dist=True)
    assert torch.equal(WeightReader(tmp_path).read_rows("a", 2, 5), turned[2:5])


@pytest.mark.parametrize(
    "content",
    [b"\x00" * 100, pickle.dumps(["another"]), pickle.dumps(Metadata({"model.a": TensorStorageMetadata(1, 2, 3)}))],
    ids=("no pickle", "another pickle", "other fields"),
)
def test_damaged_metadata_is_one_line(tmp_path: Path, content: bytes) -> None:
    write.write_weights(tmp_path, InMemory({"a": torch.zeros(4)}))
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(RequestError) as error:
        WeightReader(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}/.metadata cannot be read (")
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_rows_of_a_large_piece_take_no_more_memory_than_they_are(tmp_path: Path) -> None:
    """A rank stores its part of a tensor as one piece, however large."""
    dcp.save({"model.a": torch.zeros(1 << 14, 1 << 12)}, checkpoint_id=tmp_path, no_dist=True)  # 256 MiB
    command = [sys.executable, "-c", READ_TEN_ROWS, str(tmp_path)]
    grown = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert int(grown.stdout) < 16 << 10, "KiB"


READ_TEN_ROWS = """
import sys
from pathlib import Path
from megatron_ext.checkpoint.read import WeightReader
reader = WeightReader(Path(sys.argv[1]))
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
reader.read_rows("a", 9990, 10000)
print(peak() - before)
"""
