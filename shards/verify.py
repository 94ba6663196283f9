"""Check shards: `python -m shards.verify DIR`."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from dgm.common.command_line import Parser
from dgm.common.errors import UserError
from dgm.common.formatting import counted, size_of
from dgm.common.progress import progress as show_progress
from shards.cli import run
from shards.format import INDEX, Index, check_size, load_index, sha256_of


def check_files(
    folder: Path, progress: bool = True, remedy: str = "build the shards again"
) -> Index:
    """Compare a folder's tars with its index: missing or extra, size, SHA-256. Return the index.

    Raise UserError with the first bad shard and `remedy`.
    """
    index = load_index(folder / INDEX)
    known = {shard.name for shard in index.shards}
    extra = sorted(path.name for path in folder.glob("*.tar") if path.name not in known)
    for shard in index.shards:
        check_size(folder, shard)
    if extra:
        raise UserError(f"{folder / extra[0]} is not in {folder / INDEX}; remove it")
    hashes = checksums([folder / shard.name for shard in index.shards], progress)
    for shard, found in zip(index.shards, hashes, strict=True):
        if found != shard.sha256:
            raise UserError(
                f"{folder / shard.name} has changed since its index was written "
                f"(sha256 {found[:12]}..., not {shard.sha256[:12]}...); {remedy}"
            )
    return index


def checksums(paths: list[Path], progress: bool = True) -> list[str]:
    """Return the SHA-256 of each file."""
    total = sum(path.stat().st_size for path in paths)
    what = f"{counted(len(paths), 'shard')}, {size_of(total)}"
    # hashlib releases the GIL.
    with (
        show_progress(
            f"checking {what}", total, "B", done=f"checked {what}", single_process=True,
            show=progress,
        ) as bar,
        ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool,
    ):  # fmt: skip
        return list(pool.map(lambda path: sha256_of(path, bar.advance), paths))


def verify(folder: Path) -> Index:
    """Check files, checksums and every sample of a folder of shards; return its index.

    Raise UserError with the first damaged shard.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give a folder of shards")
    from shards.decode_cache import encoded_source
    from shards.validate_samples import validate_samples

    index = check_files(folder)
    if index.layout is None:
        for image, _ in encoded_source(folder, index).samples():  # decoding checks each image
            assert image.shape == index.image_shape, "encoded_source checks the shape"
    else:
        first, classes = 0, len(index.classes)
        for shard in index.shards:
            path = folder / shard.name
            validate_samples(path, index.layout, first, shard.count, index.image_shape, classes)
            first += shard.count
    return index


def make_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(prog="python -m shards.verify", description="Check a folder of shards.")
    parser.add_argument("folder", type=Path, metavar="DIR")
    return parser


def main() -> None:
    """Check shards from the command line."""
    index = verify(make_parser().parse_args().folder)
    size = sum(shard.size for shard in index.shards)
    print(
        f"{index.total} images, {len(index.classes)} classes, {len(index.shards)} shards, "
        f"{size} bytes: all good"
    )


command = partial(run, main)


if __name__ == "__main__":
    command()
