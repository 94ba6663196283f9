"""The folder of caches."""

from __future__ import annotations

import os
from pathlib import Path

from dgm.common.errors import UserError


def cache_root() -> Path:
    """Return `$XDG_CACHE_HOME/dgm`, by default `~/.cache/dgm`; raise UserError without a home."""
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given) / "dgm"
    try:
        if os.environ.get("HOME") == "":
            raise RuntimeError
        return Path.home() / ".cache" / "dgm"
    except RuntimeError:
        raise UserError(
            "HOME is not set and this user has no home folder for caches: set XDG_CACHE_HOME to a "
            "writable folder"
        ) from None
