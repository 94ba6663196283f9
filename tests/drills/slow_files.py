"""A file system that is slow, or hangs: the files of a folder through FUSE.

It speaks the kernel's own protocol (linux/fuse.h), so it needs nothing but /dev/fuse. It hangs by
reading no more requests: a process whose request was not read yet can still be killed.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.drills.lab import NotPossible

_LOOKUP, _FORGET, _GETATTR, _OPEN, _READ, _STATFS, _RELEASE = 1, 2, 3, 14, 15, 17, 18
_INIT, _OPENDIR, _READDIR, _RELEASEDIR, _DESTROY, _BATCH_FORGET = 26, 27, 28, 29, 38, 42
_UNANSWERED = (_FORGET, _BATCH_FORGET)
_EMPTY = (_RELEASE, _RELEASEDIR, _DESTROY)  # answered without content
_HEADER = struct.Struct("<IIQQIIIHH")
_ROOT = 1
_LAZILY = 2  # MNT_DETACH
_MAX_REQUEST = 1 << 20  # bytes


class SlowFiles:
    """The files of one folder, by node: 1 is the folder itself."""

    def __init__(self, source: Path, mount: Path, device: int, delay_s: float):
        self.mount, self.device, self.delay_s = mount, device, delay_s
        self.names = sorted(path.name for path in source.iterdir() if path.is_file())
        self.files = [os.open(source / name, os.O_RDONLY) for name in self.names]
        self.reads = 0
        self.hanging = threading.Event()
        self.answers: dict[int, Callable[[int, bytes], bytes]] = {
            _INIT: self.init,
            _LOOKUP: self.lookup,
            _GETATTR: lambda node, _: struct.pack("<QII", 3600, 0, 0) + self.attributes(node),
            _OPEN: lambda *_: bytes(16),
            _OPENDIR: lambda *_: bytes(16),
            _READ: self.read,
            _READDIR: self.read_folder,
            _STATFS: lambda *_: struct.pack("<5Q4I24x", 0, 0, 0, 0, 0, 4096, 255, 4096, 0),
        }

    def serve(self) -> None:
        """Answer requests until the file system is gone."""
        while True:
            try:
                if self.hanging.is_set():
                    return
                request = os.read(self.device, _MAX_REQUEST)
            except OSError as error:
                if error.errno in (errno.EINTR, errno.EAGAIN, errno.ENOENT):
                    continue
                return
            _, code, unique, node, *_ = _HEADER.unpack_from(request)
            if code in _UNANSWERED:
                continue
            try:
                answer, fault = self.answer(code, node, request[_HEADER.size :]), 0
            except OSError as error:
                answer, fault = b"", error.errno or errno.EIO
            with suppress(OSError):  # the process may have been killed
                os.write(
                    self.device, struct.pack("<IiQ", 16 + len(answer), -fault, unique) + answer
                )

    def answer(self, code: int, node: int, content: bytes) -> bytes:
        """Return the answer to a request; raise OSError with the errno to report."""
        if code in _EMPTY:
            return b""
        if code not in self.answers:
            raise OSError(errno.ENOSYS, "not known")
        return self.answers[code](node, content)

    def init(self, node: int, content: bytes) -> bytes:
        """Agree on protocol version 7.31, without read-ahead."""
        return struct.pack("<IIIIHHII28x", 7, 31, 0, 0, 16, 12, 65536, 1)

    def lookup(self, node: int, content: bytes) -> bytes:
        """Find a file by name."""
        name = content.split(b"\0")[0].decode()
        if name not in self.names:
            raise OSError(errno.ENOENT, name)
        found = self.names.index(name) + _ROOT + 1
        return struct.pack("<QQQQII", found, 0, 3600, 3600, 0, 0) + self.attributes(found)

    def attributes(self, node: int) -> bytes:
        """Describe a file or the folder."""
        size, mode, links = 0, stat.S_IFDIR | 0o555, 2
        if node != _ROOT:
            size = os.fstat(self.files[node - _ROOT - 1]).st_size
            mode, links = stat.S_IFREG | 0o444, 1
        blocks = (size + 511) // 512
        times = (0,) * 6
        return struct.pack("<6Q10I", node, size, blocks, *times, mode, links, 0, 0, 0, 4096, 0)

    def read(self, node: int, content: bytes) -> bytes:
        """Read a piece of a file, slowly."""
        _, offset, size = struct.unpack_from("<QQI", content)
        self.reads += 1
        time.sleep(self.delay_s)
        return os.pread(self.files[node - _ROOT - 1], size, offset)

    def read_folder(self, node: int, content: bytes) -> bytes:
        """List the entries of the folder from an offset on."""
        _, offset = struct.unpack_from("<QQ", content)
        found = b""
        for number, name in enumerate(self.names[offset:], offset + 1):
            raw = name.encode()
            padded = raw + bytes(-len(raw) % 8)
            found += (
                struct.pack("<QQII", number + _ROOT, number, len(raw), stat.S_IFREG >> 12) + padded
            )
        return found


@contextmanager
def slow_files(source: Path, place: Path, delay_s: float) -> Iterator[SlowFiles]:
    """Mount the files of a folder at a new folder; each read of up to 64 KiB takes `delay_s`."""
    place.mkdir(parents=True)
    try:
        device = os.open("/dev/fuse", os.O_RDWR)
    except OSError as error:
        raise NotPossible(f"/dev/fuse: {error.strerror}") from None
    libc = ctypes.CDLL(None, use_errno=True)
    options = f"fd={device},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()}"
    words = (b"drill", bytes(place), b"fuse", ctypes.c_ulong(0), options.encode())
    if libc.mount(*words) != 0:
        os.close(device)
        raise NotPossible(f"mounting FUSE: {os.strerror(ctypes.get_errno())}")
    files = SlowFiles(source, place, device, delay_s)
    server = threading.Thread(target=files.serve, daemon=True)
    server.start()
    try:
        yield files
    finally:
        libc.umount2(bytes(place), _LAZILY)
        os.close(device)  # ends requests that still wait for an answer
        for file in files.files:
            os.close(file)
