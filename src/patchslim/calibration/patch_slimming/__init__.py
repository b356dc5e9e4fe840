"""Patch Slimming: finds the patches that each block can do without."""
