"""Measures slimmed models: accuracy, agreement with the dense model, MACs, latency and memory.

`measure` does all of it and returns a report. `score` compares answers, `latency` times models
against each other, `peak_memory` looks at one call; each works by itself, too. `models`, `sample`
and `rows` are parts of `measure`: what it compares, on which images, and how it makes rows.
"""
