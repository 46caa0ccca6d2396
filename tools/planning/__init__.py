"""What `python -m tools.plan` prints and draws."""
