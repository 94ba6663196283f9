"""Build shards: `python -m shards.build --source cifar10 --split train --out DIR`."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path

from shards.cli import Parser, run
from shards.errors import ShardError
from shards.folders import new_folder
from shards.format import IMAGE_FORMATS, INDEX, Index, load_index
from shards.progress import counted
from shards.sources import SPLITS, open_source, source_name

SHARD_SIZE = 10_000


def build(
    source: str,
    split: str,
    out: Path,
    image_format: str = "npy",
    shard_size: int = SHARD_SIZE,
    resize: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Index:
    """Write the images of a source as shards into the folder `out`, whole or not at all.

    Raises ShardError where `out` holds anything, or an argument or an image is bad.
    """
    if image_format not in IMAGE_FORMATS:
        raise ShardError(f"unknown image format '{image_format}'; choose npy or png")
    if shard_size < 1:
        raise ShardError(f"shard size is {shard_size}; choose 1 or more")
    out = out.expanduser().resolve()  # a link to a folder stays a link
    if out.exists() and not out.is_dir():
        raise ShardError(f"{out} is a file; choose another folder for --out")
    if out.is_dir() and any(out.iterdir()):
        raise ShardError(f"{out} exists and is not empty; remove it or choose another --out")
    images = open_source(source, split, resize, seed)
    with new_folder(out, same=INDEX) as folder:
        # Slow to import, and only writing needs it.
        from shards.write import write_folder

        what = f"{out}: {counted(len(images), 'image')}"
        label = (f"building {what}", f"built {what}")
        return write_folder(images, folder, split, image_format, shard_size, progress, label)


def default_folder(source: str, split: str = "train", resize: int | None = None) -> Path:
    """Return where a trainer keeps the shards of a source: `data/<source>`.

    A folder source adds a hash of its path, the test split and a resize their value.
    """
    name = source_name(source)
    if name.startswith("folder:"):
        path = name.removeprefix("folder:")
        name = f"folder-{Path(path).name}-{hashlib.sha256(path.encode()).hexdigest()[:8]}"
    if resize is not None:
        name += f"-{resize}"
    if split != "train":
        name += f"-{split}"
    return Path("data") / name


def ensure(
    source: str,
    folder: str | Path | None = None,
    split: str = "train",
    resize: int | None = None,
    progress: bool = True,
    classes: Sequence[str] | None = None,
) -> Path:
    """Return a folder of shards that is complete, unchanged since it was written and readable.

    Without `folder`, the default one is taken, and built where missing. With `folder` (a folder,
    a tar, or a remote spec such as `https://.../{000..004}.tar`) it must exist. Every checksum is
    compared; shards that need decoding, or hold images of another size than `resize`, are decoded.
    `classes` are those of the train images, for test images. Open what is returned by
    `open_shards` with the same `resize` and `classes`.
    Raises ShardError where shards are missing, damaged, of another source, or hold images of a
    class that is none of `classes`.
    """
    from shards.decode import check_packed
    from shards.read import open_shards
    from shards.verify import check_files

    command = f"python -m shards.build --source {source} --split {split} --out"
    if folder is None:
        path = default_folder(source, split, resize)
        if not (path / INDEX).is_file():
            _build_missing(source, split, path, resize, progress)
        _check_origin(path, source_name(source), split)
    else:
        from shards.remote import fetch, is_remote

        path = fetch(str(folder), progress) if is_remote(str(folder)) else Path(folder)
        if not path.exists():
            raise ShardError(f"shards {path} do not exist; build them with {command} {path}")
        if path.is_dir() and not (path / INDEX).is_file() and not any(path.glob("*.tar")):
            check_packed(path)
            raise ShardError(f"{path} holds no shards; build them with {command} {path}")
    home = path if path.is_dir() else path.parent
    if (home / INDEX).is_file():
        check_files(home, progress)
    opened = open_shards(path, resize, classes)
    if opened.folder != home:
        _check_copy(path, opened.folder, resize, progress)
    if opened.matched_by_number:
        warnings.warn(
            f"classes of {path} are matched with those of the train images by number, for they "
            "have no names in common",
            stacklevel=2,
        )
    return path


def _check_copy(path: Path, copy: Path, resize: int | None, progress: bool) -> None:
    """Check a decoded copy; where somebody else's is damaged, make one of one's own."""
    from shards.decode import is_mine
    from shards.read import locate
    from shards.verify import check_files

    try:
        check_files(copy, progress, remedy=f"remove {copy}, and it is decoded again")
    except ShardError as error:
        if is_mine(copy):
            raise
        warnings.warn(f"decoded copy {copy} is passed over: {error}", stacklevel=2)
        locate(path, resize, avoid=copy)


def _build_missing(source: str, split: str, path: Path, resize: int | None, progress: bool) -> None:
    try:
        build(source, split, path, resize=resize, progress=progress)
    except ShardError:
        if not (path / INDEX).is_file():  # else another process was faster: take what it built
            raise


def _check_origin(folder: Path, source: str, split: str) -> None:
    index = load_index(folder / INDEX)
    if (index.source, index.split) != (source, split):
        raise ShardError(
            f"{folder} holds {index.source} ({index.split}), not {source} ({split}); move it away"
        )


def main() -> None:
    """Build shards from the command line."""
    parser = Parser(prog="python -m shards.build", description="Build shards of images.")
    parser.add_argument("--source", required=True, help="cifar10, shapes or folder:PATH")
    parser.add_argument("--split", required=True, help=" or ".join(SPLITS))
    parser.add_argument("--out", required=True, type=Path, help="folder to make")
    parser.add_argument("--image-format", default="npy", help=" or ".join(IMAGE_FORMATS))
    parser.add_argument("--shard-size", type=int, default=SHARD_SIZE, help="images per tar")
    parser.add_argument("--resize", type=int, help="cut and resize images to this side length")
    parser.add_argument("--seed", type=int, default=0, help="of the built-in shapes")
    args = parser.parse_args()
    index = build(**vars(args))
    size = sum(shard.size for shard in index.shards)
    print(f"{args.out}: {index.total} images, {len(index.shards)} shards, {size} bytes")


if __name__ == "__main__":
    run(main)
