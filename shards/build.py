"""Build shards: `python -m shards.build --source cifar10 --split train --out DIR`."""

from __future__ import annotations

import hashlib
import os
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dgm.common.atomic_dirs import new_folder
from dgm.common.command_line import Parser
from dgm.common.errors import UserError
from dgm.common.formatting import counted
from shards.class_folders import NoImages, describe_changes, find_images
from shards.cli import option, run
from shards.format import IMAGE_FORMATS, INDEX, SOURCE_FILES, Index, load_index
from shards.sources import DEFAULT_OPTIONS, SPLITS, FolderOptions, open_source, source_name

if TYPE_CHECKING:
    from shards.reader import Shards

SHARD_SIZE = 10_000
ROOT_VARIABLE = "DGM_DATA"
"""Environment variable with the folder of default shards; by default `data`."""

CheckImages = Callable[[tuple[int, int, int], int], object]
"""Called with image shape (H, W, 3) and number of classes; raises to reject the images."""
CheckIndex = Callable[[Index], object]
"""Called with the new index before existing shards are replaced; raises to keep them."""


def build(
    source: str,
    split: str,
    out: Path,
    image_format: str = "npy",
    shard_size: int = SHARD_SIZE,
    resize: int | None = None,
    seed: int = 0,
    progress: bool = True,
    options: FolderOptions = DEFAULT_OPTIONS,
    *,
    remedy: str = "choose another folder",
    replace: bool = False,
    check: CheckImages | None = None,
    check_index: CheckIndex | None = None,
) -> Index:
    """Write the images of a source as shards into the folder `out`, atomically.

    remedy: the advice in the error if `out` cannot be written; replace: whether to replace existing
    shards, after `check_index` has accepted the new index; check: called before any image is
    written. Prints which images were left out or changed.
    Raise UserError where `out` is not empty, or an argument or an image is bad.
    """
    out = Path(os.path.expanduser(out)).resolve()  # keeps a symbolic link, writes to its target
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; choose another folder for --out")
    if not replace and out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} exists and is not empty; remove it or choose another --out")
    if image_format not in IMAGE_FORMATS:
        raise UserError(f"unknown image format '{image_format}'; choose npy or png")
    if shard_size < 1:
        raise UserError(f"shard size is {shard_size}; choose 1 or more")
    images = open_source(source, split, resize, seed, options)
    if check is not None:
        check(images.image_shape, len(images.classes))
    what = f"{out}: {counted(len(images), 'image')}"
    label = (f"building {what}", f"built {what}")
    with new_folder(out, INDEX, remedy, replace) as folder:
        from shards.write import write_folder  # slow to import

        index = write_folder(images, folder, split, image_format, shard_size, progress, label)
        if replace and check_index is not None:
            check_index(index)
    for line in images.notes:
        print(line, flush=True)
    return index


def default_root() -> Path:
    """Return the folder of default shards: `$DGM_DATA`, by default `data`."""
    return Path(os.path.expanduser(os.environ.get(ROOT_VARIABLE) or "data"))


def default_folder(
    source: str,
    split: str = "train",
    resize: int | None = None,
    options: FolderOptions = DEFAULT_OPTIONS,
    root: Path | None = None,
) -> Path:
    """Return the folder in which a trainer keeps the shards of a source: `data/<source>`.

    The name includes a hash of a folder source's path, `options` that differ from the defaults,
    the resize and the test split. root: replaces `default_root()`.
    """
    name = source_name(source)
    added = ""
    if name.startswith("folder:"):
        path = name.removeprefix("folder:")
        digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:8]
        name, added = f"folder-{Path(path).name}-{digest}", options.suffix
    if resize is not None:
        name += f"-{resize}"
    name += added
    if split != "train":
        name += f"-{split}"
    return (default_root() if root is None else root) / name


