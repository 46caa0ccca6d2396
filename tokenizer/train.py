"""A new SentencePiece model from text, with LLaMA's conventions."""

import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import sentencepiece
from tqdm import tqdm

from tokenizer.errors import TokenizerError
from tokenizer.text.documents import Tally, progress_bar, read_lines

# The trainer keeps positions within a sentence in 16 bits and leaves out, silently, what is longer than
# max_sentence_length: long lines are cut instead.
_LONGEST = 4096
# It leaves out every line with the first of these characters, which it uses itself, and has no piece for the second.
_RESERVED = re.compile("[\u2585\x00]")


def train(
    inputs: Sequence[Path],
    vocab_size: int,
    *,
    model_type: str = "bpe",
    character_coverage: float = 0.9995,
    hard_vocab_limit: bool = True,
    json_key: str = "text",
    quiet: bool = False,
    tally: Tally | None = None,
) -> bytes:
    """Train a model and return it serialized.

    As LLaMA's: ids 0 <unk>, 1 <s>, 2 </s>, then 256 bytes for what has no piece; digits stand alone; the text is
    not normalized and keeps its whitespace (line breaks become byte pieces).

    Args:
        inputs: JSON lines or plain text.
        vocab_size: pieces in all.
        model_type: bpe or unigram.
        character_coverage: share of the text's characters that get a piece, 0.98 to 1.
        hard_vocab_limit: refuse when the corpus does not yield `vocab_size` pieces (else: make fewer).
        json_key: of the text in a JSON line.
        quiet: no progress and no log of the trainer.
        tally: counts what was read, and what was left out.

    Raises:
        TokenizerError: the corpus is empty or unreadable, or too small or too varied for `vocab_size`.
    """
    if not 0.98 <= character_coverage <= 1:
        raise TokenizerError(f"--character-coverage {character_coverage}: give 0.98 to 1")
    model = io.BytesIO()
    failure: list[TokenizerError] = []
    with progress_bar("--input", inputs, quiet) as bar:
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=_sentences(inputs, json_key, bar, failure, tally or Tally()),
                model_writer=model,
                vocab_size=vocab_size,
                model_type=model_type,
                character_coverage=character_coverage,
                hard_vocab_limit=hard_vocab_limit,
                max_sentence_length=4 * _LONGEST,
                byte_fallback=True,
                split_digits=True,
                allow_whitespace_only_pieces=True,
                remove_extra_whitespaces=False,
                normalization_rule_name="identity",
                unk_id=0,
                bos_id=1,
                eos_id=2,
                pad_id=-1,
                minloglevel=2 if quiet else 0,
            )
        except (RuntimeError, OSError, ValueError) as error:
            raise failure[0] if failure else _explain(str(error), vocab_size) from None
    if failure:
        raise failure[0]
    return model.getvalue()


def _sentences(
    inputs: Sequence[Path], key: str, bar: tqdm, failure: list[TokenizerError], tally: Tally
) -> Iterator[str]:
    # An exception cannot pass through the C++ trainer unharmed: keep it, and end the text.
    try:
        for line in read_lines(inputs, key, bar.update, tally=tally):
            parts = _RESERVED.split(line)
            tally.reserved += len(parts) - 1
            for part in parts:
                for start in range(0, len(part), _LONGEST):
                    yield part[start : start + _LONGEST]
        bar.close()  # what the trainer logs from here on should not fight with the bar
    except TokenizerError as error:
        failure.append(error)


def _explain(message: str, vocab_size: int) -> TokenizerError:
    """The trainer's assertion as a request that would do."""
    if most := re.search(r"Vocabulary size too high \(\d+\)\D*(\d+)", message):
        return TokenizerError(
            f"--vocab-size {vocab_size} is more than this corpus yields: the largest possible is {most[1]} "
            "(or --no-hard-vocab-limit to take what there is)"
        )
    if least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return TokenizerError(
            f"--vocab-size {vocab_size} is less than the characters and bytes alone need: give {least[1]} or more, "
            "or lower --character-coverage"
        )
    if "!sentences_.empty()" in message:
        return TokenizerError("--input holds no text")
    if "insert_id" in message:
        return TokenizerError(f"--vocab-size {vocab_size} has no room for the special tokens; give 300 or more")
    return TokenizerError(f"sentencepiece refuses: {' '.join(message.split())}")
