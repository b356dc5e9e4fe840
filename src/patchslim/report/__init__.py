"""Measured results and how they are shown.

`Report` holds one `Row` a model and the `Provenance` of the numbers. It is shown as text (`text`),
CSV (`csv`) or one HTML page (`html`, with `choice`, `charts` and `rows_table`). All of them write
numbers as `columns` says. `patch_maps` finds out what became of every patch of an image, and
`patch_pictures` draws it. Nothing here measures.
"""
