"""Native checkpoints: torch DCP keyed by global names, so that any layout loads what any other wrote.

DIR/latest                    name of the newest complete checkpoint, replaced by rename
DIR/.lock                     who is writing here, while somebody is
DIR/iter_0000100/             complete: it appears under this name by one rename, after fsync
    manifest.json             what it is, and the size of every file
    run.yaml                  the resolved configuration of the run that wrote it
    .metadata, *.distcp       weights, optimizer states, step count, loss scale, random states
"""

from megatron_ext.checkpoint.compatible import check_compatible, check_trained, differences, model_of
from megatron_ext.checkpoint.directory import (
    Manifest,
    find_checkpoint,
    has_checkpoints,
    locate_checkpoint,
    read_manifest,
)
from megatron_ext.checkpoint.load import load_checkpoint
from megatron_ext.checkpoint.save import CheckpointWriter

__all__ = [
    "CheckpointWriter",
    "Manifest",
    "check_compatible",
    "check_trained",
    "differences",
    "find_checkpoint",
    "has_checkpoints",
    "load_checkpoint",
    "locate_checkpoint",
    "model_of",
    "read_manifest",
]
