"""The user's mistakes, told in one line."""

from __future__ import annotations

import os
from pathlib import Path


class SlurmError(ValueError):
    """Something that the user can mend; the message says what, and how."""


def access_fault(path: Path) -> str | None:
    """Return in one line why this user may not read `path`, with the remedy; None if he may."""
    for place in (*reversed(path.absolute().parents), path):
        is_folder = os.path.isdir(place)
        wanted = (os.X_OK if is_folder else 0) | (os.R_OK if place == path else 0)
        if os.path.exists(place) and not os.access(place, wanted):
            mode, recursive = ("a+rX", "-R ") if is_folder and place == path else ("a+r", "")
            mode = mode if place == path else "a+x"
            return (
                f"{place} may not be read (owner uid {os.stat(place).st_uid}): let its owner run "
                f"chmod {recursive}{mode} {place} (for a group: chgrp, then chmod g+{mode[2:]})"
            )
    return None
