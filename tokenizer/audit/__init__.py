"""What is wrong with a tokenizer: in itself, against the one that it extends, and on text."""
