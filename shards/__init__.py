"""Shards: images on disk as WebDataset tars that are read as memory.

`format` says how they lie on disk, `sources` where images come from, `build` writes them,
`read` reads them by global index, `verify` checks them, `remote` fetches them.
"""
