"""Whether the result of a conversion is its source: weights read back, and both ends run on one prompt."""
