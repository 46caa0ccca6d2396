"""A tokenizer in any format: `load.py` finds, reads and opens one, `record.py` says whether two are the same."""
