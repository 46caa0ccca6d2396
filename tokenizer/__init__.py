"""Vocabulary work. Imports nothing of the rest of the project.

python -m tokenizer train    a new model from text
python -m tokenizer merge    a base model, and the pieces of another that it lacks
python -m tokenizer audit    what is wrong with a tokenizer
python -m tokenizer compare  how long texts become with several tokenizers

text/     files of text, their documents and lines, and where Chinese is in them
formats/  a tokenizer of any format: found, read, opened, written, and told from another; for other programs too
"""