def ensure(
    source: str,
    folder: str | Path | None = None,
    split: str = "train",
    resize: int | None = None,
    progress: bool = True,
    options: FolderOptions = DEFAULT_OPTIONS,
    root: Path | None = None,
    classes: Sequence[str] | None = None,
    check: CheckImages | None = None,
    check_index: CheckIndex | None = None,
) -> Path:
    """Return a path of complete, verified shards for `open_shards`, building them if necessary.

    folder: an existing folder, tar, or remote spec such as `https://.../{000..004}.tar`.
    None is the default folder (below `root`), which is built if it is missing or if the images of a
    folder source have changed since. classes: those of the train images, when opening test images;
    they define the label numbers. check: called before anything is built. check_index: called
    before rebuilt shards replace older ones.
    All checksums are compared; shards that must be decoded or resized are decoded into a cache.
    Raise UserError where shards are missing, damaged, of another source, or have images of a class
    that is not in `classes`.
    """
    from shards.verify import check_files

    if folder is None:
        options.check(source_name(source))
        path = default_folder(source, split, resize, options, root)
        build_images = partial(
            build, source, split, path, resize=resize, progress=progress, options=options,
            check=check, check_index=check_index,
        )  # fmt: skip
        _ensure_default(path, source_name(source), split, options, build_images)
    else:
        from shards.decode_cache import check_holds_shards
        from shards.remote import fetch, is_remote

        if is_remote(str(folder)):
            path = fetch(str(folder), progress)
        else:
            path = Path(os.path.expanduser(folder))
        check_holds_shards(path, source, split)
    home = path if path.is_dir() else path.parent
    if (home / INDEX).is_file():
        try:
            index = check_files(home, progress)
        except UserError as error:
            if folder is not None:
                raise
            fault = str(error).rpartition("; ")[0]
            raise UserError(f"{fault}; remove {home} to build it again") from None
        if folder is not None:
            _warn_of_changes(home, index, source)
    _check_opened(path, home, resize, classes, progress)
    return path


def _check_opened(
    path: Path, home: Path, resize: int | None, classes: Sequence[str] | None, progress: bool
) -> None:
    """Open shards, which may decode them, and check the copy that is read."""
    from shards.reader import open_shards

    opened = open_shards(path, resize, classes)
    if opened.folder != home:
        _check_copy(path, opened.folder, resize, progress)
    if opened.matched_by_number:
        warnings.warn(
            f"classes of {path} are matched with those of the train images by number: they have "
            "no names in common",
            stacklevel=2,
        )


def _check_copy(path: Path, copy: Path, resize: int | None, progress: bool) -> None:
    """Check a decoded copy; if it is damaged and belongs to another user, decode again."""
    from shards.decode_cache import is_own
    from shards.reader import locate
    from shards.verify import check_files

    try:
        check_files(copy, progress, remedy=f"remove {copy} to decode it again")
    except UserError as error:
        if is_own(copy):
            raise
        warnings.warn(f"decoded copy {copy} is not used: {error}", stacklevel=2)
        locate(path, resize, avoid=copy)


def describe_shards(path: Path, opened: Shards) -> str:
    """Return one line with the number, classes and size of images, their path and build time."""
    height, width, _ = opened.image_shape
    classes = "1 class" if opened.num_classes == 1 else f"{opened.num_classes:,} classes"
    text = f"{counted(len(opened), 'image')}, {classes}, {width} x {height}, {path}"
    home = path if path.is_dir() else path.parent
    index = next((f / INDEX for f in (home, opened.folder) if (f / INDEX).is_file()), None)
    if index is None:
        return text
    # The index holds no time: its bytes depend on the images only.
    since = time.strftime("%Y-%m-%d %H:%M", time.localtime(index.stat().st_mtime))
    return f"{text}, {'built' if index.parent == home else 'decoded'} {since}"


