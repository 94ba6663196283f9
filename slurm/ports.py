"""Ports at which the processes of a run meet."""

from __future__ import annotations

import socket
import zlib

# Below what Linux gives out to connections (net.ipv4.ip_local_port_range begins at 32768).
_FIRST, _COUNT = 20_000, 12_000


def free_port(place: str) -> int:
    """Give a port of this machine that is free.

    `place` names the run, the job and its start: each begins to look elsewhere, so that neither
    two tasks of an array on one node, nor a start and what is left of the one before, nor jobs of
    two clusters on one machine, meet at the same port.
    """
    begin = zlib.crc32(place.encode())
    for offset in range(_COUNT):
        port = _FIRST + (begin + offset) % _COUNT
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise RuntimeError(f"no port from {_FIRST} to {_FIRST + _COUNT - 1} is free")
