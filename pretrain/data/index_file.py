"""The `.idx` file of megatron-core's IndexedDataset, read and checked without importing megatron-core.

Layout, little-endian: 9 bytes magic, u64 version 1, u8 dtype code, u64 sequences, u64 document marks, then
int32 lengths [sequences] in tokens, int64 offsets [sequences] in bytes of the `.bin`, int64 marks.
"""

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ext.errors import RequestError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}


@dataclass(frozen=True)
class Index:
    """The index of one corpus.

    Attributes:
        prefix: path without `.bin` or `.idx`.
        dtype: type of one token in the `.bin`.
        lengths: int32 [sequences], tokens in each (memory-mapped).
    """

    prefix: str
    dtype: np.dtype[Any]
    lengths: np.ndarray

    @property
    def tokens(self) -> int:
        """Tokens in the whole corpus."""
        return int(self.lengths.sum(dtype=np.int64))


def read_index(prefix: str) -> Index:
    """Open the index of `prefix` and hold it against the `.bin`.

    Raises:
        RequestError: a file is missing, unreadable, truncated, of another format, or the two do not belong together.
    """
    idx, data = Path(prefix + ".idx"), Path(prefix + ".bin")
    for path in (idx, data):
        if not path.is_file():
            raise RequestError(f"--data-path {prefix}: {path} does not exist; {_hint(prefix)}")
    size = idx.stat().st_size
    try:
        with idx.open("rb") as file:
            header = file.read(HEADER.size)
    except OSError as error:
        raise RequestError(f"--data-path {prefix}: cannot read {idx}: {error.strerror}") from None

    if not header.startswith(MAGIC[: len(header)]) or not header:
        raise RequestError(f"--data-path {prefix}: {idx} is not a Megatron index; write it with tools.preprocess_data")
    if len(header) < HEADER.size:
        raise RequestError(f"--data-path {prefix}: {idx} is truncated at {size} bytes; preprocess the corpus again")
    _, version, code, sequences, marks = HEADER.unpack(header)
    if version != 1 or code not in DTYPES:
        raise RequestError(
            f"--data-path {prefix}: {idx} has version {version} and dtype code {code}; "
            f"version 1 with integer tokens (codes {', '.join(map(str, DTYPES))}) can be read"
        )
    expected = HEADER.size + 12 * sequences + 8 * marks
    if size < expected:
        raise RequestError(
            f"--data-path {prefix}: {idx} is truncated: {size} bytes of {expected}; preprocess the corpus again"
        )
    if sequences == 0:
        raise RequestError(f"--data-path {prefix}: the corpus is empty (no documents in {idx})")

    lengths = np.memmap(idx, dtype="<i4", mode="r", offset=HEADER.size, shape=(sequences,))
    index = Index(prefix, np.dtype(DTYPES[code]), lengths)
    _check_tokens(index, data, int(sequences))
    return index


def _check_tokens(index: Index, data: Path, sequences: int) -> None:
    # The last offset plus the last length is the size; summing the lengths as well catches a damaged middle.
    offset = HEADER.size + 4 * sequences + 8 * (sequences - 1)
    last = int(np.memmap(index.prefix + ".idx", dtype="<i8", mode="r", offset=offset, shape=(1,))[0])
    need = index.tokens * index.dtype.itemsize
    have = os.path.getsize(data)
    if last + int(index.lengths[-1]) * index.dtype.itemsize != need or int(index.lengths.min()) < 0:
        raise RequestError(f"--data-path {index.prefix}: the .idx contradicts itself; preprocess the corpus again")
    if need == 0:
        raise RequestError(f"--data-path {index.prefix}: the corpus is empty (no tokens)")
    if have != need:
        raise RequestError(
            f"--data-path {index.prefix}: {data} has {have} bytes, its index says {need}; "
            "one of them is truncated or of another corpus: preprocess again"
        )


def _hint(prefix: str) -> str:
    stem, suffix = os.path.splitext(prefix)
    if suffix in (".bin", ".idx"):
        return f"give the prefix without the suffix: {stem}"
    if os.path.exists(prefix + "_text_document.idx"):
        return f"perhaps {prefix}_text_document"
    return "write both files with tools.preprocess_data --output-prefix"
