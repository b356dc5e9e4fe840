"""Fits methods to unlabelled images: thresholds, and the positions of Patch Slimming."""
