"""The texts, the two tokenizers, and tokens for training and for measuring."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import sentencepiece
import torch

from tokenizer.text.documents import read_documents

_HELD_OUT_EVERY = 10

Documents = list[list[str]]  # of every file


@dataclasses.dataclass(frozen=True)
class Text:
    """One language's documents, those to train on and those kept for measuring."""

    train: Documents
    held_out: Documents


def read_text(files: list[Path]) -> Text:
    """Every tenth document of every file is held out."""
    text = Text([], [])
    for file in files:
        documents = list(read_documents([file], "text", lambda _: None))
        text.held_out.append(documents[_HELD_OUT_EVERY - 1 :: _HELD_OUT_EVERY])
        text.train.append([d for i, d in enumerate(documents) if i % _HELD_OUT_EVERY != _HELD_OUT_EVERY - 1])
    return text


def sample(documents: Documents, characters: int) -> list[str]:
    """`characters` in all, the same number of each file: its first documents, the last one cut."""
    taken = []
    for of_file in documents:
        left = characters // len(documents)
        for document in of_file:
            if left <= 0:
                break
            taken.append(document[:left])
            left -= len(taken[-1])
    return taken


def mixed(english: Text, chinese: Text, share: float) -> list[str]:
    """All the English to train on, and as much Chinese as makes `share` of the characters of both."""
    all_english = flat(english.train)
    wanted = share / (1 - share) * sum(map(len, all_english))
    return all_english + sample(chinese.train, int(wanted))


def flat(documents: Documents) -> list[str]:
    return [document for of_file in documents for document in of_file]


def make_tokenizers(folder: Path, english: Text, chinese: Text, share: float, base_size: int, extra_size: int) -> None:
    """folder/base.model: BPE over English with a `share` of Chinese characters; folder/expanded: base + Chinese."""
    (folder / "base.txt").write_text("\n".join(mixed(english, chinese, share)), encoding="utf-8")
    (folder / "chinese.txt").write_text("\n".join(flat(chinese.train)), encoding="utf-8")
    for name, kind, size in (("base", "bpe", base_size), ("chinese", "unigram", extra_size)):
        _run("train", "--input", folder / f"{name}.txt", "--model-type", kind, "--vocab-size", size,
             "--character-coverage", 0.98, "--output", folder / f"{name}.model", "--quiet", "--overwrite")  # fmt: skip
    _run("merge", "--base", folder / "base.model", "--extra", folder / "chinese.model", "--output", folder / "expanded")


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
