"""Files of torch.save, read without loading them: the same values, in little memory, and a clear word about others."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_ext.errors import RequestError
from tools.conversion.formats.torch_files import TorchFiles

FILE = "pytorch_model.bin"


def some_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    base = torch.randn(10, 6)
    return {
        "float": torch.randn(7, 5),
        "half": torch.randn(4, 3, 2).half(),
        "brain": torch.randn(9, 8).bfloat16(),
        "vector": torch.randn(11, dtype=torch.float64),
        "counts": torch.arange(5),
        "later rows": base[4:],
        "parameter": torch.nn.Parameter(torch.randn(3, 3)),
        "no rows": torch.empty(0, 4),
        "one": base,
        "same": base,
    }


def test_values_are_those_of_torch_load(tmp_path: Path) -> None:
    torch.save(some_tensors(), tmp_path / FILE)
    expected = torch.load(tmp_path / FILE, weights_only=True)
    files = TorchFiles(tmp_path, [FILE])
    assert list(files.shapes) == list(expected)
    for name, tensor in expected.items():
        assert (files.shapes[name], files.dtypes[name]) == (tensor.shape, tensor.dtype)
        for start in range(len(tensor) + 1):
            for stop in range(start, len(tensor) + 1):
                rows = files.read_rows(name, start, stop)
                assert rows.dtype == tensor.dtype
                assert torch.equal(rows, tensor[start:stop])


def test_tied_tensors_are_known(tmp_path: Path) -> None:
    torch.save(some_tensors() | {"copy": some_tensors()["one"].clone()}, tmp_path / FILE)
    files = TorchFiles(tmp_path, [FILE])
    assert files.same_place("one", "same")
    assert not files.same_place("one", "copy")
    assert not files.same_place("one", "later rows")


def test_folder_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, vocab_size=97))
    whole, sharded = tmp_path / "whole", tmp_path / "sharded"
    write_bin_folder(whole, [model.state_dict()])
    names = list(model.state_dict())
    halves = [{name: model.state_dict()[name] for name in part} for part in (names[:9], names[9:])]
    write_bin_folder(sharded, halves)
    # the folders are what transformers takes such folders to be
    model.config.architectures = ["LlamaForCausalLM"]
    for folder in (whole, sharded):
        model.config.save_pretrained(folder)
        theirs = transformers.LlamaForCausalLM.from_pretrained(folder, use_safetensors=False).state_dict()
        ours = TorchFiles.open_folder(folder)
        assert ours.shapes.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert torch.equal(ours.read_rows(name, 0, len(tensor)), tensor)
    assert set(TorchFiles.open_folder(sharded).files.values()) == {
        "pytorch_model-00001-of-00002.bin",
        "pytorch_model-00002-of-00002.bin",
    }


def write_bin_folder(folder: Path, shards: list[dict[str, torch.Tensor]]) -> None:
    folder.mkdir()
    if len(shards) == 1:
        torch.save(shards[0], folder / FILE)
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"pytorch_model-{number:05d}-of-{len(shards):05d}.bin"
        torch.save(shard, folder / file)
        weight_map |= dict.fromkeys(shard, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


class Unknown:
    pass


def _legacy(path: Path) -> None:
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)


def _truncated(path: Path) -> None:
    torch.save({"a": torch.ones(2000)}, path)
    path.write_bytes(path.read_bytes()[:-1000])


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "is missing"),
    "legacy": (_legacy, "was saved as torch did before 1.6, which is not read: torch.load it and torch.save it again"),
    "truncated": (_truncated, "is not a whole file of torch.save"),
    "empty": (lambda path: path.write_bytes(b""), "is no file of torch.save"),
    "pointer of git-lfs": (lambda path: path.write_text("version https://git-lfs"), "is no file of torch.save"),
    "another archive": (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(100)), "is not a whole file of torch.save"),
    "a folder": (lambda path: path.mkdir(), "is not a whole file of torch.save"),
    "one tensor": (lambda path: torch.save(torch.ones(2), path), "something else than a dictionary of tensors"),
    "numbers": (lambda path: torch.save({"a": torch.ones(2), "step": 7}, path), "something else than a dictionary"),
    "objects": (lambda path: torch.save({"a": Unknown()}, path), "something else than a dictionary of tensors"),
    "columns first": (lambda path: torch.save({"a": torch.ones(2, 3).t()}, path), "the rows of a in"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_other_files_are_refused(tmp_path: Path, case: str) -> None:
    make, reason = BROKEN[case]
    make(tmp_path / FILE)
    with pytest.raises(RequestError) as refusal:
        TorchFiles.open_folder(tmp_path)
    message = str(refusal.value)
    assert message.startswith(f"--input {tmp_path}: ")
    assert FILE in message
    assert reason in message
    assert "\n" not in message


def test_a_file_that_shrinks_is_noticed(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(5000)}, tmp_path / FILE)
    files = TorchFiles(tmp_path, [FILE])
    (tmp_path / FILE).write_bytes((tmp_path / FILE).read_bytes()[:9000])
    with pytest.raises(RequestError, match="it ends within a"):
        files.read_rows("a", 0, 5000)


def _edit_index(folder: Path, **places: str) -> None:
    index = folder / "pytorch_model.bin.index.json"
    content = json.loads(index.read_text())
    index.write_text(json.dumps(content | {"weight_map": content["weight_map"] | places}))


INDEXES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (lambda folder: (folder / "pytorch_model-00002-of-00002.bin").unlink(), "of-00002.bin is missing"),
    "missing tensor": (
        lambda folder: _edit_index(folder, c="pytorch_model-00001-of-00002.bin"),
        "says that c is in pytorch_model-00001-of-00002.bin, which lacks it",
    ),
    "wrong file": (
        lambda folder: _edit_index(folder, b="pytorch_model-00001-of-00002.bin"),
        "says that b is in pytorch_model-00001-of-00002.bin, which lacks it",
    ),
    "twice": (
        lambda folder: torch.save(
            {"a": torch.ones(2), "b": torch.ones(2)}, folder / "pytorch_model-00002-of-00002.bin"
        ),
        "a is both in pytorch_model-00001-of-00002.bin and in pytorch_model-00002-of-00002.bin",
    ),
    "no JSON": (lambda folder: (folder / "pytorch_model.bin.index.json").write_text("{"), "index.json cannot be read"),
    "no map": (lambda folder: (folder / "pytorch_model.bin.index.json").write_text("[]"), "index.json cannot be read"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_wrong_indexes_are_refused(tmp_path: Path, case: str) -> None:
    folder = tmp_path / "model"
    write_bin_folder(folder, [{"a": torch.ones(2)}, {"b": torch.ones(2)}])
    spoil, reason = INDEXES[case]
    spoil(folder)
    with pytest.raises(RequestError) as refusal:
        TorchFiles.open_folder(folder)
    assert str(refusal.value).startswith(f"--input {folder}: ")
    assert reason in str(refusal.value)
    assert "\n" not in str(refusal.value)


READ_ALL = """
import sys
from pathlib import Path
from megatron_ext.checkpoint.write import row_pieces
from tools.conversion.formats.torch_files import TorchFiles

def mebibytes(field):
    # getrusage's peak would be the parent's, where that is higher
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) >> 10

Path("/proc/self/clear_refs").write_text("5")  # the peak is what is held now
before = mebibytes("VmRSS")
files = TorchFiles(Path(sys.argv[1]), ["pytorch_model.bin"])
for name in files.shapes:
    for rows in row_pieces(files, name):
        files.read_rows(name, *rows).sum()
print(mebibytes("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures memory as Linux tells it")
@pytest.mark.slow
def test_memory_is_that_of_a_piece(tmp_path: Path) -> None:
    """A file of ten pieces of 40 MiB is read with less than two of them in memory."""
    torch.save({"first": torch.ones(24576, 2048), "second": torch.ones(24576, 2048)}, tmp_path / FILE)
    command = [sys.executable, "-c", READ_ALL, str(tmp_path)]
    repository = Path(__file__).parents[2]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=repository)
    (tmp_path / FILE).unlink()
    assert 40 <= int(run.stdout) < 2 * 40, run.stdout
