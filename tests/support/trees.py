"""Contents of folders, for comparing them before and after a command."""

from __future__ import annotations

from pathlib import Path


def tree_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return modification time and content of every file in a folder, (0, b"") for a folder."""
    return {
        str(path.relative_to(folder)): (
            (path.stat().st_mtime_ns, path.read_bytes()) if path.is_file() else (0, b"")
        )
        for path in sorted(folder.rglob("*"))
    }
