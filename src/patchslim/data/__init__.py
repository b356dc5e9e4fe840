"""Reads images for measuring, calibrating and training; nothing is ever fetched.

`Images` reads folders, archives and single files, `Dataset` a Hugging Face dataset, `Shards`
WebDataset shards. All three are a `Source`: batches in order, or any one image by its index.
"""
