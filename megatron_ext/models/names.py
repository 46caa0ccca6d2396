"""Global names of parameters that other rooms single out."""

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
POSITIONS = "embed_positions.weight"


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to a low-rank adapter, `LINEAR.lora.a` or `LINEAR.lora.b`."""
    return ".lora." in name
