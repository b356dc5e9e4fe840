"""Folders of saved models, on disk (`folder`) and on the Hugging Face Hub (`hub`).

This room knows tensors, JSON and files, but no models: it writes and checks a folder and leaves
open what the recipe in it means. `model.recipe` writes that recipe and `model.load` follows it, so
that the room of models may import this one, and this one imports no models.
"""
