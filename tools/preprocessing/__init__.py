"""The parts of tools.preprocess_data: read documents, encode them in several processes, write them."""
