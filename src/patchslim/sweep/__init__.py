"""Compares any models, methods, budgets, runtimes, precisions and batches by one protocol.

A *cell* is one method at one budget on one runtime, in one precision, for one batch. It is scored
on the images and timed in turns with the dense model and with `random` at its own token counts.
What a cell has found is written before the next one begins, so a sweep that was stopped goes on.
"""
