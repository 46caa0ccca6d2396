"""The engine: a decoder trained with tensor, pipeline and ZeRO data parallelism.

It knows nothing of files of text, command lines or wandb; `pretrain/` and `tools/` call it, never the reverse.
"""
