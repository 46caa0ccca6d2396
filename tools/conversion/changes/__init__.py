"""What may change on the way: `Weights` that are read from others."""
