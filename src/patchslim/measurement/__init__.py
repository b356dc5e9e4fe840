"""Accuracy, divergence, latency and memory of slimmed models."""
