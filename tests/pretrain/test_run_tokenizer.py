"""The tokenizer is part of a run: its checkpoints say which one, and another one is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.checkpoint import find_checkpoint, read_manifest
from megatron_ext.checkpoint.directory import MANIFEST
from pretrain.__main__ import main
from tests.distributed import Pool
from tests.pretrain.support import command, train, tree
from tests.tokenizer.extended import OLD, base_model, write_models
from tests.tokenizer.samples import as_tokenizer_json, write_jsonl
from tools import preprocess_data


def encode(folder: Path, tokenizer: str, prefix: str, *flags: str) -> None:
    words = ["--input", folder / "t.jsonl", "--tokenizer-model", folder / tokenizer, "--workers", 1]
    assert preprocess_data.main([*map(str, [*words, "--output-prefix", folder / prefix]), *flags]) == 0


def run(**flags: Any) -> list[str]:
    few = {"train_iters": 1, "lr_warmup_iters": 0, "num_layers": 1, "vocab_size": OLD, "global_batch_size": 2}
    return command(**few | flags)


def record(folder: Path) -> dict[str, Any]:
    noted = read_manifest(find_checkpoint(folder)).tokenizer
    assert noted is not None
    return noted


@pytest.fixture(scope="module")
def made(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of one size: `base`, `moved` (same/base.model in other words), `swapped` pieces, other `scores`, another
    `eos`; a tokenizer.json of `base`; corpora of each, and `bare` without a note; the checkpoint `ck` of `base`."""
    folder = tmp_path_factory.mktemp("made")
    write_models(folder)
    write_jsonl(folder / "t.jsonl", [f"{word} 一丁 " * 9 for word in ("hello", "to be", "or not", "你好")])
    other = base_model()
    other.trainer_spec.input.append("elsewhere.txt")
    (folder / "moved").mkdir()
    (folder / "moved" / "tokenizer.model").write_bytes(other.SerializeToString())
    other.pieces[400].piece, other.pieces[401].piece = other.pieces[401].piece, other.pieces[400].piece
    (folder / "swapped.model").write_bytes(other.SerializeToString())
    other = base_model()
    other.pieces[300].score = -999.0
    (folder / "scores.model").write_bytes(other.SerializeToString())
    other = base_model()
    other.trainer_spec.eos_id, other.trainer_spec.eos_piece = 1, "<s>"
    other.trainer_spec.bos_id = -1
    (folder / "eos.model").write_bytes(other.SerializeToString())
    (folder / "json").mkdir()
    (folder / "json" / "tokenizer.json").write_text(json.dumps(as_tokenizer_json(folder / "base.model")))
    encode(folder, "base.model", "c", "--append-eod", "--prepend-bos")
    encode(folder, "swapped.model", "s", "--append-eod")
    for suffix in (".bin", ".idx"):
        shutil.copyfile(folder / f"s{suffix}", folder / f"bare{suffix}")
    pool.run(train, 1, run(data_path=folder / "c", tokenizer_model=folder / "base.model", save=folder / "ck"))
    return folder


def test_a_checkpoint_says_which_tokenizer_and_carries_it_on(pool: Pool, made: Path, tmp_path: Path) -> None:
    noted = record(made / "ck")
    assert (noted["name"], noted["kind"], noted["vocab_size"]) == ("base.model", "SentencePiece", OLD)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "unk_token_id": 0, "pad_token_id": None, "prepend_bos": True}
    assert ids.items() <= noted.items()
    on = {"load": made / "ck", "train_iters": 2}
    for name, flags in {
        "nothing said": {"data_path": made / "c"},
        "data that say nothing": {"data_path": made / "bare"},
        "another file": {"data_path": made / "c", "tokenizer_model": made / "moved"},
        "another form": {"data_path": made / "c", "tokenizer_model": made / "json"},
    }.items():
        pool.run(train, 1, run(**on, **flags, save=tmp_path / name))
        again = record(tmp_path / name)
        assert {key: again[key] for key in ids} | {"vocab": again["vocabulary_sha256"]} == ids | {
            "vocab": noted["vocabulary_sha256"]
        }


def test_what_nobody_noted_is_noted_from_now_on(pool: Pool, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "ck", tmp_path / "old")
    manifest = find_checkpoint(tmp_path / "old") / MANIFEST
    fields = json.loads(manifest.read_text())
    del fields["tokenizer"]
    manifest.write_text(json.dumps(fields))
    on = {"load": tmp_path / "old", "train_iters": 2}
    printed = pool.run(train, 1, run(**on, data_path=made / "bare", save=tmp_path / "unknown"))[0]
    assert "tokenizer: not known" in printed
    assert read_manifest(find_checkpoint(tmp_path / "unknown")).tokenizer is None
    pool.run(train, 1, run(**on, data_path=made / "s", save=tmp_path / "known"))
    assert record(tmp_path / "known")["name"] == "swapped.model"
    assert record(tmp_path / "known")["prepend_bos"] is False


def test_another_on_purpose(pool: Pool, made: Path, tmp_path: Path) -> None:
    flags = {"data_path": made / "s", "tokenizer_model": made / "swapped.model", "finetune": True}
    pool.run(train, 1, run(**flags, load=made / "ck", change_tokenizer=True, save=tmp_path / "new"))
    assert record(tmp_path / "new")["vocabulary_sha256"] != record(made / "ck")["vocabulary_sha256"]


def wrong(made: Path) -> dict[str, dict[str, Any]]:
    """What is asked for, by a part of the answer."""
    swapped = {"data_path": made / "s", "tokenizer_model": made / "swapped.model", "load": made / "ck"}
    bare = {"data_path": made / "bare", "load": made / "ck"}
    trained = (
        f"is not the tokenizer that --load {made / 'ck'} was trained with (base.model, SentencePiece, {OLD} pieces"
    )
    return {
        f"--tokenizer-model {made / 'swapped.model'} {trained}": swapped,
        "has other pieces under the same ids; give that one": swapped | {"finetune": True},
        f"--data-path {made / 's'}: what made it {trained}": swapped | {"tokenizer_model": None},
        "cuts text by other rules": bare | {"tokenizer_model": made / "scores.model"},
        "has eos id 1 instead of 2": bare | {"tokenizer_model": made / "eos.model"},
        "is not the tokenizer of": {"data_path": [made / "c", made / "s"]},
        "add --finetune --change-tokenizer": swapped | {"finetune": True},
        "--change-tokenizer needs --load and --finetune": swapped | {"change_tokenizer": True},
        "--change-tokenizer needs --tokenizer-model": bare | {"change_tokenizer": True, "finetune": True},
        "already; leave out --change-tokenizer": bare
        | {"change_tokenizer": True, "finetune": True, "tokenizer_model": made / "base.model"},
        f"--base-tokenizer-model {made / 'swapped.model'} is not the tokenizer that": bare
        | {"finetune": True, "embedding_init": "mean", "vocab_size": None, "tokenizer_model": made / "longer.model"}
        | {"base_tokenizer_model": made / "swapped.model"},
    }


def test_another_is_refused_before_anything_starts(
    made: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    longer = base_model().FromString((made / "swapped.model").read_bytes())
    longer.pieces.add(piece="一龙", score=-5000.0)
    (made / "longer.model").write_bytes(longer.SerializeToString())
    for message, request in wrong(made).items():
        assert main(run(**({"save": "new/save"} | request))) == 2, message
        output, errors = capfd.readouterr()
        assert output == ""
        assert errors.startswith("error: ")
        assert errors.count("\n") == 1
        assert message in errors
        assert tree(tmp_path) == {}
