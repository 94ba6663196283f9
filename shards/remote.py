"""Downloading remote shards into the cache, with WebDataset's `gopen`."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from dgm.common.atomic_dirs import remove, remove_leftovers, temporary_sibling
from dgm.common.cache import cache_root
from dgm.common.errors import UserError
from dgm.common.formatting import counted
from dgm.common.progress import Progress
from dgm.common.progress import progress as show_progress
from dgm.common.redact import without_password

_CHUNK = 1 << 20
_MAX_TARS = 100_000
_CURL = {6: "host not found", 7: "no connection", 18: "cut off", 22: "not found", 28: "timed out"}


def is_remote(spec: str) -> bool:
    """Return whether a spec names remote shards: `https://...`, `s3://...`, `pipe:CMD`."""
    return re.match(r"pipe:|[a-z][a-z0-9+.-]*://", spec) is not None


def fetch(spec: str, progress: bool = True) -> Path:
    """Download remote tars into the cache, unless they are already there; return their folder.

    spec: as in WebDataset, `https://.../{000..004}.tar`, `pipe:CMD`, several joined by `::`.
    Delete the folder to download them again.
    Raise UserError with URL and reason where a tar cannot be downloaded completely.
    """
    name = hashlib.sha256(spec.encode(errors="surrogatepass")).hexdigest()[:16]
    folder = cache_root() / "remote" / name
    if (folder / "complete").is_file():
        return folder
    urls = _expand(spec)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write {folder} ({error.strerror}); set XDG_CACHE_HOME to another folder"
        ) from None
    what = f"{counted(len(urls), 'tar')} into {folder}"
    with show_progress(
        f"fetching {what}", unit="B", done=f"fetched {what}", single_process=True, show=progress
    ) as bar:
        for number, url in enumerate(urls):
            final = folder / f"{number:05d}.tar"
            if not final.is_file():
                bar.relabel(f"fetching {_name(url, number, len(urls))}")
                _fetch_one(url, final, bar)
    (folder / "complete").touch()
    return folder


def _name(url: str, number: int, total: int) -> str:
    """Return the name of a tar for the progress bar, without keys that its URL may contain."""
    name = re.sub(r"[?#].*", "", url).rpartition("/")[2]
    return name if name and not url.startswith("pipe:") else f"tar {number + 1} of {total}"


def _expand(spec: str) -> list[str]:
    """Return the URLs of a spec with braces and `::`; raise UserError where it is not valid."""
    from webdataset.shardlists import expand_urls

    redacted = without_password(spec)
    if any(ord(letter) < 32 for letter in spec):
        raise UserError(f"{redacted!r} contains a control character; remove it")
    if _max_count(spec) > _MAX_TARS:
        raise UserError(f"{redacted} expands to more than {_MAX_TARS:,} tars; give fewer")
    try:
        return expand_urls(spec)
    except (ValueError, LookupError, AssertionError, RecursionError) as error:
        reason = without_password(" ".join(str(error).split()))
        raise UserError(f"{redacted} is not a valid list of URLs ({reason}); correct it") from None


def _max_count(spec: str) -> int:
    """Return an upper bound on the number of URLs that braces expand to."""
    count, commas = 1, [0]
    for letter in spec:
        if letter == "{":
            commas.append(0)
        elif letter == "," and commas:
            commas[-1] += 1
        elif letter == "}" and commas:
            count *= commas.pop() + 1
    for first, last in re.findall(r"\{(-?\d+)\.\.(-?\d+)", spec):
        count *= abs(int(last[:20]) - int(first[:20])) + 1
    return count


def _fetch_one(url: str, final: Path, bar: Progress) -> None:
    from webdataset.gopen import gopen

    remove_leftovers(final)
    temporary = temporary_sibling(final)
    try:
        with temporary.open("wb") as out:
            stream = gopen(url, "rb", bufsize=_CHUNK)
            try:
                while content := stream.read(_CHUNK):
                    out.write(content)
                    bar.advance(len(content))
            finally:
                stream.close()  # raises where the command behind the stream failed
            out.flush()
            os.fsync(out.fileno())
        _check_whole(url, temporary)
        os.replace(temporary, final)
    except UserError:
        raise
    except Exception as error:  # gopen's handlers raise many types
        redacted = without_password(url)
        raise UserError(f"{redacted} could not be fetched ({_reason(error)}); check it") from None
    finally:
        remove(temporary)


def _check_whole(url: str, path: Path) -> None:
    from shards.index_foreign import index_tar, unpack_command

    try:
        index_tar(path, warn=False)
    except UserError as error:
        reason = str(error).replace(str(path), "the download").rpartition(";")[0]
        redacted = without_password(url)
        remedy = "check it" if unpack_command(path) is None else "give plain tars, uncompressed"
        raise UserError(
            f"{redacted} could not be fetched completely ({reason}); {remedy}"
        ) from None


def _reason(error: Exception) -> str:
    """Return a short reason; WebDataset reports only the exit code of its command."""
    code = re.search(r": exit (\d+)", str(error))
    if code is None:
        return without_password(f"{type(error).__name__}: {error}")
    number = int(code.group(1))
    if "curl" in str(error) and number in _CURL:
        return f"{_CURL[number]}, curl exit code {number}"
    return f"exit code {number}"
