"""Slimmed models outside of PyTorch: exporting them, checking the result, and running it."""
