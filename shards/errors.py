"""The error of this package, what to say of a disk's, and how a command spells its options."""

import errno
import os
from collections.abc import Callable

_DISK = {
    errno.ENOSPC: "free space there",
    errno.EDQUOT: "free space there or have the quota raised",
    errno.EROFS: "make it writable or choose another place",
    errno.EACCES: "give this user the right to it (chmod, chgrp)",
    errno.EPERM: "give this user the right to it (chmod, chgrp)",
    errno.ENOTDIR: "choose another place",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "choose another place",
    errno.EIO: "look at the disk",
    errno.ESTALE: "look at the network disk",
}


class ShardError(ValueError):
    """Report the user's mistake or damaged data, in one line that names thing, value and remedy."""


_spelling: Callable[[str], str] = str


def spell_options(spelling: Callable[[str], str]) -> None:
    """Set how this process's command spells `--skip-bad`, an option of `python -m shards.build`."""
    global _spelling
    _spelling = spelling


def option(name: str, value: str = "") -> str:
    """Return an option of `python -m shards.build` as the running command takes it."""
    return _spelling(f"--{name} {value}".strip())


def disk_fault(error: OSError) -> str | None:
    """Say in one line which file failed, why and what to do; None where no disk is at fault."""
    if error.errno not in _DISK:
        return None
    name = error.filename2 or error.filename
    said = os.fsdecode(name) if isinstance(name, str | bytes) else "a file"
    return f"{said}: {os.strerror(error.errno)}; {_DISK[error.errno]}, then run the command again"
