"""Measured results, and how they are shown."""
