"""Hostile inputs, one kind a file: `python -m attacks` in `tests/` tries them all."""
