"""From a source (a native checkpoint, a Hugging Face folder) through wrappers of its weights into a sink (either)."""
