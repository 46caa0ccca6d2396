"""The texts, the two tokenizers, and tokens for training and for measuring."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import sentencepiece
import torch

from tokenizer.files import read_documents

_HELD_OUT_EVERY = 10


@dataclasses.dataclass(frozen=True)
class Text:
    """Documents of one language, those to train on and those kept for measuring."""

    train: list[str]
    held_out: list[str]


def read_text(files: list[Path]) -> Text:
    """Every tenth document of every file is held out."""
    train: list[str] = []
    held_out: list[str] = []
    for file in files:
        for number, document in enumerate(read_documents([file], "text", lambda _: None)):
            if document.strip():
                (held_out if number % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1 else train).append(document)
    return Text(train, held_out)


def make_tokenizers(folder: Path, english: Text, chinese: Text, share: float, base_size: int, extra_size: int) -> None:
    """folder/base.model: BPE over English with a `share` of Chinese characters; folder/expanded: base + Chinese."""
    (folder / "base.txt").write_text("\n".join([*english.train, *mixed_in(english, chinese, share)]), encoding="utf-8")
    (folder / "chinese.txt").write_text("\n".join(chinese.train), encoding="utf-8")
    for name, kind, size in (("base", "bpe", base_size), ("chinese", "unigram", extra_size)):
        _run("train", "--input", folder / f"{name}.txt", "--model-type", kind, "--vocab-size", size,
             "--character-coverage", 0.98, "--output", folder / f"{name}.model", "--quiet")  # fmt: skip
    _run("merge", "--base", folder / "base.model", "--extra", folder / "chinese.model", "--output", folder / "expanded")


def mixed_in(english: Text, chinese: Text, share: float) -> list[str]:
    """The first Chinese documents, as many as make up `share` of the characters of both."""
    wanted = share / (1 - share) * sum(map(len, english.train))
    taken: list[str] = []
    for document in chinese.train:
        if sum(map(len, taken)) >= wanted:
            break
        taken.append(document)
    return taken


def _run(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "tokenizer", *map(str, words)], check=True, stdout=subprocess.DEVNULL)


def encode(model: Path, documents: list[str], seed: int | None = None) -> torch.Tensor:
    """All documents as one row of ids, each between <s> and </s>; shuffled with a seed."""
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(model))
    if seed is not None:
        order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
        documents = [documents[i] for i in order]
    ids = tokenizer.encode(documents, add_bos=True, add_eos=True)
    return torch.tensor([i for document in ids for i in document])


def vocabulary(model: Path) -> int:
    """Pieces of a model."""
    return sentencepiece.SentencePieceProcessor(model_file=str(model)).vocab_size()


def first_characters(documents: list[str], count: int) -> list[str]:
    """Whole documents from the start of the list, the last one cut, `count` characters in all."""
    taken: list[str] = []
    for document in documents:
        if count <= 0:
            break
        taken.append(document[:count])
        count -= len(taken[-1])
    return taken
