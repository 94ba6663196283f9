"""Shards: images on disk as WebDataset tars that are read through memory maps.

`format` is the layout on disk, `sources` opens image data sets, `build` writes shards, `reader`
reads them by global index, `verify` checks them, `remote` fetches them.
"""
