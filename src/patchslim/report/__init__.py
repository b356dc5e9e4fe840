"""Measured results and how they are shown.

`Report` holds one `Row` a model and the `Provenance` of the numbers. It is shown as text, CSV
(`csv`) or one HTML page (`html`, whose `charts` are drawn by `svg`). `patch_maps` finds out what
became of every patch of an image, and `patch_pictures` draws it. Nothing here measures.
"""
