"""How long texts become with several tokenizers, as tables and as a picture."""
