"""Vocabulary work on SentencePiece models. Imports nothing of the rest of the project.

python -m tokenizer train    a new model from text
python -m tokenizer merge    a base model, and the pieces of another that it lacks
"""
