"""Embedded example data and hosts."""
