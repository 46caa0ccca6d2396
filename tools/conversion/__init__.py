"""How checkpoints of other projects correspond to ours."""
