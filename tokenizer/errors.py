"""The one exception of this room."""


class TokenizerError(ValueError):
    """What was asked for cannot be done; one line that names the flag or file, its value, and what would do."""
