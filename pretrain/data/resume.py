"""Where in the data a run goes on: at the next sample of the same order, or, where the order is another, said aloud."""

from typing import Any

from megatron_ext.checkpoint import Manifest
from megatron_ext.checkpoint.directory import MANIFEST
from megatron_ext.errors import RequestError
from pretrain.data.corpora import parse_split
from pretrain.data.loader import Data

_FLAGS = {"seq_length": "--seq-length", "seed": "--seed", "split": "--split", "weights": "weights of --data-path"}


def describe_order(data: Data) -> dict[str, Any]:
    """What the order of the training samples depends on, as JSON gives it back. Corpora are known by their content."""
    return {
        "seq_length": data.seq_length,
        "seed": data.seed,
        "split": list(parse_split(data.config.split)),
        "weights": [corpus.weight for corpus in data.corpora],
        "corpora": [f"{corpus.checksum:08x}-{corpus.index.tokens}" for corpus in data.corpora],
    }


def resume_position(manifest: Manifest, data: Data, where: str = "--load") -> tuple[int, str]:
    """How many samples of the order to pass over after a checkpoint, and what is to be said of that, if anything.

    Another order of the same corpora goes on after as many tokens as were seen, whichever those were; other corpora
    begin at their first sample. where: the flag and the checkpoint, with which a RequestError begins.
    """
    stored, order = manifest.data, describe_order(data)
    if stored is None:  # an older version wrote it: only the length of its samples can be known
        samples, position = manifest.consumed_samples, manifest.consumed_samples
        length = manifest.consumed_tokens // samples if samples else data.seq_length
        stored = order | {"seq_length": length, "position": position}
    for name, value in (order | {"position": 0}).items():
        if type(stored.get(name)) is not type(value) or (name in ("position", "seq_length") and stored[name] < 0):
            raise RequestError(
                f"{where}: {MANIFEST} describes data that this program does not know "
                f"({name} {stored.get(name)!s:.80}): written by a newer version?"
            )
    position, length = stored["position"], stored["seq_length"]
    if stored["corpora"] != order["corpora"] and sorted(map(str, stored["corpora"])) != sorted(order["corpora"]):
        return 0, "--data-path: not the corpora of the checkpoint: they are read from their first sample on"
    changed = [name for name in order if stored[name] != order[name]]
    if not changed:
        return position, ""
    place = -(-position * length // data.seq_length)
    flags = ", ".join(dict.fromkeys(_FLAGS.get(name, "--data-path") for name in changed))
    return place, (
        f"{flags}: the data come in another order than the checkpoint's; goes on after {place:,} samples of it, which "
        f"are as many tokens as were seen of the old one ({position:,} samples of {length}): some will come again, and "
        "others not before the next pass"
    )