def _ensure_default(
    path: Path, source: str, split: str, options: FolderOptions, build_images: Callable[..., Index]
) -> None:
    """Build a default folder where it is missing or out of date."""
    elsewhere = f"set {ROOT_VARIABLE} to a folder that can be written"
    if split == "train":  # other commands have no option for these
        elsewhere += f", or name built shards with {option('shards', 'DIR')}"
    if not (path / INDEX).is_file():
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise UserError(f"{path} holds no shards (no {INDEX}); move it away or {elsewhere}")
        try:
            build_images(remedy=elsewhere)
        except UserError:
            if not (path / INDEX).is_file():  # otherwise another process has built it
                raise
    index = load_index(path / INDEX)
    if (index.source, index.split) != (source, split):
        raise UserError(
            f"{path} holds {index.source} ({index.split}), not {source} ({split}); move it away"
        )
    if not source.startswith("folder:"):
        return
    if index.source_files is None:
        print(
            f"{path}: built by an older version without a list of the images: changes in "
            f"{source.removeprefix('folder:')} are not noticed; remove {path} to build it again",
            flush=True,
        )
        return
    try:
        changes = _changes(path, index, options.holdout)
    except (NoImages, OSError) as error:
        why = str(error).partition(";")[0]
        print(f"{path}: used as it is, because its images cannot be compared ({why})", flush=True)
        return
    if changes:
        print(f"{path}: {changes}: building again", flush=True)
        build_images(remedy=elsewhere, replace=True)


def _changes(path: Path, index: Index, holdout: float) -> str | None:
    """Return how a folder has changed since its shards were built, None if it has not."""
    assert index.source_files is not None
    tree = find_images(Path(index.source.removeprefix("folder:")), index.split, holdout)
    if hashlib.sha256(tree.listing.encode()).hexdigest() == index.source_files.sha256:
        return None
    try:
        before = (path / SOURCE_FILES).read_text(encoding="utf-8")
    except (OSError, ValueError):
        before = ""
    return describe_changes(before, tree)


def _warn_of_changes(path: Path, index: Index, source: str) -> None:
    """Warn where given shards were built from a folder that has changed since."""
    if index.source_files is None or not source.startswith("folder:"):
        return
    if index.source != source_name(source):
        return
    try:
        changes = _changes(path, index, float(index.settings.get("holdout", 0.0)))
    except (UserError, OSError):
        return  # complete shards do not need the folder
    if changes:
        warnings.warn(
            f"{path} was built from {index.source}, which has changed since ({changes}): the "
            "shards are used as they are; remove and build them again to include the changes",
            stacklevel=3,
        )


def make_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(prog="python -m shards.build", description="Build shards of images.")
    parser.add_argument("--source", required=True, help="cifar10, shapes or folder:PATH")
    parser.add_argument("--split", required=True, help=" or ".join(SPLITS))
    parser.add_argument("--out", required=True, type=Path, help="folder to create")
    parser.add_argument("--image-format", default="npy", help=" or ".join(IMAGE_FORMATS))
    parser.add_argument("--shard-size", type=int, default=SHARD_SIZE, help="images per tar")
    parser.add_argument("--resize", type=int, help="crop and resize images to this side length")
    parser.add_argument("--seed", type=int, default=0, help="seed of the built-in shapes")
    parser.add_argument(
        "--background", default="white",
        help="colour under transparent images: white, black or R,G,B",
    )  # fmt: skip
    parser.add_argument(
        "--holdout", type=float, default=0.0,
        help="fraction to hold out as test split, by file name, if a folder has no test images",
    )  # fmt: skip
    parser.add_argument("--skip-bad", action="store_true", help="leave damaged images out")
    return parser


def main() -> None:
    """Build shards from the command line."""
    args = vars(make_parser().parse_args())
    options = FolderOptions(args.pop("background"), args.pop("holdout"), args.pop("skip_bad"))
    build(**args, options=options)
    from shards.reader import open_shards

    out = Path(os.path.expanduser(args["out"]))
    print(f"data: {describe_shards(out, open_shards(out))}")


command = partial(run, main)


if __name__ == "__main__":
    command()
