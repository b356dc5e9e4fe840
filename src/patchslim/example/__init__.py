"""A small example that comes with the package: scenes with digits, and a host trained on them."""
