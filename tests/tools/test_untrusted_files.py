"""A stranger's checkpoint: no program runs what is put into it; it is refused by the name of what it asks for."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from pretrain.__main__ import main
from tests.distributed import Pool, RankError
from tests.malice import Deed, edit_metadata
from tests.pretrain.support import command, train, tree
from tests.pretrain.test_data import write_corpus
from tests.tools.test_convert_checkpoint import convert
from tests.tools.test_verify_checkpoint import verify

KEY = {"native": "model.norm.weight", "megatron-core": "decoder.final_layernorm.weight"}


@pytest.fixture(scope="module")
def made(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus `c`, and one model as `native` and as `megatron-core`."""
    folder = tmp_path_factory.mktemp("made")
    write_corpus(folder / "c")
    pool.run(train, 1, command(data_path=folder / "c", train_iters=1, lr_warmup_iters=0, save=folder / "native"))
    paths = ("--input", folder / "native", "--output", folder / "megatron-core", "--no-verify")
    assert convert("--from", "native", "--to", "megatron-core", *paths) == 0
    return folder


def _instead(checkpoint: Path, deed: Deed) -> None:
    edit_metadata(checkpoint, lambda _: deed)


def _beside(checkpoint: Path, deed: Deed) -> None:
    edit_metadata(checkpoint, lambda metadata: setattr(metadata, "planner_data", deed))


def _as_object(checkpoint: Path, deed: Deed) -> None:
    """A weight becomes an entry of bytes, which torch's own loader unpickles."""
    key = next(key for key in KEY.values() if key in _keys(checkpoint))

    def change(metadata: Any) -> None:
        metadata.state_dict_metadata[key] = BytesStorageMetadata()
        for index, info in metadata.storage_data.items():
            if index.fqn == key:
                object.__setattr__(index, "offset", None)
                with (checkpoint / info.relative_path).open("ab") as file:
                    info.offset = file.tell()
                    torch.save(deed, file)
                    info.length = file.tell() - info.offset

    edit_metadata(checkpoint, change)


def _in_a_piece(checkpoint: Path, deed: Deed) -> None:
    """The file in which a tensor lies holds something else."""
    key = next(key for key in KEY.values() if key in _keys(checkpoint))

    def change(metadata: Any) -> None:
        info = next(info for index, info in metadata.storage_data.items() if index.fqn == key)
        with (checkpoint / info.relative_path).open("ab") as file:
            info.offset = file.tell()
            torch.save({"weight": deed}, file)
            info.length = file.tell() - info.offset

    edit_metadata(checkpoint, change)


def _keys(checkpoint: Path) -> set[str]:
    keys: set[str] = set()
    edit_metadata(checkpoint, lambda metadata: keys.update(metadata.state_dict_metadata))
    return keys


def _seal(checkpoint: Path) -> None:
    """A native checkpoint's manifest is made to agree with what has become of its files."""
    file = checkpoint / "manifest.json"
    if file.is_file():
        sizes = {path.name: path.stat().st_size for path in checkpoint.iterdir() if path != file}
        file.write_text(json.dumps(json.loads(file.read_text()) | {"files": sizes, "sha256": {}}))


WAYS: dict[str, tuple[Callable[[Path, Deed], None], str]] = {
    "instead": (_instead, ".metadata cannot be read (it asks for posix.system, which"),
    "beside": (_beside, ".metadata cannot be read (it asks for posix.system, which"),
    "object": (_as_object, " stored as a pickled object and not as a tensor"),
    "piece": (_in_a_piece, "cannot be read (Weights only load failed"),
}


def programs(here: Path, form: str) -> dict[str, Callable[[], int]]:
    """The programs that read such a checkpoint."""
    convert_it = ("--from", form, "--to", "hf", "--input", here / form, "--output", here / "out", "--no-verify")
    vocabulary = ("--vocab-size", 100) if form == "megatron-core" else ()
    found: dict[str, Callable[[], int]] = {"convert": lambda: convert(*convert_it, *vocabulary)}
    if form == "native":
        found["verify"] = lambda: verify(here / form)
        resume = command(data_path=here / "c", load=here / form, save=here / form)
        found["resume"] = lambda: main(resume)
        found["finetune"] = lambda: main(command(data_path=here / "c", load=here / form, finetune=True))
    return found


@pytest.mark.parametrize("form", KEY)
@pytest.mark.parametrize("way", WAYS)
def test_nothing_runs(
    made: Path, tmp_path: Path, form: str, way: str, capfd: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    here, (spoil, reason) = Path(shutil.copytree(made, tmp_path / "here")), WAYS[way]
    checkpoint = here / form / ("iter_0000001" if form == "native" else "release")
    spoil(checkpoint, Deed(os.system, f"touch {tmp_path / 'mark'}"))
    _seal(checkpoint)
    before = tree(here)
    for program, start in programs(here, form).items():
        if way == "piece" and program in ("resume", "finetune"):
            continue  # refused as the ranks load it: test_a_piece_is_refused_by_the_rank
        code = start()
        output, errors = capfd.readouterr()
        assert code == (1 if program == "verify" else 2), (program, output, errors)
        assert reason in (output if program == "verify" else errors), program
        assert "Traceback" not in errors
        assert not (tmp_path / "mark").exists(), program
        assert tree(here) == before, program


def test_a_piece_is_refused_by_the_rank(pool: Pool, made: Path, tmp_path: Path) -> None:
    here = Path(shutil.copytree(made, tmp_path / "here"))
    _in_a_piece(here / "native" / "iter_0000001", Deed(os.system, f"touch {tmp_path / 'mark'}"))
    _seal(here / "native" / "iter_0000001")
    with pytest.raises(RankError, match=r"RequestError: --load .*: cannot be read \("):
        pool.run(train, 1, command(data_path=here / "c", load=here / "native", finetune=True))
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("function", [os.system, eval, shutil.rmtree])
def test_arguments_of_megatron_that_would_run(
    made: Path, tmp_path: Path, function: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    here = Path(shutil.copytree(made, tmp_path / "here"))
    file = here / "megatron-core" / "release" / "common.pt"
    common = torch.load(file, weights_only=False)
    common["args"].deed = Deed(function, f"touch {tmp_path / 'mark'}")
    torch.save(common, file)
    assert programs(here, "megatron-core")["convert"]() == 2
    name = {os.system: "posix.system", eval: "builtins.eval", shutil.rmtree: "shutil.rmtree"}[function]
    assert f"common.pt asks for {name}, which has no place in a run's arguments" in capsys.readouterr().err
    assert not (tmp_path / "mark").exists()
