"""One file is one target of `patchslim.export`, and its name is what `to=` takes."""
