"""Checkpoints: a folder of unsharded tensors, written atomically.

`checkpoints/<images_seen>/` holds `model.safetensors`, `ema.safetensors`, `optimizer.safetensors`,
`state.json` and `manifest.json` with the size and SHA-256 of each.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from dgm.common.atomic_io import sync
from dgm.common.errors import UserError, check_readable, naming
from dgm.common.run_files import MANIFEST
from dgm.tensor_files import save_tensors

FILES = ("model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json")
_PARTIAL = ".partial-"

# Errors that mean damage. Any other means that a file cannot be read now, or not by this user.
_DAMAGE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EIO, errno.ENAMETOOLONG)


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint: unsharded tensors of all nets, and what is not tensors."""

    model: dict[str, Tensor]  # by `net.parameter`
    optimizer: dict[str, Tensor]  # by `<net>.<moment>.<parameter>`
    ema: dict[str, Tensor]
    state: dict[str, Any]


def write(
    folder: Path, images_seen: int, checkpoint: Checkpoint, keep: int, best: int | None = None
) -> Path:
    """Write `folder/<images_seen>`, which must not exist, then remove older checkpoints.

    The newest `keep` stay, and the one at `best` images seen.
    """
    final = folder / f"{images_seen:09d}"
    partial = folder / f"{_PARTIAL}{images_seen:09d}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write_file(partial / "model.safetensors", checkpoint.model)
        _write_file(partial / "optimizer.safetensors", checkpoint.optimizer)
        _write_file(partial / "ema.safetensors", checkpoint.ema)
        _write_file(partial / "state.json", json.dumps(checkpoint.state, indent=1) + "\n")
        files = {name: _describe(partial / name) for name in FILES}
        _write_file(partial / MANIFEST, json.dumps({"files": files}, indent=1) + "\n")
        sync(partial)
        os.rename(partial, final)
        sync(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for old in complete_names(folder)[:-keep]:
        if int(old) != best:  # renamed first, so that none is half removed
            os.rename(folder / old, folder / f"{_PARTIAL}{old}")
    remove_partial(folder)
    return final


def take_over(folder: Path, check: Callable[[dict[str, Any]], None] | None = None) -> Path | None:
    """Return the checkpoint to resume from, None if there is none; remove partial ones.

    `check` gets the checkpoint's state and raises an error if the run does not fit it, before
    anything is changed. Newer damaged checkpoints are renamed, because the run will write to their
    names. Raise UserError if there are checkpoints, but all are damaged.
    """
    check_readable(folder)
    if os.path.lexists(folder) and not folder.is_dir():  # a link to an unmounted disk, say
        raise UserError(
            f"{folder} is neither a folder nor a link to one: mount its disk or restore it, or "
            "move it away to start from scratch"
        )
    if folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(
            f"{folder} may not be written to by this user: let its owner run chmod a+w {folder} "
            "(for a group: chgrp, then chmod g+w), or choose another run.dir"
        )
    found, names = newest(folder), complete_names(folder)
    if names and found is None:
        raise UserError(
            f"none of the {len(names)} checkpoints in {folder} is intact: restore one from a copy, "
            "or move that folder away to start from scratch"
        )
    if found is not None and check is not None:
        check(read_state(found))
    remove_partial(folder)
    for name in names[names.index(found.name) + 1 :] if found else []:
        shutil.rmtree(folder / f"damaged-{name}", ignore_errors=True)
        os.rename(folder / name, folder / f"damaged-{name}")
    return found


def newest(folder: Path) -> Path | None:
    """Return the newest intact checkpoint; warn about damaged ones and skip them."""
    for name in reversed(complete_names(folder)):
        fault = find_fault(folder / name)
        if fault is None:
            return folder / name
        warnings.warn(f"checkpoint {folder / name} is skipped: {fault}", stacklevel=2)
    return None


def find_fault(path: Path) -> str | None:
    """Return what is wrong with a checkpoint; None if every file matches the manifest.

    Raise UserError if this user may not read it, and OSError if the disk does not respond: then the
    checkpoint may be undamaged.
    """
    for file in (path, *(path / name for name in (MANIFEST, *FILES))):
        check_readable(file)
    try:
        files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name in FILES:
            if _describe(path / name) != files[name]:
                return f"{name} differs from {MANIFEST}"
    except OSError as error:
        if error.errno is not None and error.errno not in _DAMAGE:
            raise
        return f"{type(error).__name__}: {error}"
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def read(path: Path) -> Checkpoint:
    """Load a checkpoint that `newest` returned, to the CPU."""
    model, optimizer, ema = (
        load_file(path / f"{name}.safetensors") for name in ("model", "optimizer", "ema")
    )
    return Checkpoint(model, optimizer, ema, read_state(path))


def read_state(path: Path) -> dict[str, Any]:
    """Read the part of a checkpoint that is not tensors."""
    return json.loads((path / "state.json").read_text(encoding="utf-8"))


def remove_partial(folder: Path) -> None:
    """Remove the partial checkpoints of saves that were killed."""
    for path in folder.glob(f"{_PARTIAL}*"):
        shutil.rmtree(path, ignore_errors=True)


def complete_names(folder: Path) -> list[str]:
    """Return the names of all checkpoints, the newest last, without looking for damage."""
    check_readable(folder)
    if not folder.is_dir():
        return []
    return sorted((p.name for p in folder.iterdir() if p.name.isdecimal()), key=int)


def _write_file(path: Path, content: Mapping[str, Tensor] | str) -> None:
    if isinstance(content, str):
        with naming(path):
            path.write_text(content, encoding="utf-8")
    else:
        save_tensors(path, {k: v.detach().cpu().contiguous() for k, v in content.items()})
    sync(path)


def _describe(path: Path) -> dict[str, object]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}
