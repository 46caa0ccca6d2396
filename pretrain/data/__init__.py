"""Training data: corpora in megatron-core's format, blended into one endless order of samples.

check_data   refuses what cannot be trained on, in seconds
build_data   opens the corpora for one data-parallel rank and gives its batches

The way to a batch is that of source.py: sources, a packer, `collate`.
"""

from pretrain.data.check import check_data
from pretrain.data.config import DataConfig
from pretrain.data.loader import Data, build_data

__all__ = ["Data", "DataConfig", "build_data", "check_data"]
