"""Text to token ids: the tokenizer, one chunk, and many chunks in several processes."""

import array
import multiprocessing
import os
import queue
import signal
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_ext.errors import RequestError
from tokenizer.errors import TokenizerError
from tokenizer.formats.interface import Tokenizer
from tokenizer.formats.load import open_tokenizer
from tokenizer.text.file import decode, json_text
from tools.preprocessing.documents import Chunk

# what of a text does not come into a dataset, as the sidecar names it -> as the last line says it
SKIPPED = {
    "empty_documents_skipped": "empty skipped",
    "documents_without_tokens_skipped": "without tokens skipped",
    "blank_lines_skipped": "blank lines skipped",
    "unknown_characters": "characters unknown to the tokenizer",
    "removed_characters": "characters removed by its normalization",
}
_IN_FLIGHT = 2  # chunks that wait at each worker: enough to keep it busy, few enough to bound the memory


class Encoder(Tokenizer):
    """A tokenizer, and how its tokens are stored."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of a token on disk, chosen as megatron-core does."""
        return np.dtype(np.uint16 if self.vocab_size < 65500 else np.int32)


class LostCharacters:
    """Counts characters that a tokenizer does not know and those that its normalization removes.

    Each character is tried once, between two letters: so that one which becomes a space is not taken for removed.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._encode, self._unknown_id = tokenizer.encode, tokenizer.unk_id
        self._around = self._encode("aa")
        self._seen: set[str] = set()
        self._unknown: set[str] = set()
        self._removed: set[str] = set()

    def count(self, text: str) -> tuple[int, int]:
        """Count characters of `text` that are unknown, and that are removed."""
        letters = set(text)
        for letter in letters - self._seen:
            if self._unknown_id is not None and self._unknown_id in self._encode(letter):
                self._unknown.add(letter)
            elif self._encode(f"a{letter}a") == self._around:
                self._removed.add(letter)
        self._seen |= letters
        return tuple(sum(map(text.count, letters & kind)) for kind in (self._unknown, self._removed))  # type: ignore[return-value]


@dataclass(frozen=True)
class Recipe:
    """All a worker needs to know; small, so that it can be sent to one."""

    tokenizer: str
    json_keys: tuple[str, ...]
    prepend_bos: bool
    append_eod: bool


@dataclass(frozen=True)
class Encoded:
    """The documents of a chunk.

    Attributes:
        tokens: all ids one after the other, as bytes of `Encoder.dtype`.
        lengths: int32, tokens of each document that was kept.
        max_id: largest id, -1 when nothing was kept.
        counts: `text_bytes` of UTF-8 in the kept documents, and the `SKIPPED`.
        consumed: as `Chunk.consumed`.
    """

    tokens: bytes
    lengths: array.array
    max_id: int
    counts: Counter[str]
    consumed: int


def open_encoder(name: str) -> Encoder:
    """Open the tokenizer of `--tokenizer-model`; errors as `open_tokenizer`."""
    return Encoder(**vars(open_tokenizer("--tokenizer-model", name)))


def encode_chunk(chunk: Chunk, encoder: Encoder, lost: LostCharacters, recipe: Recipe) -> Encoded:
    """Encode the documents of a chunk; each is kept whole. lost: of the encoder, kept from chunk to chunk.

    Raises:
        TokenizerError: a document cannot be decoded; the message says file:line.
        RequestError: a document is too long for the format.
    """
    tokens, lengths, max_id = [], array.array("i"), -1
    counts: Counter[str] = Counter()
    before = [encoder.bos_id] if recipe.prepend_bos else []
    after = [encoder.eos_id] if recipe.append_eod else []
    for line, document in enumerate(chunk.documents, start=chunk.first):
        if chunk.json_lines and not document.strip():
            counts["blank_lines_skipped"] += 1
            continue  # a blank line between two JSON lines is no document
        where = f"{chunk.name}:{line}" if chunk.json_lines else chunk.name
        if chunk.json_lines:
            text = json_text(document, f"--input {where}", recipe.json_keys, "--json-keys")
        else:
            text = decode(document, f"--input {where}")
        if not text.strip():
            counts["empty_documents_skipped"] += 1
            continue
        unknown, removed = lost.count(text)
        counts["unknown_characters"] += unknown
        counts["removed_characters"] += removed
        encoded = encoder.encode(text)
        if not encoded:
            counts["documents_without_tokens_skipped"] += 1
            continue
        ids = np.array([*before, *encoded, *after], dtype=encoder.dtype)
        if len(ids) >= 2**31:
            raise RequestError(f"{where}: a document of {len(ids)} tokens; the format's limit is 2**31 - 1")
        tokens.append(ids.tobytes())
        lengths.append(len(ids))
        max_id = max(max_id, int(ids.max()))
        counts["text_bytes"] += len(text.encode())
    return Encoded(b"".join(tokens), lengths, max_id, counts, chunk.consumed)


def encode_all(chunks: Iterator[Chunk], encoder: Encoder, recipe: Recipe, workers: int) -> Iterator[Encoded]:
    """Encode chunks in `workers` processes (1: in this one), in the order given whatever their number.

    Raises:
        TokenizerError, RequestError: as `encode_chunk`; a worker died.
    """
    if workers == 1:
        lost = LostCharacters(encoder)
        yield from (encode_chunk(chunk, encoder, lost, recipe) for chunk in chunks)
        return
    pool = [_Worker(recipe) for _ in range(workers)]
    try:
        # Chunk i goes to worker i modulo N and its answer is fetched from there: order without reordering.
        waiting: deque[_Worker] = deque()
        for number, chunk in enumerate(chunks):
            if len(waiting) == workers * _IN_FLIGHT:
                yield waiting.popleft().fetch()
            pool[number % workers].give(chunk)
            waiting.append(pool[number % workers])
        while waiting:
            yield waiting.popleft().fetch()
    finally:
        for worker in pool:
            worker.stop()


class _Worker:
    """A process with a queue in and a queue out."""

    def __init__(self, recipe: Recipe) -> None:
        self._chunks: Any = multiprocessing.Queue()
        self._answers: Any = multiprocessing.Queue()
        arguments = (self._chunks, self._answers, recipe, os.getpid())
        self._process = multiprocessing.Process(target=_work, args=arguments, daemon=True)
        self._process.start()

    def give(self, chunk: Chunk) -> None:
        self._chunks.put(chunk)

    def fetch(self) -> Encoded:
        while True:
            try:
                answer = self._answers.get(timeout=1)
            except queue.Empty:
                if not self._process.is_alive():
                    raise RequestError("a worker process died (out of memory?); try fewer --workers") from None
                continue
            if isinstance(answer, str):
                raise RequestError(answer)
            return answer

    def stop(self) -> None:
        self._process.kill()  # SIGTERM could meet the handler inherited from the parent, and get lost
        self._process.join()
        for channel in (self._chunks, self._answers):
            channel.cancel_join_thread()
            channel.close()


def _work(chunks: Any, answers: Any, recipe: Recipe, parent: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # they may reach the whole group; the parent stops us
    encoder = open_encoder(recipe.tokenizer)
    lost = LostCharacters(encoder)
    while os.getppid() == parent:  # a killed parent cannot stop us: leave with it
        try:
            chunk = chunks.get(timeout=1)
        except queue.Empty:
            continue
        try:
            answers.put(encode_chunk(chunk, encoder, lost, recipe))
        except (RequestError, TokenizerError) as error:
            answers.put(str(error))
