"""Safetensors files read and written in pieces, against the format's own library."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ext.checkpoint import write
from megatron_ext.errors import RequestError
from tools.conversion.formats.safetensors_file import INDEX, SINGLE, SafetensorsFiles, write_safetensors

TENSORS = {
    "a": torch.randn(7, 5).bfloat16(),
    "b": torch.randn(11),
    "c": torch.arange(3),
    "d": torch.randn(4, 2, 3).half(),
    "e": torch.ones(3, 1, dtype=torch.bool),
}


def refusal(folder: Path, *files: str) -> str:
    with pytest.raises(RequestError) as error:
        SafetensorsFiles(folder, list(files)) if files else SafetensorsFiles.open_folder(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_reads_any_rows_of_what_the_library_writes(tmp_path: Path) -> None:
    save_file(TENSORS | {"scalar": torch.tensor(1.0)}, tmp_path / SINGLE)
    weights = SafetensorsFiles.open_folder(tmp_path)
    for name, tensor in TENSORS.items():
        assert (weights.shapes[name], weights.dtypes[name]) == (tensor.shape, tensor.dtype)
        for start, stop in ((0, len(tensor)), (1, 3), (2, 2)):
            assert torch.equal(weights.read_rows(name, start, stop), tensor[start:stop])


def test_the_library_reads_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "_PIECE_BYTES", 16)  # pieces of a few rows, the last one shorter
    save_file(TENSORS, tmp_path / SINGLE)
    write_safetensors(tmp_path / "copy.safetensors", SafetensorsFiles.open_folder(tmp_path), ["e", "d", "a", "b"])
    copy = load_file(tmp_path / "copy.safetensors")
    assert copy.keys() == {"a", "b", "d", "e"}
    for name, tensor in copy.items():
        assert torch.equal(tensor, TENSORS[name])


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "is not a whole safetensors file (Expecting value"),
        (b"version https://git-lfs.github.com/spec/v1", "is not a whole safetensors file (Expecting value"),
        ((2).to_bytes(8, "little") + b"[]", "its header is no table"),
        ((13).to_bytes(8, "little") + b'{"a":{"x":1}}', "its header says of a: {'x': 1}"),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    assert f"--input {tmp_path}: x.safetensors" in refusal(tmp_path, "x.safetensors")
    assert reason in refusal(tmp_path, "x.safetensors")


def test_files_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / SINGLE)
    whole = (tmp_path / SINGLE).read_bytes()
    for content in (whole[:-3], whole + b"12"):
        (tmp_path / "x.safetensors").write_bytes(content)
        assert f"it has {len(content)} bytes, its header asks for {len(whole)}" in refusal(tmp_path, "x.safetensors")
    (tmp_path / "x.safetensors").write_bytes(whole)
    assert "is both in model.safetensors and in x.safetensors" in refusal(tmp_path, SINGLE, "x.safetensors")
    assert "y.safetensors is missing" in refusal(tmp_path, "y.safetensors")


def test_fp8_is_refused_by_name(tmp_path: Path) -> None:
    save_file({"q": torch.ones(3, 3).to(torch.float8_e4m3fn)}, tmp_path / SINGLE)
    assert "q in model.safetensors is stored as F8_E4M3, which cannot be converted; F64, F32, BF16, F16 can" in refusal(
        tmp_path
    )


PART = "part.safetensors"


@pytest.mark.parametrize(
    "index, reason",
    [
        ({"weight_map": {"a": PART, "z": PART}}, f"{INDEX} says that z is in {PART}, which lacks it"),
        ({"weight_map": {"a": "gone.safetensors"}}, "gone.safetensors is missing"),
        ({"weight_map": []}, f"{INDEX} cannot be read"),
        ({}, f"{INDEX} cannot be read"),
    ],
)
def test_an_index_that_is_wrong_is_refused(tmp_path: Path, index: dict[str, object], reason: str) -> None:
    save_file(TENSORS, tmp_path / PART)
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert reason in refusal(tmp_path)
