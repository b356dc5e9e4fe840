"""One family a file, named `<library>_<family>.py`; only the model's own library is imported."""
